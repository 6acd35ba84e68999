"""The main job on the synthetic scene: the same place gives the same pixel, and nothing is done twice."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from unittest.mock import ANY

import geopandas
import numpy as np
import pytest
import rasterio
import xarray as xr
import zarr
from conftest import item_file, shrunk
from pyproj import Transformer
from shapely.geometry import box

import minemap
from minemap import compositing, load_cube, map_area, mapping, open_map, reader
from minemap.checkpoint import DEFAULT_MODEL, available, load_model
from minemap.cluster import ClusterError
from minemap.compositing import Rule, composite
from minemap.demo import DemoConfig, make_demo
from minemap.errors import DamagedTileError, InputError, NoItemsError, ReadError, StoreError
from minemap.files import write_atomically
from minemap.planning import plan
from minemap.report import describe, estimate, told
from minemap.scenes import Scenes, moment, parse_period, search
from minemap.store import Store
from minemap.vectors import AOI, in_zone, inside_aoi

pytestmark = pytest.mark.filterwarnings("ignore:.*no SCL:UserWarning")


@pytest.fixture(scope="module")
def made(inner, options, tmp_path_factory):
    path = tmp_path_factory.mktemp("made") / "map.zarr"
    return path, map_area(inner, "2023", path, keep_composite=True, **options)


def stored(path, name="probability", zone=None):
    """An array of a map as stored, with its coordinates."""
    zone = zone or Store(path).groups()[0]
    trimmed = open_map(path, zone)  # a zone-wide store is far too large to load whole
    data = xr.open_zarr(path, group=zone, mask_and_scale=False)[name].isel(time=0)
    return data.sel(y=trimmed["y"], x=trimmed["x"]).load()


def overlap(one, other):
    """Both on the coordinates that they share, where both were computed."""
    y, x = (np.intersect1d(one[d], other[d]) for d in ("y", "x"))
    return one.sel(y=y, x=x).values, other.sel(y=y, x=x).values


def test_store_follows_the_contract(made):
    path, summary = made
    group = zarr.open_group(path, mode="r")
    assert {"minemap", "model", "model_sha256", "recipe", "parameters", "parameters_hash", "stac"} <= set(group.attrs)
    zone = group["utm32620"]
    assert zone["probability"].shards == (1, 512, 512) and zone["probability"].chunks == (1, 256, 256)
    assert zone["probability"].fill_value == 255 and zone["probability"].attrs["_FillValue"] == 255
    assert zone["observations"].fill_value == 0 and "_FillValue" not in zone["observations"].attrs
    assert zone["quicklook"].shape[-1] == zone["probability"].shape[-1] // 8
    assert "checksum': True" in str(zone["probability"].metadata.codecs[0].to_dict())
    assert zone.attrs["proj:code"] == "EPSG:32620"
    data = xr.open_zarr(path, group="utm32620")
    assert data.rio.crs.to_epsg() == 32620 and data["probability"].rio.crs.to_epsg() == 32620
    assert list(data["probability"].dims) == ["time", "y", "x"]
    assert str(data["time"].values[0])[:10] == "2023-01-01"
    assert data["x"].values[0] % 10 == 5 and data["y"].values[0] % 10 == 5
    assert summary["km2_mine"] <= summary["km2_observed"] <= summary["km2_total"]
    assert json.loads((path.with_name("map.zarr.meta") / "items.json").read_text())["type"] == "FeatureCollection"


def test_areas_of_the_summary_are_those_of_the_pixels(made, inner):
    path, summary = made
    from minemap.grid import pixel_area_km2

    grid = Store(path).grid("utm32620")
    asked, area = grid.inside(inner), pixel_area_km2(grid)
    percent = stored(path).values
    assert summary["km2_total"] == pytest.approx(area[asked].sum(), abs=1e-3)
    assert summary["km2_observed"] == pytest.approx(area[asked & (percent != 255)].sum(), abs=1e-3)
    mine = asked & (percent != 255) & (percent >= 50)
    assert summary["km2_mine"] == pytest.approx(area[mine].sum(), abs=1e-3)
    assert summary["km2_observed"] / summary["km2_total"] > 0.8


def test_the_map_is_the_steps_one_by_one(made, scene, model):
    """search, load_cube, composite, predict by hand give the map's pixels."""
    path, _ = made
    grid, image, by_hand = steps(path, scene.bbox, scene.items, load_model(model))
    one, other = stored(path).values, by_hand.values
    # the outermost windows of a map see its halo read from the source; by hand it lies inside too
    computed = stored(path, "observations").values > 0
    assert computed.any() and grid.shape == one.shape
    np.testing.assert_array_equal(one[computed], other[computed])
    kept = stored(path, "composite").values
    seen = kept.any(axis=0)
    expected = np.nan_to_num(np.rint(image.sel(y=grid.y, x=grid.x).values * 1e4)).astype(np.uint16)
    np.testing.assert_array_equal(kept[:, seen], expected[:, seen])


def steps(path, bbox, items, checkpoint):
    """Grid of a map, and what its steps one by one give on it: composite and probability."""
    grid = Store(path).grid("utm32620")
    chosen = Scenes(search(bbox, "2023", stac=items), 24).choose(32620, grid.cell)
    cube = load_cube([item for a in chosen for item in a.items], grid.buffered(32), chunk=512)
    image = composite(cube, Rule())
    return grid, image, minemap.predict(image, checkpoint).sel(y=grid.y, x=grid.x).compute()


@pytest.mark.skipif(DEFAULT_MODEL not in available(), reason="the default model is not bundled yet")
def test_a_source_without_infrared_is_mapped_by_the_network_for_rgb(scene, inner, options, tmp_path):
    content = json.loads(scene.items.read_text())
    for found in content["features"]:
        for band in ("nir", "swir16", "swir22"):
            del found["assets"][band]
    items = item_file(scene.items.with_name("rgb.json"), content["features"])
    path, default, bbox = tmp_path / "map.zarr", load_model(), shrunk(inner, 1 / 3)
    map_area(bbox, "2023", path, **{**options, "stac": items, "model": None, "keep_composite": True})
    _, image, by_hand = steps(path, bbox, items, default)
    assert np.isnan(image.sel(band=["nir", "swir16", "swir22"])).all()
    computed = stored(path, "observations").values > 0
    assert computed.mean() > 0.1
    np.testing.assert_array_equal(stored(path).values[computed], by_hand.values[computed])


def test_another_box_and_another_chunk_give_the_same_pixels(made, scene, options, tmp_path):
    path, _ = made
    west, south, east, north = scene.bbox
    shifted = (west + (east - west) / 3, south, east, north - (north - south) / 3)
    other = tmp_path / "other.zarr"
    map_area(shifted, "2023", other, **{**options, "chunk": 2048})
    for name in ("probability", "observations"):
        one, two = overlap(stored(path, name), stored(other, name))
        both = overlap(stored(path, "observations"), stored(other, "observations"))
        computed = (both[0] > 0) & (both[1] > 0)
        assert computed.sum() > 20_000
        np.testing.assert_array_equal(one[computed], two[computed])


def test_a_second_run_computes_nothing_and_a_lost_tile_is_made_again(made, inner, options):
    path, first = made
    before = stored(path).values.copy()
    assert map_area(inner, "2023", path, keep_composite=True, **options)["super_tiles_computed"] == 0
    record = next((path.with_name("map.zarr.meta") / "ledger").glob("*/*/*.json"))
    record.unlink()
    told = estimate(plan(inner, "2023", path, keep_composite=True, **options))
    assert told["super_tiles_done"] == told["super_tiles"] - 1 == first["super_tiles"] - 1
    assert told["seconds_from"] == f"{told['super_tiles_done']} finished super-tiles" and told["seconds"] > 0
    assert 1.5e9 < told["worker_memory_bytes"] < 1.9e9  # measured with super-tiles of 512 px: 1.5e9 to 1.8e9
    afresh = estimate(plan(inner, "2023", path, keep_composite=True, overwrite=True, **options))
    assert afresh["super_tiles_done"] == 0 and 0 < told["bytes_to_read"] < afresh["bytes_to_read"]
    again = map_area(inner, "2023", path, keep_composite=True, **options)
    assert again["super_tiles_computed"] == 1 and again["km2_mine"] == first["km2_mine"]
    np.testing.assert_array_equal(stored(path).values, before)


def test_scenes_stay_frozen_when_the_catalogue_grows(inner, options, scene, tmp_path):
    catalogue = json.loads(scene.items.read_text())
    for found in catalogue["features"]:
        for asset in found["assets"].values():
            asset["href"] = str(scene.items.parent / asset["href"])
    some = tmp_path / "items.json"
    some.write_text(json.dumps({**catalogue, "features": catalogue["features"][:4]}))
    out = tmp_path / "map.zarr"
    words = {**options, "stac": some, "min_clear": 1, "max_cloud": 100}
    first = map_area(inner, "2023", out, **words)
    some.write_text(json.dumps(catalogue))
    assert map_area(inner, "2023", out, **words)["items"] == first["items"]
    grown = plan(inner, "2023", out, refresh=True, **words)
    assert len(grown.items) > first["items"]
    saved = tmp_path / "map.zarr.meta" / "items.json"
    rerun = map_area(inner, "2023", tmp_path / "again.zarr", **{**words, "stac": saved})
    assert rerun["items"] == first["items"] and rerun["km2_mine"] == first["km2_mine"]


def test_years_and_areas_merge_into_a_zone_store(scene, options, tmp_path):
    west, south, east, north = small = shrunk(scene.bbox, 1 / 3)
    middle = (west + east) / 2
    out = tmp_path / "zone.zarr"
    words = {**options, "extent": "zone", "min_clear": 1}
    map_area((west, south, middle, north), "2023", out, **words)
    map_area((middle, south, east, north), "2023", out, **words)
    map_area((west, south, middle, north), "2023-01/2023-06", out, **words)
    data = open_map(out)
    assert data.sizes["time"] == 2 and data.sizes["x"] <= 4 * 512
    assert len(data["probability"].__dask_graph__()) < 100  # of the tiles that are there, not of the zone
    assert [str(t)[:10] for t in data["time_bounds"].values[:, 1]] == ["2023-06-30", "2023-12-31"]
    once = tmp_path / "once.zarr"
    map_area(small, "2023", once, **{**options, "min_clear": 1})
    one, two = overlap(stored(out), stored(once))
    computed = two != 255
    np.testing.assert_array_equal(one[computed], two[computed])


def test_a_bbox_store_refuses_another_area(made, scene, options):
    west, south, east, north = scene.bbox
    with pytest.raises(StoreError, match="covers another area of utm32620"):
        map_area((west - 0.06, south, east, north), "2023", made[0], keep_composite=True, **options)


def test_a_second_box_in_the_same_super_tile_keeps_the_first(scene, options, tmp_path):
    west, south, east, north = scene.bbox
    dx, dy = (east - west) / 5, (north - south) / 5
    words = {**options, "chunk": 2048}
    out = tmp_path / "map.zarr"
    map_area((west + dx, south + dy, west + 2 * dx, south + 2 * dy), "2023", out, **words)
    first = stored(out).values.copy()
    map_area((east - 2 * dx, north - 2 * dy, east - dx, north - dy), "2023", out, **words)
    seen = first != 255
    assert seen.any()
    np.testing.assert_array_equal(stored(out).values[seen], first[seen])


def test_a_store_removed_without_its_meta_folder_is_made_anew(inner, options, tmp_path):
    out = tmp_path / "map.zarr"
    first = map_area(inner, "2023", out, **options)
    shutil.rmtree(out)
    again = map_area(inner, "2023", out, **options)
    assert again["super_tiles_computed"] == again["super_tiles"] and again["km2_observed"] == first["km2_observed"]


def test_refresh_makes_tiles_with_new_scenes_again(inner, options, scene, tmp_path):
    some = tmp_path / "items.json"
    catalogue = json.loads(scene.items.read_text())
    for found in catalogue["features"]:
        for asset in found["assets"].values():
            asset["href"] = str(scene.items.parent / asset["href"])
    some.write_text(json.dumps({**catalogue, "features": catalogue["features"][:3]}))
    out = tmp_path / "map.zarr"
    words = {**options, "stac": some, "min_clear": 1, "max_cloud": 100}
    map_area(inner, "2023", out, **words)
    assert map_area(inner, "2023", out, refresh=True, **words)["super_tiles_computed"] == 0
    some.write_text(json.dumps(catalogue))
    grown = map_area(inner, "2023", out, refresh=True, **words)
    assert grown["super_tiles_computed"] == grown["super_tiles"]
    fresh = tmp_path / "fresh.zarr"
    map_area(inner, "2023", fresh, **words)
    np.testing.assert_array_equal(stored(out).values, stored(fresh).values)


def test_what_a_catalogue_has_lost_for_now_stays_mapped(inner, options, scene, tmp_path):
    some, out = own_catalogue(scene, tmp_path), tmp_path / "map.zarr"
    words = {**options, "stac": some}
    map_area(inner, "2023", out, **words)
    catalogue = json.loads(some.read_text())
    for found in catalogue["features"]:
        found["geometry"], found["bbox"] = box(10, 10, 11, 11).__geo_interface__, [10, 10, 11, 11]
    some.write_text(json.dumps(catalogue))
    with pytest.raises(NoItemsError, match="no items"):
        map_area(inner, "2023", out, refresh=True, **words)
    assert map_area(inner, "2023", out, **words)["super_tiles_computed"] == 0


def own_catalogue(scene, folder):
    """The scene's items in a file of its own, with whole paths."""
    catalogue = json.loads(scene.items.read_text())
    for found in catalogue["features"]:
        for asset in found["assets"].values():
            asset["href"] = str(scene.items.parent / asset["href"])
    path = folder / "items.json"
    path.write_text(json.dumps(catalogue))
    return path


def test_strips_read_each_pixel_once_and_change_none(inner, options, tmp_path, monkeypatch):
    """Many looks are put together strip by strip: what a strip reads is the strip."""
    read, heights = reader.read_asset, []

    def watched(href, **where):
        heights.append(where["window"].height)
        return read(href, **where)

    monkeypatch.setattr(reader, "read_asset", watched)
    maps, sums = [], []
    for name, strip in (("whole", compositing.STRIP_BYTES), ("strips", 2**20)):
        monkeypatch.setattr(compositing, "STRIP_BYTES", strip)
        map_area(shrunk(inner, 1 / 3), "2023", tmp_path / f"{name}.zarr", **options)
        maps.append(stored(tmp_path / f"{name}.zarr").values)
        sums.append(sum(heights))
        heights.clear()
    np.testing.assert_array_equal(*maps)
    assert 0 < sums[1] <= sums[0]  # less where an asset ends above a strip


def test_an_unreadable_asset_costs_its_super_tiles_only(inner, options, scene, tmp_path):
    some, out = own_catalogue(scene, tmp_path), tmp_path / "map.zarr"
    catalogue = json.loads(some.read_text())
    broken = catalogue["features"][2]
    for asset in broken["assets"].values():  # it covers a kilometre in the south-east, which one super-tile looks at
        side = int(asset["proj:transform"][0])
        asset |= {"proj:shape": [1000 // side] * 2, "proj:transform": [side, 0, 463_000, 0, -side, 689_000]}
    broken["assets"]["red"]["href"] = str(tmp_path / "missing.tif")
    some.write_text(json.dumps(catalogue))
    words = {**options, "stac": some}
    told = f"1 of 4 super-tiles can't be read, the others are done: item {broken['id']}, asset .*--exclude ID"
    with pytest.raises(ReadError, match=told):
        map_area(inner, "2023", out, **words)
    assert len(list(Store(out).meta.glob("ledger/*/*/[!.]*"))) == 3
    with pytest.raises(ReadError, match=told):  # the same command tries again
        map_area(inner, "2023", out, **words)
    healed = map_area(inner, "2023", out, exclude=(broken["id"],), **words)
    assert healed["super_tiles_done"] == healed["super_tiles"] == 4
    without = tmp_path / "without.zarr"
    some.write_text(json.dumps({**catalogue, "features": [f for f in catalogue["features"] if f is not broken]}))
    map_area(inner, "2023", without, **words)
    np.testing.assert_array_equal(stored(out).values, stored(without).values)


def test_damaged_records_and_shards_are_made_again(inner, options, tmp_path):
    out = tmp_path / "map.zarr"
    map_area(inner, "2023", out, **options)
    before, store = stored(out).values, Store(out)
    first, *_ = sorted(store.meta.glob("ledger/*/*/[!.]*"))
    first.write_text("")  # as a power cut may leave it
    assert describe(out)["zones"][0]["periods"][0]["super_tiles"] == 3
    assert map_area(inner, "2023", out, **options)["super_tiles_computed"] == 1
    shard = max((out / "utm32620" / "probability" / "c").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    whole, tile = shard.read_bytes(), store.grid("utm32620")
    for where in (len(whole) // 3, len(whole) - 3):  # in a chunk, and in the index at the end
        data = bytearray(whole)
        data[where] ^= 1
        shard.write_bytes(data)
        with pytest.raises(DamagedTileError, match=r"is damaged within .* makes that place again"):
            store.read_tile(tile, 0, "probability")
        assert map_area(inner, "2023", out, **options)["super_tiles_computed"] == 1
        np.testing.assert_array_equal(stored(out).values, before)


@pytest.mark.parametrize("layer", ["probability", "observations", "quicklook"])
def test_a_lost_shard_is_made_again(layer, made, inner, options, tmp_path):
    """As after a copy that broke off: what is missing would read as not observed."""
    whole, out = made[0], tmp_path / "map.zarr"
    shutil.copytree(whole, out)
    shutil.copytree(Store(whole).meta, Store(out).meta)
    shard = max((out / "utm32620" / layer / "c").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    shard.unlink()
    words = {**options, "keep_composite": True}
    assert map_area(inner, "2023", out, **words)["super_tiles_computed"] == 1
    for name in ("probability", "observations"):
        np.testing.assert_array_equal(stored(out, name).values, stored(whole, name).values)
    assert shard.exists() and map_area(inner, "2023", out, **words)["super_tiles_computed"] == 0


def test_items_that_lack_a_band_are_told(inner, options, scene, tmp_path):
    catalogue = json.loads(own_catalogue(scene, tmp_path).read_text())
    del catalogue["features"][2]["assets"]["swir22"]
    (tmp_path / "some.json").write_text(json.dumps(catalogue))
    with pytest.warns(UserWarning, match="1 of [0-9]+ items have no swir22: a pixel counts its looks in every band"):
        plan(inner, "2023", tmp_path / "map.zarr", **{**options, "stac": tmp_path / "some.json"})


def test_a_map_without_its_meta_folder_is_not_gone_on_with(inner, options, tmp_path):
    out = tmp_path / "map.zarr"
    map_area(inner, "2023", out, **options)
    shutil.move(Store(out).meta, tmp_path / "elsewhere")
    with pytest.raises(StoreError, match=r"has lost map\.zarr\.meta"):
        map_area(inner, "2023", out, **options)
    about = describe(out)
    assert about["zones"][0]["periods"] == [{"period": "2023-01-01/2023-12-31"}]
    assert "is not known" in told(about)
    shutil.move(tmp_path / "elsewhere", Store(out).meta)
    assert map_area(inner, "2023", out, **options)["super_tiles_computed"] == 0


def test_a_record_of_other_scenes_does_not_count(inner, options, tmp_path):
    """A task that outlived its run may end after a refresh has frozen other scenes."""
    out = tmp_path / "map.zarr"
    map_area(inner, "2023", out, **options)
    store, period = Store(out).bound(), parse_period("2023")
    tile = store.done("utm32620", period)[0]
    store.write_record(tile, period, {**store.record(tile, period), "scenes": "others"})
    assert map_area(inner, "2023", out, **options)["super_tiles_computed"] == 1


def test_a_name_too_long_for_a_store():
    with pytest.raises(InputError, match="File name too long, choose another name"):
        Store.at("x" * 300)


def test_a_store_of_another_layout_is_refused(inner, options, tmp_path):
    out = tmp_path / "map.zarr"
    map_area(inner, "2023", out, **options)
    zarr.open_group(out, mode="r+").attrs["minemap:layout"] = 99
    with pytest.raises(StoreError, match="has layout 99, this minemap knows 1"):
        open_map(out)


def test_half_made_zones_and_periods_are_mended(inner, options, tmp_path):
    out = tmp_path / "map.zarr"
    map_area(inner, "2023", out, min_clear=1, **options)
    store = Store(out)
    zone = zarr.open_group(out / "utm32620", mode="r+", use_consolidated=False)
    for name in ("probability", "time_bounds", "time"):  # as a kill between two steps leaves it
        zone[name].resize((2, *zone[name].shape[1:]))
    (out / "draft-utm32619").mkdir()
    assert len(store.periods("utm32620")) == 1
    map_area(inner, "2023-01/2023-06", out, min_clear=1, **options)
    assert [str(p) for p in store.periods("utm32620")] == ["2023-01-01/2023-12-31", "2023-01-01/2023-06-30"]
    assert open_map(out).sizes["time"] == 2


def test_ids_of_a_catalogue_stay_in_their_folder(inner, options, scene, tmp_path):
    catalogue = json.loads(scene.items.read_text())
    for number, found in enumerate(catalogue["features"]):
        found["id"] = f"../../../evil/{number}"
        for asset in found["assets"].values():
            asset["href"] = str(scene.items.parent / asset["href"])
    some = tmp_path / "deep" / "items.json"
    some.parent.mkdir()
    some.write_text(json.dumps(catalogue))
    summary = map_area(inner, "2023", tmp_path / "deep" / "map.zarr", **{**options, "stac": some})
    assert summary["km2_observed"] > 0 and [p.name for p in tmp_path.iterdir()] == ["deep"]


def test_a_bad_cluster_leaves_the_old_map(inner, options, tmp_path):
    out = tmp_path / "map.zarr"
    first = map_area(inner, "2023", out, **options)
    with pytest.raises(ClusterError, match="no Dask scheduler answers"):
        map_area(inner, "2023", out, overwrite=True, cluster="tcp://127.0.0.1:9", **options)
    with pytest.raises(InputError, match="workers is 0"):
        map_area(inner, "2023", out, cluster="local", workers=0, **options)
    again = map_area(inner, "2023", out, **options)
    assert again["super_tiles_computed"] == 0 and again["km2_observed"] == first["km2_observed"]


def test_an_area_is_clipped_before_it_is_projected():
    near, far = box(-63.4, 6.2, -63.3, 6.3), box(60, -10, 150, 60)
    both = in_zone(near.union(far), 32620)
    assert both.area == pytest.approx(in_zone(near, 32620).area)
    assert in_zone(box(-180, -60, 180, 80), 32620).area > 1e12
    assert in_zone(box(-180, -17.05, -179.97, -17.0), 32760).area > 1e6
    assert in_zone(far, 32620).is_empty


def test_two_runs_on_one_store(made, inner, options):
    store = Store(made[0])
    with store.locked(), pytest.raises(StoreError, match="is being written by another run"):
        map_area(inner, "2023", made[0], keep_composite=True, **options)


def test_min_clear_months_and_max_scenes_reach_the_map(inner, options, tmp_path):
    few = map_area(inner, "2023", tmp_path / "a.zarr", max_scenes=2, min_clear=1, **options)
    assert stored(tmp_path / "a.zarr", "observations").values.max() <= 2
    month = str(moment(search(inner, "2023", stac=options["stac"])[0]).month)  # in which there are a look or two
    with pytest.warns(UserWarning, match="no place has more than . of the 3 acquisitions"):
        none = map_area(inner, "2023", tmp_path / "b.zarr", months=month, min_clear=3, **options)
    assert few["km2_observed"] > 0 and none["km2_observed"] == 0 and none["km2_mine"] == 0
    assert (stored(tmp_path / "b.zarr").values == 255).all()
    with pytest.raises(InputError, match="max_scenes is 2, and a pixel needs 3 clear looks"):
        map_area(inner, "2023", tmp_path / "c.zarr", max_scenes=2, **options)
    half = map_area(inner, "2023", tmp_path / "c.zarr", months="1-6", min_clear=1, **options)
    assert 0 < half["items"] < 8


def test_bright_tailings_are_rescued_unless_told_otherwise(scene, options, tmp_path):
    kept = map_area(scene.bbox, "2023", tmp_path / "a.zarr", **options)
    lost = map_area(scene.bbox, "2023", tmp_path / "b.zarr", rescue=False, **options)
    assert kept["km2_observed"] > lost["km2_observed"] + 0.05
    one, other = (stored(tmp_path / f"{n}.zarr", "observations").values for n in "ab")
    assert (one >= other).all() and (one > other).sum() > 500


def test_aoi_clips(inner, options, tmp_path):
    west, south, east, north = inner
    area = box(west, south, (west + east) / 2, (south + north) / 2)
    geopandas.GeoSeries([area], crs=4326).to_file(tmp_path / "aoi.geojson")
    out = tmp_path / "map.zarr"
    summary = map_area(inner, "2023", out, aoi=tmp_path / "aoi.geojson", **options)
    percent = stored(out)
    seen = percent.values != 255
    assert summary["km2_observed"] == pytest.approx(seen.sum() * 1e-4, rel=0.01)
    x, y = np.meshgrid(percent["x"], percent["y"])
    lon, lat = Transformer.from_crs(32620, 4326, always_xy=True).transform(x, y)
    assert not seen[(lon > area.bounds[2]) | (lat > area.bounds[3])].any()
    again = map_area(inner, "2023", out, overwrite=True, **options)
    assert again["km2_total"] > summary["km2_total"] * 2
    geopandas.GeoSeries([box(0, 0, 1, 1)], crs=4326).to_file(tmp_path / "far.geojson")
    with pytest.raises(InputError, match="no pixel of 10 m in common"):
        map_area(inner, "2023", tmp_path / "x.zarr", aoi=tmp_path / "far.geojson", **options)
    with pytest.raises(StoreError, match="was made with aoi"):
        map_area(inner, "2023", out, aoi=tmp_path / "aoi.geojson", **options)


def test_overwrite_starts_anew(inner, options, tmp_path):
    out = tmp_path / "map.zarr"
    map_area(inner, "2023", out, max_scenes=3, **options)
    with pytest.raises(StoreError, match="was made with max_scenes = 3, this run has 24"):
        map_area(inner, "2023", out, **options)
    with pytest.raises(StoreError, match="was made with rescue = true, this run has false"):
        map_area(inner, "2023", out, max_scenes=3, rescue=False, **options)
    again = map_area(inner, "2023", out, overwrite=True, **options)
    assert again["super_tiles_computed"] == again["super_tiles"]


def test_what_cannot_be_written_whole_leaves_nothing(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_atomically(tmp_path / "a.json", "before")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "a.json", "after")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "before"


def test_what_is_left_of_a_run_cannot_write_into_the_next_ones_map(inner, options, tmp_path):
    """A run was stopped, but a task of it still computes, on a cluster or a thread, while the store is made anew."""
    out = tmp_path / "map.zarr"
    first = plan(inner, "2023", out, max_scenes=3, **options)
    left = mapping._job(first, Store.at(out), mapping._prepare(first, Store.at(out)), 1)
    again = plan(inner, "2023", out, max_scenes=4, overwrite=True, **options)
    job = mapping._job(again, Store.at(out), mapping._prepare(again, Store.at(out)), 1)
    work = again.work[0]
    with pytest.raises(StoreError, match="was made anew while this run was writing to it"):
        left.make(work)
    # Had it written before its store went: neither its record nor its pixels count
    foreign = {"windows": work.windows, "making": left.store.making, "items": []}
    write_atomically(job.store.record_path(work.tile, job.period), json.dumps(foreign))
    assert job.make(work)["computed"] == 1 and job.make(work)["computed"] == 0
    assert job.store.record(work.tile, job.period)["making"] == job.store.making


def test_what_is_left_of_a_run_cannot_write_over_the_next_one(inner, options, tmp_path):
    """The client of a cluster was killed, and its task lives on while another box of the super-tile is mapped."""
    out, options = tmp_path / "map.zarr", {**options, "chunk": 2048}
    store = Store.at(out)
    west, south, east, north = inner
    strip = (north - south) / 10
    strips = ((south, south + strip), (north - strip, north))
    first, again = (plan((west, low, east, high), "2023", out, **options) for low, high in strips)
    with store.locked():
        left = mapping._job(first, store, mapping._prepare(first, store), 1)
    summary = map_area(again.bbox, "2023", out, **options)
    with pytest.raises(StoreError, match="is being written by a run that began after this one"):
        left.make(first.work[0])
    assert map_area(again.bbox, "2023", out, **options) == {
        **summary, "super_tiles_computed": 0, "seconds": ANY
    }  # fmt: skip


def test_a_choice_that_another_run_made_meanwhile_stays(inner, options, tmp_path):
    """Planned with few scenes, while a run that found more had the lock."""
    out = tmp_path / "map.zarr"
    late = plan(inner, "2023", out, **options)
    few = replace(late, cells={cell: chosen[:1] for cell, chosen in late.cells.items()})
    assert few.cells != late.cells
    map_area(inner, "2023", out, **options)
    before = {path: path.read_bytes() for path in (Store(out).meta / "cells").rglob("*.json")}
    mapping._prepare(few, Store.at(out))
    assert before and {path: path.read_bytes() for path in before} == before


def test_damaged_files_beside_a_map_are_made_again_or_named(inner, options, tmp_path):
    out = tmp_path / "map.zarr"
    map_area(inner, "2023", out, **options)
    meta = Store(out).meta
    for folder, text in (("cells", "[["), ("ledger", "[1]"), ("offsets", "")):
        paths = list((meta / folder).rglob("*.json"))
        for path in paths:
            path.write_text(text)
        assert paths and describe(out)
        made = map_area(inner, "2023", out, **options)
        assert made["super_tiles_done"] == made["super_tiles"]
        assert bool(made["super_tiles_computed"]) == (folder == "ledger")
    damaged = next((meta / "items").glob("*.json.gz"))
    damaged.write_bytes(b"")
    next((meta / "ledger").rglob("*.json")).unlink()
    with pytest.raises(StoreError, match=rf"{damaged.name} is gone or damaged: map that date with --refresh"):
        map_area(inner, "2023", out, **options)
    map_area(inner, "2023", out, refresh=True, **options)
    assert damaged.stat().st_size


def test_info_counts_what_a_zone_owns(inner, options, tmp_path):
    """Areas of `info` are those of the summary where whole windows were asked for, an area of interest by itself."""
    west, south, east, north = inner
    middle = box((2 * west + east) / 3, (2 * south + north) / 3, (west + 2 * east) / 3, (south + 2 * north) / 3)
    geopandas.GeoSeries([middle], crs=4326).to_file(tmp_path / "aoi.geojson")
    out = tmp_path / "map.zarr"
    summary = map_area(inner, "2023", out, aoi=tmp_path / "aoi.geojson", **options)
    (told,) = describe(out)["zones"][0]["periods"]
    assert told["km2_computed"] == pytest.approx(summary["km2_total"], abs=0.01)
    assert told["km2_mine"] == pytest.approx(summary["km2_mine"], abs=1e-3)
    observed = summary["km2_observed"] / summary["km2_total"]
    assert told["observed_fraction"] == pytest.approx(observed, abs=1e-3)


def test_unknown_option():
    with pytest.raises(InputError, match="unknown option 'max_clouds'"):
        map_area((0, 0, 1, 1), "2023", "x.zarr", max_clouds=3)
    for name in ("exclude", "masked"):  # a text would be taken letter by letter
        with pytest.raises(InputError, match=f"{name} is '0,1': give a tuple"):
            map_area((0, 0, 1, 1), "2023", "x.zarr", **{name: "0,1"})
    with pytest.raises(InputError, match="exclude is 'S2A': give a tuple"):
        search((0, 0, 1, 1), "2023", exclude="S2A")


def test_odc_maps_the_same(made, inner, options, tmp_path):
    pytest.importorskip("odc.stac")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odc-geo 0.5 with affine 3 and shapely 2.1
        map_area(inner, "2023", tmp_path / "odc.zarr", reader="odc", **options)
    np.testing.assert_array_equal(stored(made[0]).values, stored(tmp_path / "odc.zarr").values)


def test_a_dask_cluster_of_processes_gives_the_same_bytes(made, inner, options, tmp_path):
    summary = map_area(inner, "2023", tmp_path / "two.zarr", cluster="local", workers=2, **options)
    assert summary["super_tiles_computed"] == summary["super_tiles"]
    for name in ("probability", "observations"):
        np.testing.assert_array_equal(stored(made[0], name).values, stored(tmp_path / "two.zarr", name).values)


@pytest.mark.parametrize(
    ("lon", "lat", "size", "borders"),
    [(15.0, 83.0, (384, 8320), [12.0, 18.0]), (180.0, -16.5, 384, [180.0])],
    ids=["three zones", "antimeridian"],
)
def test_zones_join_without_gap_or_doubling(lon, lat, size, borders, model, tmp_path):
    """A box over several zones is the union of one run a zone: each pixel that was asked for is there once.

    Asked for is what lies within a mile or so of a border: a zone is 80 km wide at 83 degrees north.
    """
    aside = 0.02 / np.cos(np.radians(lat))
    near = [box(b - aside, -90, b + aside, 90) for b in (*borders, *(b - 360 for b in borders))]
    geopandas.GeoSeries(near, crs=4326).clip(box(-180, -90, 180, 90)).to_file(tmp_path / "near.geojson")
    config = DemoConfig(seed=3, lon=lon, lat=lat, size=size, years=(2023,), scenes_per_year=1, zones="all", cloud=0.0)
    scene = make_demo(tmp_path / "scene", config)
    out = tmp_path / "map.zarr"
    words = {"stac": scene.items, "model": model, "chunk": 512, "min_clear": 1, "max_cloud": 100, "masked": (0,)}
    words["aoi"] = tmp_path / "near.geojson"
    west, south, east, north = scene.bbox
    south, north = max(south, lat - 0.006), min(north, lat + 0.006)
    summary = map_area((west, south, east, north), "2023", out, **words)
    assert len(Store(out).groups()) == len(borders) + 1
    parts = [(west, *borders), (*[-180.0 if b == 180 else b for b in borders], east)]
    found = dict.fromkeys(("km2_total", "km2_observed", "km2_mine"), 0.0)
    for number, (left, right) in enumerate(zip(*parts, strict=True)):
        part, box_ = tmp_path / f"{number}.zarr", (left, south, right, north)
        alone = map_area(box_, "2023", part, **words)
        found = {name: value + alone[name] for name, value in found.items()}
        (group,) = Store(part).groups()
        for name in ("probability", "observations"):
            np.testing.assert_array_equal(*overlap(stored(out, name, group), stored(part, name, group)))
        grid = Store(part).grid(group)
        percent = stored(part, zone=group).reindex(y=grid.y, x=grid.x, fill_value=255).values
        assert (percent[~grid.owned()] == 255).all(), "a pixel of another zone"
        asked = grid.inside(box_) & inside_aoi(grid, Store(part).meta / AOI)
        assert asked.any() and (percent[asked] != 255).all(), "a gap"
    assert {name: summary[name] for name in found} == pytest.approx(found, abs=1e-3)
    assert summary["km2_observed"] == summary["km2_total"] > 2


def test_exported_cog_holds_the_maps_pixels(made, tmp_path):
    from minemap.export import export

    path, _ = made
    data = stored(path)
    with rasterio.open(export(path, tmp_path / "m.tif")) as source:
        np.testing.assert_array_equal(source.read(1), data.values)
        assert source.crs.to_epsg() == 32620 and source.nodata == 255
        assert source.transform.c == data["x"].values[0] - 5 and source.transform.f == data["y"].values[0] + 5
        assert source.overviews(1) and source.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert source.tags()["model"] == "random"
    with rasterio.open(export(path, tmp_path / "c.tif", threshold=0.5)) as source:
        expected = np.where(data.values == 255, 255, data.values >= 50)
        np.testing.assert_array_equal(source.read(1), expected)
        assert source.colormap(1)[1][:3] == (227, 26, 28)
    shutil.rmtree(tmp_path)


WORDS = "import sys; from minemap.cli import main; sys.exit(main(sys.argv[1:]))"


def begun(out, inner, options, *more):
    """A map in a process of its own, as soon as its first super-tile is in the ledger."""
    words = ["map", "--bbox", *map(str, inner), "--date", "2023", "--out", str(out), "--keep-composite"]
    words += ["--stac", str(options["stac"]), "--model", str(options["model"]), "--chunk", "512", "--quiet", *more]
    process = subprocess.Popen([sys.executable, "-c", WORDS, *words], stderr=subprocess.PIPE, text=True)
    ledger = Store(out).meta / "ledger"
    while process.poll() is None and not list(ledger.glob("*/*/[!.]*")):
        time.sleep(0.02)
    return process, ledger


def test_a_second_process_is_refused_while_the_first_goes_on(made, inner, options, tmp_path):
    out = tmp_path / "map.zarr"
    process, _ = begun(out, inner, options)
    with pytest.raises(StoreError, match="is being written by another run: wait for it"):
        map_area(inner, "2023", out, keep_composite=True, **options)
    process.communicate(timeout=300)  # closes its pipes, which wait() leaves to the garbage collector
    assert process.returncode == 0
    assert map_area(inner, "2023", out, keep_composite=True, **options)["super_tiles_computed"] == 0
    for name in ("probability", "observations", "composite"):
        np.testing.assert_array_equal(stored(out, name).values, stored(made[0], name).values)


@pytest.mark.parametrize(
    ("kill", "more", "said"),
    [
        (signal.SIGKILL, (), ""),
        (signal.SIGINT, (), "the same command goes on from here"),
        (signal.SIGINT, ("--overwrite",), "the same command without --overwrite goes on from here"),
        (signal.SIGINT, ("--cluster", "local", "--workers", "1"), "the same command goes on from here"),
    ],
)
def test_a_killed_run_goes_on_to_the_same_bytes(kill, more, said, made, inner, options, tmp_path):
    out = tmp_path / "map.zarr"
    process, ledger = begun(out, inner, options, *more)
    process.send_signal(kill)
    _, told = process.communicate(timeout=120)
    if kill == signal.SIGINT and process.returncode != 0:
        assert process.returncode == 130 and said in told and "Traceback" not in told and "distributed" not in told
    finished = {p: p.read_text() for p in ledger.glob("*/*/[!.]*")}
    assert finished
    summary = map_area(inner, "2023", out, keep_composite=True, **options)
    assert summary["super_tiles_computed"] == summary["super_tiles"] - len(finished)
    assert all(path.read_text() == text for path, text in finished.items())
    for name in ("probability", "observations", "composite", "quicklook"):
        one, other = (xr.open_zarr(p, group="utm32620", mask_and_scale=False)[name].values for p in (out, made[0]))
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"max_scenes": 5.5}, "max_scenes is 5.5: give a whole number"),
        ({"min_clear": float("nan")}, "min_clear is nan: give a whole number"),
        ({"masked": (8.0,)}, "whole numbers and run from 0 to 11"),
        ({"months": 0}, "months 0: give numbers from 1 to 12"),
        ({"chunk": 512.0}, "chunk is 512.0: give a whole number"),
    ],
)
def test_options_of_other_types_are_refused_before_anything_is_written(option, match, inner, options, tmp_path):
    with pytest.raises(InputError, match=match):
        map_area(inner, "2023", tmp_path / "map.zarr", **{**options, **option})
    with pytest.raises(InputError, match="is not four numbers"):
        map_area(("a", 1, 2, 3), "2023", tmp_path / "map.zarr", **options)
    assert not list(tmp_path.iterdir())


def test_options_of_numpys_types(inner, options, tmp_path):
    numbers = {"chunk": np.int64(512), "max_scenes": np.int16(24), "max_cloud": np.float32(90), "exclude": ["x"]}
    out = tmp_path / "map.zarr"
    numbers |= {"masked": list(np.arange(4)), "model": load_model(options["model"])}
    map_area(np.array(inner), 2023, out, **{**options, **numbers})
    with pytest.raises(InputError, match="max_cloud is '60': give a percentage"):
        map_area(inner, 2023, tmp_path / "other.zarr", **{**options, "max_cloud": "60"})
    assert [path.name for path in tmp_path.glob("other*")] == []
    with pytest.raises(InputError, match="output / has no name"):
        Store.at("/")


def test_an_aoi_between_pixels(inner, options, tmp_path, minemap):
    """It meets a super-tile and holds no pixel: everything is empty, nothing fails."""
    west, south, east, north = inner
    x, y = (west + east) / 2, (south + north) / 2
    geopandas.GeoSeries([box(x, y, x + 1e-7, y + 1e-7)], crs=4326).to_file(tmp_path / "aoi.geojson")
    out, options = tmp_path / "map.zarr", {**options, "aoi": tmp_path / "aoi.geojson", "min_clear": 1}
    assert map_area(inner, "2023-01/2023-06", out, **options)["km2_total"] == 0
    map_area(inner, "2023-07/2023-12", out, **options)
    change = ("--before", "2023-01/2023-06", "--after", "2023-07/2023-12", "--out", tmp_path / "c.zarr", "--json")
    assert json.loads(minemap("change", out, *change).stdout)["common_observed_fraction"] == 0
    assert minemap("export", out, tmp_path / "map.html").returncode == 0
