"""Batches: windows cut or padded from chips, augmented, normalised.

Everything random in a batch comes from one generator made of (seed, step), so that a resumed run sees the same
batches without any saved random state. A chip smaller than the window is placed at random and its surroundings
are reflected or absent, both of which occur in maps; their mask is 255 in either case.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from minemap.checkpoint import Recipe
from minemap.models.minec2fnet import VISIBLE
from minemap.sentinel2 import BANDS
from minemap.training.chips import IGNORE, Chips
from minemap.training.config import TOA_OFFSET, TrainConfig

HAZE = np.array([1.0, 0.7, 0.5, 0.2, 0.05, 0.02], np.float32)  # relative strength by band, falls with wavelength
SHIFT, SCALE, ROTATION = 0.1, 0.3, np.pi / 12  # the paper's affine augmentation


@dataclass(frozen=True)
class Window:
    """A piece of a chip: reflectance float32 (band, y, x); mask uint8 (y, x); which pixels are the chip's own."""

    image: NDArray[np.float32]
    mask: NDArray[np.uint8]
    inside: NDArray[np.bool_]


def make_batch(
    sets: list[Chips], config: TrainConfig, recipe: Recipe, step: int, replay: Sequence[Chips] = ()
) -> tuple[Tensor, Tensor]:
    """The batch of one step: float32 (N, C, S, S), normalised, and uint8 mask (N, 1, S, S).

    With `replay`, that share (config.replay) of the batches comes from those sets instead.
    """
    rng = np.random.default_rng((config.seed, step))
    windows = _draw(list(replay) if replay and rng.random() < config.replay else sets, config, rng)
    image = torch.from_numpy(np.stack([w.image for w in windows]))
    mask, inside = (np.stack([getattr(w, k) for w in windows]) for k in ("mask", "inside"))
    warped, mask, inside = _affine(image, mask, inside, config, rng)
    holes = _punch(mask, config, rng)
    looks = warped.numpy().reshape(-1, len(BANDS), *warped.shape[2:])  # each date of a pair by itself
    reflectance = _radiometry(looks, config, rng).reshape(warped.shape)
    absent = ~inside & (rng.random((len(windows), 1, 1)) < config.absent)
    reflectance[np.broadcast_to((absent | holes)[:, None], reflectance.shape)] = np.nan
    return normalised(reflectance, recipe), torch.from_numpy(mask)[:, None]


def normalised(image: NDArray[np.float32], recipe: Recipe) -> Tensor:
    """Chips as a network takes them: (n, dates x band, y, x) reflectance to (n, dates x channel, y, x)."""
    dates = image.reshape(len(image), -1, len(BANDS), *image.shape[2:])
    wanted = dates[:, :, [BANDS.index(b) for b in recipe.bands]]
    return recipe.normalise(torch.from_numpy(wanted)).reshape(len(image), -1, *image.shape[2:])


def _draw(sets: list[Chips], config: TrainConfig, rng: Generator) -> list[Window]:
    """The windows of a batch, all of one size, fewer of the larger ones for the same number of pixels."""
    sets = [s for s in sets if len(s)]
    size = int(rng.choice(config.sizes))
    count = max(2, round(config.batch * (config.sizes[0] / size) ** 2))
    large = [s for s in sets if s.image.shape[-1] > config.scene]
    small = [s for s in sets if s.image.shape[-1] <= config.scene] or large
    if size < config.scene:
        return [_from_chip(sets, size, config, rng) for _ in range(count)]
    return [_scene(small, large, size, config, rng) for _ in range(count)]


def _scene(small: list[Chips], large: list[Chips], size: int, config: TrainConfig, rng: Generator) -> Window:
    """A large window: cut from a large chip, or several small chips, or a single one."""
    if large and rng.random() < config.crops:
        return _from_chip(large, size, config, rng)
    if rng.random() < config.scatter:
        return _scatter(small, size, config, rng)
    return _from_chip(small, size, config, rng)


def _from_chip(sets: list[Chips], size: int, config: TrainConfig, rng: Generator) -> Window:
    """A random chip, flipped and turned at random, cut or padded to size x size."""
    chips = sets[rng.choice(len(sets), p=_shares(sets))]
    image, mask = _blend(chips, int(rng.integers(len(chips))), config, rng)
    turns, flip = int(rng.integers(4)), rng.random() < 0.5
    image, mask = np.rot90(image, turns, (1, 2)), np.rot90(mask, turns)
    return place(image[..., ::-1], mask[..., ::-1], size, rng) if flip else place(image, mask, size, rng)


def _shares(sets: list[Chips]) -> NDArray[np.float64]:
    sizes = np.array([len(s) for s in sets], float)
    return sizes / sizes.sum()


def _blend(
    chips: Chips, row: int, config: TrainConfig, rng: Generator
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """A row, or now and then a mix of its place's two dates, labelled where both agree."""
    image, mask = chips.image[row], chips.mask[row]
    other = row - 1 if chips.columns["date"][row] == "1" else row + 1
    same = 0 <= other < len(chips) and chips.columns["sample"][other] == chips.columns["sample"][row]
    if not same or rng.random() >= config.blend:
        return image, mask
    weight = np.float32(rng.uniform(0.2, 0.8))
    mixed = weight * image + (1 - weight) * chips.image[other]
    return mixed, np.where(mask == chips.mask[other], mask, np.uint8(IGNORE))


def place(image: NDArray[np.float32], mask: NDArray[np.uint8], size: int, rng: Generator) -> Window:
    """Cut a random window from a larger chip, or put a smaller one at a random place and reflect around it."""
    for axis in (1, 2):
        spare = image.shape[axis] - size
        if spare > 0:
            start = rng.integers(spare + 1)
            image = image.take(range(start, start + size), axis)
            mask = mask.take(range(start, start + size), axis - 1)
    before = [rng.integers(size - n + 1) for n in mask.shape]
    pads = [(b, size - n - b) for b, n in zip(before, mask.shape, strict=True)]
    inside = np.pad(np.isfinite(image).any(axis=0), pads)
    image = np.pad(image, [(0, 0), *pads], mode="reflect")
    return Window(image, np.pad(mask, pads, constant_values=IGNORE), inside)


def _scatter(sets: list[Chips], size: int, config: TrainConfig, rng: Generator) -> Window:
    """Small chips on a grid of cells, some cells empty: a large window of which little was observed."""
    n = config.cells(size)
    filled = rng.uniform(0.1, 1.0)
    cells = [_from_chip(sets, size // n, config, rng) for _ in range(n * n)]
    keep = rng.random(n * n) < filled
    keep[rng.integers(n * n)] = True
    cells = [_apart(cell) if k else _empty(cell) for cell, k in zip(cells, keep, strict=True)]
    grid = lambda key: _mosaic([getattr(c, key) for c in cells], n)  # noqa: E731
    return Window(grid("image"), grid("mask"), grid("inside"))


def _apart(cell: Window) -> Window:
    """Its first row and column without a label, so that no loss of an outline sees two chips as one."""
    mask = cell.mask.copy()
    mask[0], mask[:, 0] = IGNORE, IGNORE
    return replace(cell, mask=mask)


def _empty(cell: Window) -> Window:
    return Window(cell.image, np.full_like(cell.mask, IGNORE), np.zeros_like(cell.inside))


def _mosaic(cells: list[NDArray], n: int) -> NDArray:
    rows = [np.concatenate(cells[i * n : (i + 1) * n], axis=-1) for i in range(n)]
    return np.concatenate(rows, axis=-2)


def _affine(
    image: Tensor, mask: NDArray[np.uint8], inside: NDArray[np.bool_], config: TrainConfig, rng: Generator
) -> tuple[Tensor, NDArray[np.uint8], NDArray[np.bool_]]:
    """Shift, scale and rotate some samples: image bilinear, mask nearest, beyond the window 255 and not inside."""
    chosen = np.flatnonzero(rng.random(len(image)) < config.affine)
    if not len(chosen):
        return image, mask, inside
    grid = F.affine_grid(_matrices(len(chosen), rng), list(image[chosen].shape), align_corners=False)
    image[chosen] = F.grid_sample(image[chosen], grid, padding_mode="reflection", align_corners=False)
    labels = torch.from_numpy(np.stack([mask[chosen], inside[chosen]], axis=1)).float() + 1
    labels = F.grid_sample(labels, grid, mode="nearest", align_corners=False)  # 0 = beyond the window
    warped, within = labels.unbind(1)
    seen = image[chosen].isfinite().any(dim=1)  # absent pixels have grown by a ring
    mask[chosen] = torch.where((within > 0) & seen, warped - 1, IGNORE).numpy().astype(np.uint8)
    inside[chosen] = ((within == 2) & seen).numpy()
    return image, mask, inside


def _matrices(count: int, rng: Generator) -> Tensor:
    angle, scale = rng.uniform(-ROTATION, ROTATION, count), 1 + rng.uniform(-SCALE, SCALE, count)
    shift = rng.uniform(-2 * SHIFT, 2 * SHIFT, (count, 2))  # the grid runs from -1 to 1
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    rows = [np.stack([cos, -sin, shift[:, 0]], axis=1), np.stack([sin, cos, shift[:, 1]], axis=1)]
    return torch.from_numpy(np.stack(rows, axis=1)).float()


def _punch(mask: NDArray[np.uint8], config: TrainConfig, rng: Generator) -> NDArray[np.bool_]:
    """Take a rectangle out of some samples: where, bool (n, y, x); its mask becomes 255."""
    holes, size = np.zeros(mask.shape, bool), mask.shape[-1]
    for i in np.flatnonzero(rng.random(len(mask)) < config.holes):
        height, width = rng.integers(size // 16, size // 3, 2)
        y, x = rng.integers(size - height), rng.integers(size - width)
        holes[i, y : y + height, x : x + width] = True
    mask[holes] = IGNORE
    return holes


def _radiometry(image: NDArray[np.float32], config: TrainConfig, rng: Generator) -> NDArray[np.float32]:
    """Vary brightness, band balance, haze and noise; drop bands; move RGB across the atmosphere's offset."""
    n, bands = image.shape[:2]
    gain = np.exp(_normal(rng, config.jitter, (n, 1)) + _normal(rng, config.jitter / 2, (n, bands)))
    haze = rng.uniform(0, config.jitter / 2, (n, 1)) * (rng.random((n, 1)) < 0.3) * HAZE
    offset = np.asarray(haze, np.float32) + _normal(rng, config.jitter / 20, (n, bands))
    image = image * gain[..., None, None] + offset[..., None, None]
    image += _normal(rng, config.jitter / 50, image.shape)
    given: NDArray[np.bool_] = np.any(np.isfinite(image), axis=(2, 3))
    present = given & _kept(n, config, rng)
    image += _atmosphere(given, present, config, rng)[..., None, None]
    image[~present] = np.nan
    return image


def _normal(rng: Generator, spread: float, shape: tuple[int, ...]) -> NDArray[np.float32]:
    return rng.normal(0, spread, shape).astype(np.float32)


def _kept(n: int, config: TrainConfig, rng: Generator) -> NDArray[np.bool_]:
    """Which bands of which sample stay, (n, band): some lose SWIR, some NIR and SWIR."""
    kept, draw = np.ones((n, len(BANDS)), bool), rng.random(n)
    kept[draw < config.drop_infrared + config.drop_swir, VISIBLE + 1 :] = False
    kept[draw < config.drop_infrared, VISIBLE] = False
    return kept


def _atmosphere(
    given: NDArray[np.bool_], present: NDArray[np.bool_], config: TrainConfig, rng: Generator
) -> NDArray[np.float32]:
    """Offsets (n, band) that blur the line between surface and top-of-atmosphere reflectance on RGB samples.

    Chips that come without infrared are top of atmosphere and lose up to 1.1 of the offset; those that lost
    their infrared here are surface reflectance and gain up to as much. So RGB alone says nothing of the source.
    """
    direction = np.where(given[:, VISIBLE], 1.0, -1.0) * ~present[:, VISIBLE]
    amount = rng.uniform(0, 1.1, len(given)) * (rng.random(len(given)) < config.toa)
    return ((direction * amount)[:, None] * np.array(TOA_OFFSET)).astype(np.float32)
