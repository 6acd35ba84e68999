"""Puts a network for images without infrared into a MineC2FNet of six bands.

`python -m minemap.training.visible MODEL VISIBLE OUT`. VISIBLE is a MineC2FNet of blue, green and red. Its answers
are shifted (in logits, by a constant) so that its threshold becomes MODEL's: a checkpoint has one.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from minemap import models
from minemap.checkpoint import Checkpoint, load_model, save
from minemap.errors import InputError, exit_status
from minemap.models.minec2fnet import VISIBLE


def combine(model: Checkpoint, visible: Checkpoint, out: str | Path) -> Checkpoint:
    """MODEL with VISIBLE inside, as a checkpoint in `out`; MODEL's card is not copied, it would be out of date."""
    ours, theirs = model.recipe, visible.recipe
    bands = ours.bands[:VISIBLE]
    if {ours.architecture, theirs.architecture} != {"minec2fnet"} or theirs.bands != bands:
        raise InputError(f"{ours.name} must be a minec2fnet and {theirs.name} one of the bands {', '.join(bands)}")
    if (ours.mean[:VISIBLE], ours.std[:VISIBLE]) != (theirs.mean, theirs.std):
        raise InputError(f"{theirs.name} scales its bands otherwise than {ours.name}: train it with the same numbers")
    options = {key: value for key, value in theirs.options.items() if key != "in_channels"}
    recipe = replace(
        ours,
        options=ours.options | {"visible": options},
        training=ours.training | {"visible": theirs.training},
        metrics=ours.metrics | {"holdout without infrared": theirs.metrics.get("holdout", {})},
    )
    network: Any = models.build("minec2fnet", **recipe.options)
    network.load_state_dict(model.network().state_dict(), strict=False)
    network.visible.load_state_dict(visible.network().state_dict())
    move_threshold(network, theirs.threshold, ours.threshold)
    return save(out, network, recipe)


def move_threshold(network: Any, old: float, new: float) -> None:
    """Shift what a network answers to images without infrared: cut at `new` it is what it was when cut at `old`.

    Nothing happens to one that has no network of its own for them.
    """
    if (visible := getattr(network, "visible", None)) is None:
        return
    last = visible.head[0] if visible.detail is None else visible.detail.mix[-1]
    with torch.no_grad():
        last.bias += _logit(new) - _logit(old)


def _logit(chance: float) -> float:
    return math.log(chance / (1 - chance))


def main(arguments: list[str] | None = None) -> None:
    """Combine two checkpoints into one."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("model")
    parser.add_argument("visible")
    parser.add_argument("out")
    args = parser.parse_args(arguments)
    print(combine(load_model(args.model), load_model(args.visible), args.out).path)


if __name__ == "__main__":
    sys.exit(exit_status(main))
