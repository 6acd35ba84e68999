"""Where a store lies: a folder, or a prefix in object storage, reached through fsspec (s3://bucket/map.zarr).

Object storage has no folders, no renaming and no locks. A put is whole or not there, and what was put is seen by
everybody at once (Amazon S3's consistency model; Google's and Azure's are the same). Each function here says what it
does in both.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from .errors import InputError, StoreError, first_line

if TYPE_CHECKING:
    from upath import UPath

Place: TypeAlias = "Path | UPath"
# How an address starts -> the package that reaches it
SCHEMES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs"}
PATTERNS = set("*?[]")  # fsspec takes them for names of many objects, when it deletes as well
ANEW = {"use_listings_cache": False}  # for fsspec: others write, too
WHOLE = {"s3": {"max_concurrency": 1}}  # else s3fs asks for the size before each read
REQUESTS = 32  # at a time, of those that wait for a network
AHEAD = 1024  # files read ahead of who takes them


def place_of(name: str | Place) -> Place:
    """The place that a user names: a path, an address, or a UPath with options of its own.

    Raises InputError for an address of another kind, or where the packages for it are missing; StoreError where its
    provider needs to be told more.
    """
    scheme, separator, key = str(name).partition("://")
    if isinstance(name, Path) and is_address(name):
        raise InputError(f"{name} is an address within a Path, which loses a part of it: give it as a string")
    if not separator:
        return Path(name).expanduser().resolve()  # type: ignore[arg-type]
    if "//" in key or PATTERNS & set(key):
        marks = " ".join(sorted(PATTERNS))
        raise InputError(f"{name}: an address may have none of {marks} and no // in it, choose another name")
    if scheme not in SCHEMES:
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise InputError(f"{name} is an address that stores can't have: give a folder, or one of {known}")
    try:
        from upath import UPath

        options = ANEW | WHOLE.get(scheme, {}) | getattr(name, "storage_options", {})
        place = UPath(str(name).rstrip("/"), **options)
        _ = place.fs  # here, where what it lacks can be told
    except ImportError as error:
        needed = f"pip install {SCHEMES[scheme]} universal-pathlib"
        raise InputError(f"{name} needs packages that are not installed: {needed} ({error})") from error
    except Exception as error:  # each provider's library has its own
        raise StoreError(f"{name} can't be reached: {first_line(error)}") from error
    return place


def is_address(path: Path) -> bool:
    """Whether a path was made from an address: s3:/bucket/map.zarr."""
    return path.parts[:1] in [(f"{scheme}:",) for scheme in SCHEMES]


def local(place: Place) -> Path:
    """The place as a path. Raises InputError for one in object storage."""
    if not isinstance(place, Path):
        raise InputError(f"{place} lies in object storage, where only maps can be: give a folder")
    return place


def for_zarr(place: Place) -> Any:
    """The place as zarr and xarray take it."""
    if isinstance(place, Path):
        return place
    from zarr.storage import FsspecStore

    return FsspecStore.from_url(str(place), storage_options=dict(place.storage_options))


def check_reachable(place: Place) -> None:
    """Raises InputError for a name that no file can have, StoreError for object storage that does not answer."""
    if not isinstance(place, Path):
        with _answered(place):
            place.exists()
        return
    try:
        place.exists()
    except OSError as error:
        raise InputError(f"output {place.name[:80]!r}: {error.strerror}, choose another name") from error


@contextmanager
def _answered(place: UPath) -> Iterator[None]:
    """Around requests: what each provider's library has of errors is a StoreError, but for what is not there."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        raise StoreError(f"{place} can't be reached: {first_line(error)}") from error


def check_writable(place: Place) -> None:
    """Raises StoreError where a store can't be written. Of object storage only the first write tells."""
    if not isinstance(place, Path):
        return
    if place.exists():
        if not os.access(place, os.W_OK):
            raise StoreError(f"{place} is not writable; choose another output")
        return
    parent = next(p for p in place.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise StoreError(f"{parent} is not a folder that can be written to; choose another output")


def make_folder(place: Place) -> None:
    """With those above it; nothing to do in object storage."""
    if isinstance(place, Path):
        place.mkdir(parents=True, exist_ok=True)


def remove(place: Place) -> None:
    """What lies there with all below it, if anything does."""
    if isinstance(place, Path):
        shutil.rmtree(place, ignore_errors=True)
        return
    with _answered(place):
        if place.exists():
            place.fs.rm(place.path, recursive=True)


def move(draft: Place, name: str, last: str) -> None:
    """Gives a folder another name beside it, at once; object by object in object storage, and `last`, which makes it
    count, at the end."""
    if isinstance(draft, Path):
        draft.rename(draft.with_name(name))
        return
    fs, source, target = draft.fs, draft.path, draft.with_name(name).path
    others = [key.removeprefix(source) for key in fs.find(source) if key != f"{source}/{last}"]
    with _answered(draft), ThreadPoolExecutor(REQUESTS) as pool:
        list(pool.map(lambda key: fs.cp_file(source + key, target + key), others))
        fs.cp_file(f"{source}/{last}", f"{target}/{last}")
        fs.rm(source, recursive=True)


def put(place: UPath, data: bytes) -> None:
    """Writes an object, whole or not at all. Raises StoreError where that is refused."""
    try:
        place.fs.pipe_file(place.path, data)
    except Exception as error:  # no such bucket, no permission, no network: each provider's library has its own
        raise StoreError(f"{place} can't be written: {first_line(error)}") from error


def read_all(places: Sequence[Place]) -> Iterator[bytes | None]:
    """What many small files hold, in turn, None for those that are gone; many at a time in object storage."""
    if not places or isinstance(places[0], Path):
        yield from map(read, places)
        return
    with ThreadPoolExecutor(REQUESTS) as pool:
        for start in range(0, len(places), AHEAD):
            yield from pool.map(read, places[start : start + AHEAD])


def read(place: Place) -> bytes | None:
    """What a small file holds, None where it is gone."""
    with suppress(FileNotFoundError):
        if isinstance(place, Path):
            return place.read_bytes()
        with _answered(place):
            return place.fs.cat_file(place.path)
    return None
