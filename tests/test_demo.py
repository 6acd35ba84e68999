"""The demo scene: what it promises to the tests and benchmarks that lean on it."""

from __future__ import annotations

import json
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import shapely
from pyproj import Transformer

from minemap import demo
from minemap.demo import DemoConfig, make_demo
from minemap.errors import InputError
from minemap.landscape import COVERS, ground, make_landscape, parcel_spectra
from minemap.sentinel2 import BANDS

YEARS = (2019, 2023)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> demo.Demo:
    return make_demo(tmp_path_factory.mktemp("demo"), DemoConfig(size=512, years=YEARS))


@pytest.fixture(scope="module")
def items(scene: demo.Demo) -> list[dict[str, Any]]:
    return json.loads(scene.items.read_text())["features"]


def pixels(path: Path) -> np.ndarray:
    with rasterio.open(path) as file:
        return file.read(1)


def asset(scene: demo.Demo, item: dict[str, Any], key: str) -> np.ndarray:
    return pixels(scene.items.parent / item["assets"][key]["href"])


def reflectance(scene: demo.Demo, item: dict[str, Any], key: str) -> np.ndarray:
    """By the product's own rule, at the asset's resolution; NaN where nothing was seen."""
    properties, stored = item["properties"], asset(scene, item, key).astype(float)
    late = float(properties["s2:processing_baseline"]) >= 4
    shift = 1000 if late and not properties["earthsearch:boa_offset_applied"] else 0
    return np.where(stored > 0, (stored - shift) / 10_000, np.nan)


def whole(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [item for item in items if item["assets"]["red"]["proj:shape"] == [512, 512]]


def test_same_config_same_bytes(tmp_path: Path) -> None:
    config = DemoConfig(size=128, years=(2023,), scenes_per_year=2)
    files = []
    for name in "ab":
        make_demo(tmp_path / name, config)
        files.append({p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*.*")})
    assert files[0] == files[1]
    assert len(files[0]) == 1 + 2 + 4 * 7  # items.json, truth, four items: a duplicate and two tiles


def test_another_seed_is_another_place() -> None:
    first, second = (make_landscape(seed, (128, 128)) for seed in (0, 1))
    assert (first.truth(2023) != second.truth(2023)).mean() > 0.02


def test_a_year_does_not_depend_on_the_years_asked_for(scene: demo.Demo, tmp_path: Path) -> None:
    alone = make_demo(tmp_path, DemoConfig(size=512, years=(2023,), scenes_per_year=1))
    np.testing.assert_array_equal(pixels(alone.truth[2023]), pixels(scene.truth[2023]))


@pytest.mark.parametrize("key", ["blue", "nir", "swir16", "scl"])
def test_assets_are_cloud_optimised_and_lie_where_the_item_says(
    scene: demo.Demo, items: list[dict[str, Any]], key: str
) -> None:
    for item in items:
        with rasterio.open(scene.items.parent / item["assets"][key]["href"]) as file:
            assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
            assert file.profile["tiled"]
            assert file.overviews(1)
            assert file.nodata == 0
            assert file.dtypes == (("uint8",) if key == "scl" else ("uint16",))
            assert list(file.shape) == item["assets"][key]["proj:shape"]
            assert list(file.transform)[:6] == item["assets"][key]["proj:transform"]
            assert file.crs.to_epsg() == item["properties"]["proj:epsg"] == scene.epsg == 32620
            assert file.transform.c % 20 == file.transform.f % 20 == 0


def test_items_have_the_structure_of_stac(items: list[dict[str, Any]]) -> None:
    assert len({item["id"] for item in items}) == len(items)
    for item in items:
        assert item["type"] == "Feature" and item["stac_version"].startswith("1.")
        assert item["collection"] == "sentinel-2-l2a" and item["links"] == []
        assert set(item["assets"]) == {*BANDS, "scl"}
        geometry = shapely.geometry.shape(item["geometry"])
        assert geometry.is_valid
        np.testing.assert_allclose(geometry.bounds, item["bbox"])
        when = datetime.fromisoformat(item["properties"]["datetime"])
        assert item["id"].split("_")[2] == f"{when:%Y%m%d}" and when.year in YEARS
        assert item["id"].split("_")[1] == item["properties"]["grid:code"].removeprefix("MGRS-")
        for key in BANDS:
            assert item["assets"][key]["raster:bands"][0]["scale"] == 0.0001


def test_items_are_read_by_pystac(scene: demo.Demo) -> None:
    pystac = pytest.importorskip("pystac")
    collection = pystac.ItemCollection.from_dict(json.loads(scene.items.read_text()))
    assert all(item.collection_id == "sentinel-2-l2a" for item in collection)


def test_footprint_is_where_the_pixels_are(scene: demo.Demo, items: list[dict[str, Any]]) -> None:
    to = Transformer.from_crs(scene.epsg, 4326, always_xy=True)
    for item in items:
        scl, (step, _, left, _, _, top) = asset(scene, item, "scl"), item["assets"]["scl"]["proj:transform"]
        seen = np.argwhere(scl > 0)[::97]
        lon, lat = to.transform(left + step * (seen[:, 1] + 0.5), top - step * (seen[:, 0] + 0.5))
        assert shapely.contains_xy(shapely.geometry.shape(item["geometry"]), lon, lat).all()


def test_every_kind_of_offset_is_there(items: list[dict[str, Any]]) -> None:
    for year in YEARS:
        properties = [item["properties"] for item in items if item["properties"]["datetime"][:4] == str(year)]
        kinds = {(float(p["s2:processing_baseline"]) >= 4, p["earthsearch:boa_offset_applied"]) for p in properties}
        assert kinds == {(False, False), (True, True), (True, False)}


def test_two_baselines_of_one_acquisition_differ_by_the_offset_alone(
    scene: demo.Demo, items: list[dict[str, Any]]
) -> None:
    pairs = [(a, b) for a in items for b in items if b["id"] == a["id"].replace("_0_L2A", "_1_L2A") != a["id"]]
    assert len(pairs) == len(YEARS)
    for old, new in pairs:
        takes = [item["properties"]["s2:datatake_id"].rsplit("_N", 1)[0] for item in (old, new)]
        assert takes[0] == takes[1]
        for key in BANDS:
            a, b = asset(scene, old, key).astype(int), asset(scene, new, key).astype(int)
            np.testing.assert_array_equal(a == 0, b == 0)
            assert (b - a == 1000)[a > 1].all()


def test_tiles_of_one_acquisition_agree_where_they_overlap(scene: demo.Demo, items: list[dict[str, Any]]) -> None:
    west, east = [item for item in items if item["assets"]["red"]["proj:shape"][1] < 512][:2]
    assert west["properties"]["s2:datatake_id"] == east["properties"]["s2:datatake_id"]
    a, b = asset(scene, west, "red"), asset(scene, east, "red")
    lefts = [item["assets"]["red"]["proj:transform"][2] for item in (west, east)]
    offset = int(lefts[1] - lefts[0]) // 10
    np.testing.assert_array_equal(a[:, offset:], b[:, : a.shape[1] - offset])


def test_nodata_is_the_same_in_all_assets(scene: demo.Demo, items: list[dict[str, Any]]) -> None:
    partly = [item for item in whole(items) if item["properties"]["s2:nodata_pixel_percentage"] > 10]
    assert len(partly) == len(YEARS)
    for item in [*partly, items[0]]:
        outside = asset(scene, item, "scl") == 0
        assert 100 * outside.mean() == pytest.approx(item["properties"]["s2:nodata_pixel_percentage"], abs=1e-4)
        for key in BANDS:
            empty = asset(scene, item, key) == 0
            np.testing.assert_array_equal(empty, np.kron(outside, np.ones([n // 256 for n in empty.shape])))


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_scl_finds_the_clouds_and_the_clear_ground(scene: demo.Demo, items: list[dict[str, Any]]) -> None:
    """Against the median of the clear looks: clouded pixels are brighter, clear ones are near it."""
    looks = [item for item in whole(items) if item["properties"]["datetime"][:4] == "2023"]
    blue = np.stack([reflectance(scene, item, "blue") for item in looks])
    scl = np.stack([asset(scene, item, "scl").repeat(2, 0).repeat(2, 1) for item in looks])
    clear = np.isin(scl, (4, 5, 6))
    usual = np.nanmedian(np.where(clear, blue, np.nan), axis=0, keepdims=True)
    known = np.isfinite(usual) & (usual < 0.15)
    assert np.nanmean(((blue - usual) > 0.2)[(scl == 9) & known]) > 0.97
    assert np.nanmean((np.abs(blue - usual) < 0.05)[clear & known]) > 0.97
    assert np.nanmean((blue < usual)[(scl == 3) & known]) > 0.75


def test_cloud_cover_is_what_was_asked_for(tmp_path: Path) -> None:
    config = DemoConfig(size=256, years=(2022, 2023), cloudy_years={2023: 0.6}, cloud=0.2)
    made = json.loads(make_demo(tmp_path, config).items.read_text())["features"]
    for year, expected in ((2022, 0.2), (2023, 0.6)):
        mean = np.mean([i["properties"]["eo:cloud_cover"] for i in made if i["id"].split("_")[2][:4] == str(year)])
        assert mean / 100 == pytest.approx(expected, abs=0.12)


def test_a_hidden_part_is_clouded_in_every_look(tmp_path: Path) -> None:
    made = make_demo(tmp_path, DemoConfig(size=256, years=(2023,), cloud=0.1, hidden_years={2023: 0.6}))
    looks = [i for i in json.loads(made.items.read_text())["features"]
             if i["assets"]["scl"]["proj:shape"] == [128, 128]]  # fmt: skip
    never = np.all([np.isin(asset(made, item, "scl"), (0, 3, 8, 9, 10)) for item in looks], axis=0)
    assert never.mean() == pytest.approx(0.6, abs=0.12)


def test_scl_takes_bright_tailings_for_cloud(scene: demo.Demo, items: list[dict[str, Any]]) -> None:
    bright = make_landscape(0, (512, 512)).bright(2023)[::2, ::2]
    looks = [item for item in whole(items) if item["properties"]["datetime"][:4] == "2023"]
    called = np.stack([np.isin(asset(scene, item, "scl"), (8, 9, 10))[bright] for item in looks])
    assert bright.sum() >= 20
    assert ((called.mean(0) > 0.8).mean()) > 0.9
    values = np.stack([reflectance(scene, item, "blue")[::2, ::2][bright] for item in looks])
    assert (np.nanstd(values, axis=0) < 0.15).mean() > 0.5  # unlike real clouds it hardly changes


def test_truth_grows_and_first_year_says_when(scene: demo.Demo) -> None:
    early, late = (pixels(scene.truth[year]) for year in YEARS)
    assert set(np.unique(late)) == {0, 1}
    assert (late >= early).all()
    assert 0.02 < early.mean() < late.mean() < 0.08
    np.testing.assert_array_equal(pixels(scene.first_year), np.select([early == 1, late == 1], YEARS))


def test_mines_grow_every_year_and_never_shrink() -> None:
    land = make_landscape(3, (512, 512))
    maps = [land.truth(year) for year in range(2017, 2026)]
    assert all((b >= a).all() and b.sum() > a.sum() for a, b in pairwise(maps))
    assert maps[-2].mean() == pytest.approx(0.06, abs=0.012)


def test_a_mine_may_lie_outside_the_scene_in_part() -> None:
    land = make_landscape(15, (1024, 1024))  # one of its lobes has no pixel in the scene
    assert land.surface(2023).where.size == land.truth(2023).sum()


def index(image: np.ndarray, a: str, b: str) -> np.ndarray:
    first, second = image[BANDS.index(a)], image[BANDS.index(b)]
    return (first - second) / (first + second)


def test_spectra_are_those_of_the_surfaces() -> None:
    land, rows = make_landscape(0, (512, 512)), slice(0, 512)
    surface, parcels = land.surface(2023), parcel_spectra(0, 2023, 100)
    image = ground(land, surface, rows, day=100, south=False, parcels=parcels)
    mine = land.truth(2023)
    pure = {name: (land.cover[i] > 0.95) & ~mine for i, name in enumerate(COVERS)}
    ndvi, ndwi = index(image, "nir", "red"), index(image, "green", "nir")
    assert image.min() > 0 and image.max() < 0.7
    assert np.median(ndvi[pure["forest"]]) > 0.8
    assert np.median(image[3][pure["forest"]]) == pytest.approx(0.33, abs=0.05)
    assert (ndwi[pure["turbid"]] > 0.1).all() and (image[4][pure["turbid"]] < 0.03).all()
    assert np.median(ndvi[mine]) < 0.25
    bare = sum(land.cover[COVERS.index(name)] for name in ("laterite", "sandy", "bar", "track"))
    soil = image[:, (bare > 0.8) & ~mine]
    assert (np.diff(soil[:3], axis=0) > 0).mean() > 0.9  # soils rise from blue to red


def test_no_threshold_on_one_band_or_index_finds_the_mines() -> None:
    """Bare fields, clearings and sand bars look like mines: the best single cut stays far below a map."""
    land = make_landscape(0, (512, 512))
    parcels = parcel_spectra(0, 2023, 100)
    image = ground(land, land.surface(2023), slice(0, 512), day=100, south=False, parcels=parcels)
    mine, best = land.truth(2023), 0.0
    for feature in (*image, index(image, "nir", "red"), index(image, "green", "nir")):
        for cut in np.quantile(feature, np.linspace(0.02, 0.98, 49)):
            for found in (feature > cut, feature < cut):
                best = max(best, (found & mine).sum() / (found | mine).sum())
    assert best < 0.5


@pytest.mark.parametrize(
    ("lon", "lat", "zones"),
    [
        (179.999, -17.0, {32760, 32701}),
        (-180.0, 66.0, {32601, 32660}),
        (6.001, 0.0, {32631, 32632, 32731, 32732}),
        (12.0, 83.0, {32632, 32633}),
        (-63.35, 6.25, {32620}),
    ],
)
def test_zones_share_the_ground(tmp_path: Path, lon: float, lat: float, zones: set[int]) -> None:
    made = make_demo(tmp_path, DemoConfig(0, (2023,), lon, lat, 256, scenes_per_year=1, zones="all"))
    items = json.loads(made.items.read_text())["features"]
    assert {item["properties"]["proj:epsg"] for item in items} == zones
    assert len({item["properties"]["s2:datatake_id"].rsplit("_N", 1)[0] for item in items}) == 1
    home = pixels(made.truth[2023])
    with rasterio.open(made.truth[2023]) as file:
        to_home = ~file.transform
    for epsg in zones - {made.epsg}:
        with rasterio.open(made.zone_truth[epsg][2023]) as file:
            there, at = file.read(1), file.transform
        y, x = np.nonzero(there < 255)
        moved = Transformer.from_crs(epsg, made.epsg).transform(*(at * (x + 0.5, y + 0.5)))
        column, row = (np.floor(v).astype(int) for v in to_home * moved)
        assert (home[row, column] == there[y, x]).mean() > 0.999


def test_the_box_lies_inside_the_scene(scene: demo.Demo, tmp_path: Path) -> None:
    across = make_demo(tmp_path, DemoConfig(lon=180, lat=70, size=256, years=(2023,), scenes_per_year=1))
    for made in (scene, across):
        west, south, east, north = made.bbox
        east += 360 if east < west else 0
        lon, lat = (a.ravel() for a in np.meshgrid(np.linspace(west, east, 50), np.linspace(south, north, 50)))
        x, y = Transformer.from_crs(4326, made.epsg, always_xy=True).transform((lon + 180) % 360 - 180, lat)
        with rasterio.open(made.truth[2023]) as file:
            left, bottom, right, top = file.bounds
        assert (left < x).all() and (x < right).all() and (bottom < y).all() and (y < top).all()
        assert np.ptp(x) > 0.8 * (right - left)
    assert across.bbox[0] > across.bbox[2]


def test_items_across_the_antimeridian_are_cut_in_two(tmp_path: Path) -> None:
    made = make_demo(tmp_path, DemoConfig(lon=180, lat=-17, size=256, years=(2023,), scenes_per_year=1))
    item = json.loads(made.items.read_text())["features"][0]
    assert item["geometry"]["type"] == "MultiPolygon"
    assert item["bbox"][0] == -180 and item["bbox"][2] == 180
    assert shapely.geometry.shape(item["geometry"]).area < 0.01


def test_hrefs_are_relative_unless_a_server_is_named(scene: demo.Demo, tmp_path: Path) -> None:
    url = "http://127.0.0.1:8000"
    served = make_demo(tmp_path, DemoConfig(size=64, years=(2023,), scenes_per_year=1, base_url=url))
    for made, start in ((scene, "./scenes/"), (served, f"{url}/scenes/")):
        for item in json.loads(made.items.read_text())["features"]:
            for found in item["assets"].values():
                assert found["href"].startswith(start)
                assert (made.items.parent / found["href"].removeprefix(url).lstrip("/")).exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": 257}, "even numbers"),
        ({"size": (32, 512)}, "at least 64"),
        ({"lat": 84.0}, "latitude"),
        ({"lon": 200.0}, "longitude"),
        ({"years": ()}, "at least one year"),
        ({"scenes_per_year": 0}, "scenes a year"),
    ],
)
def test_bad_values_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DemoConfig(**wrong)


def test_a_zone_elsewhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="EPSG:32633 does not touch"):
        make_demo(tmp_path, DemoConfig(size=64, years=(2023,), zones=(32633,)))
