"""`minemap demo`: mines are where the truth has them, on a seed that no training saw."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import painted
from scipy import ndimage

from minemap.checkpoint import load_model
from minemap.grid import CELL, WINDOW, Grid
from minemap.showcase import run_demo
from minemap.store import Store

SEED = 4


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    assert "100" in json.dumps(load_model("demo-2026").recipe.training), "the seeds of its training begin at 100"
    out = tmp_path_factory.mktemp("demo") / "demo"
    return out, run_demo(out, seed=SEED, size=720)


def test_demo_finds_the_mines(made):
    out, summary = made
    assert summary["iou"] >= 0.6
    assert summary["km2_mine"] == pytest.approx(summary["truth_km2"], rel=0.3)
    with (out / "areas.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["iou"]) == summary["iou"] and float(row["observed_fraction"]) > 0.8
    assert (out / "map.png").stat().st_size > 50_000
    assert 50_000 < (out / "map.html").stat().st_size < 10e6


def changes(path: Path, shift: int = 0) -> float:
    """Share of neighbouring observed pixels in different classes across the lines `shift` pixels from the borders of
    windows, over all zones, periods and super-tiles (whose borders lie between two shards, and are read from both).
    """
    store = Store(path)
    different = pairs = 0
    for group in store.groups():
        grid = store.grid(group)
        for n in range(len(store.periods(group))):
            percent = store.read_tile(grid, n, "probability")
            for values in (percent, percent.T):
                lines = np.arange(shift or WINDOW, len(values), WINDOW)
                before, after = values[lines - 1], values[lines]
                seen = (before != 255) & (after != 255)
                different += int(((before >= 50) != (after >= 50))[seen].sum())
                pairs += int(seen.sum())
    return different / pairs


def test_changes_at_borders_of_windows_are_counted(tmp_path):
    """The measure itself: even on blobs that know of no windows, high where each window has its own level."""
    grid = Grid(32620, 25 * float(CELL), 34 * float(CELL), 2048, 2048)
    rng = np.random.default_rng(0)
    smooth = ndimage.gaussian_filter(rng.normal(size=grid.shape), 3)
    smooth *= 8 / smooth.std()
    levels = np.kron(rng.normal(0, 3, size=(8, 8)), np.ones((WINDOW, WINDOW)))
    for name, values in (("even", smooth), ("steps", smooth + levels)):
        percent = np.clip(50 + values, 0, 100).astype(np.uint8)
        painted(tmp_path / f"{name}.zarr", {grid: {"2023": percent}}, chunk=1024)
    assert changes(tmp_path / "even.zarr") == pytest.approx(changes(tmp_path / "even.zarr", 128), rel=0.1)
    assert changes(tmp_path / "steps.zarr") > 1.5 * changes(tmp_path / "steps.zarr", 128)


@pytest.mark.xfail(strict=True, reason="the networks' windows show: pooled over seeds 10 to 14 four times as many")
def test_windows_leave_no_steps_in_the_demo(made):
    out, _ = made
    assert changes(out / "map.zarr") <= 1.2 * changes(out / "map.zarr", 128)
