"""A run over super-tiles: one Dask task each, here or on a cluster; what it tells meanwhile, and when it fails."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import dask
import dask.array as da
import numpy as np
import xarray as xr
from dask.highlevelgraph import HighLevelGraph

from .cluster import TASK_THREADS, check_versions, gpu_share, has_workers, lost_scheduler, versions
from .errors import ClusterError, ReadError
from .grid import Grid
from .scenes import Period
from .store import Store
from .supertile import Work

if TYPE_CHECKING:
    from distributed import Client

log = logging.getLogger("minemap")
RETRIES = 3  # times that a task which failed starts again, where there are workers
FAILURES = 8  # items that may be unreadable before a run is given up; one covers 30 super-tiles
UNREADABLE = "the same command tries again, a map or a series with --exclude ID leaves an item out"
STAGE = "supertile"  # what dashboards call the tasks
ALONE = 60  # seconds without a worker until we say so
AT_ONCE = 10_000  # super-tiles a graph; as many more follow when these are done


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
    with _watched(work, job, client, progress):
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
        with client.as_current(), lost_scheduler(client), _clear_losses(_places(work, job)):
            return counts.compute().values


@contextmanager
def _clear_losses(places: list[str]) -> Iterator[None]:
    """What Dask raises when workers die under a task, in one line."""
    from distributed import KilledWorker

    try:
        yield
    except KilledWorker as error:
        raise ClusterError(
            f"super-tile {_place(error.task, places)}: {error.allowed_failures + 1} workers died under it, the last "
            f"at {error.last_worker.address}; usually their memory is too small (minemap map --dry-run tells more). "
            "What is finished stays, the same command goes on"
        ) from error


def graph(work: list[Work], job: Task) -> xr.DataArray:
    """One task a super-tile through xarray.map_blocks: lazy counts of each, float64 (tile, count)."""
    rows = np.array([(w.tile.epsg, w.tile.left, w.tile.top, w.tile.height, *w.windows) for w in work])
    table = xr.DataArray(da.from_array(rows, chunks=(1, -1)), dims=("tile", "field"))
    template = xr.DataArray(da.zeros((len(work), len(job.counted)), chunks=(1, -1)), dims=("tile", "count"))
    counts = xr.map_blocks(_block, table, [job, work[0].tile.resolution, versions()], template=template)
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


def _block(row: xr.DataArray, job: Task, resolution: float, wanted: tuple[tuple[str, str], ...]) -> xr.DataArray:
    if not row.size:  # xarray tries a function on nothing
        return xr.DataArray(np.zeros((0, len(job.counted))), dims=("tile", "count"))
    check_versions(wanted)
    epsg, left, top, side, *windows = row.values[0]
    tile = Grid(int(epsg), float(left), float(top), int(side), int(side), resolution)
    try:
        counts = job.make(Work(tile, tuple(int(n) for n in windows)))  # type: ignore[arg-type]
        job.store.forget_failure(tile, job.period)  # of a worker that has died since
    except ReadError as error:
        job.store.keep_failure(tile, job.period, str(error))
        items = {text.partition(", asset ")[0] for text in job.store.failures()}
        if len(items) > FAILURES:  # a source that is away would take long to say so tile by tile
            raise ReadError(f"more than {FAILURES} items can't be read: {error}; {UNREADABLE}") from error
        counts = dict.fromkeys(job.counted, np.nan)
    return xr.DataArray(np.array([[counts[name] for name in job.counted]]), dims=("tile", "count"))


@contextmanager
def _watched(
    work: list[Work], job: Task, client: Client | None, progress: Callable[[int, int], None] | None
) -> Iterator[None]:
    """Calls `progress` as records appear in the ledger, which is the same for any kind of cluster; says so when all
    workers have been away for a while."""
    if progress is None and client is None:
        yield
        return
    over = threading.Event()
    wanted = {job.store.record_path(w.tile, job.period) for w in work}
    folders = {path.parent for path in wanted}

    def look() -> None:
        if progress is None:
            return
        try:
            done = {path for folder in folders for path in folder.glob("[!.]*.json")}
        except Exception:  # a listing that fails must not end the run that it tells of
            return
        progress(len(wanted & done), len(wanted))

    def watch() -> None:
        start = since = time.monotonic()
        while not over.wait(max(0.5, 20 * (time.monotonic() - start))):  # listing takes a twentieth of our time
            start = time.monotonic()
            look()
            since = start if has_workers(client) else since
            if start - since > ALONE:
                log.warning("no worker is left: start some, or stop this run; what is finished stays")
                since = start

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=5)  # it may be asking a scheduler that no longer answers
    look()
