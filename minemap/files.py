"""Files that are written whole or not at all."""

from __future__ import annotations

import gzip
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from .errors import InputError
from .places import Place, is_address, put, read

if TYPE_CHECKING:
    import pandas as pd


TABLES = (".csv", ".parquet")


def _read_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


UMASK = _read_umask()  # once: reading it sets it to 0 for a moment, and other threads may be writing


def file_name(name: str) -> str:
    """A catalogue's id as a file's name that stays in its folder."""
    return quote(name, safe="").replace(".", "%2E")


def write_atomically(path: Place, text: str) -> None:
    """The whole text or nothing, under any interruption; gzip when the name ends so. Raises StoreError where object
    storage refuses it."""
    data = gzip.compress(text.encode(), mtime=0) if path.suffix == ".gz" else text.encode()
    if not isinstance(path, Path):
        put(path, data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
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


def read_json(path: Place) -> Any:
    """What a file of ours says, None where there is none or it is damaged."""
    return parse(read(path))


def parse(data: bytes | None) -> Any:
    """What such a file's bytes say."""
    try:
        return json.loads(data or b"")
    except ValueError:
        return None


@contextmanager
def drafted(out: Path) -> Iterator[Path]:
    """A path to write to, beside `out`: it replaces `out` on success and is deleted on an error."""
    draft = out.with_name(f".{out.name}.draft{out.suffix}")
    try:
        yield draft
        draft.replace(out)
    finally:
        draft.unlink(missing_ok=True)


def check_outside(path: Place, role: str = "output") -> None:
    """Raises InputError for a place within a Zarr store, which would take it for a part of its own."""
    for folder in path.resolve().parents:
        with suppress(PermissionError):  # whoever may write to a part of a bucket may not see the rest
            if (folder / "zarr.json").exists():
                raise InputError(f"{role} {path} lies within the store {folder}: choose a place beside it")


def check_file(path: Path, role: str = "output") -> None:
    """Raises InputError unless a file of that name can be written."""
    folder = path.absolute().parent
    if is_address(path):
        raise InputError(f"{role} {path} is an address: only maps can be there, give the name of a file")
    if path.is_dir():
        raise InputError(f"{role} {path} is a folder: give the name of a file")
    check_outside(path, role)
    if not folder.is_dir():
        raise InputError(f"{role} {path.name}: folder {folder} does not exist: make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{role} {path.name}: folder {folder} can't be written to, choose another")


def file_to_write(name: str | Path, endings: tuple[str, ...], role: str) -> Path:
    """The path of a file that can be written, by its ending and its folder. Raises InputError."""
    path = Path(name)
    if path.suffix.lower() not in endings:
        raise InputError(f"{role} {path.name!r} can't be written: endings are {', '.join(endings)}")
    check_file(path, role)
    return path


def write_table(frame: pd.DataFrame, path: Path) -> None:
    """The table as CSV (areas and shares to six decimals: a square metre) or Parquet, whole or not at all."""
    with drafted(path) as draft:
        if path.suffix.lower() == ".parquet":
            frame.to_parquet(draft, index=False)
        else:
            frame.to_csv(draft, index=False, float_format="%.6f")
