"""What became mine and what ceased to be between two dates of a map: a store of change and a table of areas.

    change.zarr/utm32720/{change, first_year, y, x, spatial_ref}
    change.zarr.meta/{ledger/, lock}

Made like a map: one task a super-tile, data first, then its record, so that a run goes on where one stopped. A
record also holds a digest of the two records of the map that it was made from: what was mapped again since, or over
more windows, is made again.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlsplit

import numpy as np

from . import __version__
from .checkpoint import DEFAULT_CHANGE_MODEL, Checkpoint, load_model
from .cluster import check_workers, connect, worker_count
from .compositing import Rule
from .contents import choose_period, read_periods
from .errors import DamagedTileError, InputError, StoreError
from .files import TABLES, file_to_write, write_table
from .grid import WINDOW, Grid, pixel_area_km2
from .inference import NOT_OBSERVED, Settings, check_threshold, layout, mine_from, probability
from .reader import Access
from .running import run_tiles
from .scenes import SOURCES, Period, Source
from .scenes import source as source_named
from .sentinel2 import NODATA
from .store import Store, parameters_hash
from .supertile import Reading, Work, read_image
from .vectors import AOI, inside_aoi

if TYPE_CHECKING:
    import pandas as pd
    from distributed import Client

METHODS = ("maps", "minenetcd")
NEVER, BOTH, GAIN, LOSS = range(4)
CLASSES = ("never_km2", "both_km2", "gain_km2", "loss_km2", "not_observed_km2")
SERIES = 3  # periods of a zone from which it has a first year worth telling
SCALE = 10_000  # of a kept composite


@dataclass(frozen=True)
class Detector:
    """A network of change and how it is run. threshold: probability from which a pixel has changed, 0-1. readings: of
    both dates, for the images that the network sees. sharing: processes that share a machine's cores."""

    checkpoint: Checkpoint
    precision: str
    threshold: float
    readings: tuple[Reading, Reading]
    sharing: int = 1

    def __call__(self, work: Work) -> np.ndarray:
        """Gain above zero and loss below it, probabilities, float32 (y, x), NaN where neither date is observed."""
        both = [_image(work, layout(self.checkpoint).margin, how) for how in self.readings]
        settings = Settings.for_machine(self.precision, self.sharing)  # of the machine that computes
        return probability(np.concatenate(both), self.checkpoint, settings)


@dataclass(frozen=True)
class Comparison:
    """What every task of a run shares. store: of the change; map: what it is made from; period: from the first day
    of the earlier date to the last of the later. limit: whole per cent from which a pixel of a map is mine. detector:
    None to compare the two maps alone."""

    store: Store
    map: Store
    before: Period
    after: Period
    limit: int
    series: dict[str, list[Period]]  # group -> its periods, where they are enough for a first year
    detector: Detector | None = None

    counted: ClassVar[tuple[str, ...]] = (*CLASSES, "computed")

    @property
    def period(self) -> Period:
        return compared(self.before, self.after)

    def make(self, work: Work) -> dict[str, float]:
        """Compares one super-tile and writes it, unless the ledger has it; km² of each class."""
        source = self.source(work.tile)
        record = self.store.record(work.tile, self.period)
        if record is not None and record["source"] == source:
            with suppress(DamagedTileError):  # made again
                return {**self._kept(work, record), "computed": 0.0}
        layers = {"change": self.classes(work)}
        if periods := self.series.get(work.tile.group):
            layers["first_year"] = self.first_year(work.tile, periods)
        self.store.write_tile(work.tile, None, layers)
        counts = self.count(layers["change"], work)
        self.store.write_record(work.tile, self.period, {"windows": work.windows, "source": source, **counts})
        return {**counts, "computed": 1.0}

    def _kept(self, work: Work, record: dict[str, Any]) -> dict[str, float]:
        """The counts of a finished super-tile. Raises DamagedTileError where its layers are not what they were."""
        classes = self.store.read_tile(work.tile, None, "change")
        counts = self.count(classes, work)
        lost = any(not math.isclose(counts[name], record[name], abs_tol=1e-9) for name in CLASSES)
        if work.tile.group in self.series:
            years = self.store.read_tile(work.tile, None, "first_year")
            lost |= not years.any() and bool(np.isin(classes, (BOTH, GAIN, LOSS)).any())
        if lost:
            raise DamagedTileError("a super-tile is not what its record says")
        return counts

    def source(self, tile: Grid) -> str:
        """A digest of the map's records that the super-tile's answer depends on."""
        periods = [self.before, self.after, *self.series.get(tile.group, [])]
        records = [self.map.record(tile, period) for period in periods]
        if self.detector is not None:  # it looks over the edge
            records += [self.map.record(near, period) for near in _around(tile) for period in periods[:2]]
        return hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()

    def classes(self, work: Work) -> np.ndarray:
        """Class of each pixel of a super-tile, uint8 (y, x)."""
        before, after = read_periods(self.map, work.tile, [self.before, self.after])
        if self.detector is None:
            return compare(before, after, self.limit)
        inner, out = work.inner, np.full(work.tile.shape, NOT_OBSERVED, np.uint8)
        row, column = inner.offset_in(work.tile)
        part = slice(row, row + inner.height), slice(column, column + inner.width)
        out[part] = detect(before[part], after[part], self.detector(work), self.limit, self.detector.threshold)
        return out

    def first_year(self, tile: Grid, periods: list[Period]) -> np.ndarray:
        """First year seen as mine, uint16 (y, x). One period is held at a time."""
        found = np.zeros(tile.shape, np.uint16)
        for period in periods:
            mine = as_mine(read_periods(self.map, tile, [period]), self.limit)
            found = np.where(found == 0, first_year(mine, [period.start.year]), found)
        return found

    def count(self, classes: np.ndarray, work: Work) -> dict[str, float]:
        """km² on the ellipsoid of each class, within the windows, the zone and the area of interest of the map."""
        inner = work.inner
        row, column = inner.offset_in(work.tile)
        asked = inner.owned()
        if (self.map.meta / AOI).exists():
            asked &= inside_aoi(inner, self.map.meta / AOI)
        area, found = pixel_area_km2(inner), classes[row : row + inner.height, column : column + inner.width]
        values = (NEVER, BOTH, GAIN, LOSS, NOT_OBSERVED)
        return {name: float(area[asked & (found == v)].sum()) for name, v in zip(CLASSES, values, strict=True)}


def compared(before: Period, after: Period) -> Period:
    """The period under which a comparison is recorded."""
    return Period(before.start, after.end)


def compare(before: np.ndarray, after: np.ndarray, limit: int) -> np.ndarray:
    """Classes of change from two maps, uint8: 0 never mine, 1 mine at both, 2 gain, 3 loss, 255 where
    either is not observed.

    before, after: whole per cent, uint8, 255 = not observed. limit: the per cent from which a pixel is mine.
    """
    was, now = before >= limit, after >= limit
    classes = np.select([was & now, now, was], [BOTH, GAIN, LOSS], NEVER)
    unseen = (before == NOT_OBSERVED) | (after == NOT_OBSERVED)
    return np.where(unseen, NOT_OBSERVED, classes).astype(np.uint8)


def detect(before: np.ndarray, after: np.ndarray, signed: np.ndarray, limit: int, threshold: float) -> np.ndarray:
    """The same classes with gain and loss from a network: float32 (y, x), probability of gain, of loss below zero.

    Where it sees no change a pixel has one state, which the mean of both maps decides.
    """
    mine = before.astype(np.uint16) + after >= 2 * limit
    classes = np.select([signed >= threshold, signed <= -threshold, mine], [GAIN, LOSS, BOTH], NEVER)
    unseen = (before == NOT_OBSERVED) | (after == NOT_OBSERVED) | np.isnan(signed)
    return np.where(unseen, NOT_OBSERVED, classes).astype(np.uint8)


def _image(work: Work, margin: int, how: Reading) -> np.ndarray:
    """The composite of a place, float32 (band, y + 2 margin, x + 2 margin), NaN where it is not observed.

    Read from the source, or as the map has kept it where that is the same, so that a pixel of change does not depend
    on the box that was mapped: a composite is kept rounded, and so is what is read.
    """
    seen = work.inner.buffered(margin)
    kept = how.store.kept_bands(seen.group) or []
    if sorted(how.bands) == sorted(kept) and _is_kept(seen, work.tile, how):
        index = how.store.periods(seen.group).index(how.period)
        stored = how.store.read_tile(seen, index, "composite")[[kept.index(band) for band in how.bands]]
    else:
        image, *_ = read_image(work.inner, margin, how)
        stored = np.nan_to_num(np.rint(image * SCALE), nan=NODATA).astype(np.uint16)
    return np.where(stored == NODATA, np.float32(np.nan), stored / np.float32(SCALE))


def _is_kept(seen: Grid, tile: Grid, how: Reading) -> bool:
    """Whether all that is seen around a super-tile was mapped, and from the scenes of the super-tile's own cell.

    Mapped: in windows that the ledger tells of, in the zone's own pixels and, where the map has one, within its area
    of interest.
    """
    store, period = how.store, how.period
    scenes, mapped = store.scenes_of(tile.group, tile.cell, period), np.zeros(seen.shape, bool)
    for near in _around(tile):
        record = store.record(near, period)
        if record is None or record.get("scenes") != scenes:
            continue
        row, column = near.offset_in(seen)
        top, bottom, left, right = (n * WINDOW for n in record["windows"])
        top, bottom, left, right = (max(0, n) for n in (row + top, row + bottom, column + left, column + right))
        mapped[top:bottom, left:right] = True
    if (store.meta / AOI).exists():
        mapped &= inside_aoi(seen, store.meta / AOI)
    return bool((mapped & seen.owned()).all())


def _around(tile: Grid) -> list[Grid]:
    """A super-tile and those that it touches."""
    sides = [(y * tile.height, x * tile.width) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    return [tile.window(*side, tile.height, tile.width) for side in sides]


def as_mine(percent: np.ndarray, limit: int) -> np.ndarray:
    """1 mine, 0 not, 255 not observed, uint8."""
    return np.where(percent == NOT_OBSERVED, NOT_OBSERVED, percent >= limit).astype(np.uint8)


def first_year(mine: np.ndarray, years: Sequence[int]) -> np.ndarray:
    """The first of `years` in which a pixel was mine, uint16 (y, x), 0 = never.

    mine: uint8 (year, y, x), 1 mine, 0 not, 255 not observed, in order of `years`. What was mine in the first year
    may be older. A year that was not observed is skipped: the year is then the first in which the mine was seen.
    """
    is_mine = np.asarray(mine) == 1
    return np.where(is_mine.any(axis=0), np.asarray(years, np.uint16)[is_mine.argmax(axis=0)], 0).astype(np.uint16)


def change(
    path: str | Path,
    *,
    before: str | Period,
    after: str | Period,
    out: str | Path,
    method: str = "maps",
    model: str | Path | None = None,
    table: str | Path | None = None,
    threshold: float | None = None,
    overwrite: bool = False,
    cluster: str | None = None,
    workers: int | None = None,
    client: Client | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Compares two periods of the map `path` into the store `out`; returns what `minemap change --json` prints.

    before, after: two of the map's periods, as its dates were given. method: "maps", two maps thresholded, or
    "minenetcd", a network that sees both composites: read again from the scenes that the map froze, or as the map has
    kept them (keep_composite) where it has all that the network sees. model: of "minenetcd", a name or path. table:
    a .csv or .parquet file of areas to write. threshold: probability from which a pixel is mine ("maps") or has
    changed ("minenetcd"), 0-1; the model's own when None. cluster, workers, client, progress: as of `map_area`. A
    second run goes on where a first one stopped, also when the map has more periods by then.

    The store has a group for each zone of the map: `change` uint8 (y, x), 0 never mine, 1 mine at both dates, 2 gain,
    3 loss, 255 not observed at one of them or both; and `first_year` uint16 (y, x), 0 = never, where the map has at
    least three periods. Raises subclasses of MinemapError.
    """
    start = time.monotonic()
    plan = Plan.of(path, before, after, out, method=method, model=model, table=table, threshold=threshold)
    store = plan.job.store
    store.check(plan.parameters, plan.grids, overwrite=overwrite)
    with connect(cluster, workers) if client is None else nullcontext(client) as connected, store.locked() as own:
        plan = replace(plan, job=replace(plan.job, store=own))
        if connected is not None:
            check_workers(connected, store.meta, plan.job.detector.checkpoint if plan.job.detector else None)
        plan.prepare(overwrite=overwrite)
        job = plan.shared_by(worker_count(connected))
        counts = run_tiles(plan.work, job, connected, progress)
    frame = area_table(plan, counts)
    if plan.table is not None:
        write_table(frame, plan.table)
    return _summary(plan, frame, counts, time.monotonic() - start)


@dataclass(frozen=True)
class Plan:
    """What a run will do, checked before anything is written."""

    job: Comparison
    method: str
    threshold: float
    table: Path | None
    work: list[Work]

    @staticmethod
    def of(
        path: str | Path,
        before: str | Period,
        after: str | Period,
        out: str | Path,
        *,
        method: str,
        model: str | Path | None,
        table: str | Path | None,
        threshold: float | None,
    ) -> Plan:
        if method not in METHODS:
            raise InputError(f"unknown method {method!r}: give one of {', '.join(METHODS)}")
        if threshold is not None:
            check_threshold(threshold)
        target = file_to_write(table, TABLES, "table") if table is not None else None
        source, store = Store.at(path), Store.at(out, "change")
        about = source.attributes()
        first, second = choose_period(source, before), choose_period(source, after)
        if first.end >= second.start:
            raise InputError(f"before ({first}) must end earlier than after ({second}) starts: choose other dates")
        work = _common_work(source, first, second)
        limit = about["recipe"]["threshold"]
        if method == "minenetcd":
            detector = _detector(source, (first, second), model, threshold)
            job = Comparison(store, source, first, second, mine_from(limit), _series(source), detector)
            return Plan(job, method, detector.threshold, target, work)
        if model is not None:
            raise InputError(f"model {model} is for method minenetcd: two maps are compared without one")
        limit = limit if threshold is None else threshold
        job = Comparison(store, source, first, second, mine_from(limit), _series(source))
        return Plan(job, method, limit, target, work)

    def shared_by(self, processes: int) -> Comparison:
        """The job for one of so many processes on a machine's cores."""
        detector = self.job.detector and replace(self.job.detector, sharing=processes)
        return replace(self.job, store=self.job.store.bound(), detector=detector)

    @cached_property
    def about(self) -> dict[str, Any]:
        """The map's attributes."""
        return self.job.map.attributes()

    @cached_property
    def grids(self) -> list[Grid]:
        """What the map covers, of the zones that have something to compare."""
        return [self.job.map.grid(group) for group in sorted({w.tile.group for w in self.work})]

    @property
    def parameters(self) -> dict[str, Any]:
        """What identifies a result."""
        detector = self.job.detector
        return {
            "method": self.method,
            "change_model": detector and detector.checkpoint.recipe.name,
            "change_model_sha256": detector and detector.checkpoint.sha256,
            "precision": detector and detector.precision,
            "before": str(self.job.before),
            "after": str(self.job.after),
            "threshold": self.threshold,
            "map_parameters_hash": parameters_hash(self.about["parameters"]),
            "chunk": self.about["parameters"]["chunk"],
        }

    def prepare(self, *, overwrite: bool) -> None:
        """Makes the store, or checks it again, and adds its zones."""
        store = self.job.store
        store.check(self.parameters, self.grids, overwrite=overwrite)
        if overwrite or not store.exists():
            store.create(self._attributes())
        for grid in self.grids:
            first = grid.group in self.job.series
            if (store.path / grid.group / "first_year").exists() != first:  # the map has other years now: all is new
                store.remove_zone(grid.group)
            store.add_change_zone(grid, self.parameters["chunk"], first_year=first)
        store.consolidate()

    def _attributes(self) -> dict[str, Any]:
        return {
            "minemap": __version__,
            "map": str(self.job.map.path),
            "model": self.about["model"],
            "model_sha256": self.about["model_sha256"],
            "parameters": self.parameters,
            "parameters_hash": parameters_hash(self.parameters),
        }


def _detector(
    source: Store, periods: tuple[Period, Period], model: str | Path | None, threshold: float | None
) -> Detector:
    checkpoint = load_model(DEFAULT_CHANGE_MODEL if model is None else model)
    recipe, parameters = checkpoint.recipe, source.attributes()["parameters"]
    if recipe.dates != 2:
        raise InputError(f"model {recipe.name} looks at one date: give one of change, as {DEFAULT_CHANGE_MODEL}")
    if recipe.resolution != parameters["resolution"]:
        said = (
            f"model {recipe.name} was trained at {recipe.resolution:g} m, the map has {parameters['resolution']:g} m"
        )
        warnings.warn(f"{said}: how good its changes are is not known", stacklevel=4)
    before, after = (_reading(source, period, recipe.bands) for period in periods)
    limit = recipe.threshold if threshold is None else threshold
    return Detector(checkpoint, parameters["precision"], limit, (before, after))


def _reading(store: Store, period: Period, bands: tuple[str, ...]) -> Reading:
    """How the map itself read its images, from what it keeps of its parameters."""
    p = store.attributes()["parameters"]
    local = urlsplit(p["source"]).scheme not in ("http", "https")
    names = {source_named(name).url: name for name in SOURCES}  # maps keep the address, the name says who signs
    where = Source(names.get(p["source"], p["source"]), p["source"], p["collection"], is_file=local)
    rule = Rule(**{**p["composite"], "masked": tuple(p["composite"]["masked"])})
    return Reading(store, period, bands, rule, Access.of(where), p["reader"])


def _series(source: Store) -> dict[str, list[Period]]:
    """Group -> periods in order of time, of the zones that have a series."""
    found = {group: sorted(source.periods(group), key=lambda p: (p.start, p.end)) for group in source.groups()}
    return {group: periods for group, periods in found.items() if len(periods) >= SERIES}


def _common_work(source: Store, before: Period, after: Period) -> list[Work]:
    """The super-tiles that are mapped at both dates, with the windows that both have."""
    tiles = [tile for group in source.groups() for tile in source.done(group, before)]
    both = ((tile, _common_windows(source, tile, before, after)) for tile in tiles)
    found = [Work(tile, windows) for tile, windows in both if windows]
    if not found:
        lost = "" if source.meta.is_dir() else f" (the folder {source.meta.name}, which says so, is not beside it)"
        raise StoreError(f"{source.path} has no place mapped at both {before} and {after}{lost}: map one first")
    return found


def _common_windows(source: Store, tile: Grid, *periods: Period) -> tuple[int, int, int, int] | None:
    records = [source.record(tile, period) for period in periods]
    if any(record is None for record in records):
        return None
    bounds = np.array([record["windows"] for record in records if record])
    (top, left), (bottom, right) = bounds[:, ::2].max(axis=0), bounds[:, 1::2].min(axis=0)
    return (int(top), int(bottom), int(left), int(right)) if top < bottom and left < right else None


# --- tables and words -------------------------------------------------------------------------------------------


def area_table(plan: Plan, counts: np.ndarray) -> pd.DataFrame:
    """A row for each zone and one for all, "total": km² on the ellipsoid of each class, and the share of the area
    mapped at both dates that was observed at both. counts: float64 (super-tile, CLASSES and computed)."""
    import pandas as pd

    groups = np.array([w.tile.group for w in plan.work])
    sums = {group: counts[groups == group].sum(axis=0) for group in np.unique(groups).tolist()}
    sums["total"] = counts.sum(axis=0)
    return pd.DataFrame([_row(plan, zone, total[: len(CLASSES)]) for zone, total in sums.items()])


def _row(plan: Plan, zone: str, areas: np.ndarray) -> dict[str, Any]:
    named = dict(zip(CLASSES, areas.tolist(), strict=True))
    return {
        "zone": zone,
        "before": str(plan.job.before),
        "after": str(plan.job.after),
        **named,
        "common_observed_fraction": 1 - named["not_observed_km2"] / areas.sum() if areas.sum() else 0.0,
    }


def _summary(plan: Plan, frame: pd.DataFrame, counts: np.ndarray, seconds: float) -> dict[str, Any]:
    total = frame.iloc[-1].to_dict()
    return {
        "out": str(plan.job.store.path),
        "table": str(plan.table) if plan.table else None,
        "method": plan.method,
        "before": total["before"],
        "after": total["after"],
        "threshold": plan.threshold,
        **{f"km2_{name.removesuffix('_km2')}": round(total[name], 4) for name in CLASSES},
        "common_observed_fraction": round(total["common_observed_fraction"], 6),
        "super_tiles": len(plan.work),
        "super_tiles_computed": int(counts[:, -1].sum()),
        "zones": [grid.group for grid in plan.grids],
        "seconds": round(seconds, 2),
    }


def told(s: dict[str, Any]) -> str:
    """The summary as text."""
    return (
        f"{s['out']}: from {s['before']} to {s['after']}, {s['km2_gain']:,.2f} km² gained, {s['km2_loss']:,.2f} km² "
        f"lost, {s['km2_both']:,.2f} km² mine at both dates, {s['common_observed_fraction']:.1%} observed at both"
    )
