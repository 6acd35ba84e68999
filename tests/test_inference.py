"""Windows, batches and the lazy prediction against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr

from minemap import predict
from minemap.checkpoint import load_model
from minemap.errors import InputError
from minemap.grid import Grid
from minemap.inference import Settings, percent, probability
from minemap.scenes import MARGIN
from minemap.sentinel2 import BANDS
from minemap.tiles import Layout, run_windows

SETTINGS = Settings("fp32", 2)


def picture(height, width, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.uniform(0.01, 0.4, (len(BANDS), height, width)).astype(np.float32)
    image[:, 200:220, 250:290] = np.nan
    return image


def blue(windows):
    """A network whose answer is known: the blue band."""
    return np.nan_to_num(windows[:, 0])


@pytest.mark.parametrize(("window", "halo", "batch"), [(64, 8, 3), (32, 1, 1), (128, 32, 8), (64, 32, 2)])
def test_every_pixel_gets_its_own_answer(window, halo, batch):
    layout = Layout(window, halo, batch)
    image = picture(256 + 2 * layout.margin, 384 + 2 * layout.margin)
    inner = (slice(layout.margin, -layout.margin),) * 2
    got = run_windows(image, blue, layout)
    assert got.shape == (256, 384)
    np.testing.assert_allclose(got, image[0][inner], rtol=1e-6)


def test_one_window_fades_into_the_next():
    """Windows that each say their own level: steps no larger than the ramp's, levels within theirs."""
    layout, levels = Layout(64, 8, 1), iter(np.random.default_rng(0).permutation(np.linspace(0, 1, 25)))
    image = np.zeros((1, 256 + 2 * layout.margin, 256 + 2 * layout.margin), np.float32)
    got = run_windows(image, lambda w: np.full((1, *w.shape[2:]), next(levels), np.float32), layout)
    assert max(abs(np.diff(got, axis=axis)).max() for axis in (0, 1)) <= 1 / 16 + 1e-6
    assert got.min() >= 0 and got.max() <= 1 and len(np.unique(got[::64, ::64])) == 16


def test_scenes_are_chosen_for_all_that_windows_see():
    assert Layout().margin == MARGIN


def test_equal_answers_stay_what_they_are():
    layout = Layout(256, 32, 4)
    image = np.zeros((1, 512 + 2 * layout.margin, 256 + 2 * layout.margin), np.float32)
    got = run_windows(image, lambda w: np.full((len(w), *w.shape[2:]), 0.7, np.float32), layout)
    np.testing.assert_allclose(got, 0.7, rtol=1e-6)


def test_batches_are_always_full_and_empty_windows_are_skipped():
    shapes = []

    def network(windows):
        shapes.append(windows.shape)
        return np.zeros((len(windows), *windows.shape[-2:]), np.float32)

    image = picture(4 * 32 + 40, 32 + 40)  # 5 x 2 windows
    image[:, :72] = np.nan  # two of the rows and the overlap with the third
    run_windows(image, network, Layout(32, 4, 4))
    assert shapes == [(4, len(BANDS), 40, 40)] * 2
    with pytest.raises(ValueError, match="does not divide into windows"):
        run_windows(image[:, :-1], network, Layout(32, 4, 4))


def test_the_network_gives_what_torch_gives_window_by_window(model, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # of a GPU
    checkpoint = load_model(model)
    image = picture(512 + 320, 256 + 320)
    got = probability(image, checkpoint, SETTINGS)
    network, total, weights = checkpoint.network(), np.zeros((832, 576)), np.zeros((832, 576))
    across = np.minimum(np.arange(1, 640, 2), np.arange(639, 0, -2)).clip(max=128)  # 64 px up and down
    for row in (0, 256, 512):
        for column in (0, 256):
            place = slice(row, row + 320), slice(column, column + 320)
            window = checkpoint.recipe.normalise(torch.from_numpy(image[None, :, *place]))
            with torch.inference_mode():
                answer = torch.sigmoid(network(window))[0, 0].numpy()
            total[place] += np.outer(across, across) * answer
            weights[place] += np.outer(across, across)
    expected = (total / weights)[160:-160, 160:-160]
    seen = ~np.isnan(image[0, 160:-160, 160:-160])
    np.testing.assert_allclose(got[seen], expected[seen], atol=1e-5)


def test_streams_do_not_change_a_byte(model):
    checkpoint = load_model(model)
    image = picture(1024 + 320, 512 + 320)
    for precision in ("fp32", "bf16"):
        one, two = (probability(image, checkpoint, Settings(precision, n)) for n in (1, 2))
        assert one.tobytes() == two.tobytes()


def test_bf16_is_within_two_levels_of_fp32(model):
    image = picture(1024 + 320, 512 + 320)
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
    assert (reference[200:220, 250:290] == 255).all() and (reference != 255).mean() > 0.99
    chunked = predict(image.chunk(y=300, x=411), checkpoint, precision="fp32")
    assert chunked.chunks is not None
    np.testing.assert_array_equal(chunked.values, reference)
    cut = predict(image.isel(y=slice(100, 900), x=slice(37, 1000)), checkpoint, precision="fp32")
    # pixels whose windows all lie inside both arrays: that of the row of 512, those of the columns of 256 to 768
    np.testing.assert_array_equal(cut.values[316:508, 123:827], reference[416:608, 160:864])
    assert cut["y"].values[0] == image["y"].values[100]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (lambda i: i.assign_coords(x=i.x - 5, y=i.y + 5), "is off the zone's lattice"),  # corners, as stackstac has
        (lambda i: i.isel(y=slice(None, None, -1)), "y descending"),
        (lambda i: i.assign_coords(x=i.x / 1e5, y=i.y / 1e5), "in the metres of a UTM zone"),
        (lambda i: i.isel(x=slice(None, None, -1)), "is off the zone's lattice"),
        (lambda i: i.isel(y=slice(None, None, 2)), "is off the zone's lattice"),
        (lambda i: i.isel(x=np.r_[0:100, 120:256]), "is off the zone's lattice"),
        (lambda i: i.isel(x=slice(1)), "image is 256 x 1 px"),
        (lambda i: i.isel(band=0), "image has dimensions y, x"),
        (lambda i: i.drop_vars("band"), "image has no names of its bands"),
        (lambda i: i.assign_coords(band=[f"B{n}" for n in range(6)]), "name them once each, of blue, green"),
        (lambda i: i.assign_coords(band=["blue"] * 6), "image has bands blue, blue"),
        (lambda i: (i * 10_000).fillna(0).astype(np.uint16), "give reflectance as floats"),
    ],
)
def test_images_off_the_lattice_are_refused(model, changed, told):
    image = array(picture(256, 256), Grid(32620, 450_560.0, 696_320.0, 256, 256))
    with pytest.raises(InputError, match=told):
        predict(changed(image), load_model(model))
    with pytest.raises(InputError, match="checkpoint is a str"):
        predict(image, "demo-2026")


def test_a_missing_band_counts_as_absent(model):
    grid = Grid(32620, 450_560.0, 696_320.0, 256, 256)
    image = array(picture(256, 256), grid)
    without = image.copy()
    without.loc[{"band": "swir22"}] = np.nan
    one = predict(image.drop_sel(band="swir22"), load_model(model), precision="fp32")
    two = predict(without, load_model(model), precision="fp32")
    np.testing.assert_array_equal(one.values, two.values)
