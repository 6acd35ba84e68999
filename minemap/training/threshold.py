"""Chooses a model's threshold on chips that the network which answers for them has not seen.

A tenth of the blocks are few chips, and how much of them is mine is chance: the area-unbiased threshold of such a
draw has wide bounds. So the same recipe is trained again with other blocks held out (`holdout_seed`), each network
answers for its own, and the answers are pooled (cross-fitting: Stone 1974, Journal of the Royal Statistical Society
B 36:111-147). `python -m minemap.training.threshold MODEL OTHER... --chips mines6/chips.npz` writes the threshold
into MODEL's recipe. A network inside it for images without infrared keeps the threshold that it had, by a shift of
its answers; no other weights are touched. Card and errors of areas are to be measured again afterwards.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from minemap.checkpoint import Checkpoint, load_model, save
from minemap.errors import InputError, exit_status
from minemap.inference import native_precision
from minemap.training import metrics
from minemap.training.chips import Chips
from minemap.training.config import make_config
from minemap.training.evaluate import predict_chips
from minemap.training.loop import load_sets
from minemap.training.visible import move_threshold

RULE = "mapped area equals true area on {} held-out chips of the training split, those of {} trainings together"
# Options of a training that decide which rows it held out
DRAW = ("architecture", "split", "rows", "fine_share", "fine_seed", "holdout", "holdout_seed", "holdout_fold")
SAMPLES = 200  # draws of blocks for the bounds


def held_out(checkpoint: Checkpoint, chips: str) -> Chips:
    """The rows of a chip file that the training of a checkpoint kept apart, with fine labels. Raises InputError."""
    told = checkpoint.recipe.training
    if not told.get("holdout"):
        raise InputError(f"model {checkpoint.path} held nothing out of its training")
    draw = {key: told[key] for key in DRAW if key in told}
    return load_sets(make_config(draw | {"out": "", "data": [chips]}))[1][0]


def bounds(probability: NDArray[np.float32], mask: NDArray[np.uint8], block: NDArray[np.str_]) -> tuple[float, float]:
    """5 and 95 % of the area-unbiased thresholds of blocks drawn again. Arrays: (n, y, x), (n, y, x), (n,)."""
    rng, names = np.random.default_rng(0), np.unique(block)
    rows = [np.flatnonzero(block == name) for name in names]
    found = []
    for _ in range(SAMPLES):
        drawn = np.concatenate([rows[i] for i in rng.integers(len(names), size=len(names))])
        found.append(metrics.area_unbiased_threshold(probability[drawn], mask[drawn]))
    low, high = np.percentile(found, [5, 95])
    return float(low), float(high)


def main(arguments: list[str] | None = None) -> None:
    """Choose a model's threshold on the held-out chips of several trainings and keep it in its recipe."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("model")
    parser.add_argument("others", nargs="*", help="models of the same recipe with another holdout_seed")
    parser.add_argument("--chips", required=True, help="mines6/chips.npz")
    parser.add_argument("--dry-run", action="store_true", help="measure only")
    args = parser.parse_args(arguments)
    models = [load_model(name) for name in (args.model, *args.others)]
    held = [held_out(model, args.chips) for model in models]
    answers = [
        predict_chips(model.network(), model.recipe, own, precision=native_precision())
        for model, own in zip(models, held, strict=True)
    ]
    probability, mask = np.concatenate(answers), np.concatenate([own.mask for own in held])
    threshold = round(metrics.area_unbiased_threshold(probability, mask), 3)
    told = {
        "threshold": threshold,
        "bounds": bounds(probability, mask, np.concatenate([own.column("block") for own in held])),
        "each": [metrics.area_unbiased_threshold(p, own.mask) for p, own in zip(answers, held, strict=True)],
        "scores": metrics.report(probability, mask, threshold),
    }
    print(json.dumps(told, indent=1))
    if not args.dry_run:
        rule = RULE.format(len(mask), len(models))
        scores = models[0].recipe.metrics | {"holdout": told["scores"]}
        recipe = replace(models[0].recipe, threshold=threshold, threshold_rule=rule, area_model=None, metrics=scores)
        network = models[0].network()
        move_threshold(network, models[0].recipe.threshold, threshold)
        print(save(models[0].path, network, recipe).sha256)


if __name__ == "__main__":
    sys.exit(exit_status(main))
