"""The Zarr v3 store of a map: writes of whole shards, the ledger, the frozen scenes, and reading it back.

    map.zarr/utm32720/...    a group a zone, see zones.py
    map.zarr.meta/{items.json, items/, cells/, ledger/, offsets/, failed/, lock, making, run}

A super-tile is one shard, written by one task: data first, then its record in the ledger. What has no record was
never finished, whatever the arrays hold. The store is made in a temporary folder and renamed, so it is whole or not
there. The meta folder lies beside the store because Zarr warns of foreign folders inside it. In object storage the
same names are keys; places.py tells what differs there.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import numpy as np
import rioxarray  # noqa: F401 (registers the .rio accessor)
import xarray as xr
import zarr
from filelock import FileLock, Timeout

from . import zones
from .errors import DamagedTileError, InputError, StoreError
from .files import check_outside, file_name, parse, read_json, write_atomically
from .grid import WINDOW, Grid
from .places import (
    Place,
    check_reachable,
    check_writable,
    for_zarr,
    make_folder,
    move,
    place_of,
    read,
    read_all,
    remove,
)
from .scenes import Period
from .sentinel2 import Item
from .zones import CHANGE_LAYERS, CONSISTENT, QUICKLOOK

VERSION = 1  # of the layout
MAKING = "making"  # file in the meta folder: a name that no other making of a store has
RUN = "run"  # the same for the run that took the lock last
KINDS = ("map", "change")
LAYERS = ("probability", CONSISTENT, "observations", "quicklook", "composite")


def parameters_hash(parameters: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Store:
    """A map on disk or in object storage, or a map of change. Cheap to make and to send: it holds names only.

    making, run: the making of the store (see `create`) and the run (see `locked`) that a task belongs to. A task of
    an earlier run that nobody could stop can then no longer write, and its records count in no store but its own.
    """

    path: Place
    kind: str = "map"  # or "change"
    making: str | None = None
    run: str | None = None

    @staticmethod
    def at(out: str | Place, kind: str = "map") -> Store:
        """The store of a name as a user gives it: a path, or an address in object storage. Raises InputError,
        StoreError where object storage does not answer."""
        place = place_of(out)
        if not place.name:
            raise InputError(f"output {out} has no name: give the name of a store")
        check_reachable(place)
        return Store(place, kind)

    @staticmethod
    def opened(path: str | Place) -> Store:
        """A store that is there, of whichever kind. Raises StoreError."""
        store = Store.at(path)
        kind = store._attributes().get("minemap:kind", "map")
        if kind not in KINDS:
            raise StoreError(f"{store.path} is a store of kind {kind!r}, which this minemap doesn't know")
        return replace(store, kind=kind)

    @property
    def meta(self) -> Place:
        return self.path.with_name(self.path.name + ".meta")

    # --- making and checking ------------------------------------------------------------------------------------

    def exists(self) -> bool:
        return self.path.exists() or self.path.is_symlink()

    def attributes(self) -> dict[str, Any]:
        """The root's attributes; StoreError when what is there is not a store of ours and of our kind."""
        attributes = self._attributes()
        kind = attributes.get("minemap:kind", "map")
        if kind != self.kind:
            raise StoreError(f"{self.path} is a store of kind {kind!r}, not {self.kind!r}: give another")
        return attributes

    def _attributes(self) -> dict[str, Any]:
        try:
            attributes = dict(zarr.open_group(for_zarr(self.path), mode="r").attrs)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{self.path} is not a minemap store: {_reason(self.path)}") from error
        if not {"minemap:layout", "parameters"} <= attributes.keys():
            raise StoreError(f"{self.path} is a Zarr store, but not one of minemap; choose another output")
        if (layout := attributes["minemap:layout"]) != VERSION:
            raise StoreError(f"{self.path} has layout {layout}, this minemap knows {VERSION}: use that which made it")
        return attributes

    def check(self, parameters: dict[str, Any], grids: list[Grid], *, overwrite: bool = False) -> None:
        """Whether a run with `parameters` over `grids` may write here; touches nothing. Raises StoreError."""
        if self.meta.exists() and not self.meta.is_dir():
            raise StoreError(f"{self.meta} is a file, and the folder beside the store: choose another output")
        check_outside(self.path)
        stored = self.attributes() if self.exists() else None
        check_writable(self.path)
        if stored is None or overwrite:
            return
        if not any((self.meta / name).exists() for name in (MAKING, "cells", "ledger")):
            raise StoreError(
                f"{self.path} has lost {self.meta.name}, which tells what of it is done: put it beside the store "
                "again, choose another output, or --overwrite"
            )
        if difference := _first_difference(stored["parameters"], parameters):
            name, was, value = difference
            raise StoreError(
                f"{self.path} was made with {name} = {_short(was)}, this run has {_short(value)}: use the same, "
                "another output, or --overwrite"
            )
        present = set(self.groups())
        for grid in grids:
            if grid.group in present and not self.grid(grid.group).covers(grid):
                raise StoreError(
                    f"{self.path} covers another area of {grid.group}: give the same bbox and --extent, or another "
                    "output; only a store made with --extent zone can grow"
                )

    def create(self, attributes: dict[str, Any]) -> None:
        """An empty store, in place of whatever of ours was there."""
        make_folder(self.path.parent)
        self._check_run()
        draft = self.path.with_name(f".{self.path.name}.{uuid4().hex[:8]}")
        try:
            about = {"minemap:layout": VERSION, "minemap:kind": self.kind, **attributes}
            zarr.create_group(for_zarr(draft), zarr_format=3, attributes=about)
            # The ledger first: without records nothing counts as done, wherever this stops
            for name in ("ledger", "cells", "items", "offsets"):
                remove(self.meta / name)
            for name in ("items.json", "aoi.wkt"):
                (self.meta / name).unlink(missing_ok=True)
            write_atomically(self.meta / MAKING, uuid4().hex)
            remove(self.path)
            move(draft, self.path.name, "zarr.json")
        finally:
            remove(draft)

    def bound(self) -> Store:
        """This store as it was made last, for the tasks of its run; of the run that began last where it has none."""
        return replace(self, making=self._name(MAKING), run=self.run or self._name(RUN))

    def _name(self, file: str) -> str | None:
        data = read(self.meta / file)
        return None if data is None else data.decode()

    def _check_run(self) -> None:
        """Raises StoreError in a task of a run that another one has followed."""
        if self.making is not None and self._name(MAKING) != self.making:
            raise StoreError(f"{self.path} was made anew while this run was writing to it: start it again")
        if self.run is not None and self._name(RUN) not in (self.run, None):
            raise StoreError(f"{self.path} is being written by a run that began after this one: start it again")

    @contextmanager
    def locked(self) -> Iterator[Store]:
        """Only one run at a time writes to a store, through what this yields. The lock goes with the process that
        holds it; tasks on a cluster may live on, so each run has a name of its own. In object storage there is the
        name alone: the run that began last goes on, an earlier one ends at its next write."""
        make_folder(self.meta)
        with ExitStack() as held:
            if isinstance(self.meta, Path):
                try:
                    held.enter_context(FileLock(self.meta / "lock", timeout=0))
                except Timeout:
                    raise StoreError(
                        f"{self.path} is being written by another run: wait for it, or choose another output"
                    ) from None
            own = replace(self, run=uuid4().hex)
            write_atomically(self.meta / RUN, str(own.run))
            try:
                yield own
            except Exception:
                own._check_run()  # for want of what a later run took away, perhaps
                raise

    # --- zones and periods --------------------------------------------------------------------------------------

    def groups(self) -> list[str]:
        """Names of the zones' groups."""
        return sorted(p.parent.name for p in self.path.glob("utm*/zarr.json"))

    def _zone(self, group: str, mode: Literal["r", "r+"] = "r") -> zarr.Group:
        # Not through the consolidated metadata: those are for readers, and lag behind while we change shapes
        return zarr.open_group(for_zarr(self.path / group), mode=mode, zarr_format=3, use_consolidated=False)

    def add_zone(self, grid: Grid, chunk: int, bands: tuple[str, ...] | None) -> None:
        """The group of `grid`'s zone with arrays over `grid`; bands: of the composite, None to keep none.

        Nothing to do where the group is there already. Made under another name and renamed, so it is whole or not
        there.
        """
        with self._new_zone(grid) as group:
            if group is not None:
                zones.fill_zone(group, grid, chunk, bands)

    def add_change_zone(self, grid: Grid, chunk: int, *, first_year: bool) -> None:
        """The same for a store of change: `change` and, if wanted, `first_year`, both (y, x)."""
        with self._new_zone(grid) as group:
            if group is not None:
                zones.fill_change_zone(group, grid, chunk, first_year=first_year)

    @contextmanager
    def _new_zone(self, grid: Grid) -> Iterator[zarr.Group | None]:
        """A zone's group to fill, under another name until it is whole; None where it is there already."""
        self._check_run()
        for left_over in self.path.glob("draft-*"):
            remove(left_over)
        if grid.group in self.groups():
            yield None
            return
        draft = f"draft-{grid.group}-{uuid4().hex[:8]}"
        yield self._zone("", "r+").create_group(draft, attributes=zones.zone_attributes(grid))
        self._check_run()
        move(self.path / draft, grid.group, "zarr.json")

    def remove_zone(self, group: str) -> None:
        """Whatever the store has of a zone. Call it under `locked`."""
        self._check_run()
        remove(self.path / group)

    def add_period(self, group: str, period: Period) -> int:
        """Index of `period` on the group's time axis, appended when it is new. Call it under `locked`."""
        self._check_run()
        index = zones.add_period(self._zone(group, "r+"), period)
        if self.periods(group)[index : index + 1] != [period]:
            raise StoreError(f"{self.path} was written by another run at the same time: start this one again")
        return index

    def periods(self, group: str) -> list[Period]:
        """In the order of the time axis."""
        return zones.periods(self._zone(group))

    def grid(self, group: str) -> Grid:
        """What the group's arrays cover."""
        return zones.grid_of(self._zone(group))

    def chunk(self, group: str) -> int:
        """Side of the group's super-tiles in pixels."""
        first = "probability" if self.kind == "map" else "change"
        return (zones.array_of(self._zone(group), first).shards or (WINDOW,))[-1]

    def done(self, group: str, period: Period | None = None) -> list[Grid]:
        """Finished super-tiles of a period, or of any, row by row from the north-west; all without a ledger."""
        grid, chunk = self.grid(group), self.chunk(group)
        if not self.meta.is_dir():
            return list(grid.tiles(chunk))
        records = (self.meta / "ledger" / group).glob(f"{period.slug if period else '*'}/[!.]*.json")
        side = chunk * grid.resolution
        found = sorted({(-int(row), int(column)) for column, row in (path.stem.split("_") for path in records)})
        return [replace(grid, left=x * side, top=-y * side, height=chunk, width=chunk) for y, x in found]

    def consolidate(self) -> None:
        """Metadata of every group in one place, so that opening it takes one read."""
        self._check_run()
        zones.consolidate(for_zarr(self.path), self.groups())

    def add_consistent(self, group: str, source: str | None) -> None:
        """The array beside `probability` for what is derived from all of its periods, made where it is not there.

        source: a digest of the records that it is derived from, None as long as it is not whole.
        """
        self._check_run()
        zones.consistent_array(self._zone(group, "r+"), self.grid(group)).attrs["source"] = source

    def consistent_source(self, group: str) -> str | None:
        """The source (see `add_consistent`) of the group's consistent probability, None where none is whole."""
        zone = self._zone(group)
        return zones.array_of(zone, CONSISTENT).attrs.get("source") if CONSISTENT in zone else None  # type: ignore[return-value]

    # --- tiles and their records --------------------------------------------------------------------------------

    def write_tile(self, tile: Grid, index: int | None, layers: dict[str, np.ndarray]) -> None:
        """One super-tile of one period (None: of arrays without time): each of `layers` (…, y, x) into its shard."""
        self._check_run()
        zone = self._zone(tile.group, "r+")
        row, column = tile.offset_in(zones.grid_of(zone))
        for name, data in layers.items():
            scale = QUICKLOOK if name == "quicklook" else 1
            y = slice(row // scale, row // scale + data.shape[-2])
            x = slice(column // scale, column // scale + data.shape[-1])
            array, place = zones.array_of(zone, name), (y, x) if index is None else (index, ..., y, x)
            try:
                array[place] = data
            except (RuntimeError, ValueError):  # zarr reads a shard's index before it writes, and this one is damaged
                first = [*([] if index is None else [index, *[0] * (array.ndim - 3)]), y.start, x.start]
                shard = tuple(n // side for n, side in zip(first, array.shards or array.chunks, strict=True))
                (self.path / tile.group / name / array.metadata.encode_chunk_key(shard)).unlink(missing_ok=True)
                array[place] = data

    def read_tile(self, tile: Grid, index: int | None, name: str) -> np.ndarray:
        """A layer of a super-tile or a part of it, (…, y, x), as stored. Raises DamagedTileError."""
        zone = self._zone(tile.group, "r")
        row, column = tile.offset_in(zones.grid_of(zone))
        scale = QUICKLOOK if name == "quicklook" else 1
        y, x = (slice(n // scale, (n + side) // scale) for n, side in ((row, tile.height), (column, tile.width)))
        try:
            return np.asarray(zones.array_of(zone, name)[(y, x) if index is None else (index, ..., y, x)])
        except (RuntimeError, ValueError) as error:  # zstd's checksum, and the index of a shard
            bounds = " ".join(f"{n:.0f}" for n in tile.bounds)
            raise DamagedTileError(
                f"{self.path / tile.group / name} is damaged within {bounds}: the command that made it makes that "
                "place again"
            ) from error

    @contextmanager
    def damage_named(self) -> Iterator[None]:
        """Around what reads through `open_map`: a layer that zarr can't read is a DamagedTileError with its place."""
        try:
            yield
        except (RuntimeError, ValueError):
            for group in self.groups():
                layers = [name for name in (*LAYERS, *CHANGE_LAYERS) if name in self._zone(group)]
                periods = enumerate(self.periods(group)) if self.kind == "map" else [(None, None)]
                for index, period in periods:
                    for tile, name in product(self.done(group, period), layers):
                        self.read_tile(tile, index, name)
            raise

    def kept_bands(self, group: str) -> list[str] | None:
        """Bands of the composite that a map has kept, None where it has not."""
        zone = self._zone(group)
        return list(zones.array_of(zone, "composite").attrs["bands"]) if "composite" in zone else None  # type: ignore[arg-type]

    def record_path(self, tile: Grid, period: Period) -> Place:
        side = tile.width * tile.resolution
        name = f"{round(tile.left / side)}_{round(tile.top / side)}.json"
        return self.meta / "ledger" / tile.group / period.slug / name

    def record(self, tile: Grid, period: Period) -> dict[str, Any] | None:
        """What the ledger says of a finished super-tile, None when it is not finished."""
        return self.records_of([tile], period)[0]

    def records_of(self, tiles: Sequence[Grid], period: Period) -> list[dict[str, Any] | None]:
        """The same of many super-tiles."""
        found = _records([self.record_path(tile, period) for tile in tiles])
        return [record if record and self.making in (None, record.get("making")) else None for record in found]

    def records(self, group: str, period: Period) -> list[dict[str, Any]]:
        """All that the ledger says of a period."""
        paths = _sorted((self.meta / "ledger" / group / period.slug).glob("[!.]*.json"))
        return [record for record in _records(paths) if record]

    def write_record(self, tile: Grid, period: Period, record: dict[str, Any]) -> None:
        self._check_run()
        own = {} if self.making is None else {"making": self.making}
        write_atomically(self.record_path(tile, period), json.dumps({**record, **own}))

    def keep_failure(self, tile: Grid, period: Period, text: str) -> None:
        """Why a super-tile could not be made, until the next run over the store begins."""
        self._check_run()
        write_atomically(self._failure_path(tile, period), text)

    def _failure_path(self, tile: Grid, period: Period) -> Place:
        return self.meta / "failed" / f"{tile.group}_{period.slug}_{self.record_path(tile, period).stem}"

    def failures(self) -> list[str]:
        texts = read_all(_sorted((self.meta / "failed").glob("[!.]*")))
        return [text.decode() for text in texts if text is not None]

    def forget_failure(self, tile: Grid, period: Period) -> None:
        self._failure_path(tile, period).unlink(missing_ok=True)

    def forget_failures(self) -> None:
        remove(self.meta / "failed")

    # --- scenes -------------------------------------------------------------------------------------------------

    def cell_path(self, group: str, cell: tuple[int, int], period: Period) -> Place:
        return self.meta / "cells" / group / period.slug / f"{cell[0]}_{cell[1]}.json"

    def write_cell(self, group: str, cell: tuple[int, int], period: Period, ids: list[list[str]]) -> None:
        """Freezes the choice for a cell: item ids, one list an acquisition."""
        self._check_run()
        write_atomically(self.cell_path(group, cell, period), json.dumps(ids))

    def read_cell(self, group: str, cell: tuple[int, int], period: Period) -> list[list[str]] | None:
        """The choice for a cell; None where there is none, or it is damaged and must be made again."""
        found = read_json(self.cell_path(group, cell, period))
        return found if isinstance(found, list) and all(isinstance(ids, list) for ids in found) else None

    def scenes_of(self, group: str, cell: tuple[int, int], period: Period) -> str:
        """What tells the frozen choice of a cell from any other; "" where there is none."""
        chosen = self.read_cell(group, cell, period)
        return "" if chosen is None else hashlib.sha256(json.dumps(chosen).encode()).hexdigest()

    def write_items(self, items: list[Item]) -> None:
        """Adds items to those that were used, one file each and all in `items.json`, an ItemCollection."""
        self._check_run()
        self.keep_items(items)
        every = [item for data in read_all(self._item_paths()) if (item := _item(data))]
        write_atomically(self.meta / "items.json", json.dumps({"type": "FeatureCollection", "features": every}))

    def keep_items(self, items: list[Item]) -> None:
        """One file for each item."""
        for item in items:
            write_atomically(self._item_path(item["id"]), json.dumps(item))

    def items(self) -> Iterator[Item]:
        """The items that were used, by id; none where the meta folder is lost. Raises StoreError."""
        paths = self._item_paths()
        return map(_sound, paths, read_all(paths))

    def read_items(self, names: Sequence[str]) -> list[Item]:
        """The items that a cell's choice names. Raises StoreError."""
        paths = [self._item_path(name) for name in names]
        return list(map(_sound, paths, read_all(paths)))

    def _item_path(self, name: str) -> Place:
        return self.meta / "items" / f"{file_name(name)}.json.gz"

    def _item_paths(self) -> list[Place]:
        return _sorted((self.meta / "items").glob("*.json.gz"))


def _sorted(places: Iterable[Place]) -> list[Place]:
    return sorted(places, key=str)


def _records(paths: list[Place]) -> list[dict[str, Any] | None]:
    """What files of the ledger say, None for those that are gone or damaged."""
    found = map(parse, read_all(paths))
    return [f if isinstance(f, dict) and len(f.get("windows") or ()) == 4 else None for f in found]


def _item(data: bytes | None) -> Item | None:
    """The item in a file, None where it is gone or damaged."""
    try:
        return json.loads(gzip.decompress(data or b""))
    except (EOFError, ValueError, gzip.BadGzipFile, zlib.error):
        return None


def _sound(path: Place, data: bytes | None) -> Item:
    if (item := _item(data)) is None:
        raise StoreError(f"{path} is gone or damaged: map that date with --refresh, which chooses its scenes again")
    return item


def open_map(path: str | Place, zone: str | None = None) -> xr.Dataset:
    """A map as xarray sees it: `probability` and `observations` (time, y, x), lazy, one dask chunk a shard.

    Trimmed to the super-tiles that are done and sorted by time. probability: float32 per cent, NaN not observed.
    A map of change has `change` (y, x), uint8, and perhaps `first_year`. zone: the group, needed where there are
    several. Raises StoreError, InputError.
    """
    store = Store.opened(path)
    names = store.groups()
    if zone is None and len(names) != 1:
        raise InputError(f"{path} has {len(names)} zones: name one (--zone) of {', '.join(names) or '(none yet)'}")
    group = zone or names[0]
    if group not in names:
        raise InputError(f"{path} has no zone {group}: its zones are {', '.join(names)}")
    side = store.chunk(group)
    chunks = {"time": 1, "y": side, "x": side, "y80": side // QUICKLOOK, "x80": side // QUICKLOOK}
    # Trimmed and sorted first: a whole zone has thousands of chunks
    data = _trimmed(xr.open_zarr(for_zarr(store.path), group=group, chunks=None), store, group, side)
    if "time" in data.dims:
        data = data.isel(time=np.lexsort(data["time_bounds"].values.T[::-1]))  # by first day, then by last
    present = [name for name in (*LAYERS, *CHANGE_LAYERS) if name in data]
    data = data.assign({n: data[n].chunk({d: chunks[d] for d in data[n].dims if d in chunks}) for n in present})
    if "composite" in data:
        data = data.assign_coords(band=data["composite"].attrs["bands"])
    return data


def _trimmed(data: xr.Dataset, store: Store, group: str, chunk: int) -> xr.Dataset:
    """The part around the super-tiles that are done."""
    grid = store.grid(group)
    corners = [tile.offset_in(grid) for tile in store.done(group)]
    if not corners:
        return data.isel({name: slice(0) for name in ("y", "x", "y80", "x80") if name in data.dims})
    y, x = (slice(min(first), max(first) + chunk) for first in zip(*corners, strict=True))
    y80, x80 = (slice(s.start // QUICKLOOK, s.stop // QUICKLOOK) for s in (y, x))
    return data.isel({"y": y, "x": x, "y80": y80, "x80": x80}, missing_dims="ignore")


def _reason(path: Place) -> str:
    if not path.exists():
        return "it does not exist"
    return "it is a file" if path.is_file() else "choose another output, or a store that minemap made"


def _first_difference(was: dict[str, Any], wanted: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """The first name whose values differ, and both; of a value that has names itself, the one within."""
    for name, value in wanted.items():
        if (before := was.get(name)) != value:
            inner = _first_difference(before, value) if isinstance(before, dict) and isinstance(value, dict) else None
            return inner or (name, before, value)
    return None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 80 else text[:77] + "..."
