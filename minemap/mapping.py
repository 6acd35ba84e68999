"""The main job, a box and a date to a map: what was planned is prepared, run and summed up."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import __version__
from .cluster import check_workers, connect, worker_count
from .files import write_atomically
from .grid import BBox
from .planning import Plan, holds_choice, plan
from .reader import Access
from .running import run_tiles
from .scenes import Period
from .store import Store, parameters_hash
from .supertile import Job, with_decision
from .vectors import AOI, load_aoi

if TYPE_CHECKING:
    from distributed import Client


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
    with connect(cluster, workers) if client is None else nullcontext(client) as connected, store.locked() as own:
        if connected is not None:
            check_workers(connected, store.meta, made.checkpoint)
        job = _job(made, own, _prepare(made, own), worker_count(connected))
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
    anew = o.refresh or o.overwrite
    for (group, cell), acquisitions in made.cells.items():
        if not anew and holds_choice(store, (int(group[3:]), cell), made):
            continue  # another run has chosen since we planned
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


def _job(made: Plan, store: Store, index: dict[str, int], sharing: int) -> Job:
    return Job(
        store=store.bound(),
        period=made.period,
        index=index,
        bbox=made.bbox,
        checkpoint=made.checkpoint,
        precision=made.settings.precision,
        sharing=sharing,
        rule=made.options.rule,
        access=Access.of(made.source),
        reader=made.options.reader,
        keep_composite=made.options.keep_composite,
        aoi=made.options.aoi is not None,
    )


def _summary(made: Plan, store: Store, counts: np.ndarray, seconds: float) -> dict[str, Any]:
    total, observed, mine, computed = counts.sum(axis=0)
    records = [record for record in store.records_of([w.tile for w in made.work], made.period) if record]
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
