"""Areas by site and period, against pixels counted by hand on stores with known values."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict

import geopandas
import numpy as np
import pandas as pd
import pytest
from pyproj import Geod
from shapely.geometry import MultiPoint, MultiPolygon, Point, Polygon, box

from minemap.areas import POOR, _around, area_table
from minemap.changes import first_year
from minemap.checkpoint import load_model
from minemap.errors import InputError, StoreError
from minemap.files import write_atomically
from minemap.grid import WINDOW, grids, pixel_area_km2
from minemap.scenes import parse_period
from minemap.sites import Site, bounds, read_sites
from minemap.store import Store
from minemap.vectors import AOI, inside_aoi

GEOD = Geod(ellps="WGS84")


def store_of(path, bbox, years, paint, model, chunk=512):
    """A map whose pixels are `paint(grid, year)`, uint8, wherever a zone owns them."""
    store, recipe = Store(path), load_model(model).recipe
    parameters = {"chunk": chunk, "resolution": 10.0, "model": recipe.name}
    attributes = {"recipe": json.loads(json.dumps(asdict(recipe))), "parameters": parameters, "model": recipe.name}
    store.create({"minemap": "0", "model_sha256": "", "stac": "", **attributes})
    for grid in grids(bbox, chunk):
        store.add_zone(grid, chunk, None)
        for year in years:
            period = parse_period(str(year))
            index = store.add_period(grid.group, period)
            for tile in grid.tiles(chunk):
                values = np.where(tile.owned(), paint(tile, year), np.uint8(255)).astype(np.uint8)
                store.write_tile(tile, index, {"probability": values})
                store.write_record(tile, period, {"windows": [0, chunk // WINDOW] * 2, "items": []})
    store.consolidate()
    return path


def geodesic_km2(shape):
    return abs(GEOD.geometry_area_perimeter(shape)[0]) / 1e6


BOX = (-63.02, 6.20, -62.98, 6.24)  # no zone's border
EDGE = (-60.03, 3.00, -59.97, 3.04)  # zones 20 and 21


@pytest.fixture(scope="module")
def made(tmp_path_factory, model):
    """Three years: a mine that fills the rows north of a line, moving south; of the second year, half is clouded."""

    def paint(grid, year):
        north = {2020: 686_600, 2021: 686_400, 2022: 686_000}[year]
        values = np.where(grid.y[:, None] > north, 90, 3) + np.zeros(grid.shape, int)
        if year == 2021:
            values[:, grid.x < np.median(grid.x)] = 255
        return values

    return store_of(tmp_path_factory.mktemp("areas") / "map.zarr", BOX, (2020, 2021, 2022), paint, model)


def test_areas_are_the_pixels(made):
    grid = Store(made).grid("utm32620")
    area, asked = pixel_area_km2(grid), grid.inside(BOX)
    table = area_table(made, bbox=BOX)
    assert list(table["year"]) == [2020, 2021, 2022] and set(table["site"]) == {"bbox"}
    values = {year: Store(made).read_tile(grid, n, "probability") for n, year in enumerate(table["year"])}
    for row in table.itertuples():
        seen = asked & (values[row.year] != 255)
        mine = seen & (values[row.year] >= 50)
        assert row.mapped_area_km2 == pytest.approx(area[mine].sum(), rel=1e-12)
        assert row.observed_fraction == pytest.approx(area[seen].sum() / area[asked].sum(), rel=1e-12)
        assert row.poorly_observed == (row.observed_fraction < POOR)
        assert row.site_area_km2 == pytest.approx(area[asked].sum(), rel=1e-12)
    assert table["poorly_observed"].tolist() == [False, True, False]
    assert geodesic_km2(box(*BOX).segmentize(0.001)) == pytest.approx(area[asked].sum(), rel=2e-3)


def test_only_what_was_computed_is_the_maps(tmp_path, model):
    """Of a super-tile of which a box asked for one window, the others are neither observed nor missing."""
    path = store_of(tmp_path / "map.zarr", BOX, (2020,), lambda grid, _: np.full(grid.shape, 90), model)
    store, period = Store(path), parse_period("2020")
    (first, *others) = store.done("utm32620", period)
    for tile in others:
        store.record_path(tile, period).unlink()
    store.write_record(first, period, {"windows": [0, 1, 0, 1], "items": []})
    values = np.full(first.shape, 255, np.uint8)
    values[:WINDOW, :WINDOW] = 90
    store.write_tile(first, 0, {"probability": values})
    (row,) = area_table(path).to_dict("records")
    expected = pixel_area_km2(first.window(0, 0, WINDOW, WINDOW)).sum()
    assert row["site_area_km2"] == pytest.approx(expected) and row["observed_fraction"] == 1


def test_the_box_of_a_site_is_that_of_its_pixels():
    """What counts as outside the model's region: the site's own pixels, not the super-tiles that it touches."""
    (grid,) = grids(BOX, 512)
    mask = np.zeros(grid.shape, bool)
    mask[100:120, 300:340] = True
    assert _around(mask, grid) == grid.window(100, 300, 20, 40).lonlat_bounds != grid.lonlat_bounds


def test_a_clouded_year_is_no_loss(made):
    first, clouded, last = area_table(made, bbox=BOX).itertuples()
    assert clouded.mapped_area_km2 < 0.8 * first.mapped_area_km2  # the part that was seen
    assert clouded.loss_km2 == 0 and clouded.gain_km2 > 0 and last.loss_km2 == 0
    assert clouded.common_observed_fraction == pytest.approx(clouded.observed_fraction)
    assert np.isnan(first.gain_km2) and np.isnan(first.common_observed_fraction)
    two = area_table(made, bbox=BOX, years=[2020, 2022]).iloc[1]  # against the row before, over the clouded year
    assert two.gain_km2 == pytest.approx(last.mapped_area_km2 - first.mapped_area_km2)
    assert two.common_observed_fraction == pytest.approx(1)


def test_thresholds(made):
    every = area_table(made, bbox=BOX, threshold=0.02, years=[2020]).iloc[0]
    none = area_table(made, bbox=BOX, threshold=0.95, years=[2020]).iloc[0]
    assert none.mapped_area_km2 == 0 and every.mapped_area_km2 > 1
    with pytest.raises(InputError, match="threshold 20 is a probability"):
        area_table(made, bbox=BOX, threshold=20)


def test_zones_are_summed_without_gap_or_doubling(tmp_path, model):
    """A box over two zones, all mine: its area on the ellipsoid; as a polygon, as a box, as the whole map."""
    path = store_of(tmp_path / "map.zarr", EDGE, (2020,), lambda grid, _: np.full(grid.shape, 80), model)
    assert len(Store(path).groups()) == 2
    file = tmp_path / "sites.gpkg"
    geopandas.GeoDataFrame({"name": ["both"]}, geometry=[box(*EDGE)], crs=4326).to_file(file)
    truth = geodesic_km2(box(*EDGE).segmentize(0.001))
    for given in ({"bbox": EDGE}, {"sites": file}):
        (row,) = area_table(path, **given).itertuples()
        assert row.mapped_area_km2 == pytest.approx(truth, rel=3e-3) and row.observed_fraction == 1
    (whole,) = area_table(path).itertuples()
    expected = sum(pixel_area_km2(g)[g.owned()].sum() for g in grids(EDGE, 512))
    assert whole.mapped_area_km2 == pytest.approx(expected) and whole.site == "map"


def test_sites_partly_and_wholly_outside_the_map(made, tmp_path):
    west, south, east, north = BOX
    height = north - south
    half = box(west, south, east, north + 5 * height)
    shapes = {"inside": box(*BOX), "half": half, "outside": box(10, 50, 10.05, 50.05)}
    file = tmp_path / "sites.geojson"
    geopandas.GeoDataFrame({"site": list(shapes)}, geometry=list(shapes.values()), crs=4326).to_file(file)
    table = area_table(made, sites=file, years=[2020]).set_index("site")
    assert list(table.index) == list(shapes)
    assert table.loc["inside", "observed_fraction"] == 1
    assert 0.15 < table.loc["half", "observed_fraction"] < 0.5 and table.loc["half", "poorly_observed"]
    outside = table.loc["outside"]
    assert outside.observed_fraction == 0 and outside.poorly_observed and np.isnan(outside.mapped_area_km2)
    lost = tmp_path / "lost.geojson"
    geopandas.GeoDataFrame(geometry=[shapes["outside"]], crs=4326).to_file(lost)
    with pytest.raises(InputError, match="holds nothing of the asked places: map them first"):
        area_table(made, sites=lost)


def test_a_map_clipped_to_an_area_counts_no_more_than_that(made, tmp_path):
    """Boxes and whole maps end at the map's own aoi, sites do not."""
    path = tmp_path / "map.zarr"
    shutil.copytree(made, path)
    shutil.copytree(Store(made).meta, Store(path).meta)
    west, south, east, north = BOX
    aoi = box(west, south, (west + east) / 2, north)
    write_atomically(Store(path).meta / AOI, aoi.wkt)
    grid = Store(made).grid("utm32620")
    area = pixel_area_km2(grid)
    within = area[inside_aoi(grid, Store(path).meta / AOI) & grid.inside(BOX)].sum()
    clipped, table = area_table(path, bbox=BOX), area_table(made, bbox=BOX)
    for row, whole in zip(clipped.itertuples(), table.itertuples(), strict=True):
        assert row.site_area_km2 == pytest.approx(within) and row.site_area_km2 < 0.6 * whole.site_area_km2


def test_sites_from_points_names_and_many_parts(tmp_path):
    points = geopandas.GeoDataFrame(
        {"id": [7, 7, 9]}, geometry=[Point(-63, 6), Point(-63.1, 6), Point(0, 50)], crs=4326
    )
    points.to_parquet(tmp_path / "points.parquet")
    with pytest.raises(InputError, match="holds points or lines: give --buffer METRES"):
        read_sites(tmp_path / "points.parquet")
    seven, nine = read_sites(tmp_path / "points.parquet", buffer=1000)
    assert (seven.name, nine.name) == ("7", "9")
    circle = np.pi  # km²; a polygon of 64 sides holds 0.16 % less
    assert geodesic_km2(nine.area) == pytest.approx(circle, rel=2e-3)
    assert geodesic_km2(seven.area) == pytest.approx(2 * circle, rel=2e-3)
    assert bounds([seven])[0] == pytest.approx(-63.109, abs=1e-3)
    for buffer in (-5, 0, 1e9):
        with pytest.raises(InputError, match="give metres"):
            read_sites(tmp_path / "points.parquet", buffer=buffer)


@pytest.mark.parametrize("names", [["A", None, ""], [3, None, None]])
def test_sites_without_a_name_stay_apart(tmp_path, names):
    shapes = [Point(n, 5).buffer(0.01) for n in range(3)]
    geopandas.GeoDataFrame({"name": names}, geometry=shapes, crs=4326).to_file(tmp_path / "s.gpkg")
    found = read_sites(tmp_path / "s.gpkg")
    assert [site.name for site in found] == [str(names[0]), "unnamed 2", "unnamed 3"]
    assert [round(site.area.centroid.x) for site in found] == [0, 1, 2]


def test_sites_of_a_frame_are_those_of_its_file(made, tmp_path):
    frame = geopandas.GeoDataFrame({"name": ["a", "b"]}, geometry=[box(*BOX), Point(-63.0, 6.22)], crs=4326)
    frame.to_file(tmp_path / "sites.geojson")
    table = area_table(made, sites=frame.to_crs(32620), buffer=500)
    expected = area_table(made, sites=tmp_path / "sites.geojson", buffer=500)
    assert table["site"].tolist() == expected["site"].tolist()
    np.testing.assert_allclose(table["mapped_area_km2"], expected["mapped_area_km2"], rtol=1e-3)
    with pytest.raises(InputError, match="the frame of sites holds points or lines"):
        area_table(made, sites=frame)
    for wrong in (frame.geometry, pd.DataFrame(frame)):
        with pytest.raises(InputError, match=r"sites is a (GeoSeries|DataFrame): give a vector file's path"):
            area_table(made, sites=wrong)
    with pytest.raises(InputError, match="the frame of sites has no coordinate reference system"):
        area_table(made, sites=frame.set_crs(None, allow_override=True))


@pytest.mark.parametrize("column", ["name", "other"])
def test_sites_are_numbered_by_the_rows_of_the_file(tmp_path, column):
    shapes = [None, Polygon(), Point(2, 5).buffer(0.01)]
    geopandas.GeoDataFrame({column: [None] * 3}, geometry=shapes, crs=4326).to_parquet(tmp_path / "s.parquet")
    (found,) = read_sites(tmp_path / "s.parquet")
    assert found.name == ("unnamed 3" if column == "name" else "3")


def test_a_bow_tie_is_an_area(tmp_path):
    """Its ring crosses itself: the signed areas of its two triangles cancel."""
    tie = Polygon([(0, 5), (0.02, 5.02), (0.02, 5), (0, 5.02)])
    assert tie.area == 0
    geopandas.GeoDataFrame(geometry=[tie], crs=4326).to_file(tmp_path / "s.gpkg")
    (found,) = read_sites(tmp_path / "s.gpkg")
    assert found.area.area == pytest.approx(2e-4)
    (wide,) = read_sites(tmp_path / "s.gpkg", buffer=100)
    assert wide.area.covers(found.area) and wide.area.area < 5e-4
    flat = Polygon([(0, 5), (0.02, 5.02), (0.01, 5.01)])
    geopandas.GeoDataFrame(geometry=[flat], crs=4326).to_file(tmp_path / "flat.gpkg")
    with pytest.raises(InputError, match="holds points or lines"):
        read_sites(tmp_path / "flat.gpkg")


def test_a_spike_adds_no_pixels(made, tmp_path):
    """Made valid it is a line, and GDAL would count every pixel that a line touches."""
    west, south, east, north = BOX
    middle = (south + north) / 2
    spiked = Polygon([(west, south), (east, south), (east, middle), (west, middle), (west, north), (west, middle)])
    shapes = [spiked, box(west, south, east, middle)]
    geopandas.GeoDataFrame({"name": ["spiked", "plain"]}, geometry=shapes, crs=4326).to_file(tmp_path / "s.gpkg")
    spiked, plain = area_table(made, sites=tmp_path / "s.gpkg", years=[2020])["site_area_km2"]
    assert spiked == plain > 5


@pytest.mark.parametrize("crs", [32760, 3832])  # UTM 60 S; Mercator around the Pacific
def test_projected_sites_across_the_antimeridian(tmp_path, crs):
    across = geopandas.GeoSeries([box(179.95, -17.02, 180.04, -17.0).segmentize(0.01)], crs=4326)
    world = geopandas.GeoSeries([box(-180, -80, 180, 80)], crs=4326)
    across.to_crs(crs).to_file(tmp_path / "s.gpkg")
    world.to_crs(3857).to_file(tmp_path / "world.gpkg")
    assert bounds(read_sites(tmp_path / "s.gpkg")) == pytest.approx((179.95, -17.02, -179.96, -17.0), abs=1e-5)
    assert bounds(read_sites(tmp_path / "world.gpkg")) == pytest.approx((-180, -80, 180, 80))


def test_sites_all_over_the_world(tmp_path):
    shapes = [Point(lon, 5).buffer(0.01) for lon in (-150, -60, 20, 150)]
    geopandas.GeoDataFrame({"NAME": list("abcd")}, geometry=shapes, crs=4326).to_file(tmp_path / "s.gpkg")
    found = read_sites(tmp_path / "s.gpkg")
    assert [site.name for site in found] == list("abcd")  # a column in capitals, as in shapefiles
    assert bounds(found) == pytest.approx((-150.01, 4.99, 150.01, 5.01))


def test_two_sites_of_one_name(made):
    with pytest.raises(InputError, match="two sites are named a: unite them"):
        area_table(made, sites=[Site("a", bbox=BOX), Site("a", bbox=EDGE)])


def test_places_that_are_none(tmp_path):
    (tmp_path / "table.csv").write_text("name,lon,lat\na,1,2\n")
    with pytest.raises(InputError, match=r"table\.csv holds no geometries: give a vector file"):
        read_sites(tmp_path / "table.csv")
    geopandas.GeoDataFrame(geometry=[Point(0, -88)], crs=4326).to_file(tmp_path / "pole.gpkg")
    geopandas.GeoDataFrame(geometry=[Point(np.inf, 1)], crs=4326).to_parquet(tmp_path / "inf.parquet")
    with pytest.raises(InputError, match=r"inf\.parquet has coordinates that are no numbers"):
        read_sites(tmp_path / "inf.parquet")
    with pytest.raises(InputError, match="all sites lie beyond 84 degrees"):
        bounds(read_sites(tmp_path / "pole.gpkg", buffer=1000))


def test_sites_across_the_antimeridian(tmp_path, model):
    across = (179.99, -17.02, -179.99, -17.0)
    path = store_of(tmp_path / "map.zarr", across, (2020,), lambda grid, _: np.full(grid.shape, 80), model)
    shapes = [
        box(179.99, -17.02, 180.01, -17.0),
        MultiPolygon([box(179.99, -17.02, 180, -17.0), box(-180, -17.02, -179.99, -17.0)]),
    ]
    file = tmp_path / "sites.gpkg"
    frame = geopandas.GeoDataFrame(
        {"name": ["past", "cut"]}, geometry=[MultiPolygon([shapes[0]]), shapes[1]], crs=4326
    )
    frame.to_file(file)
    table = area_table(path, sites=file)
    box_row = area_table(path, bbox=across).iloc[0]
    for row in table.itertuples():
        assert row.mapped_area_km2 == pytest.approx(box_row.mapped_area_km2, rel=1e-3)
        assert row.observed_fraction == pytest.approx(1)
    assert bounds(read_sites(file)) == pytest.approx(across)
    geopandas.GeoDataFrame(geometry=[Point(179.999, -17)], crs=4326).to_file(tmp_path / "point.gpkg")
    west, _, east, _ = bounds(read_sites(tmp_path / "point.gpkg", buffer=500))
    assert west > 179.99 and east < -179.99


@pytest.mark.parametrize("buffer", [200, 2000])
def test_a_buffer_around_a_site_that_is_cut_at_the_antimeridian(buffer, tmp_path):
    """The same place, cut there and whole elsewhere: each part is buffered around itself."""
    cut = MultiPolygon([box(179.98, -17.02, 180, -16.98), box(-180, -17.02, -179.98, -16.98)])
    shapes = [cut, box(9.98, -17.02, 10.02, -16.98), MultiPoint([(-60, -17), (110, -17)]), Point(20, -17)]
    frame = geopandas.GeoDataFrame({"name": list("abcd")}, geometry=shapes, crs=4326)
    frame.to_file(tmp_path / "s.geojson")
    sites = read_sites(tmp_path / "s.geojson", buffer=buffer)
    cut_km2, whole_km2, two_km2, one_km2 = (
        abs(Geod(ellps="WGS84").geometry_area_perimeter(s.area)[0]) for s in sites
    )
    assert cut_km2 == pytest.approx(whole_km2, rel=1e-4) and two_km2 == pytest.approx(2 * one_km2, rel=1e-4)
    reach = buffer / 1000 / 100  # degrees of longitude, at most
    assert bounds(sites[:1]) == pytest.approx((179.98, -17.02, -179.98, -16.98), abs=reach)


@pytest.mark.parametrize(
    ("words", "error", "match"),
    [
        ({"years": [2018, 2019]}, InputError, "no map of 2018, 2019: it has 2020-01-01/2020-12-31, "),
        ({"sites": "nonesuch.gpkg"}, InputError, "sites nonesuch.gpkg can't be read as a vector file"),
        ({"sites": "x", "bbox": BOX}, InputError, "not both"),
        ({"layer": "probability_consistent"}, StoreError, "has no probability_consistent of all that is mapped now"),
    ],
)
def test_errors_say_what_and_what_to_do(made, words, error, match):
    with pytest.raises(error, match=match):
        area_table(made, **words)


def test_a_site_smaller_than_a_pixel_is_said(made, tmp_path):
    shapes = {"tiny": Point(-63.0, 6.22).buffer(1e-7), "inside": box(*BOX)}
    geopandas.GeoDataFrame({"name": list(shapes)}, geometry=list(shapes.values()), crs=4326).to_file(
        tmp_path / "s.gpkg"
    )
    with pytest.warns(UserWarning, match="site tiny holds no pixel"):
        table = area_table(made, sites=tmp_path / "s.gpkg")
    assert np.isnan(table["mapped_area_km2"][0]) and table["poorly_observed"][0]


def test_periods_that_are_no_years(tmp_path, model):
    path = store_of(tmp_path / "map.zarr", BOX, ("2021-06", "2021"), lambda grid, _: np.full(grid.shape, 80), model)
    table = area_table(path)
    assert table["year"].tolist() == [2021, 2021]
    assert table["period"].tolist() == ["2021-01-01/2021-12-31", "2021-06-01/2021-06-30"]
    assert len(area_table(path, years=[2021])) == 1


def test_first_year():
    stack = np.array([[[0, 1, 255, 0]], [[1, 0, 255, 0]], [[1, 1, 1, 255]]], np.uint8)
    years = first_year(stack, [2019, 2020, 2021])
    assert years.tolist() == [[2020, 2019, 2021, 0]] and years.dtype == np.uint16
