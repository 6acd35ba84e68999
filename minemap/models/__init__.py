"""The networks, by name. torch is imported only when one is built."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from minemap.errors import InputError

if TYPE_CHECKING:
    import torch

# The reference networks of the field and their encoders: DenseNet-121 is the paper's and the best of the
# multi-modal comparison; it has no dilated form (DeepLabV3+) and SegFormer has its own.
BASELINES = {
    "fpn": ("FPN", "densenet121"),
    "unet": ("Unet", "densenet121"),
    "deeplabv3plus": ("DeepLabV3Plus", "resnet34"),
    "segformer": ("Segformer", "mit_b1"),
}
ARCHITECTURES = (*BASELINES, "minec2fnet", "minenetcd")


def build(architecture: str, **options: Any) -> torch.nn.Module:
    """A network with random weights: float32 (N, C, H, W), normalised, 0 = absent -> logits (N, 1, H, W).

    H and W are multiples of 32. `options` are the keyword arguments of the network's constructor:
    `in_channels` for all, see `MineC2FNet` for its own, segmentation-models-pytorch's for the baselines.
    "minenetcd" takes the channels of two dates, one after the other.
    """
    if architecture == "minec2fnet":
        from minemap.models.minec2fnet import MineC2FNet

        return MineC2FNet(**options)
    if architecture == "minenetcd":
        from minemap.models.minenetcd import MineNetCD

        return MineNetCD(**options)
    if architecture not in BASELINES:
        raise InputError(f"no network {architecture!r}: choose one of {', '.join(ARCHITECTURES)}")
    return _baseline(architecture, **options)


def _baseline(architecture: str, **options: Any) -> torch.nn.Module:
    import segmentation_models_pytorch as smp

    class_name, encoder = BASELINES[architecture]
    return getattr(smp, class_name)(**{"encoder_name": encoder, "encoder_weights": None} | options)
