"""One flat, typed configuration of a training run. Its defaults are the paper's recipe where it gives one."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from minemap.checkpoint import DERIVED
from minemap.errors import InputError
from minemap.sentinel2 import BANDS

SELECTIONS = ("none", "standard", "image", "pixel", "hybrid")  # what is distilled
STRIDE = 32  # of the networks
CHANCES = [
    "smoothing",
    "replay",
    "crops",
    "scatter",
    "affine",
    "absent",
    "holes",
    "blend",
    "drop_swir",
    "drop_infrared",
    "toa",
]
WEIGHTS = ["bce", "dice", "ssim", "boundary", "distill", "attention", "weight_decay", "jitter", "scatter_cell"]
# Reflectance that the atmosphere adds at the top: the gap of the dark objects (5th percentile of pixels that
# are no mine) between mines_rgb (top of atmosphere) and mines6 (surface), for blue, green and red; none beyond.
TOA_OFFSET = (0.0584, 0.0267, 0.0179, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run; the same values give the same weights (CPU, float32)."""

    out: str  # folder of the run: state, metrics, and the checkpoint in `model/`
    data: tuple[str, ...] = ()  # chip files
    name: str = "model"  # name in the recipe
    split: str | None = "train"  # rows of the chip files that are used
    holdout: float = 0.2  # share of them, by block, that chooses epochs and thresholds
    holdout_seed: int = 0  # of the draw of these blocks
    holdout_fold: int = 0  # of the folds that this draw goes through, so that every block is held out in one of them
    rows: str = "all"  # "fine": a drawn share of the blocks (the few-fine regime); "rest": the others
    fine_share: float = 0.15  # of the rows
    fine_seed: int = 0  # of the draw of these blocks
    coarse: str = "none"  # make the labels coarse: "fitted" or "blobs" (training/coarse.py)
    bands: tuple[str, ...] = BANDS  # that the network sees
    derived: tuple[str, ...] = ()  # "ndvi"

    architecture: str = "minec2fnet"  # or minenetcd, fpn, unet, deeplabv3plus, segformer (models/)
    encoder: str | None = None  # one of smp's; None: that of `start` or `teacher`, else the architecture's own
    change_fft: bool = True  # of the change network
    imagenet: bool = False  # start from ImageNet weights
    teacher: str | None = None  # checkpoint that the student starts from and learns from
    start: str | None = None  # checkpoint of the same network that training goes on from
    fresh: bool = False  # the student does not start from its teacher, it only holds the frozen encoder
    gated_fusion: bool = True  # of the student's encoder with the frozen one
    cbam: bool = True  # channel and spatial attention
    refinement: bool = True  # by diffusion
    steps: int = 3  # of the refinement; not given in the paper
    detail: bool = False  # our own head at full resolution

    bce: float = 1.0  # weights of the losses; not given in the paper
    dice: float = 1.0
    ssim: float = 1.0
    boundary: float = 1.0
    smoothing: float = 0.0  # of the labels
    selection: str = "hybrid"  # what is distilled
    distill: float = 1.0  # lambda; not given in the paper
    temperature: float = 2.0  # tau; not given in the paper
    attention: float = 0.0  # weight of LwM's attention distillation
    replay: float = 0.0  # share of the batches that come from the rest, with coarse labels

    epochs: int = 100  # at most
    epoch_samples: int = 0  # samples an epoch; 0 is one pass
    batch: int = 8  # windows
    learning_rate: float = 1e-4  # AdamW's
    weight_decay: float = 1e-4
    warmup: int = 5  # epochs
    schedule: str = "plateau"  # or "cosine"
    patience: int = 3  # epochs without a better validation mIoU until the rate is halved
    stop: int = 10  # epochs without a better one until training stops; 0 never
    keep: str = "best"  # which epoch's weights: "best" on the holdout, or "last" where that is too small to tell
    ema: float = 0.0  # decay of the running average of the weights, 0 off
    clip: float = 1.0  # norm of the gradient
    freeze_norm: bool = False  # keep the batch norms' statistics: batches of few large windows would spoil them

    sizes: tuple[int, ...] = (64,)  # sides of the windows, one drawn for each batch; `batch` holds for the first
    scene: int = 128  # side from which windows are scenes: several small chips, or cut from chips larger than this
    crops: float = 0.5  # of such windows, the share cut from large chips
    scatter: float = 0.2  # and of the others, the share that shows several small chips
    scatter_cell: int = 0  # side of each one's place in it, pixels; 0: half of the window
    affine: float = 0.5  # probability of shift 0.1, scale 0.3, rotation 15 degrees
    absent: float = 0.3  # probability that what lies outside a chip is absent, not reflected
    holes: float = 0.1  # probability of a rectangle that is absent
    jitter: float = 0.1  # spread of the brightness of a sample; bands vary by half of it
    blend: float = 0.0  # probability of a mix of a place's two dates
    drop_swir: float = 0.0  # probability that SWIR is absent
    drop_infrared: float = 0.0  # probability that NIR and SWIR are absent
    toa: float = 0.0  # probability that an RGB sample gets top-of-atmosphere offsets or loses them

    seed: int = 0  # of weights, batches and dropout
    precision: str = "native"  # "bf16" or "fp32"; native: bf16 on a GPU and on processors that multiply it
    device: str = "cpu"  # or "cuda"
    threads: int = 2  # of a processor
    quiet: bool = True  # no progress bar

    def __post_init__(self) -> None:
        if self.precision == "native":
            from minemap.inference import native_precision  # its packages take a second to import

            named = native_precision() if self.device == "cpu" else "bf16"
            object.__setattr__(self, "precision", named)  # the recipe says which it was
        for key, kind in option_types().items():
            if not _is(value := getattr(self, key), kind):
                raise InputError(f"training option {key}={value!r} is no {getattr(kind, '__name__', kind)}")
        for rules in (self._own_rules(), self._rules()):
            for name, (holds, rule) in rules.items():
                if not holds:
                    raise InputError(f"training option {name}={getattr(self, name)!r}: {rule}")

    def _own_rules(self) -> dict[str, tuple[bool, str]]:
        """Option -> whether its number is one that it may have, and which these are."""
        chances = {name: (0 <= getattr(self, name) <= 1, "it is a chance or share, 0 to 1") for name in CHANCES}
        return chances | {name: (getattr(self, name) >= 0, "it is 0 or more") for name in WEIGHTS}

    def _rules(self) -> dict[str, tuple[bool, str]]:
        """Option -> whether its value does, by itself and with the others, and the rule in words."""
        scenes = [size for size in self.sizes if size >= self.scene]
        return {
            "rows": _one_of(self.rows, ("all", "fine", "rest")),
            "coarse": _one_of(self.coarse, ("none", "fitted", "blobs")),
            "selection": _one_of(self.selection, SELECTIONS),
            "keep": _one_of(self.keep, ("best", "last")),
            "schedule": (
                self.schedule == "cosine" or (self.schedule == "plateau" and self.keep == "best"),
                "give cosine, or plateau with keep=best",
            ),
            "precision": _one_of(self.precision, ("bf16", "fp32")),
            "bands": (bool(self.bands) and set(self.bands) <= set(BANDS), f"choose among {', '.join(BANDS)}"),
            "epochs": (self.epochs > 0, "give 1 or more"),
            "batch": (self.batch > 1, "give 2 or more"),
            "holdout": (0 <= self.holdout < 1, "it is a share, 0 or more and below 1"),
            "holdout_fold": (
                self.holdout_fold >= 0 and self.holdout_fold * self.holdout < 1,
                f"with holdout={self.holdout:g} there are fewer folds, counted from 0",
            ),
            "fine_share": (0 < self.fine_share <= 1, "it is a share, above 0"),
            "threads": (self.threads > 0, "give 1 or more"),
            "seed": (self.seed >= 0, "it is 0 or more"),
            "learning_rate": (0 <= self.learning_rate < math.inf, "it is 0 or more"),
            "temperature": (self.temperature > 0, "it is above 0"),
            "warmup": (self.warmup >= 0, "it is 0 or more"),
            "ema": (0 <= self.ema < 1, "it is 0 or more and below 1"),
            "sizes": (
                bool(self.sizes) and all(size > 0 and size % STRIDE == 0 for size in self.sizes),
                f"sides of windows are multiples of {STRIDE}, the networks' stride",
            ),
            "scatter_cell": (
                not any(size % self.cells(size) for size in scenes),
                "a whole number of such cells must fill the windows",
            ),
            "replay": (not self.replay or self.rows == "fine", "it needs rows=fine"),
            "derived": (
                all(set(DERIVED.get(name, "?")) <= set(self.bands) for name in self.derived),
                f"known are {', '.join(DERIVED)}, of bands that are read",
            ),
            "attention": (
                not self.attention or not self.architecture.startswith("mine"),
                "LwM's is of baselines",
            ),
            "blend": (
                not (self.blend and self.architecture == "minenetcd"),
                "it would mix a pair's two orders",
            ),
        }

    def cells(self, size: int) -> int:
        """Small chips along a side of a scene that shows several."""
        return max(2, size // self.scatter_cell) if self.scatter_cell else 2


def _one_of(value: str, known: tuple[str, ...]) -> tuple[bool, str]:
    return value in known, f"choose among {', '.join(known)}"


def _is(value: Any, kind: Any) -> bool:
    """Whether a value is of an option's type; whole numbers are numbers too, truth values are not."""
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is(one, get_args(kind)[0]) for one in value)
    if get_args(kind):
        return any(_is(value, one) for one in get_args(kind))
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def read_values(path: str | Path) -> dict[str, Any]:
    """The options in a JSON file. Raises InputError."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a training configuration: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f'{path} holds no object of training options, as in {{"epochs": 20}}')
    return found


def make_config(values: dict[str, Any]) -> TrainConfig:
    """A configuration from plain values; unknown names are refused."""
    known = {f.name for f in fields(TrainConfig)}
    if unknown := sorted(set(values) - known):
        raise InputError(f"no training option {unknown[0]!r}: choose among {', '.join(sorted(known))}")
    lists: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return TrainConfig(**lists)


def option_types() -> dict[str, Any]:
    """Name -> type of every option."""
    return get_type_hints(TrainConfig)


def as_json(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain values."""
    return asdict(config)
