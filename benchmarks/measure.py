"""What is measured. Each benchmark yields lines; ratios compare two things of the same run."""

from __future__ import annotations

import json
import pickle
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

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
    side = 256 * windows + 64
    return np.random.default_rng(0).uniform(0.01, 0.4, (6, side, side)).astype(np.float32)


def predict_against_bare() -> Iterator[str]:
    """probability() against the bare network loop at its best setting, same 320-px windows (at least 0.90)."""
    import torch

    from minemap.checkpoint import load_model
    from minemap.inference import Settings, layout, probability

    model, settings, image = load_model(), Settings.for_machine(), _image()
    network = model.network().to(memory_format=torch.channels_last)
    cut = layout(model)
    stack = np.stack([cut.cut(image, core) for core in cut.cores((1024, 1024))])
    tensors = torch.from_numpy(model.recipe.normalise(stack))

    def bare(batch: int, threads: int) -> None:
        torch.set_num_threads(threads)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16"):
            for start in range(0, len(tensors), batch):
                network(tensors[start : start + batch].contiguous(memory_format=torch.channels_last))

    threads = settings.streams
    ours, four, eight = alternating(
        lambda: probability(image, model, settings), lambda: bare(4, threads), lambda: bare(8, threads)
    )
    best = min(four, eight)
    yield f"ours {ours / 16 * 1e3:.0f} ms a window, bare {best / 16 * 1e3:.0f} ms: ratio {best / ours:.2f}"


def predict_against_naive() -> Iterator[str]:
    """probability() against fp32, batch 1, one window at a time (at least 3 times as fast)."""
    import torch

    from minemap.checkpoint import load_model
    from minemap.inference import Settings, layout, probability

    model, settings, image = load_model(), Settings.for_machine(), _image()
    network, cut = model.network(), layout(model)
    torch.set_num_threads(settings.streams)

    def naive() -> None:
        with torch.inference_mode():
            for core in cut.cores((1024, 1024)):
                network(torch.from_numpy(model.recipe.normalise(cut.cut(image, core)[None])))

    ours, theirs = alternating(lambda: probability(image, model, settings), naive, rounds=2)
    yield f"ours {ours:.2f} s, naive {theirs:.2f} s for 16 windows: {theirs / ours:.1f} times as fast"


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
    from minemap.inference import probability
    from minemap.store import Store

    def cpu(action: Callable[[], object]) -> float:
        before = time.process_time()
        action()
        return time.process_time() - before

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        items = _scene(folder / "scene", 2048, 12)
        bbox = json.loads((folder / "scene" / "bbox.json").read_text())
        plan = mapping.plan(bbox, "2023", folder / "a.zarr", stac=items)
        store = Store(folder / "a.zarr")
        job = mapping._job(plan, store, mapping._prepare(plan, store), 1)
        probability(_image(), load_model(), job.settings)  # weights loaded, kernels chosen
        whole = cpu(lambda: mapping._run(plan.work, job, None, None))
        images: list[tuple[np.ndarray, np.ndarray]] = []
        read = cpu(lambda: images.extend(mapping._image(w.inner, job)[:2] for w in plan.work))
        answers: list[np.ndarray] = []
        network = cpu(lambda: answers.extend(probability(image, job.checkpoint, job.settings) for image, _ in images))
        pairs = list(zip(plan.work, answers, strict=True))
        write = cpu(lambda: [store.write_tile(w.inner, 0, {"probability": mapping.percent(a)}) for w, a in pairs])
    total = read + network + write
    yield f"read and composite {read:.1f}, network {network:.1f}, write {write:.2f} CPU seconds"
    yield f"whole map {whole:.1f}, sum of stages {total:.1f}: ratio {whole / total:.2f}"


PEAK = """
import json, resource, sys
from minemap import map_area
items, bbox, out, chunk = sys.argv[1:]
map_area(json.loads(bbox), "2023", out, stac=items, chunk=int(chunk), max_cloud=100)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def _peak(items: Path, bbox: list[float], out: Path, chunk: int) -> float:
    """Peak resident memory, MiB, of a process that makes one map."""
    words = [sys.executable, "-c", PEAK, str(items), json.dumps(bbox), str(out), str(chunk)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) / 1024


def memory() -> Iterator[str]:
    """Peak memory of a process against area (1, 4, 16 super-tiles of 512 px) and dates (6, 24)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for dates, areas in ((6, (1, 4, 16)), (24, (16,))):
            items = _scene(folder / f"scene{dates}", 2048, dates)
            west, south, east, north = json.loads((folder / f"scene{dates}" / "bbox.json").read_text())
            for tiles in areas:
                share = (tiles / 16) ** 0.5 * 0.9
                middle = ((west + east) / 2, (south + north) / 2)
                half = ((east - west) / 2 * share, (north - south) / 2 * share)
                bbox = [middle[0] - half[0], middle[1] - half[1], middle[0] + half[0], middle[1] + half[1]]
                peak = _peak(items, bbox, folder / f"{dates}-{tiles}.zarr", 512)
                yield f"{dates} dates, about {tiles} super-tiles: {peak:.0f} MiB"


def scheduler() -> Iterator[str]:
    """Tasks and pickled bytes a super-tile of the graph of 10,000 (at most 5 and 50 kB)."""
    from minemap import mapping
    from minemap.checkpoint import load_model
    from minemap.compositing import Rule
    from minemap.grid import Grid
    from minemap.inference import Settings
    from minemap.reader import Access
    from minemap.scenes import parse_period
    from minemap.store import Store

    tiles = list(Grid(32720, 0.0, 10_000_000.0, 100 * 2048, 100 * 2048).tiles(2048))
    work = [mapping.Work(tile, (0, 8, 0, 8)) for tile in tiles]
    job = mapping.Job(
        Store(Path("nowhere.zarr")),
        parse_period("2023"),
        {"utm32720": 0},
        (-63.0, -10.0, -62.0, -9.0),
        load_model(),
        Settings(),
        Rule(),
        Access(),
        "stackstac",
        False,
    )
    start = time.process_time()
    lazy = mapping.graph(work, job)
    made = dict(lazy.__dask_graph__())
    spent = time.process_time() - start
    size = sum(len(pickle.dumps(task)) for task in list(made.values())[:: max(1, len(made) // 2000)])
    size *= max(1, len(made) // 2000) / len(work)
    ms = spent / len(work) * 1e3
    yield f"{len(made) / len(work):.1f} tasks, {size / 1e3:.1f} kB, {ms:.2f} ms to make a super-tile"
    yield f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB"


BENCHMARKS: dict[str, Callable[[], Iterator[str]]] = {
    "bare": predict_against_bare,
    "naive": predict_against_naive,
    "stages": whole_map_against_stages,
    "memory": memory,
    "scheduler": scheduler,
}
