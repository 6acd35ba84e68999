"""One super-tile: read, composite, predict, write, record. What every task of a map does, wherever it runs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import dask.array as da
import numpy as np
from rasterio.errors import RasterioError

from .checkpoint import Checkpoint
from .cluster import TASK_THREADS
from .compositing import Rule, composite_layers, strip_rows
from .cube import load_layers
from .errors import DamagedTileError, ReadError, StoreError, first_line
from .files import file_name, read_json, write_atomically
from .grid import WINDOW, BBox, Grid, pixel_area_km2
from .inference import (
    NOT_OBSERVED,
    Settings,
    keep_freed_memory,
    layout,
    mine_from,
    percent,
    probability_and_batch,
    return_freed_memory,
)
from .reader import Access, read_overview
from .scenes import Period
from .sensors import asset_key, scaling
from .sentinel2 import NODATA, OFFSET, Item, Scaling, contradicts
from .store import Store
from .vectors import AOI, inside_aoi
from .zones import QUICKLOOK

COUNTS = ("km2_total", "km2_observed", "km2_mine", "computed")
READ_THREADS = 8  # assets read at a time by one task: remote reads wait more than they compute
QUICKLOOK_WHITE = 0.3  # reflectance that is white in a quicklook


@dataclass(frozen=True)
class Work:
    """One super-tile to make: where, and which of its 256-px squares (first row, end row, first column, end)."""

    tile: Grid
    windows: tuple[int, int, int, int]

    @property
    def inner(self) -> Grid:
        """The windows that are computed, as one Grid."""
        top, bottom, left, right = (n * WINDOW for n in self.windows)
        return self.tile.window(top, left, bottom - top, right - left)


@dataclass(frozen=True)
class Reading:
    """What it takes to read the image of a place: its frozen scenes, and how they become one image."""

    store: Store
    period: Period
    bands: tuple[str, ...]
    rule: Rule
    access: Access
    reader: str


@dataclass(frozen=True)
class Job:
    """What every task of a run shares; travels to workers, so it holds paths and settings, never data."""

    store: Store
    period: Period
    index: dict[str, int]  # group -> index on its time axis
    bbox: BBox
    checkpoint: Checkpoint
    precision: str
    sharing: int  # processes that share a machine's cores
    rule: Rule
    access: Access
    reader: str
    keep_composite: bool
    aoi: bool  # whether the store's meta folder holds an area to clip to

    counted: ClassVar[tuple[str, ...]] = COUNTS

    @property
    def reading(self) -> Reading:
        bands = self.checkpoint.recipe.bands
        return Reading(self.store, self.period, bands, self.rule, self.access, self.reader)

    def make(self, work: Work) -> dict[str, float]:
        """The task of a super-tile."""
        return make_tile(work, self)

    def settings(self, resolution: float) -> Settings:
        """On the machine that asks: workers may have more cores than where the run was started."""
        return Settings.for_machine(self.precision, self.sharing, resolution)


def make_tile(work: Work, job: Job) -> dict[str, float]:
    """Reads, composites, predicts and writes one super-tile, unless the ledger has it; returns its counts."""
    record = job.store.record(work.tile, job.period)
    index = job.index[work.tile.group]
    scenes = job.store.scenes_of(work.tile.group, work.tile.cell, job.period)
    if record is not None and done(record, work, scenes):
        with suppress(DamagedTileError):  # made again
            _check_layers(work.tile, record, index, job.store)
            answer = job.store.read_tile(work.inner, index, "probability")
            return {**count(answer, work.inner, job), "computed": 0.0}
    if record is not None:  # a shard is written whole: what an earlier box had of it is made again with ours
        work = replace(work, windows=_union(record["windows"], work.windows))
    start = time.monotonic()
    with _stage("read"):
        margin = layout(job.checkpoint).margin
        image, observations, items, asked = read_image(work.inner, margin, job.reading)
    with _stage("network"):
        settings = job.settings(work.tile.resolution)
        chance, batch = probability_and_batch(image, job.checkpoint, settings)
    core = image[:, margin:-margin, margin:-margin]
    outside = ~_valid(work.inner, job)
    chance[outside], observations[outside] = np.nan, 0
    answer = percent(chance)
    layers = {"probability": answer, "observations": observations, "quicklook": quicklook(core, outside, job)}
    if job.keep_composite:
        layers["composite"] = np.where(outside, NODATA, np.nan_to_num(np.rint(core * 1e4))).astype(np.uint16)
    with _stage("write"):
        job.store.write_tile(work.tile, index, {name: _whole(name, data, work) for name, data in layers.items()})
    counts = count(answer, work.inner, job)
    area = pixel_area_km2(work.inner)
    mine = (answer != NOT_OBSERVED) & (answer >= mine_from(job.checkpoint.recipe.threshold))
    job.store.write_record(
        work.tile,
        job.period,
        {
            "windows": work.windows,
            "filled": {name: _filled(name, data) for name, data in layers.items()},
            "probability_sum": float(np.nansum(chance, dtype=np.float64)),
            "wanted_km2": float(area[~outside].sum()),
            "observed_km2": float(area[answer != NOT_OBSERVED].sum()),
            "mine_km2": float(area[mine].sum()),
            "probability_km2": float(np.nansum(chance * area, dtype=np.float64)),
            "items": items,
            "scenes": scenes,
            "offsets": asked,
            "batch": batch,
            "at_once": job.sharing * TASK_THREADS,
            "seconds": round(time.monotonic() - start, 3),
        },
    )
    return {**counts, "computed": 1.0}


@contextmanager
def _stage(name: str) -> Iterator[None]:
    """Dask's "fine performance metrics" show how long workers spend in each stage."""
    from distributed.metrics import context_meter

    with context_meter.meter(f"minemap {name}"):
        yield


def done(record: dict[str, Any], work: Work, scenes: str) -> bool:
    """Whether what a record tells of holds all windows that are wanted, made from the scenes that are valid now."""
    has, wants = record["windows"], work.windows
    holds = has[0] <= wants[0] and has[1] >= wants[1] and has[2] <= wants[2] and has[3] >= wants[3]
    return holds and record.get("scenes") == scenes


def _check_layers(tile: Grid, record: dict[str, Any], index: int, store: Store) -> None:
    """Raises DamagedTileError unless a finished super-tile has all its layers: a lost shard reads as nothing seen."""
    made = Work(tile, tuple(record["windows"])).inner
    for name, filled in record.get("filled", {}).items():  # records of earlier versions have none
        if _filled(name, store.read_tile(made, index, name)) != filled:
            raise DamagedTileError(f"{name} of a super-tile is not what its record says")


def _filled(name: str, layer: np.ndarray) -> int:
    """How many values of a layer are not those of a chunk that was never written."""
    return int(np.count_nonzero(layer != _fill(name)))


def _fill(name: str) -> int:
    return NOT_OBSERVED if name == "probability" else 0


def _union(one: list[int], other: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    return min(one[0], other[0]), max(one[1], other[1]), min(one[2], other[2]), max(one[3], other[3])


def read_image(inner: Grid, margin: int, how: Reading) -> tuple[np.ndarray, np.ndarray, list[str], dict[str, str]]:
    """The composite of a place within one cell, read from the source: what maps and training chips both see.

    Returns reflectance float32 (band, y + 2 margin, x + 2 margin), NaN where not observed; clear looks uint8 (y, x);
    the ids of the items that were read; and the offset decided for each, with its reason.
    """
    keep_freed_memory()
    seen = inner.buffered(margin)
    chosen = how.store.read_cell(inner.group, inner.cell, how.period)
    if chosen is None:
        raise StoreError(f"{how.store.meta} has lost the scenes of cell {inner.cell}: map it again with --refresh")
    items = how.store.read_items([name for acquisition in chosen for name in acquisition])
    with _named_item(items), ThreadPoolExecutor(READ_THREADS, "read") as pool:
        decided = pool.map(lambda item: (item["id"], decide(item, how)), items)
        layers = load_layers(
            items,
            seen,
            bands=how.bands,
            reader=how.reader,
            chunks=(strip_rows(len(items), seen.shape), seen.width),
            access=how.access,
            scalings=dict(decided),
            warn=False,  # said once, when the scenes were chosen
        )
        image, count = composite_layers(layers, how.rule, lambda lazy: _loaded(lazy, pool))
    return_freed_memory()
    used = [str(name) for name in layers["id"].values]
    core = slice(margin, -margin or None)
    asked = dict(zip(used, layers["offset"].values.tolist(), strict=True))
    return image, count[core, core], used, asked


@contextmanager
def _named_item(items: list[Item]) -> Iterator[None]:
    """Adds the item to an error about one of its assets."""
    try:
        yield
    except ReadError as error:
        whose = [i["id"] for i in items if any(a["href"] in str(error) for a in i["assets"].values())]
        raise ReadError(f"{f'item {whose[0]}, ' if whose else ''}{error}") from error


def _loaded(lazy: da.Array, pool: ThreadPoolExecutor) -> np.ndarray:
    """A lazy array read straight into place, without a second copy for the concatenation."""
    out = np.empty(lazy.shape, lazy.dtype)
    try:
        da.store(lazy, out, lock=False, scheduler="threads", pool=pool)
    except RasterioError as error:  # odc-stac's; our own reader raises ReadError
        raise ReadError(f"an asset can't be read: {first_line(error)}") from error
    return out


def decide(item: Item, how: Reading) -> Scaling:
    """The item's scaling, corrected where its own pixels contradict it; the answer is kept beside the store."""
    said = scaling(item)
    if said.offset != OFFSET:
        return said
    path = how.store.meta / "offsets" / f"{file_name(item['id'])}.json"
    if kept := read_json(path):
        return Scaling(**kept)
    key = asset_key(item, "blue")
    blue = read_overview(item["assets"][key]["href"], how.access) if key else np.zeros(0, np.uint16)
    if contradicts(said, blue):
        said = Scaling(0, said.scale, f"{said.reason}, but the pixels lie below the offset")
    write_atomically(path, json.dumps(asdict(said)))
    return said


def with_decision(item: Item) -> Item:
    """The item with the scaling that its own words give, and why."""
    decided = scaling(item)
    told = {"minemap:offset": decided.offset, "minemap:scale": decided.scale, "minemap:reason": decided.reason}
    return {**item, "properties": {**item["properties"], **told}}


def _valid(inner: Grid, job: Job) -> np.ndarray:
    """Which pixels may be mapped: the zone's own and, with --aoi, those within it; bool (y, x)."""
    own = inner.owned()
    return own & inside_aoi(inner, job.store.meta / AOI) if job.aoi else own


def _whole(name: str, data: np.ndarray, work: Work) -> np.ndarray:
    """A layer of the windows in a full super-tile (or its quicklook), nothing observed elsewhere."""
    step = WINDOW // QUICKLOOK if name == "quicklook" else WINDOW
    side = work.tile.width * step // WINDOW
    out = np.full((*data.shape[:-2], side, side), _fill(name), data.dtype)
    row, column = work.windows[0] * step, work.windows[2] * step
    out[..., row : row + data.shape[-2], column : column + data.shape[-1]] = data
    return out


def count(answer: np.ndarray, inner: Grid, job: Job) -> dict[str, float]:
    """km² on the ellipsoid within the asked box (and aoi): in all, observed, mine."""
    asked = inner.inside(job.bbox)
    if job.aoi:
        asked &= inside_aoi(inner, job.store.meta / AOI)
    area = pixel_area_km2(inner) * asked
    observed = answer != NOT_OBSERVED
    mine = observed & (answer >= mine_from(job.checkpoint.recipe.threshold))
    return {
        "km2_total": float(area.sum()),
        "km2_observed": float(area[observed].sum()),
        "km2_mine": float(area[mine].sum()),
    }


def quicklook(image: np.ndarray, outside: np.ndarray, job: Job) -> np.ndarray:
    """Red, green, blue of a composite (band, y, x) as 8-px means, uint8 (3, y/8, x/8), 0 = not observed."""
    bands = job.checkpoint.recipe.bands
    rgb = [image[bands.index(b)] if b in bands else np.full(outside.shape, np.nan) for b in ("red", "green", "blue")]
    colours = np.where(outside, np.nan, np.stack(rgb))
    height, width = outside.shape
    blocks = colours.reshape(3, height // QUICKLOOK, QUICKLOOK, width // QUICKLOOK, QUICKLOOK)
    seen = np.isfinite(blocks).sum(axis=(2, 4))
    mean = np.nansum(blocks, axis=(2, 4)) / np.maximum(seen, 1)
    bright = 1 + 254 * np.clip(mean / QUICKLOOK_WHITE, 0, 1) ** 0.7
    return np.where(seen > 0, np.rint(bright), 0).astype(np.uint8)
