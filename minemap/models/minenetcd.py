"""MineNetCD: what became mine between two dates.

Yu, Zhang, Zhu, Gloaguen, Ghamisi, "MineNetCD: A Benchmark for Global Mining Change Detection on Remote Sensing
Imagery", section 3; the released code where they differ.

One encoder with shared weights sees both dates. On each of its four feature levels (strides 4, 8, 16, 32) the
signed difference F(before) - F(after) goes through ChangeFFT; the UPerNet decoder takes the four differences.

The answer is one logit a pixel, "mine after and not before": two classes. The difference is signed, so the same
network with its dates swapped answers "mine before and not after". What is ours:

- Absent pixels of a date are filled by mirroring first (fill.py), as in MineC2FNet.
- The levels of the decoder's pooling pyramid have no batch norm: the coarsest is one cell a window, and statistics
  over a batch of a few large windows would spoil it. (The convolution that joins them keeps smp's.) The differences
  are normalised over channels, pixel by pixel.
- Trained with cross-entropy and half of Dice, AdamW and the schedules of training/config.py.

The Fourier transform sees the whole window, so the same place in another window has another answer: maps of change
are made in windows at fixed places.
"""

from __future__ import annotations

from typing import Any

import segmentation_models_pytorch as smp
import torch
from segmentation_models_pytorch.base import SegmentationHead
from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from minemap.models.fill import fill_absent

DEPTH = 5  # encoder stages, of strides 2 to 32
LEVELS = 4  # of them that the decoder takes
GROUPS = 4  # of channels in ChangeFFT
INIT_SPREAD = 0.02
SHRINK = 0.01
DROP = 0.1


class ComplexLinear(nn.Module):
    """A complex linear layer inside each of four groups of channels, the same at every frequency."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        width = channels // GROUPS
        self.weight = nn.Parameter(torch.randn(2, GROUPS, width, width) * INIT_SPREAD)  # real, imaginary
        self.bias = nn.Parameter(torch.randn(2, GROUPS, width) * INIT_SPREAD)

    def forward(self, x: Tensor) -> Tensor:
        """(group, frequency, real parts then imaginary ones) -> the same: x W + b in complex numbers, one product."""
        real, imaginary = self.weight
        whole = torch.cat([torch.cat([real, imaginary], dim=2), torch.cat([-imaginary, real], dim=2)], dim=1)
        return torch.baddbmm(torch.cat([*self.bias], dim=1)[:, None], x, whole)


class ChangeFFT(nn.Module):
    """x + DropPath(inverse(shrink(layers(FFT(norm(x)))))): channels mixed in the frequency domain, in float32.


    C^2 + 4 C parameters for C channels, and the norm's 2 C. C must be a multiple of four.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.first = ComplexLinear(channels)
        self.second = ComplexLinear(channels)
        self.drop = StochasticDepth(DROP, "row")

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, C, h, w)."""
        with torch.autocast(x.device.type, enabled=False):
            return x + self.drop(self._mixed(x.float())).to(x.dtype)

    def _mixed(self, x: Tensor) -> Tensor:
        normed = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        spectrum = torch.fft.fft2(normed, norm="ortho")
        parts = torch.view_as_real(spectrum).unflatten(1, (GROUPS, -1)).permute(1, 0, 3, 4, 5, 2)
        mixed = self.second(F.relu(self.first(parts.reshape(GROUPS, -1, 2 * x.shape[1] // GROUPS))))
        shrunk = F.softshrink(mixed, SHRINK).view(parts.shape).permute(1, 0, 5, 2, 3, 4).contiguous()
        return torch.fft.ifft2(torch.view_as_complex(shrunk).flatten(1, 2), norm="ortho").real


class MineNetCD(nn.Module):
    """(N, 2 C, H, W) -> logits (N, 1, H, W) of mine at the second date and not at the first.

    The input holds the channels of the first date, then those of the second, each normalised, 0 = absent; H and W
    multiples of 32. encoder: any of segmentation-models-pytorch's, timm's among them ("tu-..."). change_fft off
    leaves the differences as they are.
    """

    def __init__(
        self,
        in_channels: int = 6,
        *,
        encoder: str = "densenet121",
        change_fft: bool = True,
        width: int = 64,
    ) -> None:
        super().__init__()
        self.encoder: Any = smp.encoders.get_encoder(encoder, in_channels=in_channels, depth=DEPTH, weights=None)
        channels = self.encoder.out_channels
        self.mixers = nn.ModuleList(ChangeFFT(n) if change_fft else nn.Identity() for n in channels[-LEVELS:])
        self.decoder = UPerNetDecoder(channels, DEPTH, decoder_channels=width, use_norm="identity")
        self.head = SegmentationHead(width, 1, kernel_size=1, upsampling=4)

    def start_from(self, network: Any) -> MineNetCD:
        """Take the encoder of a network of single dates, or every weight of another MineNetCD."""
        if isinstance(network, MineNetCD):
            self.load_state_dict(network.state_dict())
        else:
            self.encoder.load_state_dict(network.encoder.state_dict())
        return self

    def features(self, x: Tensor) -> list[Tensor]:
        """The encoder's four levels of one date, (N, C, H, W) -> strides 4, 8, 16, 32."""
        return list(self.encoder(fill_absent(x))[-LEVELS:])

    def compare(self, before: list[Tensor], after: list[Tensor]) -> Tensor:
        """Logits (N, 1, H, W) from the levels of two dates."""
        mixed = [mix(a - b) for mix, a, b in zip(self.mixers, before, after, strict=True)]
        return self.head(self.decoder([mixed[0], mixed[0], *mixed]))  # it leaves the first two unread

    def forward(self, x: Tensor) -> Tensor:
        both = self.features(torch.cat(x.chunk(2, dim=1)))
        halves = [level.chunk(2) for level in both]
        return self.compare([before for before, _ in halves], [after for _, after in halves])

    def both_ways(self, x: Tensor) -> Tensor:
        """Logits (N, 2, H, W): mine at the second date alone, mine at the first date alone."""
        both = self.features(torch.cat(x.chunk(2, dim=1)))
        swapped = [torch.cat([after, before]) for before, after in (level.chunk(2) for level in both)]
        gain, loss = self.compare(both, swapped).chunk(2)
        return torch.cat([gain, loss], dim=1)
