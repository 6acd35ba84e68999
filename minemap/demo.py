"""The demo scene: a synthetic landscape seen by Sentinel-2, as real COGs and STAC items with known truth.

The ground comes from `landscape`; here it is looked at through clouds, haze and sensor noise on the dates of
each year, and written the way the Earth Search catalogue holds Sentinel-2 L2A. Everything is rendered once on
the grid of the centre's UTM zone; items of neighbouring zones resample those pixels (nearest), so that every
zone shows the same ground to half a pixel.

What makes it a test and not only a picture, by number of the look within its year:

- every third look has no offset in its numbers because its processing baseline is older than 04.00, every
  third because the catalogue has taken it out (`earthsearch:boa_offset_applied`), and every third carries
  the offset of 1000; as in the real catalogue `raster:bands` says -0.1 for the last two kinds alike;
- looks 0, 8, … exist twice: `_0` of an old baseline and `_1` of a new one, the same acquisition;
- looks 1, 9, … are cut into two overlapping tiles of one acquisition;
- looks 3, 11, … lie at the edge of the swath and cover part of the scene;
- SCL takes the brightest tailings for cloud in all looks but one of the year.

Old baselines also stand in recent years here: the kind is to be decided by item, never by date.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rasterio
import rasterio.features
import shapely
from affine import Affine
from numpy.typing import NDArray
from pyproj import Transformer
from scipy import ndimage
from shapely.affinity import translate

from .errors import InputError
from .landscape import (
    STRIP,
    Array,
    Landscape,
    Shape,
    Surface,
    fbm,
    ground,
    make_landscape,
    noise,
    parcel_spectra,
    ramp,
    stream,
)
from .sentinel2 import BANDS

CLOUD = np.array([0.66, 0.68, 0.70, 0.74, 0.52, 0.40], np.float32)
HAZE = np.array([1.0, 0.75, 0.5, 0.25, 0.08, 0.04], np.float32)  # against blue
NOISE = np.array([0.0012, 0.0012, 0.0013, 0.0020, 0.0020, 0.0018], np.float32)
SCL_CLOUDS = (8, 9, 10)
COARSE = BANDS[4:]  # at 20 m
FIRST_YEAR, LAST_YEAR = 1678, 2260  # what dates in nanoseconds hold

# file, title, common name, centre wavelength and width in µm, ground sampling distance in m
ASSETS: dict[str, tuple[str, str, str, float, float, int]] = {
    "blue": ("B02", "Blue (band 2) - 10m", "blue", 0.49, 0.098, 10),
    "green": ("B03", "Green (band 3) - 10m", "green", 0.56, 0.045, 10),
    "red": ("B04", "Red (band 4) - 10m", "red", 0.665, 0.038, 10),
    "nir": ("B08", "NIR 1 (band 8) - 10m", "nir", 0.842, 0.145, 10),
    "swir16": ("B11", "SWIR 1 (band 11) - 20m", "swir16", 1.61, 0.143, 20),
    "swir22": ("B12", "SWIR 2 (band 12) - 20m", "swir22", 2.19, 0.242, 20),
}
EXTENSIONS = [
    f"https://stac-extensions.github.io/{name}/schema.json"
    for name in (
        "raster/v1.1.0",
        "mgrs/v1.0.0",
        "grid/v1.0.0",
        "projection/v1.1.0",
        "eo/v1.1.0",
        "view/v1.0.0",
    )
]


# ---------------------------------------------------------------------------------------------- what to make
@dataclass(frozen=True)
class DemoConfig:
    """A demo scene. The same values give the same pixels, byte for byte.

    `zones` says in which UTM zones the items lie: "own" (the zone of the centre), "all" (every zone that the
    scene touches, each with an overlap into the next as the real tiles have it), or EPSG codes.
    """

    seed: int = 0
    years: tuple[int, ...] = (2019, 2020, 2021, 2022, 2023, 2024)
    lon: float = -63.35  # centre, degrees
    lat: float = 6.25
    size: int | tuple[int, int] = 1024  # pixels of 10 m: one side, or (height, width); even
    scenes_per_year: int = 8
    cloud: float = 0.25  # mean fraction of clouded pixels over the looks of a year
    cloudy_years: Mapping[int, float] = field(default_factory=dict)  # year -> such a mean for that year
    hidden_years: Mapping[int, float] = field(default_factory=dict)  # year -> fraction that no look sees
    zones: str | tuple[int, ...] = "own"
    base_url: str = ""  # before "/scenes/…" in the hrefs; without it they are relative to items.json

    def __post_init__(self) -> None:
        if any(n < 64 or n % 2 for n in self.shape):
            raise InputError(f"size {self.size}: even numbers of at least 64 pixels are needed")
        if not (-180 <= self.lon <= 180 and -83.5 <= self.lat <= 83.5):
            raise InputError(f"centre {self.lon}, {self.lat}: longitude ±180 and latitude ±83.5 at most")
        if self.seed < 0:
            raise InputError(f"seed is {self.seed}: give 0 or more")
        if not all(FIRST_YEAR <= year <= LAST_YEAR for year in self.years):
            told = f"years {', '.join(map(str, self.years))}"
            raise InputError(f"{told}: give years from {FIRST_YEAR} to {LAST_YEAR}")
        if not self.years or not 1 <= self.scenes_per_year <= 100:
            raise InputError("at least one year and 1 to 100 scenes a year are needed")

    @property
    def shape(self) -> Shape:
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    def cloud_of(self, year: int) -> float:
        return self.cloudy_years.get(year, self.cloud)


@dataclass(frozen=True)
class Demo:
    """Where a demo scene lies.

    Truth is uint8: 1 mine, 0 not, 255 outside the scene. The first year is uint16: 0 never; what was mined
    before the first of the years counts for that one.
    """

    items: Path  # ItemCollection
    truth: dict[int, Path]  # year -> GeoTIFF on the grid of the centre's zone
    first_year: Path
    zone_truth: dict[int, dict[int, Path]]  # EPSG -> year -> GeoTIFF, for every zone
    bbox: tuple[float, float, float, float]  # W S E N, degrees, inside the scene; W > E over 180°
    epsg: int  # of the centre's zone
    config: DemoConfig


# ---------------------------------------------------------------------------------------------- where
class Frame(NamedTuple):
    """A raster of 10 m pixels in a UTM zone, its corners on multiples of 20 m."""

    epsg: int
    left: int
    top: int
    shape: Shape

    @property
    def box(self) -> shapely.Polygon:
        height, width = self.shape
        return shapely.box(self.left, self.top - 10 * height, self.left + 10 * width, self.top)

    def transform(self, resolution: int = 10) -> Affine:
        return Affine(resolution, 0, self.left, 0, -resolution, self.top)

    def columns(self, first: int, last: int) -> Frame:
        return Frame(self.epsg, self.left + 10 * first, self.top, (self.shape[0], last - first))


def utm_epsg(lon: float, lat: float) -> int:
    return (32700 if lat < 0 else 32600) + int((lon + 180) // 6) % 60 + 1


def _to(source: int, target: int) -> Transformer:
    return Transformer.from_crs(source, target, always_xy=True)


def _home(config: DemoConfig) -> Frame:
    epsg, (height, width) = utm_epsg(config.lon, config.lat), config.shape
    x, y = _to(4326, epsg).transform(config.lon, config.lat)
    return Frame(epsg, round((x - 5 * width) / 20) * 20, round((y + 5 * height) / 20) * 20, config.shape)


def _near(lon: Any, centre: float) -> Any:
    """Longitudes brought within 180 degrees of `centre`."""
    return (lon - centre + 180) % 360 - 180 + centre


def _bbox(home: Frame, centre: float) -> tuple[float, float, float, float]:
    """The largest box in degrees whose edges touch those of the scene from inside."""
    left, bottom, right, top = home.box.buffer(-40).bounds
    x, y = np.linspace(left, right, 200), np.linspace(bottom, top, 200)
    degrees = _to(home.epsg, 4326).transform
    west = _near(degrees(np.full(200, left), y)[0], centre).max()
    east = _near(degrees(np.full(200, right), y)[0], centre).min()
    south, north = degrees(x, np.full(200, bottom))[1].max(), degrees(x, np.full(200, top))[1].min()
    return float(_near(west, 0)), float(south), float(_near(east, 0)), float(north)


def _frames(config: DemoConfig, home: Frame) -> list[Frame]:
    """One frame for each zone that gets items."""
    if config.zones == "own":
        return [home]
    y, x = (np.linspace(0.5, n - 0.5, 129) * 10 for n in home.shape)
    x, y = (a.ravel() for a in np.meshgrid(home.left + x, home.top - y))
    lon, lat = _to(home.epsg, 4326).transform(x, y)
    touched = {utm_epsg(a, b) for a, b in zip(lon, lat, strict=True)}
    zones = sorted(touched) if config.zones == "all" else [int(zone) for zone in config.zones]
    overlap = max(home.shape) * 0.05 * 10 / 111_000  # degrees on a great circle
    return [_zone_frame(home, zone, (x, y, lon, lat), overlap) for zone in zones]


def _zone_frame(home: Frame, zone: int, points: tuple[Any, ...], overlap: float) -> Frame:
    """The part of the scene that lies in a zone, or at most `overlap` outside it, in that zone's metres."""
    x, y, lon, lat = points
    middle = zone % 100 * 6 - 183
    inside = np.abs(_near(lon, middle) - middle) <= 3 + overlap / np.cos(np.radians(lat))
    inside &= (lat >= -overlap) if zone < 32700 else (lat <= overlap)
    if not inside.any():
        raise InputError(f"zone EPSG:{zone} does not touch the scene around {lon[0]:.3f}, {lat[0]:.3f}")
    zx, zy = _to(home.epsg, zone).transform(x[inside], y[inside])
    left, top = int(zx.min() // 20) * 20, -int(-zy.max() // 20) * 20
    shape = (-int((zy.min() - top) // 20) * 2, -int((left - zx.max()) // 20) * 2)
    return Frame(zone, left, top, shape)


class Sampler:
    """Takes pixels of the scene to another frame, nearest neighbour; in the scene's own zone a plain cut."""

    def __init__(self, home: Frame, frame: Frame) -> None:
        self.at = {step: self._index(home, frame, step) for step in (1, 2)}

    @staticmethod
    def _index(home: Frame, frame: Frame, step: int) -> tuple[NDArray[np.int32], NDArray[np.int32]] | None:
        """Row and column in the scene per pixel of 10 m × `step`; row -1 outside; None if nothing moves."""
        if frame == home:
            return None
        size, (height, width) = 10 * step, (n // step for n in frame.shape)
        rows, columns = np.empty((2, height, width), np.int32)
        transform = _to(frame.epsg, home.epsg).transform
        x = frame.left + size * (np.arange(width) + 0.5)
        for row in range(height):
            y = np.full(width, frame.top - size * (row + 0.5))
            there = (x, y) if frame.epsg == home.epsg else transform(x, y)
            columns[row] = np.floor((there[0] - home.left) / size)
            rows[row] = np.floor((home.top - there[1]) / size)
        rows[(rows >= home.shape[0] // step) | (columns < 0) | (columns >= home.shape[1] // step)] = -1
        return rows, columns

    def __call__(self, image: NDArray[Any], *, fill: int, step: int = 1) -> NDArray[Any]:
        """The image (…, y, x) of the scene at 10 m × `step`, on the frame; `fill` outside the scene."""
        if (at := self.at[step]) is None:
            return image
        rows, columns = at
        taken = image[..., np.maximum(rows, 0), np.clip(columns, 0, image.shape[-1] - 1)]
        return np.where(rows < 0, np.array(fill, image.dtype), taken)


# ---------------------------------------------------------------------------------------------- a look
class Product(NamedTuple):
    """How one acquisition was processed."""

    sequence: int
    baseline: str
    applied: bool  # has the catalogue taken the offset out

    @property
    def offset(self) -> int:
        """What the product format says: DN = reflectance × 10,000 - offset, from baseline 04.00 on."""
        return -1000 if float(self.baseline) >= 4 else 0

    @property
    def shift(self) -> int:
        """What was really added to the numbers."""
        return 0 if self.applied else -self.offset


OLD, APPLIED, SHIFTED = Product(0, "02.14", False), Product(0, "05.09", True), Product(0, "05.10", False)


@dataclass(frozen=True)
class Look:
    """One acquisition."""

    number: int  # within the year
    time: datetime
    cloud: float  # fraction
    hidden: float
    trusted: bool  # SCL sees the bright tailings for what they are
    seed: int
    lat: float

    @property
    def day(self) -> int:
        return self.time.timetuple().tm_yday

    @property
    def year(self) -> int:
        return self.time.year

    @property
    def platform(self) -> str:
        return "S2A" if self.number % 2 == 0 else "S2B"

    @property
    def products(self) -> list[Product]:
        if self.number % 8 == 0:
            return [OLD, SHIFTED._replace(sequence=1)]
        return [(OLD, APPLIED, SHIFTED)[self.number % 3]]

    @property
    def tops(self) -> float:
        """What no look sees is clouded more or less brightly: no bright ground that SCL mistakes for cloud."""
        return 0.5 + 0.25 * (self.number % 4) if self.hidden > 0 else 1.0

    @property
    def split(self) -> bool:
        return self.number % 8 == 1

    @property
    def partial(self) -> bool:
        return self.number % 8 == 3

    def random(self, word: str) -> np.random.Generator:
        return stream(self.seed, "look", self.year, self.number, word)

    @property
    def sun(self) -> tuple[float, float]:
        """Azimuth and elevation at half past ten, degrees; the elevation at least 12."""
        lat, hour = np.radians(self.lat), np.radians(-22.5)
        tilt = np.radians(-23.44) * np.cos(2 * np.pi * (self.day + 10) / 365)
        height = np.arcsin(np.sin(lat) * np.sin(tilt) + np.cos(lat) * np.cos(tilt) * np.cos(hour))
        azimuth = np.arctan2(-np.cos(tilt) * np.sin(hour), np.sin(tilt) * np.cos(lat)
                             - np.cos(tilt) * np.sin(lat) * np.cos(hour))  # fmt: skip
        return float(np.degrees(azimuth) % 360), max(float(np.degrees(height)), 12.0)


def plan_looks(config: DemoConfig, year: int) -> list[Look]:
    """The acquisitions of a year, evenly spread, their clouds of the mean that was asked for."""
    n, mean = config.scenes_per_year, config.cloud_of(year)
    rng = stream(config.seed, "plan", year)
    spread = np.linspace(-1, 1, n) if n > 1 else np.zeros(1)
    clouds = rng.permutation(mean + min(mean, 0.95 - mean) * spread)
    days = (np.arange(n) + 0.5) * 350 / n + 7 + rng.integers(-1, 2, n)
    return [
        Look(
            number=i,
            time=datetime(year, 1, 1, tzinfo=UTC)
            + timedelta(days=int(days[i]), hours=10.5 - config.lon / 15, seconds=int(rng.integers(60))),
            cloud=float(clouds[i]),
            hidden=config.hidden_years.get(year, 0.0),
            trusted=n >= 6 and i == n // 2,
            seed=config.seed,
            lat=config.lat,
        )
        for i in range(n)
    ]


class Sky(NamedTuple):
    """What lies between the ground and the sensor, at 20 m, each (y, x) between 0 and 1."""

    cloud: Array  # opacity
    cirrus: Array
    shadow: Array
    haze: Array
    tops: float  # brightness of the clouds, times CLOUD


def make_sky(look: Look, shape: Shape) -> Sky:
    """Clouds that cover the look's fraction, thin at their edges; shadows away from the sun; cirrus; haze."""
    half = (shape[0] // 2, shape[1] // 2)
    cloud = _cover(fbm(look.random("cloud"), half, 70, 6), look.cloud)
    if look.hidden > 0:
        stubborn = fbm(stream(look.seed, "hidden", look.year), half, 150, 5)
        cloud = np.maximum(cloud, _cover(stubborn, look.hidden))
    azimuth, elevation = np.radians(look.sun)
    length = min(1100 / np.tan(elevation), 2500) / 20
    shadow = _moved(cloud, round(np.cos(azimuth) * length), round(-np.sin(azimuth) * length))
    cirrus = 0.16 * ramp(fbm(look.random("cirrus"), half, 140, 4), 1.0, 2.2) * (look.number % 3 == 2)
    haze = look.random("haze").uniform(0, 0.014) * ramp(noise(look.random("smoke"), half, 260), -1, 1)
    return Sky(cloud, cirrus.astype(np.float32), shadow, haze.astype(np.float32), look.tops)


def _cover(field_: Array, fraction: float) -> Array:
    """Opacity of clouds over a fraction of the scene: 0.15 at the threshold, 1 well inside."""
    if fraction <= 0:
        return np.zeros_like(field_)
    edge = float(np.quantile(field_[::2, ::2], max(1 - fraction, 0)))
    return ramp(field_, edge - 0.12, edge + 0.36)


def _moved(image: Array, down: int, right: int) -> Array:
    """The image shifted by whole pixels, 0 where nothing came in."""
    out, (h, w) = np.zeros_like(image), image.shape
    if abs(down) < h and abs(right) < w:
        out[max(down, 0) : h + min(down, 0), max(right, 0) : w + min(right, 0)] = image[
            max(-down, 0) : h - max(down, 0), max(-right, 0) : w - max(right, 0)
        ]
    return out


class Seen(NamedTuple):
    """A look as the sensor and the processor deliver it, on the grid of the centre's zone."""

    numbers: NDArray[np.int16]  # (6, y, x) at 10 m, reflectance × 10,000 without offset; noise may go below 0
    scl: NDArray[np.uint8]  # (y, x) at 20 m, 0 outside the swath


def observe(land: Landscape, surface: Surface, look: Look, *, bright: NDArray[np.bool_] | None = None) -> Seen:
    """Render a look strip by strip. `bright`: where SCL mistakes tailings for cloud, (y, x) at 10 m."""
    sky = make_sky(look, land.shape)
    numbers = np.empty((6, *land.shape), np.int16)
    scl = np.empty((land.shape[0] // 2, land.shape[1] // 2), np.uint8)
    parcels = parcel_spectra(land.seed, look.year, look.day)
    rng = look.random("sensor")
    gain = (1 + 0.015 * rng.standard_normal() + 0.008 * rng.standard_normal(6)).astype(np.float32)
    for top in range(0, land.shape[0], STRIP):
        rows = slice(max(top - 1, 0), min(top + STRIP + 1, land.shape[0]))
        clear = ground(land, surface, rows, day=look.day, south=look.lat < 0, parcels=parcels)
        own = slice(top - rows.start, min(top + STRIP, land.shape[0]) - rows.start)
        here = slice(top, top + own.stop - own.start)
        scl[here.start // 2 : here.stop // 2] = _classes(clear[:, own])
        seen = _blur(_through(clear * gain[:, None, None], sky, rows))[:, own]
        seen += NOISE[:, None, None] * rng.standard_normal(seen.shape, np.float32)
        numbers[:, here] = np.rint(seen * 10_000)
    return Seen(numbers, _classify(scl, sky, look, bright))


def _through(clear: Array, sky: Sky, rows: slice) -> Array:
    """The ground (band, y, x) seen through the sky."""
    half = slice(rows.start // 2, (rows.stop + 1) // 2)
    skip = rows.start - 2 * half.start
    cloud, cirrus, shadow, haze = (
        layer[half].repeat(2, 0).repeat(2, 1)[skip : skip + clear.shape[1]] for layer in sky[:-1]
    )
    clear *= 1 - 0.5 * shadow
    clear += HAZE[:, None, None] * haze
    veil = np.maximum(cloud, cirrus)
    clear *= 1 - veil
    clear += np.float32(sky.tops) * CLOUD[:, None, None] * (veil * (1 - 0.12 * shadow))
    return clear


def _blur(image: Array) -> Array:
    """The sensor's point spread: weights 0.12, 0.76, 0.12 along y and along x; edges repeat."""
    side, middle = np.float32(0.12), np.float32(0.76)
    tall = np.pad(image, [(0, 0), (1, 1), (0, 0)], mode="edge")
    image = middle * image + side * (tall[:, :-2] + tall[:, 2:])
    wide = np.pad(image, [(0, 0), (0, 0), (1, 1)], mode="edge")
    return middle * image + side * (wide[..., :-2] + wide[..., 2:])


def _classes(clear: Array) -> NDArray[np.uint8]:
    """SCL of the bare ground at 20 m: 4 vegetation, 5 not vegetated, 6 water, 2 dark, 7 unclassified."""
    _, green, red, nir, swir, _ = clear[:, ::2, ::2] + np.float32(1e-4)
    ndvi, ndwi = (nir - red) / (nir + red), (green - nir) / (green + nir)
    scl = np.where(ndvi > 0.42, 4, 5).astype(np.uint8)
    scl[(np.abs(ndvi - 0.42) < 0.015) & (swir < 0.25)] = 7
    scl[nir < 0.12] = 2
    scl[(ndwi > 0) & (nir < 0.16)] = 6
    return scl


def _classify(scl: NDArray[np.uint8], sky: Sky, look: Look, bright: NDArray[np.bool_] | None) -> NDArray[np.uint8]:
    """Shadow, cirrus and clouds over the classes of the ground, each widened by a pixel; then the mistake."""
    wide = ndimage.maximum_filter(sky.cloud, 3)
    scl[ndimage.maximum_filter(sky.shadow, 3) > 0.15] = 3
    scl[ndimage.maximum_filter(sky.cirrus, 3) > 0.02] = 10
    scl[wide > 0.15] = 8
    scl[wide > 0.65] = 9
    if bright is not None and not look.trusted:
        mistaken = bright[::2, ::2] & bright[1::2, 1::2] & (scl != 8) & (scl != 10)
        scl[mistaken] = np.where(fbm(look.random("mistake"), scl.shape, 6, 2)[mistaken] > 0.3, 8, 9)
    return scl


def _swath(look: Look, home: Frame) -> shapely.Polygon:
    """What the look covers, in metres of the centre's zone: everything, or west of a slanting edge."""
    if not look.partial:
        return home.box
    left, bottom, right, top = home.box.bounds
    edge = left + (right - left) * look.random("swath").uniform(0.55, 0.75)
    slant = 0.11 * (top - bottom)
    west = shapely.Polygon([(left - 1, bottom - 1), (edge - slant, bottom - 1), (edge + slant, top + 1),
                            (left - 1, top + 1)])  # fmt: skip
    return home.box.intersection(west)


# ---------------------------------------------------------------------------------------------- files
def write_cog(
    path: Path,
    image: NDArray[Any],
    frame: Frame,
    *,
    resolution: int = 10,
    nodata: int = 0,
    label: bool = True,
) -> None:
    """One band (y, x) as a cloud-optimised GeoTIFF: tiles, overviews (nearest for labels), deflate."""
    smallest = min(image.shape)
    profile = {
        "driver": "COG",
        "dtype": image.dtype,
        "count": 1,
        "height": image.shape[0],
        "width": image.shape[1],
        "crs": f"EPSG:{frame.epsg}",
        "transform": frame.transform(resolution),
        "nodata": nodata,
        "blocksize": 512 if smallest > 512 else 256 if smallest > 256 else 128,
        "compress": "deflate",
        "level": 1,
        "predictor": "no" if label else "yes",
        "overview_resampling": "nearest" if label else "average",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(path, "w", **profile) as file:
        file.write(image, 1)


def mgrs(frame: Frame, east: int = 0) -> tuple[str, str]:
    """MGRS zone with band, and 100 km square, of the frame's centre; `east` squares further on."""
    x, y = frame.left + 5 * frame.shape[1], frame.top - 5 * frame.shape[0]
    zone, lat = frame.epsg % 100, _to(frame.epsg, 4326).transform(x, y)[1]
    column = ("STUVWXYZ", "ABCDEFGH", "JKLMNPQR")[zone % 3][(x // 100_000 - 1 + east) % 8]
    row = ("FGHJKLMNPQRSTUVABCDE", "ABCDEFGHJKLMNPQRSTUV")[zone % 2][y // 100_000 % 20]
    return f"{zone}{'CDEFGHJKLMNPQRSTUVWX'[int(np.clip((lat + 80) // 8, 0, 19))]}", column + row


def _geometry(polygon: shapely.Polygon, epsg: int) -> tuple[dict[str, Any], list[float]]:
    """GeoJSON geometry and bbox of a polygon in a zone's metres; cut in two at the antimeridian."""
    ring = np.array(polygon.segmentize(max(polygon.length / 64, 100)).exterior.coords)
    lon, lat = _to(epsg, 4326).transform(*ring.T)
    whole = shapely.Polygon(np.stack([_near(lon, float(lon[0])), lat], 1))
    parts = [
        translate(whole.intersection(shapely.box(turn - 180, -90, turn + 180, 90)), -turn) for turn in (-360, 0, 360)
    ]
    parts = [shapely.set_precision(part, 1e-9) for part in parts if part.area > 0]
    shape = parts[0] if len(parts) == 1 else shapely.MultiPolygon(parts)
    return shapely.geometry.mapping(shape), list(shape.bounds)


def _asset(key: str, href: str, frame: Frame, product: Product) -> dict[str, Any]:
    _, title, common, centre, width, gsd = ASSETS[key]
    return {
        "href": href,
        "type": "image/tiff; application=geotiff; profile=cloud-optimized",
        "title": title,
        "eo:bands": [{
            "name": key, "common_name": common, "center_wavelength": centre, "full_width_half_max": width,
        }],
        "gsd": gsd,
        **_grid(frame, gsd),
        "raster:bands": [{
            "nodata": 0, "data_type": "uint16", "bits_per_sample": 15, "spatial_resolution": gsd,
            "scale": 0.0001, "offset": product.offset / 10_000,
        }],
        "roles": ["data", "reflectance"],
    }  # fmt: skip


def _scl_asset(href: str, frame: Frame) -> dict[str, Any]:
    return {
        "href": href,
        "type": "image/tiff; application=geotiff; profile=cloud-optimized",
        "title": "Scene classification map (SCL)",
        **_grid(frame, 20),
        "raster:bands": [{"nodata": 0, "data_type": "uint8", "spatial_resolution": 20}],
        "roles": ["data", "reflectance"],
    }


def _grid(frame: Frame, gsd: int) -> dict[str, Any]:
    shape = [n * 10 // gsd for n in frame.shape]
    return {"proj:shape": shape, "proj:transform": list(frame.transform(gsd))[:6]}


class Tile(NamedTuple):
    """What one item shows: numbers (6, y, x) at 10 m and SCL at 20 m on its frame."""

    frame: Frame
    square: tuple[str, str]
    numbers: NDArray[np.int16]
    scl: NDArray[np.uint8]


def _share(scl: NDArray[np.uint8], *classes: int) -> float:
    """Per cent of the observed pixels in some classes."""
    return round(100 * float(np.isin(scl, classes).sum()) / max(int((scl > 0).sum()), 1), 6)


def _properties(look: Look, tile: Tile, product: Product) -> dict[str, Any]:
    frame, square, scl = tile.frame, tile.square, tile.scl
    orbit = (look.time - datetime(2015, 6, 23, tzinfo=UTC)).days * 143 // 10
    processed = look.time + timedelta(hours=6 if product.sequence == 0 else 9000)
    azimuth, elevation = look.sun
    return {
        "datetime": f"{look.time:%Y-%m-%dT%H:%M:%S}.{look.number:03d}000Z",
        "created": f"{processed:%Y-%m-%dT%H:%M:%S}.000Z",
        "updated": f"{processed:%Y-%m-%dT%H:%M:%S}.000Z",
        "platform": f"sentinel-2{look.platform[-1].lower()}",
        "constellation": "sentinel-2",
        "instruments": ["msi"],
        "eo:cloud_cover": _share(scl, *SCL_CLOUDS),
        "proj:epsg": frame.epsg,
        "mgrs:utm_zone": frame.epsg % 100,
        "mgrs:latitude_band": square[0][-1],
        "mgrs:grid_square": square[1],
        "grid:code": f"MGRS-{square[0]}{square[1]}",
        "view:sun_azimuth": azimuth,
        "view:sun_elevation": elevation,
        "s2:nodata_pixel_percentage": round(100 * float((scl == 0).mean()), 6),
        "s2:cloud_shadow_percentage": _share(scl, 3),
        "s2:vegetation_percentage": _share(scl, 4),
        "s2:not_vegetated_percentage": _share(scl, 5),
        "s2:water_percentage": _share(scl, 6),
        "s2:medium_proba_clouds_percentage": _share(scl, 8),
        "s2:high_proba_clouds_percentage": _share(scl, 9),
        "s2:thin_cirrus_percentage": _share(scl, 10),
        "s2:product_type": "S2MSI2A",
        "s2:processing_baseline": product.baseline,
        "s2:generation_time": f"{processed:%Y-%m-%dT%H:%M:%S}.000000Z",
        "s2:datatake_id": f"G{look.platform}_{look.time:%Y%m%dT%H%M%S}_{orbit:06d}_N{product.baseline}",
        "s2:sequence": str(product.sequence),
        "earthsearch:boa_offset_applied": product.applied,
    }  # fmt: skip


def _tiles(seen: Seen, look: Look, frame: Frame, sampler: Sampler) -> Iterator[Tile]:
    """The look on a zone's frame, whole or as two tiles that overlap by a fifth."""
    numbers = sampler(seen.numbers, fill=0)
    inside = sampler(seen.scl > 0, fill=0, step=2)
    inside &= _blocks(sampler((seen.scl > 0).repeat(2, 0).repeat(2, 1), fill=0)).all((1, 3))
    scl = np.where(inside, sampler(seen.scl, fill=0, step=2), np.uint8(0))
    width = frame.shape[1]
    low, high = (round(width * part / 2) * 2 for part in (0.4, 0.6))
    for east, (a, b) in enumerate([(0, high), (low, width)] if look.split else [(0, width)]):
        if (scl[:, a // 2 : b // 2] > 0).any():
            part = frame.columns(a, b)
            yield Tile(part, mgrs(frame, east), numbers[..., a:b], scl[:, a // 2 : b // 2])


def _blocks(image: NDArray[Any]) -> NDArray[Any]:
    """(y, x) seen as 2×2 blocks: (y/2, 2, x/2, 2)."""
    return image.reshape(image.shape[0] // 2, 2, image.shape[1] // 2, 2)


def _stored(band: NDArray[np.int16], seen: NDArray[np.bool_], product: Product) -> NDArray[np.uint16]:
    """Digital numbers as the product holds them: at least 1 where seen, 0 = nodata elsewhere."""
    return np.where(seen, np.maximum(band.astype(np.int32) + product.shift, 1), 0).astype(np.uint16)


def _files(tile: Tile, product: Product, folder: Path) -> Iterator[dict[str, Any]]:
    """Arguments of `write_cog` for each file of an item."""
    seen = tile.scl > 0
    fine = seen.repeat(2, 0).repeat(2, 1)
    yield {"path": folder / "SCL.tif", "image": tile.scl, "frame": tile.frame, "resolution": 20}
    for key, band in zip(BANDS, tile.numbers, strict=True):
        coarse = key in COARSE
        image = np.rint(_blocks(band).mean((1, 3))).astype(np.int16) if coarse else band
        stored = _stored(image, seen if coarse else fine, product)
        grid = {"frame": tile.frame, "resolution": ASSETS[key][-1]}
        yield {"path": folder / f"{ASSETS[key][0]}.tif", "image": stored, "label": False, **grid}


def _write_item(
    out: Path, tile: Tile, look: Look, product: Product, *, where: dict[str, Any], base: str
) -> dict[str, Any]:
    name = f"{look.platform}_{''.join(tile.square)}_{look.time:%Y%m%d}_{product.sequence}_L2A"
    folder, href = out / "scenes" / name, f"{base or '.'}/scenes/{name}"
    with ThreadPoolExecutor(4) as pool:  # compressing runs outside Python's lock
        list(pool.map(lambda job: write_cog(**job), _files(tile, product, folder)))
    assets = {key: _asset(key, f"{href}/{ASSETS[key][0]}.tif", tile.frame, product) for key in BANDS}
    return {
        "type": "Feature",
        "stac_version": "1.0.0",
        "stac_extensions": EXTENSIONS,
        "id": name,
        "collection": "sentinel-2-l2a",
        **where,
        "properties": _properties(look, tile, product),
        "links": [],
        "assets": {**assets, "scl": _scl_asset(f"{href}/SCL.tif", tile.frame)},
    }


def _footprint(swath: shapely.Polygon, home: Frame, frame: Frame) -> dict[str, Any]:
    """Geometry and bbox of the part of a swath that a tile shows."""
    dense = swath.segmentize(swath.length / 256)
    moved = shapely.transform(dense, _to(home.epsg, frame.epsg).transform, interleaved=False)
    geometry, bbox = _geometry(moved.intersection(frame.box), frame.epsg)
    return {"geometry": geometry, "bbox": bbox}


# ---------------------------------------------------------------------------------------------- the whole
def make_demo(out: Path, config: DemoConfig | None = None) -> Demo:
    """Write scenes, items.json and truth under a folder."""
    config = config or DemoConfig()
    out, home = Path(out), _home(config)
    land = make_landscape(config.seed, config.shape)
    samplers = {frame: Sampler(home, frame) for frame in _frames(config, home)}
    items = [item for year in config.years for item in _year(out, config, land, home, samplers, year)]
    items.sort(key=lambda item: (item["properties"]["datetime"], item["id"]))
    collection = out / "items.json"
    collection.write_text(json.dumps({"type": "FeatureCollection", "features": items}, indent=1))
    truth = _write_truth(out / "truth", config, land, home, samplers)
    own, bbox = truth[home.epsg], _bbox(home, config.lon)
    return Demo(collection, own, out / "truth" / "first_year.tif", truth, bbox, home.epsg, config)


def _year(
    out: Path, config: DemoConfig, land: Landscape, home: Frame, samplers: dict[Frame, Sampler], year: int
) -> Iterator[dict[str, Any]]:
    surface, bright = land.surface(year), land.bright(year)
    for look in plan_looks(config, year):
        swath = _swath(look, home)
        seen = observe(land, surface, look, bright=bright)
        if look.partial:
            half = (home.shape[0] // 2, home.shape[1] // 2)
            seen.scl[rasterio.features.rasterize([swath], half, transform=home.transform(20)) == 0] = 0
        for frame, sampler in samplers.items():
            for tile in _tiles(seen, look, frame, sampler):
                where = _footprint(swath, home, tile.frame)
                for product in look.products:
                    yield _write_item(out, tile, look, product, where=where, base=config.base_url)


def _write_truth(
    out: Path, config: DemoConfig, land: Landscape, home: Frame, samplers: dict[Frame, Sampler]
) -> dict[int, dict[int, Path]]:
    """Footprints by year on every zone's frame, and the first year mined on the centre's."""
    samplers = {home: Sampler(home, home), **{f: s for f, s in samplers.items() if f.epsg != home.epsg}}
    first = np.zeros(land.shape, np.uint16)
    paths: dict[int, dict[int, Path]] = {frame.epsg: {} for frame in samplers}
    for year in sorted(config.years):
        mine = land.truth(year)
        first[mine & (first == 0)] = year
        for frame, sampler in samplers.items():
            folder = out if frame == home else out / f"utm{frame.epsg}"
            paths[frame.epsg][year] = folder / f"{year}.tif"
            image = sampler(mine.astype(np.uint8), fill=255)
            write_cog(paths[frame.epsg][year], image, frame, nodata=255)
    write_cog(out / "first_year.tif", first, home)
    return paths
