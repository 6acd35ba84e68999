"""Losses of MineC2FNet (its paper, sections 4.2 and 4.4), all blind to pixels of mask value 255.

Shapes throughout: `logits` float (N, 1, H, W); `target` uint8 (N, 1, H, W) with 1 mine, 0 not, 255 ignore.
A convolution window (Sobel, SSIM) that touches an ignored pixel or the border is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from segmentation_models_pytorch.losses import DiceLoss
from torch import Tensor
from torch.nn import functional as F

from minemap.training.chips import IGNORE

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # the window of Wang et al. 2004
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2
EPSILON = 1e-6


@dataclass(frozen=True)
class LossWeights:
    """Weights of the student's losses; the paper gives none, so 1 each."""

    bce: float = 1.0
    dice: float = 1.0
    ssim: float = 1.0
    boundary: float = 1.0


def student_loss(logits: Tensor, target: Tensor, weights: LossWeights, smoothing: float = 0.0) -> Tensor:
    """BCE + Dice + SSIM + Boundary, weighted; a part of weight 0 is not computed."""
    logits = logits.float()
    parts = {
        "bce": lambda: masked_mean(pixel_bce(logits, target, smoothing), valid(target)),
        "dice": lambda: dice_loss(logits, target),
        "ssim": lambda: ssim_loss(logits, target),
        "boundary": lambda: boundary_loss(logits, target),
    }
    used = {name: getattr(weights, name) for name in parts if getattr(weights, name) != 0}
    return torch.stack([weight * parts[name]() for name, weight in used.items()]).sum()


def valid(target: Tensor) -> Tensor:
    """1 where a pixel counts, else 0, float."""
    return (target != IGNORE).float()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of the selected values over their number; exactly 0 where none is selected."""
    return (values * mask).sum() / (mask.sum() + EPSILON)


def pixel_bce(logits: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
    """Binary cross-entropy of each pixel (meaningless on ignored ones), labels pulled in by `smoothing`."""
    truth = (target == 1).float() * (1 - 2 * smoothing) + smoothing
    return F.binary_cross_entropy_with_logits(logits, truth, reduction="none")


def dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """1 - Dice over the whole batch; 0 for a batch without mine (there BCE does the work)."""
    return DiceLoss(mode="binary", from_logits=True, ignore_index=IGNORE)(logits, target.long())


def ssim_loss(logits: Tensor, target: Tensor) -> Tensor:
    """1 - mean structural similarity of probability and mask, Gaussian 11x11 window."""
    similarity = ssim(logits.sigmoid(), (target == 1).float())
    return masked_mean(1 - similarity, whole_windows(target, SSIM_WINDOW))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of two images of range 0-1, (N, 1, H, W) -> (N, 1, H - 10, W - 10)."""
    blur = lambda x: F.conv2d(x, _gaussian(x))  # noqa: E731
    mean_a, mean_b = blur(a), blur(b)
    variances = blur(a * a) - mean_a**2 + blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + SSIM_C1) / (mean_a**2 + mean_b**2 + SSIM_C1)
    return luminance * (2 * covariance + SSIM_C2) / (variances + SSIM_C2)


def _gaussian(like: Tensor) -> Tensor:
    x = torch.arange(SSIM_WINDOW, dtype=like.dtype, device=like.device) - SSIM_WINDOW // 2
    g = torch.exp(-(x**2) / (2 * SSIM_SIGMA**2))
    g = g / g.sum()
    return torch.outer(g, g)[None, None]


def boundary_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy weighted by the Sobel gradient of the mask, over the number of counted pixels."""
    inner = whole_windows(target, 3)
    bce = pixel_bce(logits, target)[..., 1:-1, 1:-1]
    return masked_mean(boundary_importance(target) * bce, inner)


def boundary_importance(target: Tensor) -> Tensor:
    """sqrt(gx^2 + gy^2) of the mask, each image scaled to a maximum of 1: (N, 1, H, W) -> (N, 1, H-2, W-2)."""
    gx = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], device=target.device)
    kernels = torch.stack([gx, gx.T])[:, None]
    gradient = F.conv2d((target == 1).float(), kernels).square().sum(dim=1, keepdim=True).sqrt()
    gradient = gradient * whole_windows(target, 3)
    return gradient / gradient.amax(dim=(1, 2, 3), keepdim=True).clamp_min(EPSILON)


def whole_windows(target: Tensor, size: int) -> Tensor:
    """1 where the size x size window holds no ignored pixel: (N, 1, H, W) -> (N, 1, H - size + 1, ...)."""
    return 1 - F.max_pool2d((target == IGNORE).float(), size, stride=1)


def distillation_loss(
    student: Tensor, teacher: Tensor, target: Tensor, *, selection: str, temperature: float
) -> Tensor:
    """tau^2 KL(teacher || student) of the two-class distribution, over the selected pixels.

    `selection`: none (0), standard (all), image, pixel (where the teacher's cross-entropy is lower than the
    student's), hybrid (both). No selected pixel gives exactly 0.
    """
    if selection == "none":
        return student.new_zeros(())
    student, teacher = student.float(), teacher.float().detach()
    mask = selected(student.detach(), teacher, target, selection)
    return masked_mean(binary_kl(student / temperature, teacher / temperature), mask) * temperature**2


def binary_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL divergence of [1 - p, p] of each pixel, teacher against student, from logits."""
    p = teacher.sigmoid()
    mine = p * (F.logsigmoid(teacher) - F.logsigmoid(student))
    other = (1 - p) * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    return mine + other


def selected(student: Tensor, teacher: Tensor, target: Tensor, selection: str) -> Tensor:
    """Which pixels are distilled, float (N, 1, H, W)."""
    counted = valid(target)
    ours, theirs = pixel_bce(student, target), pixel_bce(teacher, target)
    keep = counted
    if selection in ("image", "hybrid"):
        keep = keep * ((theirs * counted).sum((1, 2, 3)) < (ours * counted).sum((1, 2, 3)))[:, None, None, None]
    if selection in ("pixel", "hybrid"):
        keep = keep * (theirs < ours)
    return keep
