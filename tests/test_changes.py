"""Change between two dates of a map, against pixels counted by hand on stores with known values."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import rioxarray  # noqa: F401 (registers the .rio accessor)
import xarray as xr
from pyproj import Geod
from shapely.geometry import box
from test_areas import BOX, EDGE, store_of

import minemap
from minemap.changes import CLASSES, compare, told
from minemap.errors import InputError, StoreError
from minemap.grid import pixel_area_km2
from minemap.scenes import parse_period
from minemap.store import Store

YEARS = (2019, 2021, 2023)
GROUP = "utm32620"


def paint(grid, year):
    """Columns of the zone in blocks of 10 px: never, always, gained in 2021, gained in 2023, lost in 2021, unseen."""
    kind = (np.arange(grid.width) + round(grid.left / 10)) // 10 % 6
    first = np.array([9999, 2019, 2021, 2023, 2019, 2019])[kind]
    values = np.where(first <= year, 90, 4)
    values[(kind == 4) & (year >= 2021)] = 0
    values[(kind == 5) & (year == 2019)] = 255
    return np.broadcast_to(values, grid.shape)


@pytest.fixture(scope="module")
def made(tmp_path_factory, model):
    return store_of(tmp_path_factory.mktemp("change") / "map.zarr", BOX, YEARS, paint, model)


def files(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def test_every_pixel_has_its_class(made, tmp_path):
    out = tmp_path / "change.zarr"
    summary = minemap.change(made, before="2019", after="2023", out=out, table=tmp_path / "t.csv")
    data = xr.open_zarr(out, group=GROUP)
    grid = Store(made).grid(GROUP)
    kind = (np.arange(grid.width) + round(grid.left / 10)) // 10 % 6
    expected = np.broadcast_to(np.array([0, 1, 2, 2, 3, 255], np.uint8)[kind], grid.shape)
    years = np.broadcast_to(np.array([0, 2019, 2021, 2023, 2019, 2021], np.uint16)[kind], grid.shape)
    assert data.change.dims == ("y", "x") and data.change.dtype == np.uint8 and data.first_year.dtype == np.uint16
    assert np.array_equal(data.change, expected) and np.array_equal(data.first_year, years)
    assert data.rio.crs.to_epsg() == 32620 and np.array_equal(data.y, grid.y) and np.array_equal(data.x, grid.x)
    assert data.rio.transform(recalc=True) == grid.transform
    area, (zone, total) = pixel_area_km2(grid), pd.read_csv(tmp_path / "t.csv").to_dict("records")
    for name, value in zip(CLASSES, (0, 1, 2, 3, 255), strict=True):
        assert zone[name] == pytest.approx(area[expected == value].sum(), abs=1e-6) == total[name]
        assert summary[f"km2_{name.removesuffix('_km2')}"] == pytest.approx(zone[name], abs=1e-4)
    assert total["common_observed_fraction"] == pytest.approx((kind != 5).mean(), rel=1e-3)
    assert (zone["zone"], total["zone"]) == (GROUP, "total")
    assert f"{summary['km2_gain']:,.2f} km² gained" in told(summary)


def test_two_periods_have_no_first_year(tmp_path, model):
    path = store_of(tmp_path / "map.zarr", BOX, YEARS[:2], paint, model)
    minemap.change(path, before="2019", after="2021", out=tmp_path / "change.zarr")
    assert "first_year" not in xr.open_zarr(tmp_path / "change.zarr", group=GROUP)


def test_classes_at_the_threshold():
    before, after = np.array([49, 50, 49, 50, 255, 7], np.uint8), np.array([49, 50, 50, 49, 80, 255], np.uint8)
    assert compare(before, after, 50).tolist() == [0, 1, 2, 3, 255, 255]


def test_zones_together_are_the_box(tmp_path, model):
    """Over two zones, all gained: the area of what is mapped, without gap or doubling."""
    values = lambda grid, year: np.full(grid.shape, 80 if year == 2021 else 0)  # noqa: E731
    path = store_of(tmp_path / "map.zarr", EDGE, (2020, 2021), values, model)
    summary = minemap.change(path, before="2020", after="2021", out=tmp_path / "c.zarr", table=tmp_path / "t.parquet")
    table = pd.read_parquet(tmp_path / "t.parquet")
    assert table["zone"].tolist() == ["utm32620", "utm32621", "total"]
    assert summary["km2_gain"] == pytest.approx(table["gain_km2"][:2].sum(), abs=1e-3)
    geod = abs(Geod(ellps="WGS84").geometry_area_perimeter(box(*EDGE).segmentize(0.001))[0]) / 1e6
    assert summary["km2_gain"] > geod  # whole windows around the box, none twice
    assert summary["km2_never"] == summary["km2_loss"] == summary["km2_not_observed"] == 0


def test_a_second_run_goes_on_where_the_first_stopped(made, tmp_path):
    out, again = tmp_path / "change.zarr", tmp_path / "again.zarr"
    first = minemap.change(made, before="2019", after="2023", out=out)
    whole = files(out)
    store = Store(out, "change")
    one, another = list(store.grid(GROUP).tiles(512))[:2]
    for tile in (one, another):  # killed before their records,
        store.record_path(tile, parse_period("2019/2023")).unlink()
    (out / GROUP / "change" / "c" / "0" / "1").unlink()  # and once before the data
    second = minemap.change(made, before="2019", after="2023", out=out)
    assert first["super_tiles"] == first["super_tiles_computed"] > 2 == second["super_tiles_computed"]
    assert [second[k] for k in sorted(first) if k.startswith("km2")] == [
        first[k] for k in sorted(first) if k.startswith("km2")
    ]
    minemap.change(made, before="2019", after="2023", out=again, cluster="local", workers=2)
    assert files(out) == whole == files(again)


def test_what_was_mapped_again_is_compared_again(made, tmp_path, model):
    path = tmp_path / "map.zarr"
    shutil.copytree(made, path)
    shutil.copytree(made.with_name("map.zarr.meta"), path.with_name("map.zarr.meta"))
    minemap.change(path, before="2019", after="2023", out=tmp_path / "change.zarr")
    store, period = Store(path), parse_period("2023")
    tile = next(store.grid(GROUP).tiles(512))
    index = store.periods(GROUP).index(period)
    store.write_tile(tile, index, {"probability": np.full(tile.shape, 0, np.uint8)})
    store.write_record(tile, period, {"windows": [0, 2, 0, 2], "items": ["another"]})
    summary = minemap.change(path, before="2019", after="2023", out=tmp_path / "change.zarr")
    assert summary["super_tiles_computed"] == 1
    assert not (Store(tmp_path / "change.zarr", "change").read_tile(tile, None, "change") == 2).any()


def test_places_mapped_at_one_date_are_left_out(tmp_path, model):
    path = store_of(tmp_path / "map.zarr", BOX, (2020, 2021), paint, model)
    tiles = list(Store(path).grid(GROUP).tiles(512))
    Store(path).record_path(tiles[0], parse_period("2020")).unlink()
    summary = minemap.change(path, before="2020", after="2021", out=tmp_path / "change.zarr")
    assert summary["super_tiles"] == len(tiles) - 1
    assert (Store(tmp_path / "change.zarr", "change").read_tile(tiles[0], None, "change") == 255).all()
    for tile in tiles[1:]:
        Store(path).record_path(tile, parse_period("2020")).unlink()
    with pytest.raises(StoreError, match="no place mapped at both"):
        minemap.change(path, before="2020", after="2021", out=tmp_path / "none.zarr")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"before": "2018"}, "no map of 2018-01-01/2018-12-31: its periods are 2019-01-01/2019-12-31, 2021"),
        ({"before": "2023", "after": "2019"}, "must end earlier"),
        ({"after": "2019"}, "must end earlier"),
        ({"method": "guess"}, "unknown method 'guess'"),
        ({"threshold": 50.0}, "threshold 50.0 is a probability"),
        ({"table": "areas.xlsx"}, "can't write a table to 'areas.xlsx'"),
        ({"out": "s3://bucket/change.zarr"}, "is an address"),
    ],
)
def test_bad_input_leaves_nothing(made, tmp_path, options, said):
    with pytest.raises(InputError, match=said):
        minemap.change(made, **{"before": "2019", "after": "2023", "out": tmp_path / "change.zarr", **options})
    assert not list(tmp_path.iterdir())


def test_stores_are_not_mixed_up(made, tmp_path):
    out = tmp_path / "change.zarr"
    minemap.change(made, before="2019", after="2023", out=out)
    with pytest.raises(StoreError, match=r"made with threshold = 0\.5, this run has 0\.8"):
        minemap.change(made, before="2019", after="2023", out=out, threshold=0.8)
    summary = minemap.change(made, before="2019", after="2023", out=out, threshold=0.8, overwrite=True)
    assert summary["threshold"] == 0.8
    with pytest.raises(StoreError, match="is a store of kind 'map', not 'change'"):
        minemap.change(made, before="2019", after="2023", out=made, overwrite=True)
    with pytest.raises(StoreError, match="is a store of kind 'change', not 'map'"):
        minemap.open_map(out)


def test_command_line(made, tmp_path, minemap):
    words = ("change", made, "--before", 2019, "--after", 2023, "--out", tmp_path / "change.zarr")
    done = minemap(*words, "--json", "--table", tmp_path / "change.csv")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["km2_gain"] > 0 and (tmp_path / "change.csv").exists()
    assert "km² gained" in minemap(*words, "--quiet", "--debug").stdout + minemap(*words).stdout
    wrong = minemap("change", made, "--before", 2020, "--after", 2023, "--out", tmp_path / "other.zarr")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "its periods are" in wrong.stderr
