"""The card of a model: measures it on labelled chips and writes what it knows and where it fails beside it.

`python -m minemap.training.card MODEL --chips mines6.npz --rgb mines_rgb.npz` reads the validation splits,
puts the figures into the recipe's `metrics` and renders `README.md` from the recipe alone.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minemap.checkpoint import WEIGHTS, Checkpoint, Recipe, load_model, save
from minemap.errors import InputError, exit_status
from minemap.inference import native_precision
from minemap.sentinel2 import BANDS
from minemap.training import metrics
from minemap.training.chips import Chips, keep_bands, load_chips
from minemap.training.evaluate import predict_chips, predict_mosaics

NEGATIVES = ("natural_change", "human_activity")  # categories of mines6 without mines
SAMPLES = 1000  # of the block bootstrap
KEYS = ("accuracy", "mf1", "miou", "mine_iou", "precision", "recall", "boundary_f1", "ece", "miou_image")
SUBSETS = {"all bands": BANDS, "without SWIR": BANDS[:4], "RGB only": BANDS[:3]}


def measure(checkpoint: Checkpoint, chips: Chips, rgb: Chips | None) -> dict[str, Any]:
    """Every figure of the card, in per cent unless its name says otherwise."""
    network, recipe, precision = checkpoint.network(), checkpoint.recipe, native_precision()
    answers = {
        name: predict_chips(network, recipe, keep_bands(chips, b), precision=precision) for name, b in SUBSETS.items()
    }
    found: dict[str, Any] = {name: _scores(p, chips, recipe) for name, p in answers.items()}
    whole = answers["all bands"]
    mosaic = predict_mosaics(network, recipe, chips, precision=precision)
    found["in a mosaic of 25 chips"] = _scores(mosaic, chips, recipe)
    found["interval of mIoU"] = block_interval(whole, chips, recipe.threshold)
    found["false alarms"] = false_alarms(whole, chips, recipe.threshold)
    found["reliability"] = metrics.reliability(whole, chips.mask).round(4).tolist()
    if rgb is not None:
        found["industrial, RGB only"] = _scores(predict_chips(network, recipe, rgb, precision=precision), rgb, recipe)
    return found


def _scores(probability: NDArray[np.float32], chips: Chips, recipe: Recipe) -> dict[str, float]:
    report = metrics.report(probability, chips.mask, recipe.threshold)
    return {key: round(report[key], 2) for key in KEYS}


def block_interval(probability: NDArray[np.float32], chips: Chips, threshold: float) -> list[float]:
    """95 % interval of the pooled mIoU when the blocks of places are drawn again, per cent."""
    counts = metrics.confusion(probability >= threshold, chips.mask)
    blocks = [counts[chips.column("block") == b].sum(axis=0) for b in np.unique(chips.column("block"))]
    rng, table = np.random.default_rng(0), np.stack(blocks)
    drawn = [table[rng.integers(len(table), size=len(table))].sum(axis=0) for _ in range(SAMPLES)]
    scores = [100 * metrics.scores(c)["miou"] for c in drawn]
    return np.percentile(scores, [2.5, 97.5]).round(1).tolist()


def false_alarms(probability: NDArray[np.float32], chips: Chips, threshold: float) -> dict[str, dict[str, float]]:
    """Mapped km² per 1,000 km² of observed land, by kind of chip without mines."""
    found = {}
    for kind in NEGATIVES:
        keep = chips.column("category") == kind
        counted = chips.mask[keep] == 0
        alarms = (probability[keep] >= threshold) & counted
        share = alarms.sum() / max(1, counted.sum())
        found[kind] = {"km2_per_1000_km2": round(1000 * float(share), 1), "chips": int(keep.sum())}
    return found


def write_card(checkpoint: Checkpoint, figures: dict[str, Any]) -> Checkpoint:
    """Store the figures in the recipe and the card beside the weights."""
    return rewrite(
        checkpoint, replace(checkpoint.recipe, metrics=checkpoint.recipe.metrics | {"validation": figures})
    )


def rewrite(checkpoint: Checkpoint, recipe: Recipe) -> Checkpoint:
    """The checkpoint with another recipe, and a card of it where there are figures for one; the same weights.

    Raises InputError when the weights' bytes change.
    """
    before = (checkpoint.path / WEIGHTS).read_bytes()
    if "validation" in recipe.metrics:
        (checkpoint.path / "README.md").write_text(render(recipe))
    written = save(checkpoint.path, checkpoint.network(), recipe)
    if (checkpoint.path / WEIGHTS).read_bytes() != before:
        raise InputError(f"the weights of {checkpoint.path} have changed by being written again: restore them")
    return written


def render(recipe: Recipe) -> str:
    """The card as Markdown, from the recipe alone."""
    figures = recipe.metrics["validation"]
    rows = {name: row for name, row in figures.items() if isinstance(row, dict) and "miou" in row}
    lines = [f"| on | {' | '.join(KEYS)} |", "|---|" + "---|" * len(KEYS)]
    lines += [f"| {name} | {' | '.join(f'{row[key]:.1f}' for key in KEYS)} |" for name, row in rows.items()]
    alarms = [
        f"- {k.replace('_', ' ')}: {v['km2_per_1000_km2']} ({v['chips']} chips)"
        for k, v in figures["false alarms"].items()
    ]
    low, high = figures["interval of mIoU"]
    values = {
        "name": recipe.name,
        "threshold": recipe.threshold,
        "rule": recipe.threshold_rule,
        "table": "\n".join(lines),
        "interval": f"{low} to {high}",
        "alarms": "\n".join(alarms),
        "areas": areas(recipe.area_model),
        "data": " and ".join(recipe.training.get("data", [])),
        "seed": recipe.training.get("seed"),
        "note": recipe.training.get("note", ""),
        "imagenet": _imagenet(recipe.training),
    }
    return (Path(__file__).parent / "card.md").read_text().format(**values)


def _imagenet(training: dict[str, Any]) -> str:
    """Whether the weights started from ImageNet's, in words."""
    words = "yes" if training.get("imagenet") else "no, from random weights"
    if "visible" not in training:
        return words
    visible = training["visible"]
    return f"{words}; the network that answers images of RGB alone ({visible['encoder']}): {_imagenet(visible)}"


def areas(model: dict[str, Any] | None) -> str:
    """What is known of the errors of areas, as a paragraph."""
    if model is None:
        return "The errors of its areas were not measured (`python -m minemap.training.area_model`)."
    m = model["measured"]
    return (
        f"On {m['blocks']} held-out blocks (places within 5 km; {m['rows']} with their dates), each left out\n"
        "of the fit in turn, the 90 % interval of the area holds the truth in\n"
        f"{m['coverage']} % (without any mine {m['coverage_without_mine']} %). For the {m['large_rows']} with over\n"
        f"0.1 km² of mine it does in {m['large_coverage']} %; its median width is {m['large_median_width']} % of\n"
        f"the truth, the median error of the estimate {m['large_median_error']} %. Beyond the chips' region and\n"
        "shares of mine the table of areas says `extrapolated`."
    )


def main(arguments: list[str] | None = None) -> None:
    """Measure a model on validation chips and write its card."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("model")
    parser.add_argument("--chips", required=True, help="mines6/chips.npz")
    parser.add_argument("--rgb", help="mines_rgb/chips.npz")
    args = parser.parse_args(arguments)
    chips = load_chips(args.chips).split("val").decided()
    rgb = load_chips(args.rgb).split("val").decided() if args.rgb else None
    checkpoint = load_model(args.model)
    for column in ("block", "category"):
        chips.column(column)  # what is not there is said now, not after the predictions
    written = write_card(checkpoint, measure(checkpoint, chips, rgb))
    print((written.path / "README.md").read_text())


if __name__ == "__main__":
    sys.exit(exit_status(main))
