"""What a map holds: its periods, its finished super-tiles, their pixels as stored."""

from __future__ import annotations

import hashlib
import json

import numpy as np

from .errors import InputError
from .grid import Grid
from .inference import NOT_OBSERVED
from .scenes import Period, parse_period
from .store import Store


def sorted_periods(store: Store) -> list[Period]:
    """The periods of all zones of a map in order of time. Raises StoreError, InputError when there are none."""
    store.attributes()
    found = {period for group in store.groups() for period in store.periods(group)}
    if not found:
        raise InputError(f"{store.path} has nothing mapped yet")
    return sorted(found, key=lambda period: (period.start, period.end))


def choose_period(store: Store, date: str | Period | None, zone: str | None = None) -> Period:
    """The period that `date` names, the last one when None, of a zone or of any. Raises InputError, StoreError."""
    every = sorted_periods(store)
    periods = every if zone is None else [period for period in every if period in store.periods(zone)]
    if not periods:
        raise InputError(f"{store.path} has nothing mapped yet in {zone}")
    wanted = periods[-1] if date is None else parse_period(date)
    if wanted not in periods:
        raise InputError(f"the map has no period {wanted}: it has {', '.join(map(str, periods))}")
    return wanted


def computed_tiles(store: Store) -> list[Grid]:
    """The super-tiles that are done in any period; without a ledger, all that the arrays cover."""
    return [tile for group in store.groups() for tile in store.done(group)]


def read_periods(store: Store, tile: Grid, periods: list[Period], layer: str = "probability") -> np.ndarray:
    """What is stored of a super-tile in each period, uint8 (period, y, x), 255 where it was not (or never) mapped."""
    out = np.full((len(periods), *tile.shape), NOT_OBSERVED, np.uint8)
    if tile.group not in store.groups() or not store.grid(tile.group).covers(tile):
        return out
    present = store.periods(tile.group)
    for n, period in enumerate(periods):
        if period in present and (store.record(tile, period) or not store.meta.is_dir()):
            out[n] = store.read_tile(tile, present.index(period), layer)
    return out


def ledger_digest(store: Store, group: str) -> str:
    """A digest of all records of a zone: another one when any of its super-tiles was mapped, or mapped again."""
    records = {str(period): store.records(group, period) for period in store.periods(group)}
    return hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()
