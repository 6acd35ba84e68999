"""A cube of looks to one cloud-free image: the median of the clear looks, and how many there were.

All arithmetic is on uint16 (reflectance x 10,000, 0 = nothing seen): exact, and quick in vector instructions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import pairwise
from numbers import Integral
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr

from .errors import InputError
from .sentinel2 import NODATA, SCALE, SCL_CLOUD, SCL_MASKED

ABSENT = np.uint16(65535)  # sorts behind every look
STRIP_BYTES = 192 * 2**20  # of looks held at a time
BLOCK = 2**14  # pixels sorted at a time, so that their looks stay in the cache
_NEVER_SEEN = (0, 1)


@dataclass(frozen=True)
class Rule:
    """How looks become an image; part of what identifies a result.

    method: "median". masked: SCL classes that are no clear look. min_clear: with fewer clear looks a pixel is
    not observed. rescue: keep pixels that SCL calls cloud in over `rescue_share` of at least `rescue_looks`
    looks although every band is stable (median absolute deviation at most `rescue_spread` of the median): bright
    tailings, salt and sand, which SCL takes for cloud.
    """

    method: str = "median"
    masked: tuple[int, ...] = SCL_MASKED
    min_clear: int = 3
    rescue: bool = True
    rescue_share: float = 0.8
    rescue_looks: int = 4
    rescue_spread: float = 0.12

    def __post_init__(self) -> None:
        if self.method != "median":
            raise InputError(f"unknown composite {self.method!r}: median is the only one")
        if not all(isinstance(c, Integral) and 0 <= c <= 11 for c in self.masked):
            raise InputError(f"SCL classes {self.masked}: they are whole numbers and run from 0 to 11")
        object.__setattr__(self, "masked", tuple(sorted({int(c) for c in self.masked})))
        if self.min_clear < 1:
            raise InputError(f"min_clear is {self.min_clear}: at least one clear look is needed")

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "masked": list(self.masked)}


def composite(cube: xr.DataArray, rule: Rule | None = None) -> xr.DataArray:
    """The cloud-free image of a cube from `load_cube`, lazy where the cube is: float32 (band, y, x), NaN unseen.

    cube: reflectance (time, band, y, x) with coordinate `scl` (time, y, x), and `acquisition` (time) where several
    layers are one look. The result has the coordinate `observations` (y, x), uint8: clear looks, saturating at
    255. Same pixels as in a map (but for items that a map
    found to contradict their offset: see `load_cube`).
    """
    rule = rule or Rule()
    if not isinstance(rule, Rule):
        raise InputError(f"rule is a {type(rule).__name__}: give a minemap.compositing.Rule")
    if sorted(map(str, cube.dims)) != ["band", "time", "x", "y"]:
        raise InputError(f"cube has dimensions {', '.join(map(str, cube.dims))}: it needs time, band, y and x")
    if not cube.sizes["time"]:
        return _unseen(cube)
    looks = _looks(cube["acquisition"].values if "acquisition" in cube.coords else np.arange(cube.sizes["time"]))
    scl = cube["scl"] if "scl" in cube.coords else xr.full_like(cube.isel(band=0, drop=True), 7, dtype="uint8")
    cube = cube.reset_coords(drop=True).assign_coords(spatial_ref=cube.coords.get("spatial_ref", 0))
    present = _present(cube)
    image, count = xr.apply_ufunc(
        _composite_floats,
        cube.chunk(time=-1, band=-1) if cube.chunks else cube,
        scl.reset_coords(drop=True).chunk(time=-1) if scl.chunks else scl.reset_coords(drop=True),
        kwargs={"looks": looks, "rule": rule, "present": present},
        input_core_dims=[["time", "band"], ["time"]],
        output_core_dims=[["band"], []],
        dask="parallelized",
        output_dtypes=[np.float32, np.uint8],
    )
    image = image.transpose("band", "y", "x").assign_coords(observations=count)
    image.attrs = {"long_name": "surface reflectance, median of clear looks", "units": "1"}
    return image.rename("composite")


def _unseen(cube: xr.DataArray) -> xr.DataArray:
    """The image of a cube without any layer."""
    chunks = cube.chunks[1:] if cube.chunks else cube.shape[1:]
    image = xr.DataArray(da.full(cube.shape[1:], np.nan, dtype=np.float32, chunks=chunks), dims=cube.dims[1:])
    count = xr.zeros_like(image.isel(band=0), dtype=np.uint8)
    kept = {name: cube.coords[name] for name in ("band", "y", "x", "spatial_ref") if name in cube.coords}
    return image.assign_coords(kept).assign_coords(observations=count).rename("composite")


def _composite_floats(
    cube: np.ndarray, scl: np.ndarray, *, looks: np.ndarray, rule: Rule, present: list[bool]
) -> tuple[np.ndarray, np.ndarray]:
    """(y, x, time, band) floats to (y, x, band) floats and (y, x) counts."""
    # Dark must neither wrap round nor become nodata
    stored = np.clip(np.rint(cube / np.float32(SCALE)), 1, np.iinfo(np.uint16).max)
    stored = np.nan_to_num(stored, nan=NODATA).astype(np.uint16)
    bands = np.ascontiguousarray(stored.transpose(3, 2, 0, 1))
    image, count = composite_looks(lambda b: bands[b], present, scl.transpose(2, 0, 1), looks, rule)
    return image.transpose(1, 2, 0), count


def composite_layers(
    layers: xr.Dataset, rule: Rule, load: Callable[[Any], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """`composite` for a whole tile in bounded memory, whatever the number of looks: eager, for `load_layers`.

    Returns float32 (band, y, x), NaN unseen, and uint8 (y, x) counts. Works strip by strip (rows of dask chunks:
    anything less would read whole chunks again for each strip) and within a strip band by band. load: computes a
    lazy array.
    """
    dn, scl = layers["dn"].data, layers["scl"].data
    looks = _looks(layers["acquisition"].values)
    n, bands, height, width = dn.shape
    image = np.full((bands, height, width), np.nan, np.float32)
    count = np.zeros((height, width), np.uint8)
    present = _present(layers["dn"])
    ends = np.cumsum(dn.chunks[2]).tolist() if n else []
    for rows in (slice(start, end) for start, end in pairwise([0, *ends])):
        read_band = partial(_load_band, load, dn[:, :, rows])
        _, count[rows] = composite_looks(read_band, present, load(scl[:, rows]), looks, rule, out=image[:, rows])
    return image, count


def _present(cube: xr.DataArray) -> list[bool]:
    """Which bands any item of the place has, whether or not it shows in these pixels; all when nobody says."""
    bands = [str(b) for b in cube["band"].values] if "band" in cube.coords else [""] * cube.sizes["band"]
    return [band in cube.attrs.get("bands_present", bands) for band in bands]


def _load_band(load: Callable[[Any], np.ndarray], dn: Any, band: int) -> np.ndarray:
    return load(dn[:, band])


def strip_rows(layers: int, shape: tuple[int, int]) -> int:
    """Rows of a tile (y, x) whose looks take no more than STRIP_BYTES: of the chunks for `composite_layers`."""
    height, width = shape
    pieces = max(1, -(-layers * height * width * 3 // STRIP_BYTES))  # DN and SCL: 3 bytes a pixel and look
    return -(-height // pieces)


def composite_looks(
    read_band: Callable[[int], np.ndarray],
    present: list[bool],
    scl: np.ndarray,
    looks: np.ndarray,
    rule: Rule,
    *,
    out: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """read_band(b): uint16 (layer, y, x) of one band; scl: uint8 (layer, y, x); looks: (layer,) which look each
    layer belongs to. present: which bands there are; one that is not is not counted and stays NaN. out: NaN float32
    (band, y, x) for the image; a new one without."""
    bands = len(present)
    doubtful = _doubtful(scl, looks, rule) if rule.rescue else np.zeros(scl.shape[1:], bool)
    image = np.full((bands, *scl.shape[1:]), np.nan, np.float32) if out is None else out
    rescued = np.full((bands, int(doubtful.sum())), np.nan, np.float32)
    stable = np.ones(rescued.shape[1], bool)
    count = np.full(scl.shape[1:], ABSENT)
    rescued_count = np.full(rescued.shape[1], ABSENT)
    for b in range(bands):
        if not present[b]:
            continue
        values = read_band(b)
        if rescued.shape[1]:
            rescued[b], seen, calm = _rescue(values, scl, doubtful, looks, rule)
            rescued_count, stable = np.minimum(rescued_count, seen), stable & calm
        image[b], seen = _median_of_clear(values, scl, looks, rule)
        np.minimum(count, seen, out=count)
    accepted = doubtful.copy()
    accepted[doubtful] = stable
    image[:, accepted], count[accepted] = rescued[:, stable], rescued_count[stable]
    count[count == ABSENT] = 0
    image[:, count < rule.min_clear] = np.nan
    return image, np.minimum(count, 255).astype(np.uint8)


def _looks(acquisitions: np.ndarray) -> np.ndarray:
    """Names to consecutive numbers; layers of one acquisition follow each other."""
    _, first, inverse = np.unique(acquisitions, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse].astype(int) if len(acquisitions) else np.zeros(0, int)


def _doubtful(scl: np.ndarray, looks: np.ndarray, rule: Rule) -> np.ndarray:
    """Pixels that SCL calls cloud in over `rescue_share` of enough looks, bool (y, x)."""
    seen = np.zeros(scl.shape[1:], np.int16)
    cloudy = np.zeros(scl.shape[1:], np.int16)
    for members in _members(looks):
        valid = _but(_NEVER_SEEN, scl[members])
        seen += valid.any(axis=0)
        cloudy += (valid > _but(SCL_CLOUD, scl[members])).any(axis=0)
    return (seen >= rule.rescue_looks) & (cloudy > rule.rescue_share * seen)


def _members(looks: np.ndarray) -> Iterator[np.ndarray]:
    for look in range(int(looks.max(initial=-1)) + 1):
        yield np.flatnonzero(looks == look)


def _median_of_clear(
    values: np.ndarray, scl: np.ndarray, looks: np.ndarray, rule: Rule
) -> tuple[np.ndarray, np.ndarray]:
    """Reflectance float32 (y, x), NaN without a clear look, and the number of clear looks (y, x)."""
    flat, classes = values.reshape(len(values), -1), scl.reshape(len(scl), -1)
    median = np.empty(flat.shape[1], np.float32)
    count = np.empty(flat.shape[1], np.uint16)
    for start in range(0, flat.shape[1], BLOCK):
        part = slice(start, start + BLOCK)
        twice, count[part] = _twice_median(_merged(flat[:, part] * _but(rule.masked, classes[:, part]), looks))
        median[part] = (twice + 2) * np.float32(SCALE / 2)
    return median.reshape(values.shape[1:]), count.reshape(values.shape[1:])


def _but(unwanted: Iterable[int], classes: np.ndarray) -> np.ndarray:
    """uint16, 1 where an SCL class is none of `unwanted` (nor beyond 15), else 0: a bit for each class, shifted."""
    return np.uint16(0xFFFF & ~sum(1 << c for c in unwanted)) >> classes & 1


def _merged(values: np.ndarray, looks: np.ndarray) -> np.ndarray:
    """Of (layer, pixel), 0 where there is none: values - 1 (look, pixel), ABSENT where none, as 0 wraps round.

    A look's value is that of the first of its layers that has one there. Overwrites `values`.
    """
    values -= np.uint16(1)
    if len(looks) == looks.max(initial=-1) + 1:
        return values  # one layer a look
    merged = []
    for members in _members(looks):
        first = values[members[0]]
        for other in members[1:]:
            np.copyto(first, values[other], where=first == ABSENT)
        merged.append(first)
    return np.stack(merged)


def _rescue(
    values: np.ndarray, scl: np.ndarray, doubtful: np.ndarray, looks: np.ndarray, rule: Rule
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For the doubtful pixels of one band: median of all looks, their number, whether they are stable."""
    flat, classes = values.reshape(len(values), -1), scl.reshape(len(scl), -1)
    pixels = np.flatnonzero(doubtful)
    middle = np.empty(len(pixels), np.float32)
    count = np.empty(len(pixels), np.uint16)
    spread = np.empty(len(pixels), np.float32)
    for start in range(0, len(pixels), BLOCK):
        part = slice(start, start + BLOCK)
        chosen = pixels[part]
        merged = _merged(flat[:, chosen] * _but(_NEVER_SEEN, classes[:, chosen]), looks)
        twice, count[part] = _twice_median(merged.copy())
        away = np.where(merged == ABSENT, ABSENT, np.abs(merged - np.nan_to_num(twice) / 2).astype(np.uint16))
        middle[part] = (twice + 2) * np.float32(SCALE / 2)
        spread[part] = _twice_median(away)[0] * np.float32(SCALE / 2)
    stable = (count >= rule.rescue_looks) & (spread <= rule.rescue_spread * middle)
    return middle, count, stable


def _twice_median(looks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of uint16 (look, pixel): twice the median, float32 (pixel,), NaN where all are ABSENT, and how many are not.

    Sorts `looks` in place along the looks, all pixels of a step at once: eight times as fast as a sort for each
    pixel where the processor can't sort 16-bit integers in vectors.
    """
    smaller = np.empty_like(looks[0])
    for low, high in _sorting_network(len(looks)):
        np.minimum(looks[low], looks[high], out=smaller)
        np.maximum(looks[low], looks[high], out=looks[high])
        looks[low] = smaller
    count = (looks != ABSENT).sum(axis=0, dtype=np.uint16)
    last = np.maximum(count, 1).astype(np.intp) - 1
    pixels = np.arange(looks.shape[1])
    twice = looks[last // 2, pixels].astype(np.float32) + looks[(last + 1) // 2, pixels]
    return np.where(count > 0, twice, np.float32(np.nan)), count


@lru_cache
def _sorting_network(n: int) -> tuple[tuple[int, int], ...]:
    """Pairs to put in order, one after the other, that sort any n values: Batcher's odd-even merge sort (Knuth, The
    Art of Computer Programming, vol. 3, 5.2.2, algorithm M)."""
    pairs = []
    widths = [2**i for i in range((n - 1).bit_length())]  # of the sorted runs that are merged
    for width in widths:
        for step in (width >> i for i in range(width.bit_length())):
            for start in range(step % width, n - step, 2 * step):
                ends = range(start, min(start + step, n - step))
                pairs += [(i, i + step) for i in ends if i // (2 * width) == (i + step) // (2 * width)]
    return tuple(pairs)
