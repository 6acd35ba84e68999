"""The demo's own checkpoint: `python -m minemap.training.demo_model OUT`, half an hour on one core.

The real network (MineC2FNet, on a small encoder) trained on synthetic scenes of `landscape`, so that the demo
shows the whole way from scenes to a map without the real model having seen anything synthetic. It knows nothing
of the real world. Its seeds start at 100: scenes of other seeds are unseen.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import nn

from minemap.checkpoint import Checkpoint, Recipe, save
from minemap.compositing import Rule, composite_looks
from minemap.demo import DemoConfig, observe, plan_looks
from minemap.errors import exit_status
from minemap.inference import keep_freed_memory, native_precision
from minemap.landscape import make_landscape
from minemap.models.fill import fill_absent
from minemap.models.minec2fnet import MineC2FNet, teacher_network
from minemap.sentinel2 import BANDS
from minemap.tiles import Layout, run_windows
from minemap.training.loop import check_device
from minemap.training.losses import IGNORE, LossWeights, student_loss

NAME = "demo-2026"
OPTIONS: dict[str, Any] = {"in_channels": len(BANDS), "encoder": "tu-regnetx_002", "group_width": 8, "pyramid": 128}
TRAINING_SEEDS, HELD_OUT_SEEDS = range(100, 136), range(150, 154)
SIZES = (1024, 512, 1024, 256)  # of the scenes, in turn, pixels
SMALL_SEEDS, SMALL_SIZES = range(200, 260), (256, 256, 512)  # more of those whose mines are small
RATE = 1e-3


@dataclass(frozen=True)
class Stage:
    """One cosine of AdamW. side: of the windows, pixels; a map's are 320 (256 from one to the next, 64 shared)."""

    name: str
    steps: int
    batch: int
    side: int
    rate: float


TEACHER = Stage("teacher", 500, 8, 192, RATE)
STUDENT = Stage("student", 450, 8, 192, RATE / 2)
WHOLE = Stage("student, whole windows", 100, 3, 320, RATE / 10)
SMALL = Stage("student, small scenes", 160, 8, 192, RATE / 4)
LAST = Stage("student, small scenes again", 640, 8, 192, RATE / 4)


@dataclass(frozen=True)
class Scene:
    """A composite as a map sees it, float16 (band, y, x), NaN not observed; mask uint8 (y, x), 255 there."""

    image: NDArray[np.float16]
    mask: NDArray[np.uint8]


def make_scenes(seeds: range, sizes: tuple[int, ...]) -> list[Scene]:
    """A scene for each seed, the sizes in turn."""
    return [make_scene(seed, sizes[i % len(sizes)]) for i, seed in enumerate(seeds)]


def make_scene(seed: int, size: int) -> Scene:
    """The composite of a year, drawn from the seed along with how many looks it has and how clouded they are."""
    rng = np.random.default_rng(seed)
    year, south = int(rng.integers(2016, 2027)), bool(rng.random() < 0.5)
    config = DemoConfig(
        seed,
        (year,),
        lat=-6.25 if south else 6.25,
        size=size,
        scenes_per_year=int(rng.integers(5, 10)),
        cloud=float(rng.uniform(0.1, 0.35)),
    )
    land = make_landscape(seed, config.shape, mine_share=float(rng.uniform(0.03, 0.08)))
    surface = land.surface(year)
    seen = [observe(land, surface, look) for look in plan_looks(config, year)]
    scl = np.stack([look.scl.repeat(2, 0).repeat(2, 1) for look in seen])
    bands = [np.stack([_as_read(look.numbers[b], b) for look in seen]) for b in range(len(BANDS))]
    image, _ = composite_looks(lambda b: bands[b], [True] * len(bands), scl, np.arange(len(seen)), Rule())
    mask = np.where(np.isnan(image[0]), np.uint8(IGNORE), land.truth(year))
    return Scene(image.astype(np.float16), mask)


def _as_read(numbers: NDArray[np.int16], band: int) -> NDArray[np.uint16]:
    """Stored numbers (y, x) as the reader gives them at 10 m: the last two bands by way of 20 m, bilinear."""
    stored = np.maximum(numbers, 1).astype(np.float32)
    if band >= 4:
        height, width = stored.shape
        coarse = stored.reshape(height // 2, 2, width // 2, 2).mean((1, 3))
        stored = ndimage.zoom(coarse, 2, order=1, mode="nearest", grid_mode=True)
    return np.rint(stored).astype(np.uint16)


def window_of(scene: Scene, side: int, rng: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """A window anywhere in or over the edge of a scene, turned, a little brighter or darker, sometimes holed."""
    y, x = _corner(scene.mask, side, rng)
    image = np.full((len(BANDS), side, side), np.nan, np.float32)
    mask = np.full((side, side), IGNORE, np.uint8)
    rows, columns = (slice(max(c, 0), max(c + side, 0)) for c in (y, x))
    part = scene.image[:, rows, columns]
    into = slice(max(-y, 0), max(-y, 0) + part.shape[1]), slice(max(-x, 0), max(-x, 0) + part.shape[2])
    image[(slice(None), *into)], mask[into] = part, scene.mask[rows, columns]
    if rng.random() < 0.15:
        hole = tuple(slice(a, a + int(rng.integers(20, side // 2))) for a in rng.integers(0, side, 2))
        image[(slice(None), *hole)], mask[hole] = np.nan, IGNORE
    image *= np.exp(rng.normal(0, 0.05) + rng.normal(0, 0.025, (len(BANDS), 1, 1))).astype(np.float32)
    turns, flip = int(rng.integers(4)), 1 if rng.random() < 0.5 else -1
    return np.rot90(image, turns, (1, 2))[:, ::flip], np.rot90(mask, turns)[::flip]


def _corner(mask: NDArray[np.uint8], side: int, rng: np.random.Generator) -> tuple[int, int]:
    """Upper left corner of a window: half of them hold a mine, the others lie anywhere."""
    mines = np.argwhere(mask[::8, ::8] == 1) * 8
    if len(mines) and rng.random() < 0.5:
        corner = mines[rng.integers(len(mines))] - rng.integers(0, side, 2)
    else:
        corner = rng.integers(-side // 2, np.maximum(np.array(mask.shape) - side // 2, 1))
    return int(corner[0]), int(corner[1])


def make_recipe(scenes: list[Scene]) -> Recipe:
    pixels = np.concatenate([s.image[:, ::7, ::7].reshape(len(BANDS), -1) for s in scenes], 1).astype(np.float32)
    return Recipe(
        name=NAME,
        architecture="minec2fnet",
        options=OPTIONS,
        bands=BANDS,
        mean=tuple(round(float(v), 5) for v in np.nanmean(pixels, 1)),
        std=tuple(round(float(v), 5) for v in np.nanstd(pixels, 1)),
        threshold=0.5,
        threshold_rule="fixed",
        training={
            "about": "for the synthetic scenes of `minemap demo` only, of no use on real imagery",
            "data": "synthetic scenes of minemap.landscape",
            "seeds": [[seeds.start, seeds.stop - 1] for seeds in (TRAINING_SEEDS, SMALL_SEEDS)],
            "imagenet": False,
            "stages": [asdict(stage) for stage in (TEACHER, STUDENT, WHOLE, SMALL, LAST)],
        },
    )


def fit(network: nn.Module, scenes: list[Scene], recipe: Recipe, stage: Stage, device: str = "cpu") -> None:
    """One stage of training over random windows of the scenes, larger scenes more often."""
    rng = np.random.default_rng(stage.steps)
    sizes = np.array([s.mask.size for s in scenes], float) ** 0.5
    optimiser = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=stage.rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, stage.rate, total_steps=stage.steps, pct_start=0.1)
    network.to(memory_format=torch.channels_last).train()
    for step in range(stage.steps):
        chosen = rng.choice(len(scenes), stage.batch, p=sizes / sizes.sum())
        images, masks = zip(*(window_of(scenes[i], stage.side, rng) for i in chosen), strict=True)
        x = fill_absent(recipe.normalise(torch.from_numpy(np.stack(images))))
        x = x.to(device, memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=device == "cpu" and native_precision() == "bf16"):
            logits = network(x)
        loss = student_loss(logits, torch.from_numpy(np.stack(masks))[:, None].to(device), LossWeights())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 50 == 49:
            print(f"{stage.name} {step + 1}/{stage.steps} loss {loss.item():.3f}", flush=True)


def intersection_over_union(network: nn.Module, recipe: Recipe, scene: Scene) -> float:
    """IoU of mine over a whole scene, mapped window by window as a map is; NaN where no mine was observed."""
    layout = Layout(recipe.window, recipe.halo, batch=4)
    spare = [-n % layout.window + layout.margin for n in scene.mask.shape]
    padding = [(0, 0), *((layout.margin, after) for after in spare)]
    image = np.pad(scene.image.astype(np.float32), padding, constant_values=np.nan)

    def probability(windows: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return torch.sigmoid(network(recipe.normalise(torch.from_numpy(windows))))[:, 0].numpy()

    found = run_windows(image, probability, layout)[: scene.mask.shape[0], : scene.mask.shape[1]]
    mine, known = found >= recipe.threshold, scene.mask != IGNORE
    truth = scene.mask == 1
    either = ((mine | truth) & known).sum()
    return float((mine & truth & known).sum() / either) if either else float("nan")


def train(out: Path, device: str = "cpu") -> Checkpoint:
    """Teacher, then the student that starts from it, then the scores on scenes that neither saw.

    device: "cpu" or "cuda", of the training alone.
    """
    check_device(device)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # small layers: a second thread mostly waits
    keep_freed_memory(2**30, 2**31 - 1)
    scenes = make_scenes(TRAINING_SEEDS, SIZES)
    recipe = make_recipe(scenes)
    teacher = teacher_network(len(BANDS), encoder=OPTIONS["encoder"], pyramid=OPTIONS["pyramid"]).to(device)
    fit(teacher, scenes, recipe, TEACHER, device)
    student = MineC2FNet(**OPTIONS).start_from(teacher).to(device)
    for stage in (STUDENT, WHOLE):
        fit(student, scenes, recipe, stage, device)
    scenes += make_scenes(SMALL_SEEDS, SMALL_SIZES)
    for stage in (SMALL, LAST):
        fit(student, scenes, recipe, stage, device)
    student.cpu()
    return save(out, student, replace(recipe, metrics=judge(save(out, student, recipe))))


def judge(checkpoint: Checkpoint) -> dict[str, Any]:
    """IoU of mine, per cent, by seed and size of scenes that training did not see."""
    network, found = checkpoint.network(), {}
    for seed in HELD_OUT_SEEDS:
        for size in sorted(set(SIZES)):
            iou = intersection_over_union(network, checkpoint.recipe, make_scene(seed, size))
            if np.isfinite(iou):
                found[f"seed {seed}, {size} px"] = round(100 * iou, 1)
    print(found)
    return {"mine_iou": round(float(np.mean(list(found.values()))), 1), "mine_iou_by_scene": found}


def main(arguments: list[str] | None = None) -> None:
    """Train the demo's model on synthetic scenes."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("out", type=Path, help="folder of the checkpoint")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    args = parser.parse_args(arguments)
    train(args.out, args.device)


if __name__ == "__main__":
    sys.exit(exit_status(main))
