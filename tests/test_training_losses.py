"""Each loss against a second computation (numpy loops, kornia, scikit-image), and at its edges."""

from __future__ import annotations

import kornia
import numpy as np
import pytest
import torch
from skimage.filters import sobel_h, sobel_v
from torch import Tensor

from minemap.training import losses
from minemap.training.config import SELECTIONS
from minemap.training.losses import IGNORE, LossWeights


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    """Logits and a mask with blobs, both (3, 1, 32, 40); a strip of the mask is 255."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 1, 32, 40, generator=generator)
    blobs = torch.nn.functional.avg_pool2d(torch.randn(3, 1, 38, 46, generator=generator), 7, stride=1)
    target = (blobs > 0).to(torch.uint8)
    target[:, :, :5, :7] = IGNORE
    target[1, :, 20:22, 30:33] = IGNORE
    return logits, target


def _arrays(logits: Tensor, target: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    z, t = logits.double().numpy()[:, 0], target.numpy()[:, 0]
    return 1 / (1 + np.exp(-z)), t == 1, t != IGNORE


def test_bce(pair: tuple[Tensor, Tensor]) -> None:
    p, truth, counted = _arrays(*pair)
    expected = np.mean(-np.log(np.where(truth, p, 1 - p))[counted])
    answer = losses.masked_mean(losses.pixel_bce(*pair), losses.valid(pair[1]))
    assert float(answer) == pytest.approx(expected, rel=1e-5)


def test_label_smoothing(pair: tuple[Tensor, Tensor]) -> None:
    p, truth, counted = _arrays(*pair)
    soft = np.where(truth, 0.95, 0.05)
    expected = np.mean((-soft * np.log(p) - (1 - soft) * np.log(1 - p))[counted])
    answer = losses.masked_mean(losses.pixel_bce(*pair, 0.05), losses.valid(pair[1]))
    assert float(answer) == pytest.approx(expected, rel=1e-5)


def test_dice(pair: tuple[Tensor, Tensor]) -> None:
    p, truth, counted = _arrays(*pair)
    both = (p * truth)[counted].sum()
    expected = 1 - 2 * both / (p[counted].sum() + truth[counted].sum())
    assert float(losses.dice_loss(*pair)) == pytest.approx(expected, rel=1e-5)


def test_ssim_equals_kornia(pair: tuple[Tensor, Tensor]) -> None:
    a, b = pair[0].sigmoid(), (pair[1] == 1).float()
    theirs = kornia.metrics.ssim(a, b, window_size=11, max_val=1.0, padding="valid")
    assert torch.allclose(losses.ssim(a, b), theirs, atol=1e-4)


def test_ssim_leaves_out_windows_that_touch_ignored_pixels(pair: tuple[Tensor, Tensor]) -> None:
    logits, target = pair
    changed = logits.clone()
    changed[target == IGNORE] += 5
    assert torch.equal(losses.ssim_loss(logits, target), losses.ssim_loss(changed, target))


def test_boundary_equals_scikit_image(pair: tuple[Tensor, Tensor]) -> None:
    p, truth, counted = _arrays(*pair)
    bce = -np.log(np.where(truth, p, 1 - p))
    total, number = 0.0, 0
    for t, b, c in zip(truth.astype(float), bce, counted, strict=True):
        inner = np.array([[c[y - 1 : y + 2, x - 1 : x + 2].all() for x in range(1, 39)] for y in range(1, 31)])
        gradient = np.hypot(sobel_h(t), sobel_v(t))[1:-1, 1:-1] * inner
        total += (gradient / gradient.max() * b[1:-1, 1:-1] * inner).sum()
        number += inner.sum()
    assert float(losses.boundary_loss(*pair)) == pytest.approx(total / number, rel=1e-4)


def test_kl_equals_torch_distributions(pair: tuple[Tensor, Tensor]) -> None:
    student, teacher = pair[0], pair[0].flip(-1) * 2
    bernoulli = torch.distributions.Bernoulli
    expected = torch.distributions.kl_divergence(bernoulli(logits=teacher), bernoulli(logits=student))
    assert torch.allclose(losses.binary_kl(student, teacher), expected, atol=1e-5)


@pytest.mark.parametrize("selection", SELECTIONS[1:])
def test_selection_and_distillation_by_loops(pair: tuple[Tensor, Tensor], selection: str) -> None:
    student, target = pair
    teacher = student.flip(0) * 0.5 + (target.float() == 1) * 0.3
    ours, truth, counted = _arrays(student, target)
    theirs, _, _ = _arrays(teacher, target)
    loss = lambda p: -np.log(np.where(truth, p, 1 - p))  # noqa: E731
    keep = np.zeros(truth.shape, bool)
    for i, y, x in np.ndindex(truth.shape):
        image = loss(theirs)[i][counted[i]].mean() < loss(ours)[i][counted[i]].mean()
        pixel = loss(theirs)[i, y, x] < loss(ours)[i, y, x]
        wanted = {"standard": True, "image": image, "pixel": pixel, "hybrid": image and pixel}[selection]
        keep[i, y, x] = wanted and counted[i, y, x]
    soft_t, soft_s = _arrays(teacher / 2, target)[0], _arrays(student / 2, target)[0]
    kl = soft_t * np.log(soft_t / soft_s) + (1 - soft_t) * np.log((1 - soft_t) / (1 - soft_s))
    answer = losses.distillation_loss(student, teacher, target, selection=selection, temperature=2.0)
    assert np.array_equal(losses.selected(student, teacher, target, selection).numpy()[:, 0] > 0, keep)
    assert float(answer) == pytest.approx(4 * kl[keep].mean(), rel=1e-3)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_nothing_selected_is_exactly_zero(pair: tuple[Tensor, Tensor], selection: str) -> None:
    logits, target = pair
    student = ((target == 1).float() * 60 - 30).requires_grad_()
    ignored = torch.full_like(target, IGNORE) if selection == "standard" else target
    loss = losses.distillation_loss(student, logits, ignored, selection=selection, temperature=2.0)
    assert float(loss.detach()) == 0
    if selection != "none":
        loss.backward()
        assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("value", [0, 1, IGNORE])
@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
def test_uniform_masks_are_finite(value: int, scale: float) -> None:
    logits = (scale * torch.randn(2, 1, 32, 32)).requires_grad_()
    target = torch.full((2, 1, 32, 32), value, dtype=torch.uint8)
    loss = losses.student_loss(logits, target, LossWeights())
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()
    if value == IGNORE:
        assert float(loss.detach()) == 0


def test_ignored_pixels_change_nothing(pair: tuple[Tensor, Tensor]) -> None:
    logits, target = pair
    changed = torch.where(target == IGNORE, logits + 7, logits)
    whole = [losses.student_loss(z, target, LossWeights()) for z in (logits, changed)]
    assert torch.equal(*whole)


def test_weight_zero_switches_a_part_off(pair: tuple[Tensor, Tensor]) -> None:
    only = losses.student_loss(*pair, LossWeights(bce=0, dice=2, ssim=0, boundary=0))
    assert torch.allclose(only, 2 * losses.dice_loss(*pair))
