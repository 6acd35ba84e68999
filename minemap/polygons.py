"""The footprint as polygons, whole across windows, super-tiles and zones.

One super-tile at a time is read, labelled (4-connected: pixels that share an edge belong together, a corner is not
enough) and outlined along its pixels' edges, so memory holds one super-tile and the outlines. Of the label images
only the four borders are kept: where two super-tiles meet, labels on both sides of a shared pixel edge are one
footprint. Outlines are unions of squares of one lattice, so joining them is exact and leaves no seam.

Two zones have two lattices, turned against each other by the convergence of their meridians. A pixel belongs to the
zone that its centre lies in, so along the zones' edge both footprints end in steps that overlap or leave gaps of up
to a pixel. Footprints of two zones that come within a pixel of each other there are one: the later is projected into
the first one's zone, and within a pixel of the edge (nowhere else) the gaps between them are closed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely
from pyproj import Geod, Transformer

from .contents import choose_period, read_periods
from .errors import InputError
from .grid import Grid, continuous_lonlat, zone_box
from .inference import NOT_OBSERVED, check_threshold, mine_from
from .scenes import Period
from .store import Store

if TYPE_CHECKING:
    import geopandas
    import pandas as pd

HECTARES = 100.0  # in a km²
FIRST_SHARE = 0.1  # of a footprint's pixels, mined by the year that counts as its first
LONGEST = 1000.0  # metres of a straight edge; a longer one gets points, since it bends in degrees
STRIP = 0.75  # pixels on each side of the edge of two zones where their pixels can leave gaps
GEOD = Geod(ellps="WGS84")


def polygons(
    path: str | Path,
    *,
    date: str | None = None,
    threshold: float | None = None,
    min_area: float = 0.0,
    smooth: bool = False,
) -> geopandas.GeoDataFrame:
    """The footprint of one period over all zones of a map, one row a polygon, largest first, in EPSG:4326.

    date: one of the map's periods, the last one when None. threshold: probability from which a pixel is mine, 0-1,
    the model's own when None. min_area: hectares; smaller ones are dropped after everything has been joined.
    smooth: cut the corners of the pixels' steps, by half a pixel at most; what is measured stays the pixels' outline.

    Columns: `id`; `area_km2` on the ellipsoid, geodesic; `mean_probability` (0-1, over its pixels); `start` and `end`
    of the period (ISO dates); `first_year`, where the map has several years: the first by which a tenth of the
    polygon's pixels had been mined (for the map's first year: or before); `touches_unobserved`: it may go on where
    nothing was observed, also beyond the map's edge; `model`, `threshold`; and with smooth `outline_km2`, the area of
    the outline as drawn. Holes are kept. Pixels not observed are never part of a polygon. At the antimeridian
    a polygon is cut in two parts, as RFC 7946 asks. Raises InputError, StoreError.
    """
    import geopandas

    store = Store.at(path)
    about = store.attributes()
    limit = check_threshold(about["recipe"]["threshold"] if threshold is None else threshold)
    if not 0 <= min_area < math.inf:
        raise InputError(f"min_area {min_area:g} is an area in hectares, 0 or more")
    period = choose_period(store, date)
    years = _years(store, period)
    found = _all_zones(store, period, mine_from(limit), years)
    area = _areas(found.geometry, found.epsg)
    kept = np.flatnonzero(area >= min_area / HECTARES)
    kept = kept[np.lexsort((kept, -area[kept]))]
    found, area = found.take(kept), area[kept]
    columns: dict[str, Any] = {
        "id": np.arange(1, len(area) + 1),
        "area_km2": area,
        "mean_probability": found.percent / np.maximum(found.pixels, 1) / 100,
        "start": _texts(period.start, len(area)),
        "end": _texts(period.end, len(area)),
        "touches_unobserved": found.open,
        "model": _texts(about["model"], len(area)),
        "threshold": np.full(len(area), limit),
    }
    if any(p.start.year != years[0] for group in store.groups() for p in store.periods(group)):
        columns["first_year"] = _first_year(found.years, years)
    outline = found.geometry
    if smooth:
        outline = np.array([_smoothed(one, side) for one, side in zip(outline, found.side, strict=True)], object)
        columns["outline_km2"] = _areas(outline, found.epsg)
    return geopandas.GeoDataFrame(columns, geometry=within_180(_in_degrees(outline, found.epsg)), crs=4326)


def _texts(text: object, rows: int) -> pd.api.extensions.ExtensionArray:
    """A column of one text: of text also where it has no rows."""
    import pandas as pd

    return pd.array([str(text)] * rows, dtype="string")


COLUMNS = {
    "id": ("int64", "number, largest polygon first"),
    "area_km2": ("double", "area of its pixels' outline on the WGS 84 ellipsoid, km²"),
    "mean_probability": ("double", "mean over its pixels, 0-1"),
    "start": ("string", "first day of the period"),
    "end": ("string", "last day of the period"),
    "first_year": ("int64", "first year by which a tenth of its pixels had been mined"),
    "touches_unobserved": ("boolean", "it may go on where nothing was observed"),
    "model": ("string", "name of the model"),
    "threshold": ("double", "probability from which a pixel is mine"),
    "outline_km2": ("double", "area of the smoothed outline, km²"),
    "geometry": ("byte_array", "polygon, degrees"),
    "bbox": ("group", "bounds of the geometry, degrees: xmin, ymin, xmax, ymax"),
}


def _years(store: Store, until: Period) -> list[int]:
    """Years in which the map's periods up to `until` start, ascending."""
    periods = {p for group in store.groups() for p in store.periods(group)}
    return sorted({p.start.year for p in periods if p.start <= until.start})


@dataclass(frozen=True)
class _Footprints:
    """Arrays with an entry a footprint.

    geometry: polygons in metres of zone `epsg`, on pixels of `side` metres. pixels: their number. percent: the sum
    over them. open: whether one lies beside a pixel that is not observed. years: pixels by the first of the years
    they were mined in, (n, years).
    """

    geometry: np.ndarray
    epsg: np.ndarray
    side: np.ndarray
    pixels: np.ndarray
    percent: np.ndarray
    open: np.ndarray
    years: np.ndarray

    def take(self, index: np.ndarray) -> _Footprints:
        return _Footprints(*(column[index] for column in vars(self).values()))

    @staticmethod
    def joined(parts: list[_Footprints]) -> _Footprints:
        return _Footprints(*(np.concatenate(c) for c in zip(*(vars(p).values() for p in parts), strict=True)))

    @staticmethod
    def none(years: int) -> _Footprints:
        whole, real = np.zeros(0, np.int64), np.zeros(0)
        by_year = np.zeros((0, years), np.int64)
        return _Footprints(np.zeros(0, object), whole, real, whole, real, np.zeros(0, bool), by_year)

    def grouped(self, pairs: np.ndarray) -> _Footprints:
        """Footprints that `pairs` (n, 2) of indices connect as one, in the place of the first; int (n, 2)."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        if not len(pairs):
            return self
        size = len(self.geometry)
        links = coo_array((np.ones(len(pairs)), tuple(pairs.T)), (size, size))
        number, group = connected_components(links, directed=False)
        _, first = np.unique(group, return_index=True)
        order = np.argsort(first)  # groups in the order of their first footprint
        group, first = np.argsort(order)[group], first[order]
        sums = {n: np.zeros((number, *c.shape[1:]), c.dtype) for n, c in vars(self).items() if c.dtype.kind in "if"}
        for name, total in sums.items():
            np.add.at(total, group, getattr(self, name))
        beside = np.bincount(group, self.open, number) > 0
        geometry = self.geometry[first]
        members = np.split(np.argsort(group, kind="stable"), np.cumsum(np.bincount(group))[:-1])
        for one in np.flatnonzero(np.bincount(group) > 1):
            geometry[one] = _union(self.take(members[one]))
        place = geometry, self.epsg[first], self.side[first]
        return _Footprints(*place, sums["pixels"], sums["percent"], beside, sums["years"])


def _union(parts: _Footprints) -> shapely.Geometry:
    """All parts as one, in the first one's zone; gaps along the edge between zones are closed."""
    first = int(parts.epsg[0])
    shapes = [_projected(g, int(e), first) for g, e in zip(parts.geometry, parts.epsg, strict=True)]
    whole = shapely.union_all(shapes)
    if len(set(parts.epsg.tolist())) == 1:
        return whole.simplify(0)  # points on straight edges, where a seam was
    side = float(parts.side[0])
    closed = whole.buffer(side, join_style="mitre").buffer(-side, join_style="mitre")
    return whole.union(closed.intersection(_zone_edges(whole, first).buffer(STRIP * side)))


def _all_zones(store: Store, period: Period, limit: int, years: list[int]) -> _Footprints:
    zones = [_zone(store, group, period, limit, years) for group in store.groups() if period in store.periods(group)]
    found = _Footprints.joined([_Footprints.none(len(years)), *zones])
    return found.grouped(_across_zones(found))


# --- one zone ---------------------------------------------------------------------------------------------------


def _zone(store: Store, group: str, period: Period, limit: int, years: list[int]) -> _Footprints:
    """Footprints of one zone, whole across its super-tiles."""
    parts, pairs, beside = [_Footprints.none(len(years))], [np.zeros((0, 2), np.int64)], [np.zeros(0, np.int64)]
    start = 0
    seams = _Seams()
    for tile in store.done(group, period):
        percent, first = _read(store, tile, period, limit, years)
        labels, found = _outlined(tile, percent, first, limit, len(years))
        labels[labels > 0] += start  # numbers that hold for the whole zone, from 1; -1 not observed
        start += len(found.geometry)
        parts.append(found)
        met, edge = seams.add(tile, labels)
        pairs.append(met)
        beside.append(edge)
    beside.append(seams.rest())
    whole = _Footprints.joined(parts)
    whole.open[np.concatenate(beside) - 1] = True
    return whole.grouped(np.concatenate(pairs) - 1)


def _read(store: Store, tile: Grid, until: Period, limit: int, years: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Per cent of `until`, and of each mine pixel the index in `years` of the first one it was mined in."""
    earlier = [p for p in store.periods(tile.group) if p.start <= until.start and p != until and len(years) > 1]
    earlier.sort(key=str, reverse=True)
    percent, *before = read_periods(store, tile, [until, *earlier])
    first = np.full(percent.shape, len(years) - 1, np.int16)
    for period, values in zip(earlier, before, strict=True):
        first[(values >= limit) & (values != NOT_OBSERVED)] = years.index(period.start.year)
    return percent, first


def _outlined(
    tile: Grid, percent: np.ndarray, first: np.ndarray, limit: int, years: int
) -> tuple[np.ndarray, _Footprints]:
    """Labels int32 (y, x), 0 no mine, -1 not observed, and what is within this super-tile of each footprint."""
    from rasterio.features import shapes
    from scipy import ndimage

    seen = percent != NOT_OBSERVED
    mine = seen & (percent >= limit)
    labels, number = ndimage.label(mine)  # ndimage's default structure: pixels that share an edge
    geometry = np.zeros(number, object)
    for outline, value in shapes(labels, mask=mine, connectivity=4, transform=tile.transform):
        geometry[int(value) - 1] = shapely.geometry.shape(outline)
    of_mine = labels[mine]
    unseen = ~seen & tile.owned()  # what another zone owns is not unseen
    beside = labels[mine & ndimage.binary_dilation(unseen)]
    by_year = np.bincount((of_mine - 1) * years + first[mine], minlength=number * years)
    found = _Footprints(
        geometry,
        np.full(number, tile.epsg, np.int64),
        np.full(number, tile.resolution),
        np.bincount(of_mine, minlength=number + 1)[1:],
        np.bincount(of_mine, percent[mine], minlength=number + 1)[1:],
        np.bincount(beside, minlength=number + 1)[1:] > 0,
        by_year.reshape(number, years),
    )
    labels[unseen] = -1
    return labels, found


class _Seams:
    """Borders of super-tiles whose neighbour has not come yet: labels of one side, int (chunk,)."""

    def __init__(self) -> None:
        self.waiting: dict[tuple[int, int, str], np.ndarray] = {}

    def add(self, tile: Grid, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pairs of labels that meet at borders of this super-tile (n, 2), and labels beside what was not observed."""
        left, bottom, right, top = (round(n) for n in tile.bounds)
        own = tile.buffered(1).owned()  # what lies beyond the zone's edge is the other zone's to tell
        sides = [
            ((left, top, "row"), labels[0], own[0, 1:-1]),
            ((left, bottom, "row"), labels[-1], own[-1, 1:-1]),
            ((left, top, "column"), labels[:, 0], own[1:-1, 0]),
            ((right, top, "column"), labels[:, -1], own[1:-1, -1]),
        ]
        pairs, beside = [np.zeros((0, 2), np.int64)], [np.zeros(0, np.int64)]
        for place, border, beyond in sides:
            other = self.waiting.pop(place, None)
            if other is None:
                self.waiting[place] = border * beyond
                continue
            both = (border > 0) & (other > 0)
            pairs.append(np.unique(np.stack([border[both], other[both]], axis=1), axis=0).astype(np.int64))
            beside += [border[(border > 0) & (other < 0)], other[(other > 0) & (border < 0)]]
        return np.concatenate(pairs), np.concatenate(beside)

    def rest(self) -> np.ndarray:
        """Labels at borders beyond which nothing was mapped."""
        return np.concatenate([np.zeros(0, np.int64), *(b[b > 0] for b in self.waiting.values())])


# --- between zones ----------------------------------------------------------------------------------------------


def _across_zones(found: _Footprints) -> np.ndarray:
    """Pairs of indices of footprints in two zones that meet at the zones' edge, int (n, 2)."""
    pairs = [np.zeros((0, 2), np.int64)]
    near = {epsg: _near_edge(found, epsg) for epsg in sorted(set(found.epsg.tolist()))}
    for one, other in combinations(near, 2):
        tree = shapely.STRtree(found.geometry[near[one]])
        projected = np.array([_projected(found.geometry[i], other, one) for i in near[other]], object)
        theirs, ours = tree.query(projected, predicate="dwithin", distance=found.side.max(initial=0.0))
        pairs.append(np.stack([near[one][ours], near[other][theirs]], axis=1))
    return np.concatenate(pairs)


def _near_edge(found: _Footprints, epsg: int) -> np.ndarray:
    """Indices of a zone's footprints that come within two pixels of its edge."""
    own = np.flatnonzero(found.epsg == epsg)
    if not own.size:
        return own
    edges = _zone_edges(shapely.box(*shapely.total_bounds(found.geometry[own])), epsg)
    return own[shapely.dwithin(found.geometry[own], edges, 2 * found.side[own])]


def _zone_edges(near: shapely.Geometry, epsg: int) -> shapely.Geometry:
    """Two meridians and the equator as far as they pass `near` (metres of the zone), in those metres."""
    west, south, east, north = _in_degrees(np.array([shapely.box(*near.bounds)]), np.array([epsg]))[0].bounds
    left, _, right, _ = zone_box(epsg)
    lines = [shapely.LineString([(lon, south - 1e-3), (lon, north + 1e-3)]) for lon in (left, right)]
    lines.append(shapely.LineString([(west - 1e-3, 0), (east + 1e-3, 0)]))
    to_metres = Transformer.from_crs(4326, epsg, always_xy=True).transform
    bent = shapely.segmentize(shapely.MultiLineString(lines), 0.01)
    return shapely.transform(bent, lambda points: np.stack(to_metres(*points.T), axis=1))


def _projected(shape: shapely.Geometry, source: int, target: int) -> shapely.Geometry:
    if source == target:
        return shape
    convert = Transformer.from_crs(source, target, always_xy=True).transform
    return shapely.transform(shape, lambda points: np.stack(convert(*points.T), axis=1))


# --- measuring and drawing --------------------------------------------------------------------------------------


def _in_degrees(shapes: np.ndarray, epsg: np.ndarray) -> np.ndarray:
    """Polygons in degrees, exteriors anticlockwise; longitudes go on past ±180 at the antimeridian."""
    out = shapely.orient_polygons(shapely.segmentize(shapes, LONGEST))
    for zone in np.unique(epsg):
        own = epsg == zone
        out[own] = shapely.transform(
            out[own], lambda points, zone=int(zone): np.stack(continuous_lonlat(zone, *points.T), axis=1)
        )
    return out


def _areas(shapes: np.ndarray, epsg: np.ndarray) -> np.ndarray:
    """km² on the ellipsoid, float64 (n,)."""
    return geodesic_km2(_in_degrees(shapes, epsg))


def geodesic_km2(shapes: np.ndarray) -> np.ndarray:
    """Area of polygons in degrees on the WGS 84 ellipsoid, edges geodesics (Karney 2013), km², float64 (n,)."""
    oriented = shapely.orient_polygons(np.asarray(shapes, object))
    return np.array([GEOD.geometry_area_perimeter(shape)[0] / 1e6 for shape in oriented], float)


def within_180(shapes: np.ndarray) -> np.ndarray:
    """Polygons (degrees) whose longitudes go on past ±180 in parts that do not, as RFC 7946 asks."""
    from shapely.affinity import translate

    out = shapes.copy()
    west, _, east, _ = shapely.bounds(shapes).T
    for i in np.flatnonzero((west < -180) | (east > 180)):
        worlds = ((w, shapely.box(w, -90, w + 360, 90)) for w in (-540, -180, 180))
        parts = [p for w, box in worlds for p in shapely.get_parts(translate(shapes[i] & box, -180 - w))]
        out[i] = shapely.orient_polygons(shapely.MultiPolygon([p for p in parts if p.geom_type == "Polygon"]))
    return out


def _first_year(by_year: np.ndarray, years: list[int]) -> np.ndarray:
    """by_year: pixels by the first year they were mined in, (n, years); int64 (n,)."""
    reached = by_year.cumsum(axis=1) >= FIRST_SHARE * by_year.sum(axis=1, keepdims=True)
    return np.asarray(years)[reached.argmax(axis=1)]


def _smoothed(shape: shapely.Geometry, side: float) -> shapely.Geometry:
    """Corners cut by half a pixel, and the new ones by a quarter of their edges (Chaikin 1974).

    Steps of one pixel of `side` metres become straight lines. The first cut takes an eighth of a pixel off a corner
    or adds as much, and a ring has four more corners of the one kind than of the other: every outline loses half a
    pixel (50 m² at 10 m) whatever its size, and so does every hole; the second cut changes little. Cuts never cross:
    polygons that were apart stay apart.
    """
    rings = shapely.get_parts(shape)
    out = []
    for polygon in rings:
        exterior, *holes = (_rounded(np.asarray(r.coords), side) for r in (polygon.exterior, *polygon.interiors))
        out.append(shapely.Polygon(exterior, holes))
    return out[0] if len(out) == 1 else shapely.MultiPolygon(out)


def _rounded(ring: np.ndarray, side: float) -> np.ndarray:
    once = shapely.LinearRing(_cut_corners(ring, 0.5, side / 2)).simplify(0.01)
    return _cut_corners(np.asarray(once.coords), 0.25, side / 4)


def _cut_corners(ring: np.ndarray, share: float, most: float) -> np.ndarray:
    """Each vertex replaced by a point on either side: `share` of the edge away, `most` metres at most."""
    start, end = ring[:-1], ring[1:]
    edge = end - start
    length = np.hypot(*edge.T)[:, None]
    step = edge * np.minimum(share, most / length)
    return np.stack([start + step, end - step], axis=1).reshape(-1, 2)
