"""The coarsening: what it does to known shapes, and that it says what the real pairs say."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import SHARED
from shapely import MultiPolygon, Point, box

from minemap.training import coarse
from minemap.training.chips import IGNORE, Chips
from minemap.training.coarse import BLOBS, FITTED, Coarsening, coarsen, coarsen_chips, coarsen_mask, compare, cut_off


def test_nothing_asked_changes_nothing() -> None:
    mask = (np.random.default_rng(0).random((40, 40)) < 0.4).astype(np.uint8)
    mask[:4] = IGNORE
    assert np.array_equal(coarsen_mask(mask, Coarsening()), mask)


def test_growth_of_a_square_by_hand() -> None:
    mask = np.zeros((40, 40), np.uint8)
    mask[10:20, 10:20] = 1
    grown = coarsen_mask(mask, Coarsening(buffer=20.0))
    assert (grown == 1).sum() == pytest.approx(10 * 10 + 4 * 10 * 2 + np.pi * 4, abs=3)
    assert grown[9, 15] == grown[15, 21] == 1
    assert grown[7, 15] == grown[15, 22] == 0


def test_lengths_are_metres_at_any_resolution() -> None:
    mask = np.zeros((1, 40, 40), np.uint8)
    mask[0, 10:20, 10:20] = 1
    chips = Chips(np.zeros((1, 6, 40, 40), np.float32), mask, {}, resolution=30.0)
    grown = coarsen_chips(chips, Coarsening(buffer=30.0)).mask[0]
    np.testing.assert_array_equal(grown, coarsen_mask(mask[0], Coarsening(buffer=10.0)))


def test_gaps_are_bridged_and_small_parts_left_out() -> None:
    two = MultiPolygon([box(0, 0, 100, 100), box(130, 0, 230, 100), box(1000, 0, 1010, 10)])
    closed = coarsen(two, Coarsening(closing=20.0, smallest=1000.0))
    assert closed.geom_type == "Polygon"
    assert closed.bounds == pytest.approx((0, 0, 230, 100), abs=1)
    assert coarsen(two, Coarsening(smallest=1e9)).is_empty


def test_blobs_never_shrink_and_ignored_pixels_stay() -> None:
    rng = np.random.default_rng(1)
    for _ in range(10):
        mask = np.kron(rng.integers(0, 2, (6, 6)), np.ones((8, 8), int)).astype(np.uint8)
        mask[:, :3] = IGNORE
        blob = coarsen_mask(mask, BLOBS)
        assert ((blob == IGNORE) == (mask == IGNORE)).all()
        assert (blob == 1).sum() >= 0.97 * (mask == 1).sum()


def test_chips_without_mines_stay_as_they_are() -> None:
    chips = Chips(np.zeros((2, 6, 8, 8), np.float32), np.zeros((2, 8, 8), np.uint8), {})
    assert np.array_equal(coarsen_chips(chips).mask, chips.mask)


def test_statistics_of_a_circle_and_a_square() -> None:
    circle, square = Point(0, 0).buffer(10, quad_segs=200), box(0, 0, 10, 10)
    assert coarse.roughness(circle) == pytest.approx(1, abs=1e-4)
    assert coarse.roughness(square) == pytest.approx(2 / np.sqrt(np.pi))
    found = compare(box(0, 0, 20, 10), square)
    assert found["area"] == 2
    assert found["iou"] == 0.5


def test_the_fit_stands_for_the_real_pairs(capsys: pytest.CaptureFixture[str]) -> None:
    path = SHARED / "mine_polygons" / "coarse_and_validated_116_tiles.gpkg"
    if not path.exists():
        pytest.skip("requires shared data")
    pairs = coarse.real_pairs(str(path))
    real = coarse.summary(pairs)
    made = coarse.summary([(coarsen(fine, FITTED), fine) for _, fine in pairs])
    assert all(abs(real[key] - made[key]) < 0.025 for key in real)
    print(json.dumps(real))
    assert "iou" in capsys.readouterr().out


def test_a_small_square_cuts_the_growth_from_outside() -> None:
    square = box(0, 0, 470, 470)  # grows by 20 m on every side, beyond its own 480-m square
    found = cut_off([square], Coarsening(buffer=20.0), cells=1)
    assert found["whole_over_fine"] == pytest.approx(found["alone_over_fine"]) == pytest.approx(480**2 / 470**2)
    beside = MultiPolygon([square, box(490, 0, 950, 470)])  # the neighbour's growth reaches into the first square
    found = cut_off([beside], Coarsening(closing=20.0), cells=2)
    assert found["alone_over_whole"] < 1


def test_a_command_of_its_own_ends_in_a_line(tmp_path):
    words = [sys.executable, "-m", "minemap.training.coarse", str(tmp_path / "none.gpkg")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("minemap: file of outlines") and done.stderr.count("\n") == 1
