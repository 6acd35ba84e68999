"""What the mined area may really be, from the errors that a model made in places it did not learn from.

Sums of calibrated probabilities fail where a mine is one pixel in a thousand, and pixels err together. So the unit
is a block of held-out chips (places within 5 km of each other): its true area against what was mapped. The error of
a block is taken relative to a scale, which grows with the area whose probability is neither low nor high; quantiles
of these relative errors make the interval (normalised conformal prediction: Lei et al. 2018, Journal of the
American Statistical Association 113:1094-1111). Errors of a large site are assumed to go together: its interval is
as wide, relative to its doubtful area, as that of a block.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from .grid import BBox
from .inference import NOT_OBSERVED, mine_from

COVERAGE = 0.9
NOWHERE = (180.0, 90.0, -180.0, -90.0)  # W S E N
DOUBTFUL = (10, 90)  # per cent; probabilities from the first up to below the second


@dataclass(frozen=True)
class AreaModel:
    """Errors of a model's areas, as kept in its recipe.

    threshold: 0-1, at which areas were mapped when the errors were measured. ratio: true to mapped area, the median
    over the mapped area of all blocks. floor: km², scale of a place where nothing is doubtful. lower, upper:
    quantiles of (truth - estimate) / scale. region: W S E N of the chips, degrees. shares: lowest and highest
    mapped share of the observed area among blocks with mine. measured: coverage and width on blocks that were left
    out of the fit.
    """

    threshold: float
    ratio: float
    floor: float
    lower: float
    upper: float
    region: BBox
    shares: tuple[float, float]
    measured: dict[str, Any]

    def __post_init__(self) -> None:
        for name in ("region", "shares"):  # JSON has lists only
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @staticmethod
    def of(recipe: dict[str, Any], resolution: float) -> AreaModel | None:
        """From a recipe's `area_model`, None where it has none of this kind; of no place where the map has another
        resolution, metres, than the model was trained at."""
        found = recipe.get("area_model") or {}
        if set(found) != {f.name for f in fields(AreaModel)}:
            return None
        return AreaModel(**found | ({} if resolution == recipe["resolution"] else {"region": NOWHERE}))

    def interval(self, levels: np.ndarray) -> np.ndarray:
        """Estimate, lower and upper bound in km², float64 (3, ...), from km² by stored value (..., 256)."""
        mapped, doubtful, _ = parts(levels, self.threshold)
        estimate, scale = self.ratio * mapped, spread(doubtful, self.floor)
        low, high = estimate + self.lower * scale, estimate + self.upper * scale
        most = levels[..., :NOT_OBSERVED].sum(axis=-1)
        return np.stack([np.minimum(estimate, most), np.clip(low, 0, most), np.clip(high, 0, most)])

    def extrapolates(self, levels: np.ndarray, boxes: list[BBox]) -> np.ndarray:
        """Where the errors were not measured under such conditions, bool (...): another region, or another share of
        mine. boxes: W S E N in degrees of the site's parts."""
        mapped, _, observed = parts(levels, self.threshold)
        share = mapped / np.where(observed, observed, np.nan)
        outside = ~((share >= self.shares[0]) & (share <= self.shares[1]))
        return outside | np.bool_(not all(_within(box, self.region) for box in boxes))


def _within(inner: BBox, outer: BBox) -> bool:
    west, south, east, north = inner
    return outer[0] <= west <= east <= outer[2] and outer[1] <= south and north <= outer[3]


def parts(levels: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mapped, doubtful and observed km² (...), from km² by stored value (..., 256)."""
    mapped = levels[..., mine_from(threshold) : NOT_OBSERVED].sum(axis=-1)
    return mapped, levels[..., slice(*DOUBTFUL)].sum(axis=-1), levels[..., :NOT_OBSERVED].sum(axis=-1)


def spread(doubtful: np.ndarray, floor: float) -> np.ndarray:
    """The scale of errors, km²."""
    return doubtful + floor
