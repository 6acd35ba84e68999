"""Other ways of keeping what a teacher knew: LwM's attention distillation and selective replay.

LwF needs nothing of its own: it is standard distillation (losses.py) on an FPN that starts from its teacher.
The papers behind them (Li and Hoiem 2018, Dhar et al. 2019, Rolnick et al. 2019) classify images; what they
become for a segmentation network is our choice and said below.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minemap.checkpoint import Recipe
from minemap.training.chips import IGNORE, Chips
from minemap.training.evaluate import QUICK, predict_chips

EPSILON = 1e-6


def attention_loss(student: Any, teacher: Any, image: Tensor) -> Tensor:
    """LwM: mean L1 distance of the two networks' attention maps, each scaled to unit length."""
    theirs = attention_map(teacher, image, differentiable=False)
    return (attention_map(student, image, differentiable=True) - theirs).abs().sum(dim=1).mean()


def attention_map(network: Any, image: Tensor, *, differentiable: bool) -> Tensor:
    """Grad-CAM of the summed mine logits at the deepest feature level, unit length, (N, h * w)."""
    with torch.enable_grad():
        features = network.encoder(image)
        if not differentiable:  # of a frozen network: only the features need a gradient
            features = [*features[:-1], features[-1].detach().requires_grad_()]
        logits = network.segmentation_head(network.decoder(features))
        (gradient,) = torch.autograd.grad(logits.sum(), features[-1], create_graph=differentiable)
    weights = gradient.mean(dim=(2, 3), keepdim=True)
    heat = (weights * features[-1]).sum(dim=1).relu().flatten(1).float()
    heat = heat if differentiable else heat.detach()
    return heat / (heat.norm(dim=1, keepdim=True) + EPSILON)


def select_replay(chips: Chips, teacher: nn.Module, recipe: Recipe, share: float = 0.5) -> Chips:
    """The `share` of coarse chips whose labels the teacher knows best (lowest cross-entropy)."""
    probability = np.clip(predict_chips(teacher, recipe, chips, seen=QUICK), EPSILON, 1 - EPSILON)
    loss = -np.log(np.where(chips.mask == 1, probability, 1 - probability))
    counted = chips.mask != IGNORE
    mean = (loss * counted).sum(axis=(1, 2)) / np.maximum(counted.sum(axis=(1, 2)), 1)
    return chips.where(mean <= np.quantile(mean, share))
