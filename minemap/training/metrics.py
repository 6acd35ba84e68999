"""How good a map of mines is: pooled and per-image scores, boundary F1, calibration. numpy only.

`probability` float (n, y, x), 0-1; `mask` uint8 (n, y, x), 1 mine, 0 not, 255 ignore (never counted).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from minemap.training.chips import IGNORE

BINS = 15  # of the reliability diagram
TOLERANCE = 2  # pixels within which two boundaries agree

Floats = NDArray[np.floating]
Masks = NDArray[np.uint8]


def confusion(predicted: NDArray[np.bool_], mask: Masks) -> NDArray[np.int64]:
    """Counts of each image as (n, 4): true negatives, false positives, false negatives, true positives."""
    counted, truth = mask != IGNORE, mask == 1
    cells = [~truth & ~predicted, ~truth & predicted, truth & ~predicted, truth & predicted]
    return np.stack([(cell & counted).sum(axis=(1, 2)) for cell in cells], axis=1)


def scores(counts: NDArray[np.int64]) -> dict[str, float]:
    """Scores of one confusion (tn, fp, fn, tp); a class that neither side has does not count in the means.

    "mine_iou", "precision", "recall" and "f1" are those of the class 1: mine, or what has changed.
    """
    tn, fp, fn, tp = (float(c) for c in counts)
    ious = [_ratio(tp, tp + fp + fn), _ratio(tn, tn + fp + fn)]
    f1s = [_ratio(2 * tp, 2 * tp + fp + fn), _ratio(2 * tn, 2 * tn + fp + fn)]
    return {
        "accuracy": _ratio(tp + tn, tp + tn + fp + fn),
        "mf1": _mean(f1s),
        "miou": _mean(ious),
        "mine_iou": ious[0],
        "f1": f1s[0],
        "precision": _ratio(tp, tp + fp),
        "recall": _ratio(tp, tp + fn),
    }


def mean_scores(counts: NDArray[np.int64]) -> dict[str, float]:
    """The same scores as means over images; the scores in the table of MineC2FNet's paper can't be pooled ones."""
    rows = [scores(c) for c in counts if c.sum()]
    return {key: _mean([row[key] for row in rows]) for key in (rows[0] if rows else ())}


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")


def _mean(values: list[float]) -> float:
    known = [v for v in values if not np.isnan(v)]
    return float(np.mean(known)) if known else float("nan")


def report(probability: Floats, mask: Masks, threshold: float) -> dict[str, float]:
    """Every score of one set, in per cent, and `images`, the number of them."""
    predicted = probability >= threshold
    counts = confusion(predicted, mask)
    pooled = scores(counts.sum(axis=0))
    image = {f"{key}_image": value for key, value in mean_scores(counts).items()}
    extra = {"boundary_f1": boundary_f1(predicted, mask), "ece": calibration_error(probability, mask)}
    return {key: 100 * float(value) for key, value in (pooled | image | extra).items()} | {"images": len(mask)}


def boundary_f1(predicted: NDArray[np.bool_], mask: Masks, tolerance: int = TOLERANCE) -> float:
    """F1 of boundary pixels that have a partner within `tolerance` pixels, pooled; ignored pixels left out.

    NaN where neither has a boundary, 0 where one of them has none.
    """
    hits = np.sum([_boundary_hits(p, m, tolerance) for p, m in zip(predicted, mask, strict=True)], axis=0)
    if hits[1] + hits[3] and not (hits[0] and hits[2]):
        return 0.0
    precision, recall = _ratio(hits[0], hits[1]), _ratio(hits[2], hits[3])
    return _ratio(2 * precision * recall, precision + recall)


def _boundary_hits(predicted: NDArray[np.bool_], mask: Masks, tolerance: int) -> NDArray[np.float64]:
    counted = ndimage.binary_erosion(mask != IGNORE, np.ones((3, 3)))
    ours, truth = boundary(predicted) & counted, boundary(mask == 1) & counted
    near_truth, near_ours = _distance(truth) <= tolerance, _distance(ours) <= tolerance
    return np.array([(ours & near_truth).sum(), ours.sum(), (truth & near_ours).sum(), truth.sum()], float)


def boundary(shape: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels of a shape with a neighbour (of four) outside it; the image's edge is no boundary."""
    return shape & ~ndimage.binary_erosion(shape, border_value=1)


def _distance(points: NDArray[np.bool_]) -> Floats:
    return ndimage.distance_transform_edt(~points) if points.any() else np.full(points.shape, np.inf)


def reliability(probability: Floats, mask: Masks, bins: int = BINS) -> NDArray[np.float64]:
    """Rows (pixels, mean probability, share of mine), one for each of `bins` equal bins of probability."""
    counted = mask != IGNORE
    p, truth = probability[counted].astype(float), mask[counted] == 1
    which = np.minimum((p * bins).astype(int), bins - 1)
    n, total, mines = (np.bincount(which, weights=w, minlength=bins) for w in (None, p, truth))
    filled = np.maximum(n, 1)
    return np.stack([n, total / filled, mines / filled], axis=1)


def calibration_error(probability: Floats, mask: Masks, bins: int = BINS) -> float:
    """Expected calibration error: mean gap between probability and share of mine, weighted by pixels."""
    n, said, was = reliability(probability, mask, bins).T
    return _ratio(float((n * np.abs(said - was)).sum()), float(n.sum()))


def area_unbiased_threshold(probability: Floats, mask: Masks) -> float:
    """The threshold at which the mapped area equals the true area (so errors cancel in areas), 0-1."""
    counted = mask != IGNORE
    return float(np.quantile(probability[counted], 1 - (mask[counted] == 1).mean()))
