"""What Landsat 8 and 9 Collection 2 Level 2 is: bands and their names, QA_PIXEL, the scaling of its DN.

Source: Landsat 8-9 Collection 2 Level 2 Science Product Guide (USGS, LSDS-1619), tables of QA_PIXEL's bits and of
the scale factors; asset names as the Planetary Computer, Earth Search and USGS give them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .sentinel2 import SCL, Item, Scaling

RESOLUTION = 30.0  # metres
COLLECTIONS = ("landsat-c2-l2", "landsat-c2l2-sr")
PLATFORMS = ("landsat-8", "landsat-9")  # the earlier ones have other bands under the same names
SCALE, OFFSET = 2.75e-5, -0.2  # reflectance is DN x scale + offset

ALIASES: dict[str, tuple[str, ...]] = {
    "blue": ("blue", "SR_B2"),
    "green": ("green", "SR_B3"),
    "red": ("red", "SR_B4"),
    "nir": ("nir08", "SR_B5"),
    "swir16": ("swir16", "SR_B6"),
    "swir22": ("swir22", "SR_B7"),
    SCL: ("qa_pixel", "QA_PIXEL"),
}

# Bits of QA_PIXEL and the SCL class that says the same, later lines win. What no bit names stays unclassified: seen.
QA_BITS = (
    (7, 6),  # water
    (5, 11),  # snow
    (1, 8),  # dilated cloud
    (2, 10),  # cirrus, high confidence
    (4, 3),  # cloud shadow, high confidence
    (3, 9),  # cloud, high confidence
    (0, 0),  # fill
)
UNCLASSIFIED = 7


def scaling(_: Item) -> Scaling:
    """The same for every item of Collection 2 Level 2."""
    return Scaling(OFFSET / SCALE, SCALE, "Landsat Collection 2 Level 2: DN x 2.75e-5 - 0.2")


def classes(qa: Any) -> np.ndarray:
    """QA_PIXEL (any shape, uint16) as SCL classes, uint8; 0, which no product holds, counts as fill."""
    qa = np.asarray(qa)
    out = np.full(qa.shape, UNCLASSIFIED, np.uint8)
    for bit, scl in QA_BITS:
        out[(qa >> bit) & 1 == 1] = scl
    out[qa == 0] = 0
    return out
