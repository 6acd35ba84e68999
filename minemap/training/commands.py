"""The command line of training: `minemap train` and `minemap evaluate`. Imports no torch until it runs."""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import replace
from typing import Any, get_origin

from minemap.errors import InputError
from minemap.training.config import TrainConfig, make_config, option_types, read_values

KINDS = ("teacher", "student", "baseline", "change")
# What each baseline is: a network by name, or FPN with another way to keep what the teacher knew.
BASELINES: dict[str, dict[str, Any]] = {
    "fpn": {"architecture": "fpn"},
    "unet": {"architecture": "unet"},
    "deeplabv3plus": {"architecture": "deeplabv3plus"},
    "segformer": {"architecture": "segformer"},
    "finetune": {"architecture": "fpn", "selection": "none"},
    "lwf": {"architecture": "fpn", "selection": "standard"},
    "lwm": {"architecture": "fpn", "selection": "standard", "attention": 1.0},
    "replay": {"architecture": "fpn", "selection": "none", "replay": 0.25, "rows": "fine"},
}
NEED_TEACHER = ("finetune", "lwf", "lwm", "replay")
TEACHER: dict[str, Any] = {
    "architecture": "fpn",
    "coarse": "blobs",
    "dice": 0.0,
    "ssim": 0.0,
    "boundary": 0.0,
    "selection": "none",
}
# MineNetCD on pairs of dates; its encoder starts from the default model's
CHANGE: dict[str, Any] = {
    "architecture": "minenetcd",
    "freeze_norm": True,
    "dice": 0.5,
    "ssim": 0.0,
    "boundary": 0.0,
    "selection": "none",
    "absent": 0.0,
}
ARGUMENTS = {"out": "--out", "data": "--chips", "quiet": "--json"}  # options that --set would have no say in
COLUMNS = ("accuracy", "mf1", "miou", "mine_iou", "precision", "recall", "f1", "boundary_f1", "ece")


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `minemap train`."""
    parser.add_argument(
        "kind", choices=KINDS, help="teacher (coarse labels), student (MineC2FNet), baseline or change"
    )
    parser.add_argument(
        "--chips", nargs="+", action="extend", required=True, metavar="FILE", help="chips (.zarr or .npz)"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the run; an interrupted one goes on")
    parser.add_argument("--teacher", metavar="PATH", help="the teacher's checkpoint")
    parser.add_argument("--name", default="fpn", choices=sorted(BASELINES), help="which baseline (default fpn)")
    parser.add_argument("--config", metavar="FILE", help="training options as JSON: fields of TrainConfig")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="single training options"
    )
    parser.add_argument("--json", action="store_true", help="print the scores as JSON")


def run_train(args: argparse.Namespace) -> None:
    """Train, then print the scores on the rows that were held out."""
    config = replace(train_config(args), quiet=bool(args.json))
    from minemap.training.loop import train

    checkpoint = train(config)
    scores = {"model": str(checkpoint.path), "threshold": checkpoint.recipe.threshold}
    _show(scores | checkpoint.recipe.metrics.get("holdout", {}), as_json=args.json)


def train_config(args: argparse.Namespace) -> TrainConfig:
    """The configuration that the arguments of `minemap train` describe."""
    from minemap.checkpoint import DEFAULT_MODEL

    kinds: dict[str, dict[str, Any]] = {
        "teacher": TEACHER,
        "student": {"architecture": "minec2fnet"},
        "baseline": BASELINES[args.name],
        "change": CHANGE | {"start": DEFAULT_MODEL},
    }
    values = kinds[args.kind] | ({} if args.config is None else read_values(args.config))
    values |= dict(_assignment(text) for text in args.set)
    given = {"out": args.out, "data": list(args.chips), "teacher": args.teacher}
    config = make_config(values | {key: value for key, value in given.items() if value is not None})
    learns = (config.gated_fusion and config.start is None) or config.selection != "none"
    needs = learns if args.kind == "student" else args.kind == "baseline" and args.name in NEED_TEACHER
    if needs and config.teacher is None:
        raise InputError(f"training a {args.kind} needs --teacher: train one with `minemap train teacher`")
    return config


def _assignment(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"--set {text!r}: give KEY=VALUE with a training option, as in epochs=20")
    if key in ARGUMENTS:
        raise InputError(f"--set {text!r}: use {ARGUMENTS[key]} instead")
    kind = option_types().get(key)
    if get_origin(kind) is tuple and not value.startswith("["):
        return key, [_parsed(part) for part in value.split(",") if part]
    found = _parsed(value)
    return key, value if kind is str and not isinstance(found, str) else found


def _parsed(text: str) -> Any:
    """JSON, else a word."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `minemap evaluate`."""
    parser.add_argument("--chips", required=True, metavar="FILE", help="chips with masks (.zarr or .npz)")
    parser.add_argument("--model", metavar="NAME|PATH", help="default: the bundled model")
    parser.add_argument("--split", metavar="NAME", help="only chips of this split")
    parser.add_argument("--by", metavar="COLUMN", help="scores for each value of a column, as split or category")
    parser.add_argument("--bands", metavar="B1,B2", help="only these bands, the others absent")
    parser.add_argument("--threshold", type=float, metavar="T", help="probability; default: the model's own")
    parser.add_argument("--json", action="store_true", help="print the scores as JSON")


def run_evaluate(args: argparse.Namespace) -> None:
    """Print how well a model does on chips, in per cent."""
    from minemap.checkpoint import load_model
    from minemap.training import evaluate as evaluation
    from minemap.training.chips import keep_bands, load_chips, load_pairs

    if args.threshold is not None and not 0 <= args.threshold <= 1:
        raise InputError(f"--threshold {args.threshold}: a probability lies between 0 and 1")
    checkpoint = load_model(args.model)
    load = load_pairs if checkpoint.recipe.dates == 2 else load_chips
    chips = load(args.chips).split(args.split).decided()
    if args.bands:
        chips = keep_bands(chips, tuple(args.bands.split(",")))
    if not len(chips):
        raise InputError(f"{args.chips}: no chip with a decided pixel, split {args.split!r}")
    learned_from = checkpoint.recipe.training.get("split")
    if args.split is None and "split" in chips.columns and (chips.column("split") == learned_from).any():
        print("minemap: places to learn from are among these chips: --split val leaves them out", file=sys.stderr)
    found = evaluation.evaluate(checkpoint, chips, by=args.by, threshold=args.threshold)
    _show({"model": checkpoint.recipe.name} | found, as_json=args.json)


def _show(found: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(_finite(found)))
        return
    groups = {"all": found} | found.get("by", {})
    width = max(len(name) for name in groups) + 2
    print(f"{found['model']} (per cent)")
    print(" " * width + "".join(f"{column:>13}" for column in (*COLUMNS, "images")))
    for name, row in groups.items():
        cells = [f"{row.get(column, math.nan):13.2f}" for column in COLUMNS]
        print(f"{name:{width}}" + "".join(cells) + f"{row.get('images', 0):13}")


def _finite(value: Any) -> Any:
    """NaN has no place in JSON: null instead."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
