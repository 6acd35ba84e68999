"""Windows, batches and the lazy prediction against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr

from minemap import predict
from minemap.checkpoint import load_model
from minemap.grid import Grid
from minemap.inference import Settings, percent, probability
from minemap.sentinel2 import BANDS
from minemap.tiles import Layout, run_windows

SETTINGS = Settings("fp32", 2)


def picture(height, width, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.uniform(0.01, 0.4, (len(BANDS), height, width)).astype(np.float32)
    image[:, 40:60, 50:90] = np.nan
    return image


def mean_network(windows):
    """Known answer: the mean of the blue band over 3 × 3 pixels, nan-aware only in its middle."""
    blue = np.nan_to_num(windows[:, 0])
    rows = sum(np.roll(blue, shift, axis=1) for shift in (-1, 0, 1))
    return (sum(np.roll(rows, shift, axis=2) for shift in (-1, 0, 1)) / 9).astype(np.float32)


@pytest.mark.parametrize(("window", "halo", "batch"), [(64, 8, 3), (32, 1, 1), (128, 32, 8)])
def test_tiled_equals_whole_for_a_local_network(window, halo, batch):
    image = picture(256 + 2 * halo, 384 + 2 * halo)
    whole = mean_network(image[None])[0, halo:-halo, halo:-halo]
    got = run_windows(image, mean_network, Layout(window, halo, batch))
    seen = ~np.isnan(image[0, halo:-halo, halo:-halo])
    np.testing.assert_allclose(got[seen], whole[seen], rtol=1e-6)
    assert np.isnan(got[~seen]).all()


def test_batches_are_always_full_and_empty_windows_are_skipped():
    shapes = []

    def network(windows):
        shapes.append(windows.shape)
        return np.zeros((len(windows), *windows.shape[-2:]), np.float32)

    image = picture(5 * 32 + 8, 32 + 8)
    image[:, :36] = np.nan
    run_windows(image, network, Layout(32, 4, 3))
    assert shapes == [(3, len(BANDS), 40, 40)] * 2
    with pytest.raises(ValueError, match="does not divide into windows"):
        run_windows(image[:, :-1], network, Layout(32, 4, 3))


def test_the_network_gives_what_torch_gives_window_by_window(model):
    checkpoint = load_model(model)
    image = picture(512 + 64, 256 + 64)
    got = probability(image, checkpoint, SETTINGS)
    network = checkpoint.network()
    for row in (0, 256):
        window = checkpoint.recipe.normalise(image[None, :, row : row + 320])
        with torch.inference_mode():
            expected = torch.sigmoid(network(torch.from_numpy(window)))[0, 0, 32:-32, 32:-32].numpy()
        seen = ~np.isnan(image[0, 32 + row : 288 + row, 32:-32])
        np.testing.assert_allclose(got[row : row + 256][seen], expected[seen], atol=1e-5)


def test_streams_do_not_change_a_byte(model):
    checkpoint = load_model(model)
    image = picture(1024 + 64, 512 + 64)
    for precision in ("fp32", "bf16"):
        one, two = (probability(image, checkpoint, Settings(precision, n)) for n in (1, 2))
        assert one.tobytes() == two.tobytes()


def test_bf16_is_within_two_levels_of_fp32(model):
    image = picture(1024 + 64, 512 + 64)
    one, two = (percent(probability(image, load_model(model), Settings(p))).astype(int) for p in ("fp32", "bf16"))
    assert ((one == 255) == (two == 255)).all()
    assert (abs(one - two) <= 2).mean() > 0.999


def array(image, grid):
    coords = {"band": list(BANDS), "y": grid.y, "x": grid.x}
    return xr.DataArray(image, dims=("band", "y", "x"), coords=coords)


def test_lazy_prediction_is_the_zones_own_whatever_the_chunks_and_the_cut(model):
    checkpoint = load_model(model)
    grid = Grid(32620, 450_560.0, 696_320.0, 1024, 1024)
    image = array(picture(1024, 1024), grid)
    whole = predict(image, checkpoint, precision="fp32")
    assert whole.dtype == np.uint8 and whole.dims == ("y", "x")
    reference = whole.values
    assert (reference[40:60, 50:90] == 255).all() and (reference != 255).mean() > 0.99
    chunked = predict(image.chunk(y=300, x=411), checkpoint, precision="fp32")
    assert chunked.chunks is not None
    np.testing.assert_array_equal(chunked.values, reference)
    cut = predict(image.isel(y=slice(100, 900), x=slice(37, 1000)), checkpoint, precision="fp32")
    # windows whose 320 px lie inside both arrays: rows 256-767, columns 256-767
    np.testing.assert_array_equal(cut.values[156:668, 219:731], reference[256:768, 256:768])
    assert cut["y"].values[0] == image["y"].values[100]


def test_a_missing_band_counts_as_absent(model):
    grid = Grid(32620, 450_560.0, 696_320.0, 256, 256)
    image = array(picture(256, 256), grid)
    without = image.copy()
    without.loc[{"band": "swir22"}] = np.nan
    one = predict(image.drop_sel(band="swir22"), load_model(model), precision="fp32")
    two = predict(without, load_model(model), precision="fp32")
    np.testing.assert_array_equal(one.values, two.values)
