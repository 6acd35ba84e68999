"""`minemap demo`: mines are where the truth has them, on a seed that no training saw."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr

from minemap.checkpoint import load_model
from minemap.errors import InputError
from minemap.grid import WINDOW
from minemap.inference import Runner, Settings, layout, probability
from minemap.showcase import run_demo
from minemap.training.demo_model import make_scene

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


def changes(mine: np.ndarray, start: int) -> int:
    """Pairs of neighbours in different classes across the lines `start`, `start` + WINDOW, ..., both ways."""
    lines = np.arange(start, len(mine), WINDOW)
    return sum(int((across[lines] != across[lines - 1]).sum()) for across in (mine, mine.T))


def steps(scenes: list[np.ndarray], network: Callable[[np.ndarray, int], np.ndarray]) -> float:
    """Changes of class where windows meet, against those on the same lines in maps whose windows lie 128 px aside.

    network: image (band, y, x) and the first line where windows meet, to mine, bool (y, x).
    """
    meet = elsewhere = 0
    for image in scenes:
        for start, other in ((WINDOW // 2, WINDOW), (WINDOW, WINDOW // 2)):
            mine = network(image, start)
            meet, elsewhere = meet + changes(mine, start), elsewhere + changes(mine, other)
    return meet / elsewhere


def test_windows_leave_no_steps():
    checkpoint = load_model("demo-2026")
    cut, settings = layout(checkpoint), Settings.for_machine()
    runner = Runner(checkpoint, settings)

    def in_squares(image: np.ndarray, corner: int, around: int) -> np.ndarray:
        """With a corner of squares in row and column `corner`, whole squares, and more around them."""
        pads = (around + -corner % WINDOW, around + corner % WINDOW)
        return np.pad(image, [(0, 0), pads, pads], constant_values=np.nan)

    def faded(image: np.ndarray, start: int) -> np.ndarray:
        corner = start + WINDOW // 2  # windows are centred there
        chance = probability(in_squares(image, corner, cut.margin), checkpoint, settings)
        return chance[-corner % WINDOW :, -corner % WINDOW :] >= 0.5

    def side_by_side(image: np.ndarray, start: int) -> np.ndarray:
        whole = in_squares(image, start, cut.halo)
        out = np.zeros(np.array(whole.shape[1:]) - 2 * cut.halo, bool)
        for row in range(0, len(out), WINDOW):
            for column in range(0, len(out), WINDOW):
                chance = runner(whole[None, :, row : row + cut.seen, column : column + cut.seen])[0]
                core = chance[cut.halo : -cut.halo, cut.halo : -cut.halo]
                out[row : row + WINDOW, column : column + WINDOW] = core >= 0.5
        return out[-start % WINDOW :, -start % WINDOW :]

    scenes = [make_scene(seed, 768).image.astype(np.float32) for seed in range(10, 30)]  # with six chance decides
    assert steps(scenes, faded) <= 1.2
    assert steps(scenes[:1], side_by_side) > 2  # the measure finds them where there are some


def test_the_demo_runs_again_in_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert run_demo(Path("demo"), seed=SEED, size=256)["super_tiles_computed"] == 1


def test_a_map_of_the_users_is_left_alone(tmp_path, made):
    path = tmp_path / "mine" / "map.zarr"
    shutil.copytree(made[0] / "map.zarr", path)
    zarr.open_group(path, mode="r+").attrs["stac"] = "earth-search"
    before = sorted(p.stat().st_mtime_ns for p in path.rglob("*"))
    with pytest.raises(InputError, match="is a map, and not the demo's: choose another --out"):
        run_demo(path.parent, seed=SEED, size=256)
    assert sorted(p.stat().st_mtime_ns for p in path.rglob("*")) == before
    assert [p.name for p in path.parent.iterdir()] == ["map.zarr"]
