"""Open water: a reservoir is judged as a whole, a pond is not."""

from __future__ import annotations

import numpy as np
import pytest

from minemap.sentinel2 import BANDS
from minemap.water import BODY_HA, settle_open_water

SIDE = 320
GREEN, NIR = BANDS.index("green"), BANDS.index("nir")


def window(*, water):
    """Land everywhere but in `water` (y, x slices), reflectance float32 (1, band, y, x)."""
    image = np.full((1, len(BANDS), SIDE, SIDE), 0.1, np.float32)
    image[:, NIR] = 0.3
    image[:, NIR][(slice(None), *water)] = 0.02
    return image


def settled(image, chance, bands=BANDS, resolution=10.0):
    return settle_open_water(image, chance, bands=bands, resolution=resolution)


def test_a_shore_does_not_spill_into_a_reservoir():
    chance = np.zeros((1, SIDE, SIDE), np.float32)
    chance[:, :, 96:104] = 0.9  # a bright beach that ends at 100, where the water begins
    image = window(water=(slice(None), slice(100, None)))
    found = settled(image, chance)
    assert not found[:, :, 100:].any()
    np.testing.assert_array_equal(found[:, :, :100], chance[:, :, :100])
    assert chance[0, 0, 101] == np.float32(0.9)  # what was given is left alone


def test_a_pond_and_a_body_that_the_network_calls_mine_stay():
    side = int(np.sqrt(BODY_HA * 1e4) / 10)
    pond = (slice(0, side - 1), slice(0, side))
    chance = np.full((1, SIDE, SIDE), 0.05, np.float32)
    np.testing.assert_array_equal(settled(window(water=pond), chance), chance)
    whole = (slice(0, side), slice(0, side))
    assert not settled(window(water=whole), chance)[(0, *whole)].any()
    mined = chance.copy()
    mined[0, : side // 2] = 0.8
    np.testing.assert_array_equal(settled(window(water=whole), mined), mined)
    assert not settled(window(water=pond), chance, resolution=30.0)[(0, *pond)].any()  # nine times as large


@pytest.mark.parametrize("absent", [GREEN, NIR])
def test_without_the_bands_nothing_changes(absent):
    chance = np.full((1, SIDE, SIDE), 0.05, np.float32)
    image = window(water=(slice(None), slice(None)))
    bands = [b for b in BANDS if b != BANDS[absent]]
    np.testing.assert_array_equal(settled(np.delete(image, absent, axis=1), chance, tuple(bands)), chance)
    image[:, absent] = np.nan
    np.testing.assert_array_equal(settled(image, chance), chance)
