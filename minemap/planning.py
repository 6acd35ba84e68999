"""What a run would do, decided before the first pixel is read: where, from which scenes, by which model."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint import Checkpoint, load_model
from .compositing import Rule
from .cube import READERS
from .errors import InputError, NoItemsError
from .grid import CHUNK, CHUNKS, WINDOW, BBox, Grid, cell_side, check_bbox, grids, wanted_tiles
from .inference import Settings, one_date
from .scenes import (
    MARGIN,
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
from .sensors import Sensor, asset_key
from .sentinel2 import SCL, SCL_MASKED, Item
from .store import Store, parameters_hash
from .supertile import Work, done
from .tiles import Layout
from .vectors import in_zone, load_aoi
from .water import BODY_HA, UNLIKELY

if TYPE_CHECKING:
    import shapely

log = logging.getLogger("minemap")
FEW = 3  # zones that are searched without a word


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
    months: str | int | Sequence[int] | None = None
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
            if not isinstance(values := getattr(self, name), list | tuple | set | frozenset):
                raise InputError(f"{name} is {values!r}: give a tuple, of ids or of SCL classes")
            plain = tuple(int(value) if isinstance(value, Integral) else value for value in values)
            object.__setattr__(self, name, plain)
        for name, of, kind, what in (
            ("chunk", Integral, int, "a whole number"),
            ("max_scenes", Integral, int, "a whole number"),
            ("min_clear", Integral, int, "a whole number"),
            ("max_cloud", Real, float, "a percentage, 0 to 100"),
        ):
            if not isinstance(getattr(self, name), of):
                raise InputError(f"{name} is {getattr(self, name)!r}: give {what}")
            object.__setattr__(self, name, kind(getattr(self, name)))  # numpy's have no JSON
        _ = self.rule  # says what its classes and looks may be
        if not 0 <= self.max_cloud <= 100:
            raise InputError(f"max_cloud is {self.max_cloud:g}: it is a percentage, 0 to 100")
        if self.max_scenes < max(1, self.min_clear):
            raise InputError(
                f"max_scenes is {self.max_scenes}, and a pixel needs {self.min_clear} clear looks (min_clear): with "
                "fewer acquisitions nothing would be observed"
            )

    @property
    def rule(self) -> Rule:
        return Rule(masked=self.masked, min_clear=self.min_clear, rescue=self.rescue)

    @staticmethod
    def named(options: dict[str, Any]) -> Options:
        """From keywords; InputError names an unknown one."""
        known = [f.name for f in fields(Options)]
        for name in options:
            if name not in known:
                raise InputError(f"unknown option {name!r}: known are {', '.join(known)}")
        return Options(**options)


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
        return {w: r for w, r in records.items() if r and done(r, w, scenes[w.tile.group, w.tile.cell])}

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
            "composite": o.rule.as_dict(),
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
    recipe = checkpoint.recipe
    if recipe.window != WINDOW or Layout(recipe.window, recipe.halo).margin > MARGIN:
        has = f"windows of {recipe.window} px with a halo of {recipe.halo}"
        raise InputError(f"model {recipe.name} has {has}: maps take {WINDOW} and at most {MARGIN - WINDOW // 2}")
    store = Store.at(out) if out is not None else None
    settings = Settings.for_machine(o.precision or _stored_precision(store, o))
    limits = [shape for shape in (area, o.near) if shape is not None]
    covered = grids(box, o.chunk, resolution=sensor.resolution)
    work = [w for grid in covered for w in _wanted(grid, box, limits, o)]
    if not work:
        asked = f"bbox {' '.join(map(str, box))}"
        if limits:
            limit = f"aoi {o.aoi}" if o.aoi else "the sites"
            raise InputError(f"{limit} and {asked} have no pixel of {sensor.resolution:g} m in common")
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
    return _with_scenes(made)


def _stored_precision(store: Store | None, options: Options) -> str | None:
    """A map goes on at the precision that it was begun with, also on another kind of processor."""
    if store is None or options.overwrite or not store.exists():
        return None
    return store.attributes()["parameters"]["precision"]


def _wanted(grid: Grid, bbox: BBox, limits: list[shapely.Geometry], options: Options) -> Iterator[Work]:
    import shapely

    within = [in_zone(area, grid.epsg) for area in limits]
    side = options.chunk // WINDOW
    for tile, windows in wanted_tiles(grid, options.chunk, bbox):
        if all(area.intersects(shapely.box(*tile.bounds)) for area in within):
            yield Work(tile, windows if options.extent == "bbox" else (0, side, 0, side))


def _with_scenes(made: Plan) -> Plan:
    """The plan with scenes chosen for each cell whose choice is not frozen yet."""
    o, store = made.options, made.store
    use_frozen = store is not None and store.exists() and not o.refresh and not o.overwrite
    cells = {(w.tile.epsg, w.tile.cell) for w in made.work}
    frozen = {c for c in cells if use_frozen and store and holds_choice(store, c, made)}
    chosen: dict[tuple[str, tuple[int, int]], list[Acquisition]] = {}
    empty: list[NoItemsError] = []
    searched = sorted({epsg for epsg, _ in cells - frozen})
    for n, epsg in enumerate(searched, 1):
        if len(searched) > FEW:
            log.info("searching %s of %s, zone %d of %d", made.period, f"utm{epsg}", n, len(searched))
        zone = [w.tile for w in made.work if w.tile.epsg == epsg and (epsg, w.tile.cell) not in frozen]
        try:
            items = search(
                search_area(_around(zone)),
                made.period,
                stac=made.source,
                max_cloud=o.max_cloud,
                months=parse_months(o.months),
                exclude=o.exclude,
                versions=True,
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
    planned = replace(made, cells=chosen, frozen=len(frozen))
    if empty and not planned.items and not frozen:
        raise empty[0]
    for told in _doubts(planned, empty):
        warnings.warn(told, stacklevel=3)  # who called plan()
    return planned


def _doubts(planned: Plan, empty: list[NoItemsError]) -> Iterator[str]:
    """What of the box will stay unobserved, or be worse than asked for, by the scenes that were found."""
    items, least = planned.items, planned.options.min_clear
    if empty:
        more = f" (and so in {len(empty) - 1} more of its zones)" if len(empty) > 1 else ""
        across = "; W > E crosses the antimeridian" if len(empty) > 1 and planned.bbox[0] > planned.bbox[2] else ""
        yield f"part of the box stays unobserved{more}{across}: {empty[0]}"
    most = max(map(len, planned.cells.values()), default=least)
    if 0 < most < least:
        few = f"no place has more than {most} of the {least} acquisitions that a pixel needs (--min-clear)"
        yield f"{few}: nothing will be observed; give a longer period, or a smaller number"
    for band in planned.checkpoint.recipe.bands:
        lack = sum(asset_key(item, band) is None for item in items)
        if 0 < lack < len(items):
            told = f"{lack} of {len(items)} items have no {band}: a pixel counts its looks in every band"
            yield f"{told}; --exclude ID leaves an item out"
    blind = sum(asset_key(item, SCL) is None for item in items)
    if blind:
        yield f"{blind} of {len(items)} items have no {planned.sensor.quality}: their clouds are not masked"


def holds_choice(store: Store, cell: tuple[int, tuple[int, int]], made: Plan) -> bool:
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


def aoi_hash(path: str | Path | None) -> str | None:
    return parameters_hash({"aoi": load_aoi(path).wkt}) if path else None
