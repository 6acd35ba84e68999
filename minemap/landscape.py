"""A synthetic landscape with mines that grow: the ground of the demo scene, of its truth and its weights.

Strategy: what never changes (forest, savanna, soil, water, roads, towns) is a stack of covers, painted one
over the other and kept as fractions per pixel; a date's ground is those fractions times the spectra of that
day. Fields change with the season and the year through one row of a table per parcel. Mines are lobes
(pit, waste, tailings, pond, road) whose outline at a given year follows from a fixed level surface and a
radius that only grows, so the truth is exact and never shrinks.

All arrays are (y, x) with y downwards, in pixels of 10 m; spectra are surface reflectance in the order of
`sentinel2.BANDS`.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, sparse

Array = NDArray[np.float32]
Shape = tuple[int, int]
Point = tuple[float, float]  # (y, x), pixels
Layers = list[tuple[str, Array]]  # name of a cover and its opacity (y, x), in the order of painting

SPECTRA: dict[str, tuple[float, ...]] = {
    #               blue  green   red    nir  swir16 swir22
    "forest":      (0.022, 0.044, 0.024, 0.330, 0.150, 0.062),
    "woodland":    (0.030, 0.056, 0.042, 0.270, 0.180, 0.092),
    "grass":       (0.042, 0.074, 0.062, 0.290, 0.225, 0.125),
    "straw":       (0.066, 0.098, 0.128, 0.245, 0.305, 0.215),
    "laterite":    (0.058, 0.088, 0.160, 0.240, 0.320, 0.270),
    "sandy":       (0.125, 0.170, 0.225, 0.290, 0.375, 0.325),
    "bar":         (0.165, 0.210, 0.255, 0.300, 0.350, 0.310),
    "outcrop":     (0.095, 0.112, 0.132, 0.178, 0.235, 0.215),
    "clear":       (0.046, 0.044, 0.026, 0.012, 0.005, 0.003),
    "turbid":      (0.058, 0.088, 0.098, 0.050, 0.012, 0.008),
    "roof":        (0.150, 0.172, 0.198, 0.235, 0.262, 0.240),
    "track":       (0.105, 0.138, 0.200, 0.265, 0.335, 0.290),
    "field":       (0.0, 0.0, 0.0, 0.0, 0.0, 0.0),  # from the parcel's own row, see `_parcels`
    # From here on only parcels and mines, no covers.
    "crop":        (0.028, 0.066, 0.036, 0.440, 0.195, 0.095),
    "rock":        (0.082, 0.098, 0.114, 0.142, 0.178, 0.168),
    "waste":       (0.118, 0.142, 0.172, 0.208, 0.252, 0.232),
    "tailings":    (0.300, 0.345, 0.382, 0.410, 0.405, 0.355),
    "slurry":      (0.150, 0.178, 0.196, 0.190, 0.150, 0.110),
    "turquoise":   (0.098, 0.150, 0.112, 0.048, 0.010, 0.006),
    "milky":       (0.092, 0.140, 0.172, 0.098, 0.020, 0.012),
    "murky":       (0.048, 0.066, 0.062, 0.036, 0.010, 0.007),
}  # fmt: skip
COVERS = tuple(SPECTRA)[: tuple(SPECTRA).index("field") + 1]
TABLE = np.array(list(SPECTRA.values()), np.float32)
PARCELS = 4096  # rows of the parcel table
STRIP = 256  # rows handled at once, so that memory follows the strip and not the scene


def spectrum(name: str) -> Array:
    return TABLE[list(SPECTRA).index(name)]


def _point(pair: NDArray[Any]) -> Point:
    return float(pair[0]), float(pair[1])


def stream(seed: int, *words: object) -> np.random.Generator:
    """A generator of its own for each use, so that one more feature does not move the others."""
    return np.random.default_rng([seed, *(zlib.crc32(str(word).encode()) for word in words)])


# ---------------------------------------------------------------------------------------------- noise
def _spline(n: int, scale: float) -> sparse.csr_array:
    """Cubic B-spline weights from a lattice of spacing `scale` to n pixels, (n, lattice)."""
    position = np.arange(n) / scale
    cell, t = position.astype(int), (position % 1).astype(np.float32)
    weights = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], 1) / 6
    rows, columns = np.repeat(np.arange(n), 4), (cell[:, None] + np.arange(4)).ravel()
    return sparse.csr_array((weights.ravel().astype(np.float32), (rows, columns)), (n, int(cell[-1]) + 4))


def noise(rng: np.random.Generator, shape: Shape, scale: float) -> Array:
    """Smooth noise with features of about `scale` pixels, mean 0."""
    down, across = _spline(shape[0], scale), _spline(shape[1], scale)
    lattice = rng.standard_normal((down.shape[1], across.shape[1]), np.float32)
    return np.ascontiguousarray((across @ (down @ lattice).T).T)


def fbm(rng: np.random.Generator, shape: Shape, scale: float, octaves: int = 5, *, gain: float = 0.55) -> Array:
    """Fractal noise: octaves of `noise`, scaled to mean 0 and standard deviation 1."""
    total = noise(rng, shape, scale)
    for i in range(1, octaves):
        total += np.float32(gain**i) * noise(rng, shape, max(scale / 2**i, 1.5))
    total -= total.mean()
    return total / max(float(total.std()), 1e-6)


def ramp(value: Array, low: float, high: float) -> Array:
    """0 below `low`, 1 above `high` (or the reverse when low > high), smooth between."""
    t = np.clip((value - np.float32(low)) / np.float32(high - low), 0, 1)
    return t * t * (3 - 2 * t)


def mix(first: str, second: str, share: Array) -> Array:
    """Spectra (n, 6) between two materials; `share` (n,) of the second."""
    share = np.clip(share, 0, 1)[:, None]
    return spectrum(first) * (1 - share) + spectrum(second) * share


# ---------------------------------------------------------------------------------------------- lines
class Lines(NamedTuple):
    """Polylines drawn into the scene: what the nearest point of each pixel knows."""

    distance: Array  # pixels to the nearest centreline
    width: Array  # half width there, pixels
    bend: Array  # curvature there, 1/pixels, positive where the pixel lies on the inner side


def _meander(rng: np.random.Generator, length: float) -> Array:
    """A sine-generated curve along x from 0 to `length`: (points, 2) of (x, y), one pixel apart."""
    wavelength = rng.uniform(150, 210)
    s = np.arange(int(2.2 * length + 4 * wavelength))
    wander = noise(rng, (s.size, 1), 3 * wavelength)[:, 0]
    phase = np.cumsum(2 * np.pi / wavelength * (1 + 0.4 * np.clip(wander, -0.8, 0.8))) + rng.uniform(0, 6)
    sweep = np.clip(1.3 + 0.7 * np.roll(wander, 50), 0.5, 1.75)
    heading = sweep * np.sin(phase) + 0.25 * np.sin(2 * phase + 1) + 0.7 * np.roll(wander, 300)
    points = np.stack([np.cumsum(np.cos(heading)), np.cumsum(np.sin(heading))], 1)
    return (points[points[:, 0] < length]).astype(np.float32)


def _breadth(rng: np.random.Generator, n: int) -> Array:
    """How a channel widens and narrows along its points, (n,), around 1."""
    return (1 + np.float32(0.22) * noise(rng, (n, 1), 60)[:, 0]).clip(0.7)


def draw(paths: list[Array], widths: list[Array], shape: Shape) -> Lines:
    """Distance, half width and side of the bend for every pixel, from paths of (x, y) points."""
    points = np.concatenate(paths)
    step = np.concatenate([np.gradient(path, axis=0) for path in paths])
    turn = np.concatenate([_curvature(path) for path in paths])
    width = np.concatenate(widths)
    at = np.round(points[:, ::-1]).astype(int)
    inside = ((at >= 0) & (at < shape)).all(1)
    which = np.full(shape, -1, np.int32)
    which[tuple(at[inside].T)] = np.flatnonzero(inside)
    if not inside.any():
        far = np.full(shape, 1e4, np.float32)
        return Lines(far, np.zeros_like(far), np.zeros_like(far))
    distance, index = ndimage.distance_transform_edt(which < 0, return_indices=True)
    nearest = which[index[0], index[1]]
    dy, dx = (np.arange(n, dtype=np.float32) for n in shape)
    off_x, off_y = dx - points[nearest, 0], dy[:, None] - points[nearest, 1]
    side = np.sign(step[nearest, 0] * off_y - step[nearest, 1] * off_x)
    return Lines(distance.astype(np.float32), width[nearest], (side * turn[nearest]).astype(np.float32))


def _curvature(path: Array) -> Array:
    """Signed curvature along a path of points about one pixel apart, 1/pixels, smoothed."""
    dx, dy = np.gradient(path, axis=0).T
    heading = np.unwrap(np.arctan2(dy, dx))
    return ndimage.uniform_filter1d(np.gradient(heading), 15).astype(np.float32)


def _rivers(seed: int, shape: Shape) -> Lines:
    """One meandering river for every 12 km across, and a few cut-off bends (oxbows) beside them."""
    rng = stream(seed, "river")
    upright = bool(rng.random() < 0.5) if max(shape) < 2 * min(shape) else shape[0] > shape[1]
    along, across = shape if upright else shape[::-1]
    n = max(1, round(across / 1200))
    starts = [across * (i + rng.uniform(0.3, 0.7)) / n for i in range(n)]
    paths = [_meander(rng, along) + np.array([0, start], np.float32) for start in starts]
    widths = [np.float32(rng.uniform(4.5, 6.5)) * _breadth(rng, len(path)) for path in paths]
    for i in range(max(1, round(along * across / 5e5))):
        middle = paths[i % n][rng.integers(len(paths[i % n]))] + rng.uniform(-45, 45, 2)
        angle = np.arange(0, 4.2, 0.04) + rng.uniform(0, 6)
        ring = rng.uniform(13, 20) * np.stack([np.cos(angle), 0.8 * np.sin(angle)], 1)
        paths.append((middle + ring).astype(np.float32))
        widths.append(np.full(len(ring), 2.6, np.float32))
    return draw([path[:, ::-1] if upright else path for path in paths], widths, shape)


def _road(rng: np.random.Generator, start: NDArray[Any], end: NDArray[Any]) -> Array:
    """A gently winding road between two (y, x) points, as (x, y) points half a pixel apart."""
    n = max(int(2 * np.hypot(*(end - start))), 8)
    t = np.linspace(0, 1, n, dtype=np.float32)[:, None]
    normal = np.array([start[1] - end[1], end[0] - start[0]]) / n * 2
    sway = noise(rng, (n, 1), max(n / 5, 4)) * np.sin(np.pi * t) * 0.05 * n
    return (start + t * (end - start) + sway * normal)[:, ::-1].astype(np.float32)


# ---------------------------------------------------------------------------------------------- mines
@dataclass(frozen=True)
class Lobe:
    """One part of a mine: a warped strip around the segment `start`-`end` that widens by the year."""

    kind: str  # pit, waste, tailings, bare, pond, plant, road
    start: Point
    end: Point
    radius: float  # pixels, when fully grown
    opened: float  # year in which it begins
    span: float  # years from then until it is fully grown
    seed: int

    def reach(self, year: int) -> float:
        """Radius in a year, pixels: the area grows linearly; 0 before it opens."""
        return self.radius * float(np.sqrt(np.clip((year + 1 - self.opened) / self.span, 0, 1)))

    def level(self, shape: Shape) -> tuple[tuple[slice, slice], Array]:
        """A window of the scene and in it the warped distance to the segment, pixels.

        The lobe at a year is where the level is below `reach`.
        """
        return _level(self, shape)

    def _level(self, shape: Shape) -> tuple[tuple[slice, slice], Array]:
        top, left = (int(v) for v in np.floor(np.minimum(self.start, self.end) - 1.5 * self.radius - 2))
        bottom, right = (int(v) for v in np.ceil(np.maximum(self.start, self.end) + 1.5 * self.radius + 3))
        level = self._distance(np.arange(top, bottom), np.arange(left, right))
        rows, columns = (
            slice(*np.clip((top, bottom), 0, shape[0])),
            slice(*np.clip((left, right), 0, shape[1])),
        )
        inside = slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left)
        return (rows, columns), level[inside]

    def _distance(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> Array:
        y = (rows[:, None] - self.start[0]).astype(np.float32)
        x = (columns - self.start[1]).astype(np.float32)
        ey, ex = self.end[0] - self.start[0], self.end[1] - self.start[1]
        t = np.clip((y * ey + x * ex) / max(ey**2 + ex**2, 1e-6), 0, 1)
        distance = np.hypot(y - t * ey, x - t * ex)
        return distance if self.kind == "road" else distance * (1 + self._warp(distance.shape))

    def _warp(self, shape: Shape) -> Array:
        strength = {"plant": 0.05, "pond": 0.16, "tailings": 0.14}.get(self.kind, 0.24)
        rng = stream(self.seed, "warp")
        return strength * np.clip(fbm(rng, shape, max(0.7 * self.radius, 3), 3), -1.6, 1.6)


@lru_cache(maxsize=512)  # asked for once a year and by truth, surface and cloud mask alike
def _level(lobe: Lobe, shape: Shape) -> tuple[tuple[slice, slice], Array]:
    return lobe._level(shape)


def _pit_mine(rng: np.random.Generator, at: NDArray[Any], unit: float, opened: float) -> list[Lobe]:
    """A hard-rock mine: one or two pits, dumps, a tailings store with its ponds, plant and haul roads."""
    turn, lobes = rng.uniform(0, 2 * np.pi), []

    def add(kind: str, where: float, away: float, radius: float, late: float, stretch: float = 0.0) -> None:
        centre = at + unit * away * np.array([np.sin(turn + where), np.cos(turn + where)])
        half = unit * stretch * np.array([np.cos(turn + where), -np.sin(turn + where)])
        ends, opening = (_point(centre - half), _point(centre + half)), opened + late
        lobes.append(Lobe(kind, *ends, unit * radius, opening, 16.0, int(rng.integers(2**31))))

    add("waste", 2.3, 0.78, 0.42, 0, 0.25)
    add("waste", -0.9, 0.75, 0.36, 4, 0.15)
    add("pit", 0.0, 0.05, 0.50, 0, 0.18)
    add("pit", 0.4, 0.85, 0.27, 8, 0.10)
    add("tailings", -2.2, 0.98, 0.44, 0, 0.20)
    add("pond", -2.3, 1.08, 0.20, 1, 0.16)
    add("pond", 0.3, 0.02, 0.11, 5)
    add("pond", -1.6, 0.62, 0.09, 2, 0.07)
    add("plant", 1.3, 0.62, 0.10, -2, 0.10)
    hub = lobes[2]
    ends = (lobes[0], lobes[1], lobes[3], lobes[4], lobes[8])
    return [*(Lobe("road", hub.start, lobe.start, 1.7, lobe.opened, 0.5, 0) for lobe in ends), *lobes]


def _alluvial_mine(rng: np.random.Generator, at: NDArray[Any], unit: float, opened: float) -> list[Lobe]:
    """Workings along a valley: a spreading chain of stripped patches with small ponds in them."""
    lobes: list[Lobe] = []
    place, heading = at.astype(float), rng.uniform(0, 2 * np.pi)
    for i in range(int(rng.integers(9, 14))):
        heading += rng.normal(0, 0.5)
        ahead = 0.26 * unit * np.array([np.sin(heading), np.cos(heading)])
        ends = _point(place - 0.5 * ahead), _point(place + 0.5 * ahead)
        late, size = opened + 0.9 * i, unit * rng.uniform(0.16, 0.24)
        lobes.append(Lobe("bare", *ends, size, late, 9.0, int(rng.integers(2**31))))
        for _ in range(int(rng.integers(1, 4))):
            spot = place + rng.normal(0, 0.5 * size, 2)
            lobes.append(_pond(rng, spot, size * rng.uniform(0.25, 0.5), late + 0.3))
        place = at + 0.8 * (place - at) + ahead if i == 6 else place + ahead
    return sorted(lobes, key=lambda lobe: lobe.kind)


def _pond(rng: np.random.Generator, spot: NDArray[Any], radius: float, opened: float) -> Lobe:
    ends = _point(spot - rng.normal(0, 0.3 * radius, 2)), _point(spot + rng.normal(0, 0.3 * radius, 2))
    return Lobe("pond", *ends, radius, opened, 5.0, int(rng.integers(2**31)))


def _mines(seed: int, sites: list[Point], dry: NDArray[np.bool_], share: float) -> tuple[Lobe, ...]:
    """Lobes of all mines, sized so that they cover `share` of the scene in 2024. The first is an old pit."""

    def plan(unit: float) -> tuple[Lobe, ...]:
        lobes: list[Lobe] = []
        for i, site in enumerate(sites):
            rng = stream(seed, "mine", i)
            make = _pit_mine if i % 2 == 0 else _alluvial_mine
            lobes += make(rng, np.array(site), unit * rng.uniform(0.8, 1.2), rng.uniform(2009, 2016))
        return tuple(lobes)

    unit = float(np.sqrt(share * dry.size / len(sites)))
    for _ in range(3):
        unit *= float(np.clip(np.sqrt(share / max(footprint(plan(unit), dry, 2024).mean(), 1e-4)), 0.5, 2))
    return plan(unit)


def footprint(lobes: tuple[Lobe, ...], dry: NDArray[np.bool_], year: int) -> NDArray[np.bool_]:
    """Truth of a year, (y, x): True on the ground of a mine. Rivers, where `dry` is False, run on."""
    mine = np.zeros(dry.shape, bool)
    for lobe in lobes:
        if (reach := lobe.reach(year)) > 0:
            window, level = lobe.level(dry.shape)
            mine[window] |= level < reach
    return mine & dry


def _pit(level: Array, reach: float, texture: Array, rng: np.random.Generator) -> Array:
    """Benches: a dark face every five pixels inwards from the rim, red oxide above, grey rock below."""
    depth = reach - level
    face = np.where((depth + 0.8 * texture) % 5 < 1.7, 0.70, 1.0) * (1 - 0.3 * ramp(depth, 0, reach + 5))
    return mix("laterite", "rock", ramp(depth, 0, 14) * 0.75 + 0.12 * texture) * face[:, None]


def _waste(level: Array, reach: float, texture: Array, rng: np.random.Generator) -> Array:
    """End-tipped rock in terraces, partly weathered red."""
    terrace = np.where((level + texture) % 9 < 1.6, 0.82, 1.0) * (1 + 0.10 * rng.standard_normal(level.size))
    return mix("waste", "laterite", 0.35 + 0.28 * texture) * terrace[:, None].astype(np.float32)


def _tailings(level: Array, reach: float, texture: Array, rng: np.random.Generator) -> Array:
    """A smooth, very bright beach, greyer and wetter towards the middle, behind a dam of waste rock."""
    wet = 0.10 * texture + 0.45 * ramp(level, 0.75 * reach, 0.2 * reach) + 0.2 * ramp(texture, 0.8, 1.8)
    beach, dam = mix("tailings", "slurry", wet), ramp(reach - level, 3.5, 2.2)[:, None]
    return beach * (1 - dam) + dam * spectrum("waste")


def _bare(level: Array, reach: float, texture: Array, rng: np.random.Generator) -> Array:
    """Stripped alluvium: washed sand and red subsoil side by side."""
    rough = 1 + 0.09 * rng.standard_normal((level.size, 1), np.float32)
    return mix("laterite", "bar", 0.45 + 0.40 * texture) * rough


def _water(level: Array, reach: float, texture: Array, rng: np.random.Generator) -> Array:
    """A pond of one colour between turquoise, milky brown and murky, with a rim of mud."""
    colours = ("turquoise", "milky", "murky", "turquoise", "milky")
    first, second = rng.choice(colours, 2)
    water = mix(first, second, np.full(level.size, rng.random(), np.float32)) * (1 + 0.04 * texture)[:, None]
    rim = ramp(reach - level, 1.4, 0.2)[:, None]
    return water * (1 - rim) + spectrum("slurry") * rim


def _plant(level: Array, reach: float, texture: Array, rng: np.random.Generator) -> Array:
    return mix("track", "roof", texture) * (1 + 0.3 * rng.random((level.size, 1), np.float32))


def _haul(level: Array, reach: float, texture: Array, rng: np.random.Generator) -> Array:
    return mix("track", "waste", 0.4 + 0.2 * texture)


SURFACES = {
    "pit": _pit, "waste": _waste, "tailings": _tailings, "bare": _bare, "pond": _water, "plant": _plant,
    "road": _haul,
}  # fmt: skip


class Surface(NamedTuple):
    """The ground of all mines in one year: only the mined pixels, in row-major order."""

    where: NDArray[np.int64]  # (n,) into the flattened scene
    reflectance: Array  # (n, 6)


def mine_surface(lobes: tuple[Lobe, ...], dry: NDArray[np.bool_], year: int) -> Surface:
    """Paint the lobes of a year one over the other: roads under pits and ponds on top."""
    where = np.flatnonzero(footprint(lobes, dry, year))
    slot = np.full(dry.shape, -1, np.int32)
    slot.flat[where] = np.arange(where.size)
    reflectance = np.zeros((where.size, 6), np.float32)
    for lobe in sorted(lobes, key=lambda lobe: lobe.kind == "pond"):
        _paint(lobe, year, slot, reflectance)
    return Surface(where, reflectance)


def _paint(lobe: Lobe, year: int, slot: NDArray[np.int32], reflectance: Array) -> None:
    reach = lobe.reach(year)
    (window, level), rng = lobe.level(slot.shape), stream(lobe.seed, "paint")
    inside = (level < reach) & (slot[window] >= 0)
    if not inside.any():  # the lobe may lie outside the scene altogether
        return
    texture = fbm(rng, level.shape, 14, 4)[inside]
    reflectance[slot[window][inside]] = SURFACES[lobe.kind](level[inside], reach, texture, rng)


# ---------------------------------------------------------------------------------------------- the scene
@dataclass(frozen=True)
class Landscape:
    """Everything that stays the same over the years."""

    seed: int
    shape: Shape
    cover: NDArray[np.float16]  # (cover, y, x), fraction of each of COVERS, summing to 1
    shade: NDArray[np.float16]  # (y, x), slope and canopy, factor around 1
    parcel: NDArray[np.uint16]  # (y, x), row of the parcel table
    lobes: tuple[Lobe, ...]  # the mines
    dry: NDArray[np.bool_]  # (y, x), False in rivers

    def truth(self, year: int) -> NDArray[np.bool_]:
        """The mine footprint of a year, (y, x)."""
        return footprint(self.lobes, self.dry, year)

    def surface(self, year: int) -> Surface:
        return mine_surface(self.lobes, self.dry, year)

    def bright(self, year: int) -> NDArray[np.bool_]:
        """The heart of the first tailings store, (y, x): so bright that a cloud mask is mistaken about it."""
        lobe = next(lobe for lobe in self.lobes if lobe.kind == "tailings")
        mask = np.zeros(self.shape, bool)
        window, level = lobe.level(self.shape)
        mask[window] = level < 0.75 * lobe.reach(year)
        for pond in (other for other in self.lobes if other.kind == "pond" and other.reach(year) > 0):
            window, level = pond.level(self.shape)
            mask[window] &= level > pond.reach(year) + 2
        return mask


def _pick(rng: np.random.Generator, wish: Array, taken: list[Point], margin: int) -> Point:
    """The best of many random points: where `wish` (y, x) is high and the taken ones are far."""
    shape = np.array(wish.shape)
    points = rng.uniform(margin, np.maximum(shape - margin, margin + 1), (256, 2))
    scale = np.sqrt(shape.prod() / (len(taken) + 1))
    gap = np.min([np.hypot(*(points - p).T) for p in taken], 0) / scale if taken else np.ones(256)
    score = wish[tuple(points.astype(int).T)] + 3 * np.minimum(gap, 0.7)
    return _point(points[score.argmax()])


def _blobs(rng: np.random.Generator, shape: Shape, count: int, sizes: tuple[float, float]) -> Array:
    """Irregular patches anywhere in the scene, (y, x) in 0..1."""
    alpha = np.zeros(shape, np.float32)
    for _ in range(count):
        at, radius = rng.uniform(0, shape), float(rng.uniform(*sizes))
        ends = _point(at), _point(at + rng.normal(0, radius, 2))
        window, level = Lobe("bare", *ends, radius, 0, 1, int(rng.integers(2**31))).level(shape)
        alpha[window] = np.maximum(alpha[window], ramp(level, radius, radius - 2.5))
    return alpha


def _parcels(rng: np.random.Generator, shape: Shape) -> tuple[NDArray[np.uint16], Array]:
    """Rows of the parcel table, and the share of hedge or track between parcels, both (y, x)."""
    angle, bend = rng.uniform(0, np.pi), 14 * noise(rng, shape, 220)
    y, x = np.arange(shape[0], dtype=np.float32)[:, None], np.arange(shape[1], dtype=np.float32)
    u = x * np.cos(angle) + y * np.sin(angle) + bend + 2e4
    v = y * np.cos(angle) - x * np.sin(angle) + bend + 2e4
    edges = np.cumsum(rng.uniform(22, 55, 3000)).astype(np.float32)
    strip = np.searchsorted(edges, u.ravel()).reshape(shape)
    length, shift = rng.uniform(24, 70, 3001)[strip], rng.uniform(0, 70, 3001)[strip]
    along = (v + shift) / length
    border = np.minimum(np.abs(u - edges[strip]), np.abs(along - np.round(along)) * length)
    table = (strip * 7919 + along.astype(int) * 104729) % PARCELS
    return table.astype(np.uint16), ramp(border.astype(np.float32), 1.5, 0.4)


def _town(rng: np.random.Generator, shape: Shape, centres: list[Point]) -> tuple[Array, Array]:
    """Built-up share with streets and gardens, and the distance to the nearest town in pixels, (y, x)."""
    y, x = np.arange(shape[0], dtype=np.float32)[:, None], np.arange(shape[1], dtype=np.float32)
    near = np.full(shape, 1e4, np.float32)
    for cy, cx in centres:
        near = np.minimum(near, np.hypot(y - np.float32(cy), x - np.float32(cx)))
    blocks = ((x + 0.4 * y) % 7 < 5.6) & ((y - 0.4 * x) % 9 < 7.4)
    dense = ramp(near + 14 * noise(rng, shape, 18), 48, 10)
    return dense * np.where(blocks, 0.35 + 0.65 * rng.random(shape, np.float32), 0.9), near


def _stack(layers: Layers, shape: Shape) -> NDArray[np.float16]:
    """Paint layers (name, opacity 0..1) over the savanna in their order: fractions per cover."""
    cover = np.empty((len(COVERS), *shape), np.float16)
    for top in range(0, shape[0], STRIP):
        rows = slice(top, top + STRIP)
        part = np.zeros((len(COVERS), *layers[0][1][rows].shape), np.float32)
        part[COVERS.index("grass")] = 1
        for name, alpha in layers:
            part *= 1 - alpha[rows]
            part[COVERS.index(name)] += alpha[rows]
        cover[:, rows] = part
    return cover


def make_landscape(seed: int, shape: Shape, *, mine_share: float = 0.06) -> Landscape:
    """The whole ground from one number. `mine_share` is the fraction of the scene mined in 2024."""
    rivers, relief = _rivers(seed, shape), fbm(stream(seed, "relief"), shape, 300, 8)
    valley = ramp(np.abs(fbm(stream(seed, "valley"), shape, 260, 5, gain=0.45)), 0.22, 0.03)
    flood = ramp(rivers.distance, 75, 12)
    places = _places(seed, shape, rivers)
    dry = rivers.distance > rivers.width + 2
    lobes = _mines(seed, places.mines, dry, mine_share)
    parcel, hedge = _parcels(stream(seed, "parcels"), shape)
    layers, forest = _vegetation(seed, shape, valley, flood)
    layers += _people(seed, shape, places, hedge, flood)
    layers[-3:-3] = _waters(seed, shape, rivers)
    return Landscape(seed, shape, _stack(layers, shape), _shade(seed, relief, forest), parcel, lobes, dry)


class Places(NamedTuple):
    mines: list[Point]
    towns: list[Point]


def _places(seed: int, shape: Shape, rivers: Lines) -> Places:
    """Where the mines (pits on dry land, alluvial workings beside a river, in turn) and the towns lie."""
    rng, area = stream(seed, "sites"), shape[0] * shape[1]
    mines: list[Point] = []
    count = max(1, round(area / 350_000))
    margin = int(min(1.1 * np.sqrt(0.06 * area / count) + 12, 0.4 * min(shape)))
    dry, bank = ramp(rivers.distance, 60, 160), ramp(np.abs(rivers.distance - 45), 25, 5)
    for i in range(count):
        mines.append(_pick(rng, dry if i % 2 == 0 else 2 * bank, mines, margin))
    towns: list[Point] = []
    for _ in range(max(1, round(area / 500_000))):
        towns.append(_pick(rng, ramp(rivers.distance, 25, 60), mines + towns, 20))
    return Places(mines, towns)


def _vegetation(seed: int, shape: Shape, valley: Array, flood: Array) -> tuple[Layers, Array]:
    """Savanna with bare patches and tree clumps, woodland, and forest in the wet and along valleys."""
    wet = fbm(stream(seed, "wet"), shape, 330, 7) + 0.9 * valley + 0.8 * flood
    fine = fbm(stream(seed, "clumps"), shape, 8, 4, gain=0.8)
    forest = ramp(wet + 0.22 * fine, 0.25, 0.75)
    woods = np.maximum(0.75 * ramp(wet + 0.35 * fine, -0.5, 0.5), 0.6 * ramp(fine, 0.9, 1.6))
    soil = fbm(stream(seed, "soil"), shape, 120, 6)
    rng = stream(seed, "outcrop")
    patches, clearings = max(2, shape[0] * shape[1] // 150_000), max(2, shape[0] * shape[1] // 60_000)
    layers = [
        ("laterite", 0.10 + 0.45 * ramp(soil, 0.2, 2.4)),
        ("sandy", 0.40 * ramp(-soil, 0.8, 2.6)),
        ("woodland", woods),
        ("forest", 0.97 * forest),
        ("outcrop", 0.85 * _blobs(rng, shape, patches, (4, 16)) * ramp(fine, -1.2, 0.3)),
        ("laterite", 0.88 * _blobs(rng, shape, clearings, (5, 16))),
        ("sandy", 0.75 * _blobs(rng, shape, patches, (4, 13))),
    ]
    return layers, forest


def _people(seed: int, shape: Shape, places: Places, hedge: Array, flood: Array) -> Layers:
    """Fields around towns with hedges between parcels, roads to the edges and the mines, built-up land."""
    rng = stream(seed, "people")
    built, near = _town(rng, shape, places.towns)
    farmed = ramp(near / 120 + 0.75 * fbm(rng, shape, 110, 3) + 0.8 * flood, 1.55, 1.40)
    paths = _network(rng, shape, places)
    roads = draw(paths, [np.ones(len(path), np.float32) for path in paths], shape)
    return [
        ("field", 0.96 * farmed),
        ("woodland", 0.7 * hedge * farmed),
        ("track", 0.8 * ramp(roads.distance, 1.7, 0.6)),
        ("roof", built),
        ("woodland", 0.5 * ramp(near, 60, 20) * ramp(fbm(rng, shape, 6, 2), 0.7, 1.4)),
    ]


def _network(rng: np.random.Generator, shape: Shape, places: Places) -> list[Array]:
    """Roads: a chain of towns from edge to edge of the scene, and one from the nearest town to each mine."""
    chain = sorted(places.towns, key=lambda town: town[1])
    stops = [(rng.uniform(0, shape[0]), -5.0), *chain, (rng.uniform(0, shape[0]), shape[1] + 5.0)]
    links = list(pairwise(stops))
    links += [(min(chain, key=lambda town: np.hypot(town[0] - y, town[1] - x)), (y, x)) for y, x in places.mines]
    return [_road(rng, np.array(a), np.array(b)) for a, b in links]


def _waters(seed: int, shape: Shape, rivers: Lines) -> Layers:
    """Lakes, sand bars on the inner side of bends, and the river with its oxbows."""
    lake = ramp(fbm(stream(seed, "lakes"), shape, 130, 4, gain=0.4), 2.25, 2.32)
    beach = rivers.width + 10 * ramp(rivers.bend, 0.012, 0.035) * (rivers.width > 3)
    oxbow = rivers.width < 3
    stream_ = ramp(rivers.distance - rivers.width, 0.6, -0.6)
    return [
        ("sandy", 0.5 * ramp(fbm(stream(seed, "lakes"), shape, 130, 4, gain=0.4), 2.18, 2.28)),
        ("clear", lake),
        ("bar", 0.95 * ramp(rivers.distance - beach, 0.8, -0.8)),
        ("turbid", stream_ * ~oxbow),
        ("clear", stream_ * oxbow),
    ]


def _shade(seed: int, relief: Array, forest: Array) -> NDArray[np.float16]:
    """Slopes towards a morning sun, and the roughness of canopies and soils, as one factor."""
    fall = np.gradient(ndimage.gaussian_filter(relief, 2), axis=1) - np.gradient(relief, axis=0) * 0.3
    slope = 1 + 0.08 * np.clip(fall / max(float(fall.std()), 1e-6), -2.5, 2.5)
    rng = stream(seed, "canopy")
    rough = noise(rng, relief.shape, 2.2) * 0.22 * forest + noise(rng, relief.shape, 5) * 0.06
    return (slope * (1 + rough)).astype(np.float16)


# ---------------------------------------------------------------------------------------------- a day
def greenness(day: int, south: bool) -> float:
    """Share of green in grass on a day of the year: rains around July north of the equator, January south."""
    return 0.5 + 0.45 * float(np.cos(2 * np.pi * (day - (20 if south else 205)) / 365))


def day_spectra(day: int, south: bool) -> Array:
    """Spectra of COVERS on a day, (cover, 6): grass and woodland dry out, rains bring mud."""
    green, table = greenness(day, south), TABLE[: len(COVERS)].copy()
    straw = spectrum("straw")
    table[COVERS.index("grass")] = green * spectrum("grass") + (1 - green) * straw
    table[COVERS.index("woodland")] += 0.35 * (1 - green) * (straw - spectrum("woodland"))
    table[COVERS.index("turbid")] *= 0.85 + 0.3 * green
    return table


def parcel_spectra(seed: int, year: int, day: int) -> Array:
    """Spectra of the parcels on a day, (PARCELS, 6): crops out of step, some bare all year."""
    rng, soils = stream(seed, "season", year), stream(seed, "soils").random(PARCELS, np.float32)
    phase, fallow = rng.random(PARCELS), rng.random(PARCELS) < 0.2
    green = np.clip(0.5 + 0.6 * np.sin(2 * np.pi * (day / 365 - phase)), 0.03, 1) * np.where(fallow, 0.06, 1)
    soil = mix("laterite", "sandy", soils)
    return (soil + green[:, None].astype(np.float32) * (spectrum("crop") - soil)).astype(np.float32)


def ground(land: Landscape, surface: Surface, rows: slice, *, day: int, south: bool, parcels: Array) -> Array:
    """Reflectance of some rows on a day without any atmosphere, (6, rows, x)."""
    cover = land.cover[:, rows].astype(np.float32)
    flat = day_spectra(day, south).T @ cover.reshape(len(COVERS), -1)
    share = cover[COVERS.index("field")].ravel()
    farmed = np.flatnonzero(share)
    flat[:, farmed] += parcels.T[:, land.parcel[rows].ravel()[farmed]] * share[farmed]
    flat *= land.shade[rows].ravel()
    first, last = rows.start * land.shape[1], rows.start * land.shape[1] + flat.shape[1]
    a, b = np.searchsorted(surface.where, [first, last])
    flat[:, surface.where[a:b] - first] = surface.reflectance[a:b].T
    return flat.reshape(6, -1, land.shape[1])
