"""The study's tables and the card's figures against computations by hand; runs are resumed, not repeated."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from minemap.errors import InputError
from minemap.sentinel2 import BANDS
from minemap.training import card, study
from minemap.training.chips import Chips
from minemap.training.config import make_config


def _row(method: str, draw: int, blocks: dict[str, list[int]]) -> dict:
    counts = np.sum(list(blocks.values()), axis=0)
    tn, fp, fn, tp = counts
    miou = 50 * (tp / (tp + fp + fn) + tn / (tn + fp + fn))
    return {"method": method, "draw": draw, "miou": miou, "blocks": blocks}


@pytest.fixture
def rows() -> list[dict]:
    rng = np.random.default_rng(0)
    found = []
    for draw in range(3):
        for method, error in (("fpn_fine", 20), ("minec2fnet", 10)):
            blocks = {str(b): [600, *rng.poisson(error, 2).tolist(), 300] for b in range(12)}
            found.append(_row(method, draw, blocks))
    return found


def test_table_gives_means_ranges_and_paired_differences(rows: list[dict]) -> None:
    text = study.table(rows, ["fpn_fine", "minec2fnet"], ["fpn_fine"], samples=300)
    means = {m: np.mean([r["miou"] for r in rows if r["method"] == m]) for m in ("fpn_fine", "minec2fnet")}
    assert f"| minec2fnet | 3 |  | {means['minec2fnet']:.1f} (" in text
    told = study.table([row | {"held": [50, 0, 0, 50 * (row["draw"] + 1)]} for row in rows], ["fpn_fine"], [])
    assert "| fpn_fine | 3 | 100.0 | " in told
    assert f"| {means['minec2fnet'] - means['fpn_fine']:+.1f} (" in text
    assert study.tables(rows).count("| method |") == 1  # only what was run is told


def test_every_method_is_in_a_table() -> None:
    assert {m for methods, _ in study.TABLES.values() for m in methods} == set(study.METHODS)
    assert all(set(references) <= set(methods) for methods, references in study.TABLES.values())


def test_windows_and_bands_are_those_of_the_chips() -> None:
    """Small chips of all bands as ever; chips of whole mines without infrared in larger windows, as many pixels."""
    small = Chips(np.zeros((2, 6, 48, 48), np.float32), np.zeros((2, 48, 48), np.uint8), {})
    assert study.base(small) == study.BASE | {"bands": list(BANDS)}
    whole = Chips(np.zeros((2, 6, 448, 448), np.float32), np.zeros((2, 448, 448), np.uint8), {})
    whole.image[:, 3:] = np.nan
    found = make_config(study.base(whole) | {"out": ""})
    assert found.bands == ("blue", "green", "red") and found.batch * found.sizes[0] ** 2 == 16 * 64**2


def test_bootstrap_of_equal_methods_is_zero(rows: list[dict]) -> None:
    counts = study.by_method(rows)["fpn_fine"]
    stacked = np.stack([counts[d] for d in range(3)])
    assert np.abs(study.bootstrap(stacked, stacked, study.mean_miou, 50)).max() == 0


def test_bootstrap_interval_covers_the_difference(rows: list[dict]) -> None:
    counts = study.by_method(rows)
    ours, theirs = (np.stack([counts[m][d] for d in range(3)]) for m in ("minec2fnet", "fpn_fine"))
    low, high = np.percentile(study.bootstrap(ours, theirs, study.mean_miou, 400), [2.5, 97.5])
    exact = np.mean([r["miou"] * (1 if r["method"] == "minec2fnet" else -1) for r in rows]) * 2
    assert 0 < low < exact < high


def test_finished_runs_are_skipped(tmp_path: Path) -> None:
    lines = [json.dumps({"draw": 0, "method": m, "coarse": "blobs"}) for m in ("fpn_coarse", "fpn_fine")]
    (tmp_path / study.RESULTS).write_text("\n".join(lines) + "\n")
    study.run("absent.npz", tmp_path, draws=1, methods=["fpn_fine"], coarse="blobs")
    assert len(study.read(tmp_path)) == 2
    with pytest.raises(InputError, match="coarse labels blobs, not fitted"):
        study.run("absent.npz", tmp_path, draws=1, methods=["fpn_fine"], coarse="fitted")


@pytest.mark.parametrize("method", study.METHODS)
def test_every_method_is_a_configuration(method: str) -> None:
    config = make_config(study.BASE | study.METHODS[method] | {"out": "x"})
    assert config.rows == {study.TEACHER: "rest", "fpn_all": "all"}.get(method, "fine")


def _negatives() -> tuple[np.ndarray, Chips]:
    mask = np.zeros((4, 10, 10), np.uint8)
    mask[0, :5] = 255
    category = np.array(["natural_change", "natural_change", "human_activity", "mining_emergence"])
    columns = {"category": category, "block": np.array(["a", "b", "c", "d"])}
    probability = np.zeros((4, 10, 10), np.float32)
    probability[0] = 1
    probability[3] = 1
    return probability, Chips(np.zeros((4, 6, 10, 10), np.float32), mask, columns)


def test_false_alarms_by_hand() -> None:
    found = card.false_alarms(*_negatives(), 0.5)
    assert found["natural_change"] == {"km2_per_1000_km2": pytest.approx(1000 * 50 / 150, abs=0.1), "chips": 2}
    assert found["human_activity"]["km2_per_1000_km2"] == 0


def test_interval_of_a_perfect_answer() -> None:
    _, chips = _negatives()
    chips.mask[3] = 1
    assert card.block_interval((chips.mask == 1).astype(np.float32), chips, 0.5) == [100, 100]
