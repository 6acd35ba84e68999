"""Coarse labels corrected by a network: the rule pixel by pixel, and the file that a training reads."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from minemap.checkpoint import load_model, save
from minemap.errors import InputError
from minemap.sentinel2 import BANDS
from minemap.training import refine, study
from minemap.training.chips import Chips, joined, load_chips, save_chips
from minemap.training.coarse import BLOBS, coarsen_chips
from minemap.training.evaluate import predict_chips


@pytest.fixture
def chips() -> Chips:
    """Two places of 24 px at two dates, the second without infrared at its first date."""
    rng = np.random.default_rng(0)
    image = rng.integers(1, 4000, (4, 6, 24, 24)).astype(np.float32) / 10_000
    image[2, 3:] = np.nan
    mask = np.zeros((4, 24, 24), np.uint8)
    mask[:, 5:9, 5:15], mask[:, :2] = 1, 255
    columns = {"sample": ["0", "0", "1", "1"], "date": ["0", "1"] * 2, "block": ["a", "a", "b", "b"]}
    columns["split"] = ["train"] * 4
    return Chips(image, mask, {k: np.array(v) for k, v in columns.items()}, resolution=20.0)


def test_outlines_of_known_quality_are_found_out() -> None:
    """A network and outlines that err independently: the labels are Bayes' with the true shares, by hand."""
    rng, n = np.random.default_rng(3), 200_000
    truth = rng.random(n) < 0.3
    signal = rng.normal(np.where(truth, 1.0, -1.0), 1.2)
    odds = 2 * signal / 1.2**2 + np.log(0.3 / 0.7)
    hit, false = 0.95, 0.2
    coarse = (rng.random(n) < np.where(truth, hit, false)).astype(np.uint8)
    coarse[:1000] = 255
    weight = np.where(coarse == 1, np.log(hit / false), np.log((1 - hit) / (1 - false)))
    exact = 1 / (1 + np.exp(-(odds + weight)))
    labels = refine.corrected(coarse, odds)
    assert (labels[:1000] == 255).all()
    decided = (np.abs(exact - 0.5) > 0.23) & (coarse != 255)
    assert (labels[decided] == (exact[decided] > 0.5)).mean() > 0.999
    assert (labels[np.abs(exact - 0.5) < 0.17] == 255).mean() > 0.999
    kept = labels != 255
    assert (labels[kept] == truth[kept]).mean() > max((coarse == truth).mean(), ((odds > 0) == truth).mean()) + 0.02


@pytest.mark.parametrize("said", [0, 1, 255])
def test_outlines_that_say_one_thing_leave_the_network_as_it_is(said: int) -> None:
    coarse = np.full((2, 3), said, np.uint8)
    odds = np.array([[-5.0, 5.0, 0.1], [-1.0, 1.0, 9.0]])
    expected = np.array([[0, 1, 255], [0, 1, 1]]) if said != 255 else coarse
    np.testing.assert_array_equal(refine.corrected(coarse, odds), expected)


def test_chips_are_saved_as_they_are_read(chips: Chips, tmp_path: Path) -> None:
    save_chips(tmp_path / "some" / "chips.npz", chips)
    again = load_chips(tmp_path / "some" / "chips.npz")
    np.testing.assert_allclose(again.image, chips.image, atol=1e-6)
    np.testing.assert_array_equal(again.mask, chips.mask)
    assert again.resolution == 20 and again.column("date").tolist() == chips.column("date").tolist()
    assert again.column("sample").tolist() == ["0", "1", "2", "3"]  # a row of its own for each
    assert [p.name for p in (tmp_path / "some").iterdir()] == ["chips.npz"]


def test_sets_are_joined_on_the_columns_they_share(chips: Chips) -> None:
    other = replace(chips, columns={**chips.columns, "place": np.array(["p"] * 4)})
    both = joined([chips, other])
    assert len(both) == 8 and set(both.columns) == set(chips.columns)
    np.testing.assert_array_equal(both.mask[4:], chips.mask)


def test_command_writes_chips_to_learn_from(
    chips: Chips, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coarse = coarsen_chips(chips, BLOBS)
    save_chips(tmp_path / "coarse.npz", coarse)
    random = load_model(model)
    answer = predict_chips(random.network(), random.recipe, load_chips(tmp_path / "coarse.npz"))
    recipe = replace(random.recipe, threshold=float(np.median(answer)))
    sure = save(tmp_path / "sure", random.network(), recipe)  # half of the pixels are mine to it
    refine.main([str(tmp_path / "coarse.npz"), str(sure.path), str(tmp_path / "out.npz")])
    told, written = json.loads(capsys.readouterr().out), load_chips(tmp_path / "out.npz")
    odds = np.log(answer / (1 - answer)) - np.log(recipe.threshold / (1 - recipe.threshold))
    np.testing.assert_array_equal(written.mask, refine.corrected(coarse.mask, odds))
    assert told["mine_after"] == (written.mask == 1).sum() and told["mine_before"] == (coarse.mask == 1).sum()
    assert len(np.unique(written.mask)) == 3  # else this shows little


def test_places_of_the_fine_chips_are_left_out(chips: Chips, model: Path, tmp_path: Path) -> None:
    placed = {**chips.columns, "lon": np.array(["-60.0", "-60.0", "-59.0", "-59.0"]), "lat": np.array(["4.0"] * 4)}
    save_chips(tmp_path / "coarse.npz", replace(chips, columns=placed))
    fine = replace(chips, columns=placed).where(np.array([True, False, False, False]))
    save_chips(tmp_path / "fine.npz", fine)
    words = [str(tmp_path / "coarse.npz"), str(model), str(tmp_path / "out.npz"), "--fine"]
    refine.main([*words, str(tmp_path / "fine.npz")])
    assert load_chips(tmp_path / "out.npz").column("lon").tolist() == ["-59.0", "-59.0"]
    with pytest.raises(InputError, match=r"no chip .* is left to correct"):
        refine.main([*words, str(tmp_path / "coarse.npz")])


def test_the_study_corrects_the_rest_of_a_draw(model: Path, tmp_path: Path) -> None:
    """Fine labels where the draw has them; the network before answers for the rest; what it held out is left out."""
    rng, n = np.random.default_rng(1), 40
    mask = np.zeros((n, 24, 24), np.uint8)
    mask[:, 6:12, 6:12] = 1
    columns = {"block": np.arange(n).astype(str), "split": np.array(["train"] * 30 + ["val"] * 10)}
    image = rng.integers(1, 4000, (n, 6, 24, 24)).astype(np.float32) / 10_000
    save_chips(tmp_path / "chips.npz", Chips(image, mask, columns))
    path = study.correct(str(tmp_path / "chips.npz"), tmp_path / "made.npz", model, draw=0, coarse="blobs")
    made = load_chips(path)
    assert set(made.column("split")) == {"train"} and made.image.shape[1] == len(BANDS)
    times = Counter(made.column("block").tolist())
    fine = {block for block, n in times.items() if n == study.OFTEN}
    assert 2 <= len(fine) <= 5 and set(times.values()) == {1, study.OFTEN} and 25 < len(times) < 30
    as_drawn = np.isin(made.column("block"), list(fine))
    assert (made.mask[as_drawn] == mask[0]).all() and not (made.mask[~as_drawn] == mask[0]).all()
