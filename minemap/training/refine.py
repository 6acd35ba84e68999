"""Coarse labels corrected by a network that has learned from a few fine ones, so that it can learn from all chips.

Self-training (Lee 2013, "Pseudo-Label", ICML workshop; Xie et al. 2020, "Noisy Student", arXiv:1911.04252) with what
a coarse outline still says: where the network sees a mine and the outline has none, nobody knows, and the pixel is
ignored; everywhere else the network's answer is the label. `python -m minemap.training.refine CHIPS MODEL OUT` writes
the corrected chips, and `minemap train student --chips FINE OUT --set start=MODEL` learns from both.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from minemap.checkpoint import Checkpoint, load_model
from minemap.training.chips import IGNORE, Chips, load_chips, save_chips
from minemap.training.evaluate import predict_chips


def corrected(coarse: NDArray[np.uint8], mine: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Labels uint8 (..., y, x) from coarse ones, 1 mine, 0 not, 255 ignore, and where a network sees a mine."""
    doubtful = (coarse == IGNORE) | (mine & (coarse == 0))
    return np.where(doubtful, np.uint8(IGNORE), mine.astype(np.uint8))


def refine(chips: Chips, checkpoint: Checkpoint, *, threshold: float | None = None, seen: int | None = None) -> Chips:
    """The chips with corrected masks.

    threshold: probability from which a pixel is mine; the model's own unless one is given. seen: what the network is
    shown at least, pixels (evaluate.predict_chips).
    """
    probability = predict_chips(checkpoint.network(), checkpoint.recipe, chips, seen=seen)
    used = checkpoint.recipe.threshold if threshold is None else threshold
    return replace(chips, mask=corrected(chips.mask, probability >= used))


def main(arguments: list[str] | None = None) -> None:
    """Correct the coarse labels of chips by a model and print what that changed, in pixels, as JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("chips", help="chips with coarse labels (.zarr or .npz)")
    parser.add_argument("model", help="a checkpoint that has learned from fine labels")
    parser.add_argument("out", type=Path, help="file to write (.npz)")
    args = parser.parse_args(arguments)
    chips = load_chips(args.chips).decided()
    fine = refine(chips, load_model(args.model))
    save_chips(args.out, fine)
    pixels = {"mine_before": chips.mask == 1, "mine_after": fine.mask == 1, "ignored": fine.mask == IGNORE}
    print(json.dumps({"out": str(args.out)} | {name: int(where.sum()) for name, where in pixels.items()}))


if __name__ == "__main__":
    main()
