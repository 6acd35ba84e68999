"""The Zarr v3 store of a map: its layout, writes of whole shards, the ledger, and reading it back.

    map.zarr/utm32720/{probability, observations, quicklook, composite, time, time_bounds, y, x, spatial_ref}
    map.zarr.meta/{items.json, items/, cells/, ledger/, offsets/, lock, making}

A super-tile is one shard, written by one task: data first, then its record in the ledger. What has no record was
never finished, whatever the arrays hold. The store is made in a temporary folder and renamed, so it is whole or not
there. The meta folder lies beside the store because Zarr warns of foreign folders inside it.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote
from uuid import uuid4

import numpy as np
import rioxarray  # noqa: F401 (registers the .rio accessor)
import xarray as xr
import zarr
from filelock import FileLock, Timeout
from pyproj import CRS
from zarr.codecs import ZstdCodec

from .errors import DamagedTileError, InputError, StoreError
from .grid import WINDOW, Grid
from .inference import NOT_OBSERVED
from .scenes import Period
from .sentinel2 import Item

VERSION = 1  # of the layout
QUICKLOOK = 8  # pixels of the map to one of the quicklook, on each side
EPOCH = date(1970, 1, 1)
MAKING = "making"  # file in the meta folder: a name that no other making of a store has
NO_TIME = -(2**31)  # days; a period whose adding was cut short
CONSISTENT = "probability_consistent"  # derived from all periods of `probability`, kept beside it
LAYERS = ("probability", CONSISTENT, "observations", "quicklook", "composite")

CONVENTIONS = [
    {
        "uuid": "689b58e2-cf7b-45e0-9fff-9cfc0883d6b4",
        "name": "spatial:",
        "schema_url": "https://raw.githubusercontent.com/zarr-conventions/spatial/refs/tags/v1/schema.json",
        "spec_url": "https://github.com/zarr-conventions/spatial/blob/v1/README.md",
        "description": "Spatial coordinate information",
    },
    {
        "uuid": "f17cb550-5864-4468-aeb7-f3180cfb622f",
        "name": "proj:",
        "schema_url": "https://raw.githubusercontent.com/zarr-conventions/geo-proj/refs/tags/v1/schema.json",
        "spec_url": "https://github.com/zarr-conventions/geo-proj/blob/v1/README.md",
        "description": "Coordinate reference system information for geospatial data",
    },
]


def parameters_hash(parameters: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Store:
    """A map on disk, or a map of change. Cheap to make and to send to workers: it holds paths only.

    making: the making of the store (see `create`) that a run belongs to. A task of an earlier run that nobody could
    stop can then neither write into the store that has taken its place, nor leave a record that counts there.
    """

    path: Path
    kind: str = "map"  # or "change"
    making: str | None = None

    @staticmethod
    def at(out: str | Path, kind: str = "map") -> Store:
        """The store of a name as a user gives it. Raises InputError for an object store's address."""
        if "://" in str(out):
            raise InputError(f"output {out} is an address: stores are local folders or shared file systems")
        path = Path(out).expanduser().resolve()
        try:
            path.exists()
        except OSError as error:
            raise InputError(f"output {str(out)[:80]!r}: {error.strerror}, choose another name") from error
        return Store(path, kind)

    @property
    def meta(self) -> Path:
        return self.path.with_name(self.path.name + ".meta")

    # --- making and checking ------------------------------------------------------------------------------------

    def exists(self) -> bool:
        return self.path.exists() or self.path.is_symlink()

    def attributes(self) -> dict[str, Any]:
        """The root's attributes; StoreError when what is there is not a store of ours and of our kind."""
        try:
            attributes = dict(zarr.open_group(self.path, mode="r").attrs)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{self.path} is not a minemap store: {_reason(self.path)}") from error
        if not {"minemap:layout", "parameters"} <= attributes.keys():
            raise StoreError(f"{self.path} is a Zarr store, but not one of minemap; choose another output")
        if (layout := attributes["minemap:layout"]) != VERSION:
            raise StoreError(f"{self.path} has layout {layout}, this minemap knows {VERSION}: use that which made it")
        kind = attributes.get("minemap:kind", "map")
        if kind != self.kind:
            raise StoreError(f"{self.path} is a store of kind {kind!r}, not {self.kind!r}: give another")
        return attributes

    def check(self, parameters: dict[str, Any], grids: list[Grid], *, overwrite: bool = False) -> None:
        """Whether a run with `parameters` over `grids` may write here; touches nothing. Raises StoreError."""
        if self.meta.exists() and not self.meta.is_dir():
            raise StoreError(f"{self.meta} is a file, and the folder beside the store: choose another output")
        if not self.exists():
            parent = next(p for p in self.path.absolute().parents if p.exists())
            if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
                raise StoreError(f"{parent} is not a folder that can be written to; choose another output")
            return
        stored = self.attributes()
        if not os.access(self.path, os.W_OK):
            raise StoreError(f"{self.path} is not writable; choose another output")
        if overwrite:
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
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", dir=self.path.parent))
        try:
            about = {"minemap:layout": VERSION, "minemap:kind": self.kind, **attributes}
            zarr.create_group(draft, zarr_format=3, attributes=about)
            draft.chmod(0o777 & ~UMASK)
            # The ledger first: without records nothing counts as done, wherever this stops
            for name in ("ledger", "cells", "items", "offsets"):
                shutil.rmtree(self.meta / name, ignore_errors=True)
            for name in ("items.json", "aoi.wkt"):
                (self.meta / name).unlink(missing_ok=True)
            write_atomically(self.meta / MAKING, uuid4().hex)
            shutil.rmtree(self.path, ignore_errors=True)
            draft.rename(self.path)
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def bound(self) -> Store:
        """This store as it was made last, for the tasks of a run."""
        return replace(self, making=self._making())

    def _making(self) -> str | None:
        file = self.meta / MAKING
        return file.read_text() if file.exists() else None

    def _check_making(self) -> None:
        if self.making is not None and self._making() != self.making:
            raise StoreError(f"{self.path} was made anew while this run was writing to it: start it again")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Only one run at a time writes to a store. The lock goes with the process that holds it."""
        self.meta.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.meta / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise StoreError(
                f"{self.path} is being written by another run: wait for it, or choose another output"
            ) from None
        try:
            yield
        finally:
            lock.release()

    # --- zones and periods --------------------------------------------------------------------------------------

    def groups(self) -> list[str]:
        """Names of the zones' groups."""
        return sorted(p.parent.name for p in self.path.glob("utm*/zarr.json"))

    def _zone(self, group: str, mode: Literal["r", "r+"] = "r") -> zarr.Group:
        # Not through the consolidated metadata: those are for readers, and lag behind while we change shapes
        return zarr.open_group(self.path / group, mode=mode, use_consolidated=False)

    def add_zone(self, grid: Grid, chunk: int, bands: tuple[str, ...] | None) -> None:
        """The group of `grid`'s zone with arrays over `grid`; bands: of the composite, None to keep none.

        Nothing to do where the group is there already. Made under another name and renamed, so it is whole or not
        there.
        """
        with self._new_zone(grid) as group:
            if group is not None:
                _fill_zone(group, grid, chunk, bands)

    def add_change_zone(self, grid: Grid, chunk: int, *, first_year: bool) -> None:
        """The same for a store of change: `change` and, if wanted, `first_year`, both (y, x)."""
        with self._new_zone(grid) as group:
            if group is None:
                return
            for name, layer in CHANGE_LAYERS.items():
                if first_year or name != "first_year":
                    _sharded(group, name, layer, grid, chunk, timed=False)
            _coordinates(group, grid)

    @contextmanager
    def _new_zone(self, grid: Grid) -> Iterator[zarr.Group | None]:
        """A zone's group to fill, under another name until it is whole; None where it is there already."""
        for left_over in self.path.glob("draft-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        if grid.group in self.groups():
            yield None
            return
        draft = f"draft-{grid.group}"
        yield self._zone("", "r+").create_group(draft, attributes=zone_attributes(grid))
        (self.path / draft).rename(self.path / grid.group)

    def add_period(self, group: str, period: Period) -> int:
        """Index of `period` on the group's time axis, appended when it is new. Call it under `locked`."""
        return _add_period(self._zone(group, "r+"), period)

    def periods(self, group: str) -> list[Period]:
        """In the order of the time axis."""
        return [Period(_day(int(start)), _day(int(end))) for start, end in _bounds(self._zone(group))]

    def grid(self, group: str) -> Grid:
        """What the group's arrays cover."""
        attributes: dict[str, Any] = dict(self._zone(group, "r").attrs)
        a, _, left, _, _, top = (float(v) for v in attributes["spatial:transform"])
        height, width = (int(v) for v in attributes["spatial:shape"])
        return Grid(int(group.removeprefix("utm")), left, top, height, width, a)

    def chunk(self, group: str) -> int:
        """Side of the group's super-tiles in pixels."""
        return (_array(self._zone(group), "probability").shards or (1, WINDOW, WINDOW))[-1]

    def done(self, group: str, period: Period) -> list[Grid]:
        """Finished super-tiles of a period, row by row from the north-west; all there are without a ledger."""
        grid, chunk = self.grid(group), self.chunk(group)
        if not self.meta.is_dir():
            return list(grid.tiles(chunk))
        names = [p.stem.split("_") for p in (self.meta / "ledger" / group / period.slug).glob("[!.]*.json")]
        side = chunk * grid.resolution
        found = sorted((-int(row), int(column)) for column, row in names)
        return [replace(grid, left=x * side, top=-y * side, height=chunk, width=chunk) for y, x in found]

    def consolidate(self) -> None:
        """Metadata of every group in one place, so that opening it takes one read."""
        consolidate(self.path, self.groups())

    def add_consistent(self, group: str, source: str | None) -> None:
        """The array beside `probability` for what is derived from all of its periods, made where it is not there.

        source: a digest of the records that it is derived from, None as long as it is not whole.
        """
        zone = self._zone(group, "r+")
        raw = _array(zone, "probability")
        layer = _Layer(
            "uint8", NOT_OBSERVED, {"long_name": "probability of mine given all periods", "units": "percent"}
        )
        if CONSISTENT not in zone:
            _sharded(zone, CONSISTENT, layer, self.grid(group), (raw.shards or raw.chunks)[-1])
        array = _array(zone, CONSISTENT)
        array.resize(raw.shape)
        array.attrs["source"] = source

    def consistent_source(self, group: str) -> str | None:
        """The source (see `add_consistent`) of the group's consistent probability, None where none is whole."""
        zone = self._zone(group)
        return _array(zone, CONSISTENT).attrs.get("source") if CONSISTENT in zone else None  # type: ignore[return-value]

    # --- tiles and their records --------------------------------------------------------------------------------

    def write_tile(self, tile: Grid, index: int | None, layers: dict[str, np.ndarray]) -> None:
        """One super-tile of one period (None: of arrays without time): each of `layers` (…, y, x) into its shard."""
        self._check_making()
        zone = self._zone(tile.group, "r+")
        row, column = tile.offset_in(self.grid(tile.group))
        for name, data in layers.items():
            scale = QUICKLOOK if name == "quicklook" else 1
            y = slice(row // scale, row // scale + data.shape[-2])
            x = slice(column // scale, column // scale + data.shape[-1])
            array, place = _array(zone, name), (y, x) if index is None else (index, ..., y, x)
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
        row, column = tile.offset_in(self.grid(tile.group))
        scale = QUICKLOOK if name == "quicklook" else 1
        y, x = (slice(n // scale, (n + side) // scale) for n, side in ((row, tile.height), (column, tile.width)))
        try:
            return np.asarray(_array(zone, name)[(y, x) if index is None else (index, ..., y, x)])
        except (RuntimeError, ValueError) as error:  # zstd's checksum, and the index of a shard
            bounds = " ".join(f"{n:.0f}" for n in tile.bounds)
            raise DamagedTileError(
                f"{self.path / tile.group / name} is damaged within {bounds}: the command that made it makes that "
                "place again"
            ) from error

    def kept_bands(self, group: str) -> list[str] | None:
        """Bands of the composite that a map has kept, None where it has not."""
        zone = self._zone(group)
        return list(_array(zone, "composite").attrs["bands"]) if "composite" in zone else None  # type: ignore[arg-type]

    def record_path(self, tile: Grid, period: Period) -> Path:
        side = tile.width * tile.resolution
        name = f"{round(tile.left / side)}_{round(tile.top / side)}.json"
        return self.meta / "ledger" / tile.group / period.slug / name

    def record(self, tile: Grid, period: Period) -> dict[str, Any] | None:
        """What the ledger says of a finished super-tile, None when it is not finished."""
        found = _read_json(self.record_path(tile, period))
        return found if found and self.making in (None, found.get("making")) else None

    def records(self, group: str, period: Period) -> list[dict[str, Any]]:
        """All that the ledger says of a period."""
        found = map(_read_json, sorted((self.meta / "ledger" / group / period.slug).glob("[!.]*.json")))
        return [record for record in found if record]

    def write_record(self, tile: Grid, period: Period, record: dict[str, Any]) -> None:
        self._check_making()
        own = {} if self.making is None else {"making": self.making}
        write_atomically(self.record_path(tile, period), json.dumps({**record, **own}))

    def keep_failure(self, tile: Grid, period: Period, text: str) -> None:
        """Why a super-tile could not be made, until the next run over the store begins."""
        name = f"{tile.group}_{period.slug}_{self.record_path(tile, period).stem}"
        write_atomically(self.meta / "failed" / name, text)

    def failures(self) -> list[str]:
        return [path.read_text() for path in sorted((self.meta / "failed").glob("[!.]*"))]

    def forget_failures(self) -> None:
        shutil.rmtree(self.meta / "failed", ignore_errors=True)

    # --- scenes -------------------------------------------------------------------------------------------------

    def cell_path(self, group: str, cell: tuple[int, int], period: Period) -> Path:
        return self.meta / "cells" / group / period.slug / f"{cell[0]}_{cell[1]}.json"

    def write_cell(self, group: str, cell: tuple[int, int], period: Period, ids: list[list[str]]) -> None:
        """Freezes the choice for a cell: item ids, one list an acquisition."""
        write_atomically(self.cell_path(group, cell, period), json.dumps(ids))

    def read_cell(self, group: str, cell: tuple[int, int], period: Period) -> list[list[str]] | None:
        try:
            return json.loads(self.cell_path(group, cell, period).read_text())
        except FileNotFoundError:
            return None

    def scenes_of(self, group: str, cell: tuple[int, int], period: Period) -> str:
        """What tells the frozen choice of a cell from any other; "" where there is none."""
        chosen = self.read_cell(group, cell, period)
        return "" if chosen is None else hashlib.sha256(json.dumps(chosen).encode()).hexdigest()

    def write_items(self, items: list[Item]) -> None:
        """Adds items to those that were used, one file each and all in `items.json`, an ItemCollection."""
        self.keep_items(items)
        every = list(self.items())
        write_atomically(self.meta / "items.json", json.dumps({"type": "FeatureCollection", "features": every}))

    def keep_items(self, items: list[Item]) -> None:
        """One file for each item."""
        for item in items:
            write_atomically(self.meta / "items" / f"{file_name(item['id'])}.json.gz", json.dumps(item))

    def items(self) -> Iterator[Item]:
        """The items that were used, by id; none where the meta folder is lost."""
        for path in sorted((self.meta / "items").glob("*.json.gz")):
            yield _item(path)

    def read_item(self, name: str) -> Item:
        return _item(self.meta / "items" / f"{file_name(name)}.json.gz")


def _item(path: Path) -> Item:
    return json.loads(gzip.decompress(path.read_bytes()))


def file_name(name: str) -> str:
    """A catalogue's id as a file's name that stays in its folder."""
    return quote(name, safe="").replace(".", "%2E")


def write_atomically(path: Path, text: str) -> None:
    """The whole text or nothing, under any interruption; gzip when the name ends so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = gzip.compress(text.encode(), mtime=0) if path.suffix == ".gz" else text.encode()
    number, name = tempfile.mkstemp(dir=path.parent, prefix=".")
    draft = Path(name)
    try:
        with os.fdopen(number, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(number)  # before the name is there: a power cut must not leave an empty file under it
        draft.chmod(0o666 & ~UMASK)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _read_json(path: Path) -> Any:
    """What a file of ours says, None where there is none or it is damaged."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


@contextmanager
def drafted(out: Path) -> Iterator[Path]:
    """A name to write to beside `out`, which takes its place when all went well and is gone when not."""
    draft = out.with_name(f".{out.name}.draft{out.suffix}")
    try:
        yield draft
        draft.replace(out)
    finally:
        draft.unlink(missing_ok=True)


def check_file(path: Path, role: str = "output") -> None:
    """Raises InputError unless a file of that name can be written."""
    folder = path.absolute().parent
    if path.is_dir():
        raise InputError(f"{role} {path} is a folder: give the name of a file")
    if not folder.is_dir():
        raise InputError(f"{role} {path.name}: folder {folder} does not exist: make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{role} {path.name}: folder {folder} can't be written to, choose another")


def consolidate(path: Path, groups: list[str]) -> None:
    """Metadata of each of the groups, and of all that is below `path`, in one place each."""
    with warnings.catch_warnings():
        # zarr warns that consolidation is not in the v3 specification yet; readers that don't know it ignore it
        warnings.filterwarnings("ignore", message=".*[Cc]onsolidated metadata.*")
        for group in groups:
            zarr.consolidate_metadata(path, path=group)
        zarr.consolidate_metadata(path)


def open_map(path: str | Path, zone: str | None = None) -> xr.Dataset:
    """A map as xarray sees it: `probability` and `observations` (time, y, x), lazy, one dask chunk a shard.

    Trimmed to the super-tiles that are done and sorted by time. probability: float32 per cent, NaN not observed.
    zone: the group, needed where there are several. Raises StoreError, InputError.
    """
    store = Store.at(path)
    store.attributes()
    names = store.groups()
    if zone is None and len(names) != 1:
        raise InputError(f"{path} has {len(names)} zones: name one (--zone) of {', '.join(names) or '(none yet)'}")
    group = zone or names[0]
    if group not in names:
        raise InputError(f"{path} has no zone {group}: its zones are {', '.join(names)}")
    shards = zarr.open_array(store.path / group / "probability", mode="r").shards or (1, WINDOW, WINDOW)
    step = QUICKLOOK
    chunks = {"time": 1, "y": shards[-2], "x": shards[-1], "y80": shards[-2] // step, "x80": shards[-1] // step}
    data = xr.open_zarr(store.path, group=group, chunks=None)
    present = [name for name in LAYERS if name in data]
    data = data.assign({n: data[n].chunk({d: chunks[d] for d in data[n].dims if d in chunks}) for n in present})
    if "composite" in data:
        data = data.assign_coords(band=data["composite"].attrs["bands"])
    in_time = np.lexsort(data["time_bounds"].values.T[::-1])  # by first day, then by last
    return _trimmed(data, store, group, shards[-1]).isel(time=in_time)


def _trimmed(data: xr.Dataset, store: Store, group: str, chunk: int) -> xr.Dataset:
    grid = store.grid(group)
    if not store.meta.is_dir():
        return data  # a copy without its ledger: nothing says what is done, so nothing is cut
    done = [p.stem.split("_") for p in (store.meta / "ledger" / group).glob("*/[!.]*.json")]
    if not done:
        return data.isel(y=slice(0, 0), x=slice(0, 0), y80=slice(0, 0), x80=slice(0, 0))
    side = chunk * grid.resolution
    columns = [int(c) - round(grid.left / side) for c, _ in done]
    rows = [round(grid.top / side) - int(r) for _, r in done]
    x, y = slice(min(columns), max(columns) + 1), slice(min(rows), max(rows) + 1)
    return data.isel(
        {
            name: slice(s.start * n, s.stop * n)
            for (name, s), n in zip(
                (("x", x), ("y", y), ("x80", x), ("y80", y)),
                (chunk, chunk, chunk // QUICKLOOK, chunk // QUICKLOOK),
                strict=True,
            )
        }
    )


def _reason(path: Path) -> str:
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


def _day(days: int) -> date:
    return date.fromordinal(EPOCH.toordinal() + days)


def _read_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


UMASK = _read_umask()  # once: reading it sets it to 0 for a moment, and other threads may be writing


@dataclass(frozen=True)
class _Layer:
    """missing: the stored value of a pixel without an answer, None when every value is one. empty: what a pixel
    that was never written then reads as."""

    dtype: str
    missing: int | None
    about: dict[str, Any]
    bands: int = 0
    empty: int = 0


PROBABILITY = _Layer("uint8", NOT_OBSERVED, {"long_name": "probability of mine", "units": "percent"})
CHANGE_LAYERS = {
    "change": _Layer(
        "uint8",
        None,  # xarray would turn classes into floats
        {
            "long_name": "change of the mining footprint between two dates",
            "flag_values": [0, 1, 2, 3, NOT_OBSERVED],
            "flag_meanings": "never_mine mine_at_both_dates gain loss not_observed_at_both",
        },
        empty=NOT_OBSERVED,
    ),
    "first_year": _Layer("uint16", None, {"long_name": "first year in which a pixel was seen as mine, 0 = never"}),
}


def _fill_zone(group: zarr.Group, grid: Grid, chunk: int, bands: tuple[str, ...] | None) -> None:
    """The arrays and coordinates of a map's zone, without any period yet."""
    layers: dict[str, _Layer] = {
        "probability": PROBABILITY,
        "observations": _Layer("uint8", None, {"long_name": "number of clear acquisitions", "units": "1"}),
    }
    if bands:
        # Band names are an attribute: Zarr v3 has no settled string type for a coordinate
        about = {
            "long_name": "surface reflectance, median",
            "scale_factor": 1e-4,
            "units": "1",
            "bands": list(bands),
        }
        layers["composite"] = _Layer("uint16", 0, about, bands=len(bands))
    for name, layer in layers.items():
        _sharded(group, name, layer, grid, chunk)
    side = chunk // QUICKLOOK
    group.create_array(
        "quicklook",
        shape=(0, 3, grid.height // QUICKLOOK, grid.width // QUICKLOOK),
        chunks=(1, 3, side, side),
        dtype="uint8",
        fill_value=0,
        compressors=ZstdCodec(level=5, checksum=True),
        dimension_names=("time", "rgb", "y80", "x80"),
        attributes={"long_name": f"red, green, blue of the composite, {QUICKLOOK} px means, 0 = not observed"},
    )
    _coordinates(group, grid)
    for name, values in (("y", grid.y), ("x", grid.x)):
        means = values.reshape(-1, QUICKLOOK).mean(axis=1)
        _small(group, f"{name}80", means, (f"{name}80",), {"units": "m", "long_name": f"{name} of the quicklook"})
    _times(group)


def create_level(parent: zarr.Group, name: str, grid: Grid, chunk: int, periods: list[Period]) -> zarr.Group:
    """A group with a map's `probability` over `grid`, nothing observed yet, and its coordinates."""
    group = parent.create_group(name, attributes=zone_attributes(grid))
    _sharded(group, "probability", PROBABILITY, grid, chunk)
    _coordinates(group, grid)
    _times(group)
    for period in periods:
        _add_period(group, period)
    return group


def _sharded(group: zarr.Group, name: str, layer: _Layer, grid: Grid, chunk: int, *, timed: bool = True) -> None:
    """An array, without any period yet: a shard a super-tile, chunks of one window, zstd with a checksum."""
    sizes = (layer.bands,) if layer.bands else ()
    time: tuple[str, ...] = ("time",) if timed else ()
    fill = {} if layer.missing is None else {"_FillValue": layer.missing}
    group.create_array(
        name,
        shape=(*(0 for _ in time), *sizes, *grid.shape),
        shards=(*(1 for _ in time), *sizes, chunk, chunk),
        chunks=(*(1 for _ in time), *(1 for _ in sizes), WINDOW, WINDOW),
        dtype=layer.dtype,
        fill_value=layer.empty if layer.missing is None else layer.missing,
        compressors=ZstdCodec(level=5, checksum=True),
        dimension_names=(*time, *("band" for _ in sizes), "y", "x"),
        # xarray makes a coordinate, which rioxarray wants, only of what "coordinates" names
        attributes={**layer.about, "grid_mapping": "spatial_ref", "coordinates": "spatial_ref", **fill},
    )


def _add_period(zone: zarr.Group, period: Period) -> int:
    bounds = _bounds(zone)
    wanted = [(period.start - EPOCH).days, (period.end - EPOCH).days]
    found = np.flatnonzero((bounds == wanted).all(axis=1))
    if len(found):
        return int(found[0])
    n = len(bounds)
    # time last: a row without a time does not exist, and the next run uses it
    names = [name for name, array in zone.arrays() if _dims(array)[:1] == ("time",)]
    for name in sorted(names, key=lambda name: name == "time"):
        array = _array(zone, name)
        array.resize((n + 1, *array.shape[1:]))
    _array(zone, "time_bounds")[n] = wanted
    _array(zone, "time")[n] = wanted[0]
    return n


def _array(group: zarr.Group, name: str) -> zarr.Array:
    array = group[name]
    assert isinstance(array, zarr.Array), name
    return array


def _bounds(zone: zarr.Group) -> np.ndarray:
    """First and last day of every period that was added whole, int64 (period, 2)."""
    times = np.asarray(_array(zone, "time")[:])
    whole = times != NO_TIME
    return np.asarray(_array(zone, "time_bounds")[:])[: int(whole.argmin()) if not whole.all() else len(times)]


def _dims(array: zarr.Array) -> tuple[str | None, ...]:
    return tuple(getattr(array.metadata, "dimension_names", None) or ())


def zone_attributes(grid: Grid) -> dict[str, Any]:
    """Where a group's arrays lie, in the terms of the GeoZarr conventions."""
    return {
        "Conventions": "CF-1.11",
        "zarr_conventions": CONVENTIONS,
        "proj:code": f"EPSG:{grid.epsg}",
        "spatial:dimensions": ["y", "x"],
        "spatial:transform": list(grid.transform)[:6],
        "spatial:bbox": list(grid.bounds),
        "spatial:shape": list(grid.shape),
        "spatial:registration": "pixel",
    }


def _small(group: zarr.Group, name: str, data: np.ndarray, dims: tuple[str, ...], about: dict[str, Any]) -> None:
    chunks = tuple(max(1, side) for side in data.shape)
    array = group.create_array(
        name, shape=data.shape, chunks=chunks, dtype=data.dtype, dimension_names=dims, attributes=about
    )
    array[...] = data


def _coordinates(group: zarr.Group, grid: Grid) -> None:
    crs = CRS.from_epsg(grid.epsg)
    mapping = {
        **crs.to_cf(),
        "spatial_ref": crs.to_wkt(),
        "GeoTransform": " ".join(map(repr, grid.transform.to_gdal())),
    }
    _small(group, "spatial_ref", np.array(0), (), mapping)
    for name, values in (("y", grid.y), ("x", grid.x)):
        about = {"units": "m", "standard_name": f"projection_{name}_coordinate", "axis": name.upper()}
        _small(group, name, values, (name,), about)


def _times(group: zarr.Group) -> None:
    """Time and its bounds, without any period yet."""
    days = {"units": "days since 1970-01-01", "calendar": "proleptic_gregorian"}
    none = np.zeros((0,), np.int64)
    about = {
        **days,
        "standard_name": "time",
        "axis": "T",
        "bounds": "time_bounds",
        "long_name": "first day of period",
    }
    _series(group, "time", none, ("time",), about)
    _series(group, "time_bounds", none.reshape(0, 2), ("time", "bounds"), {"long_name": "first and last day", **days})


def _series(group: zarr.Group, name: str, data: np.ndarray, dims: tuple[str, ...], about: dict[str, Any]) -> None:
    group.create_array(
        name,
        shape=data.shape,
        chunks=(1024, *data.shape[1:]),
        dtype=data.dtype,
        fill_value=NO_TIME,
        dimension_names=dims,
        attributes=about,
    )
