"""Open water: large bodies of it are judged as a whole, so that a bright shore does not spill into a reservoir.

A network of stride 4 answers a pixel or two beyond an outline, and few chips hold a lake. A river, lake or reservoir
that the network calls no mine almost everywhere is therefore no mine anywhere. A pond of tailings is small, or the
network calls a tenth of it mine or more: then its answer stands. Maps and `predict` do this; `evaluate` scores the
network alone.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

BODY_HA = 25.0  # hectares of connected water in a window, from which on it is a body of open water
UNLIKELY = 0.1  # mean probability of mine below which such a body is no mine


def settle_open_water(
    windows: np.ndarray, probability: np.ndarray, *, bands: tuple[str, ...], resolution: float
) -> np.ndarray:
    """`probability` with 0 on bodies of open water whose mean is below UNLIKELY.

    windows: reflectance float32 (window, band, y, x), NaN where not observed. probability: float32 (window, y, x).
    resolution: metres. Water is where NDWI = (green - nir) / (green + nir) is above 0 (McFeeters 1996); pixels that
    share an edge belong together. Without green or nir, in the model or in the image, nothing changes. Each window
    is judged by itself: what a pixel gets depends on its window alone.
    """
    if not {"green", "nir"} <= set(bands):
        return probability
    smallest = BODY_HA * 1e4 / resolution**2
    green, nir = bands.index("green"), bands.index("nir")
    out = probability.copy()
    for window, answer in zip(windows, out, strict=True):
        water = window[green] > window[nir]  # False where NaN
        if np.count_nonzero(water) < smallest:
            continue
        labels, _ = ndimage.label(water)
        size = np.bincount(labels.ravel())
        mean = np.bincount(labels.ravel(), answer.ravel()) / np.maximum(size, 1)
        settled = (size >= smallest) & (mean < UNLIKELY)
        settled[0] = False  # what is no water
        answer[settled[labels]] = 0.0
    return out
