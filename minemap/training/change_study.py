"""The study of change: does ChangeFFT earn its place, and does either beat the difference of two maps?

`python -m minemap.training.change_study run` trains MineNetCD with and without ChangeFFT on the same seeds, one
line of results a run, and goes on where it stopped; `... table` prints the tables from those lines. All runs start
from the encoder of the default model of single dates. A fifth of the training blocks chooses epoch and threshold.
The validation split is read once, at the end of a run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minemap.checkpoint import DEFAULT_MODEL, load_model
from minemap.training import metrics
from minemap.training.chips import Chips, load_chips, load_pairs
from minemap.training.config import make_config

RESULTS = "results.jsonl"
BASE: dict[str, Any] = {
    "architecture": "minenetcd",
    "start": DEFAULT_MODEL,
    "freeze_norm": True,
    "dice": 0.5,
    "ssim": 0.0,
    "boundary": 0.0,
    "selection": "none",
    "sizes": [*(64,) * 10, 128, 128, 320, 320],
    "scene": 128,
    "scatter": 0.7,
    "scatter_cell": 64,
    "absent": 0.0,
    "holes": 0.0,
    "jitter": 0.07,
    "affine": 0.3,
    "batch": 16,
    "epochs": 10,
    "warmup": 1,
    "learning_rate": 5e-4,
    "weight_decay": 0.01,
    "schedule": "cosine",
    "stop": 0,
    "ema": 0.98,
    "threads": 1,
}
MAPS = "difference of two maps"
METHODS: dict[str, dict[str, Any]] = {"with ChangeFFT": {}, "without ChangeFFT": {"change_fft": False}}
DIRECTIONS = {"gain": "0", "loss": "1"}  # column `date` of the pairs
KEYS = ("f1", "ciou", "precision", "recall", "accuracy")


def run(chips: str, out: Path, *, seeds: Sequence[int]) -> None:
    """The difference of two maps, and every method on every seed; what has a line already is skipped."""
    out.mkdir(parents=True, exist_ok=True)
    done = {(row["seed"], row["method"]) for row in read(out)}
    wanted = [(0, MAPS), *((seed, method) for seed in seeds for method in METHODS)]
    for seed, method in (pair for pair in wanted if pair not in done):
        row = difference_of_maps(chips) if method == MAPS else run_one(chips, out, seed=seed, method=method)
        with (out / RESULTS).open("a") as file:
            file.write(json.dumps({"seed": seed, "method": method, **row}) + "\n")


def run_one(chips: str, out: Path, *, seed: int, method: str) -> dict[str, Any]:
    """Train one method on one seed and read the validation split, once."""
    from minemap.training.evaluate import predict_chips
    from minemap.training.loop import train

    folder = str(out / f"{method.split()[0]}-{seed}")
    checkpoint = train(make_config(BASE | METHODS[method] | {"data": [chips], "out": folder, "seed": seed}))
    val = load_pairs(chips).split("val").decided()
    probability = predict_chips(checkpoint.network(), checkpoint.recipe, val, precision="bf16")
    counts = by_direction(probability >= checkpoint.recipe.threshold, val)
    held = checkpoint.recipe.metrics["holdout"]["mine_iou"]
    return {"threshold": checkpoint.recipe.threshold, "holdout_ciou": held, "counts": counts}


def difference_of_maps(chips: str) -> dict[str, Any]:
    """The default model's map of each date, thresholded: mine in the one and not in the other."""
    import torch

    from minemap.training.evaluate import predict_chips

    torch.set_num_threads(1)
    model = load_model()
    dates = load_chips(chips)
    pairs = load_pairs(chips)
    keep = (pairs.column("split") == "val") & (pairs.mask != metrics.IGNORE).any(axis=(1, 2))
    probability = predict_chips(model.network(), model.recipe, dates.where(keep), precision="bf16")
    mine = (probability >= model.recipe.threshold).reshape(-1, 2, *probability.shape[1:])
    gain = mine[:, 1] & ~mine[:, 0]
    loss = mine[:, 0] & ~mine[:, 1]
    both = np.stack([gain, loss], axis=1).reshape(probability.shape)
    return {"threshold": model.recipe.threshold, "counts": by_direction(both, pairs.where(keep))}


def by_direction(predicted: NDArray[np.bool_], pairs: Chips) -> dict[str, dict[str, list[int]]]:
    """Confusion (tn, fp, fn, tp) of each block, for gain and for loss."""
    counts, blocks = metrics.confusion(predicted, pairs.mask), pairs.column("block")
    rows = {name: pairs.column("date") == date for name, date in DIRECTIONS.items()}
    return {
        name: {b: counts[keep & (blocks == b)].sum(axis=0).tolist() for b in np.unique(blocks).tolist()}
        for name, keep in rows.items()
    }


def change_scores(counts: NDArray[np.int64]) -> dict[str, float]:
    """Scores of the change class in per cent, from one confusion (tn, fp, fn, tp)."""
    found = metrics.scores(counts)
    iou = found["mine_iou"]
    named = found | {"ciou": iou, "f1": 2 * iou / (1 + iou)}
    return {key: 100 * named[key] for key in KEYS}


def read(out: Path) -> list[dict[str, Any]]:
    """The lines of results there are."""
    path = out / RESULTS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(rows: list[dict[str, Any]], samples: int = 2000) -> str:
    """Markdown: scores of the change class, means over seeds (range), and the paired gain of ChangeFFT in F1."""
    lines = ["| | method | seeds | F1 | cIoU | precision | recall | OA |", "|---|---|---|---|---|---|---|---|"]
    for direction in DIRECTIONS:
        for method in (MAPS, *METHODS):
            found = [change_scores(c.sum(axis=0)) for c in blocks(rows, method, direction).values()]
            if found:
                cells = [
                    _spread([f[key] for f in found]) for key in ("f1", "ciou", "precision", "recall", "accuracy")
                ]
                lines.append(f"| {direction} | {method} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(text for d in DIRECTIONS if (text := _paired(rows, d, samples)))])


def blocks(rows: list[dict[str, Any]], method: str, direction: str) -> dict[int, NDArray[np.int64]]:
    """Seed -> confusion of each block (block, 4), blocks in one order."""
    return {
        row["seed"]: np.array([row["counts"][direction][b] for b in sorted(row["counts"][direction])])
        for row in rows
        if row["method"] == method
    }


def _spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{np.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def _paired(rows: list[dict[str, Any]], direction: str, samples: int) -> str:
    """With minus without ChangeFFT in F1 on the same seeds; 95 % interval over seeds and blocks drawn again."""
    ours, theirs = (blocks(rows, method, direction) for method in METHODS)
    seeds = sorted(set(ours) & set(theirs))
    if not seeds:
        return ""
    a, b = (np.stack([found[seed] for seed in seeds]) for found in (ours, theirs))
    rng = np.random.default_rng(0)
    picks = [np.ix_(*(rng.integers(n, size=n) for n in a.shape[:2])) for _ in range(samples)]
    low, high = np.percentile([_f1(a[p]) - _f1(b[p]) for p in picks], [2.5, 97.5])
    return f"ChangeFFT adds {_f1(a) - _f1(b):+.1f} ({low:+.1f} to {high:+.1f}) to the F1 of {direction}."


def _f1(counts: NDArray[np.int64]) -> float:
    """Mean over seeds of the F1 of all blocks pooled; counts (seed, block, 4)."""
    return float(np.mean([change_scores(c.sum(axis=0))["f1"] for c in counts]))


def main(arguments: list[str] | None = None) -> None:
    """Run the study or print its tables."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("action", choices=("run", "table"))
    parser.add_argument("--chips", help="mines6/chips.npz")
    parser.add_argument("--out", type=Path, default=Path("runs/change"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args(arguments)
    if args.action == "run":
        run(args.chips, args.out, seeds=args.seeds)
    print(table(read(args.out)))


if __name__ == "__main__":
    main()
