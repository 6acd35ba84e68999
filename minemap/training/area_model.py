"""Measures how wrong a model's areas are on held-out blocks, and keeps that in its recipe.

`python -m minemap.training.area_model MODEL --chips mines6/chips.npz` predicts the validation split as a map would,
fits `AreaModel` to blocks (places within 5 km of each other) and measures it on blocks that were left out of the fit.
The weights are not touched.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minemap.checkpoint import Checkpoint, load_model
from minemap.errors import InputError, exit_status
from minemap.inference import native_precision, percent
from minemap.training.card import rewrite
from minemap.training.chips import IGNORE, Chips, check_leakage, load_chips
from minemap.training.evaluate import predict_chips
from minemap.uncertainty import COVERAGE, AreaModel, parts, spread

LARGE = 0.1  # km² of true mine from which a block's relative width is told
FLOORS = (0.05, 0.1, 0.2)  # km² of the scale that are tried
TAILS = np.arange(1, 20) * (1 - COVERAGE) / 20  # shares of blocks with less mine than the lower bound
MARGIN = 0.5  # degrees around the chips that still count as their region
FEWEST = 20  # blocks, for quantiles of 5 and 95 %


@dataclass(frozen=True)
class Blocks:
    """A row for each block and date: km² by stored value float64 (n, 256), true km² (n,), and the block (n,)."""

    levels: NDArray[np.float64]
    truth: NDArray[np.float64]
    block: NDArray[np.str_]

    def where(self, keep: NDArray[np.bool_]) -> Blocks:
        return Blocks(self.levels[keep], self.truth[keep], self.block[keep])


def blocks_of(probability: NDArray[np.float32], chips: Chips, resolution: float) -> Blocks:
    """Chips to blocks; only decided pixels count, as observed."""
    pixel = (resolution / 1000) ** 2
    name = np.char.add(np.char.add(chips.column("block"), "@"), chips.column("date"))
    names, which = np.unique(name, return_inverse=True)
    levels, truth = np.zeros((len(names), 256)), np.zeros(len(names))
    for row, chance, mask in zip(which, percent(probability), chips.mask, strict=True):
        counted = mask != IGNORE
        levels[row] += pixel * np.bincount(chance[counted], minlength=256)
        truth[row] += pixel * (mask == 1).sum()
    return Blocks(levels, truth, np.array([n.split("@")[0] for n in names.tolist()]))


def fit(blocks: Blocks, threshold: float) -> AreaModel:
    """The model of errors of some blocks, each of which counts once.

    Of the intervals with COVERAGE, by floor of the scale and by the tail that the blocks outside lie in,
    those that are narrowest for blocks with mine are taken. Region, shares and what was measured stay open.
    """
    mapped, doubtful, _ = parts(blocks.levels, threshold)
    weight = _weights(blocks.block)
    some = mapped > 0
    ratio = _quantile((blocks.truth[some] / mapped[some]), (weight * mapped)[some], 0.5)
    found: list[tuple[float, int, AreaModel]] = []
    for floor in FLOORS:
        error = (blocks.truth - ratio * mapped) / spread(doubtful, floor)
        for tail in TAILS:
            low = -_quantile(-error, weight, 1 - tail, more=1)
            high = _quantile(error, weight, COVERAGE + tail, more=1)
            model = AreaModel(threshold, ratio, floor, low, high, (-180, -90, 180, 90), (0, 1), {})
            found.append((measured(blocks, model.interval(blocks.levels))["large_median_width"], len(found), model))
    return min(found)[-1]


def _weights(block: NDArray[np.str_]) -> NDArray[np.float64]:
    """1 for each block, shared by its dates."""
    _, which, counts = np.unique(block, return_inverse=True, return_counts=True)
    return 1 / counts[which]


def _quantile(values: NDArray[np.float64], weight: NDArray[np.float64], level: float, more: float = 0) -> float:
    """The smallest value with at least `level` of the weight at or below it; `more`: of weight that lies beyond all
    values (1, a block not seen yet, makes the quantile conformal)."""
    order = np.argsort(values)
    below = np.cumsum(weight[order]) / (weight.sum() + more)
    return float(values[order][min(int(np.searchsorted(below, level - 1e-12)), len(values) - 1)])


def left_out(blocks: Blocks, threshold: float) -> NDArray[np.float64]:
    """Estimate, lower, upper (3, n) of every row, from a fit to all other blocks."""
    out = np.zeros((3, len(blocks.truth)))
    for name in np.unique(blocks.block):
        own = blocks.block == name
        out[:, own] = fit(blocks.where(~own), threshold).interval(blocks.levels[own])
    return out


def measured(blocks: Blocks, interval: NDArray[np.float64]) -> dict[str, Any]:
    """How often intervals (3, n) hold the truth, and how wide they are, in per cent. Large: blocks above LARGE."""
    estimate, low, high = interval
    holds, weight = (low <= blocks.truth) & (blocks.truth <= high), _weights(blocks.block)
    large, none = blocks.truth > LARGE, blocks.truth == 0

    def share(of: NDArray[np.bool_]) -> float:
        return round(100 * float((holds * weight)[of].sum() / max(weight[of].sum(), 1e-12)), 1)

    def middle(km2: NDArray[np.float64]) -> float:
        return round(100 * float(np.median(km2[large] / blocks.truth[large])), 1) if large.any() else 0.0

    return {
        "blocks": len(np.unique(blocks.block)),
        "rows": len(blocks.truth),
        "coverage": share(np.ones(len(holds), bool)),
        "coverage_without_mine": share(none),
        "large_blocks": len(np.unique(blocks.block[large])),
        "large_rows": int(large.sum()),
        "large_coverage": share(large),
        "large_median_width": middle(high - low),
        "large_median_error": middle(np.abs(estimate - blocks.truth)),
    }


def build(blocks: Blocks, chips: Chips, threshold: float) -> AreaModel:
    """The model of errors of a checkpoint, with the region of its chips and what blocks left out of the fit say."""
    count = len(np.unique(blocks.block))
    if count < FEWEST:
        raise InputError(f"{count} blocks are too few: at least {FEWEST} are needed")
    mapped, _, observed = parts(blocks.levels, threshold)
    shares = (mapped / observed)[(blocks.truth > 0) & (mapped > 0)]
    lon, lat = (chips.column(name).astype(float) for name in ("lon", "lat"))
    corners = (lon.min() - MARGIN, lat.min() - MARGIN, lon.max() + MARGIN, lat.max() + MARGIN)
    west, south, east, north = (round(float(degrees), 3) for degrees in corners)
    fitted = fit(blocks, threshold)
    return replace(
        fitted,
        ratio=round(fitted.ratio, 4),
        lower=round(fitted.lower, 4),
        upper=round(fitted.upper, 4),
        region=(west, south, east, north),
        shares=(round(float(shares.min()), 4), round(float(shares.max()), 4)),
        measured=measured(blocks, left_out(blocks, threshold)),
    )


def keep(checkpoint: Checkpoint, model: AreaModel) -> Checkpoint:
    """The checkpoint with the model of errors in its recipe and card; raises when its weights' bytes change."""
    return rewrite(checkpoint, replace(checkpoint.recipe, area_model=asdict(model)))


def main(arguments: list[str] | None = None) -> None:
    """Measure the errors of a model's areas on held-out blocks and keep them in its recipe."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("model")
    parser.add_argument("--chips", required=True, help="mines6/chips.npz")
    parser.add_argument("--split", default="val", help="of chips.csv, unseen by the model (val)")
    parser.add_argument("--dry-run", action="store_true", help="measure only")
    args = parser.parse_args(arguments)
    chips = load_chips(args.chips).decided()
    checkpoint, held_out = load_model(args.model), chips.split(args.split)
    check_leakage(held_out, chips.where(chips.column("split") != args.split))
    recipe = checkpoint.recipe
    chance = predict_chips(checkpoint.network(), recipe, held_out, precision=native_precision())
    model = build(blocks_of(chance, held_out, recipe.resolution), held_out, recipe.threshold)
    print(json.dumps(asdict(model), indent=1))
    if not args.dry_run:
        print(keep(checkpoint, model).sha256)


if __name__ == "__main__":
    sys.exit(exit_status(main))
