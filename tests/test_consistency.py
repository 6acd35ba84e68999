"""The hidden Markov filter against all sequences of states, written out."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from test_areas import BOX, store_of

from minemap.areas import area_table
from minemap.consistency import CERTAIN, MINED, UNMINED, make_consistent, smooth, transition
from minemap.contents import computed_tiles
from minemap.errors import DamagedTileError, StoreError
from minemap.scenes import parse_period
from minemap.store import Store
from minemap.zones import CONSISTENT


def by_hand(percent, times, threshold):
    """Chance of mine in each year: the sum over every sequence of states, one pixel."""
    weights = np.zeros((len(percent), 2))
    for states in product((0, 1), repeat=len(percent)):
        chance = 0.5
        for before, after, gap in zip(states, states[1:], np.diff(times), strict=False):
            chance *= np.linalg.matrix_power(np.array([[1 - MINED, MINED], [UNMINED, 1 - UNMINED]]), gap)[
                before, after
            ]
        for state, seen in zip(states, percent, strict=True):
            if seen != 255:
                p = np.clip(seen / 100, CERTAIN, 1 - CERTAIN)
                chance *= p / threshold if state else (1 - p) / (1 - threshold)
        for year, state in enumerate(states):
            weights[year, state] += chance
    odds = weights[:, 1] / weights[:, 0] * threshold / (1 - threshold)
    return np.where(np.array(percent) == 255, 255, np.rint(100 * odds / (1 + odds)))


def test_every_sequence_of_states():
    rng = np.random.default_rng(3)
    times = [2016, 2017, 2018, 2020, 2023]
    percent = rng.integers(0, 101, (5, 4, 25)).astype(np.uint8)
    percent[rng.random(percent.shape) < 0.2] = 255
    found = smooth(percent, times, 0.628)
    expected = np.stack([by_hand(p, times, 0.628) for p in percent.reshape(5, -1).T], axis=1).reshape(percent.shape)
    assert found.dtype == np.uint8 and np.abs(found.astype(int) - expected).max() <= 1  # float32 and ties
    np.testing.assert_array_equal(found == 255, percent == 255)


def test_many_periods_of_one_day():
    """As much for as against, at the same time: nothing is known. In single precision, however many there are."""
    percent = np.array([100] * 6 + [0] * 6, np.uint8).reshape(-1, 1, 1)
    np.testing.assert_array_equal(smooth(percent, [2020] * 12, 0.5).ravel(), [50] * 12)


def test_a_year_alone_stays_as_it_was():
    percent = np.arange(101, dtype=np.uint8).reshape(1, 1, 101)
    expected = np.clip(percent, 100 * CERTAIN, 100 - 100 * CERTAIN)
    for threshold in (0.37, 0, 1):
        np.testing.assert_array_equal(smooth(percent, [2020], threshold), expected)


@pytest.mark.parametrize(
    ("seen", "mine"),
    [
        ([95, 95, 5, 95, 95], [1, 1, 1, 1, 1]),  # one bad year
        ([5, 5, 95, 5, 5], [0, 0, 0, 0, 0]),  # one false alarm
        ([5, 5, 95, 95, 95], [0, 0, 1, 1, 1]),  # a new mine
        ([95, 95, 95, 5, 5], [1, 1, 1, 0, 0]),  # mined no more: not absorbing
        ([95, 255, 255, 5, 5], [1, 255, 255, 0, 0]),  # not observed says nothing
    ],
)
def test_what_it_is_for(seen, mine):
    smoothed = smooth(np.array(seen, np.uint8).reshape(-1, 1, 1), range(2018, 2023), 0.5).ravel()
    assert np.where(smoothed == 255, 255, smoothed >= 50).tolist() == mine


def test_a_mine_goes_less_often_than_ground_is_mined():
    """The rates measured on mines6 (see `minemap.consistency`), and which is which."""
    assert (UNMINED, MINED) == (0.030, 0.052)
    after_two = transition(2)
    assert after_two[0, 1] > after_two[1, 0]  # (before, after): 0 not, 1 mine


def test_chances_of_many_years():
    two = transition(1) @ transition(1)
    np.testing.assert_allclose(transition(2), two)
    np.testing.assert_allclose(transition(0.5) @ transition(0.5), transition(1))
    np.testing.assert_allclose(transition(7).sum(axis=1), 1)


@pytest.fixture
def made(tmp_path):
    """Two years of four super-tiles, a tenth of it mine."""

    def paint(grid, _):
        return np.where(grid.y[:, None] > 687_500, 95, 2) + np.zeros(grid.shape, int)

    return store_of(tmp_path / "map.zarr", BOX, (2020, 2021), paint, "south-america-2026")


def areas(path):
    return area_table(path, bbox=BOX, layer=CONSISTENT)


def test_stopped_on_the_way_it_is_not_whole(made):
    """The last super-tile's shard is damaged: what was written before it is there, but does not count."""
    shard = made / "utm32620" / "probability" / "c" / "1" / "1" / "1"
    whole = shard.read_bytes()
    for _ in range(2):  # where there was none, and where there was a whole one
        shard.write_bytes(bytes(255 - byte for byte in whole))
        with pytest.raises(DamagedTileError, match="is damaged within"):
            make_consistent(made)
        first = computed_tiles(Store(made))[0]
        assert (Store(made).read_tile(first, 0, CONSISTENT) != 255).any()
        with pytest.raises(
            StoreError, match=r"no probability_consistent of all that is mapped now: .* makes it anew"
        ):
            areas(made)
        shard.write_bytes(whole)
        make_consistent(made)
        assert areas(made)["observed_fraction"].tolist() == pytest.approx([1, 1])


def test_what_is_mapped_again_makes_it_stale(made):
    make_consistent(made)
    store, tile, period = Store(made), computed_tiles(Store(made))[0], parse_period("2021")
    record = store.record(tile, period)
    store.write_record(tile, period, {**record, "items": ["another"]})
    with pytest.raises(StoreError, match="no probability_consistent of all that is mapped now"):
        areas(made)
    store.write_record(tile, period, record)
    assert len(areas(made)) == 2
    store.meta.rename(store.meta.with_name("elsewhere"))  # a copy without its ledger can't be mapped again
    assert len(areas(made)) == 2


def test_its_areas_have_no_measured_errors(made):
    """Those of the model are of the raw probability."""
    make_consistent(made)
    raw = area_table(made, bbox=BOX)
    assert raw["area_km2"].notna().all() and not raw["extrapolated"].any()
    assert areas(made)["area_km2"].notna().all() and areas(made)["extrapolated"].all()
