"""Everything minemap raises on purpose: one base class, a leaf per kind of failure.

A message is one line: what happened, with which value, and what to do instead. The command line prints it
and exits with the class's `status`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable


class MinemapError(Exception):
    """Base of all errors that a user can do something about."""

    status = 1  # exit status of the command line


class InputError(MinemapError):
    """An argument that can never work: a box, a date, a name, a number out of range."""

    status = 2


class CatalogueError(MinemapError):
    """A STAC source that cannot be reached or read, or that answers something else than STAC."""


class NoItemsError(CatalogueError):
    """The search found nothing, or the filters removed everything."""


class ReadError(MinemapError):
    """An asset that could not be read, or that is not allowed to be opened."""


class CheckpointError(MinemapError):
    """A model that does not exist, or whose bytes are not those its checksum promises."""


class StoreError(MinemapError):
    """A store that is not ours, is not readable or writable, or was made with other parameters."""


class DamagedTileError(StoreError):
    """A super-tile whose stored bytes are not those that were written."""


class ClusterError(MinemapError):
    """A scheduler that can't be reached, or workers that can't do the work."""


class TooLittleMemoryError(MinemapError):
    """Not even one window at a time fits into the memory of a worker or a GPU."""


def first_line(error: BaseException) -> str:
    """The first line of what an error of a library says, in few words where nobody answered."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    refused = re.search(r"(Connection refused|Name or service not known|timed out|No route to host)", str(error))
    return refused[1] if refused else text[:200]


def exit_status(command: Callable[[], object]) -> int:
    """Of a module run by itself (`python -m`): what is raised on purpose is told in one line, as `minemap` does."""
    try:
        command()
    except MinemapError as error:
        print(f"minemap: {error}", file=sys.stderr)
        return error.status
    return 0
