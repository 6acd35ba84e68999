"""Intervals of areas: on blocks whose truth is known, in a recipe, and in the table."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
from conftest import item
from test_areas import BOX, store_of

from minemap.areas import area_table
from minemap.checkpoint import WEIGHTS, available, load_model
from minemap.errors import InputError
from minemap.sentinel2 import BANDS
from minemap.store import Store
from minemap.training.area_model import Blocks, blocks_of, build, fit, keep, left_out, measured
from minemap.training.chips import Chips
from minemap.uncertainty import AreaModel, spread

WORLD = (-180.0, -84.0, 180.0, 84.0)
MODEL = AreaModel(0.5, 1.1, 0.1, -0.2, 0.3, (-64.0, 6.0, -62.0, 7.0), (0.05, 0.6), {})


def levels(mapped, doubtful, rest, lost=0.0):
    """km² by stored value: 95 %, 40 %, 2 % and not observed."""
    out = np.zeros((*np.shape(mapped), 256))
    out[..., 95], out[..., 40], out[..., 2], out[..., 255] = mapped, doubtful, rest, lost
    return out


def test_interval_by_hand():
    found = MODEL.interval(levels(2.0, 0.5, 7.0, 3.0))
    scale = 0.5 + 0.1
    np.testing.assert_allclose(found, [2.2, 2.2 - 0.2 * scale, 2.2 + 0.3 * scale])
    np.testing.assert_allclose(MODEL.interval(levels(0.0, 0.0, 9.0)), [0, 0, 0.03])
    assert MODEL.interval(levels(2.0, 0.1, 0.0))[2] == 2.1  # not more than was seen
    many = MODEL.interval(levels(np.array([1.0, 2.0]), 0.1, 5.0))
    assert many.shape == (3, 2) and (many[1] <= many[0]).all() and (many[0] <= many[2]).all()


def test_what_is_extrapolated():
    inside, outside = (-63.0, 6.2, -62.9, 6.3), (-61.0, 6.2, -60.9, 6.3)
    usual, rare, all_mine = levels(2.0, 0.5, 7.0), levels(0.001, 0.0, 9.0), levels(9.0, 0.5, 0.0)
    assert not MODEL.extrapolates(usual, [inside]) and MODEL.extrapolates(usual, [inside, outside])
    assert MODEL.extrapolates(all_mine, [inside])
    assert MODEL.extrapolates(rare, [inside]) and MODEL.extrapolates(levels(0.0, 0.0, 0.0), [inside])
    assert MODEL.extrapolates(np.stack([usual, rare]), [inside]).tolist() == [False, True]


def blocks(n, seed, bias=1.2):
    """Blocks at two dates whose relative errors are drawn anew for each block: what the model of errors assumes."""
    rng = np.random.default_rng(seed)
    mapped, doubtful = rng.lognormal(-2, 1, 2 * n), rng.lognormal(-3, 1, 2 * n)
    error = np.repeat(rng.normal(0, 0.2, n), 2) + rng.normal(0, 0.1, 2 * n)
    found = levels(mapped, doubtful, 5.0)
    truth = np.maximum(0, bias * mapped + error * spread(doubtful, 0.1))
    return Blocks(found, truth, np.repeat(np.arange(n).astype(str), 2))


def test_intervals_hold_the_truth_of_blocks_left_out():
    drawn = [blocks(40, seed) for seed in range(4)]
    shares = [measured(some, left_out(some, 0.5))["coverage"] for some in drawn]
    assert 85 <= np.mean(shares) <= 95, shares
    others = blocks(400, 99)
    fitted = fit(blocks(200, 1), 0.5)
    low, high = fitted.interval(others.levels)[1:]
    assert 0.86 <= ((low <= others.truth) & (others.truth <= high)).mean() <= 0.94
    assert fitted.ratio == pytest.approx(1.2, abs=0.05) and fitted.lower < 0 < fitted.upper


def places(n):
    none = np.zeros((n, 6, 2, 2), np.float32)
    columns = {"lon": np.linspace(-64, -62, n).astype(str), "lat": np.linspace(3, 4, n).astype(str)}
    return Chips(none, np.zeros((n, 2, 2), np.uint8), columns)


def test_too_few_blocks():
    with pytest.raises(InputError, match="10 blocks are too few: at least 20"):
        build(blocks(10, 0), places(20), 0.5)


def test_chips_to_blocks():
    mask = np.zeros((4, 2, 2), np.uint8)
    mask[0], mask[1, 0], mask[3] = 1, 255, 1
    columns = {"block": np.array(["a", "a", "b", "b"]), "date": np.array(["0", "1", "0", "0"])}
    chips = Chips(np.zeros((4, 6, 2, 2), np.float32), mask, columns)
    found = blocks_of(np.full((4, 2, 2), 0.7, np.float32), chips, 10.0)
    assert found.block.tolist() == ["a", "a", "b"]
    np.testing.assert_allclose(found.truth, [4e-4, 0, 4e-4])
    np.testing.assert_allclose(found.levels[:, 70], [4e-4, 2e-4, 8e-4])  # 255 is not observed
    assert found.levels.sum() == pytest.approx(14e-4)


def test_kept_in_the_recipe_and_used_by_the_table(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    before = (folder / WEIGHTS).read_bytes()
    errors = replace(MODEL, region=WORLD, shares=(0.05, 0.95))
    kept = keep(load_model(folder), errors)
    assert (folder / WEIGHTS).read_bytes() == before and kept.sha256 != load_model(model).sha256
    assert AreaModel.of(asdict(load_model(folder).recipe), 10) == errors
    assert AreaModel.of({"area_model": {**asdict(errors), "another": 1}}, 10) is None

    def paint(grid, year):
        return np.where(grid.y[:, None] > 687_000, 95, 2) + np.zeros(grid.shape, int)

    path = store_of(tmp_path / "map.zarr", BOX, (2020,), paint, folder)
    (row,) = area_table(path, bbox=BOX, threshold=0.99).itertuples()  # the errors are those of the model's threshold
    assert row.mapped_area_km2 == 0 and not row.extrapolated
    (row,) = area_table(path, bbox=BOX).itertuples()
    whole = np.zeros(256)
    whole[95], whole[2] = row.mapped_area_km2, 1e6
    expected = MODEL.interval(whole)
    np.testing.assert_allclose([row.area_km2, row.area_km2_lower, row.area_km2_upper], expected)
    assert not row.extrapolated
    elsewhere = AreaModel.of(asdict(load_model(folder).recipe), 30)  # errors of 10-m pixels tell nothing of 30-m ones
    half = np.zeros(256)
    half[[2, 95]] = 1.0
    assert elsewhere.extrapolates(half, [BOX]) and not errors.extrapolates(half, [BOX])


@pytest.mark.parametrize("bands", [BANDS, BANDS[:3]])
def test_bands_that_no_scene_has(bands, model, tmp_path):
    """The errors were measured with all bands of the model: of a map without infrared they tell nothing."""
    folder = shutil.copytree(model, tmp_path / "model")
    keep(load_model(folder), replace(MODEL, region=WORLD, shares=(0.0, 1.0)))
    path = store_of(tmp_path / "map.zarr", BOX, (2020,), lambda grid, _: np.full(grid.shape, 80), folder)
    Store(path).write_items([item("a", "2020-06-01", BOX, dict.fromkeys(bands, "x.tif"))])
    (row,) = area_table(path, bbox=BOX).itertuples()
    assert row.area_km2 > 0 and row.extrapolated == (bands != BANDS)


def test_without_measured_errors_there_is_no_estimate(model, tmp_path):
    path = store_of(tmp_path / "map.zarr", BOX, (2020,), lambda grid, _: np.full(grid.shape, 80), model)
    table = area_table(path, bbox=BOX)
    assert table["area_km2"].isna().all() and table["extrapolated"].all() and table["mapped_area_km2"].notna().all()


def test_what_the_default_model_has_measured():
    """The figures of the command; the bounds are the project's aims, but for the width, which is missed."""
    fitted = AreaModel.of(asdict(load_model().recipe), 10)
    assert fitted is not None and fitted.threshold == load_model().recipe.threshold
    assert 85 <= fitted.measured["coverage"] <= 95 and fitted.measured["blocks"] >= 40
    assert {"south-america-2026"} <= set(available())
