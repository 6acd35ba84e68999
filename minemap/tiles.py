"""Windows and batches: how an image of any size goes through a network that sees one window at a time.

Knows no torch. An image here is float32 (band, y, x), whole squares of 256 px of its zone's lattice, with a margin
around them. Two windows side by side answer differently for the pixels where they meet, for each sees more of its
own side: put beside each other, they would leave a step at every border. So windows overlap, and where they do one
fades into the next. They are centred on the corners of the squares: a super-tile then needs one row and one column
of windows more than it has squares, while windows centred on the squares would need two to fade at its edge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Layout:
    """window: from one to the next, pixels. halo: half of what two share. batch: windows a call, always full."""

    window: int = 256
    halo: int = 32
    batch: int = 2

    @property
    def seen(self) -> int:
        """Side of what the network sees."""
        return self.window + 2 * self.halo

    @property
    def margin(self) -> int:
        """What an image needs around it: its outermost windows are centred on its edges."""
        return self.window // 2 + self.halo

    def windows(self, shape: tuple[int, int]) -> list[tuple[slice, slice]]:
        """Rows and columns of every window of an image of `shape`, both with the margin.

        Raises ValueError where the image without its margin is not whole squares.
        """
        inner = [side - 2 * self.margin for side in shape]
        if inner[0] % self.window or inner[1] % self.window:
            raise ValueError(f"an image of {inner[0]} x {inner[1]} px does not divide into windows of {self.window}")
        rows, columns = ([slice(n, n + self.seen) for n in range(0, side + 1, self.window)] for side in inner)
        return [(row, column) for row in rows for column in columns]

    def weight(self) -> np.ndarray:
        """Share of a window in each of its pixels, float32 (seen, seen); those of all windows add up to 1."""
        rise = (np.arange(2 * self.halo, dtype=np.float32) + 0.5) / (2 * self.halo or 1)
        across = np.concatenate([rise, np.ones(self.window - 2 * self.halo, np.float32), rise[::-1]])
        return np.outer(across, across)


Batch = list[tuple[slice, slice]]
"""Rows and columns of the windows of one call."""
Network = Callable[[np.ndarray], np.ndarray]
"""float32 (batch, band, seen, seen), NaN where not observed, to probabilities float32 (batch, seen, seen)."""
Empty = Callable[[tuple[int, ...], type[np.float32]], np.ndarray]
"""What makes the array of a call's windows: `np.empty`, or one in memory that a GPU reads by itself."""


def run_windows(
    image: np.ndarray,
    network: Network,
    layout: Layout,
    mapper: Callable[[Callable[[Batch], np.ndarray], Iterable[Batch]], Iterable[np.ndarray]] = map,
    empty: Empty = np.empty,
) -> np.ndarray:
    """Probability of every pixel of `image` but its margin, float32 (y, x), NaN where the image is not observed.

    image: float32 (band, y + 2 margin, x + 2 margin), NaN in all bands = not observed. Windows in which nothing is
    observed are skipped. mapper: how batches are run, `map` or a pool's (it must keep their order).
    """

    def answered(batch: Batch) -> np.ndarray:
        stacked = _stacked(image, batch, layout, empty)
        answer = network(stacked)
        for window, probability in zip(stacked, answer, strict=True):
            probability[_unobserved(window)] = np.nan
        return answer

    windows: Batch = []
    skipped: Batch = []
    for window in layout.windows(image.shape[1:]):
        (skipped if _unobserved(image[:, *window]).all() else windows).append(window)
    batches = list(_batches(windows, layout.batch))
    answers = mapper(answered, batches)  # a pool begins now
    out, weight = np.zeros(image.shape[1:], np.float32), layout.weight()
    for batch, answer in zip(batches, answers, strict=True):
        for window, probability in zip(batch, answer, strict=False):  # from north to south: the sum's order is fixed
            out[window] += weight * probability
    for window in skipped:
        out[window] = np.nan
    margin = layout.margin
    return out[margin:-margin, margin:-margin]


def _unobserved(image: np.ndarray) -> np.ndarray:
    """Where no band is given, bool (y, x), from (band, y, x)."""
    absent = np.isnan(image[0])
    for band in image[1:]:
        if not absent.any():  # the usual case, quick to see
            break
        absent &= np.isnan(band)
    return absent


def _batches(windows: list[tuple[slice, slice]], size: int) -> Iterator[Batch]:
    for start in range(0, len(windows), size):
        yield windows[start : start + size]


def _stacked(image: np.ndarray, batch: Batch, layout: Layout, empty: Empty) -> np.ndarray:
    """The last batch is filled up with windows of NaN: a batch of another size gives other last digits."""
    stacked = empty((layout.batch, len(image), layout.seen, layout.seen), np.float32)
    for i, window in enumerate(batch):
        stacked[i] = image[:, *window]
    stacked[len(batch) :] = np.nan
    return stacked
