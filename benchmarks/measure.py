"""What is measured. Each benchmark yields lines; ratios compare two things of the same run."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROUNDS = 3


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def alternating(*actions: Callable[[], object], rounds: int = ROUNDS) -> list[float]:
    """Median seconds of each action, run in turn so that noise disturbs all alike; a first round warms up."""
    for action in actions:
        action()
    times = [[seconds(action) for action in actions] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def _image(windows: int = 4) -> np.ndarray:
    """Reflectance of land, float32 (band, y, x), with noise; no water."""
    from minemap.checkpoint import load_model

    side, mean = 256 * windows + 64, np.array(load_model().recipe.mean, np.float32)
    noise = np.random.default_rng(0).standard_normal((6, side, side), np.float32)
    return np.clip(mean[:, None, None] + 0.02 * noise, 0.001, 1)


def _against_bare(device: str, batches: tuple[int, ...], windows: int) -> Iterator[str]:
    """probability() against the network called in a plain loop over windows that are in the device's memory."""
    import torch

    from minemap.checkpoint import load_model
    from minemap.inference import Settings, layout, probability

    model, image = load_model(), _image(windows)
    settings = Settings.for_machine("bf16" if device == "cuda" else None)
    network = model.network().to(device).to(memory_format=torch.channels_last)
    stack = np.stack([image[:, *window] for window in layout(model).windows(image.shape[1:])])
    tensors = model.recipe.normalise(torch.from_numpy(stack).to(device))

    def bare(batch: int) -> None:
        torch.set_num_threads(settings.streams)
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=settings.precision == "bf16"):
            for start in range(0, len(tensors), batch):
                answer = network(tensors[start : start + batch].contiguous(memory_format=torch.channels_last))
            answer.float().cpu()  # waits for the device

    def loop(batch: int) -> Callable[[], None]:
        return lambda: bare(batch)

    ours, *theirs = alternating(lambda: probability(image, model, settings), *(loop(b) for b in batches))
    best, count = min(theirs), windows**2
    yield f"ours {ours / count * 1e3:.1f} ms a window, bare {best / count * 1e3:.1f} ms: ratio {best / ours:.2f}"
    yield f"{count / ours:.0f} against {count / best:.0f} windows a second"


def predict_against_bare() -> Iterator[str]:
    """probability() against the bare network loop at its best setting, same 320-px windows (at least 0.90)."""
    yield from _against_bare("cpu", (2, 4, 8), 4)


def gpu() -> Iterator[str]:
    """The same on a GPU (at least 0.85)."""
    import torch

    if not torch.cuda.is_available():
        yield "there is no GPU here: not measured"
        return
    yield torch.cuda.get_device_name()
    yield from _against_bare("cuda", (32, 64, 128), 16)


def predict_against_naive() -> Iterator[str]:
    """probability() against fp32, batch 1, one window at a time (at least 3 times as fast)."""
    import torch

    from minemap.checkpoint import load_model
    from minemap.inference import Settings, layout, probability

    model, settings, image = load_model(), Settings.for_machine(), _image()
    network = model.network()
    torch.set_num_threads(settings.streams)

    def naive() -> None:
        with torch.inference_mode():
            for window in layout(model).windows(image.shape[1:]):
                network(model.recipe.normalise(torch.from_numpy(image[None, :, *window])))

    ours, theirs = alternating(lambda: probability(image, model, settings), naive, rounds=2)
    yield f"ours {ours:.2f} s, naive {theirs:.2f} s for 16 windows: {theirs / ours:.1f} times as fast"


def composite_against_numpy() -> Iterator[str]:
    """The median of clear looks against numpy's nanmedian, 24 looks, six bands (at least 10 times as fast)."""
    from minemap.compositing import Rule, composite_looks

    rng, shape = np.random.default_rng(0), (24, 256, 256)
    scl = np.where(rng.random(shape) < 0.3, 9, 4).astype(np.uint8)
    bands = rng.integers(1, 10_000, (6, *shape), dtype=np.uint16)
    rule = Rule(min_clear=1, rescue=False)

    def theirs() -> np.ndarray:
        return np.nanmedian(np.where(scl == 9, np.nan, bands * np.float32(1e-4)), axis=1)

    def ours() -> np.ndarray:
        return composite_looks(lambda b: bands[b], [True] * 6, scl, np.arange(24), rule)[0]

    np.testing.assert_allclose(ours(), theirs(), rtol=1e-5)
    quick, slow = (t / bands[:, 0].size * 1e9 for t in alternating(ours, theirs))
    yield f"ours {quick:.0f} ns a pixel and band, numpy {slow:.0f}: {slow / quick:.1f} times as fast"


def _scene(folder: Path, size: int, scenes: int) -> Path:
    from minemap.demo import DemoConfig, make_demo

    config = DemoConfig(seed=1, size=size, years=(2023,), scenes_per_year=scenes)
    scene = make_demo(folder, config)
    (folder / "bbox.json").write_text(json.dumps(scene.bbox))
    return scene.items


def whole_map_against_stages() -> Iterator[str]:
    """CPU seconds of a whole map against the sum of its bare stages (at most 1.25)."""
    from minemap import mapping
    from minemap.checkpoint import load_model
    from minemap.inference import layout, percent, probability
    from minemap.planning import plan
    from minemap.running import run_tiles
    from minemap.store import Store
    from minemap.supertile import read_image

    def cpu(action: Callable[[], object]) -> float:
        before = time.process_time()
        action()
        return time.process_time() - before

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        items = _scene(folder / "scene", 2048, 12)
        bbox = json.loads((folder / "scene" / "bbox.json").read_text())
        planned = plan(bbox, "2023", folder / "a.zarr", stac=items)
        store = Store(folder / "a.zarr")
        job = mapping._job(planned, store, mapping._prepare(planned, store), 1)
        settings = job.settings(planned.sensor.resolution)
        probability(_image(), load_model(), settings)  # weights loaded, kernels chosen
        whole = cpu(lambda: run_tiles(planned.work, job, None, None))
        images: list[tuple[np.ndarray, np.ndarray]] = []
        margin = layout(job.checkpoint).margin
        read = cpu(lambda: images.extend(read_image(w.inner, margin, job.reading)[:2] for w in planned.work))
        answers: list[np.ndarray] = []
        network = cpu(lambda: answers.extend(probability(image, job.checkpoint, settings) for image, _ in images))
        pairs = list(zip(planned.work, answers, strict=True))

        def write_all() -> None:
            for w, answer in pairs:
                store.write_tile(w.inner, 0, {"probability": percent(answer)})

        write = cpu(write_all)
    total = read + network + write
    yield f"read and composite {read:.1f}, network {network:.1f}, write {write:.2f} CPU seconds"
    yield f"whole map {whole:.1f}, sum of stages {total:.1f}: ratio {whole / total:.2f}"


# The high-water mark of the address space: that of getrusage would count what the process that started it had
PEAK = """
import json, pathlib, sys
from minemap import map_area
items, bbox, out, chunk = sys.argv[1:]
map_area(json.loads(bbox), "2023", out, stac=items, chunk=int(chunk), max_cloud=100)
(line,) = [line for line in pathlib.Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
print(line.split()[1])
"""


def _peak(items: Path, bbox: list[float], out: Path, chunk: int) -> float:
    """Peak resident memory, MiB, of a process that makes one map."""
    words = [sys.executable, "-c", PEAK, str(items), json.dumps(bbox), str(out), str(chunk)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) / 1024


def _memory(chunk: int, side: int, cases: tuple[tuple[int, tuple[int, ...]], ...]) -> Iterator[str]:
    """Peaks for (dates, numbers of super-tiles) in a scene of side × side super-tiles."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for dates, areas in cases:
            items = _scene(folder / f"scene{dates}", chunk * side, dates)
            west, south, east, north = json.loads((folder / f"scene{dates}" / "bbox.json").read_text())
            for tiles in areas:
                share = tiles**0.5 / side * 0.9
                middle = ((west + east) / 2, (south + north) / 2)
                half = ((east - west) / 2 * share, (north - south) / 2 * share)
                bbox = [middle[0] - half[0], middle[1] - half[1], middle[0] + half[0], middle[1] + half[1]]
                peak = _peak(items, bbox, folder / f"{dates}-{tiles}.zarr", chunk)
                yield f"{dates} dates, about {tiles} super-tiles of {chunk} px: {peak:.0f} MiB"


def memory() -> Iterator[str]:
    """Peak memory of a process against area (1, 4, 16 super-tiles of 512 px) and dates (6, 24)."""
    yield from _memory(512, 4, ((6, (1, 4, 16)), (24, (16,))))


def memory_default() -> Iterator[str]:
    """The same with the default super-tiles of 2,048 px (under 3 GiB)."""
    yield from _memory(2048, 2, ((6, (1, 4)), (24, (4,))))


@dataclass(frozen=True)
class NullJob:
    """Super-tiles of nothing: the record is read and written, and that is all."""

    store: Any
    period: Any
    counted: tuple[str, ...] = ("computed",)

    def make(self, work: Any) -> dict[str, float]:
        if self.store.record(work.tile, self.period) is None:
            self.store.write_record(work.tile, self.period, {"windows": work.windows})
        return {"computed": 1.0}


def _resident() -> float:
    import psutil

    return psutil.Process().memory_info().rss / 2**20


def scheduler(tiles: int = 10_000) -> Iterator[str]:
    """Graph of 10,000 super-tiles (at most 5 tasks, 50 kB each), run with nothing to do (at most 20 ms each)."""
    from distributed import Client, LocalCluster
    from distributed.protocol.pickle import dumps

    from minemap.grid import Grid
    from minemap.running import graph
    from minemap.scenes import parse_period
    from minemap.store import Store
    from minemap.supertile import Work

    lattice = Grid(32720, 0.0, 10_000_000.0, 100 * 2048, -(-tiles // 100) * 2048)
    work = [Work(tile, (0, 8, 0, 8)) for tile in lattice.tiles(2048)][:tiles]
    with tempfile.TemporaryDirectory() as name:
        job = NullJob(Store(Path(name) / "null.zarr"), parse_period("2023"))
        start = time.process_time()
        lazy = graph(work, job)
        made = dict(lazy.__dask_graph__())
        spent = time.process_time() - start
        size = len(dumps(made)) / len(work)
        ms = spent / len(work) * 1e3
        yield f"{len(made) / len(work):.1f} tasks, {size / 1e3:.1f} kB, {ms:.2f} ms to make a super-tile's graph"
        with (
            LocalCluster(n_workers=2, threads_per_worker=2, dashboard_address=":0", silence_logs=50) as cluster,
            Client(cluster) as client,
            client.as_current(),
        ):
            lazy[:100].compute()
            before = _resident(), max(client.run(_resident).values())
            start = time.process_time()
            done = graph(work, job).compute()
            spent = time.process_time() - start
            after = _resident(), max(client.run(_resident).values())
            again = graph(work, job).compute()
            last = _resident(), max(client.run(_resident).values())
    assert done.shape == again.shape == (tiles, 1) and bool((done[:, 0] == 1).all())
    yield f"{spent / tiles * 1e3:.1f} ms CPU of scheduler and client a super-tile, {tiles} super-tiles, 2 workers"
    told = "; ".join(f"{a:.0f}, then {b:.0f}, then {c:.0f}" for a, b, c in zip(before, after, last, strict=True))
    yield f"MiB of scheduler and client before, after {tiles}, after {2 * tiles}; of a worker: {told}"


def _one_reader() -> None:
    """On a worker: one read at a time, so that a worker uses one core."""

    from minemap import supertile

    supertile.READ_THREADS = 1


def scaling(size: int = 2048, rounds: int = 5) -> Iterator[str]:
    """1 against 2 single-thread workers, each reading and computing in turn (at least 1.7 times as fast)."""
    from distributed import Client, LocalCluster

    from minemap import mapping, planning, running
    from minemap.inference import cores
    from minemap.store import Store

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        items = _scene(folder / "scene", size, 6)
        bbox = json.loads((folder / "scene" / "bbox.json").read_text())
        numbers = iter(range(1000))

        def fresh(client: Any) -> Callable[[], None]:
            def run() -> None:
                out = folder / f"{next(numbers)}.zarr"
                made = planning.plan(bbox, "2023", out, stac=items, chunk=512)
                store = Store(out)
                job = mapping._job(made, store, mapping._prepare(made, store), cores())
                running._compute(made.work, job, client)

            return run

        def started(workers: int) -> Any:
            return LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=":0", silence_logs=50)

        with started(1) as one, started(2) as two, Client(one) as single, Client(two) as double:
            for client in (single, double):
                client.run(_one_reader)
            alone, both = alternating(fresh(single), fresh(double), rounds=rounds)
    yield f"{alone:.1f} s with 1 worker, {both:.1f} s with 2: {alone / both:.2f} times as fast"


def kills(count: int = 20) -> Iterator[str]:
    """SIGKILLs of workers and of the whole process (0 arrays may differ, 0 super-tiles be computed twice)."""
    import random

    from .kills import Case, kill_processes, kill_workers

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        items = _scene(folder / "scene", 1024, 6)
        case = Case(tuple(json.loads((folder / "scene" / "bbox.json").read_text())), items, "demo-2026")
        tiles = case.map(folder / "whole.zarr")["super_tiles"]
        for what, kill in (("whole processes", kill_processes), ("workers", kill_workers)):
            got = kill(case, folder / "whole.zarr", folder, count, random.Random(count))
            yield (
                f"{got.kills} kills of {what} over {got.maps} maps of {tiles} super-tiles: {got.differing} arrays "
                f"differ, {got.again} super-tiles with a record computed again"
            )


BENCHMARKS: dict[str, Callable[[], Iterator[str]]] = {
    "bare": predict_against_bare,
    "naive": predict_against_naive,
    "composite": composite_against_numpy,
    "stages": whole_map_against_stages,
    "memory": memory,
    "memory-default": memory_default,
    "scheduler": scheduler,
    "scaling": scaling,
    "gpu": gpu,
    "kills": kills,
}
LONG = ("memory-default", "kills")  # only when asked for by name
