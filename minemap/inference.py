"""An image and a checkpoint to the probability of mine.

Results depend on the checkpoint, the pixels and the precision alone: a call always sees a full batch of windows
that lie on the zone's lattice, and runs on one thread (a second core runs a second batch), so the number of cores
or workers changes nothing.
"""

from __future__ import annotations

import ctypes
import os
import platform
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from .checkpoint import Checkpoint, load_same
from .errors import InputError, TooLittleMemoryError
from .sentinel2 import BANDS
from .tiles import Layout, run_windows
from .water import settle_open_water

ON_LATTICE = 1e-3  # pixels
NOT_OBSERVED = 255  # in per cent maps
PRECISIONS = ("bf16", "fp32")
_LOADING = threading.Lock()  # lru_cache would let two threads load the network at once
# Windows a call: 4 on a processor are no faster and take 270 MB more a stream; 3 x 27 are a super-tile of 2,048 px
BATCH = {"cpu": 2, "cuda": 27}
ON_GPU = 4  # threads, each with a batch: one is copied while another is computed


@dataclass(frozen=True)
class Settings:
    """How the network is run. precision: part of a result's identity. streams: threads, each with a batch of its own.
    resolution: metres of the image's pixels, None for those that the network was trained on."""

    precision: str = "fp32"
    streams: int = 1
    resolution: float | None = None

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise InputError(f"unknown precision {self.precision!r}: give one of {', '.join(PRECISIONS)}")

    @staticmethod
    def for_machine(precision: str | None = None, workers: int = 1, resolution: float | None = None) -> Settings:
        """bf16 where the processor has the instructions (it is slower where not), else fp32, unless asked."""
        return Settings(precision or native_precision(), max(1, cores() // workers), resolution)


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def native_precision() -> str:
    """bf16 where the processor's flags say that it multiplies bfloat16, else fp32."""
    flags = Path("/proc/cpuinfo")
    if platform.system() == "Linux" and flags.exists():
        words = set(flags.read_text().split())
        return "bf16" if words & {"avx512_bf16", "amx_bf16", "bf16"} else "fp32"
    return "fp32"


def layout(checkpoint: Checkpoint) -> Layout:
    """The windows that a checkpoint was made for, and the batch for this machine's device."""
    recipe = checkpoint.recipe
    return Layout(recipe.window, recipe.halo, BATCH[device()])


@lru_cache(maxsize=1)
def device() -> str:
    """ "cuda" where torch finds a GPU, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def predict(image: xr.DataArray, checkpoint: Checkpoint, *, precision: str | None = None) -> xr.DataArray:
    """Lazy probability of mine in per cent, uint8 (y, x), 255 = not observed: a map's pixels.

    image: reflectance float32 (band, y, x) on a zone's lattice (coordinates x, y: pixel centres in metres, y
    descending; band: names), NaN where not observed, dask or numpy. A band that the checkpoint wants and the image
    lacks counts as absent. Windows are centred on multiples of 256 px of the zone; what lies outside the image
    counts as not observed, so a pixel is the map's where all windows that show it lie inside: from 320 px off the
    image's edge on for certain, from 160 px off an edge that lies on a multiple of 256 px.
    """
    _check_image(image, checkpoint)
    settings = Settings.for_machine(precision, resolution=_step(image))
    size, margin = checkpoint.recipe.window, layout(checkpoint).margin
    wanted = image.reindex(band=list(checkpoint.recipe.bands)).transpose("band", "y", "x")
    before, after = _margins(wanted, size)
    padding = {"y": (before[0], after[0]), "x": (before[1], after[1])}
    whole = wanted.drop_vars([*wanted.coords]).pad(padding, constant_values=np.nan)
    shape = whole.sizes["y"], whole.sizes["x"]
    chunks = {"y": _whole_windows(wanted, "y", size), "x": _whole_windows(wanted, "x", size)}
    overlapped, template = _overlapped(whole.chunk({"band": -1, **chunks}), margin)
    answer = xr.map_blocks(_percent_block, overlapped, [checkpoint, settings], template=template)
    trimmed = answer[before[0] : shape[0] - after[0], before[1] : shape[1] - after[1]]
    kept = {name: image.coords[name] for name in ("y", "x", "spatial_ref") if name in image.coords}
    attrs = {"long_name": "probability of mine", "units": "percent", "model": checkpoint.recipe.name}
    return trimmed.assign_coords(kept).assign_attrs(attrs).rename("probability")


def _check_image(image: xr.DataArray, checkpoint: Checkpoint) -> None:
    """Raises InputError for what `predict` can't answer."""
    if not isinstance(checkpoint, Checkpoint):
        raise InputError(f"checkpoint is a {type(checkpoint).__name__}: give what load_model returns")
    one_date(checkpoint)
    if sorted(map(str, image.dims)) != ["band", "x", "y"]:
        raise InputError(f"image has dimensions {', '.join(map(str, image.dims))}: it needs band, y and x")
    if "band" not in image.coords:
        raise InputError(f"image has no names of its bands: give it a coordinate band, of {', '.join(BANDS)}")
    names, wanted = image["band"].values.tolist(), checkpoint.recipe.bands
    if len(set(names)) < len(names) or not set(names) & set(wanted):
        raise InputError(f"image has bands {', '.join(map(str, names))}: name them once each, of {', '.join(wanted)}")
    if not np.issubdtype(image.dtype, np.floating):
        raise InputError(f"image is {image.dtype}: give reflectance as floats, 0 to 1, NaN where not observed")
    if min(image.sizes["y"], image.sizes["x"]) < 2:
        raise InputError(f"image is {image.sizes['y']} x {image.sizes['x']} px: it needs two rows and columns")


def one_date(checkpoint: Checkpoint) -> None:
    """Raises InputError for a network that compares two dates."""
    if checkpoint.recipe.dates != 1:
        raise InputError(f"model {checkpoint.recipe.name} compares two dates: it is for minemap change, not for maps")


def _margins(image: xr.DataArray, size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Pixels to add (top, left), (bottom, right) so that the image starts and ends on the lattice of windows."""
    y, x, step = image["y"].values, image["x"].values, _step(image)
    rows, columns = -(y / step + 0.5), x / step - 0.5  # of the zone's lattice
    first = round(rows[0]), round(columns[0])
    off = max(np.abs(n - (start + np.arange(len(n)))).max() for n, start in zip((rows, columns), first, strict=True))
    if step < 1 or off > ON_LATTICE:
        raise InputError(
            f"image from x {x[0]:.10g}, y {y[0]:.10g} in steps of {step:g} is off the zone's lattice: coordinates "
            f"are centres of pixels in the metres of a UTM zone, half a pixel off multiples of {step:g}, y descending"
        )
    before = first[0] % size, first[1] % size
    return before, (-(before[0] + len(y)) % size, -(before[1] + len(x)) % size)


def _step(image: xr.DataArray) -> float:
    """Metres between pixels."""
    return abs(float(image["x"][1] - image["x"][0]))


def _whole_windows(image: xr.DataArray, dim: str, size: int) -> int:
    """A chunk side near the image's own that holds whole windows."""
    own = max(image.chunksizes.get(dim, (image.sizes[dim],)))
    return max(size, min(own, 8 * size) // size * size)


def _overlapped(image: xr.DataArray, margin: int) -> tuple[xr.DataArray, xr.DataArray]:
    """The image with `margin` shared pixels around each chunk, and what comes out of its chunks.

    HACK for pydata/xarray#3147 (xarray has no map_overlap): dask makes the overlap, xarray maps over the blocks.
    """
    import dask.array as da

    depth = {1: margin, 2: margin}
    shared = da.overlap.overlap(image.data, depth={0: 0, **depth}, boundary={0: "none", 1: np.nan, 2: np.nan})
    blocks = da.zeros(image.shape[1:], chunks=image.data.chunks[1:], dtype=np.uint8)
    return xr.DataArray(shared, dims=image.dims), xr.DataArray(blocks, dims=("y", "x"))


def _percent_block(image: xr.DataArray, checkpoint: Checkpoint, settings: Settings) -> xr.DataArray:
    if not image.size:  # xarray tries a function on nothing
        return xr.DataArray(np.zeros((0, 0), np.uint8), dims=("y", "x"))
    return xr.DataArray(percent(probability(image.values, checkpoint, settings)), dims=("y", "x"))


def percent(probability: np.ndarray) -> np.ndarray:
    """Probability 0-1 with NaN to whole per cent, uint8 with 255."""
    rounded = np.rint(np.nan_to_num(probability) * 100).astype(np.uint8)
    return np.where(np.isnan(probability), np.uint8(NOT_OBSERVED), rounded)


def mine_from(threshold: float) -> int:
    """The whole per cent from which a pixel counts as mine, for a threshold of 0-1."""
    return int(np.ceil(threshold * 100 - 1e-9))


def check_threshold(threshold: float) -> float:
    """A threshold as it is; InputError when it is no probability."""
    if not 0 <= threshold <= 1:
        raise InputError(f"threshold {threshold} is a probability, 0 to 1")
    return threshold


def probability(image: np.ndarray, checkpoint: Checkpoint, settings: Settings) -> np.ndarray:
    """Probability of mine, float32 (y, x), NaN where not observed, of an image with its margin.

    image: float32 (band, y + 2 margin, x + 2 margin), bands in the checkpoint's order, y and x multiples of 256
    (tiles.Layout). For a network of two dates: the bands of both, and the answer is `signed`, NaN where neither is
    observed.
    One image at a time in a process: the network is behind a lock.
    """
    return probability_and_batch(image, checkpoint, settings)[0]


def probability_and_batch(image: np.ndarray, checkpoint: Checkpoint, settings: Settings) -> tuple[np.ndarray, int]:
    """`probability`, and the windows a call that fitted into memory: fewer than usual change last digits."""
    with _LOADING:
        runner = _runner(checkpoint.path, checkpoint.sha256, settings)
    with runner.lock:
        answer = run_windows(image, runner, layout(checkpoint), runner.pool.map, runner.empty)
        return_freed_memory()
        return answer, runner.batch


@lru_cache(maxsize=2)
def _runner(path: Path, sha256: str, settings: Settings) -> Runner:
    """One a process: what travels with a task is the checkpoint's path and hash, never its weights."""
    return Runner(load_same(path, sha256), settings)


class Runner:
    """A checkpoint's network on this process's device: windows of reflectance to probabilities."""

    def __init__(self, checkpoint: Checkpoint, settings: Settings) -> None:
        import torch

        from .models.folding import for_inference

        keep_freed_memory()
        self.recipe, self.settings, self.device = checkpoint.recipe, settings, device()
        self.lock = threading.Lock()
        self.batch = BATCH[self.device]
        self.bf16 = settings.precision == "bf16"
        network = for_inference(checkpoint.network(), bf16=self.bf16).to(self.device)
        self.network = network.to(memory_format=torch.channels_last)
        self.forward: Any = self.network.both_ways if self.recipe.dates == 2 else self.network
        threads = settings.streams if self.device == "cpu" else ON_GPU
        self.pool = ThreadPoolExecutor(threads, "network", self._start_thread)
        if self.device == "cuda":
            torch.cuda.synchronize()  # the threads' streams don't wait for what the usual one has begun

    def _start_thread(self) -> None:
        """One core, and on a GPU a stream of its own; more threads start late, cuDNN plans anew in each."""
        import torch

        torch.set_num_threads(1)
        if self.device == "cuda":
            torch.cuda.set_stream(torch.cuda.Stream())

    def __call__(self, windows: np.ndarray) -> np.ndarray:
        """Answers for one batch. Where memory runs out the batch is halved, and stays so."""
        size = self.batch
        try:
            parts = [self._answer(windows[i : i + size]) for i in range(0, len(windows), size)]
            return np.concatenate(parts)
        except Exception as error:
            if not out_of_memory(error):
                raise
            if size == 1:
                raise TooLittleMemoryError(
                    f"not even one window of {windows.shape[-1]} px fits into memory ({self.device}): start fewer "
                    "workers, or give them more memory"
                ) from error
        # After the exception is gone, and with it the tensors that its frames held
        self.batch = min(self.batch, size // 2)
        if self.device == "cuda":
            import torch

            torch.cuda.empty_cache()
        return self(windows)

    def empty(self, shape: tuple[int, ...], dtype: type[np.float32]) -> np.ndarray:
        """As np.empty, but a GPU can copy it by itself; torch keeps such memory for the next array."""
        import torch

        if self.device == "cpu":
            return np.empty(shape, dtype)
        return torch.empty(shape, pin_memory=True).numpy()

    def _answer(self, windows: np.ndarray) -> np.ndarray:
        import torch

        with torch.inference_mode(), torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            given = torch.from_numpy(windows).to(self.device, non_blocking=True)
            x = self.recipe.normalise(given.unflatten(1, (self.recipe.dates, -1))).flatten(1, 2)
            x = x.contiguous(memory_format=torch.channels_last)
            chance = torch.sigmoid(self.forward(x).float()).cpu().numpy()
        if self.recipe.dates > 1:
            return signed(chance)
        resolution = self.settings.resolution or self.recipe.resolution
        return settle_open_water(windows, chance[:, 0], bands=self.recipe.bands, resolution=resolution)


def signed(chance: np.ndarray) -> np.ndarray:
    """Probabilities of gain and loss (N, 2, y, x) as one (N, y, x): the larger one, loss below zero."""
    gain, loss = chance[:, 0], chance[:, 1]
    return np.where(gain >= loss, gain, -loss)


def keep_freed_memory(block: int = 2**26, kept: int = 2**28) -> None:
    """Let glibc keep what torch frees instead of returning it: page faults halve the speed on a CPU otherwise.

    block: bytes; larger ones (the looks of a composite) still go back to the system at once. kept: bytes in all.
    Threads share two heaps: with eight a core, as glibc has them, what each keeps adds up to a fifth of our peak.
    `return_freed_memory` gives it back, once an image is done.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-8, 2)  # M_ARENA_MAX
        mallopt(-3, block)  # M_MMAP_THRESHOLD
        mallopt(-1, kept)  # M_TRIM_THRESHOLD


def return_freed_memory() -> None:
    """Give what glibc kept back to the system. Costs nothing once an image, and too much after each batch."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def out_of_memory(error: BaseException) -> bool:
    """Whether torch (on a GPU or the processor) or numpy had no memory left."""
    import torch

    told = ("can't allocate memory", "not enough memory", "out of memory")
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or (isinstance(error, RuntimeError) and any(words in str(error) for words in told))
