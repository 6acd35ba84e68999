"""Cross-fitting: how well the recipe of a model answers for places that it has not seen, over all training places.

`python -m minemap.training.crossfit run MODEL --chips mines6/chips.npz --out runs/cross` trains the stages of a model
(teacher, then student) once for each fold of the blocks, without that fold, and keeps what they answer for it (Stone
1974, Journal of the Royal Statistical Society B 36:111-147); `... table runs/cross/answers.npz` prints what these
answers are worth. Every stage runs all of its epochs, on a cosine, and its last weights answer: the fold decides
nothing.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import zipfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minemap.checkpoint import load_model
from minemap.errors import InputError, exit_status
from minemap.inference import percent
from minemap.training import metrics
from minemap.training.area_model import blocks_of, left_out, measured
from minemap.training.chips import Chips
from minemap.training.config import make_config, option_types
from minemap.training.evaluate import predict_chips
from minemap.training.loop import load_sets, train
from minemap.training.threshold import bounds

ANSWERS = "answers.npz"
COLUMNS = ("block", "sample", "date")
STAGES = "teacher", "student", "third", "fourth"
LAST = {"keep": "last", "schedule": "cosine", "stop": 0}  # plateaus are found on held-out chips


@dataclass(frozen=True)
class Answers:
    """What the networks of each fold answer for its chips.

    percent: uint8 (stage, n, y, x), as a map stores it. mask: uint8 (n, y, x), 255 ignore. fold: (n,). columns: (n,)
    each, those of COLUMNS. stages: names, the first one first. resolution: metres.
    """

    percent: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    fold: NDArray[np.int64]
    columns: dict[str, NDArray[np.str_]]
    stages: list[str]
    resolution: float


def stages(training: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name -> options of the trainings behind a recipe, the first one first. Raises InputError."""
    if training.get("start") or "architecture" not in training:
        raise InputError("this model's recipe does not record its whole training: it can't be trained on folds")
    before = stages(training["teacher"]) if training.get("teacher") else {}
    own = {k: v for k, v in training.items() if k in option_types() and k not in ("teacher", "start")}
    return before | {STAGES[len(before)]: own}


def run(model: str, chips: str, out: Path, *, folds: int, device: str = "cpu", workers: int = 1) -> Answers:
    """Train the stages for every fold, so many at a time, and keep the answers; what was trained is not repeated."""
    if folds < 2:
        raise InputError(f"{folds} folds: at least two are needed")
    training = load_model(model).recipe.training
    names = list(stages(training))
    task = partial(run_fold, training, chips, out, folds=folds, device=device)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        parts = list(pool.map(task, range(folds)))
    held = [chips for chips, _ in parts]
    found = Answers(
        percent=np.concatenate([answer for _, answer in parts], axis=1),
        mask=np.concatenate([chips.mask for chips in held]),
        fold=np.repeat(np.arange(folds), [len(chips) for chips in held]),
        columns={name: np.concatenate([chips.column(name) for chips in held]) for name in COLUMNS},
        stages=names,
        resolution=held[0].resolution,
    )
    save(out / ANSWERS, found)
    return found


def run_fold(
    training: dict[str, Any], chips: str, out: Path, fold: int, *, folds: int, device: str
) -> tuple[Chips, NDArray[np.uint8]]:
    """The chips of a fold, and what each stage trained without them answers, uint8 (stage, n, y, x)."""
    draw = {"holdout": 1 / folds, "holdout_seed": 0, "holdout_fold": fold}
    every, teacher = stages(training), None
    place = {"data": [chips], "device": device}
    configs = {
        name: make_config(options | place | draw | LAST | {"out": str(out / f"{name}-{fold}")})
        for name, options in every.items()
    }
    held = load_sets(list(configs.values())[-1])[1][0]
    answers = []
    for config in configs.values():
        checkpoint = train(replace(config, teacher=teacher))
        network = checkpoint.network().to(device)
        answers.append(percent(predict_chips(network, checkpoint.recipe, held, precision=config.precision)))
        teacher = str(checkpoint.path)
    return held, np.stack(answers)


def save(path: Path, answers: Answers) -> None:
    """Write the answers to a file of NumPy's, beside its place first."""
    arrays: dict[str, Any] = {key: value for key, value in vars(answers).items() if key != "columns"}
    draft = path.with_name(f".{path.name}")
    np.savez_compressed(draft, **arrays | answers.columns)
    draft.replace(path)


def load(path: Path) -> Answers:
    """Read them. Raises InputError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            columns = {name: file[name] for name in COLUMNS}
            told = {"stages": file["stages"].tolist(), "resolution": float(file["resolution"])}
            return Answers(columns=columns, **told, **{key: file[key] for key in ("percent", "mask", "fold")})
    except (OSError, EOFError, ValueError, KeyError, zlib.error, zipfile.BadZipFile) as error:
        raise InputError(f"{path} cannot be read as the answers of a cross-fitting: {error}") from error


def table(answers: Answers) -> str:
    """Scores of each stage by fold and over all, its area-unbiased threshold, and how wide intervals of areas are."""
    folds = range(int(answers.fold.max()) + 1)
    head = [
        "stage",
        *(f"fold {fold}" for fold in folds),
        "all",
        "threshold (5 to 95 %)",
        "held by intervals",
        "width",
    ]
    lines = [head, ["---"] * len(head)]
    for stage, stored in zip(answers.stages, answers.percent, strict=True):
        chance: NDArray[np.float32] = stored.astype(np.float32) / np.float32(100)
        threshold = round(metrics.area_unbiased_threshold(chance, answers.mask), 3)  # float32 is a hair above
        low, high = bounds(chance, answers.mask, answers.columns["block"])
        rows = [answers.fold == fold for fold in folds] + [np.ones(len(chance), bool)]
        scores = [metrics.report(chance[keep], answers.mask[keep], threshold)["miou"] for keep in rows]
        chips = Chips(np.empty((len(chance), 0, 0, 0), np.float32), answers.mask, answers.columns)
        blocks = blocks_of(chance, chips, answers.resolution)
        areas = measured(blocks, left_out(blocks, threshold))
        cells = [*(f"{score:.1f}" for score in scores), f"{threshold:.2f} ({low:.2f} to {high:.2f})"]
        lines.append([stage, *cells, f"{areas['coverage']} %", f"{areas['large_median_width']} %"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: list[str] | None = None) -> None:
    """Train the folds of a model, or print what their answers are worth."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    train_folds = actions.add_parser("run")
    train_folds.add_argument("model")
    train_folds.add_argument("--chips", required=True, help="mines6/chips.npz")
    train_folds.add_argument("--out", type=Path, default=Path("runs/cross"))
    train_folds.add_argument("--folds", type=int, default=5)
    train_folds.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    train_folds.add_argument("--workers", type=int, default=1, help="folds at a time (1)")
    actions.add_parser("table").add_argument("answers", type=Path)
    args = parser.parse_args(arguments)
    if args.action == "run":
        options = {key: getattr(args, key) for key in ("folds", "device", "workers")}
        print(table(run(args.model, args.chips, args.out, **options)))
    else:
        print(table(load(args.answers)))


if __name__ == "__main__":
    sys.exit(exit_status(main))
