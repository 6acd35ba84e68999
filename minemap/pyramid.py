"""A map's probability at ever coarser levels, so that a viewer reads no more than it shows: a Zarr of its own.

    OUT.zarr/utm32720/{0, 1, 2, …}/{probability, time, time_bounds, y, x, spatial_ref}

Level 0 has the map's own pixels, each next one pixels twice as wide, down to one chunk. A pixel of a level is the
mean of what was observed of the four below it, 255 where nothing was. It is a copy, not part of the map's store: the
store's bytes depend on nothing but its super-tiles, and an overview across super-tiles would have to wait for them.
Metadata: the multiscales, spatial and proj conventions of GeoZarr in each zone's group.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from .errors import InputError
from .files import check_file
from .grid import WINDOW, Grid
from .inference import NOT_OBSERVED
from .scenes import Period
from .store import Store
from .zones import CONVENTIONS, consolidate, create_level, zone_attributes

MULTISCALES = {
    "uuid": "d35379db-88df-4056-af3a-620245f8e347",
    "name": "multiscales",
    "schema_url": "https://raw.githubusercontent.com/zarr-conventions/multiscales/refs/tags/v1/schema.json",
    "spec_url": "https://github.com/zarr-conventions/multiscales/blob/v1/README.md",
    "description": "Multiscale layout of zarr datasets",
}


def write_pyramid(store: Store, out: Path, periods: list[Period]) -> None:
    """Writes `periods` of every zone to the new folder `out`; one block of super-tiles is held at a time."""
    if out.exists():
        raise InputError(f"{out} exists already: remove it, or choose another name")
    check_file(out)
    draft = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.absolute().parent))
    about = store.attributes()
    try:
        told = {name: about[name] for name in ("minemap", "model", "model_sha256", "recipe", "parameters", "stac")}
        root = zarr.create_group(draft, zarr_format=3, overwrite=True, attributes=told)
        for name in store.groups():
            _write_zone(store, root, name, periods)
        levels = [f"{name}/{level}" for name, group in root.groups() for level in group.group_keys()]
        consolidate(draft, [*levels, *root.group_keys()])
        draft.chmod(0o755)
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write_zone(store: Store, root: zarr.Group, name: str, periods: list[Period]) -> None:
    own = [p for p in periods if store.done(name, p)]
    if not own:
        return
    tiles = {tile for period in own for tile in store.done(name, period)}
    whole = _around(list(tiles))
    grids = list(_levels(whole))
    zone = root.create_group(name, attributes={**zone_attributes(whole), **_multiscales(grids)})
    chunk = store.chunk(name)
    levels = [create_level(zone, str(n), grid, chunk, own) for n, grid in enumerate(grids)]
    for n, period in enumerate(own):
        at = store.periods(name).index(period)
        for tile in store.done(name, period):
            _put(levels[0], n, tile.offset_in(whole), store.read_tile(tile, at, "probability"))
        for (fine, coarse), grid in zip(pairwise(levels), grids[1:], strict=True):
            _coarsen(fine, coarse, n, grid, chunk)


def _around(tiles: list[Grid]) -> Grid:
    """The smallest grid that covers all super-tiles."""
    left, top = min(t.left for t in tiles), max(t.top for t in tiles)
    right, bottom = max(t.bounds[2] for t in tiles), min(t.bounds[1] for t in tiles)
    resolution = tiles[0].resolution
    height, width = round((top - bottom) / resolution), round((right - left) / resolution)
    return replace(tiles[0], left=left, top=top, height=height, width=width)


def _levels(grid: Grid) -> Iterator[Grid]:
    """The grid and its halves, until one chunk holds all; an odd row or column at the end gets a whole pixel."""
    yield grid
    while max(grid.shape) > WINDOW:
        height, width = (-(-side // 2) for side in grid.shape)
        grid = replace(grid, height=height, width=width, resolution=grid.resolution * 2)
        yield grid


def _multiscales(grids: list[Grid]) -> dict[str, Any]:
    layout: list[dict[str, Any]] = []
    for level, grid in enumerate(grids):
        factor = 2.0 if level else 1.0
        place = {"spatial:shape": list(grid.shape), "spatial:transform": list(grid.transform)[:6]}
        source = {"derived_from": str(level - 1)} if level else {}
        transform = {"scale": [factor] * 2, "translation": [0.0, 0.0]}
        layout.append({"asset": str(level), **source, "transform": transform, **place})
    return {
        "zarr_conventions": [MULTISCALES, *CONVENTIONS],
        "multiscales": {"layout": layout, "resampling_method": "average"},
    }


def _coarsen(fine: zarr.Group, coarse: zarr.Group, n: int, grid: Grid, chunk: int) -> None:
    """A period of one level from the level below, shard by shard of the new one."""
    source: Any = fine["probability"]
    for row in range(0, grid.height, chunk):
        for column in range(0, grid.width, chunk):
            _put(
                coarse,
                n,
                (row, column),
                halved(source[n, 2 * row : 2 * (row + chunk), 2 * column : 2 * (column + chunk)]),
            )


def halved(percent: np.ndarray) -> np.ndarray:
    """Means of what was observed of each two by two pixels, uint8 (y, x) with 255; odd sides are filled up."""
    padded = np.pad(percent, [(0, side % 2) for side in percent.shape], constant_values=NOT_OBSERVED)
    height, width = padded.shape
    blocks = padded.reshape(height // 2, 2, width // 2, 2)
    seen = blocks != NOT_OBSERVED
    count = seen.sum(axis=(1, 3))
    mean = (blocks * seen).sum(axis=(1, 3), dtype=np.uint16) / np.maximum(count, 1)
    return np.where(count > 0, np.rint(mean), NOT_OBSERVED).astype(np.uint8)


def _put(group: zarr.Group, n: int, at: tuple[int, int], values: np.ndarray) -> None:
    """Writes a block, unless it holds nothing: a missing chunk reads as not observed."""
    if (values != NOT_OBSERVED).any():
        array: Any = group["probability"]
        array[n, at[0] : at[0] + values.shape[0], at[1] : at[1] + values.shape[1]] = values
