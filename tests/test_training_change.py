"""Training on pairs of dates: what a pair is, that both dates move together, a run, its scores, the study's table."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from minemap.checkpoint import load_model
from minemap.errors import InputError
from minemap.sentinel2 import BANDS
from minemap.training import change_study as study
from minemap.training.batches import make_batch
from minemap.training.chips import Chips, keep_bands, load_pairs
from minemap.training.config import make_config
from minemap.training.evaluate import predict_chips
from minemap.training.loop import make_recipe, train

TINY = {"architecture": "minenetcd", "encoder": "resnet18", "selection": "none", "ssim": 0.0, "boundary": 0.0}
TINY |= {"precision": "fp32"}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Ten places of two dates, in five blocks: bright squares are mine."""
    rng = np.random.default_rng(0)
    mask = np.zeros((10, 2, 24, 24), np.uint8)
    mask[::2, 1, 4:16, 4:16] = 1  # gained
    mask[1::2, 0, 8:20, 8:20] = 1  # lost
    mask[0, 0, :3] = mask[1, 1, :, :3] = 255
    image = rng.integers(500, 900, (10, 2, 6, 24, 24)) + 3000 * (mask[:, :, None] == 1)
    folder = tmp_path_factory.mktemp("pairs")
    np.savez(folder / "chips.npz", image=image.astype(np.int16), mask=mask, bands=np.array(BANDS))
    rows = ["id,block,split", *(f"p{i},{i // 2},{'val' if i > 7 else 'train'}" for i in range(10))]
    (folder / "chips.csv").write_text("\n".join(rows) + "\n")
    return folder / "chips.npz"


def test_pairs_are_gain_and_loss_in_one_class(pairs):
    stored, chips = np.load(pairs), load_pairs(pairs)
    before, after = stored["mask"][:, 0], stored["mask"][:, 1]
    assert chips.image.shape == (20, 12, 24, 24) and chips.column("date").tolist() == ["0", "1"] * 10
    unknown = (before == 255) | (after == 255)
    assert np.array_equal(chips.mask[::2], np.where(unknown, 255, (after == 1) & (before == 0)))
    assert np.array_equal(chips.mask[1::2], np.where(unknown, 255, (before == 1) & (after == 0)))
    assert np.array_equal(chips.image[::2, :6], chips.image[1::2, 6:])
    assert np.allclose(chips.image[::2, 6:], stored["image"][:, 1] / 10_000)
    rgb = keep_bands(chips, BANDS[:3]).image
    assert np.isnan(rgb[:, [3, 4, 5, 9, 10, 11]]).all() and not np.isnan(rgb[:, [0, 6]]).any()


def test_chips_of_one_date_are_no_pairs(pairs, tmp_path):
    stored = np.load(pairs)
    one = {"image": stored["image"][:, 0], "mask": stored["mask"][:, 0], "bands": stored["bands"]}
    np.savez(tmp_path / "chips.npz", **one)
    with pytest.raises(InputError, match="has chips of one date"):
        load_pairs(tmp_path / "chips.npz")


def test_both_dates_move_together_and_vary_apart():
    """Two equal dates: where the augmentation moves a pixel it moves it in both; brightness differs."""
    image = np.random.default_rng(1).uniform(0.1, 0.3, (4, 1, 6, 40, 40)).astype(np.float32).repeat(2, axis=1)
    columns = {"date": np.array(["0"] * 4), "sample": np.arange(4).astype(str)}
    chips = Chips(image.reshape(4, 12, 40, 40), np.zeros((4, 40, 40), np.uint8), columns)
    config = make_config(TINY | {"out": "", "jitter": 0.0, "affine": 1.0, "absent": 0.0, "holes": 0.0, "batch": 4})
    recipe = make_recipe(config)
    for step in range(3):
        still, _ = make_batch([chips], config, recipe, step)
        assert still.shape == (4, 12, 64, 64) and torch.equal(still[:, :6], still[:, 6:])
        moved, _ = make_batch([chips], replace(config, jitter=0.2), recipe, step)
        assert (moved[:, :6] - moved[:, 6:]).abs().mean() > 0.05


def test_blending_dates_is_refused():
    with pytest.raises(InputError, match=r"blend=0\.2: it would mix"):
        make_config(TINY | {"out": "", "blend": 0.2})


def test_a_run_learns_pairs_and_is_evaluated(pairs, tmp_path, minemap):
    options = TINY | {"epochs": 3, "batch": 4, "learning_rate": 2e-3, "warmup": 0, "absent": 0.0, "threads": 1}
    config = make_config(options | {"data": [str(pairs)], "out": str(tmp_path / "run"), "epoch_samples": 24})
    checkpoint = train(config)
    assert checkpoint.recipe.dates == 2 and checkpoint.recipe.classes == ("gain",)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    chips = load_pairs(pairs)
    found = predict_chips(checkpoint.network(), checkpoint.recipe, chips, seen=64)
    assert found.shape == chips.mask.shape
    assert found[chips.mask == 1].mean() > found[chips.mask == 0].mean() + 0.05
    go_on = train(replace(config, start=str(checkpoint.path), out=str(tmp_path / "more"), epochs=1))
    assert go_on.recipe.training["start"]["seed"] == 0
    done = minemap("evaluate", "--chips", pairs, "--model", checkpoint.path, "--split", "val", "--json")
    assert done.returncode == 0, done.stderr
    assert {"f1", "mine_iou", "precision", "recall", "accuracy"} <= set(json.loads(done.stdout))


def test_the_table_of_the_study(pairs):
    chips = load_pairs(pairs).split("val")
    right = study.by_direction(chips.mask == 1, chips)
    wrong = study.by_direction(np.zeros(chips.mask.shape, bool), chips)
    rows = [
        {"seed": 0, "method": study.MAPS, "counts": wrong},
        *({"seed": seed, "method": "with ChangeFFT", "counts": right} for seed in range(3)),
        *({"seed": seed, "method": "without ChangeFFT", "counts": wrong} for seed in range(3)),
    ]
    told = study.table(rows, samples=20)
    assert "| gain | with ChangeFFT | 3 | 100.0 (100.0 to 100.0) | 100.0 (100.0 to 100.0) |" in told
    assert "| loss | difference of two maps | 1 | 0.0 | 0.0 |" in told
    assert "ChangeFFT adds +100.0 (+100.0 to +100.0) to the F1 of gain." in told


def test_scores_of_the_change_class():
    found = study.change_scores(np.array([90, 2, 3, 5]))
    precision, recall = 5 / 7, 5 / 8
    assert found["f1"] == pytest.approx(100 * 2 * precision * recall / (precision + recall))
    assert found["ciou"] == pytest.approx(50.0) and found["accuracy"] == pytest.approx(95.0)


def test_heads_learn_on_features_kept_once(pairs, tmp_path, monkeypatch):
    """The study's own way of training, at its smallest: both methods, one seed; what is done is not done again."""
    monkeypatch.setattr(study, "BATCHES", 2)
    monkeypatch.setattr(study, "STEPS", 4)
    monkeypatch.setattr(study, "BASE", study.BASE | {"sizes": (64,), "batch": 2, "holdout": 0.3})
    study.run(str(pairs), tmp_path, seeds=[0], maps=False)
    rows = study.read(tmp_path)
    assert [row["method"] for row in rows] == list(study.METHODS)
    assert len(list(tmp_path.glob(f"{study.POOL}-*/*.pt"))) == 2
    config = make_config(study.BASE | {"data": [str(pairs)], "out": str(tmp_path)})
    other = study.pool_folder(replace(config, start="demo-2026"))
    assert study.pool_folder(config).exists() and not other.exists()  # features of another encoder lie elsewhere
    study.run(str(pairs), tmp_path, seeds=[0], maps=False)
    assert study.read(tmp_path) == rows
    for name, change_fft in (("with-0", True), ("without-0", False)):
        made = load_model(tmp_path / name)
        assert made.recipe.options["change_fft"] == change_fft and made.network() is not None
        ours, theirs = made.network().encoder.state_dict(), load_model().network().encoder.state_dict()
        assert all(torch.equal(ours[key].half(), theirs[key].half()) for key in ours)
