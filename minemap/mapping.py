"""The main job: a box and a date to a map. plan() decides what to do, map_area() does it, each step once."""

from __future__ import annotations

import json
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import dask
import dask.array as da
import numpy as np
import xarray as xr
from dask.highlevelgraph import HighLevelGraph
from rasterio.errors import RasterioError

from . import __version__
from .checkpoint import Checkpoint, load_model
from .cluster import TASK_THREADS, check_workers, connect, gpu_share, worker_count
from .compositing import Rule, composite_layers, strip_rows
from .cube import READERS, load_layers
from .errors import ClusterError, DamagedTileError, InputError, NoItemsError, ReadError, StoreError, first_line
from .grid import CHUNK, CHUNKS, WINDOW, BBox, Grid, cell_side, check_bbox, grids, pixel_area_km2, wanted_windows
from .inference import (
    NOT_OBSERVED,
    Settings,
    keep_freed_memory,
    layout,
    mine_from,
    one_date,
    percent,
    probability_and_batch,
    return_freed_memory,
)
from .reader import Access, read_overview
from .scenes import (
    Acquisition,
    Period,
    Scenes,
    Source,
    parse_months,
    parse_period,
    search,
    search_area,
    sensor_at,
    source,
)
from .sensors import Sensor, asset_key, scaling
from .sentinel2 import NODATA, OFFSET, SCL, SCL_MASKED, Item, Scaling, contradicts
from .store import QUICKLOOK, Store, file_name, parameters_hash, write_atomically
from .water import BODY_HA, UNLIKELY

if TYPE_CHECKING:
    import geopandas
    import shapely
    from distributed import Client

COUNTS = ("km2_total", "km2_observed", "km2_mine", "computed")
AOI = "aoi.wkt"  # in the meta folder
READ_THREADS = 8  # assets read at a time by one task: remote reads wait more than they compute
RETRIES = 3  # times that a task which failed starts again, where there are workers
FAILURES = 8  # items that may be unreadable before a run is given up; one covers 30 super-tiles
UNREADABLE = "the same command tries again, a map or a series with --exclude ID leaves an item out"
STAGE = "supertile"  # what dashboards call the tasks
AT_ONCE = 10_000  # super-tiles a graph; as many more follow when these are done
QUICKLOOK_WHITE = 0.3  # reflectance that is white in a quicklook


@dataclass(frozen=True)
class Options:
    """What a run may be told; the command line's options by their names.

    stac: a known source, an API's URL or an item file. max_cloud: per cent, of an item. max_scenes: acquisitions a
    cell. min_clear: clear looks below which a pixel is not observed. months: as "6-9". exclude: ids of items to leave
    out; cells that used them choose again. masked: SCL classes that are no clear look. aoi: polygon file to clip to.
    model: name or path. extent: "bbox" or "zone". chunk: side of a super-tile in pixels. precision: "bf16" or "fp32",
    None for what the processor has. near: polygons in degrees; only super-tiles that meet them are made (whole,
    unlike aoi, and the map stays open for others).
    """

    stac: str | Path = "earth-search"
    collection: str | None = None
    max_cloud: float = 60.0
    max_scenes: int = 24
    min_clear: int = 3
    months: str | None = None
    exclude: tuple[str, ...] = ()
    masked: tuple[int, ...] = SCL_MASKED
    rescue: bool = True
    aoi: str | Path | None = None
    refresh: bool = False
    keep_composite: bool = False
    model: str | Path | None = None
    extent: str = "bbox"
    chunk: int = CHUNK
    reader: str = "stackstac"
    precision: str | None = None
    overwrite: bool = False
    near: shapely.Geometry | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("extent", ("bbox", "zone")), ("chunk", CHUNKS), ("reader", READERS)):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} is {getattr(self, name)!r}: give one of {', '.join(map(str, allowed))}")
        for name in ("exclude", "masked"):
            if isinstance(getattr(self, name), str):
                raise InputError(f"{name} is {getattr(self, name)!r}: give a tuple, of ids or of SCL classes")
        if not 0 <= self.max_cloud <= 100:
            raise InputError(f"max_cloud is {self.max_cloud:g}: it is a percentage, 0 to 100")
        if self.max_scenes < max(1, self.min_clear):
            raise InputError(
                f"max_scenes is {self.max_scenes}, and a pixel needs {self.min_clear} clear looks (min_clear): with "
                "fewer acquisitions nothing would be observed"
            )

    @staticmethod
    def named(options: dict[str, Any]) -> Options:
        """From keywords; InputError names an unknown one."""
        known = [f.name for f in fields(Options)]
        for name in options:
            if name not in known:
                raise InputError(f"unknown option {name!r}: known are {', '.join(known)}")
        return Options(**options)


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


class Task(Protocol):
    """What a run over super-tiles shares: where its records are, and what to do with one of them."""

    @property
    def store(self) -> Store: ...

    @property
    def period(self) -> Period: ...

    @property
    def counted(self) -> tuple[str, ...]:
        """Names of what `make` returns, in the order of the table."""

    def make(self, work: Work) -> dict[str, float]: ...


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


@dataclass(frozen=True)
class Plan:
    """Everything decided before the first pixel is read. Nothing has been written yet."""

    bbox: BBox
    period: Period
    options: Options
    source: Source
    sensor: Sensor
    checkpoint: Checkpoint
    settings: Settings
    grids: list[Grid]
    work: list[Work]
    cells: dict[tuple[str, tuple[int, int]], list[Acquisition]]  # newly chosen, to be frozen
    frozen: int  # cells whose choice an earlier run has frozen
    store: Store | None = None  # where it will be written

    @cached_property
    def finished(self) -> dict[Work, dict[str, Any]]:
        """Super-tiles that the run will find done, with their records. A refresh may make some of them again."""
        if self.store is None or self.options.overwrite or not self.store.exists():
            return {}
        store = self.store.bound()
        records = {work: store.record(work.tile, self.period) for work in self.work}
        cells = {(work.tile.group, work.tile.cell) for work in self.work}
        scenes = {cell: store.scenes_of(*cell, self.period) for cell in cells}
        return {w: r for w, r in records.items() if r and _done(r, w, scenes[w.tile.group, w.tile.cell])}

    @cached_property
    def rule(self) -> Rule:
        o = self.options
        return Rule(masked=o.masked, min_clear=o.min_clear, rescue=o.rescue)

    @property
    def items(self) -> list[Item]:
        """Newly chosen items by id."""
        chosen = {i["id"]: i for cell in self.cells.values() for a in cell for i in a.items}
        return [chosen[name] for name in sorted(chosen)]

    @property
    def parameters(self) -> dict[str, Any]:
        """What identifies a result: never the box, the workers, the cluster or signed addresses."""
        o = self.options
        return {
            "collection": self.source.collection,
            "source": self.source.url,
            "max_cloud": o.max_cloud,
            "max_scenes": o.max_scenes,
            "months": list(parse_months(o.months)),
            "composite": self.rule.as_dict(),
            "bands": list(self.checkpoint.recipe.bands),
            "sensor": self.sensor.name,
            "resolution": self.sensor.resolution,
            "model": self.checkpoint.recipe.name,
            "model_sha256": self.checkpoint.sha256,
            "precision": self.settings.precision,
            "open_water": {"hectares": BODY_HA, "unlikely": UNLIKELY},
            "reader": o.reader,
            "chunk": o.chunk,
            "aoi": aoi_hash(o.aoi),
            "keep_composite": o.keep_composite,
        }


def plan(bbox: BBox, date: str | Period, out: str | Path | None = None, **options: Any) -> Plan:
    """What a run would do. bbox: west south east north, degrees. Searches the source; loads no torch, writes nothing.

    Raises InputError, CatalogueError, NoItemsError, CheckpointError, StoreError.
    """
    o = Options.named(options)
    box, period, where = check_bbox(bbox), parse_period(date), source(o.stac, o.collection)
    parse_months(o.months)
    area = load_aoi(o.aoi) if o.aoi else None
    sensor, checkpoint = sensor_at(where), load_model(o.model)
    one_date(checkpoint)
    if checkpoint.recipe.window != WINDOW:
        raise InputError(
            f"model {checkpoint.recipe.name} has windows of {checkpoint.recipe.window} px, maps have {WINDOW}"
        )
    store = Store.at(out) if out is not None else None
    settings = Settings.for_machine(o.precision or _stored_precision(store, o))
    limits = [shape for shape in (area, o.near) if shape is not None]
    covered = grids(box, o.chunk, resolution=sensor.resolution)
    work = [w for grid in covered for w in _wanted(grid, box, limits, o)]
    if not work:
        asked = f"bbox {' '.join(map(str, box))}"
        if limits:
            limit = f"aoi {o.aoi}" if o.aoi else "the sites"
            raise InputError(f"{limit} and {asked} have no place in common")
        raise InputError(f"{asked} holds no pixel of {sensor.resolution:g} m")
    if checkpoint.recipe.resolution != sensor.resolution:
        warnings.warn(
            f"model {checkpoint.recipe.name} was trained at {checkpoint.recipe.resolution:g} m, {sensor.name} maps "
            f"have {sensor.resolution:g} m: how good they are is not known",
            stacklevel=2,
        )
    zones = {w.tile.epsg for w in work}
    lattices = [g for g in grids(box, o.chunk, extent=o.extent, resolution=sensor.resolution) if g.epsg in zones]
    made = Plan(box, period, o, where, sensor, checkpoint, settings, lattices, work, {}, 0, store)
    if store is not None:
        store.check(made.parameters, made.grids, overwrite=o.overwrite)
    return _with_scenes(made, store)


def _stored_precision(store: Store | None, options: Options) -> str | None:
    """A map goes on at the precision that it was begun with, also on another kind of processor."""
    if store is None or options.overwrite or not store.exists():
        return None
    return store.attributes()["parameters"]["precision"]


def _wanted(grid: Grid, bbox: BBox, limits: list[shapely.Geometry], options: Options) -> Iterator[Work]:
    import shapely

    within = [in_zone(area, grid.epsg) for area in limits]
    for tile in grid.tiles(options.chunk):
        if not all(area.intersects(shapely.box(*tile.bounds)) for area in within):
            continue
        windows = wanted_windows(tile, bbox)
        if windows is not None:
            side = options.chunk // WINDOW
            yield Work(tile, windows if options.extent == "bbox" else (0, side, 0, side))


def _with_scenes(made: Plan, store: Store | None) -> Plan:
    """The plan with scenes chosen for each cell whose choice is not frozen yet."""
    o = made.options
    use_frozen = store is not None and store.exists() and not o.refresh and not o.overwrite
    cells = sorted({(w.tile.epsg, w.tile.cell) for w in made.work})
    done = {c for c in cells if use_frozen and store and _holds_choice(store, c, made)}
    open_cells = {c for c in cells if c not in done}
    chosen: dict[tuple[str, tuple[int, int]], list[Acquisition]] = {}
    empty: list[NoItemsError] = []
    for epsg in sorted({epsg for epsg, _ in open_cells}):
        zone = [w.tile for w in made.work if w.tile.epsg == epsg and (epsg, w.tile.cell) in open_cells]
        try:
            items = search(
                search_area(_around(zone)),
                made.period,
                stac=made.source,
                max_cloud=o.max_cloud,
                months=parse_months(o.months),
                exclude=o.exclude,
            )
        except NoItemsError as error:  # a zone of open sea must not lose its neighbour's map
            empty.append(error)
            items = []
        scenes = Scenes(items, o.max_scenes)
        # What a catalogue has lost for now stays mapped, unless all is to be made anew
        kept = store if not items and o.refresh and not o.overwrite else None
        for tile in zone:
            if kept and kept.read_cell(tile.group, tile.cell, made.period):
                continue
            if (tile.group, tile.cell) not in chosen:
                chosen[tile.group, tile.cell] = scenes.choose(epsg, tile.cell, tile.resolution)
    planned = replace(made, cells=chosen, frozen=len(done))
    if empty and not planned.items and not done:
        raise empty[0]
    if empty:
        more = f" (and so in {len(empty) - 1} more of its zones)" if len(empty) > 1 else ""
        across = "; W > E crosses the antimeridian" if len(empty) > 1 and made.bbox[0] > made.bbox[2] else ""
        warnings.warn(f"part of the box stays unobserved{more}{across}: {empty[0]}", stacklevel=2)
    most = max(map(len, chosen.values()), default=o.min_clear)
    if 0 < most < o.min_clear:
        few = f"no place has more than {most} of the {o.min_clear} acquisitions that a pixel needs (--min-clear)"
        warnings.warn(f"{few}: nothing will be observed; give a longer period, or a smaller number", stacklevel=2)
    for band in made.checkpoint.recipe.bands:
        lack = sum(asset_key(item, band) is None for item in planned.items)
        if 0 < lack < len(planned.items):
            told = f"{lack} of {len(planned.items)} items have no {band}: a pixel counts its looks in every band"
            warnings.warn(f"{told}; --exclude ID leaves an item out", stacklevel=2)
    blind = sum(asset_key(item, SCL) is None for item in planned.items)
    if blind:
        told = f"{blind} of {len(planned.items)} items have no {made.sensor.quality}: their clouds are not masked"
        warnings.warn(told, stacklevel=2)
    return planned


def _holds_choice(store: Store, cell: tuple[int, tuple[int, int]], made: Plan) -> bool:
    """Whether an earlier run has chosen a cell's scenes, none of which is to be left out now."""
    chosen = store.read_cell(f"utm{cell[0]}", cell[1], made.period)
    return chosen is not None and not {name for acquisition in chosen for name in acquisition} & set(
        made.options.exclude
    )


def _around(tiles: list[Grid]) -> Grid:
    """The smallest Grid that covers the cells of all tiles of one zone."""
    side = cell_side(tiles[0].resolution)
    left, right = min(t.cell[0] for t in tiles), max(t.cell[0] for t in tiles)
    bottom, top = min(t.cell[1] for t in tiles), max(t.cell[1] for t in tiles)
    height, width = (top - bottom + 1) * CHUNK, (right - left + 1) * CHUNK
    return Grid(tiles[0].epsg, left * side, (top + 1) * side, height, width, tiles[0].resolution)


def map_area(
    bbox: BBox,
    date: str | Period,
    out: str | Path,
    *,
    cluster: str | None = None,
    workers: int | None = None,
    client: Client | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Maps `bbox` for a date into the store `out`; returns the summary that `minemap map --json` prints.

    bbox: west south east north in degrees, west > east across the antimeridian. date: a year, a month, a day or
    start/end. cluster: None for this process, "local", "gpu" or a scheduler's address; client: a Dask client of
    yours instead. progress: called with the super-tiles done and their number. options: fields of `Options`.
    A second run goes on where a first one stopped. Raises subclasses of MinemapError.
    """
    start = time.monotonic()
    made = plan(bbox, date, out, **options)
    store = Store.at(out)
    with connect(cluster, workers) if client is None else nullcontext(client) as connected, store.locked():
        if connected is not None:
            check_workers(connected, store.meta, made.checkpoint)
        job = _job(made, store, _prepare(made, store), worker_count(connected))
        counts = run_tiles(made.work, job, connected, progress)
    return _summary(made, store, counts, time.monotonic() - start)


def _prepare(made: Plan, store: Store) -> dict[str, int]:
    """Makes the store or checks it again, adds zones and the period, freezes the choice of scenes."""
    o = made.options
    store.check(made.parameters, made.grids, overwrite=o.overwrite)
    if o.overwrite or not store.exists():
        store.create(_attributes(made))
    index = {}
    for grid in made.grids:
        store.add_zone(grid, o.chunk, made.checkpoint.recipe.bands if o.keep_composite else None)
        index[grid.group] = store.add_period(grid.group, made.period)
    store.consolidate()
    if made.items or not (store.meta / "items.json").exists():
        store.write_items([with_decision(item) for item in made.items])
    for (group, cell), acquisitions in made.cells.items():
        ids = [[item["id"] for item in a.items] for a in acquisitions]
        store.write_cell(group, cell, made.period, ids)
    if o.aoi:
        write_atomically(store.meta / AOI, load_aoi(o.aoi).wkt)
    return index


def _attributes(made: Plan) -> dict[str, Any]:
    return {
        "minemap": __version__,
        "model": made.checkpoint.recipe.name,
        "model_sha256": made.checkpoint.sha256,
        "recipe": json.loads(json.dumps(asdict(made.checkpoint.recipe))),
        "parameters": made.parameters,
        "parameters_hash": parameters_hash(made.parameters),
        "stac": made.source.url,
    }


def with_decision(item: Item) -> Item:
    decided = scaling(item)
    told = {"minemap:offset": decided.offset, "minemap:scale": decided.scale, "minemap:reason": decided.reason}
    return {**item, "properties": {**item["properties"], **told}}


def _job(made: Plan, store: Store, index: dict[str, int], sharing: int) -> Job:
    return Job(
        store=store.bound(),
        period=made.period,
        index=index,
        bbox=made.bbox,
        checkpoint=made.checkpoint,
        precision=made.settings.precision,
        sharing=sharing,
        rule=made.rule,
        access=Access.of(made.source),
        reader=made.options.reader,
        keep_composite=made.options.keep_composite,
        aoi=made.options.aoi is not None,
    )


def run_tiles(
    work: list[Work],
    job: Task,
    client: Client | None,
    progress: Callable[[int, int], None] | None,
) -> np.ndarray:
    """Makes every super-tile; returns what the job counts in each, float64 (tile, count).

    Those whose assets can't be read don't keep the others from being made: the ReadError comes at the end.
    """
    job.store.forget_failures()
    with _watched(work, job, progress):
        slices = [work[i : i + AT_ONCE] for i in range(0, len(work), AT_ONCE)]
        counts = np.concatenate([_compute(part, job, client) for part in slices])
    if failures := job.store.failures():
        others = ", the others are done" if len(failures) < len(work) else ""
        raise ReadError(
            f"{len(failures)} of {len(work)} super-tiles can't be read{others}: {failures[0]}; {UNREADABLE}"
        )
    return counts


def _compute(work: list[Work], job: Task, client: Client | None) -> np.ndarray:
    # Annotations are lost when tasks are fused
    with dask.config.set({"optimization.fuse.active": False}):
        if client is None:
            return graph(work, job).compute(scheduler="threads", num_workers=TASK_THREADS).values
        with dask.annotate(retries=RETRIES, resources=gpu_share(client)):
            counts = graph(work, job)
        with client.as_current(), _clear_losses(client, _places(work, job)):
            return counts.compute().values


@contextmanager
def _clear_losses(client: Client, places: list[str]) -> Iterator[None]:
    """What Dask raises when workers or the scheduler are gone, in one line."""
    from distributed import CancelledError, KilledWorker
    from distributed.comm import CommClosedError

    try:
        yield
    except KilledWorker as error:
        raise ClusterError(
            f"super-tile {_place(error.task, places)}: {error.allowed_failures + 1} workers died under it, the last "
            f"at {error.last_worker.address}; usually their memory is too small (minemap map --dry-run tells more). "
            "What is finished stays, the same command goes on"
        ) from error
    except (CancelledError, CommClosedError) as error:
        address = client.scheduler.address if client.scheduler else "the address given"
        raise ClusterError(
            f"the Dask scheduler at {address} went away; what is finished stays, the same command goes on"
        ) from error


def graph(work: list[Work], job: Task) -> xr.DataArray:
    """One task a super-tile through xarray.map_blocks: lazy counts of each, float64 (tile, count)."""
    rows = np.array([(w.tile.epsg, w.tile.left, w.tile.top, w.tile.height, *w.windows) for w in work])
    table = xr.DataArray(da.from_array(rows, chunks=(1, -1)), dims=("tile", "field"))
    template = xr.DataArray(da.zeros((len(work), len(job.counted)), chunks=(1, -1)), dims=("tile", "count"))
    counts = xr.map_blocks(_block, table, [job, work[0].tile.resolution], template=template)
    return counts.copy(data=_named(counts.data, _places(work, job)))


def _places(work: list[Work], job: Task) -> list[str]:
    """What people call each super-tile: ZONE-COLUMN_ROW, as its record in the ledger."""
    return [f"{w.tile.group}-{job.store.record_path(w.tile, job.period).stem}" for w in work]


def _place(task: Any, places: list[str]) -> str:
    """The super-tile of a task of the graph: `_named` ones say it, Dask's own are (NAME-TOKEN, i, 0)."""
    return places[task[1]] if isinstance(task, tuple) else task.removeprefix(f"{STAGE}-").rsplit("-", 1)[0]


def _named(counts: da.Array, places: list[str]) -> da.Array:
    """The same graph with tasks called supertile-ZONE-COLUMN_ROW-…, which dashboards and logs show."""
    graph: dict[Any, Any] = dict(counts.__dask_graph__())
    ours = [key for key in graph if key[0].startswith(_block.__name__)]  # map_blocks calls them (NAME-TOKEN, i, 0)
    if not all(isinstance(graph[key], tuple) for key in ours):
        return counts  # tasks of another form than xarray makes today keep the names that it gave
    names = {key: f"{STAGE}-{places[key[1]]}-{key[0].split('-')[-1]}" for key in ours}
    for key in ours:
        graph[names[key]] = graph.pop(key)
        taken = (counts.name, *key[1:])
        graph[taken] = tuple(names.get(part, part) if isinstance(part, tuple) else part for part in graph[taken])
    layers = HighLevelGraph.from_collections(counts.name, graph, dependencies=[])
    return da.Array(layers, counts.name, counts.chunks, counts.dtype)


def _block(row: xr.DataArray, job: Task, resolution: float) -> xr.DataArray:
    if not row.size:  # xarray tries a function on nothing
        return xr.DataArray(np.zeros((0, len(job.counted))), dims=("tile", "count"))
    epsg, left, top, side, *windows = row.values[0]
    tile = Grid(int(epsg), float(left), float(top), int(side), int(side), resolution)
    try:
        counts = job.make(Work(tile, tuple(int(n) for n in windows)))  # type: ignore[arg-type]
    except ReadError as error:
        job.store.keep_failure(tile, job.period, str(error))
        items = {text.partition(", asset ")[0] for text in job.store.failures()}
        if len(items) > FAILURES:  # a source that is away would take long to say so tile by tile
            raise ReadError(f"more than {FAILURES} items can't be read: {error}; {UNREADABLE}") from error
        counts = dict.fromkeys(job.counted, np.nan)
    return xr.DataArray(np.array([[counts[name] for name in job.counted]]), dims=("tile", "count"))


@contextmanager
def _watched(work: list[Work], job: Task, progress: Callable[[int, int], None] | None) -> Iterator[None]:
    """Calls `progress` as records appear in the ledger, which is the same for any kind of cluster."""
    if progress is None:
        yield
        return
    over = threading.Event()
    wanted = {job.store.record_path(w.tile, job.period) for w in work}
    folders = {path.parent for path in wanted}

    def look() -> None:
        done = {path for folder in folders if folder.exists() for path in folder.iterdir()}
        progress(len(wanted & done), len(wanted))

    def watch() -> None:
        start = time.monotonic()
        while not over.wait(max(0.5, 20 * (time.monotonic() - start))):  # listing takes a twentieth of our time
            start = time.monotonic()
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    look()


# --- one super-tile ---------------------------------------------------------------------------------------------


def make_tile(work: Work, job: Job) -> dict[str, float]:
    """Reads, composites, predicts and writes one super-tile, unless the ledger has it; returns its counts."""
    record = job.store.record(work.tile, job.period)
    index = job.index[work.tile.group]
    scenes = job.store.scenes_of(work.tile.group, work.tile.cell, job.period)
    if record is not None and _done(record, work, scenes):
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


def _done(record: dict[str, Any], work: Work, scenes: str) -> bool:
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


def read_image(inner: Grid, halo: int, how: Reading) -> tuple[np.ndarray, np.ndarray, list[str], dict[str, str]]:
    """The composite of a place within one cell, read from the source: what maps and training chips both see.

    Returns reflectance float32 (band, y + 2 halo, x + 2 halo), NaN where not observed; clear looks uint8 (y, x); the
    ids of the items that were read; and the offset decided for each, with its reason.
    """
    keep_freed_memory()
    seen = inner.buffered(halo)
    chosen = how.store.read_cell(inner.group, inner.cell, how.period)
    if chosen is None:
        raise StoreError(f"{how.store.meta} has lost the scenes of cell {inner.cell}: map it again with --refresh")
    items = [how.store.read_item(name) for acquisition in chosen for name in acquisition]
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
    core = slice(halo, -halo or None)
    return image, count[core, core], used, layers.attrs["offsets"]


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
    if path.exists():
        return Scaling(**json.loads(path.read_text()))
    key = asset_key(item, "blue")
    blue = read_overview(item["assets"][key]["href"], how.access) if key else np.zeros(0, np.uint16)
    if contradicts(said, blue):
        said = Scaling(0, said.scale, f"{said.reason}, but the pixels lie below the offset")
    write_atomically(path, json.dumps(asdict(said)))
    return said


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


# --- area of interest -------------------------------------------------------------------------------------------


def load_aoi(path: str | Path) -> shapely.Geometry:
    """The union of a vector file's polygons in degrees. Raises InputError."""
    return read_polygons(path, "aoi").union_all()


def read_polygons(path: str | Path, role: str, layer: str | None = None) -> geopandas.GeoSeries:
    """The valid polygons of a vector file in degrees, one a feature. Raises InputError, which names `role`."""
    polygons = read_shapes(path, role, layer).geometry
    polygons = polygons[polygons.geom_type.isin(["Polygon", "MultiPolygon"])].make_valid()
    mixed = polygons.geom_type == "GeometryCollection"
    polygons[mixed] = polygons[mixed].map(polygonal)
    polygons = polygons[polygons.geom_type.isin(["Polygon", "MultiPolygon"])]
    if polygons.is_empty.all():
        raise InputError(f"{role} {path} holds no polygons")
    return polygons


def polygonal(shape: shapely.Geometry) -> shapely.Geometry:
    """The polygons of a shape. Lines, which a spike becomes when it is made valid, have no area, but every pixel that
    they touch would count."""
    import shapely

    parts = shapely.get_parts(shapely.get_parts(shape))  # of the parts of a collection
    return shapely.union_all([part for part in parts if part.geom_type == "Polygon"])


def read_shapes(path: str | Path, role: str, layer: str | None = None) -> geopandas.GeoDataFrame:
    """The features of a vector file (GeoParquet by its ending) in degrees. Raises InputError, which names `role`.

    layer: of a file that has several.
    """
    import geopandas
    from pyogrio.errors import DataLayerError, DataSourceError

    read = geopandas.read_parquet if Path(path).suffix.lower() == ".parquet" else geopandas.read_file
    try:
        frame = read(path, **({"layer": layer} if layer else {}))
    except (DataSourceError, DataLayerError, OSError, ValueError) as error:
        raise InputError(f"{role} {path} can't be read as a vector file: {str(error).splitlines()[0]}") from error
    if not isinstance(frame, geopandas.GeoDataFrame):
        raise InputError(f"{role} {path} holds no geometries: give a vector file, such as GeoJSON or GeoPackage")
    if frame.crs is None:
        raise InputError(f"{role} {path} has no coordinate reference system: set one in the file")
    return frame.set_geometry(_in_degrees(frame.geometry))


def _in_degrees(shapes: geopandas.GeoSeries) -> geopandas.GeoSeries:
    """In degrees, each in one piece: what a projection holds across the antimeridian goes on past ±180."""
    import shapely
    from pyproj import Transformer

    degrees = shapes.to_crs(4326)
    west, _, east, _ = shapely.bounds(degrees.values).T
    wide = np.flatnonzero((east - west > 180) & shapes.crs.is_projected)
    to_degrees = Transformer.from_crs(shapes.crs, 4326, always_xy=True)
    for i in wide:
        left, bottom, right, top = shapes.iloc[i].bounds
        middle = to_degrees.transform((left + right) / 2, (bottom + top) / 2)[0]

        def unrolled(points: np.ndarray, middle: float = middle) -> np.ndarray:
            turns = np.rint((points[:, 0] - middle) / 360 * (1 - 1e-9))  # a map of the world keeps both its ends
            return np.column_stack([points[:, 0] - 360 * turns, points[:, 1]])

        degrees.iloc[i] = shapely.transform(degrees.iloc[i], unrolled)
    return degrees


def aoi_hash(path: str | Path | None) -> str | None:
    return parameters_hash({"aoi": load_aoi(path).wkt}) if path else None


def in_zone(area: shapely.Geometry, epsg: int) -> shapely.Geometry:
    """The part of an area (degrees) in and around a zone, in the zone's metres; may be empty.

    Clipped in degrees first: far from its zone a projection folds, and at the antimeridian the area goes on.
    """
    import geopandas
    import shapely
    from shapely.affinity import translate

    west = (epsg % 100) * 6 - 186
    around = shapely.box(west - 1, -90, west + 7, 90)
    parts = shapely.union_all([translate(area, dx).intersection(around) for dx in (-360, 0, 360)])
    return geopandas.GeoSeries([shapely.segmentize(polygonal(parts), 0.01)], crs=4326).to_crs(epsg).iloc[0]


def inside_aoi(grid: Grid, path: Path) -> np.ndarray:
    """Which pixel centres lie in the area kept in the file `path` (of the meta folder), bool (y, x)."""
    return inside(grid, _read_aoi(path, path.stat().st_mtime_ns, grid.epsg))


def inside(grid: Grid, area: shapely.Geometry) -> np.ndarray:
    """Which pixel centres lie in an area given in the zone's metres, bool (y, x)."""
    from rasterio.features import geometry_mask

    if area.is_empty:
        return np.zeros(grid.shape, bool)
    return geometry_mask([area], grid.shape, grid.transform, invert=True)


@lru_cache(maxsize=8)
def _read_aoi(path: Path, _version: int, epsg: int) -> shapely.Geometry:
    import shapely

    return in_zone(shapely.from_wkt(path.read_text()), epsg)


# --- what a run says at its end ---------------------------------------------------------------------------------


def _summary(made: Plan, store: Store, counts: np.ndarray, seconds: float) -> dict[str, Any]:
    total, observed, mine, computed = counts.sum(axis=0)
    records = [record for w in made.work if (record := store.record(w.tile, made.period)) is not None]
    return {
        "out": str(store.path),
        "date": str(made.period),
        "km2_total": round(float(total), 4),
        "km2_observed": round(float(observed), 4),
        "km2_not_observed": round(float(total - observed), 4),
        "km2_mine": round(float(mine), 4),
        "super_tiles": len(made.work),
        "super_tiles_done": len(records),
        "super_tiles_computed": int(computed),
        "items": len({item for record in records for item in record["items"]}),
        "seconds": round(seconds, 2),
        "zones": [grid.group for grid in made.grids],
        "model": made.checkpoint.recipe.name,
        "model_sha256": made.checkpoint.sha256,
        "precision": made.settings.precision,
    }
