"""MineNetCD: its ChangeFFT against the formulas written as loops, and what the network promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from minemap.models import build
from minemap.models.minenetcd import DROP, ChangeFFT, MineNetCD

OPTIONS = {"in_channels": 3, "encoder": "resnet18", "width": 16}


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return build("minenetcd", **OPTIONS).eval()


def dft(image, sign):
    """Orthonormal transform over (y, x) as four nested loops, complex128."""
    height, width = image.shape
    out = np.zeros((height, width), complex)
    for v in range(height):
        for u in range(width):
            for y in range(height):
                for x in range(width):
                    out[v, u] += image[y, x] * np.exp(sign * 2j * np.pi * (v * y / height + u * x / width))
    return out / np.sqrt(height * width)


def layer(spectrum, weight, bias):
    """A complex linear layer inside each of four contiguous groups of channels; spectrum complex (C, h, w)."""
    out, size = np.zeros_like(spectrum), len(spectrum) // 4
    for group in range(4):
        for o in range(size):
            for i in range(size):
                w = weight[0, group, i, o] + 1j * weight[1, group, i, o]
                out[group * size + o] += spectrum[group * size + i] * w
            out[group * size + o] += bias[0, group, o] + 1j * bias[1, group, o]
    return out


def both_parts(function, values):
    return function(values.real) + 1j * function(values.imag)


@pytest.mark.parametrize("shape", [(8, 4, 4), (4, 3, 5), (12, 1, 2)])
def test_change_fft_equals_the_formulas_as_loops(shape):
    torch.manual_seed(1)
    module = ChangeFFT(shape[0]).eval()
    with torch.no_grad():
        for parameter in module.parameters():  # far from the start, so that every part matters
            parameter.add_(0.5 * torch.randn_like(parameter))
    x = torch.randn(2, *shape)
    p = {name: value.detach().double().numpy() for name, value in module.named_parameters()}
    for sample, got in zip(x.double().numpy(), module(x).detach().numpy(), strict=True):
        centred = sample - sample.mean(axis=0)
        normed = centred / np.sqrt((centred**2).mean(axis=0) + 1e-6)
        normed = normed * p["norm.weight"][:, None, None] + p["norm.bias"][:, None, None]
        spectrum = np.stack([dft(channel, -1) for channel in normed])
        hidden = both_parts(lambda v: np.maximum(v, 0), layer(spectrum, p["first.weight"], p["first.bias"]))
        mixed = layer(hidden, p["second.weight"], p["second.bias"])
        shrunk = both_parts(lambda v: np.sign(v) * np.maximum(np.abs(v) - 0.01, 0), mixed)
        expected = sample + np.stack([dft(channel, 1).real for channel in shrunk])
        assert np.abs(got - expected).max() < 1e-5


def test_change_fft_starts_small_and_has_the_papers_size():
    torch.manual_seed(0)
    module = ChangeFFT(64)
    assert sum(p.numel() for p in module.parameters()) == 64**2 + 4 * 64 + 2 * 64
    weights = torch.cat([p.detach().flatten() for n, p in module.named_parameters() if not n.startswith("norm")])
    assert float(weights.std()) == pytest.approx(0.02, rel=0.05) and abs(float(weights.mean())) < 1e-3
    assert module(torch.ones(1, 64, 2, 2).bfloat16()).dtype == torch.bfloat16


def test_change_fft_is_dropped_now_and_then_in_training():
    torch.manual_seed(0)
    module = ChangeFFT(8)
    x = torch.randn(400, 8, 2, 2)
    untouched = (module(x) == x).flatten(1).all(dim=1).float().mean()
    assert float(untouched) == pytest.approx(DROP, abs=0.05)
    assert not (module.eval()(x) == x).flatten(1).all(dim=1).any()


@pytest.mark.parametrize("change_fft", [True, False])
def test_every_weight_gets_a_gradient(change_fft):
    torch.manual_seed(0)
    network = MineNetCD(**OPTIONS, change_fft=change_fft)
    for module in network.modules():
        if isinstance(module, ChangeFFT):
            module.drop.p = 0.0
    network(torch.randn(2, 6, 64, 64)).square().mean().backward()
    without = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []
    assert any(isinstance(m, ChangeFFT) for m in network.modules()) == change_fft


@pytest.mark.parametrize("shape", [(32, 32), (64, 96), (160, 32)])
def test_shapes(network, shape):
    x = torch.randn(1, 6, *shape)
    with torch.no_grad():
        assert network(x).shape == (1, 1, *shape)
        assert network.both_ways(x).shape == (1, 2, *shape)


def test_both_ways_are_the_two_orders_of_the_dates(network):
    x = torch.randn(2, 6, 64, 64)
    with torch.no_grad():
        both = network.both_ways(x)
        gain, loss = network(x), network(torch.cat([x[:, 3:], x[:, :3]], dim=1))
    assert torch.allclose(both, torch.cat([gain, loss], dim=1), atol=1e-5)
    assert not torch.allclose(gain, loss, atol=1e-3)


def test_equal_dates_are_no_news(network):
    """The differences vanish: nothing of the image is left in the answer but its window's frame."""
    one, other = torch.randn(2, 1, 3, 64, 64)
    with torch.no_grad():
        answers = [network(torch.cat([x, x], dim=1)) for x in (one, other)]
    assert torch.equal(*answers)


def test_what_is_absent_is_mirrored_in_each_date(network):
    x = torch.randn(1, 6, 64, 64)
    x[:, :3, :, 33:] = x[:, :3, :, 1:32].flip(-1)  # by reflection at column 32
    hidden = x.clone()
    hidden[:, :3, :, 33:] = 0
    with torch.no_grad():
        assert torch.allclose(network(hidden), network(x), atol=1e-5)


def test_starts_from_a_network_of_single_dates(network):
    torch.manual_seed(3)
    single = build("fpn", encoder_name="resnet18", in_channels=3)
    started = MineNetCD(**OPTIONS).start_from(single)
    assert all(
        torch.equal(a, b) for a, b in zip(started.encoder.parameters(), single.encoder.parameters(), strict=True)
    )
    copy = MineNetCD(**OPTIONS).start_from(network).eval()
    x = torch.randn(1, 6, 32, 32)
    with torch.no_grad():
        assert torch.equal(copy(x), network(x))
