"""MineC2FNet: a coarse-to-fine student with a frozen teacher's encoder inside.

"Coarse-to-Fine Domain Incremental Learning with Attentive Distillation for Mining Footprint Segmentation in
Multispectral Imagery", section 4.3.

Teacher: FPN with a DenseNet-121 encoder. Student: two encoders of that shape on the same input, its own and
the teacher's, the latter frozen. On each of the four feature levels that the decoder takes (strides 4, 8, 16,
32; 256, 512, 1024, 1024 channels): gated fusion of the two, CBAM, diffusion refinement. Then the FPN decoder.

What the paper leaves open, and our choice:
- Width of the refinement: the encoder's own, with grouped 3x3 convolutions of 16 channels a group (a full
  one at 1024 channels has 9.4 M parameters a step). So the decoder keeps the shape of the teacher's.
- The attention multiplies by 2 * sigmoid, and its last layers and those of the refinement start at zero: all
  new parts start as the identity, and a student started from its teacher starts exactly as the teacher.
- Absent pixels are filled by mirroring first (fill.py): how much of a window is missing must change the answer
  for the rest as little as possible, though attention and group normalisation look at all of it.
- Images that have nothing but blue, green and red may have a smaller network of their own inside (`visible`): with
  half of the channels at zero the batch norms' statistics of six bands fit no layer (docs/training.md).
"""

from __future__ import annotations

import math
from typing import Any

import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minemap.models.fill import fill_absent

LEVELS = 4  # feature levels that the FPN decoder takes
VISIBLE = 3  # channels before the infrared
DEFAULT_ENCODER = "densenet121"
PYRAMID = 256  # segmentation-models-pytorch's, and of the FPN that it follows (Lin et al. 2017)


def teacher_network(in_channels: int = 6, *, encoder: str = DEFAULT_ENCODER, pyramid: int = PYRAMID) -> nn.Module:
    """The teacher: FPN on a DenseNet-121 encoder, random weights, (N, C, H, W) -> logits (N, 1, H, W).

    pyramid: channels of the decoder's levels; those of its branches are half as many.
    """
    network: Any = smp.FPN(
        encoder,
        encoder_weights=None,
        in_channels=in_channels,
        classes=1,
        decoder_pyramid_channels=pyramid,
        decoder_segmentation_channels=pyramid // 2,
    )
    return network


class GatedFusion(nn.Module):
    """fused = g * student + (1 - g) * teacher, g = sigmoid(conv1x1([student, teacher])), one gate a pixel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 1, channels))  # student's half, teacher's half
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """(N, C, h, w) twice -> (N, C, h, w). The convolution as two products: six times faster on a CPU."""
        halves = [torch.matmul(w, x.flatten(2)) for w, x in zip(self.weight, (student, teacher), strict=True)]
        gate = torch.sigmoid(halves[0] + halves[1] + self.bias).to(student.dtype)
        return torch.lerp(teacher, student, gate.view(len(student), 1, *student.shape[2:]).expand_as(student))


class ChannelAttention(nn.Module):
    """One weight a channel from a shared MLP over the average- and the max-pooled vector."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = channels // reduction
        self.mlp = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))
        _zero(self.mlp[-1])

    def forward(self, x: Tensor) -> Tensor:
        largest = F.adaptive_max_pool2d(x, 1)[:, :, 0, 0]
        weight = 2 * torch.sigmoid(self.mlp(spatial_mean(x)) + self.mlp(largest))
        return x * weight[:, :, None, None]


class SpatialAttention(nn.Module):
    """One weight a pixel from a 7x7 convolution over the channels' mean and maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size=7, padding=3)
        _zero(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        summary = torch.cat([channel_mean(x), x.amax(dim=1, keepdim=True).to(x.dtype)], dim=1)
        return x * (2 * torch.sigmoid(self.conv(summary)))


class CBAM(nn.Module):
    """Convolutional block attention: channels, then space (Woo et al. 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channel = ChannelAttention(channels)
        self.spatial = SpatialAttention()

    def forward(self, x: Tensor) -> Tensor:
        return self.spatial(self.channel(x))


class Refinement(nn.Module):
    """Diffusion refinement: `steps` times F <- F + CBAM(conv3x3(F)), each step with weights of its own."""

    def __init__(self, channels: int, *, steps: int, group_width: int) -> None:
        super().__init__()
        groups = math.gcd(channels, max(1, channels // group_width))  # where the width does not divide: fewer, wider
        self.convs = nn.ModuleList(
            nn.Conv2d(channels, channels, kernel_size=3, padding=1, groups=groups) for _ in range(steps)
        )
        self.attentions = nn.ModuleList(CBAM(channels) for _ in range(steps))
        for conv in self.convs:
            _zero(conv)

    def forward(self, x: Tensor) -> Tensor:
        for conv, attention in zip(self.convs, self.attentions, strict=True):
            x = x + attention(conv(x))
        return x


class Level(nn.Module):
    """What happens to one feature level before the decoder: fusion, CBAM, refinement, each if switched on."""

    def __init__(
        self, channels: int, *, gated_fusion: bool, cbam: bool, refinement: bool, steps: int, group_width: int
    ) -> None:
        super().__init__()
        self.fusion = GatedFusion(channels) if gated_fusion else None
        self.cbam = CBAM(channels) if cbam else None
        self.refinement = Refinement(channels, steps=steps, group_width=group_width) if refinement else None

    def forward(self, student: Tensor, teacher: Tensor | None) -> Tensor:
        x = student if self.fusion is None else self.fusion(student, teacher)
        x = x if self.cbam is None else self.cbam(x)
        return x if self.refinement is None else self.refinement(x)


class DetailHead(nn.Module):
    """Sharpens the outline at full resolution; ours, not the paper's.

    The decoder answers at stride 4 and is interpolated, and most wrong pixels lie within two of the true outline
    (docs/training.md). This adds to the logits three 3x3 convolutions over the input itself, the encoder's
    features at stride 2, the decoder's and the logits. Its last layer starts at zero: at first it changes nothing.
    """

    def __init__(self, in_channels: int, shallow_channels: int, deep_channels: int, width: int = 24) -> None:
        super().__init__()
        self.shallow = nn.Conv2d(shallow_channels, width, kernel_size=1)
        self.deep = nn.Conv2d(deep_channels, width, kernel_size=1)
        self.mix = nn.Sequential(
            nn.Conv2d(in_channels + 2 * width + 1, width, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, 1, kernel_size=3, padding=1),
        )
        _zero(self.mix[-1])

    def forward(self, x: Tensor, shallow: Tensor, deep: Tensor, logits: Tensor) -> Tensor:
        """Input (N, C, H, W), stride 2, stride 4, logits (N, 1, H, W) -> logits (N, 1, H, W)."""
        grown = [
            F.interpolate(f.contiguous(memory_format=torch.channels_last), size=x.shape[-2:], mode="bilinear")
            for f in (self.shallow(shallow), self.deep(deep))
        ]
        parts = [x, logits, *grown]
        return logits + self.mix(torch.cat([part.to(grown[0].dtype) for part in parts], dim=1))


class MineC2FNet(nn.Module):
    """The student, which at inference is the whole network: (N, C, H, W) -> logits (N, 1, H, W).

    Input normalised, 0 = absent; H and W multiples of 32. With `gated_fusion` off no teacher features are
    injected and there is no frozen encoder; with all three parts off it is the plain FPN. `detail` adds a head
    of our own that works at full resolution. visible: options of the network that takes the first three channels of
    those samples in which all others are absent.
    """

    def __init__(
        self,
        in_channels: int = 6,
        *,
        encoder: str = DEFAULT_ENCODER,
        gated_fusion: bool = True,
        cbam: bool = True,
        refinement: bool = True,
        steps: int = 3,
        group_width: int = 16,
        pyramid: int = PYRAMID,
        detail: bool = False,
        visible: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        student: Any = teacher_network(in_channels, encoder=encoder, pyramid=pyramid)
        self.encoder: Any = student.encoder
        self.decoder: nn.Module = student.decoder
        self.head: nn.Module = student.segmentation_head
        frozen: Any = teacher_network(in_channels, encoder=encoder) if gated_fusion else None
        self.teacher_encoder: nn.Module | None = frozen.encoder if gated_fusion else None
        self.levels = nn.ModuleList(
            Level(
                channels,
                gated_fusion=gated_fusion,
                cbam=cbam,
                refinement=refinement,
                steps=steps,
                group_width=group_width,
            )
            for channels in self.encoder.out_channels[-LEVELS:]
        )
        shallow = self.encoder.out_channels[1]
        self.detail = DetailHead(in_channels, shallow, student.decoder.out_channels) if detail else None
        self.visible = MineC2FNet(VISIBLE, **visible) if visible else None
        self._freeze()

    def _freeze(self) -> None:
        if self.teacher_encoder is not None:
            self.teacher_encoder.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> MineC2FNet:
        """As usual, except that the teacher's encoder stays in evaluation mode: its statistics never move."""
        super().train(mode)
        self._freeze()
        return self

    def start_from(self, teacher: Any, *, fresh: bool = False) -> MineC2FNet:
        """Take the teacher's encoder as the frozen one and, unless `fresh`, its weights as our own start."""
        if self.teacher_encoder is not None:
            self.teacher_encoder.load_state_dict(teacher.encoder.state_dict())
        if not fresh:
            self.encoder.load_state_dict(teacher.encoder.state_dict())
            self.decoder.load_state_dict(teacher.decoder.state_dict())
            self.head.load_state_dict(teacher.segmentation_head.state_dict())
        return self

    def teacher_features(self, x: Tensor) -> list[Tensor] | None:
        """The frozen encoder's features, without gradients; the whole teacher's decoder can take them too."""
        if self.teacher_encoder is None:
            return None
        with torch.no_grad():
            return self.teacher_encoder(x)

    def forward(self, x: Tensor, teacher: list[Tensor] | None = None) -> Tensor:
        """`teacher`: what `teacher_features` gave for the same input, where it is at hand already."""
        if self.visible is None or not (alone := _without_infrared(x)).any():
            return self._answer(x, teacher)
        seen = self.visible(x[:, :VISIBLE])
        # Both look at the whole batch: parts of it would give other last digits
        return seen if alone.all() else torch.where(alone[:, None, None, None], seen, self._answer(x, teacher))

    def _answer(self, x: Tensor, teacher: list[Tensor] | None) -> Tensor:
        x = fill_absent(x)
        frozen = self.teacher_features(x) if teacher is None else teacher
        own = self.encoder(x)
        others = [None] * LEVELS if frozen is None else frozen[-LEVELS:]
        fused = [level(a, b) for level, a, b in zip(self.levels, own[-LEVELS:], others, strict=True)]
        decoded = self.decoder(fused)
        logits = self.head(decoded)
        return logits if self.detail is None else self.detail(x, own[1], decoded, logits)


def _without_infrared(x: Tensor) -> Tensor:
    """Which samples have something in the first three channels and nothing beyond, bool (N,)."""
    near_infrared = (x[:, VISIBLE] != 0).flatten(1).any(dim=1)
    if near_infrared.all():  # the usual case, quick to see
        return ~near_infrared
    given = (x != 0).flatten(2).any(dim=2)
    return given[:, :VISIBLE].any(dim=1) & ~given[:, VISIBLE:].any(dim=1)


def spatial_mean(x: Tensor) -> Tensor:
    """Mean over the pixels, (N, C, h, w) -> (N, C). As a product: mean() is ten times slower on a CPU."""
    pixels = x.shape[2] * x.shape[3]
    return torch.matmul(x.flatten(2), x.new_full((pixels, 1), 1 / pixels))[:, :, 0]


def channel_mean(x: Tensor) -> Tensor:
    """Mean over the channels, (N, C, h, w) -> (N, 1, h, w)."""
    weights = x.new_full((len(x), 1, x.shape[1]), 1 / x.shape[1])
    return torch.matmul(weights, x.flatten(2)).view(len(x), 1, *x.shape[2:])


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
