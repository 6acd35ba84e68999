"""Filling what was not observed, so that a network sees plausible surroundings instead of a flat nothing.

A window at the edge of an image or with clouds in it holds pixels that are 0 in every channel. Convolutions
forgive that, group normalisation and global pooling do not: measured on single chips, a network answered 4 mIoU
points worse amid absent pixels than amid mirrored ones (docs/training.md).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

ROUNDS = 8  # each mirrors as far again as is known; what is left then takes the nearest observed pixel


def fill_absent(x: Tensor) -> Tensor:
    """Mirror observed pixels into absent ones, each sample by itself: (N, C, H, W) -> (N, C, H, W).

    Absent = 0 in every channel. A channel that is missing altogether stays 0. Around a rectangle this equals
    padding by reflection. Samples with everything or nothing observed are returned as they are.
    """
    if (x[:, 0] != 0).all():  # the usual case, quick to see
        return x
    observed = (x != 0).any(dim=1)
    seen = observed.flatten(1)
    partial = (seen.any(dim=1) & ~seen.all(dim=1)).nonzero()[:, 0].tolist()
    if not partial:
        return x
    filled = x.clone()
    for i in partial:
        source = torch.from_numpy(mirror_sources(observed[i].cpu().numpy())).to(x.device)
        filled[i] = x[i].flatten(1)[:, source.flatten()].view(x.shape[1:])
    return filled


def mirror_sources(observed: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Flat index of the observed pixel that stands in for each pixel, int64 (y, x), from bool (y, x)."""
    shape = observed.shape
    source = np.where(observed, np.arange(observed.size).reshape(shape), -1)
    for done in range(ROUNDS + 1):
        left = source < 0
        y, x = np.nonzero(left)
        if not len(y):
            break
        near = ndimage.distance_transform_edt(left, return_distances=False, return_indices=True)[:, y, x]
        if done == ROUNDS:
            source[y, x] = source[near[0], near[1]]
            break
        mirror_y, mirror_x = 2 * near - (y, x)
        within = (mirror_y >= 0) & (mirror_y < shape[0]) & (mirror_x >= 0) & (mirror_x < shape[1])
        source[y[within], x[within]] = source[mirror_y[within], mirror_x[within]]
    return source
