"""The study: does each part of MineC2FNet earn its place when fine labels are few?

`python -m minemap.training.study run` trains every method on the same draws of blocks, one line of results a
run, and goes on where it stopped; `... table` prints the tables from those lines. The regime: 15 % of the
training chips (whole blocks) carry fine labels, the rest coarse ones (`--coarse`: "blobs" or "fitted" of
training/coarse.py). All encoders are EfficientNet-Lite0 from ImageNet (the paper's: DenseNet-121 from ImageNet).
Every run has its number of epochs and the threshold is 0.5, so the fifth of the fine blocks that is kept apart
decides nothing (16 to 19 chips cannot). The validation split is read once, at the end of a run. Chips are shown
reflected to windows of about the size that the networks learned from, not to a map's: these runs are short and have
seen no large window, and the measure should tell methods apart, not how they bear that.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minemap.checkpoint import Checkpoint
from minemap.errors import InputError, exit_status
from minemap.inference import native_precision
from minemap.sentinel2 import BANDS
from minemap.training import metrics
from minemap.training.chips import Chips, load_chips
from minemap.training.coarse import COARSENINGS
from minemap.training.config import make_config

RESULTS = "results.jsonl"
Counts = NDArray[Any]  # numbers, (run, block, 4): tn, fp, fn, tp, blocks in one order
THRESHOLD = 0.5  # the paper's; those chosen on 16 chips were 0.86 to 0.95 in a pilot, and cost three to nine points
BASE: dict[str, Any] = {
    "rows": "fine",
    "fine_share": 0.15,
    "architecture": "fpn",
    "selection": "none",
    "ssim": 0.0,
    "boundary": 0.0,
    "batch": 16,
    "epochs": 15,
    "epoch_samples": 256,
    "warmup": 2,
    "learning_rate": 3e-4,
    "weight_decay": 0.01,
    "schedule": "cosine",
    "stop": 0,
    "keep": "last",  # a fifth of the fine blocks, 16 to 19 chips, tells epochs apart no better than chance
    "ema": 0.95,
    "precision": "fp32",  # EfficientNet's gradients are quicker so on a processor
    "absent": 0.0,
    "holes": 0.0,
    "threads": 1,  # small runs: two side by side beat one on two cores
}
# Chips larger than these windows show whole mines: windows of as many pixels a batch are cut from them
CUT: dict[str, Any] = {"sizes": [128], "batch": 4, "crops": 1.0}
SCRATCH = {"encoder": "tu-tf_efficientnet_lite0", "imagenet": True, "learning_rate": 1e-3, "epochs": 25}
STUDENT = {"architecture": "minec2fnet", "selection": "hybrid", "distill": 0.3}
# Windows of many chips, as those that the shipped network learned from
LARGE = {"sizes": [256], "scatter": 0.85, "scatter_cell": 64, "crops": 0.0, "batch": 4}
FEWER = {"fine_share": 0.05}  # a part of the draw's fine blocks; the teacher of the draw has seen none of them
TEACHER = "fpn_coarse"
# Method -> what it changes in BASE. Those that name no SCRATCH start from the teacher of their draw.
METHODS: dict[str, dict[str, Any]] = {
    TEACHER: {"rows": "rest", "dice": 0.0, **SCRATCH, "epochs": 60},
    "fpn_fine": {**SCRATCH},
    "fpn_finetune": {},
    "minec2fnet": STUDENT,
    "lwf": {"selection": "standard"},
    "replay": {"replay": 0.25},
    "lwm": {"selection": "standard", "attention": 1.0},
    "minec2fnet_fresh": {**STUDENT, "fresh": True, **SCRATCH},
    "minec2fnet_replay": {**STUDENT, "replay": 0.25},
    "replay_fresh": {**STUDENT, "fresh": True, **SCRATCH, "replay": 0.25},
    "replay_half": {**STUDENT, "replay": 0.5},
    "replay_long": {**STUDENT, "replay": 0.5, "epochs": 30},
    "replay_standard": {**STUDENT, "replay": 0.5, "selection": "standard"},
    "fpn_all": {"rows": "all", **SCRATCH, "epochs": 60},  # were all labels fine: what few could come to at most
    "fewer_fpn_fine": {**SCRATCH, **FEWER},
    "fewer_fpn_finetune": {**FEWER},
    "fewer_minec2fnet": {**STUDENT, **FEWER},
    "fewer_fresh": {**STUDENT, "fresh": True, **SCRATCH, **FEWER},
    "fewer_replay": {**STUDENT, "replay": 0.25, **FEWER},
    "fewer_replay_fresh": {**STUDENT, "fresh": True, **SCRATCH, "replay": 0.25, **FEWER},
    "large_fpn_fine": {**SCRATCH, **LARGE},
    "large_fpn_finetune": {**LARGE},
    "large_minec2fnet": {**STUDENT, **LARGE},
    "parts_none": {**STUDENT, "gated_fusion": False, "cbam": False, "refinement": False},
    "parts_gf": {**STUDENT, "cbam": False, "refinement": False},
    "parts_gf_cbam": {**STUDENT, "refinement": False},
    "distill_none": {**STUDENT, "selection": "none"},
    "distill_standard": {**STUDENT, "selection": "standard"},
    "distill_image": {**STUDENT, "selection": "image"},
    "distill_pixel": {**STUDENT, "selection": "pixel"},
    "loss_bce": {**STUDENT, "dice": 0.0},
    "loss_bce_dice_ssim": {**STUDENT, "ssim": 1.0},
    "loss_all": {**STUDENT, "ssim": 1.0, "boundary": 1.0},
    **{f"fit_lambda_{value:g}": {**STUDENT, "distill": value} for value in (0.1, 1.0, 3.0)},
    **{f"fit_tau_{value:g}": {**STUDENT, "temperature": value} for value in (1.0, 4.0)},
    **{f"fit_steps_{value}": {**STUDENT, "steps": value} for value in (1, 6)},
    "bands_rgb": {"bands": ["blue", "green", "red"], **SCRATCH},
    "bands_rgb_nir": {"bands": ["blue", "green", "red", "nir"], **SCRATCH},
    "bands_rgb_nir_ndvi": {
        "bands": ["blue", "green", "red", "nir"],
        "derived": ["ndvi"],
        **SCRATCH,
    },
}
# Table -> its methods, and those that the others are compared with
TABLES = {
    "methods": (
        (
            *(TEACHER, "fpn_fine", "fpn_finetune", "lwf", "lwm", "replay"),
            *("minec2fnet", "minec2fnet_fresh", "minec2fnet_replay", "fpn_all"),
        ),
        ("fpn_fine", "fpn_finetune"),
    ),
    "replay": (
        ("minec2fnet", "minec2fnet_replay", "replay_fresh", "replay_half", "replay_long", "replay_standard"),
        ("minec2fnet",),
    ),
    "fewer": (
        (
            *("fewer_fpn_fine", "fewer_fpn_finetune", "fewer_minec2fnet"),
            *("fewer_fresh", "fewer_replay", "fewer_replay_fresh"),
        ),
        ("fewer_fpn_fine", "fewer_fpn_finetune"),
    ),
    "large": (
        ("large_fpn_fine", "large_fpn_finetune", "large_minec2fnet"),
        ("large_fpn_fine", "large_fpn_finetune"),
    ),
    "parts": (("parts_none", "parts_gf", "parts_gf_cbam", "minec2fnet"), ("parts_none",)),
    "distillation": (
        ("distill_none", "distill_standard", "distill_image", "distill_pixel", "minec2fnet"),
        ("distill_none",),
    ),
    "losses": (("loss_bce", "minec2fnet", "loss_bce_dice_ssim", "loss_all"), ("loss_bce",)),
    "fit": (("minec2fnet", *(name for name in METHODS if name.startswith("fit_"))), ("minec2fnet",)),
    "bands": (("bands_rgb", "bands_rgb_nir", "bands_rgb_nir_ndvi", "fpn_fine"), ("bands_rgb",)),
}


def run(
    chips: str, out: Path, *, draws: int, methods: Iterable[str], coarse: str, device: str = "cpu", workers: int = 1
) -> None:
    """Every method on every draw, so many at a time, the teachers first; runs that have a line are skipped."""
    out.mkdir(parents=True, exist_ok=True)
    rows = read(out)
    if other := sorted({row["coarse"] for row in rows} - {coarse}):
        raise InputError(f"{out} holds a study of coarse labels {other[0]}, not {coarse}: give another folder")
    done = {(row["draw"], row["method"]) for row in rows}
    asked = dict.fromkeys([TEACHER, *methods])
    parts = [m for m in asked if not has_teacher(m)], [m for m in asked if has_teacher(m)]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for part in parts:
            left = [(method, draw) for method in part for draw in range(draws) if (draw, method) not in done]
            jobs = [
                pool.submit(run_one, chips, out, draw=draw, method=method, coarse=coarse, device=device)
                for method, draw in left
            ]
            try:
                for job in as_completed(jobs):
                    write(out, [job.result()])
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def has_teacher(method: str) -> bool:
    """Whether a method learns from the teacher of its draw, or starts from it."""
    changes = METHODS[method]
    return not changes.get("imagenet") or changes.get("fresh", False)


def run_one(chips: str, out: Path, *, draw: int, method: str, coarse: str, device: str = "cpu") -> dict[str, Any]:
    """Train one method on one draw and read the validation split, once: counts by block.

    "held": the counts on the fine chips that were kept apart, from which lambda, tau and T are judged.
    """
    from minemap.training.loop import load_sets, train

    values = base(load_chips(chips)) | METHODS[method]
    values |= {"data": [chips], "out": str(out / f"{method}-{draw}"), "device": device}
    values |= {"seed": draw, "fine_seed": draw, "coarse": coarse if method == TEACHER else "none"}
    if has_teacher(method):
        values["teacher"] = str(out / f"{TEACHER}-{draw}" / "model")
    config = make_config(values)
    checkpoint = train(config)
    val = load_chips(chips).split("val").decided()
    counts = _counts(checkpoint, val, device)
    blocks = {b: counts[val.column("block") == b].sum(axis=0).tolist() for b in np.unique(val.column("block"))}
    scores = {"miou": 100 * metrics.scores(counts.sum(axis=0))["miou"], "blocks": blocks}
    if config.rows != "all":  # else it has learned from them; a teacher has seen none
        apart = load_sets(replace(config, rows="fine", coarse="none"))[1][0]
        scores["held"] = _counts(checkpoint, apart, device).sum(axis=0).tolist()
    return {"draw": draw, "method": method, "coarse": coarse, **scores}


def base(chips: Chips) -> dict[str, Any]:
    """What all methods have in common on these chips: their own bands, and windows for their size."""
    bands = [band for b, band in enumerate(BANDS) if np.isfinite(chips.image[:, b]).any()]
    return BASE | {"bands": bands} | (CUT if chips.image.shape[-1] > CUT["sizes"][0] else {})


def _counts(checkpoint: Checkpoint, chips: Chips, device: str) -> Counts:
    """Counts of each chip, (n, 4)."""
    from minemap.training.evaluate import QUICK, predict_chips

    network = checkpoint.network().to(device)
    precision = native_precision() if device == "cpu" else "fp32"
    chance = predict_chips(network, checkpoint.recipe, chips, precision=precision, seen=QUICK)
    return metrics.confusion(chance >= THRESHOLD, chips.mask)


def read(out: Path) -> list[dict[str, Any]]:
    """The lines of results there are."""
    path = out / RESULTS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write(out: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Adds lines of results."""
    with (out / RESULTS).open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def tables(rows: list[dict[str, Any]]) -> str:
    """All tables that something was run for, in Markdown."""
    ran = {row["method"] for row in rows}
    chosen = {name: methods for name, (methods, _) in TABLES.items() if len(ran & set(methods)) > 1}
    return "\n\n".join(table(rows, methods, TABLES[name][1]) for name, methods in chosen.items())


def table(rows: list[dict[str, Any]], methods: Iterable[str], references: Iterable[str], samples: int = 2000) -> str:
    """A Markdown table: mIoU of each method and its paired differences to the references, with intervals.

    "held": mIoU on the fine chips that the runs kept apart, those of all draws together.
    """
    counts = by_method(rows)
    differences = [f"minus {r} (95 % interval)" for r in references]
    head = ["method", "draws", "held", "val mIoU (range over draws)", *differences]
    lines = [_line(head), _line("---" for _ in head)]
    for method in (m for m in methods if m in counts):
        own = [row for row in rows if row["method"] == method]
        scores = [row["miou"] for row in own]
        apart = np.sum([row["held"] for row in own if "held" in row], axis=0)
        held = f"{100 * metrics.scores(apart)['miou']:.1f}" if apart.any() else ""
        spread = f"{np.mean(scores):.1f} ({min(scores):.1f} to {max(scores):.1f})"
        intervals = (_interval(counts, method, r, samples) for r in references)
        lines.append(_line([method, str(len(scores)), held, spread, *intervals]))
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def by_method(rows: list[dict[str, Any]]) -> dict[str, dict[int, NDArray[np.float64]]]:
    """Method -> draw -> counts (block, 4), blocks in one order."""
    found: dict[str, dict[int, NDArray[np.float64]]] = {}
    for row in rows:
        counts = np.array([row["blocks"][b] for b in sorted(row["blocks"])], float)
        found.setdefault(row["method"], {})[row["draw"]] = counts
    return found


def _interval(counts: dict[str, dict[int, NDArray[np.float64]]], method: str, reference: str, samples: int) -> str:
    shared = sorted(set(counts[method]) & set(counts.get(reference, {})))
    if not shared or method == reference:
        return ""
    ours, theirs = (np.stack([counts[m][d] for d in shared]) for m in (method, reference))
    return paired(ours, theirs, mean_miou, samples)


def paired(ours: Counts, theirs: Counts, score: Callable[[Counts], float], samples: int) -> str:
    """The difference of two methods' scores and its 95 % interval, in words."""
    low, high = np.percentile(bootstrap(ours, theirs, score, samples), [2.5, 97.5])
    return f"{score(ours) - score(theirs):+.1f} ({low:+.1f} to {high:+.1f})"


def bootstrap(ours: Counts, theirs: Counts, score: Callable[[Counts], float], samples: int) -> NDArray[np.float64]:
    """Differences of a score over resampled runs and blocks, float64 (samples,)."""
    rng = np.random.default_rng(0)
    picks = [np.ix_(*(rng.integers(n, size=n) for n in ours.shape[:2])) for _ in range(samples)]
    return np.array([score(ours[pick]) - score(theirs[pick]) for pick in picks])


def mean_miou(counts: Counts) -> float:
    """Mean over draws of the mIoU of all blocks pooled, per cent."""
    tn, fp, fn, tp = counts.sum(axis=1).T
    return float((50 * (tp / (tp + fp + fn) + tn / (tn + fp + fn))).mean())


def main(arguments: list[str] | None = None) -> None:
    """Run the study or print its tables."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("action", choices=("run", "table"))
    parser.add_argument("--chips", help="mines6/chips.npz")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--coarse", choices=tuple(COARSENINGS), default="blobs", help="labels of the rest (blobs)")
    parser.add_argument("--draws", type=int, default=5, help="of blocks, the first so many")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, a core each (1)")
    args = parser.parse_args(arguments)
    if args.action == "run" and not args.chips:
        parser.error("run needs --chips")
    if args.action == "run":
        options = {key: getattr(args, key) for key in ("draws", "methods", "coarse", "device", "workers")}
        run(args.chips, args.out, **options)
    print(tables([row for row in read(args.out) if row["draw"] < args.draws]))


if __name__ == "__main__":
    sys.exit(exit_status(main))
