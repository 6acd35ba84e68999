"""Reading: both backends, exact warps, offsets, hostile addresses, faulty servers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pystac
import pytest
import rasterio
import rasterio.shutil
from affine import Affine
from conftest import RangeHandler, item, item_file, write_tif

from minemap.compositing import composite
from minemap.cube import READERS, load_cube, load_layers
from minemap.errors import InputError, ReadError
from minemap.grid import Grid, grids
from minemap.reader import Access, address_of, read_overview
from minemap.scenes import search
from minemap.sentinel2 import BANDS

pytestmark = [
    # odc-geo 0.5 and rasterio 1.4 with affine 3 and shapely 2.1: theirs to change
    pytest.mark.filterwarnings("ignore:The 'shapely.ops.transform:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning"),
]


@pytest.fixture(scope="module")
def items(scene):
    return search(scene.bbox, "2023", stac=scene.items, max_cloud=100)


@pytest.fixture(scope="module")
def grid(scene):
    whole = grids(scene.bbox, 512)[0]
    return whole.window(100, 150, 400, 300)


@pytest.mark.parametrize("reader", ["stackstac", "odc"])
def test_cube_has_the_documented_form(items, grid, reader):
    cube = load_cube(items, grid, reader=reader)
    assert cube.dims == ("time", "band", "y", "x") and cube.dtype == np.float32 and cube.chunks
    assert list(cube["band"].values) == list(BANDS)
    assert cube["x"].values[0] == grid.left + 5 and cube["y"].values[0] == grid.top - 5
    assert cube.rio.crs.to_epsg() == grid.epsg
    assert cube.rio.transform() == grid.transform
    assert cube["scl"].dims == ("time", "y", "x") and cube["scl"].dtype == np.uint8
    assert (np.diff(cube["time"].values) >= np.timedelta64(-60, "s")).all()
    values = cube.isel(time=0).values
    assert np.nanmin(values) > 0 and np.nanmax(values) < 1.5


def test_stackstac_and_odc_give_the_same_pixels(items, grid):
    one, other = load_layers(items, grid), load_layers(items, grid, reader="odc")
    assert list(one["id"].values) == list(other["id"].values)
    np.testing.assert_array_equal(one["dn"].values, other["dn"].values)
    np.testing.assert_array_equal(one["scl"].values, other["scl"].values)
    assert (one["dn"].values > 0).mean() > 0.3


def test_ten_metre_bands_equal_rasterios_own_read(items, grid):
    layers = load_layers(items, grid, bands=("red",))
    for number, (name, told) in enumerate(zip(layers["id"].values, layers["offset"].values, strict=True)):
        found = next(i for i in items if i["id"] == name)
        with rasterio.open(found["assets"]["red"]["href"]) as source:
            window = rasterio.windows.from_bounds(*grid.bounds, source.transform)
            stored = source.read(1, window=window, boundless=True, fill_value=0).astype(int)
        offset = int(told.split()[0])
        expected = np.where(stored == 0, 0, np.maximum(stored + offset, 1))
        np.testing.assert_array_equal(layers["dn"].values[number, 0], expected)


def test_offsets_make_dates_of_all_baselines_agree(items, grid):
    layers = load_layers(items, grid, bands=("red",))
    reasons = set(layers["offset"].values)
    assert len({r.split()[0] for r in reasons}) == 2  # with and without
    clear = (layers["scl"].isin([4, 5, 6]) & (layers["dn"].isel(band=0) > 0)).values
    pairs = zip(layers["dn"].values[:, 0], clear, strict=True)
    medians = [np.median(dn[seen]) for dn, seen in pairs if seen.sum() > 5000]
    assert len(medians) > 3 and max(medians) - min(medians) < 700  # the seasons differ, the offset is 1000


def test_a_sub_window_equals_the_large_read(items, grid):
    whole = load_layers(items, grid)
    part = load_layers(items, grid.window(111, 57, 130, 201))
    kept = [list(whole["id"].values).index(name) for name in part["id"].values]
    np.testing.assert_array_equal(part["dn"].values, whole["dn"].values[kept, :, 111:241, 57:258])
    np.testing.assert_array_equal(part["scl"].values, whole["scl"].values[kept, 111:241, 57:258])


def test_a_sub_window_equals_the_large_read_across_zones(items, scene):
    """The same items on the neighbouring zone's lattice: every pixel is warped."""
    from pyproj import Transformer

    west, south, east, north = scene.bbox
    x, y = Transformer.from_crs(4326, 32619, always_xy=True).transform((west + east) / 2, (south + north) / 2)
    grid = Grid(32619, x // 10 * 10 - 1500, y // 10 * 10 + 1500, 300, 300)
    whole = load_layers(items[:2], grid, bands=("red", "swir16"))["dn"].values
    part = load_layers(items[:2], grid.window(37, 91, 140, 150), bands=("red", "swir16"))["dn"].values
    assert (whole > 0).mean() > 0.9
    np.testing.assert_array_equal(part, whole[:, :, 37:177, 91:241])


def test_missing_assets_are_absent_and_never_dropped(items, grid):
    poor = [{**i, "assets": {k: v for k, v in i["assets"].items() if k != "nir"}} for i in items]
    layers = load_layers(poor, grid)
    assert list(layers["band"].values) == list(BANDS)
    assert not layers["dn"].sel(band="nir").values.any() and layers["dn"].sel(band="red").values.any()
    blind = [{**i, "assets": {k: v for k, v in i["assets"].items() if k != "scl"}} for i in items]
    with pytest.warns(UserWarning, match="items have no SCL: their clouds are not masked"):
        layers = load_layers(blind, grid)
    assert (layers["scl"].values == 7).all()


def test_negative_numbers_are_dark_and_floats_refused(grid, tmp_path):
    values = np.array([[-5, 0], [-9999, 800]]).repeat(32, 0).repeat(32, 1)
    place = Affine(10, 0, grid.left, 0, -10, grid.top)
    for kind in ("int16", "float32"):
        write_tif(tmp_path / f"{kind}.tif", values.astype(kind), grid.epsg, place, nodata=-9999)
    odd = [
        item(k, "2023-05-01", grid.lonlat_bounds, {"red": str(tmp_path / f"{k}.tif")}) for k in ("int16", "float32")
    ]
    with pytest.warns(UserWarning, match="no SCL"):
        small, floats = (load_layers([one], grid, bands=("red",))["dn"].data for one in odd)
    assert small[0, 0, :64:32, :64:32].compute().tolist() == [[1, 0], [0, 800]]
    with pytest.raises(ReadError, match=r"float32\.tif' holds float32: integers are expected"):
        floats.compute()


def test_items_elsewhere_leave_an_empty_cube(items):
    away = Grid(32620, 700_000.0, 100_000.0, 64, 64)
    empty = load_cube(items, away)
    assert empty.shape == (0, 6, 64, 64)
    image = composite(empty).compute()
    assert image.dims == ("band", "y", "x") and np.isnan(image).all() and (image["observations"] == 0).all()


def test_unknown_reader(items, grid):
    with pytest.raises(InputError, match="unknown reader 'gdal'"):
        load_cube(items, grid, reader="gdal")


# --- addresses --------------------------------------------------------------------------------------------------

HOSTILE = [
    "/vsicurl/http://127.0.0.1/x.tif",
    "/vsizip//tmp/x.zip/x.tif",
    "file:///etc/passwd",
    "/etc/passwd",
    "../../etc/passwd",
    "ftp://127.0.0.1/x.tif",
    "http://169.254.169.254/latest/meta-data",
    "http://evil.example.com/x.tif",
    "http://amazonaws.com.evil.example/x.tif",
    "vrt:///etc/passwd",
    "<VRTDataset></VRTDataset>",
]


@pytest.mark.parametrize("href", HOSTILE)
def test_a_catalogue_can_not_make_us_open_this(href):
    access = Access(local=False, hosts=("catalogue.example", ".amazonaws.com"))
    with pytest.raises(ReadError, match="asset"):
        read_overview(href, access)


def test_known_hosts_and_the_catalogues_own_are_allowed(monkeypatch):
    from minemap.scenes import source

    access = Access.of(source("https://stac.example.org/v1"))
    access.check("https://stac.example.org/data/x.tif")
    access.check("https://sentinel-cogs.s3.us-west-2.amazonaws.com/x.tif")
    with pytest.raises(ReadError, match=r"set MINEMAP_ALLOW_HOSTS=tiles\.example\.net"):
        access.check("https://tiles.example.net/x.tif")
    monkeypatch.setenv("MINEMAP_ALLOW_HOSTS", "other.example.net, Tiles.Example.net")
    Access.of(source("https://stac.example.org/v1")).check("https://tiles.example.net/x.tif")


def test_redirects_must_stay_among_the_allowed_hosts(tmp_path, serve):
    write_tif(tmp_path / "real.tif", np.full((8, 8), 7, np.uint16), 32620, Affine(10, 0, 0, 0, -10, 0))
    files = serve(tmp_path)

    class Elsewhere(RangeHandler):
        def faults(self) -> bool:  # type: ignore[override]
            target = files.replace("127.0.0.1", "localhost") if self.path == "/out.tif" else files
            leads = {
                "/out.tif": f"{target}/real.tif",
                "/in.tif": f"{files}/real.tif",
                "/file.tif": "file:///etc/passwd",
            }
            self.send_response(302)
            self.send_header("Location", leads.get(self.path, "/round.tif"))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return True

    address, access = serve(tmp_path, Elsewhere), Access(local=False, hosts=("127.0.0.1",))
    assert read_overview(f"{address}/in.tif", access).max() == 7
    with pytest.raises(ReadError, match=rf"asset '{address}/out.tif' redirects: .*host localhost is not allowed"):
        read_overview(f"{address}/out.tif", access)
    with pytest.raises(ReadError, match=r"only http\(s\), s3 and plain paths"):
        read_overview(f"{address}/file.tif", access)
    with pytest.raises(ReadError, match="more than 5 redirects"):
        read_overview(f"{address}/round.tif", access)


def test_redirects_of_get_alone_and_for_a_while(tmp_path, serve, monkeypatch):
    write_tif(tmp_path / "real.tif", np.full((8, 8), 7, np.uint16), 32620, Affine(10, 0, 0, 0, -10, 0))
    files, told = serve(tmp_path), []
    monkeypatch.setattr("minemap.reader.PAUSE", 0.01)

    class Elsewhere(RangeHandler):
        def faults(self) -> bool:  # type: ignore[override]
            if self.command == "HEAD":
                self.send_error(404)
                return True
            told.append(self.path)
            host = "localhost" if self.path == "/out.tif" else "127.0.0.1"
            name = "gone" if told.count("/once.tif") == 1 else "real"  # where it led at first is there no longer
            self.send_response(302)
            self.send_header("Location", f"{files.replace('127.0.0.1', host)}/{name}.tif")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return True

    address, access = serve(tmp_path, Elsewhere), Access(local=False, hosts=("127.0.0.1",))
    with pytest.raises(ReadError, match="host localhost is not allowed"):
        read_overview(f"{address}/out.tif", access)
    assert read_overview(f"{address}/once.tif", access).max() == 7
    assert told.count("/once.tif") == 2


def test_a_vrt_dressed_as_tif_is_not_opened(tmp_path):
    secret = write_tif(tmp_path / "secret.tif", np.full((8, 8), 7, np.uint16), 32620, Affine(10, 0, 0, 0, -10, 0))
    dressed = tmp_path / "dressed.tif"
    dressed.write_text(
        '<VRTDataset rasterXSize="8" rasterYSize="8"><VRTRasterBand dataType="UInt16" band="1"><SimpleSource>'
        f"<SourceFilename>{secret}</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>"
    )
    with rasterio.open(dressed) as source:  # rasterio itself would
        assert source.read(1).max() == 7
    with pytest.raises(ReadError, match="can't be read"):
        read_overview(str(dressed), Access())


@pytest.mark.parametrize("reader", READERS)
def test_neither_reader_opens_a_vrt(items, grid, scene, reader, tmp_path):
    secret = Path(scene.items.parent, items[0]["assets"]["blue"]["href"])
    with rasterio.open(secret) as source, rasterio.vrt.WarpedVRT(source) as vrt:
        rasterio.shutil.copy(vrt, tmp_path / "blue.vrt", driver="VRT")
    dressed = (tmp_path / "blue.vrt").rename(tmp_path / "blue.tif")
    assets = {**items[0]["assets"], "blue": {**items[0]["assets"]["blue"], "href": str(dressed)}}
    with pytest.raises(ReadError, match=r"blue\.tif.* can't be read"):
        load_cube([{**items[0], "assets": assets}], grid, bands=("blue",), reader=reader).compute()


# --- servers that fail ------------------------------------------------------------------------------------------


def test_reads_survive_a_faulty_server(items, grid, serve, scene, tmp_path):
    """A fifth of the answers is an error, a short body or a page of HTML; the pixels are those of the files."""
    count = [0]

    class Faulty(RangeHandler):
        def faults(self) -> bool:  # type: ignore[override]
            count[0] += 1
            kind = count[0] % 15
            if kind == 3:
                self.send_error(503)
            elif kind == 8:
                self.send_response(200)
                self.send_header("Content-Length", "12")
                self.end_headers()
                self.wfile.write(b"<html></html"[:12])
            elif kind == 13:
                self.send_response(206)
                self.send_header("Content-Length", "100000")
                self.end_headers()
                self.wfile.write(b"x" * 100)
                self.close_connection = True
            return kind in (3, 8, 13)

    address = serve(scene.items.parent, Faulty)
    remote = json.loads(json.dumps(items[:2]).replace(str(scene.items.parent), address))
    layers = load_layers(remote, grid, bands=("red", "nir"), access=Access(local=False, hosts=("127.0.0.1",)))
    expected = load_layers(items[:2], grid, bands=("red", "nir"))
    np.testing.assert_array_equal(layers["dn"].values, expected["dn"].values)
    assert count[0] > 15


def test_a_missing_remote_asset_is_an_error_not_nodata(items, grid, serve, scene, monkeypatch):
    monkeypatch.setattr("minemap.reader.PAUSE", 0.01)
    address = serve(scene.items.parent)
    lost = json.loads(json.dumps(items[:1]).replace(str(scene.items.parent), address + "/nowhere"))
    layers = load_layers(lost, grid, bands=("red",), access=Access(local=False, hosts=("127.0.0.1",)))
    with pytest.raises(ReadError, match=r"can't be read: .*404"):
        layers["dn"].compute(scheduler="synchronous")


# --- real imagery -----------------------------------------------------------------------------------------------


def test_real_tile_backends_agree_at_its_native_grid(tile_33t):
    found = search((15, 45, 16.5, 46.1), "2023-08", stac=tile_33t, max_cloud=100)
    grid = Grid(32633, 499_980.0, 5_100_000.0, 915, 915, 120.0)
    bands = ("blue", "green", "red", "nir")
    one, other = load_layers(found, grid, bands=bands), load_layers(found, grid, bands=bands, reader="odc")
    assert len(one["id"]) == 5
    np.testing.assert_array_equal(one["dn"].values, other["dn"].values)
    np.testing.assert_array_equal(one["scl"].values, other["scl"].values)


def test_real_tile_composite_equals_rasterio_and_numpy(tile_33t, shared):
    """The offset is in these DN no more, although raster:bands still says -0.1."""
    import warnings

    from minemap import composite
    from minemap.compositing import Rule

    found = search((15, 45, 16.5, 46.1), "2023-08", stac=tile_33t, max_cloud=100)
    grid = Grid(32633, 499_980.0, 5_100_000.0, 915, 915, 120.0)
    names = {"blue": "B02", "green": "B03", "red": "B04", "nir": "B08"}
    image = composite(load_cube(found, grid, bands=tuple(names)), Rule(min_clear=1, rescue=False))
    stacks = []
    for band in names.values():
        looks = []
        for folder in sorted((shared / "earth_search_33T").iterdir()):
            with rasterio.open(folder / f"{band}.tif") as source, rasterio.open(folder / "SCL.tif") as scl:
                clear = ~np.isin(scl.read(1), (0, 1, 3, 8, 9, 10))
                dn = source.read(1)
                looks.append(np.where(clear & (dn > 0), dn / 10_000, np.nan))
        stacks.append(np.stack(looks))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        expected = np.nanmedian(np.stack(stacks), axis=1)
    np.testing.assert_allclose(image.values, expected, atol=1e-6)
    assert np.isfinite(expected).mean() > 0.9


def test_real_geographic_source_sub_window_equals_large_read(boadella):
    found = search((2.79, 42.33, 2.84, 42.37), "2020", stac=boadella)
    grid = Grid(32631, 483_000.0, 4_690_200.0, 360, 360)
    with pytest.warns(UserWarning, match="no SCL"):
        whole = load_layers(found, grid)["dn"].values
        part = load_layers(found, grid.window(50, 41, 200, 180))["dn"].values
    assert (whole > 0).mean() > 0.9
    np.testing.assert_array_equal(part, whole[:, :, 50:250, 41:221])


def test_a_lattice_of_other_nodata_is_read_as_nothing(tmp_path):
    data = np.arange(400, dtype=np.uint16).reshape(20, 20) + 100
    data[:3] = 65_535
    path = write_tif(tmp_path / "a.tif", data, 32620, Affine(10, 0, 500_000, 0, -10, 600_000), nodata=65_535)
    one = item("a", "2023-01-01", (-63.0, 5.0, -62.9, 5.5), {"red": str(path)}, **{"proj:epsg": 32620})
    found = search((-63.0, 5.0, -62.9, 5.5), "2023", stac=item_file(tmp_path / "items.json", [one]))
    grid = Grid(32620, 499_990.0, 600_020.0, 25, 25)
    with pytest.warns(UserWarning, match="no SCL"):
        got = load_layers(found, grid, bands=("red",))["dn"].values[0, 0]
    assert not got[:5].any() and not got[:, 0].any()
    np.testing.assert_array_equal(got[5:22, 1:21], data[3:])


def test_buckets_are_opened_as_they_are():
    """Redirects are a matter of http: an s3 address of an unknown bucket goes to GDAL itself."""
    access = Access(local=False, hosts=("usgs-landsat",))
    href = "s3://usgs-landsat/collection02/B4.TIF"
    access.check(href)
    assert address_of(href, access) == href


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("reader", READERS)
def test_what_is_read_at_a_time_decides_nothing(reader, told, tmp_path):
    """A source in degrees, 1 degree wide: in the zone its edge bulges by 120 m between its corners."""
    place, shape = Affine(1e-3, 0, -63.5, 0, -1e-3, 45.2), (200, 1000)
    write_tif(tmp_path / "b.tif", np.full(shape, 3000, np.uint16), 4326, place)
    one = item("g", "2023-06-01", (-63.5, 45.0, -62.5, 45.2), {"blue": str(tmp_path / "b.tif")})
    if told:
        one["properties"] |= {"proj:epsg": 4326, "proj:transform": list(place)[:6], "proj:shape": list(shape)}
    top = 4983070.0  # that of the lower corners
    small, large = (Grid(32620, 498_720.0, top + above, 100 + int(above / 10), 256) for above in (0.0, 1000.0))
    found = [
        load_layers([one], grid, bands=("blue",), reader=reader, warn=False)["dn"].values for grid in (small, large)
    ]
    assert (found[0] > 0).sum() > 2000
    if reader == "stackstac":  # odc-stac's warp depends on what is read
        np.testing.assert_array_equal(found[0], found[1][..., 100:, :])


def test_a_source_as_wide_as_the_earth_is_seen(tmp_path):
    for epsg, place, shape in (
        (4326, Affine(0.1, 0, -180, 0, -0.1, 90), (1800, 3600)),
        (3857, Affine(40000, 0, -20037508.34, 0, -40000, 20037508.34), (1001, 1001)),
    ):
        write_tif(tmp_path / f"{epsg}.tif", np.full(shape, 3000, np.uint16), epsg, place)
        one = item("g", "2023-06-01", (-180, -85, 180, 85), {"blue": str(tmp_path / f"{epsg}.tif")})
        one["properties"] |= {"proj:epsg": epsg, "proj:transform": list(place)[:6], "proj:shape": list(shape)}
        layers = load_layers([one], Grid(32620, 500_000.0, 5e6, 64, 64), bands=("blue",), warn=False)
        assert (layers["dn"].values == 3000).all()


def test_items_that_miss_the_grid_are_no_layers(tmp_path):
    grid = Grid(32620, 500_000.0, 5e6, 64, 64)
    write_tif(tmp_path / "b.tif", np.full((64, 64), 3000, np.uint16), 32620, Affine(10, 0, 600_000, 0, -10, 5e6))
    far = item("far", "2023-06-01", (-61.8, 45.1, -61.7, 45.2), {"blue": str(tmp_path / "b.tif")})
    near = {"proj:epsg": 32620, "proj:transform": [10, 0, 600_000, 0, -10, 5e6], "proj:shape": [64, 64]}
    for one in (far, {**far, "properties": {**far["properties"], **near}}):
        assert load_layers([one], grid, bands=("blue",), warn=False).sizes["time"] == 0


def test_a_file_with_coordinates_of_its_own_names_itself(tmp_path):
    with rasterio.open(
        tmp_path / "local.tif",
        "w",
        driver="GTiff",
        crs='LOCAL_CS["x",UNIT["metre",1]]',
        transform=Affine(10, 0, 500_000, 0, -10, 5e6),
        height=64,
        width=64,
        count=1,
        dtype="uint16",
    ) as file:
        file.write(np.full((64, 64), 1000, np.uint16), 1)
    one = item("x", "2023-06-01", (-63.1, 45.0, -62.9, 45.2), {"blue": str(tmp_path / "local.tif")})
    layers = load_layers([one], Grid(32620, 500_000.0, 5e6, 64, 64), bands=("blue",), warn=False)
    with pytest.raises(ReadError, match=r"local\.tif' can't be read"):
        layers["dn"].compute()


def test_items_of_any_make(items, grid):
    """A generator, pystac's items, an empty list; what can't be items or bands is refused."""
    whole = load_cube(items, grid)
    made = load_cube((pystac.Item.from_dict(item) for item in items), grid)
    assert made["id"].values.tolist() == whole["id"].values.tolist() != []
    np.testing.assert_array_equal(made[:1], whole[:1])
    assert not any(isinstance(value, dict) for value in whole.attrs.values())  # netCDF has none
    assert load_cube([], grid).sizes["time"] == 0
    for wrong in (items[0], {"type": "FeatureCollection", "features": items}):
        with pytest.raises(InputError, match="items is a dict"):
            load_cube(wrong, grid)
    for bands, told in (("red", "'red' is not a list"), (("red", "B02"), "'B02' is not")):
        with pytest.raises(InputError, match=told):
            load_cube(items, grid, bands=bands)
