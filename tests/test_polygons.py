"""Polygons of the footprint: whole, where they should be, and as large as their pixels."""

from __future__ import annotations

from collections import Counter

import geopandas
import numpy as np
import pytest
import rasterio.features
import shapely
from conftest import painted
from pyproj import Transformer
from scipy import ndimage

from minemap.errors import InputError
from minemap.grid import CELL, Grid, grids, pixel_area_km2
from minemap.polygons import geodesic_km2, polygons

GRID = Grid(32620, 25 * float(CELL), 34 * float(CELL), 1024, 1024)


def blobs(seed, shape=GRID.shape, sigma=4, share=0.5):
    """Smooth random blobs, bool (y, x)."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), sigma)
    return noise > np.quantile(noise, 1 - share)


def per_cent(mine, unseen=None):
    percent = np.where(mine, 80, 10).astype(np.uint8)
    if unseen is not None:
        percent[unseen] = 255
    return percent


def in_metres(frame, epsg=32620):
    return frame.geometry.to_crs(epsg)


@pytest.fixture(scope="module")
def unseen():
    hidden = blobs(7, sigma=20, share=0.1)
    hidden[:, 512] = True  # a line along a border of super-tiles
    return hidden


@pytest.fixture(scope="module")
def made(tmp_path_factory, unseen):
    """Four super-tiles with blobs across their borders, and the mask that was drawn."""
    mine = blobs(1)
    path = painted(tmp_path_factory.mktemp("made") / "map.zarr", {GRID: {"2023": per_cent(mine, unseen)}})
    return path, mine & ~unseen


def test_polygons_are_those_of_the_whole_array_without_seams(made):
    path, mine = made
    whole = rasterio.features.shapes(mine.astype(np.uint8), mask=mine, connectivity=4, transform=GRID.transform)
    expected = [shapely.geometry.shape(outline).simplify(0) for outline, _ in whole]
    found = shapely.set_precision(in_metres(polygons(path)).values, 0.001)
    assert len(found) == len(expected) > 100
    across = [s for s in expected if s.bounds[0] < GRID.left + 5120 < s.bounds[2]]
    across += [s for s in expected if s.bounds[1] < GRID.top - 5120 < s.bounds[3]]
    assert len(across) > 10 and sum(len(s.interiors) for s in expected) > 20

    def key(shape):
        return tuple(round(n) for n in shape.bounds), len(shape.exterior.coords), len(shape.interiors)

    assert Counter(map(key, found)) == Counter(map(key, expected))
    tree = shapely.STRtree(expected)
    for one, other in zip(
        found, tree.query_nearest(shapely.point_on_surface(found), all_matches=False)[1], strict=True
    ):
        assert one.symmetric_difference(expected[other]).area < 1
    assert shapely.is_valid(found).all()


def test_numbers_of_polygons_are_those_of_their_pixels(made, unseen):
    path, mine = made
    frame = polygons(path)
    area = pixel_area_km2(GRID)
    labels, number = ndimage.label(mine)
    assert frame.crs.to_epsg() == 4326 and len(frame) == number
    assert frame["area_km2"].sum() == pytest.approx(area[mine].sum(), rel=1e-6)
    expected = np.sort(ndimage.sum_labels(area, labels, range(1, number + 1)))[::-1]
    np.testing.assert_allclose(frame["area_km2"], expected, rtol=1e-6)
    assert (frame["mean_probability"] == 0.8).all() and (frame["threshold"] == 0.5).all()
    assert list(frame["id"]) == list(range(1, number + 1)) and set(frame["model"]) == {"demo-2026"}
    assert {*frame["start"], *frame["end"]} == {"2023-01-01", "2023-12-31"}
    assert "first_year" not in frame
    beside = ndimage.binary_dilation(np.pad(unseen, 1, constant_values=True))[1:-1, 1:-1]
    assert frame["touches_unobserved"].sum() == len(set(labels[beside & mine]))
    centre = shapely.points(
        *Transformer.from_crs(32620, 4326, always_xy=True).transform(np.full(1024, GRID.x[512]), GRID.y)
    )
    assert not shapely.intersects(frame.union_all(), centre).any()


def test_corners_do_not_connect_but_edges_across_a_border_do(tmp_path):
    mine = np.zeros(GRID.shape, bool)
    mine[511, 511] = mine[512, 512] = True  # a corner, where four super-tiles meet
    mine[100, 511] = mine[100, 512] = True  # an edge
    mine[[300, 301], [600, 601]] = True  # a corner within one
    frame = polygons(painted(tmp_path / "m.zarr", {GRID: {"2023": per_cent(mine)}}))
    assert sorted(frame["area_km2"].round(5)) == [0.0001] * 4 + [0.0002]


def test_small_ones_go_after_joining(tmp_path):
    mine = np.zeros(GRID.shape, bool)
    mine[506:518, 100:112] = True  # 1.44 ha, half of it on either side of a border
    mine[50:59, 50:59] = True  # 0.81 ha
    path = painted(tmp_path / "m.zarr", {GRID: {"2023": per_cent(mine)}})
    assert len(polygons(path)) == 2
    (kept,) = polygons(path, min_area=1.0)["area_km2"]
    assert kept == pytest.approx(0.0144, rel=1e-3)
    assert len(polygons(path, min_area=2)) == 0 and len(polygons(path, threshold=0.81)) == 0
    assert list(polygons(path, min_area=2).columns) == list(polygons(path).columns)
    with pytest.raises(InputError, match="min_area -1 is an area in hectares"):
        polygons(path, min_area=-1)
    with pytest.raises(InputError, match=r"threshold 1\.5 is a probability"):
        polygons(path, threshold=1.5)
    with pytest.raises(InputError, match=r"no period 2001-01-01/2001-12-31: it has 2023"):
        polygons(path, date="2001")


def test_smoothing_takes_half_a_pixel_off_each_outline(made):
    path, _ = made
    plain, smooth = polygons(path), polygons(path, smooth=True)
    np.testing.assert_array_equal(plain["area_km2"], smooth["area_km2"])
    assert smooth.geometry.is_valid.all()
    holes = smooth.geometry.apply(lambda shape: len(shape.interiors)).to_numpy()
    change = (smooth["outline_km2"] - smooth["area_km2"]).to_numpy() * 1e6
    large = plain["area_km2"] > 0.01
    assert large.sum() > 20 and np.abs(change / (plain["area_km2"] * 1e6))[large].max() < 0.01
    assert change.sum() == pytest.approx(-50 * (1 - holes).sum(), abs=5 * len(holes))
    union = shapely.union_all(in_metres(smooth).values).area
    assert in_metres(smooth).area.sum() == pytest.approx(union, abs=0.01)
    corners = [shapely.get_num_coordinates(frame.geometry.values).sum() for frame in (plain, smooth)]
    assert corners[1] < 2 * corners[0]


def test_first_year_is_when_a_tenth_was_mined(tmp_path):
    years = {"2019": 0.05, "2020": 0.15, "2022": 1.0}
    grown = {}
    for year, share in years.items():
        mine = np.zeros(GRID.shape, bool)
        mine[500 : 500 + round(100 * share), 500:600] = True
        mine[10:20, 10:20] = year == "2022"
        grown[year] = per_cent(mine, blobs(3, sigma=30, share=0.2) if year == "2020" else None)
        grown[year][400:450, 500:600] = 255 if year != "2022" else 90
    path = painted(tmp_path / "m.zarr", {GRID: grown})
    frame = polygons(path)
    assert sorted(frame["first_year"]) == [2020, 2022, 2022]
    assert frame["first_year"].iloc[0] == 2020  # the largest
    assert set(polygons(path, date="2019")["first_year"]) == {2019}
    assert (polygons(path, date="2020")["start"] == "2020-01-01").all()


def test_periods_of_one_year_have_no_first_year(tmp_path):
    mine = per_cent(blobs(3, sigma=30, share=0.2))
    path = painted(tmp_path / "m.zarr", {GRID: {"2020-01": mine, "2020-07": mine}})
    assert "first_year" not in polygons(path)


@pytest.mark.parametrize(
    ("lon", "lat", "zones", "side"),
    [(-66.0, 6.25, 2, 10), (180.0, -16.5, 2, 10), (-66.0, 0.0, 4, 10), (-66, 6, 2, 30)],
)
def test_a_disc_across_zones_is_one_polygon(lon, lat, zones, side, tmp_path):
    """A disc of 1 km around a point on the edge of zones, drawn in each zone's own pixels."""
    box = (lon - 0.03 if lon < 180 else 179.97, lat - 0.03, lon + 0.03 if lon < 180 else -179.97, lat + 0.03)
    drawn = {}
    for grid in grids(box, 512, resolution=side):
        own = Transformer.from_crs(4326, grid.epsg, always_xy=True).transform(lon, lat)
        distance = np.hypot(grid.y[:, None] - own[1], grid.x[None, :] - own[0])
        drawn[grid] = {"2023": np.where(grid.owned(), np.where(distance < 1000, 90, 3), 255).astype(np.uint8)}
    frame = polygons(painted(tmp_path / "m.zarr", drawn))
    assert len(drawn) == zones
    assert len(frame) == 1 and frame["area_km2"].iloc[0] == pytest.approx(np.pi, rel=0.005)
    assert not frame["touches_unobserved"].any()
    shape = frame.geometry.iloc[0]
    assert shape.is_valid and len(shapely.get_parts(shape)) == (2 if lon == 180 else 1)
    assert all(not part.interiors for part in shapely.get_parts(shape))
    bounds = shapely.bounds(shapely.get_parts(shape))
    assert (np.abs(bounds[:, [0, 2]]) <= 180).all() and (bounds[:, 2] - bounds[:, 0]).max() < 0.03
    assert frame["mean_probability"].iloc[0] == pytest.approx(0.9)


def test_a_gap_between_zones_stays_where_nothing_was_mapped(tmp_path):
    """Mines on either side of the zones' edge, 30 m from it: two polygons, not one."""
    drawn = {}
    for grid in grids((-66.02, 6.24, -65.98, 6.26), 512):
        x, y = Transformer.from_crs(4326, grid.epsg, always_xy=True).transform(-66.0, 6.25)
        near = (np.abs(grid.x - x) > 30) & (np.abs(grid.x - x) < 500)
        mine = near[None, :] & (np.abs(grid.y - y) < 40)[:, None]
        drawn[grid] = {"2023": np.where(grid.owned(), per_cent(mine), 255).astype(np.uint8)}
    assert len(polygons(painted(tmp_path / "m.zarr", drawn))) == 2


@pytest.fixture(scope="module")
def watched(shared):
    """Published mining polygons by the year they were detected in, made valid, degrees."""
    found = {}
    for year in range(2019, 2023):
        frame = geopandas.read_file(shared / "amazon_mining_watch" / f"{year}.geojson")
        parts = frame.geometry.make_valid().explode(index_parts=False)
        found[year] = parts[parts.geom_type == "Polygon"].reset_index(drop=True)
    return found


@pytest.mark.parametrize("year", range(2019, 2023))
def test_areas_on_the_ellipsoid_agree_with_an_equal_area_projection(watched, year):
    """Geodesic areas against areas in the plane of the ellipsoid's cylindrical equal-area projection."""
    shapes = watched[year]
    plane = geopandas.GeoSeries(shapely.segmentize(shapes.values, 1e-4), crs=4326).to_crs("+proj=cea +ellps=WGS84")
    found = geodesic_km2(shapes.values)
    np.testing.assert_allclose(found, plane.area / 1e6, rtol=1e-4, atol=1e-9)  # some are slivers of mm²
    assert found.sum() == pytest.approx(plane.area.sum() / 1e6, rel=1e-6)


@pytest.mark.parametrize("year", range(2019, 2023))
def test_published_polygons_drawn_and_outlined_again_keep_their_area(watched, year, tmp_path):
    shapes = watched[year]
    centres = shapely.get_coordinates(shapely.centroid(shapes.values))
    cells = Counter(map(tuple, np.floor(centres / 0.1).astype(int)))
    (column, row), _ = cells.most_common(1)[0]
    box = (column * 0.1, row * 0.1, column * 0.1 + 0.1, row * 0.1 + 0.1)
    near = shapes[shapes.within(shapely.box(*box))].union_all()
    grid, *others = grids(box, 512)
    assert not others and len(shapely.get_parts(near)) > 5
    drawn = geopandas.GeoSeries([near], crs=4326).to_crs(grid.epsg)
    mine = rasterio.features.rasterize(drawn, grid.shape, transform=grid.transform).astype(bool)
    frame = polygons(painted(tmp_path / "m.zarr", {grid: {str(year): per_cent(mine)}}))
    assert frame["area_km2"].sum() == pytest.approx(geodesic_km2(np.array([near]))[0], rel=0.01)
