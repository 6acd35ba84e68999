"""Evaluation of a network on chips, each chip alone and padded by reflection."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from minemap.checkpoint import Checkpoint, Recipe
from minemap.inference import keep_freed_memory
from minemap.models.folding import for_inference
from minemap.training import metrics
from minemap.training.batches import normalised
from minemap.training.chips import Chips

MARGIN = 24  # pixels of reflection at least, on each side of a chip
QUICK = 96  # side at least, where speed counts more than seeing a chip as a map would: while training
PIXELS = 2**17  # of one batch


def evaluate(
    checkpoint: Checkpoint,
    chips: Chips,
    *,
    by: str | None = None,
    threshold: float | None = None,
    precision: str = "fp32",
) -> dict[str, Any]:
    """Scores in per cent of a checkpoint on chips (metrics.report), at its own threshold unless one is given.

    by: a column of the chips; "by" then holds the scores for each of its values.
    """
    groups = None if by is None else chips.column(by)
    probability = predict_chips(checkpoint.network(), checkpoint.recipe, chips, precision=precision)
    used = checkpoint.recipe.threshold if threshold is None else threshold
    found: dict[str, Any] = metrics.report(probability, chips.mask, used)
    if groups is not None:
        rows = {group: groups == group for group in np.unique(groups).tolist()}
        found["by"] = {g: metrics.report(probability[keep], chips.mask[keep], used) for g, keep in rows.items()}
    return found


def predict_chips(
    network: nn.Module, recipe: Recipe, chips: Chips, *, precision: str = "fp32", seen: int | None = None
) -> NDArray[np.float32]:
    """Probability of mine of every pixel, float32 (n, y, x). The network itself is left as it is.

    seen: side of what the network is shown at least, in pixels; None for a map's window, so that a chip scores as it
    would in a map (what lies around it there is not observed, and filled by reflection too).
    """
    keep_freed_memory()
    quick = for_inference(copy.deepcopy(network).eval()).to(memory_format=torch.channels_last)
    device = next(quick.parameters()).device
    height, width = chips.image.shape[-2:]
    side = recipe.window + 2 * recipe.halo if seen is None else seen
    pads = [padding(n, recipe.stride, side) for n in (height, width)]
    (top, bottom), (left, right) = pads
    batch = max(1, PIXELS // ((top + height + bottom) * (left + width + right)))

    def answer(start: int) -> NDArray[np.float32]:
        x = padded(chips.image[start : start + batch], recipe, pads).to(device, memory_format=torch.channels_last)
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = quick(x)
        return logits.float().sigmoid().cpu().numpy()[:, 0, top : top + height, left : left + width]

    # As in a map, a batch runs on one thread and others beside it
    streams = torch.get_num_threads() if device.type == "cpu" else 1
    with ThreadPoolExecutor(streams, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        found = list(pool.map(answer, range(0, len(chips), batch)))
    return np.concatenate(found) if found else np.zeros(chips.mask.shape, np.float32)


def predict_mosaics(
    network: nn.Module, recipe: Recipe, chips: Chips, *, side: int = 5, precision: str = "fp32"
) -> NDArray[np.float32]:
    """The same with side x side chips put together, to measure what foreign neighbours do. Not a score."""
    n, height, width = chips.mask.shape
    rows = np.arange(-(-n // side**2) * side**2) % n  # the last mosaic is filled up with the first chips
    tiles = chips.image[rows].reshape(-1, side, side, chips.image.shape[1], height, width)
    image = tiles.transpose(0, 3, 1, 4, 2, 5).reshape(len(tiles), -1, side * height, side * width)
    whole = Chips(image, np.zeros((len(image), side * height, side * width), np.uint8), {})
    answer = predict_chips(network, recipe, whole, precision=precision)
    pieces = answer.reshape(-1, side, height, side, width).transpose(0, 1, 3, 2, 4)
    return pieces.reshape(-1, height, width)[:n]


def padding(size: int, stride: int, seen: int) -> tuple[int, int]:
    """Pixels before and after, at least MARGIN each, that make at least `seen` and a multiple of the stride."""
    spare = max(seen - size, 2 * MARGIN)
    spare += -(size + spare) % stride
    return spare // 2, spare - spare // 2


def padded(image: NDArray[np.float32], recipe: Recipe, pads: list[tuple[int, int]]) -> torch.Tensor:
    """Chips (n, band, y, x) as a network takes them, reflected by `pads` before and after in y and x."""
    return normalised(np.pad(image, [(0, 0), (0, 0), *pads], mode="reflect"), recipe)
