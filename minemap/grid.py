"""Where pixels are: one frozen Grid per UTM zone, its super-tiles, and which zone owns a pixel.

Every zone has one fixed lattice: pixel edges at multiples of the resolution, 256-px squares at multiples of
256 px, super-tiles at multiples of their size, scene cells at multiples of 2048 px, all counted from easting 0
and northing 0 of the zone. A Grid is a piece of that lattice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
from affine import Affine
from pyproj import CRS, Proj, Transformer

from .errors import InputError
from .sentinel2 import RESOLUTION

WINDOW = 256  # px, side of a square: the spacing of the network's windows, and the inner chunk of the store
CHUNK = 2048  # px, side of a super-tile and of a shard
CHUNKS = (512, 1024, 2048)
CELL = 20_480  # metres, side of the cell for which scenes are chosen, on the lattice of 10 m
MAX_LATITUDE = 84.0
SAG = 1e-3  # degrees; the edges of a super-tile bend less than that between five points, a window's between two

DEGREE = 110_500.0  # metres, of latitude at least

BBox = tuple[float, float, float, float]  # west, south, east, north
Windows = tuple[int, int, int, int]  # first row, end row, first column, end column


@dataclass(frozen=True)
class Grid:
    """A rectangle of one zone's lattice. Rows run south, columns east; north is up.

    epsg: 326zz or 327zz. left, top: metres, outer edges of the first pixel. height, width: pixels.
    resolution: metres per pixel.
    """

    epsg: int
    left: float
    top: float
    height: int
    width: int
    resolution: float = RESOLUTION

    @property
    def shape(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def group(self) -> str:
        """Name of the zone's group in the store."""
        return f"utm{self.epsg}"

    @property
    def transform(self) -> Affine:
        return Affine(self.resolution, 0.0, self.left, 0.0, -self.resolution, self.top)

    @property
    def bounds(self) -> BBox:
        """left, bottom, right, top in metres."""
        right = self.left + self.width * self.resolution
        return self.left, self.top - self.height * self.resolution, right, self.top

    @cached_property
    def x(self) -> np.ndarray:
        """Pixel centres, metres, ascending, float64 (width,)."""
        return self.left + (np.arange(self.width) + 0.5) * self.resolution

    @cached_property
    def y(self) -> np.ndarray:
        """Pixel centres, metres, descending, float64 (height,)."""
        return self.top - (np.arange(self.height) + 0.5) * self.resolution

    @property
    def lonlat_bounds(self) -> BBox:
        """West, south, east, north in degrees; west > east where it crosses the antimeridian."""
        return _to_lonlat(self.epsg).transform_bounds(*self.bounds, densify_pts=21)

    def buffered(self, pixels: int) -> Grid:
        """The same place with `pixels` more on every side."""
        return replace(
            self,
            left=self.left - pixels * self.resolution,
            top=self.top + pixels * self.resolution,
            height=self.height + 2 * pixels,
            width=self.width + 2 * pixels,
        )

    def window(self, row: int, column: int, height: int, width: int) -> Grid:
        """The part that starts at (row, column)."""
        left = self.left + column * self.resolution
        return replace(self, left=left, top=self.top - row * self.resolution, height=height, width=width)

    def offset_in(self, outer: Grid) -> tuple[int, int]:
        """(row, column) of this grid's first pixel in `outer`, which has the same zone and resolution."""
        row = round((outer.top - self.top) / self.resolution)
        return row, round((self.left - outer.left) / self.resolution)

    def covers(self, other: Grid) -> bool:
        """Whether every pixel of `other` is one of ours."""
        row, column = other.offset_in(self)
        fits = row + other.height <= self.height and column + other.width <= self.width
        return self.epsg == other.epsg and row >= 0 and column >= 0 and fits

    def tiles(self, chunk: int) -> Iterator[Grid]:
        """The super-tiles of `chunk` px, row by row from the north-west. The grid must be padded to them."""
        for row in range(0, self.height, chunk):
            for column in range(0, self.width, chunk):
                yield self.window(row, column, chunk, chunk)

    @property
    def cell(self) -> tuple[int, int]:
        """(column, row) of the cell that holds the first pixel, counted from easting 0, northing 0."""
        half, side = self.resolution / 2, cell_side(self.resolution)
        return math.floor((self.left + half) / side), math.floor((self.top - half) / side)

    def owned(self) -> np.ndarray:
        """Which pixels are this zone's own, bool (y, x): centre within its 6 degrees and its hemisphere.

        Each place on Earth is owned by one zone, so maps of several zones have no gap and no doubling. The
        exceptions of UTM around Norway and Svalbard are not followed: a zone is 6 degrees everywhere.
        """
        return self._within([zone_box(self.epsg)])

    def inside(self, bbox: BBox) -> np.ndarray:
        """Which owned pixels have their centre in `bbox` (west > east crosses the antimeridian), bool (y, x)."""
        return self._within(_parts_in(self.epsg, bbox))

    def _within(self, boxes: list[BBox]) -> np.ndarray:
        """Pixel centres within any of `boxes`, half-open, degrees; bool (y, x).

        Quarter by quarter: a part that a coarse lattice of points shows wholly inside or outside is done, and only
        in the smallest parts on an edge is every pixel projected.
        """
        mask = np.zeros(self.shape, bool)
        parts = [(slice(0, self.height), slice(0, self.width), box) for box in boxes]
        while parts:
            rows, columns, box = parts.pop()
            y, x = self.y[rows], self.x[columns]
            mesh = self._degrees(np.linspace(y[0], y[-1], 5), np.linspace(x[0], x[-1], 5))
            lattice = mesh[0].ravel(), mesh[1].ravel()
            if not _may_meet(lattice, box):
                continue
            if _in_box(lattice, box, margin=-SAG).all():
                mask[rows, columns] = True
            elif max(len(y), len(x)) <= WINDOW:
                mask[rows, columns] |= _in_box(self._degrees(y, x), box)
            else:
                parts += [(r, c, box) for r in _halved(rows) for c in _halved(columns)]
        return mask

    def _rim_meets(self, box: BBox) -> bool:
        """Whether the centre of a pixel of the first or last row or column lies in `box`."""
        y, x = self.y, self.x
        rims = ((y, x[[0, -1]]), (y[[0, -1]], x))
        return any(bool(_in_box(self._degrees(*rim), box).any()) for rim in rims)

    def _degrees(self, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return continuous_lonlat(self.epsg, *np.meshgrid(x, y))


def cell_side(resolution: float) -> float:
    """Metres: a cell is as large as the largest super-tile, 2048 px, so that no super-tile lies in two cells."""
    return CELL * resolution / RESOLUTION


def cell_grid(epsg: int, cell: tuple[int, int], resolution: float = RESOLUTION) -> Grid:
    """The cell (column, row) as a Grid."""
    side = cell_side(resolution)
    return Grid(epsg, cell[0] * side, (cell[1] + 1) * side, CHUNK, CHUNK, resolution)


def check_bbox(numbers: tuple[float, ...] | list[float]) -> BBox:
    """Four finite degrees W S E N, or an InputError that says which is wrong."""
    if len(numbers) != 4:
        raise InputError(f"bbox needs 4 numbers (west south east north), got {len(numbers)}")
    try:
        west, south, east, north = (float(n) for n in numbers)
    except (TypeError, ValueError) as error:
        raise InputError(f"bbox {numbers} is not four numbers: west south east north in degrees") from error
    if not all(map(math.isfinite, (west, south, east, north))):
        raise InputError(f"bbox has a number that is not finite: {west} {south} {east} {north}")
    for name, value, limit in (
        ("west", west, 180),
        ("east", east, 180),
        ("south", south, 90),
        ("north", north, 90),
    ):
        if abs(value) > limit:
            raise InputError(f"bbox {name} is {value}, outside -{limit}…{limit} degrees")
    if south > north:
        raise InputError(f"bbox south {south} lies north of {north}: the order is west south east north")
    if south == north or west == east:
        raise InputError(f"bbox {west} {south} {east} {north} has no area")
    if west > east and west - east < 180:  # the other way round would be most of the Earth
        raise InputError(f"bbox west {west} lies east of {east}: the order is west south east north")
    if max(abs(south), abs(north)) > MAX_LATITUDE:
        raise InputError(f"bbox reaches {south}…{north} degrees latitude; UTM maps end at ±{MAX_LATITUDE:g}")
    return west, south, east, north


def grids(bbox: BBox, chunk: int = CHUNK, *, extent: str = "bbox", resolution: float = RESOLUTION) -> list[Grid]:
    """One Grid per UTM zone and hemisphere that `bbox` meets, padded to whole super-tiles.

    extent "zone" gives the whole zone's lattice instead, into which many runs can merge.
    """
    found = []
    for epsg, part in _zone_parts(bbox):
        box = part if extent == "bbox" else zone_box(epsg)
        found.append(_padded(epsg, box, chunk * resolution, chunk, resolution))
    return found


def wanted_tiles(grid: Grid, chunk: int, bbox: BBox) -> Iterator[tuple[Grid, Windows]]:
    """The super-tiles of `chunk` px that hold pixels of `bbox`, each with its windows that do.

    Windows: first row, end row, first column, end column, in 256-px squares of the super-tile. They are called
    windows here, in Work and in the ledger; those of the network are centred on their corners (tiles.Layout). Only
    owned pixels count. The grid must be padded to super-tiles.
    """
    side = chunk // WINDOW
    for row in range(0, grid.height, chunk):
        strip = grid.window(row, 0, chunk, grid.width)
        wanted = _wanted_windows(strip, _parts_in(grid.epsg, bbox))
        for first in range(0, wanted.shape[1], side):
            own = wanted[:, first : first + side]
            if own.any():
                rows, columns = np.flatnonzero(own.any(axis=1)), np.flatnonzero(own.any(axis=0))
                windows = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
                yield strip.window(0, first * WINDOW, chunk, chunk), windows


def _wanted_windows(strip: Grid, boxes: list[BBox]) -> np.ndarray:
    """Which windows hold a pixel of `boxes`, bool (row, column).

    One with a corner pixel in a box does; others are looked at only where a box may reach between their corners.
    """
    shape = strip.height // WINDOW, strip.width // WINDOW
    y, x = (_ends(centres) for centres in (strip.y, strip.x))
    lon, lat = (_by_window(degrees, shape) for degrees in strip._degrees(y, x))
    wanted = np.zeros(shape, bool)
    for box in boxes:
        inside = np.asarray(_in_box((lon, lat), box).any(axis=-1))
        for row, column in np.argwhere(~inside & ~wanted & _may_meet((lon, lat), box)):
            window = strip.window(row * WINDOW, column * WINDOW, WINDOW, WINDOW)
            inside[row, column] = window._rim_meets(box) if _is_large(box, strip) else window._within([box]).any()
        wanted |= inside
    return wanted


def _is_large(box: BBox, grid: Grid) -> bool:
    """Whether a box is at least three windows wide and high, so that it can't reach into one without its rim.

    From a pixel of such a box, one of the four diagonals stays in the box for as many steps as a window has: the one
    towards its far corner. UTM turns a box by 3 degrees at most, which is far from the 45 that this would take.
    """
    west, south, east, north = box
    least = 3 * WINDOW * grid.resolution / DEGREE
    return north - south >= least and (east - west) * math.cos(math.radians(max(abs(south), abs(north)))) >= least


def _ends(centres: np.ndarray) -> np.ndarray:
    """The first and the last pixel of every window along an axis."""
    return centres.reshape(-1, WINDOW)[:, [0, -1]].ravel()


def _by_window(corners: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Values at the corner pixels of all windows, (2 rows, 2 columns), as (rows, columns, 4)."""
    return corners.reshape(shape[0], 2, shape[1], 2).swapaxes(1, 2).reshape(*shape, 4)


def pixel_area_km2(grid: Grid) -> np.ndarray:
    """Area on the WGS 84 ellipsoid of each pixel, km², float64 (y, x).

    The projection's areal scale varies by a tenth of a per cent over a zone, and smoothly: it is computed on a
    coarse lattice and interpolated (error below 1e-9).
    """
    from scipy.interpolate import RectBivariateSpline  # slow to import, and a plan does without

    y, x = np.linspace(*grid.bounds[3:0:-2], 9), np.linspace(*grid.bounds[0:3:2], 9)
    lon, lat = _to_lonlat(grid.epsg).transform(*np.meshgrid(x, y))
    areal = np.asarray(Proj(grid.epsg).get_factors(lon, lat).areal_scale)
    scale = RectBivariateSpline(-y, x, areal)(-grid.y, grid.x)
    return grid.resolution**2 / 1e6 / scale


def zone_epsg(lon: float, lat: float) -> int:
    """EPSG code of the UTM zone that owns a place."""
    zone = math.floor((lon + 180) / 6) % 60 + 1
    return (32600 if lat >= 0 else 32700) + zone


def _zone_parts(bbox: BBox) -> Iterator[tuple[int, BBox]]:
    """(EPSG code, the part of `bbox` it owns) from west to east, north before south."""
    west, south, east, north = bbox
    spans = [(west, east)] if west < east else [(west, 180.0), (-180.0, east)]
    for lower, upper in spans:
        for zone in range(math.floor((lower + 180) / 6), math.ceil((upper + 180) / 6)):
            left, right = max(lower, zone * 6 - 180.0), min(upper, zone * 6 - 174.0)
            if left >= right:
                continue
            if north > 0:
                yield 32601 + zone, (left, max(south, 0.0), right, north)
            if south < 0:
                yield 32701 + zone, (left, south, right, min(north, 0.0))


def zone_box(epsg: int) -> BBox:
    """What a zone owns, degrees: 6 of longitude, its hemisphere."""
    west = (epsg % 100) * 6 - 186.0
    return (west, 0.0, west + 6, MAX_LATITUDE) if epsg < 32700 else (west, -MAX_LATITUDE, west + 6, 0.0)


def _parts_in(epsg: int, bbox: BBox) -> list[BBox]:
    return [part for code, part in _zone_parts(bbox) if code == epsg]


def _halved(part: slice) -> list[slice]:
    middle = (part.start + part.stop + 1) // 2
    return [s for s in (slice(part.start, middle), slice(middle, part.stop)) if s.start < s.stop]


def _may_meet(lattice: tuple[np.ndarray, np.ndarray], box: BBox) -> np.ndarray:
    """Whether the areas that points (longitudes, latitudes), in the last axis, span can meet `box`; bool (...)."""
    (lon, lat), (west, south, east, north) = lattice, box
    across = (lon.max(axis=-1) >= west - SAG) & (lon.min(axis=-1) <= east + SAG)
    return across & (lat.max(axis=-1) >= south - SAG) & (lat.min(axis=-1) <= north + SAG)


def _in_box(points: tuple[np.ndarray, np.ndarray], box: BBox, margin: float = 0.0) -> np.ndarray:
    """Which points (longitudes, latitudes) lie in `box` grown by `margin` degrees, bool."""
    (lon, lat), (west, south, east, north) = points, box
    across = (lon >= west - margin) & (lon < east + margin)
    return across & (lat >= south - margin) & (lat < north + margin)


def _padded(epsg: int, box: BBox, side: float, chunk: int, resolution: float) -> Grid:
    left, bottom, right, top = _from_lonlat(epsg).transform_bounds(*box, densify_pts=21)
    west, south, east, north = box
    middle = (epsg % 100) * 6 - 183.0
    if west < middle < east:  # where a parallel lies farthest south or north, between the points of that outline
        _, (lowest, highest) = _from_lonlat(epsg).transform([middle] * 2, [south, north])
        bottom, top = min(bottom, lowest), max(top, highest)
    tiny = resolution * 1e-6  # a box made from a grid's own edges must not gain a row from rounding
    first, last = math.floor((left + tiny) / side), math.ceil((right - tiny) / side)
    lower, upper = math.floor((bottom + tiny) / side), math.ceil((top - tiny) / side)
    return Grid(epsg, first * side, upper * side, (upper - lower) * chunk, (last - first) * chunk, resolution)


def continuous_lonlat(epsg: int, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Degrees of points of a zone; longitudes within 180 of its middle, so past ±180 at the antimeridian."""
    lon, lat = _to_lonlat(epsg).transform(x, y)
    middle = (epsg % 100) * 6 - 183.0
    return (lon - middle + 180) % 360 - 180 + middle, lat


@lru_cache(maxsize=240)
def _to_lonlat(epsg: int) -> Transformer:
    return Transformer.from_crs(epsg, 4326, always_xy=True)


@lru_cache(maxsize=240)
def _from_lonlat(epsg: int) -> Transformer:
    return Transformer.from_crs(4326, epsg, always_xy=True)


@lru_cache(maxsize=240)
def crs_wkt(epsg: int) -> str:
    """WKT 2 of the zone's CRS, or of any EPSG code."""
    return CRS.from_epsg(epsg).to_wkt()
