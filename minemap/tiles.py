"""Windows and batches: how an image of any size goes through a network that sees one window at a time.

Knows no torch. An image here is float32 (band, y, x) with its halo around it; a core is the part of a window whose
answer is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Layout:
    """window: side of a core in pixels. halo: context on each side of it. batch: windows a call, always full."""

    window: int = 256
    halo: int = 32
    batch: int = 4

    @property
    def seen(self) -> int:
        """Side of what the network sees."""
        return self.window + 2 * self.halo

    def cores(self, shape: tuple[int, int]) -> list[tuple[int, int]]:
        """(row, column) of every core of an image of `shape`, halo not counted. Raises ValueError on a remainder."""
        if shape[0] % self.window or shape[1] % self.window:
            raise ValueError(f"an image of {shape} px does not divide into windows of {self.window}")
        rows, columns = (range(0, side, self.window) for side in shape)
        return [(row, column) for row in rows for column in columns]

    def cut(self, image: np.ndarray, core: tuple[int, int]) -> np.ndarray:
        """What the network sees of a core: a view (band, seen, seen) of the image with its halo."""
        row, column = core
        return image[:, row : row + self.seen, column : column + self.seen]


Network = Callable[[np.ndarray], np.ndarray]
"""float32 (batch, band, seen, seen), NaN where not observed, to probabilities float32 (batch, seen, seen)."""


def run_windows(
    image: np.ndarray,
    network: Network,
    layout: Layout,
    mapper: Callable[[Network, Iterable[np.ndarray]], Iterable[np.ndarray]] = map,
) -> np.ndarray:
    """Probability of every pixel of `image` but its halo, float32 (y, x), NaN where the image is not observed.

    image: float32 (band, y + 2 halo, x + 2 halo), NaN in all bands = not observed. Windows whose core has nothing
    observed are skipped. mapper: how batches are run, `map` or a pool's (it must keep their order).
    """
    halo = layout.halo
    shape = image.shape[1] - 2 * halo, image.shape[2] - 2 * halo
    inner = slice(halo, -halo or None), slice(halo, -halo or None)
    observed = ~np.isnan(image[(slice(None), *inner)]).all(axis=0)
    out = np.full(shape, np.nan, np.float32)
    cores = [core for core in layout.cores(shape) if observed[_square(core, layout.window)].any()]
    batches = list(_batches(cores, layout.batch))
    answers = mapper(network, (_stacked(image, batch, layout) for batch in batches))
    for batch, answer in zip(batches, answers, strict=True):
        for core, probability in zip(batch, answer, strict=False):
            out[_square(core, layout.window)] = probability[inner]
    return np.where(observed, out, np.float32(np.nan))


def _square(core: tuple[int, int], side: int) -> tuple[slice, slice]:
    return slice(core[0], core[0] + side), slice(core[1], core[1] + side)


def _batches(cores: list[tuple[int, int]], size: int) -> Iterator[list[tuple[int, int]]]:
    for start in range(0, len(cores), size):
        yield cores[start : start + size]


def _stacked(image: np.ndarray, batch: list[tuple[int, int]], layout: Layout) -> np.ndarray:
    """The last batch is filled up with windows of NaN: a batch of another size gives other last digits."""
    stacked = np.full((layout.batch, len(image), layout.seen, layout.seen), np.nan, np.float32)
    for i, core in enumerate(batch):
        stacked[i] = layout.cut(image, core)
    return stacked
