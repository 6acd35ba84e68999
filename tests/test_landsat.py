"""Landsat as a second sensor: names, QA_PIXEL, scaling, maps at 30 m, and a disaster that can be seen."""

from __future__ import annotations

import json
from pathlib import Path

import geopandas
import numpy as np
import pytest
import rasterio
from conftest import item, item_file, write_tif

from minemap import composite, load_cube, map_area, open_map, search
from minemap.compositing import Rule
from minemap.cube import load_layers
from minemap.errors import InputError, NoItemsError
from minemap.grid import CELL, Grid, grids
from minemap.scenes import acquisition_id, sensor_at, source
from minemap.sensors import LANDSAT, SENTINEL2, asset_key, one_sensor, scaling, sensor_of
from minemap.sentinel2 import BANDS
from minemap.spectral import burn_ratio, disturbance
from minemap.vectors import inside

KEYS = dict(zip(BANDS, ("blue", "green", "red", "nir08", "swir16", "swir22"), strict=True))
BOX = (-44.21, -20.18, -44.075, -20.10)
MUDFLOW = Path(__file__).parent / "data" / "brumadinho_mudflow.geojson"
# QA_PIXEL of the product guide's table: what it says, and whether it is a clear look
QA = {
    "fill": (1, False),
    "clear": (21_824, True),
    "dilated cloud": (22_018, False),
    "cirrus": (54_596, False),
    "cloud": (22_280, False),
    "cloud shadow": (23_888, False),
    "snow": (30_048, True),
    "water": (21_952, True),
}


def landsat_item(name, day, bbox, hrefs, **properties):
    made = item(name, day, bbox, hrefs, **{"platform": "landsat-8", **properties})
    return {**made, "collection": "landsat-c2-l2"}


# --- what a Landsat item is -------------------------------------------------------------------------------------


def test_the_sensor_follows_the_collection_or_the_platform():
    one = landsat_item("x", "2019-01-14", BOX, {"nir08": "/x.tif", "qa_pixel": "/q.tif"})
    assert sensor_of(one) is LANDSAT
    assert (asset_key(one, "nir"), asset_key(one, "scl"), asset_key(one, "red")) == ("nir08", "qa_pixel", None)
    assert sensor_of({**one, "collection": "my-own"}) is LANDSAT
    other = item("y", "2019-01-14", BOX, {"nir": "/x.tif"})
    assert sensor_of(other) is SENTINEL2 and one_sensor([]) is SENTINEL2
    with pytest.raises(InputError, match="come from landsat-8-9 and sentinel-2: name one collection"):
        one_sensor([one, other])
    decided = scaling(one)
    assert (7273 + decided.offset) * decided.scale == pytest.approx(0, abs=1e-5)
    assert (43_636 + decided.offset) * decided.scale == pytest.approx(1, abs=1e-4)


def test_a_file_of_two_sensors_needs_a_collection(tmp_path):
    items = [
        landsat_item("a", "2019-01-14", BOX, {"red": "/x.tif"}),
        item("b", "2019-01-14", BOX, {"red": "/x.tif"}),
    ]
    path = item_file(tmp_path / "items.json", items)
    with pytest.raises(InputError, match="name one collection"):
        sensor_at(source(path))
    assert sensor_at(source(path, "landsat-c2-l2")) is LANDSAT
    assert [i["id"] for i in search(BOX, "2019", stac=path, collection="landsat-c2-l2")] == ["a"]
    assert sensor_at(source("planetary-computer", "landsat-c2-l2")) is LANDSAT
    assert sensor_at(source("earth-search")) is SENTINEL2


def test_older_landsats_are_left_out_and_paths_are_looks(tmp_path):
    usgs = landsat_item("b", "2019-01-14", BOX, {"red": "/x.tif"}, platform="LANDSAT_8")
    assert sensor_of(usgs).uses(usgs)
    old = landsat_item("a", "2019-01-14", BOX, {"red": "/x.tif"}, platform="landsat-7")
    path = item_file(tmp_path / "items.json", [old])
    with pytest.raises(NoItemsError, match="1 found, removed: 1 by their platform"):
        search(BOX, "2019", stac=path)
    rows = [
        landsat_item(n, "2019-01-14", BOX, {}, **{"landsat:wrs_path": p}) for n, p in (("a", "218"), ("b", "217"))
    ]
    assert acquisition_id(rows[0]) == "landsat-8_2019-01-14_218" != acquisition_id(rows[1])


# --- QA_PIXEL ---------------------------------------------------------------------------------------------------


@pytest.fixture
def looks(tmp_path):
    """Three dates of 8 blocks of 20 columns, each under another QA_PIXEL on the second date; clear on the others."""
    grid = Grid(32723, 580_000.0 // 30 * 30, 7_770_000.0 // 30 * 30, 40, 20 * len(QA), 30.0)
    items = []
    for number, day in enumerate(("2019-01-01", "2019-01-17", "2019-02-02")):
        folder = tmp_path / day
        folder.mkdir()
        dn = np.full(grid.shape, 12_000 + 1000 * number, np.uint16)
        values = [code if number == 1 else 21_824 for code, _ in QA.values()]
        qa = np.repeat(np.array(values, np.uint16), 20)[None].repeat(40, axis=0)
        hrefs = {KEYS[b]: str(write_tif(folder / f"{b}.tif", dn, grid.epsg, grid.transform)) for b in BANDS}
        hrefs["qa_pixel"] = str(write_tif(folder / "qa.tif", qa, grid.epsg, grid.transform, nodata=1))
        name = f"LC08_L2SP_218074_{day.replace('-', '')}_02_T1"
        items.append(landsat_item(name, day, grid.lonlat_bounds, hrefs, **{"proj:code": "EPSG:32723"}))
    path = item_file(tmp_path / "items.json", items)
    return search(grid.lonlat_bounds, "2019", stac=path), grid


@pytest.mark.parametrize("reader", ["stackstac", "odc"])
@pytest.mark.filterwarnings("ignore:The 'shapely.ops.transform:DeprecationWarning")
def test_qa_pixel_masks_what_is_no_clear_look(looks, reader):
    items, grid = looks
    image = composite(load_cube(items, grid, reader=reader), Rule(min_clear=1, rescue=False)).compute()
    counts = image["observations"].values
    reflectance = (np.array([12_000, 13_000, 14_000]) * 2.75e-5) - 0.2
    for number, (name, (_, clear)) in enumerate(QA.items()):
        block = slice(20 * number, 20 * number + 20)
        assert (counts[:, block] == (3 if clear else 2)).all(), name
        expected = np.median(reflectance) if clear else reflectance[[0, 2]].mean()
        np.testing.assert_allclose(image.values[:, :, block], expected, atol=1e-4)


def test_qa_pixel_becomes_scl_classes_that_can_be_chosen(looks):
    items, grid = looks
    cube = load_cube(items, grid)
    assert cube["scl"].dtype == np.uint8
    classes = cube["scl"].values[1, 0, ::20]
    assert dict(zip(QA, classes.tolist(), strict=True)) == {
        "fill": 0,
        "clear": 7,
        "dilated cloud": 8,
        "cirrus": 10,
        "cloud": 9,
        "cloud shadow": 3,
        "snow": 11,
        "water": 6,
    }
    image = composite(cube, Rule(masked=(0, 6, 11), min_clear=1, rescue=False)).compute()
    assert image["observations"].values[0, ::20].tolist() == [2, 3, 3, 3, 3, 3, 2, 2]


@pytest.mark.filterwarnings("ignore:The 'shapely.ops.transform:DeprecationWarning")
def test_both_readers_give_the_same_pixels(looks):
    items, grid = looks
    part = grid.window(3, 5, 30, 100)
    one, other = (load_layers(items, part, reader=reader) for reader in ("stackstac", "odc"))
    np.testing.assert_array_equal(one["dn"].values, other["dn"].values)
    np.testing.assert_array_equal(one["scl"].values, other["scl"].values)


# --- disturbance ------------------------------------------------------------------------------------------------


def test_disturbance_is_a_fall_of_the_burn_ratio(looks):
    import xarray as xr

    coords = {"band": ["nir", "swir22"], "y": [45.0, 15.0], "x": [15.0]}
    forest = xr.DataArray(np.array([[[0.4], [0.4]], [[0.1], [0.1]]], np.float32), coords, ("band", "y", "x"))
    mud = xr.DataArray(np.array([[[0.2], [np.nan]], [[0.2], [0.2]]], np.float32), coords, ("band", "y", "x"))
    assert burn_ratio(forest).values[0, 0] == pytest.approx(0.6)
    assert disturbance(forest, mud).values.tolist() == [[1], [255]]
    assert disturbance(mud, forest).values.tolist() == [[0], [255]]
    assert disturbance(forest, mud, threshold=0.7).values.tolist() == [[0], [255]]
    assert disturbance(forest, mud.isel(y=[0])).shape == (1, 1)
    with pytest.raises(InputError, match="no pixel in common"):
        disturbance(forest, mud.assign_coords(x=[45.0]))
    with pytest.raises(InputError, match="swir22 is not there"):
        burn_ratio(forest.isel(band=[0]))


# --- Brumadinho -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def brumadinho(shared, tmp_path_factory):
    """Item file over the two real dates as landsat-c2-l2 items look; there is no QA_PIXEL among these files."""
    items = []
    for folder in sorted((shared / "brumadinho_landsat").iterdir()):
        with rasterio.open(folder / "blue.tif") as first:
            bbox = rasterio.warp.transform_bounds(first.crs, 4326, *first.bounds)
        about = {
            "proj:code": "EPSG:32623",
            "eo:cloud_cover": 1.07,
            "landsat:wrs_path": "218",
            "landsat:wrs_row": "074",
        }
        hrefs = {key: str(folder / f"{band}.tif") for band, key in KEYS.items()}
        name = f"LC08_L2SP_218074_{folder.name.replace('-', '')}_02_T1"
        items.append(landsat_item(name, folder.name, bbox, hrefs, **about))
    return item_file(tmp_path_factory.mktemp("brumadinho") / "items.json", items)


@pytest.mark.filterwarnings("ignore:.*no QA_PIXEL:UserWarning")
def test_both_dates_lie_where_they_lie(brumadinho, shared):
    """The second date starts 30 columns further east: on the files' own lattice each is what rasterio reads."""
    grid = Grid(32623, 583_485.0, -2_222_685.0, 300, 430, 30.0)
    cube = load_cube(search(BOX, "2019-01", stac=brumadinho), grid)
    for number, (day, column) in enumerate((("2019-01-14", 0), ("2019-01-30", 30))):
        for band in BANDS:
            with rasterio.open(shared / "brumadinho_landsat" / day / f"{band}.tif") as stored:
                dn = stored.read(1)
            got = cube.isel(time=number).sel(band=band).values
            assert np.isnan(np.delete(got, np.s_[column : column + 400], axis=1)).all()
            expected = np.where(dn == 0, np.nan, np.maximum(dn * 2.75e-5 - 0.2, 1e-4))
            np.testing.assert_allclose(got[:, column : column + 400], expected, atol=6e-5)


@pytest.mark.filterwarnings("ignore:.*no QA_PIXEL:UserWarning")
def test_the_mudflow_is_seen(brumadinho):
    (grid,) = grids(BOX, 512, resolution=30.0)
    before, after = (
        composite(load_cube(search(BOX, day, stac=brumadinho), grid), Rule(min_clear=1))
        for day in ("2019-01-14", "2019-01-30")
    )
    found = disturbance(before, after).compute()
    (mudflow,) = geopandas.read_file(MUDFLOW).to_crs(grid.epsg).geometry
    seen, within = found.values != 255, inside(grid, mudflow)
    assert within.sum() > 2000 and seen[within].all()
    assert (found.values[within] == 1).mean() >= 0.6
    # No quality layer says what is clear here, so every pixel counts, clouds too
    assert (found.values[seen & ~within] == 1).mean() <= 0.05


@pytest.mark.filterwarnings("ignore:.*no QA_PIXEL:UserWarning", "ignore:.*was trained at:UserWarning")
def test_a_map_at_30_m(brumadinho, model, tmp_path):
    options = {"stac": brumadinho, "model": model, "min_clear": 1, "keep_composite": True}
    with pytest.warns(UserWarning, match="random was trained at 10 m, landsat-8-9 maps have 30 m"):
        summary = map_area(BOX, "2019-01-30", tmp_path / "map.zarr", chunk=512, **options)
    assert summary["zones"] == ["utm32723"] and summary["km2_observed"] / summary["km2_total"] > 0.7
    data = open_map(tmp_path / "map.zarr")
    assert set(np.diff(data["x"].values)) == {30.0} and set(np.diff(data["y"].values)) == {-30.0}
    parameters = json.loads((tmp_path / "map.zarr" / "zarr.json").read_text())["attributes"]["parameters"]
    assert parameters["sensor"] == "landsat-8-9" and parameters["resolution"] == 30.0
    (grid,) = grids(BOX, 512, resolution=30.0)
    items = search(BOX, "2019-01-30", stac=brumadinho)
    image = composite(load_cube(items, grid), Rule(min_clear=1)).compute()
    kept = data["composite"].isel(time=0).sel(y=image["y"], x=image["x"]).values
    seen = np.isfinite(kept)
    np.testing.assert_allclose(kept[seen], image.values[seen], atol=1e-6)
    map_area(BOX, "2019-01-30", tmp_path / "other.zarr", chunk=2048, **options)
    other = open_map(tmp_path / "other.zarr")["probability"].sel(y=data["y"], x=data["x"])
    both = np.isfinite(data["probability"].values) & np.isfinite(other.values)
    assert both.sum() > 80_000
    np.testing.assert_array_equal(data["probability"].values[both], other.values[both])


def test_a_super_tile_lies_in_one_cell_at_any_resolution():
    for resolution in (10.0, 30.0):
        for chunk in (512, 2048):
            for grid in grids(BOX, chunk, resolution=resolution):
                for tile in grid.tiles(chunk):
                    corner = tile.window(chunk - 1, chunk - 1, 1, 1)
                    assert tile.cell == corner.cell
    assert Grid(32723, 0.0, CELL * 3.0, 2048, 2048, 30.0).cell == (0, 0)


@pytest.mark.filterwarnings("ignore:.*no quality layer:UserWarning")
def test_chips_of_landsat_have_30_m(brumadinho, tmp_path):
    from minemap.training.chipping import ChipRule, make_chips
    from minemap.training.chips import load_chips

    rule = ChipRule(size=64, min_area=0, val=0)
    made = make_chips(MUDFLOW, "2019-01-30", tmp_path / "chips.npz", stac=brumadinho, min_clear=1, rule=rule)
    chips = load_chips(tmp_path / "chips.npz")
    assert made["chips"] > 1 and chips.mask.shape[1:] == (64, 64)
    assert (chips.mask == 1).sum() * 9e-4 == pytest.approx(2.19, rel=0.02)
