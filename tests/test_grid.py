"""Grids, zones and areas against independent geometry."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyproj import Geod, Transformer

from minemap.errors import InputError
from minemap.grid import CELL, Grid, check_bbox, grids, pixel_area_km2, wanted_tiles, zone_epsg

boxes = st.tuples(st.floats(-179.9, 179.9), st.floats(-83, 82), st.floats(0.01, 0.4), st.floats(0.01, 0.4)).map(
    lambda b: (b[0], b[1], min(b[0] + b[2], 180.0), b[1] + b[3])
)


@settings(deadline=None, max_examples=40)
@given(boxes, st.sampled_from([512, 1024, 2048]))
def test_grids_cover_the_box_and_lie_on_the_lattice(bbox, chunk):
    for grid in grids(bbox, chunk):
        assert grid.left % (chunk * 10) == grid.top % (chunk * 10) == 0
        assert grid.height % chunk == grid.width % chunk == 0
    rng = np.random.default_rng(0)
    for lon, lat in zip(rng.uniform(bbox[0], bbox[2], 5), rng.uniform(bbox[1], bbox[3], 5), strict=True):
        grid = next(g for g in grids(bbox, chunk) if g.epsg == zone_epsg(lon, lat))
        x, y = Transformer.from_crs(4326, grid.epsg, always_xy=True).transform(lon, lat)
        left, bottom, right, top = grid.bounds
        assert left <= x <= right and bottom <= y <= top


@pytest.mark.parametrize(
    "bbox", [(-6.05, 40, -5.95, 40.1), (179.95, -16, -179.95, -15.9), (-66.05, -0.05, -65.95, 0.05)]
)
def test_zones_share_the_land_without_gap_or_doubling(bbox):
    """The pixels that all zones own within a box add up to its area on the ellipsoid."""
    total, pixels = 0.0, 0
    for grid in grids(bbox, 512):
        for tile in grid.tiles(512):
            mine = tile.inside(bbox)
            assert not (mine & ~tile.owned()).any()
            total += float((pixel_area_km2(tile) * mine).sum())
            pixels += int(mine.sum())
    west, south, east, north = bbox
    east = east + 360 if east < west else east
    edge = np.linspace(west, east, 200)
    lon, lat = np.r_[edge, edge[::-1]], np.r_[np.full(200, south), np.full(200, north)]
    expected = abs(Geod(ellps="WGS84").polygon_area_perimeter(lon, lat)[0]) / 1e6
    assert total == pytest.approx(expected, rel=1e-3)  # a border of pixels is in or out whole
    assert len({g.epsg for g in grids(bbox)}) > 1


def test_owned_pixels_agree_with_projecting_each():
    grid = Grid(32630, 752_000.0, 4_430_000.0, 300, 900)  # reaches into zone 31
    lon, _ = Transformer.from_crs(32630, 4326, always_xy=True).transform(*np.meshgrid(grid.x, grid.y))
    assert (grid.owned() == ((lon >= -6) & (lon < 0))).all()
    assert 0 < grid.owned().mean() < 1


def test_pixel_areas_agree_with_geodesic_polygons():
    grid = Grid(32720, 450_560.0, 8_000_000.0, 64, 64, 320.0)
    left, bottom, right, top = grid.bounds
    side = np.linspace(0, 1, 400)
    x = np.r_[left + side * (right - left), np.full(400, right), right - side * (right - left), np.full(400, left)]
    y = np.r_[np.full(400, top), top - side * (top - bottom), np.full(400, bottom), bottom + side * (top - bottom)]
    lon, lat = Transformer.from_crs(32720, 4326, always_xy=True).transform(x, y)
    expected = abs(Geod(ellps="WGS84").polygon_area_perimeter(lon, lat)[0]) / 1e6
    assert pixel_area_km2(grid).sum() == pytest.approx(expected, rel=1e-6)


def test_cells_hold_whole_super_tiles():
    for chunk in (512, 1024, 2048):
        grid = grids((-63.45, 6.2, -63.3, 6.35), chunk)[0]
        for tile in grid.tiles(chunk):
            column, row = tile.cell
            left, bottom, right, top = tile.bounds
            assert column * CELL <= left and right <= (column + 1) * CELL
            assert row * CELL <= bottom and top <= (row + 1) * CELL


def test_wanted_windows_hold_every_asked_pixel_and_no_empty_side():
    bbox = (-63.45, 6.2, -63.3, 6.35)
    found = list(wanted_tiles(grids(bbox)[0], 2048, bbox))
    assert [tile for tile, _ in found] == list(grids(bbox)[0].tiles(2048))
    for tile, (top, bottom, left, right) in found:
        asked = tile.inside(bbox)
        inner = asked[top * 256 : bottom * 256, left * 256 : right * 256]
        assert inner.sum() == asked.sum()
        assert inner[:256].any() and inner[-256:].any() and inner[:, :256].any() and inner[:, -256:].any()


@pytest.mark.parametrize(
    ("bbox", "message"),
    [((1, 2, 3), "needs 4 numbers"), ((0, 0, float("nan"), 1), "not finite"), ((0, 0, 200, 1), "east is 200")],
)
def test_bad_boxes(bbox, message):
    with pytest.raises(InputError, match=message):
        check_bbox(bbox)


def test_a_box_of_a_few_pixels_is_found():
    """480 m, smaller than any coarse lattice of points over a super-tile."""
    for lon in np.linspace(-63.4, -63.2, 23):
        bbox = (lon, 6.3, lon + 0.0043, 6.3043)
        asked = sum(int(tile.inside(bbox).sum()) for grid in grids(bbox) for tile in grid.tiles(2048))
        assert asked == pytest.approx(48 * 48, rel=0.05)


def slow_windows(tile, bbox):
    """Every pixel projected and looked at."""
    y, x = np.meshgrid(tile.y, tile.x, indexing="ij")
    lon, lat = Transformer.from_crs(tile.epsg, 4326, always_xy=True).transform(x, y)
    middle = tile.epsg % 100 * 6 - 183
    lon = (lon - middle + 180) % 360 - 180 + middle
    west, south, east, north = bbox
    east = east if west < east else east + 360
    wanted = (lat >= south) & (lat < north) & (abs(lon - middle) <= 3) & (lon < middle + 3)
    wanted &= (lat >= 0) if tile.epsg < 32700 else (lat < 0)
    wanted &= np.any([(lon + turn >= west) & (lon + turn < east) for turn in (-360, 0, 360)], axis=0)
    windows = wanted.reshape(tile.height // 256, 256, tile.width // 256, 256).any(axis=(1, 3))
    rows, columns = np.flatnonzero(windows.any(axis=1)), np.flatnonzero(windows.any(axis=0))
    return (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1) if rows.size else None


@settings(deadline=None, max_examples=8)
@given(
    st.sampled_from([-180.0, -66.0, -63.2, -60.0, 177.5, 179.9]),
    st.sampled_from([-80.0, -33.3, -0.04, 6.2, 59.0, 83.6]),
    st.sampled_from([0.0001, 0.004, 0.06, 0.09, 0.3]),
    st.sampled_from([0.0001, 0.05, 0.075, 0.2]),
)
def test_wanted_windows_are_those_of_the_slow_way(lon, lat, width, height):
    west, east = lon - width / 2, lon + width / 2
    west, east = (west + 360 if west < -180 else west), (east - 360 if east > 180 else east)
    bbox = (west, lat - height / 2, east, lat + height / 2)
    for grid in grids(bbox, 512):
        found = dict(wanted_tiles(grid, 512, bbox))
        tiles = list(grid.tiles(512))
        for tile in tiles[:: max(1, len(tiles) // 4)]:
            assert found.get(tile) == slow_windows(tile, bbox)


@pytest.mark.parametrize("lat", [-79.9, -0.01, 35.0, 83.9])
@pytest.mark.parametrize("part", range(3))
def test_windows_on_the_edge_of_a_zone_are_those_of_the_slow_way(lat, part):
    """Only the rim of a window is looked at there: a row of super-tiles that the zone's edge crosses aslant."""
    bbox = (-66.0, lat - 0.08, -60.0, lat + 0.08)
    for grid in grids(bbox, 512):
        found = dict(wanted_tiles(grid, 512, bbox))
        row = list(grid.tiles(512))[: grid.width // 512]
        for tile in (*row[part:6:3], *row[-6 + part :: 3]):
            assert found.get(tile) == slow_windows(tile, bbox)


def test_a_country_is_planned_without_its_pixels():
    """It has thousands of super-tiles: none of them may cost the four million pixels that it holds."""
    bbox = (-66.0, -20.0, -60.0, -1.0)
    (grid,) = grids(bbox, 2048)
    start = time.process_time()
    found = dict(wanted_tiles(grid, 2048, bbox))
    assert len(found) > 3000
    assert (time.process_time() - start) / len(found) < 1e-3
    assert found[Grid(32720, 24 * 20_480.0, 440 * 20_480.0, 2048, 2048)] == (0, 8, 0, 8)


@pytest.mark.parametrize("south", [45.127498263515, -45.177498263515])
def test_a_wide_box_is_whole_where_its_edges_bulge(south):
    """A parallel lies farthest south (or north) at the central meridian, here just beyond a super-tile's border."""
    bbox = (-65.99, south, -60.3, south + 0.05)
    (grid,) = grids(bbox, 2048)
    to_zone = Transformer.from_crs(4326, grid.epsg, always_xy=True)
    _, bottom, _, top = grid.bounds
    lon = np.linspace(bbox[0], bbox[2], 2001)
    for lat in (bbox[1], bbox[3]):
        y = to_zone.transform(lon, np.full_like(lon, lat))[1]
        assert bottom <= y.min() and y.max() <= top
