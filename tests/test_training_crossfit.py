"""Cross-fitting: every chip is answered once, by a network that has not seen it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from minemap.checkpoint import load_model, save
from minemap.errors import InputError
from minemap.inference import percent
from minemap.sentinel2 import BANDS
from minemap.training import crossfit, metrics
from minemap.training.chips import draw_blocks, load_chips
from minemap.training.config import as_json, make_config
from minemap.training.evaluate import predict_chips

TINY = {"epochs": 1, "batch": 2, "epoch_samples": 2, "sizes": [32], "precision": "fp32", "threads": 1}
TINY |= {"encoder": "tu-lcnet_050", "schedule": "cosine"}


@pytest.fixture(scope="module")
def chips(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Six places of 24 px, a block each, whose bright patches are the mines."""
    folder = tmp_path_factory.mktemp("chips")
    rng = np.random.default_rng(0)
    mask = np.kron(rng.integers(0, 2, (6, 3, 3)), np.ones((8, 8), int))
    image = 500 + 2500 * mask[:, None] + rng.integers(0, 300, (6, 6, 24, 24))
    np.savez(folder / "chips.npz", image=image.astype(np.int16), mask=mask.astype(np.uint8), bands=np.array(BANDS))
    (folder / "chips.csv").write_text("\n".join(["block,split", *(f"b{i},train" for i in range(6))]) + "\n")
    return str(folder / "chips.npz")


@pytest.fixture
def recipe(chips: str, model: Path, tmp_path: Path) -> str:
    """A model whose recipe tells of a teacher and a student."""
    random = load_model(model)
    teacher = as_json(make_config({**TINY, "out": "", "data": [chips], "architecture": "fpn"}))
    student = as_json(make_config({**TINY, "out": "", "data": [chips]})) | {"teacher": teacher}
    return str(save(tmp_path / "m", random.network(), replace(random.recipe, training=student)).path)


def test_folds_hold_every_row_once(chips: str) -> None:
    rows = load_chips(chips)
    drawn = np.stack([draw_blocks(rows, 1 / 3, 3, fold) for fold in range(3)])
    assert (drawn.sum(axis=0) == 1).all() and drawn.any(axis=1).all()
    np.testing.assert_array_equal(drawn[0], draw_blocks(rows, 1 / 3, 3))


def test_answers_are_those_of_networks_that_have_not_seen_the_chip(
    chips: str, recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    crossfit.main(["run", recipe, "--chips", chips, "--out", str(tmp_path), "--folds", "2"])
    printed = capsys.readouterr().out
    answers = crossfit.load(tmp_path / crossfit.ANSWERS)
    rows = load_chips(chips)
    assert answers.stages == ["teacher", "student"]
    assert sorted(answers.columns["block"]) == sorted(rows.column("block"))
    for fold in (0, 1):
        told = load_model(tmp_path / f"student-{fold}" / "model").recipe.training
        assert (told["holdout"], told["holdout_fold"], told["keep"]) == (0.5, fold, "last")
        assert told["teacher"]["holdout_fold"] == fold
        log = (tmp_path / f"student-{fold}" / "metrics.jsonl").read_text().splitlines()
        assert json.loads(log[-1])["images"] == (answers.fold == fold).sum()
        held = rows.where(draw_blocks(rows, 0.5, 0, fold))
        assert held.column("block").tolist() == answers.columns["block"][answers.fold == fold].tolist()
        network = load_model(tmp_path / f"student-{fold}" / "model")
        expected = percent(predict_chips(network.network(), network.recipe, held, precision="fp32"))
        np.testing.assert_array_equal(answers.percent[1][answers.fold == fold], expected)
    chance = answers.percent[1] / np.float32(100)
    threshold = metrics.area_unbiased_threshold(chance, answers.mask)
    whole = metrics.report(chance, answers.mask, threshold)["miou"]
    (line,) = (line for line in printed.splitlines() if line.startswith("| student |"))
    assert f"| {whole:.1f} | {threshold:.2f} (" in line
    crossfit.main(["table", str(tmp_path / crossfit.ANSWERS)])
    assert capsys.readouterr().out == printed


def test_a_model_that_tells_of_no_training(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not record its whole training"):
        crossfit.stages({"about": "random weights"})
    (tmp_path / "answers.npz").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"answers\.npz cannot be read as the answers"):
        crossfit.main(["table", str(tmp_path / "answers.npz")])
