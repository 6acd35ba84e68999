"""Coarse labels corrected by a network that has learned from a few fine ones, so that it can learn from all chips.

Self-training (Lee 2013, "Pseudo-Label", ICML workshop; Xie et al. 2020, "Noisy Student", arXiv:1911.04252) that
does not forget what the coarse outlines say. A pixel's odds of being mine are the network's, times how much more
often an outline says what it says there over mine than over other land (Bayes). Those two shares are not known; they
are estimated from the same pixels by expectation maximisation, as the errors of an observer are (Dawid and Skene
1979, Applied Statistics 28:20-28), taking outline and network to err independently. What stays doubtful is ignored.

`python -m minemap.training.refine CHIPS MODEL OUT --fine FINE` writes the corrected chips; a training then reads the
fine chips and these, side by side.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit

from minemap.checkpoint import Checkpoint, load_model
from minemap.errors import InputError
from minemap.training.chips import IGNORE, Chips, away_from, load_chips, save_chips
from minemap.training.evaluate import predict_chips

DOUBTFUL = (0.3, 0.7)  # probability of mine between which a pixel is ignored
ROUNDS = 20  # of the estimation; it changes nothing after five
SURE = 1e-4  # the least that an outline or a network errs


def corrected(coarse: NDArray[np.uint8], odds: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Labels uint8 (..., y, x), 1 mine, 0 not, 255 ignore, from coarse ones and a network's log odds of mine."""
    labels, counted = np.full_like(coarse, IGNORE), coarse != IGNORE
    said, seen = coarse[counted] == 1, odds[counted].astype(float)
    mine = expit(seen)
    for _ in range(ROUNDS):
        hit, false = _share(said, mine), _share(said, 1 - mine)
        mine = expit(seen + np.where(said, np.log(hit / false), np.log((1 - hit) / (1 - false))))
    low, high = DOUBTFUL
    labels[counted] = np.select([mine < low, mine > high], [0, 1], IGNORE)
    return labels


def _share(said: NDArray[np.bool_], weight: NDArray[np.floating]) -> float:
    """How much of a weight lies where the outlines say mine, never quite none or all of it."""
    return float(np.clip(weight[said].sum() / max(weight.sum(), SURE), SURE, 1 - SURE))


def refine(chips: Chips, checkpoint: Checkpoint, *, threshold: float | None = None, seen: int | None = None) -> Chips:
    """The chips with corrected masks.

    threshold: probability at which a pixel is as likely mine as not; the model's own unless one is given. seen: what
    the network is shown at least, pixels (evaluate.predict_chips).
    """
    probability = predict_chips(checkpoint.network(), checkpoint.recipe, chips, seen=seen)
    used = checkpoint.recipe.threshold if threshold is None else threshold
    odds = logit(np.clip(probability, SURE, 1 - SURE)) - logit(used)
    return replace(chips, mask=corrected(chips.mask, odds))


def main(arguments: list[str] | None = None) -> None:
    """Correct the coarse labels of chips by a model and print what that changed, in pixels, as JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("chips", help="chips with coarse labels (.zarr or .npz)")
    parser.add_argument("model", help="a checkpoint that has learned from fine labels")
    parser.add_argument("out", type=Path, help="file to write (.npz)")
    parser.add_argument("--fine", help="chips with fine labels: places within 5 km of them are left out")
    args = parser.parse_args(arguments)
    chips = load_chips(args.chips).decided()
    if args.fine:
        chips = away_from(chips, load_chips(args.fine))
    if not len(chips):
        raise InputError(f"{args.chips}: no chip with a decided pixel is left to correct")
    fine = refine(chips, load_model(args.model))
    save_chips(args.out, fine)
    pixels = {"mine_before": chips.mask == 1, "mine_after": fine.mask == 1, "ignored": fine.mask == IGNORE}
    print(json.dumps({"out": str(args.out)} | {name: int(where.sum()) for name, where in pixels.items()}))


if __name__ == "__main__":
    main()
