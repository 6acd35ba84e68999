"""Years of a map made consistent with each other: a mine seldom comes and goes, but it may do both.

A hidden Markov model with two states (Rabiner 1989, Proceedings of the IEEE 77:257-286), pixel by pixel: every year's
probability is evidence for the state of that year, weighed against how rarely a state changes. Neither state is
absorbing. The smoothed state uses later years too, so a new year may revise those before it: the result is kept
beside the map's own probability, never in its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from .contents import computed_tiles, ledger_digest, read_periods, sorted_periods
from .errors import StoreError
from .inference import NOT_OBSERVED
from .store import Store
from .zones import CONSISTENT

# Chance a year that a pixel changes its state. Measured on the two-date masks of mines6 (494 places in and around
# the Amazon, 2 to 4 years apart): 10.3 % of the mined pixels are not mine at the second date, 3.0 % a year; of the
# others, 5.2 % a year become mine, in places chosen because mines emerge there.
UNMINED, MINED = 0.030, 0.052
CERTAIN = 0.02  # no year's evidence counts as more certain than this: a network's errors repeat
ROWS = 256  # of a super-tile smoothed at a time


def smooth(percent: np.ndarray, times: Sequence[float], threshold: float) -> np.ndarray:
    """Probability in per cent given all years, uint8 like `percent` (time, y, x), 255 where that is 255.

    times: years, ascending, as numbers. threshold: 0-1, from which a pixel counts as mine, before and after: a year's
    evidence is the odds of its probability against those of the threshold, so a single year comes out as it was
    (within CERTAIN). A year not observed says nothing and stays 255.
    """
    base = _log_odds(np.clip(np.array(threshold, np.float32), CERTAIN, 1 - CERTAIN))
    evidence = _log_odds(np.clip(percent.astype(np.float32) / 100, CERTAIN, 1 - CERTAIN)) - base
    evidence = np.where(percent == NOT_OBSERVED, np.float32(0), evidence)
    forward, backward = _past(evidence, times), _future(evidence, times)
    chance = 1 / (1 + np.exp(-(forward + evidence + backward + base)))
    return np.where(percent == NOT_OBSERVED, percent, np.rint(chance * 100)).astype(np.uint8)


def _log_odds(chance: np.ndarray) -> np.ndarray:
    return np.log(chance / (1 - chance))


def transition(years: float) -> np.ndarray:
    """Chance of each state (0 not, 1 mine) after some years, given each before: float64 (before, after)."""
    both = UNMINED + MINED
    settled = np.array([[UNMINED, MINED], [UNMINED, MINED]]) / both
    return settled + (np.eye(2) - settled) * (1 - both) ** years


def _past(evidence: np.ndarray, times: Sequence[float]) -> np.ndarray:
    """Log odds of mine in each year from the years before it, float32 (time, y, x); even odds at the start."""
    out = np.zeros_like(evidence)
    for n in range(1, len(times)):
        odds = np.exp(out[n - 1] + evidence[n - 1])
        move = transition(times[n] - times[n - 1])
        out[n] = np.log((move[0, 1] + move[1, 1] * odds) / (move[0, 0] + move[1, 0] * odds))
    return out


def _future(evidence: np.ndarray, times: Sequence[float]) -> np.ndarray:
    """Log of how much likelier the years after it are if a year is mine than if not, float32 (time, y, x)."""
    out = np.zeros_like(evidence)
    for n in reversed(range(len(times) - 1)):
        odds = np.exp(out[n + 1] + evidence[n + 1])
        move = transition(times[n + 1] - times[n])
        out[n] = np.log((move[1, 0] + move[1, 1] * odds) / (move[0, 0] + move[0, 1] * odds))
    return out


def make_consistent(path: str | Path) -> None:
    """Writes `probability_consistent` of every period into the map `path`, from all of its periods.

    Stopped on the way it leaves none that counts. Raises InputError, StoreError.
    """
    store = Store.at(path)
    threshold = store.attributes()["recipe"]["threshold"]
    if not store.meta.is_dir():
        raise StoreError(f"{store.path} has lost {store.meta.name}: put it beside the store again")
    with store.locked() as store:
        digests = {group: ledger_digest(store, group) for group in store.groups()}
        periods = sorted_periods(store)
        times = [period.start.toordinal() / 365.2425 for period in periods]
        for group in store.groups():
            store.add_consistent(group, None)
        for tile in computed_tiles(store):
            values = read_periods(store, tile, periods)
            for rows in _strips(len(values[0])):
                values[:, rows] = smooth(values[:, rows], times, threshold)
            present = store.periods(tile.group)
            for period, data in zip(periods, values, strict=True):
                if period in present:
                    store.write_tile(tile, present.index(period), {CONSISTENT: data})
        for group, digest in digests.items():
            store.add_consistent(group, digest)
        store.consolidate()


def _strips(height: int) -> Iterator[slice]:
    yield from (slice(start, start + ROWS) for start in range(0, height, ROWS))
