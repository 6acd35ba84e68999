"""The study of change: does ChangeFFT earn its place, and does either beat the difference of two maps?

`python -m minemap.training.change_study run` trains MineNetCD with and without ChangeFFT on the same seeds, one
line of results a run, and goes on where it stopped; `... table` prints the tables from those lines.

All runs look through the encoder of the default model of single dates, frozen: the features of one pool of
augmented batches are computed once and kept, and only ChangeFFT, decoder and head learn. A seed decides their start
and the order of the batches. A fifth of the training blocks (half of them unseen by that encoder) chooses the
threshold. The validation split is read once, at the end of a run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from minemap import models
from minemap.checkpoint import DEFAULT_MODEL, Recipe, load_model, save
from minemap.errors import exit_status
from minemap.inference import native_precision
from minemap.models.minenetcd import MineNetCD
from minemap.training import metrics
from minemap.training.batches import make_batch
from minemap.training.chips import Chips, load_chips, load_pairs
from minemap.training.config import TrainConfig, as_json, make_config
from minemap.training.evaluate import padded, padding, predict_chips
from minemap.training.loop import THRESHOLD_RULE, keep_freed_memory, load_sets, make_recipe
from minemap.training.losses import LossWeights, student_loss
from minemap.training.study import paired, read, write

POOL = "pool"
BASE: dict[str, Any] = {
    "architecture": "minenetcd",
    "start": DEFAULT_MODEL,
    "sizes": [*(64,) * 8, 128, 320],
    "scene": 128,
    "scatter": 0.7,
    "scatter_cell": 64,
    "absent": 0.0,
    "holes": 0.0,
    "jitter": 0.07,
    "affine": 0.3,
    "batch": 16,
    "learning_rate": 1.5e-3,
    "weight_decay": 0.01,
}
LOSSES = LossWeights(bce=1.0, dice=0.5, ssim=0.0, boundary=0.0)
BATCHES = 150  # of the pool
STEPS = 200
WARMUP = 20  # steps
SIDE = 128  # pixels that a chip is padded to when it is judged
BATCH = 8  # pairs that are judged at a time
MAPS = "difference of two maps"
METHODS: dict[str, bool] = {"with ChangeFFT": True, "without ChangeFFT": False}
DIRECTIONS = {"gain": "0", "loss": "1"}  # column `date` of the pairs
KEYS = ("f1", "ciou", "precision", "recall", "accuracy")
Levels = tuple[list[Tensor], list[Tensor]]  # an encoder's features of the first date and of the second


def run(chips: str, out: Path, *, seeds: Sequence[int], maps: bool = True) -> None:
    """The difference of two maps, and both methods on every seed; what has a line already is skipped."""
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    keep_freed_memory()
    done = {(row["seed"], row["method"]) for row in read(out)}
    for seed in seeds:
        if left := [method for method in METHODS if (seed, method) not in done]:
            write(out, run_seed(chips, out, seed=seed, methods=left))
    if maps and (0, MAPS) not in done:
        write(out, [{"seed": 0, "method": MAPS, **difference_of_maps(chips)}])


def run_seed(chips: str, out: Path, *, seed: int, methods: list[str]) -> list[dict[str, Any]]:
    """Train some methods on one seed, side by side, and read the validation split once."""
    config = make_config(BASE | {"data": [chips], "out": str(out)})
    _, (held, *_) = load_sets(config)
    recipe = make_recipe(config)
    networks = {method: start(config, seed, method) for method in methods}
    batches = pool(config, recipe, next(iter(networks.values())), pool_folder(config), seed)
    train_heads(networks, batches, config)
    thresholds = {m: _threshold(p, held) for m, p in predict_both(networks, recipe, held).items()}
    val = load_pairs(chips).split("val").decided()
    answers = predict_both(networks, recipe, val)
    rows = []
    for method, network in networks.items():
        made = replace(recipe, threshold=thresholds[method], threshold_rule=THRESHOLD_RULE)
        made = replace(made, options=made.options | {"change_fft": METHODS[method]})
        save(out / f"{method.split()[0]}-{seed}", network, made)
        counts = by_direction(answers[method] >= thresholds[method], val)
        rows.append({"seed": seed, "method": method, "threshold": thresholds[method], "counts": counts})
    return rows


def start(config: TrainConfig, seed: int, method: str) -> MineNetCD:
    """A network with the default model's encoder, frozen, and the rest random."""
    torch.manual_seed(seed)
    options = make_recipe(config).options | {"change_fft": METHODS[method]}
    network: Any = models.build(config.architecture, **options)
    network.start_from(load_model(config.start).network())
    network.encoder.requires_grad_(False)
    return network.to(memory_format=torch.channels_last)


def pool_folder(config: TrainConfig) -> Path:
    """Where features are kept, by what they depend on: the options, the chips and the encoder's weights."""
    what = [json.dumps(as_json(config), sort_keys=True), load_model(config.start).sha256]
    whole = hashlib.sha256("".join(what).encode() + b"".join(Path(path).read_bytes() for path in config.data))
    return Path(config.out) / f"{POOL}-{whole.hexdigest()[:12]}"


def pool(
    config: TrainConfig, recipe: Recipe, network: MineNetCD, folder: Path, seed: int
) -> Iterator[tuple[Levels, Tensor]]:
    """Features and targets of STEPS batches, in an order of the seed's; what is not in the folder yet is made."""
    sets, _ = load_sets(config)
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    rounds = [rng.permutation(BATCHES) for _ in range(math.ceil(STEPS / BATCHES))]
    for number in np.concatenate(rounds)[:STEPS].tolist():
        path = folder / f"{number}.pt"
        if not path.exists():
            image, target = make_batch(sets, config, recipe, number)
            draft = folder / f".{number}-{seed}.pt"
            torch.save((levels_of(network, image), target), draft)
            draft.replace(path)
        levels, target = torch.load(path, weights_only=True, mmap=True)
        yield levels, target


def levels_of(network: MineNetCD, image: Tensor) -> Levels:
    """The encoder's features of both dates of a batch (N, 2 C, H, W), bfloat16."""
    network.encoder.eval()
    dates = torch.cat(image.chunk(2, dim=1)).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        halves = [level.bfloat16().chunk(2) for level in network.features(dates)]
    return [before.clone() for before, _ in halves], [after.clone() for _, after in halves]


def train_heads(
    networks: dict[str, MineNetCD], batches: Iterator[tuple[Levels, Tensor]], config: TrainConfig
) -> None:
    """Train everything but the encoder on the same batches: AdamW, linear warm-up, cosine to zero."""
    learning = {m: [p for p in n.parameters() if p.requires_grad] for m, n in networks.items()}
    optimisers = {
        m: torch.optim.AdamW(p, config.learning_rate, weight_decay=config.weight_decay) for m, p in learning.items()
    }
    for network in networks.values():
        network.train()
        network.encoder.eval()
    for step, ((before, after), target) in enumerate(batches):
        for method, network in networks.items():
            torch.manual_seed(config.seed * 1_000_003 + step)
            rate = min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / STEPS))
            optimisers[method].param_groups[0]["lr"] = config.learning_rate * rate
            with torch.autocast("cpu", torch.bfloat16):
                logits = network.compare(before, after)
            loss = student_loss(logits, target, LOSSES)
            optimisers[method].zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(learning[method], config.clip)
            optimisers[method].step()
            if step % 10 == 0:
                print(step, method, round(float(loss.detach()), 4), flush=True)


def predict_both(
    networks: dict[str, MineNetCD], recipe: Recipe, pairs: Chips, side: int = SIDE
) -> dict[str, NDArray[np.float32]]:
    """Probability of change, float32 (n, y, x), of networks that share one encoder.

    pairs: as `load_pairs` gives them, each in both orders, one after the other: features are computed once.
    """
    pads = [padding(n, recipe.stride, side) for n in pairs.mask.shape[1:]]
    crop = [slice(p[0], p[0] + n) for p, n in zip(pads, pairs.mask.shape[1:], strict=True)]
    found: dict[str, list[NDArray[np.float32]]] = {method: [] for method in networks}
    forward = pairs.where(pairs.column("date") == DIRECTIONS["gain"])
    for start in range(0, len(forward), BATCH):
        image = padded(forward.image[start : start + BATCH], recipe, pads)
        before, after = levels_of(next(iter(networks.values())), image)
        for method, network in networks.items():
            network.eval()
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
                both = torch.cat([network.compare(before, after), network.compare(after, before)], dim=1)
            found[method].append(both.float().sigmoid()[:, :, crop[0], crop[1]].numpy())
    return {method: np.concatenate(parts).reshape(pairs.mask.shape) for method, parts in found.items()}


def _threshold(probability: NDArray[np.float32], pairs: Chips) -> float:
    """At which the area changed is right, gain and loss together."""
    return round(metrics.area_unbiased_threshold(probability, pairs.mask), 3)


def difference_of_maps(chips: str) -> dict[str, Any]:
    """The default model's map of each date, thresholded: mine in the one and not in the other."""
    model = load_model()
    dates = load_chips(chips)
    pairs = load_pairs(chips)
    keep = (pairs.column("split") == "val") & (pairs.mask != metrics.IGNORE).any(axis=(1, 2))
    probability = predict_chips(model.network(), model.recipe, dates.where(keep), precision=native_precision())
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
    return {key: 100 * (found | {"ciou": found["mine_iou"]})[key] for key in KEYS}


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
    return f"ChangeFFT adds {paired(a, b, _f1, samples)} to the F1 of {direction}."


def _f1(counts: NDArray[np.int64]) -> float:
    """Mean over seeds of the F1 of all blocks pooled; counts (seed, block, 4)."""
    return float(np.mean([change_scores(c.sum(axis=0))["f1"] for c in counts]))


def main(arguments: list[str] | None = None) -> None:
    """Run the study or print its tables."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("action", choices=("run", "table"))
    parser.add_argument("--chips", help="mines6/chips.npz")
    parser.add_argument("--out", type=Path, default=Path("runs/change"))
    parser.add_argument("--without-maps", action="store_true", help="leave out the difference of two maps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args(arguments)
    if args.action == "run" and not args.chips:
        parser.error("run needs --chips")
    if args.action == "run":
        run(args.chips, args.out, seeds=args.seeds, maps=not args.without_maps)
    print(table(read(args.out)))


if __name__ == "__main__":
    sys.exit(exit_status(main))
