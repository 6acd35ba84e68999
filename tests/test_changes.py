"""Change between two dates of a map, against pixels counted by hand on stores with known values."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import rasterio
import rioxarray
import torch
import xarray as xr
from distributed import Client
from pyproj import Geod
from scipy import ndimage
from shapely.geometry import box
from test_areas import BOX, EDGE, store_of

import minemap
from minemap.changes import CLASSES, Comparison, _reading, compare, told
from minemap.checkpoint import DEFAULT_CHANGE_MODEL, Recipe, save
from minemap.demo import DemoConfig, make_demo
from minemap.errors import InputError, StoreError
from minemap.export import export
from minemap.grid import grids, pixel_area_km2
from minemap.models import build
from minemap.reader import Access
from minemap.scenes import parse_period, source
from minemap.sentinel2 import BANDS
from minemap.store import Store

YEARS = (2019, 2021, 2023)
GROUP = "utm32620"
CHANGED = 0.545  # probability in the middle of what random weights answer: every last digit counts
CLASS_TOTALS = [f"km2_{name.removesuffix('_km2')}" for name in CLASSES]


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
    for name, told_as, value in zip(CLASSES, CLASS_TOTALS, (0, 1, 2, 3, 255), strict=True):
        assert zone[name] == pytest.approx(area[expected == value].sum(), abs=1e-6) == total[name]
        assert summary[told_as] == pytest.approx(zone[name], abs=1e-4)
    assert total["common_observed_fraction"] == pytest.approx((kind != 5).mean(), rel=1e-3)
    assert (zone["zone"], total["zone"]) == (GROUP, "total")
    assert f"{summary['km2_gain']:,.2f} km² gained" in told(summary)


def test_two_periods_have_no_first_year(tmp_path, model):
    path = store_of(tmp_path / "map.zarr", BOX, YEARS[:2], paint, model)
    minemap.change(path, before="2019", after="2021", out=tmp_path / "change.zarr")
    assert "first_year" not in xr.open_zarr(tmp_path / "change.zarr", group=GROUP)


def add_year(path, year):
    """Another year of a map that `paint` drew."""
    store, period = Store(path), parse_period(str(year))
    index = store.add_period(GROUP, period)
    for tile in store.grid(GROUP).tiles(512):
        store.write_tile(tile, index, {"probability": paint(tile, year).astype(np.uint8)})
        store.write_record(tile, period, {"windows": [0, 2, 0, 2], "items": []})


def test_goes_on_when_the_map_has_more_years(tmp_path, model):
    path, out = store_of(tmp_path / "map.zarr", BOX, YEARS[:2], paint, model), tmp_path / "change.zarr"
    for year in (None, 2023, 2024):  # with 2023 it has enough of them for a first year
        if year is not None:
            add_year(path, year)
        summary = minemap.change(path, before="2019", after="2021", out=out)
        assert summary["super_tiles_computed"] == summary["super_tiles"] == 4
        assert minemap.change(path, before="2019", after="2021", out=out)["super_tiles_computed"] == 0
        minemap.change(path, before="2019", after="2021", out=tmp_path / "anew.zarr", overwrite=True)
        assert files(out) == files(tmp_path / "anew.zarr")
    first = xr.open_zarr(out, group=GROUP).first_year.values
    assert np.unique(first).tolist() == [0, 2019, 2021, 2023]


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


def test_a_killed_run_goes_on(made, tmp_path):
    out, whole = tmp_path / "change.zarr", tmp_path / "whole.zarr"
    first = minemap.change(made, before="2019", after="2023", out=whole)
    words = ["change", made, "--before", "2019", "--after", "2023", "--out", out, "--quiet"]
    running = subprocess.Popen([sys.executable, "-m", "minemap", *map(str, words)])
    ledger = tmp_path / "change.zarr.meta" / "ledger"
    while running.poll() is None and not list(ledger.rglob("[!.]*.json")):
        time.sleep(0.005)
    running.kill()
    running.wait()
    store, period = Store(out, "change"), parse_period("2019/2023")
    tile = next(t for t in store.grid(GROUP).tiles(512) if store.record(t, period))
    store.record_path(tile, period).unlink()  # and as if killed before a record
    second = minemap.change(made, before="2019", after="2023", out=out)
    assert 1 <= second["super_tiles_computed"] <= second["super_tiles"] == 4
    assert {k: second[k] for k in CLASS_TOTALS} == {k: first[k] for k in CLASS_TOTALS}
    assert files(out) == files(whole)


def test_a_damaged_super_tile_is_made_again(made, tmp_path):
    out, whole = tmp_path / "change.zarr", tmp_path / "whole.zarr"
    for path in (out, whole):
        minemap.change(made, before="2019", after="2023", out=path)
    shard = next(p for p in sorted((out / GROUP / "change" / "c").rglob("*")) if p.is_file())
    for where in (10, -3):  # in a chunk, and in the shard's index
        data = bytearray(shard.read_bytes())
        data[where] ^= 255
        shard.write_bytes(data)
        assert minemap.change(made, before="2019", after="2023", out=out)["super_tiles_computed"] == 1
        assert files(out) == files(whole)
    for layer in ("change", "first_year"):  # lost, as after a copy that broke off
        shard = next(p for p in sorted((out / GROUP / layer / "c").rglob("*")) if p.is_file())
        shard.unlink()
        assert minemap.change(made, before="2019", after="2023", out=out)["super_tiles_computed"] == 1
        assert files(out) == files(whole)
    assert minemap.change(made, before="2019", after="2023", out=out)["super_tiles_computed"] == 0


def test_a_neighbour_mapped_again_counts_for_a_network_that_looks_over_the_edge(made, tmp_path):
    """The answer of the maps alone does not depend on it."""
    path = shutil.copytree(made, tmp_path / "map.zarr")
    shutil.copytree(Store(made).meta, Store(path).meta)
    store = Store(path)
    before, after, *_ = store.periods(GROUP)
    tile, *_ = store.done(GROUP, before)
    beside = replace(tile, left=tile.left + tile.width * 10)
    jobs = [Comparison(store, store, before, after, 50, {}, detector) for detector in (None, object())]
    digests = [job.source(tile) for job in jobs]
    store.write_record(beside, before, {"windows": [0, 2, 0, 2], "items": ["another"]})
    assert [job.source(tile) == digest for job, digest in zip(jobs, digests, strict=True)] == [True, False]


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
        ({"before": "2018"}, "the map has no period 2018-01-01/2018-12-31: it has 2019-01-01/2019-12-31, 2021"),
        ({"before": "2023", "after": "2019"}, "must end earlier"),
        ({"after": "2019"}, "must end earlier"),
        ({"method": "guess"}, "unknown method 'guess'"),
        ({"model": "demo-2026"}, "is for method minenetcd"),
        ({"method": "minenetcd", "model": "demo-2026"}, "model demo-2026 looks at one date"),
        ({"threshold": 50.0}, "threshold 50.0 is a probability"),
        ({"table": "areas.xlsx"}, "table 'areas.xlsx' can't be written"),
        ({"out": "ftp://host/change.zarr"}, "is an address that stores can't have"),
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
        minemap.change(out, before="2019", after="2023", out=tmp_path / "other.zarr")


def test_a_map_of_change_is_opened_trimmed_and_goes_to_a_cog(made, tmp_path):
    out = tmp_path / "change.zarr"
    minemap.change(made, before="2019", after="2023", out=out)
    data, source = minemap.open_map(out), minemap.open_map(made)
    assert data.change.dtype == np.uint8 and data.change.dims == ("y", "x") and data.change.chunks
    np.testing.assert_array_equal(data["x"], source["x"])
    np.testing.assert_array_equal(data["y"], source["y"])
    with rasterio.open(export(out, tmp_path / "change.tif")) as file:
        np.testing.assert_array_equal(file.read(1), data.change.values)
        assert file.nodata == 255 and file.crs == data.rio.crs and file.tags()["before"] == "2019-01-01/2019-12-31"
        assert file.transform == data.rio.transform() and file.colormap(1)[2] != file.colormap(1)[3]
    with pytest.raises(InputError, match="is a map of change: it holds classes of two dates"):
        export(out, tmp_path / "change.tif", threshold=0.5)


def test_command_line(made, tmp_path, minemap):
    words = ("change", made, "--before", 2019, "--after", 2023, "--out", tmp_path / "change.zarr")
    done = minemap(*words, "--json", "--table", tmp_path / "change.csv")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["km2_gain"] > 0 and (tmp_path / "change.csv").exists()
    (zone,) = json.loads(minemap("info", tmp_path / "change.zarr", "--json").stdout)["zones"]
    (found,) = zone["periods"]
    assert found["period"] == "2019-01-01/2019-12-31 to 2023-01-01/2023-12-31" and found["super_tiles"] > 0
    assert [found[name] for name in CLASSES] == [pytest.approx(summary[name], abs=1e-3) for name in CLASS_TOTALS]
    info = minemap("info", tmp_path / "change.zarr").stdout
    assert f"change of {made}" in info and f"{found['gain_km2']:,.2f} km² gain" in info
    assert "km² gained" in minemap(*words, "--quiet", "--debug").stdout + minemap(*words).stdout
    wrong = minemap("change", made, "--before", 2020, "--after", 2023, "--out", tmp_path / "other.zarr")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "has no period" in wrong.stderr


# --- on the demo scene ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_years(tmp_path_factory):
    config = DemoConfig(seed=5, size=384, years=(2019, 2023), scenes_per_year=4, cloud=0.1)
    return make_demo(tmp_path_factory.mktemp("years"), config)


@pytest.fixture(scope="module")
def mapped(two_years, tmp_path_factory):
    """Both years by the demo's own model, with their composites."""
    return map_years(two_years.items, two_years.bbox, tmp_path_factory.mktemp("mapped") / "map.zarr")


def map_years(items, bbox, out, model="demo-2026", **options):
    options |= {"stac": items, "model": model, "chunk": 512, "min_clear": 1, "precision": "fp32"}
    for year in (2019, 2023):
        minemap.map_area(bbox, str(year), out, keep_composite=True, **options)
    return out


@pytest.fixture(scope="module")
def changer(tmp_path_factory):
    """A small MineNetCD with random weights."""
    torch.manual_seed(0)
    options = {"in_channels": len(BANDS), "encoder": "tu-regnetx_002", "width": 16}
    scale = {"mean": (0.05, 0.08, 0.08, 0.25, 0.2, 0.12), "std": (0.05, 0.05, 0.07, 0.1, 0.1, 0.1)}
    recipe = Recipe("changer", "minenetcd", options, BANDS, threshold=0.5, classes=("gain",), **scale)
    folder = tmp_path_factory.mktemp("changer") / "model"
    save(folder, build("minenetcd", **options), recipe)
    return folder


def truth_on(data, path):
    """A year's truth on the pixels of a map, 255 outside the scene."""
    truth = rioxarray.open_rasterio(path).isel(band=0)
    return truth.reindex(y=data.y, x=data.x, fill_value=255).values


def test_gain_and_loss_of_the_demo_scene(two_years, mapped, tmp_path):
    data = compared(mapped, tmp_path / "change.zarr")
    before, after = (truth_on(data, two_years.truth[year]) for year in (2019, 2023))
    seen = (before != 255) & (after != 255) & (data.values != 255)
    true, found = seen & (before == 0) & (after == 1), seen & (data.values == 2)
    near = ndimage.binary_dilation(true, iterations=2)
    assert (found & true).sum() > 0.75 * true.sum() > 1000
    assert (found & near).sum() > 0.85 * found.sum()
    assert (seen & (data.values == 3)).sum() < 0.1 * true.sum()  # no mine of the scene ceases to be

    # The looks of the two years exchanged: what was gained is lost
    items = json.loads(two_years.items.read_text())
    for item in items["features"]:
        day = item["properties"]["datetime"]
        item["properties"]["datetime"] = {"2019": "2023", "2023": "2019"}[day[:4]] + day[4:]
    exchanged = two_years.items.with_name("exchanged.json")
    exchanged.write_text(json.dumps(items))
    back = compared(map_years(exchanged, two_years.bbox, tmp_path / "map.zarr"), tmp_path / "back.zarr").values
    lost = (back == 3) & seen
    assert (lost & true).sum() > 0.75 * true.sum() and (lost & near).sum() > 0.85 * lost.sum()


def compared(path, out, **options):
    minemap.change(path, before="2019", after="2023", out=out, **options)
    return xr.open_zarr(out, group=GROUP).change


def composites_of(path, window):
    """Both composites of a map as stored: float32 (2, band, y, x), NaN where there is none."""
    row, column = window.offset_in(Store(path).grid(GROUP))
    place = {"y": slice(row, row + window.height), "x": slice(column, column + window.width)}
    stored = xr.open_zarr(path, group=GROUP, mask_and_scale=False).composite.sortby("time").isel(place).values
    return np.where(stored == 0, np.float32(np.nan), stored / np.float32(10_000))


def test_minenetcd_sees_both_composites_in_the_maps_windows(mapped, changer, tmp_path):
    """One window by hand, from the composites as stored; the number of workers changes nothing."""
    model, data = minemap.load_model(changer), minemap.open_map(mapped, GROUP).probability
    grid = Store(mapped).grid(GROUP)
    inner = [tile for tile in grid.tiles(256) if min(tile.offset_in(grid)) > 0]
    corners = [tile.window(-96, -96, 192, 192) for tile in inner]  # of the 320 px seen those of one window alone
    window = max(corners, key=lambda w: int(data.sel(y=w.y, x=w.x).notnull().all("time").sum()))
    dates = model.recipe.normalise(torch.from_numpy(composites_of(mapped, window.buffered(64))))
    orders = [torch.cat([*pair])[None] for pair in (dates, dates.flip(0))]
    with torch.no_grad():
        gain, loss = (torch.sigmoid(model.network()(x))[0, 0, 64:-64, 64:-64].numpy() for x in orders)
    likely = np.maximum(gain, loss)
    threshold = round(float(np.median(likely)), 4)
    percent = data.sel(y=window.y, x=window.x).values
    limit = np.ceil(Store(mapped).attributes()["recipe"]["threshold"] * 100)
    expected = np.where(likely >= threshold, np.where(gain >= loss, 2, 3), percent.mean(axis=0) >= limit)
    options = {"method": "minenetcd", "model": changer, "threshold": threshold}
    found = compared(mapped, tmp_path / "change.zarr", **options).sel(y=window.y, x=window.x).values
    sure = ~np.isnan(percent).any(axis=0)
    assert sure.sum() > 15_000 and (found[~sure] == 255).all()
    sure &= (np.abs(likely - threshold) > 1e-4) & (np.abs(gain - loss) > 1e-4)
    assert sure.sum() > 15_000 and len(np.unique(expected[sure])) > 1
    assert (found == expected)[sure].all()
    with Client(processes=False, n_workers=2, threads_per_worker=1, dashboard_address=":0") as client:
        compared(mapped, tmp_path / "two.zarr", client=client, **options)
    assert files(tmp_path / "two.zarr") == files(tmp_path / "change.zarr")


@pytest.fixture(scope="module")
def one_window(two_years, mapped, tmp_path_factory):
    """A window of the scene, and both years of it alone."""
    window = next(w for w in Store(mapped).grid(GROUP).tiles(256) if w.buffered(-100).inside(two_years.bbox).all())
    out = tmp_path_factory.mktemp("window") / "map.zarr"
    return window, map_years(two_years.items, window.buffered(-100).lonlat_bounds, out)


def test_the_box_that_was_mapped_changes_no_pixel(mapped, one_window, changer, tmp_path):
    """One window alone: its composites are kept to their edge, and the network looks over it."""
    window, small = one_window
    options = {"method": "minenetcd", "model": changer, "threshold": CHANGED}
    alone = compared(small, tmp_path / "small.zarr", **options).sel(y=window.y, x=window.x).values
    whole = compared(mapped, tmp_path / "whole.zarr", **options).sel(y=window.y, x=window.x).values
    assert {2, 3} <= set(np.unique(whole)) and np.array_equal(alone, whole)


def test_kept_composites_are_used_where_they_are_what_would_be_read(two_years, model, changer, tmp_path):
    """A map of one super-tile, with all that the network sees around it from scenes of the same cell."""
    *_, tile = grids(two_years.bbox, 512)[0].tiles(512)
    wide = map_years(two_years.items, tile.buffered(200).lonlat_bounds, tmp_path / "map.zarr", model, max_scenes=2)
    lean = tmp_path / "lean.zarr"
    shutil.copytree(wide, lean)
    shutil.copytree(wide.with_name("map.zarr.meta"), lean.with_name("lean.zarr.meta"))
    shutil.rmtree(lean / GROUP / "composite")
    options = {"method": "minenetcd", "model": changer, "threshold": CHANGED}
    read = compared(lean, tmp_path / "read.zarr", **options)
    assert np.array_equal(compared(wide, tmp_path / "kept.zarr", **options), read)

    # The kept composites exchanged: what is gained by them is lost, and what is read again stays as it was
    store = Store(wide)
    for each in store.grid(GROUP).tiles(512):
        for index, image in enumerate([store.read_tile(each, n, "composite") for n in (1, 0)]):
            store.write_tile(each, index, {"composite": image})
    exchanged = compared(wide, tmp_path / "exchanged.zarr", **options)
    was, now = (data.sel(y=tile.y, x=tile.x).values for data in (read, exchanged))
    assert {2, 3} <= set(np.unique(was)) and np.array_equal(now, np.array([0, 1, 3, 2] + [255] * 252)[was])
    around = ~(read.y.isin(tile.y) & read.x.isin(tile.x)).values
    assert (read.values[around] == 2).any() and np.array_equal(read.values[around], exchanged.values[around])


@pytest.mark.parametrize("name", ["planetary-computer", "earth-search", "http://127.0.0.1:9/other", "items"])
def test_scenes_are_read_again_as_the_map_read_them(name, mapped, two_years, tmp_path, monkeypatch):
    """Tokens are for the Planetary Computer, also where another instance of it stands in."""
    monkeypatch.setenv("MINEMAP_PLANETARY_COMPUTER", "http://127.0.0.1:9/stac")
    where = source(two_years.items if name == "items" else name)
    about = Store(mapped).attributes()
    store = Store(tmp_path / "map.zarr")
    store.create({**about, "parameters": {**about["parameters"], "source": where.url}})
    assert _reading(store, parse_period("2019"), BANDS).access == Access.of(where)


def test_the_bundled_network_of_change(one_window, tmp_path, minemap):
    words = ("change", one_window[1], "--before", 2019, "--after", 2023, "--out", tmp_path / "change.zarr", "--json")
    done = minemap(*words, "--method", "minenetcd")
    assert done.returncode == 0, done.stderr
    summary, parameters = (
        json.loads(done.stdout),
        Store(tmp_path / "change.zarr", "change").attributes()["parameters"],
    )
    assert parameters["change_model"] == DEFAULT_CHANGE_MODEL and parameters["threshold"] == summary["threshold"]
    assert summary["method"] == "minenetcd" and summary["km2_never"] > summary["km2_gain"] + summary["km2_loss"] > 0


def test_a_network_of_change_makes_no_maps(two_years, changer, tmp_path):
    with pytest.raises(InputError, match="model changer compares two dates"):
        minemap.map_area(two_years.bbox, "2019", tmp_path / "map.zarr", stac=two_years.items, model=changer)
    image = xr.DataArray(np.zeros((6, 4, 4), np.float32), dims=("band", "y", "x"))
    with pytest.raises(InputError, match="model changer compares two dates"):
        minemap.predict(image, minemap.load_model(changer))
