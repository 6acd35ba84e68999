"""Chips: labelled images with their places, read from one format and split by place.

The format is `image` (sample, [date,] band, y, x), integer reflectance x 10,000, 0 in all bands = no data, and a
band that is 0 all over a chip is absent there; `mask` (sample, [date,] y, x) uint8, 1 mine, 0 not, 255 ignore;
`bands`, their names. These are arrays of an `.npz` or of a Zarr group (there `bands` is an attribute). One value a
sample of `place`, `date`, `block`, `split` and other columns lies in arrays beside them (`minemap chips` writes them
so), or in a `chips.csv` of the same order next to an `.npz` without any.
"""

from __future__ import annotations

import csv
import json
import math
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import zarr
from numpy.typing import NDArray
from pyproj import Transformer
from scipy.spatial import cKDTree

from minemap.errors import InputError
from minemap.sentinel2 import BANDS

SCALE = 10_000  # digital numbers per unit of reflectance
IGNORE = 255
APART = 5000.0  # metres between chips of two blocks
CHIPS_MARK = "minemap:chips"  # attribute of a Zarr group that holds chips; its value is the format's version


@dataclass(frozen=True)
class Chips:
    """Labelled images, a row for each chip and date.

    `image` float32 (n, band, y, x), reflectance, bands in the order of sentinel2.BANDS, NaN = absent;
    `mask` uint8 (n, y, x), 1 mine, 0 not, 255 ignore; `columns` name -> (n,) str, the file's or
    chips.csv's, and `sample`, the chip's place in its file; `resolution` metres per pixel, 10 where a file is silent.
    """

    image: NDArray[np.float32]
    mask: NDArray[np.uint8]
    columns: dict[str, NDArray[np.str_]]
    resolution: float = 10.0

    def __len__(self) -> int:
        return len(self.image)

    def where(self, keep: NDArray[np.bool_]) -> Chips:
        """The rows that `keep` (n,) selects."""
        columns = {k: v[keep] for k, v in self.columns.items()}
        return replace(self, image=self.image[keep], mask=self.mask[keep], columns=columns)

    def split(self, name: str | None) -> Chips:
        """The rows of one split, or all."""
        return self if name is None else self.where(self.column("split") == name)

    def decided(self) -> Chips:
        """The rows with at least one pixel that is not 255."""
        return self.where((self.mask != IGNORE).any(axis=(1, 2)))

    def column(self, name: str) -> NDArray[np.str_]:
        """A column by name."""
        if name not in self.columns:
            raise InputError(f"these chips have no column {name!r}: choose one of {', '.join(self.columns)}")
        return self.columns[name]


def load_chips(path: str | Path) -> Chips:
    """Chips from an `.npz` file or a Zarr group, dates flattened to rows of their own; missing bands are NaN."""
    path = Path(path)
    arrays = _arrays(path)
    image, mask = arrays.pop("image"), arrays.pop("mask")
    bands = [str(b) for b in arrays.pop("bands")]
    resolution = _resolution(arrays.pop("parameters", None))
    samples, dates = len(image), image.shape[1] if image.ndim == 5 else 1
    if image.ndim == 5:
        image, mask = image.reshape(-1, *image.shape[2:]), mask.reshape(-1, *mask.shape[2:])
    # Zarr's strings become NumPy's of fixed width by way of objects only
    table = {name: a.astype(object).astype(str) for name, a in arrays.items() if a.shape == (samples,)}
    columns = _columns(table or _table(path.with_name("chips.csv"), samples), samples, dates)
    return Chips(_reflectance(image, bands, path), mask, columns, resolution)


def is_chips(path: Path) -> bool:
    """Whether a folder is a Zarr group of chips, or a file one that `minemap chips` made."""
    try:
        if path.is_dir():
            return CHIPS_MARK in zarr.open_group(path, mode="r").attrs
        with zipfile.ZipFile(path) as file:
            return {"image.npy", "mask.npy", "parameters.npy"} <= set(file.namelist())
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return False


def load_pairs(path: str | Path) -> Chips:
    """Pairs of dates from chips of two dates, each pair in both orders, so that one class serves gain and loss.

    `image` (n, 2 x band, y, x): the bands of the pair's first date, then of its second; `mask` 1 where mine at the
    second and not at the first, 255 where either date is undecided. Column `date`: "0" in the order of time (1 =
    gain), "1" with the dates swapped (1 = loss).
    """
    chips = load_chips(path)
    if set(chips.column("date")) != {"0", "1"}:
        raise InputError(f"{path} has chips of one date: change needs chips of two, image (sample, 2, band, y, x)")
    image = chips.image.reshape(-1, 2, *chips.image.shape[1:])
    mask = chips.mask.reshape(-1, 2, *chips.mask.shape[1:])
    images = np.concatenate([image, image[:, ::-1]], axis=1).reshape(-1, 2 * len(BANDS), *image.shape[3:])
    masks = np.stack([changed(mask[:, 0], mask[:, 1]), changed(mask[:, 1], mask[:, 0])], axis=1)
    return replace(chips, image=images, mask=masks.reshape(-1, *mask.shape[2:]))


def changed(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Mask of what is mine after and not before, 255 where either is: (..., y, x) from two of the same."""
    unknown = (before == IGNORE) | (after == IGNORE)
    return np.where(unknown, IGNORE, (after == 1) & (before != 1)).astype(np.uint8)


def _arrays(path: Path) -> dict[str, NDArray]:
    try:
        arrays = _read_zarr(path) if path.is_dir() else _read_npz(path)
        image, mask = arrays["image"], arrays["mask"]
    except (OSError, EOFError, ValueError, KeyError, zlib.error, zipfile.BadZipFile) as error:
        raise InputError(f"{path} cannot be read as chips, a .npz or .zarr: {error}") from error
    if not np.isin(mask, (0, 1, IGNORE)).all():
        raise InputError(f"{path}: mask holds other values than 0, 1 and {IGNORE} (not decided)")
    if image.ndim not in (4, 5) or mask.shape != image.shape[:-3] + image.shape[-2:]:
        raise InputError(f"{path}: image {image.shape} and mask {mask.shape} do not belong together")
    return arrays


def _read_npz(path: Path) -> dict[str, NDArray]:
    with zipfile.ZipFile(path):  # what is none would be taken for a pickle
        pass
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in {"image", "mask", "bands", *file.files}}


def _read_zarr(path: Path) -> dict[str, NDArray]:
    if not is_chips(path):
        raise ValueError("it is not a Zarr group that minemap chips made")
    group = zarr.open_group(path, mode="r")
    return {name: np.asarray(array[...]) for name, array in group.arrays()} | {
        "bands": np.array(group.attrs["bands"]),
        "parameters": np.array(json.dumps(group.attrs.get("parameters", {}))),
    }


def _reflectance(stored: NDArray, bands: list[str], path: Path) -> NDArray[np.float32]:
    if not bands or not set(bands) <= set(BANDS):
        raise InputError(f"{path}: bands {bands} are not among {', '.join(BANDS)}")
    if len(set(bands)) != len(bands) or len(bands) != stored.shape[1]:
        raise InputError(
            f"{path}: image has {stored.shape[1]} bands, and bands names {len(set(bands))}: name each once"
        )
    if not np.issubdtype(stored.dtype, np.integer):
        raise InputError(f"{path}: image is {stored.dtype}: store reflectance × {SCALE} in whole numbers, as int16")
    image = np.full((len(stored), len(BANDS), *stored.shape[2:]), np.nan, np.float32)
    values = stored.astype(np.float32) / SCALE
    values[np.broadcast_to((stored == 0).all(axis=1, keepdims=True), stored.shape)] = np.nan
    values[(stored == 0).all(axis=(2, 3))] = np.nan
    for source, band in enumerate(bands):
        image[:, BANDS.index(band)] = values[:, source]
    return image


def _resolution(parameters: object) -> float:
    """Metres per pixel, from what `minemap chips` writes of a set; 10 for any other."""
    try:
        return float(json.loads(str(parameters))["resolution"])
    except (ValueError, KeyError, TypeError):
        return 10.0


def _table(path: Path, samples: int) -> dict[str, NDArray[np.str_]]:
    """The columns of a chips.csv, none where there is no such file."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if len(rows) != samples:
        raise InputError(f"{path} has {len(rows)} rows for {samples} chips")
    return {key: np.array([row[key] for row in rows]) for key in (rows[0] if rows else ())}


def _columns(table: dict[str, NDArray[np.str_]], samples: int, dates: int) -> dict[str, NDArray[np.str_]]:
    columns = {"sample": np.repeat(np.arange(samples).astype(str), dates)}
    columns["date"] = np.tile(np.arange(dates), samples).astype(str)
    return columns | {name: np.repeat(values, dates) for name, values in table.items()}


def check_leakage(*sets: Chips) -> None:
    """Raise unless no block of places occurs in two of the sets."""
    blocks = [set(chips.column("block")) for chips in sets]
    for i, a in enumerate(blocks):
        for b in blocks[i + 1 :]:
            if a & b:
                raise InputError(f"blocks {sorted(a & b)[:5]} are in two splits: split by place, not by chip")


def earth_centred(lon: NDArray[np.float64], lat: NDArray[np.float64]) -> NDArray[np.float64]:
    """Metres from the Earth's centre (n, 3). Straight through it, which over 10 km is shorter by millimetres."""
    return np.column_stack(Transformer.from_crs(4979, 4978, always_xy=True).transform(lon, lat, np.zeros_like(lon)))


def _middles(chips: Chips) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Longitude and latitude of the chips' middles, degrees, (n,) each, where they say it, or their corners."""
    for x, y in (("lon",), ("lat",)), (("west", "east"), ("south", "north")):
        if {*x, *y} <= chips.columns.keys():
            lon, lat = (np.mean([chips.column(name).astype(float) for name in names], axis=0) for names in (x, y))
            return lon, lat
    return None


def away_from(chips: Chips, others: Chips) -> Chips:
    """The rows at least APART from all of `others`; all, where either does not say where its chips lie."""
    both = chips, others
    middles = [_middles(c) for c in both]
    if not all(len(c) and m is not None for c, m in zip(both, middles, strict=True)):
        return chips
    here, there = (earth_centred(*m) for m in middles if m is not None)
    corners = sum(math.hypot(*c.mask.shape[1:]) * c.resolution / 2 for c in both)  # from the middles
    return chips.where(cKDTree(there).query(here)[0] >= APART + corners)


def draw_blocks(chips: Chips, share: float, seed: int, fold: int = 0) -> NDArray[np.bool_]:
    """Rows of randomly drawn whole blocks that hold about `share` of the rows: (n,) bool.

    fold: the draw goes on where those of the folds before it ended, so that 1 / share folds of a seed hold every row
    once.
    """
    blocks, sizes = np.unique(chips.column("block"), return_counts=True)
    order = np.random.default_rng(seed).permutation(len(blocks))
    middle = (np.cumsum(sizes[order]) - sizes[order] / 2) / max(1, len(chips))
    return np.isin(chips.column("block"), blocks[order][(fold * share < middle) & (middle <= (fold + 1) * share)])


def keep_bands(chips: Chips, bands: tuple[str, ...]) -> Chips:
    """The same chips, or pairs, with every other band absent. Raises InputError."""
    if unknown := sorted(set(bands) - set(BANDS)):
        raise InputError(f"bands {unknown[0]!r}: choose among {', '.join(BANDS)}")
    image = chips.image.copy()
    image[:, [i for i in range(image.shape[1]) if BANDS[i % len(BANDS)] not in bands]] = np.nan
    return replace(chips, image=image)
