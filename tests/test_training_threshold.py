"""A threshold from the held-out chips of several trainings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from minemap.checkpoint import WEIGHTS, load_model, save
from minemap.errors import InputError
from minemap.sentinel2 import BANDS
from minemap.training import metrics, threshold
from minemap.training.config import make_config
from minemap.training.evaluate import predict_chips
from minemap.training.loop import load_sets


@pytest.fixture
def chips(tmp_path: Path) -> str:
    """Thirty places of 48 px, a block each; a third of the pixels are mine."""
    rng = np.random.default_rng(0)
    mask = (rng.random((30, 48, 48)) < 0.33).astype(np.uint8)
    image = 500 + 2500 * mask[:, None].astype(int) + rng.integers(0, 900, (30, 6, 48, 48))
    np.savez(tmp_path / "chips.npz", image=image.astype(np.int16), mask=mask, bands=np.array(BANDS))
    rows = [f"p{i},b{i},{'val' if i > 25 else 'train'}" for i in range(30)]
    (tmp_path / "chips.csv").write_text("\n".join(["id,block,split", *rows]) + "\n")
    return str(tmp_path / "chips.npz")


def test_pooled_over_trainings(chips: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random = load_model(model)
    made = []
    for seed in (0, 1):
        told = {"split": "train", "holdout": 0.2, "holdout_seed": seed}
        made.append(
            save(tmp_path / f"m{seed}", random.network(), replace(random.recipe, training=told, area_model={}))
        )
    own = [threshold.held_out(one, chips) for one in made]
    assert [len(held) for held in own] == [5, 5] and own[0].column("id").tolist() != own[1].column("id").tolist()
    before = (tmp_path / "m0" / WEIGHTS).read_bytes()
    threshold.main([str(tmp_path / "m0"), str(tmp_path / "m1"), "--chips", chips])
    told = json.loads(capsys.readouterr().out.rpartition("}")[0] + "}")
    chance = np.concatenate([predict_chips(random.network(), random.recipe, held, precision="bf16") for held in own])
    mask = np.concatenate([held.mask for held in own])
    expected = metrics.area_unbiased_threshold(chance, mask)
    assert told["threshold"] == pytest.approx(expected, abs=5e-3) and len(told["each"]) == 2
    assert told["bounds"][0] <= told["threshold"] <= told["bounds"][1]
    assert (chance >= told["threshold"]).mean() == pytest.approx(mask.mean(), abs=0.02)
    kept = load_model(tmp_path / "m0").recipe
    assert kept.threshold == told["threshold"] and kept.area_model is None
    assert kept.threshold_rule.startswith(f"mapped area equals true area on {len(mask)} held-out chips")
    assert (tmp_path / "m0" / WEIGHTS).read_bytes() == before
    assert load_model(tmp_path / "m1").recipe == made[1].recipe


def test_without_anything_held_out(chips: str, model: Path) -> None:
    with pytest.raises(InputError, match="held nothing out of its training"):
        threshold.held_out(load_model(model), chips)


def test_held_out_of_a_part_of_the_rows(chips: str, model: Path, tmp_path: Path) -> None:
    random = load_model(model)
    told = {"split": "train", "rows": "fine", "fine_share": 0.5, "fine_seed": 0, "holdout": 0.3, "holdout_seed": 1}
    made = save(tmp_path / "m", random.network(), replace(random.recipe, training=told))
    (training,), _ = load_sets(make_config({"out": "x", "data": [chips], **told}))
    held = threshold.held_out(made, chips)
    assert len(training) + len(held) == 13
    assert not set(training.column("id")) & set(held.column("id"))
