"""Files for other programs: what they hold, by other readers than our own."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from urllib.parse import unquote, urlsplit

import geopandas
import numpy as np
import pyarrow.parquet as pq
import pystac
import pytest
import rasterio
import xarray as xr
import zarr
from conftest import item, item_file, painted
from PIL import Image
from pystac.extensions.mlm import MLMExtension, TaskType
from pystac.extensions.projection import ProjectionExtension
from pystac.extensions.table import TableExtension

from minemap.errors import DamagedTileError, InputError
from minemap.export import draw_picture, export
from minemap.grid import grids
from minemap.page import export_page
from minemap.polygons import polygons
from minemap.scenes import parse_period, search
from minemap.store import Store, open_map

BOX = (-66.02, 6.24, -65.98, 6.26)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two zones and two years with a mine of 2 x 1 km across the zones' edge, and a lake in it."""
    drawn = {}
    for grid in grids(BOX, 512):
        lon, lat = grid._degrees(grid.y, grid.x)
        mine = (np.abs(lon + 66) < 0.009) & (np.abs(lat - 6.25) < 0.0045)
        lake = (np.abs(lon + 66.004) < 0.001) & (np.abs(lat - 6.25) < 0.001)
        percent = np.where(mine & ~lake, 90, 5)
        small = percent.copy()
        small[lon > -66] = 5
        years = {"2022": small, "2023": percent}
        drawn[grid] = {y: np.where(grid.owned(), p, 255).astype(np.uint8) for y, p in years.items()}
    return painted(tmp_path_factory.mktemp("made") / "map.zarr", drawn, parameters=parameters("sentinel-2"))


def parameters(sensor):
    return {"precision": "fp32", "chunk": 512, "resolution": 10.0, "sensor": sensor}


@pytest.mark.parametrize("ending", ["parquet", "geojson", "gpkg"])
def test_vector_files_hold_the_polygons(made, ending, tmp_path):
    out = export(made, tmp_path / f"mines.{ending}", min_area=0.5, smooth=True)
    expected = polygons(made, min_area=0.5, smooth=True)
    found = geopandas.read_parquet(out) if ending == "parquet" else geopandas.read_file(out)
    assert found.crs.to_epsg() == 4326 and len(found) == len(expected) == 1
    assert list(found.columns) == list(expected.columns)
    assert found["area_km2"].iloc[0] == pytest.approx(expected["area_km2"].iloc[0])
    assert found["first_year"].iloc[0] == 2022 and len(found.geometry.iloc[0].interiors) == 1
    assert found.geometry.iloc[0].hausdorff_distance(expected.geometry.iloc[0]) < 1e-6
    assert sorted(p.name for p in tmp_path.iterdir()) == [out.name, f"{out.name}.stac.json"]
    ring = np.asarray(found.geometry.iloc[0].exterior.coords)
    assert _signed_area(ring) > 0


def _signed_area(ring):
    """Shoelace: above 0 when anticlockwise."""
    return float((ring[:-1, 0] * ring[1:, 1] - ring[1:, 0] * ring[:-1, 1]).sum() / 2)


def test_geojson_is_rfc_7946(made, tmp_path):
    told = json.loads(export(made, tmp_path / "m.geojson").read_text())
    assert "crs" not in told and told["name"] == "footprint"
    (feature,) = told["features"]
    exterior, hole = (np.array(ring) for ring in feature["geometry"]["coordinates"])
    assert _signed_area(exterior) > 0 > _signed_area(hole)
    decimals = {len(str(n).partition(".")[2]) for n in exterior.ravel().tolist()}
    assert max(decimals) <= 7


def test_geoparquet_says_where_its_rows_are(made, tmp_path):
    file = pq.ParquetFile(export(made, tmp_path / "m.parquet"))
    geo = json.loads(file.metadata.metadata[b"geo"])
    assert geo["version"] == "1.1.0" and geo["primary_column"] == "geometry"
    column = geo["columns"]["geometry"]
    assert column["covering"]["bbox"]["xmin"] == ["bbox", "xmin"] and column["encoding"] == "WKB"
    assert column["crs"]["id"] == {"authority": "EPSG", "code": 4326}
    row = file.read(["bbox"]).to_pylist()[0]["bbox"]
    np.testing.assert_allclose([row[n] for n in ("xmin", "ymin", "xmax", "ymax")], column["bbox"], atol=1e-9)


def test_vector_tiles(made, tmp_path):
    out = export(made, tmp_path / "m.pmtiles")
    assert out.read_bytes()[:7] == b"PMTiles"
    tiles = geopandas.read_file(out)
    assert tiles["first_year"].unique().tolist() == [2022]
    whole = tiles.dissolve().to_crs(4326).geometry.iloc[0]
    assert whole.symmetric_difference(polygons(made).union_all()).area / whole.area < 0.01
    with pytest.raises(InputError, match=r"no polygon to write, and \.pmtiles files can't be empty"):
        export(made, tmp_path / "n.pmtiles", threshold=0.99)
    assert not list(tmp_path.glob("*n.pmtiles*"))


@pytest.mark.parametrize("ending", ["parquet", "geojson", "gpkg"])
def test_no_polygon_is_an_empty_file(made, ending, tmp_path):
    out = export(made, tmp_path / f"none.{ending}", threshold=0.99)
    found = geopandas.read_parquet(out) if ending == "parquet" else geopandas.read_file(out)
    assert len(found) == 0 and found.crs.to_epsg() == 4326
    if ending == "parquet":
        full = pq.read_schema(export(made, tmp_path / "some.parquet"))
        assert pq.read_schema(out).types == full.types
        assert [c.name for c in TableExtension.ext(read_item(out)).columns] == full.names


def read_item(out):
    told = json.loads(out.with_name(out.name + ".stac.json").read_text())
    item = pystac.Item.from_dict(told, preserve_dict=True)
    again = item.to_dict(include_self_link=False, transform_hrefs=False)
    assert again == told
    return item


def test_a_stac_item_lies_beside_polygons(made, tmp_path):
    out = export(made, tmp_path / "m.gpkg")
    item = read_item(out)
    model = MLMExtension.ext(item)
    assert item.properties["mlm:name"] == "demo-2026" and model.architecture == "minec2fnet"
    assert model.tasks == [TaskType.SEMANTIC_SEGMENTATION]
    assert [band.name for band in model.input[0].bands] == ["blue", "green", "red", "nir", "swir16", "swir22"]
    assert model.output[0].result.shape == [-1, 1, 320, 320]
    table = TableExtension.ext(item)
    assert [c.name for c in table.columns] == list(polygons(made).columns) and table.row_count == 1
    assert ProjectionExtension.ext(item).code == "EPSG:4326"
    assert item.datetime is None and str(item.common_metadata.start_datetime)[:10] == "2023-01-01"
    assert item.assets["data"].href == "./m.gpkg" and "mlm:model" in item.assets["model"].roles
    west, south, east, north = item.bbox
    assert west < -66.02 and east > -65.98 and south < 6.24 and north > 6.26
    assert item.properties["minemap:threshold"] == 0.5


def test_an_item_finds_a_file_of_any_name(made, tmp_path):
    out = export(made, tmp_path / "a #1 %20é.geojson")
    href = read_item(out).assets["data"].href
    assert unquote(urlsplit(href).path) == f"./{out.name}"


def test_a_stac_item_lies_beside_a_cog(made, tmp_path):
    out = export(made, tmp_path / "m.tif", zone="utm32619", threshold=0.5)
    item = read_item(out)
    with rasterio.open(out) as source:
        assert ProjectionExtension.ext(item).code == f"EPSG:{source.crs.to_epsg()}"
        assert item.properties["proj:shape"] == list(source.shape)
        assert item.properties["proj:transform"] == list(source.transform)[:6]
        values = set(np.unique(source.read(1)).tolist())
    told = item.assets["data"].extra_fields["bands"][0]
    assert values <= {c["value"] for c in told["classification:classes"]} and told["nodata"] == 255
    export(made, tmp_path / "map.png", zone="utm32619")
    assert not (tmp_path / "map.png.stac.json").exists()


@pytest.mark.parametrize(("west", "east"), [(179.98, -179.98), (179.97, 179.99)])
def test_an_item_at_the_antimeridian(west, east, tmp_path):
    drawn = {}
    for grid in grids((west, -16.52, east, -16.5), 512):
        drawn[grid] = {"2023": np.where(grid.owned(), 80, 255).astype(np.uint8)}
    out = export(painted(tmp_path / "map.zarr", drawn), tmp_path / "m.geojson")
    item = read_item(out)
    assert (item.bbox[0] > item.bbox[2]) == (west > east)
    assert item.bbox[0] < west and (item.bbox[2] > east)
    for feature in (item.to_dict(), *json.loads(out.read_text())["features"]):
        kind, parts = feature["geometry"]["type"], feature["geometry"]["coordinates"]
        for ring in [r for part in (parts if kind == "MultiPolygon" else [parts]) for r in part]:
            assert np.ptp(np.array(ring)[:, 0]) < 0.2 and np.abs(np.array(ring)[:, 0]).max() <= 180


HERE = (-63.02, 6.2, -62.98, 6.24)
ENDINGS = ("tif", "png", "zarr", "geojson", "parquet", "gpkg", "pmtiles", "html")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """One zone with a square mine, in a year and, written later, in the year's first half."""
    (grid,) = grids(HERE, 512)
    year, half = np.full(grid.shape, 5, np.uint8), np.full(grid.shape, 5, np.uint8)
    year[100:200, 100:200] = half[100:150, 100:150] = 90
    drawn = {grid: {"2023": year, "2023-01/2023-06": half}}
    return painted(tmp_path_factory.mktemp("small") / "map.zarr", drawn, parameters=parameters("sentinel-2"))


def test_all_kinds_of_files_show_the_same_last_period(small, tmp_path):
    """Of two periods that start on one day the one that ends later, in whichever order they were mapped."""
    ends = {read_item(export(small, tmp_path / f"m.{e}")).properties["end_datetime"][:10] for e in ENDINGS[2:-1]}
    with rasterio.open(export(small, tmp_path / "m.tif", threshold=0.5)) as source:
        assert (source.read(1) == 1).sum() == 100 * 100 and source.tags()["period"] == "2023-01-01/2023-12-31"
    with rasterio.open(export(small, tmp_path / "h.tif", threshold=0.5, date="2023-01/2023-06")) as source:
        assert (source.read(1) == 1).sum() == 50 * 50
    assert ends | {read_item(tmp_path / "m.tif").properties["end_datetime"][:10]} == {"2023-12-31"}


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_is_no_map_is_said_of_every_kind_of_file(ending, minemap, tmp_path):
    Store.at(tmp_path / "change.zarr", "change").create({"parameters": {}})
    before = sorted(tmp_path.iterdir())
    for name, said in (("change.zarr", "is a store of kind 'change', not 'map'"), ("nothing", "it does not exist")):
        status = 1
        if ending == "tif" and name == "change.zarr":
            status, said = 2, "has nothing compared yet"
        done = minemap("export", tmp_path / name, tmp_path / f"x.{ending}")
        assert done.returncode == status and len(done.stderr.splitlines()) == 1 and said in done.stderr, done.stderr
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_map_exports_from_inside_itself(ending, small, minemap, tmp_path, monkeypatch):
    monkeypatch.chdir(small)
    done = minemap("export", ".", tmp_path / f"x.{ending}")
    assert done.returncode == 0 and (tmp_path / f"x.{ending}").exists(), done.stderr


def test_a_zone_without_the_period_is_said(small, tmp_path):
    """A raster's periods are those of its zone, whatever other zones have."""
    path = tmp_path / "map.zarr"
    shutil.copytree(small, path)
    shutil.copytree(small.with_name("map.zarr.meta"), path.with_name("map.zarr.meta"))
    (east,) = grids((-59.02, 6.2, -58.98, 6.24), 512)
    Store(path).add_zone(east, 512, None)
    Store(path).consolidate()
    with pytest.raises(InputError, match="has nothing mapped yet in utm32621"):
        export(path, tmp_path / "m.tif", zone="utm32621")
    Store(path).add_period("utm32621", parse_period("2022"))
    with pytest.raises(InputError, match="has nothing mapped yet for 2022-01-01/2022-12-31"):
        export(path, tmp_path / "m.tif", zone="utm32621")
    with pytest.raises(InputError, match="no period 2023-01-01/2023-12-31: it has 2022-01-01/2022-12-31"):
        export(path, tmp_path / "m.tif", zone="utm32621", date="2023")


def test_a_picture_names_the_sensor(tmp_path):
    """The same map of two sensors: two pictures that differ in nothing but the title of the composite."""
    (grid,) = grids(HERE, 512)
    pictures = []
    for sensor in ("sentinel-2", "landsat-8-9"):
        drawn = {grid: {"2023": np.full(grid.shape, 90, np.uint8)}}
        path = painted(tmp_path / f"{sensor}.zarr", drawn, parameters=parameters(sensor))
        pictures.append(np.asarray(Image.open(export(path, tmp_path / f"{sensor}.png"))))
    rows, columns = np.nonzero((pictures[0] != pictures[1]).any(axis=2))
    height, width, _ = pictures[0].shape
    assert rows.size and rows.max() < height / 7 and columns.max() < width / 2


def test_a_picture_shows_outline_scale_and_what_was_not_seen(tmp_path):
    (grid,) = grids(HERE, 512)
    percent = np.full(grid.shape, 4, np.uint8)
    percent[200:300, 100:250] = 90
    percent[400:404, 40:48] = 255  # half of an 80-m pixel
    path = painted(
        tmp_path / "map.zarr", {grid: {"2023": percent}}, model="m" * 300, parameters=parameters("sentinel-2")
    )
    figure = draw_picture(open_map(path).isel(time=0), threshold=None, store=Store(path))
    left, right = figure.axes[:2]
    (outline,) = (c for c in left.collections if len(c.get_paths()))
    corners = np.concatenate([p.vertices for p in outline.get_paths()])  # km, y up
    height = grid.height * 0.01
    np.testing.assert_allclose(corners.min(axis=0), (1.0, height - 3.0), atol=0.011)
    np.testing.assert_allclose(corners.max(axis=0), (2.5, height - 2.0), atol=0.011)
    assert left.get_xlim() == (0, grid.width * 0.01) == right.get_xlim()
    for axis in (left, right):
        bar = axis.lines[0].get_xdata()
        told = [t.get_text() for t in axis.texts]
        assert f"{bar[1] - bar[0]:g} km" in told and any("N" in text for text in told)
    ground = left.images[0].get_array()
    grey = (ground == np.float32(0.8)).all(axis=2)
    np.testing.assert_array_equal(grey, percent == 255)
    title, width = figure._suptitle, figure.bbox.width
    assert title.get_text().startswith("2023-01-01 to 2023-12-31") and title.get_window_extent().width < width


def test_nothing_to_export(tmp_path):
    (grid,) = grids(HERE, 512)
    path = painted(tmp_path / "map.zarr", {grid: {}})
    Store(path).add_period(grid.group, parse_period("2023"))
    for name in ("levels.zarr", "m.geojson", "m.tif", "m.png", "m.html"):
        with pytest.raises(InputError, match="has nothing mapped yet"):
            (export_page if name == "m.html" else export)(path, tmp_path / name)
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith("map.zarr")] == []


def test_nothing_is_written_into_a_store(small):
    before = sorted(small.rglob("*"))
    for place in (small / "m.tif", small / "utm32620" / "m.geojson", small / "levels.zarr", small / "m.html"):
        with pytest.raises(InputError, match=r"lies within the store .*: choose a place beside it"):
            (export_page if place.suffix == ".html" else export)(small, place)
    with pytest.raises(InputError, match="lies within the store"):
        Store.at(small / "sub.zarr").check({}, [])
    assert sorted(small.rglob("*")) == before


def test_items_of_a_catalogue_are_linked(tmp_path):
    """The address that an item has in its catalogue is kept, and told with what was made of it."""
    href = "https://stac.example.org/collections/c/items/S2A_one"
    one = item("S2A_one", "2023-06-01", HERE, {"blue": "blue.tif"}) | {"links": [{"rel": "self", "href": href}]}
    (kept,) = search(HERE, "2023", stac=item_file(tmp_path / "items.json", [one]))
    (grid,) = grids(HERE, 512)
    percent = np.full(grid.shape, 90, np.uint8)
    path = painted(tmp_path / "map.zarr", {grid: {"2023": percent}}, items=("S2A_one",))
    Store(path).write_items([kept])
    links = read_item(export(path, tmp_path / "m.geojson")).get_links("derived_from")
    assert [link.href for link in links] == [href]


def test_a_pyramid_of_levels_for_viewers(made, tmp_path):
    out = export(made, tmp_path / "levels.zarr")
    group = zarr.open_group(out, mode="r")["utm32619"]
    told = group.attrs["multiscales"]["layout"]
    assert [level["asset"] for level in told] == ["0", "1", "2"][: len(told)] and len(told) >= 2
    assert told[1]["derived_from"] == "0" and told[1]["transform"] == {"scale": [2.0, 2.0], "translation": [0.0, 0.0]}
    assert {"multiscales", "spatial:", "proj:"} == {c["name"] for c in group.attrs["zarr_conventions"]}
    whole = xr.open_zarr(made, group="utm32619", mask_and_scale=False)["probability"]
    fine = whole.values.astype(float)
    fine[fine == 255] = np.nan
    for number, level in enumerate(told):
        data = xr.open_zarr(out, group=f"utm32619/{level['asset']}")
        step = 2**number
        assert data.rio.crs.to_epsg() == 32619 and list(data["time"].dt.year) == [2022, 2023]
        assert list(data.rio.transform(recalc=True))[:6] == level["spatial:transform"]
        assert data["probability"].shape[1:] == tuple(level["spatial:shape"])
        blocks = fine.reshape(2, fine.shape[1] // step, step, fine.shape[2] // step, step)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # blocks without any pixel observed
            expected = np.nanmean(blocks, axis=(2, 4))
        found = data["probability"].values
        np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
        np.testing.assert_allclose(found, expected, atol=0.51 * number)
    assert max(told[-1]["spatial:shape"]) <= 256
    item = read_item(out)
    assert str(item.common_metadata.start_datetime)[:4] == "2022" and "utm32620" in zarr.open_group(out, mode="r")
    with pytest.raises(InputError, match="exists already: remove it, or choose another name"):
        export(made, out)
    one = export(made, tmp_path / "one.zarr", date="2022")
    assert xr.open_zarr(one, group="utm32620/1").sizes["time"] == 1


BAD = {
    "ending": (("m.xyz",), "endings are"),
    "threshold": (("m.geojson", "--threshold", "2"), "is a probability"),
    "no min area": (("m.parquet", "--min-area", "nan"), "in hectares"),
    "no folder": (("nowhere/m.zarr",), "does not exist: make it first"),
    "min area": (("m.parquet", "--min-area", "-1"), "in hectares"),
    "raster with area": (("m.tif", "--min-area", "1"), r"shape polygons: \.tif has none"),
    "zone": (("m.gpkg", "--zone", "utm32619"), "holds all zones"),
    "zones": (("m.tif",), r"has 2 zones: name one \(--zone\) of"),
    "pyramid": (("m.zarr", "--threshold", "0.5"), r"\.zarr holds probabilities"),
    "date": (("m.parquet", "--date", "2001"), "no period 2001"),
    "folder": (("nowhere/m.parquet",), "does not exist: make it first"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_writes_nothing(case, made, minemap, tmp_path):
    words, message = BAD[case]
    done = minemap("export", made, tmp_path / words[0], *words[1:])
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert re.search(message, done.stderr), done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layer", ["probability", "quicklook"])
@pytest.mark.parametrize("name", ["map.tif", "map.png", "map.html"])
def test_a_damaged_super_tile_is_named(layer, name, small, tmp_path):
    store = tmp_path / "map.zarr"
    shutil.copytree(small, store)
    shutil.copytree(f"{small}.meta", f"{store}.meta")
    for shard in (store / "utm32620" / layer / "c").rglob("*"):
        if shard.is_file():
            shard.write_bytes(b"damaged")
    write = export_page if name.endswith("html") else export
    if (layer, name) == ("quicklook", "map.tif"):
        write(store, tmp_path / name)  # it holds nothing of the quicklook
        return
    with pytest.raises(DamagedTileError, match=rf"map.zarr/utm32620/{layer} is damaged within .* makes that place"):
        write(store, tmp_path / name)
    assert not (tmp_path / name).exists()
