"""The composite against numpy's own medians."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from minemap.compositing import Rule, _sorting_network, composite, composite_looks
from minemap.errors import InputError

PLAIN = Rule(min_clear=1, rescue=False)


def run(values, scl, looks=None, rule=PLAIN):
    looks = np.arange(len(scl)) if looks is None else np.asarray(looks)
    present = [bool(band.any()) for band in values]
    return composite_looks(lambda b: values[b], present, scl, looks, rule)


@pytest.mark.parametrize("n", range(13))
def test_the_network_sorts_all_numbers(n):
    values = np.arange(2**n)[None] >> np.arange(n)[:, None] & 1  # what sorts every row of 0 and 1 sorts all numbers
    for low, high in _sorting_network(n):
        values[[low, high]] = np.sort(values[[low, high]], axis=0)
    assert (np.diff(values, axis=0) >= 0).all()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 70), st.integers(0, 10_000))
def test_median_and_count_equal_numpys(n, seed):
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 12_000, (2, n, 5, 7)).astype(np.uint16)
    values[rng.random(values.shape) < 0.1] = 0
    values[:, :, 0, 0] = 0
    values[0, 0, 1, 1] = 65_534
    scl = rng.integers(0, 12, (n, 5, 7)).astype(np.uint8)
    image, count = run(values, scl)
    clear = ~np.isin(scl, PLAIN.masked)
    expected = np.where(clear & (values > 0), values / 1e4, np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of pixels without a look
        medians = np.nanmedian(expected, axis=1)
    counts = np.isfinite(expected).sum(axis=1).min(axis=0)
    medians[:, counts < 1] = np.nan
    np.testing.assert_allclose(image, medians, rtol=1e-6)
    np.testing.assert_array_equal(count, counts)


def test_layers_of_one_look_count_once_and_the_first_clear_one_wins():
    values = np.array([[[[100]], [[300]], [[500]]]], np.uint16)
    scl = np.full((3, 1, 1), 4, np.uint8)
    image, count = run(values, scl, looks=[0, 0, 1])
    assert image[0, 0, 0] == pytest.approx(0.03) and count[0, 0] == 2  # median of 100 and 500
    scl[0] = 9
    image, count = run(values, scl, looks=[0, 0, 1])
    assert image[0, 0, 0] == pytest.approx(0.04) and count[0, 0] == 2  # the other layer steps in


def test_min_clear_hides_and_still_counts():
    values = np.full((1, 3, 1, 2), 1000, np.uint16)
    scl = np.array([[[4, 4]], [[4, 9]], [[4, 9]]], np.uint8)
    image, count = run(values, scl, rule=Rule(min_clear=3))
    assert image[0, 0, 0] == pytest.approx(0.1) and np.isnan(image[0, 0, 1])
    assert count.tolist() == [[3, 1]]


def test_stable_bright_ground_that_scl_calls_cloud_is_rescued_and_cloud_is_not():
    rng = np.random.default_rng(1)
    tailings = rng.normal(5000, 150, (10, 1))
    clouds = rng.uniform(1500, 9000, (10, 1))
    values = np.concatenate([tailings, clouds], axis=1)[None, :, None].astype(np.uint16).repeat(3, axis=0)
    scl = np.full((10, 1, 2), 9, np.uint8)
    scl[0] = 5
    image, count = run(values, scl, rule=Rule(min_clear=3))
    assert image[:, 0, 0] == pytest.approx(np.median(values[0, :, 0, 0]) / 1e4) and count[0, 0] == 10
    assert np.isnan(image[:, 0, 1]).all() and count[0, 1] == 1
    image, count = run(values, scl, rule=Rule(min_clear=3, rescue=False))
    assert np.isnan(image).all() and (count == 1).all()
    few = run(values[:, :3], scl[:3], rule=Rule(min_clear=1))
    assert few[1].max() == 1  # three looks prove no stability


def test_a_band_that_is_nowhere_does_not_hide_the_others():
    values = np.zeros((2, 3, 1, 1), np.uint16)
    values[0] = 700
    image, count = run(values, np.full((3, 1, 1), 4, np.uint8))
    assert image[0, 0, 0] == pytest.approx(0.07) and np.isnan(image[1, 0, 0]) and count[0, 0] == 3


def test_a_band_that_some_items_lack_counts_the_same_in_any_cut():
    values = np.full((2, 4, 1, 6), 1000, np.uint16)
    values[1, :, :, 3:] = 0
    scl = np.full((4, 1, 6), 4, np.uint8)
    whole = composite_looks(lambda b: values[b], [True, True], scl, np.arange(4), PLAIN)
    right = composite_looks(lambda b: values[b][..., 3:], [True, True], scl[..., 3:], np.arange(4), PLAIN)
    np.testing.assert_array_equal(whole[0][..., 3:], right[0])
    np.testing.assert_array_equal(whole[1][..., 3:], right[1])
    assert not right[1].any()


def test_nothing_at_all():
    image, count = run(np.zeros((2, 0, 3, 3), np.uint16), np.zeros((0, 3, 3), np.uint8), looks=[])
    assert np.isnan(image).all() and not count.any()


def test_bad_cubes_and_an_empty_one():
    cube = xr.DataArray(np.zeros((0, 1, 2, 2), np.float32), dims=("time", "band", "y", "x"), coords={"band": ["red"]})
    assert composite(cube).dtype == np.float32 and np.isnan(composite(cube).values).all()
    with pytest.raises(InputError, match="cube has dimensions time, y, x"):
        composite(cube.isel(band=0))
    with pytest.raises(InputError, match="rule is a dict"):
        composite(cube, {"min_clear": 2})


def test_public_composite_is_lazy_and_the_same():
    rng = np.random.default_rng(3)
    stored = rng.integers(1, 9000, (6, 2, 20, 30)).astype(np.uint16)
    scl = rng.choice(np.array([4, 5, 9], np.uint8), (6, 20, 30))
    cube = xr.DataArray(
        stored.astype(np.float32) * np.float32(1e-4),
        dims=("time", "band", "y", "x"),
        coords={"band": ["blue", "red"], "scl": (("time", "y", "x"), scl), "acquisition": ("time", list("aabbcd"))},
    )
    eager = composite(cube, PLAIN)
    lazy = composite(cube.chunk(time=1, band=1, y=7, x=9), PLAIN)
    assert lazy.chunks is not None
    image, count = run(stored.transpose(1, 0, 2, 3), scl, looks=[0, 0, 1, 1, 2, 3])
    for got in (eager, lazy):
        np.testing.assert_array_equal(got.values, image)
        np.testing.assert_array_equal(got["observations"].values, count)


@pytest.mark.parametrize(
    ("bad", "message"),
    [({"method": "mean"}, "median is the only"), ({"min_clear": 0}, "at least one"), ({"masked": (12,)}, "0 to 11")],
)
def test_bad_rules(bad, message):
    with pytest.raises(InputError, match=message):
        Rule(**bad)


def test_a_class_told_twice_is_masked_once():
    rule = Rule(masked=(8, 8, 3))
    assert rule == Rule(masked=(3, 8)) and rule.as_dict()["masked"] == [3, 8]
    looks = np.full((3, 1, 1), 2000, np.uint16)
    classes = np.array([8, 9, 4], np.uint8).reshape(3, 1, 1)
    _, count = composite_looks(
        lambda _: looks.copy(), [True], classes, np.arange(3), Rule(masked=(8, 8), min_clear=1)
    )
    assert count.item() == 2  # a sum of bits would have masked 9


def test_negative_reflectance_is_dark():
    values = np.array([-0.0005, np.nan, 7.0], np.float32).reshape(1, 1, 1, 3)
    cube = xr.DataArray(np.repeat(values, 3, axis=0), dims=("time", "band", "y", "x"), coords={"band": ["red"]})
    image = composite(cube).values.ravel()
    assert image[0] == pytest.approx(1e-4) and np.isnan(image[1]) and image[2] == pytest.approx(6.5535, abs=1e-3)


def test_looks_are_counted_to_255():
    looks = np.full((300, 1, 1), 2000, np.uint16)
    classes = np.full((300, 1, 1), 4, np.uint8)
    _, count = composite_looks(lambda _: looks.copy(), [True], classes, np.arange(300), Rule())
    assert count.dtype == np.uint8 and count.item() == 255


@pytest.mark.parametrize(("seen", "cloudy", "counted"), [(3, 3, 0), (4, 4, 4), (5, 4, 1), (6, 5, 6)])
def test_bright_ground_needs_looks_enough_to_be_rescued(seen, cloudy, counted):
    """As many as `rescue_looks`, of which more than `rescue_share` are called cloud."""
    looks, classes = np.zeros((6, 1, 1), np.uint16), np.zeros((6, 1, 1), np.uint8)  # the others show nothing here
    looks[:seen], classes[:seen], classes[cloudy:seen] = 6000, 9, 4
    _, count = composite_looks(lambda _: looks.copy(), [True], classes, np.arange(6), Rule())
    assert count.item() == counted
