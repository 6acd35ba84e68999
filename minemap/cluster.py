"""Where super-tiles are computed: this process, local processes, GPU workers, or any Dask scheduler.

What workers need is asked of them before any work starts: the same packages, the model, the output's folder. A
worker that lacks one would otherwise fail in the middle of a run, or make other pixels than its neighbours.
"""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import signal
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from .checkpoint import Checkpoint, load_same
from .errors import ClusterError, InputError, MinemapError
from .files import write_atomically
from .inference import cores
from .places import Place

if TYPE_CHECKING:
    from distributed import Client

TASK_THREADS = 2  # a worker reads the next super-tile while the network runs on this one
GPU_THREADS = 8  # at most, of a GPU worker: a GPU waits for readers
WORKER_BYTES = 3.2e9  # what a worker may take with the defaults
GPU = {"GPU": 1}
# What must be the same on workers as here: what pickles, schedules and computes ...
EXACT = ("python", "minemap", "torch", "dask", "distributed")
# ... and what only has to be there, with a warning when it is another version
PRESENT = ("numpy", "zarr", "xarray", "rasterio", "stackstac", "segmentation-models-pytorch")
GREETING = 10  # seconds
FAILURES = 3  # workers that may die under a task before it counts as the task's fault
log = logging.getLogger("minemap")


@contextmanager
def connect(cluster: str | None, workers: int | None = None) -> Iterator[Client | None]:
    """A client for `--cluster`: None for this process, "local", "gpu", or a scheduler's address."""
    if workers is not None and (workers < 1 or cluster not in ("local", "gpu")):
        raise InputError(f"workers is {workers}: give 1 or more, with --cluster local or gpu")
    if cluster is None:
        yield None
        return
    from distributed import Client

    if cluster in ("local", "gpu"):
        with _started(cluster, workers) as made, Client(made) as client, _quiet_end():
            log.info("dashboard %s", client.dashboard_link)
            yield client
        return
    if "://" not in cluster:
        raise InputError(f"unknown cluster {cluster!r}: give local, gpu, or a scheduler's address (tcp://HOST:PORT)")
    try:
        with ThreadPoolExecutor(1) as pool:  # a notebook's own thread runs an event loop already
            pool.submit(asyncio.run, _greet(cluster)).result()
        client = Client(cluster, timeout="10s")
    except (OSError, ValueError, TypeError, TimeoutError, MemoryError) as error:
        told = "start one, or check the address (not its dashboard's) and Dask's TLS settings"
        raise ClusterError(f"no Dask scheduler answers at {cluster}: {told}") from error
    with client, _quiet_end():
        if client.scheduler_info()["services"].get("dashboard"):
            log.info("dashboard %s", client.dashboard_link)
        yield client


async def _greet(address: str) -> None:
    """Raises OSError, TimeoutError, or MemoryError (another's words read as a length) unless Dask answers there.

    A Client waits for ever for what isn't Dask.
    """
    from distributed.comm import connect
    from distributed.security import Security

    told = Security().get_connection_args("client") if address.startswith("tls:") else {}
    comm = await asyncio.wait_for(connect(address, timeout=GREETING, **told), GREETING + 1)
    await comm.close()


def worker_count(client: Client | None) -> int:
    """Processes that share a machine's cores, for the number of network streams in each."""
    hosts = [worker["host"] for worker in _workers(client).values()] if client is not None else []
    return max((hosts.count(host) for host in hosts), default=1)


def has_workers(client: Client | None) -> bool:
    """Whether anybody could take a task, as far as one can tell."""
    try:
        return client is None or bool(_workers(client))
    except (OSError, RuntimeError, AttributeError):  # the scheduler is gone, which the run itself will tell
        return True


def gpu_share(client: Client) -> dict[str, float]:
    """The share of a worker's GPU resource that each task requests, so that all its threads can run tasks.

    Nothing where no worker offers a GPU. Whoever started the workers: `--cluster gpu`, or the user with their own
    client. A process runs one image at a time through its network, whatever the number of tasks.
    """
    threads = [w["nthreads"] for w in _workers(client).values() if w.get("resources", {}).get("GPU")]
    # A little less than its part: twelve twelfths add up to more than one
    return {"GPU": GPU["GPU"] / max(threads) * (1 - 1e-9)} if threads else {}


def _workers(client: Client) -> Mapping[str, Any]:
    return client.scheduler_info(n_workers=-1)["workers"]


# --- starting workers -------------------------------------------------------------------------------------------


@contextmanager
def _started(kind: str, workers: int | None) -> Iterator[Any]:
    with warnings.catch_warnings():
        # We say where the dashboard is, so it does not matter that its usual port is taken
        warnings.filterwarnings("ignore", message=r"Port \d+ is already in use")
        made = _gpu_workers(workers) if kind == "gpu" else _processes(workers)
    with made:
        yield made


@contextmanager
def _quiet_end() -> Iterator[None]:
    """What Dask's parts say of each other's end is no news: an interrupt is ours, and a lost scheduler we tell."""
    logging.getLogger("asyncio").addFilter(_is_news)  # said before an interrupt comes to us
    client = logging.getLogger("distributed.client")
    before = client.level
    client.setLevel(logging.CRITICAL)
    try:
        yield
    except KeyboardInterrupt:
        for name in ("distributed", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        raise
    finally:
        client.setLevel(before)


@contextmanager
def lost_scheduler(client: Client) -> Iterator[None]:
    """What Dask raises when the scheduler is gone, as a ClusterError."""
    from distributed import CancelledError
    from distributed.comm import CommClosedError

    try:
        yield
    except (CancelledError, CommClosedError) as error:
        address = client.scheduler.address if client.scheduler else "the address given"
        raise ClusterError(
            f"the Dask scheduler at {address} went away; what is finished stays, the same command goes on"
        ) from error


def _is_news(record: logging.LogRecord) -> bool:
    from distributed.client import AllExit

    return not (record.exc_info and isinstance(record.exc_info[1], AllExit))


def dask_setup(_worker: Any) -> None:
    """Dask calls this in each process that we start (`preload`). A terminal sends Ctrl-C to all of them, but whoever
    started them ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.getLogger("distributed.worker.state_machine").setLevel(logging.ERROR)


def _processes(workers: int | None) -> Any:
    """As many processes of two task threads as cores and memory allow."""
    from distributed import LocalCluster
    from distributed.system import MEMORY_LIMIT

    fit = min(cores() // TASK_THREADS, int(MEMORY_LIMIT // WORKER_BYTES))
    return LocalCluster(n_workers=workers or max(1, fit), threads_per_worker=TASK_THREADS, preload=__name__)


def _gpu_workers(workers: int | None) -> Any:
    """One process a GPU with `resources={"GPU": 1}`, and threads that read for it."""
    import torch

    gpus = torch.cuda.device_count()
    if not gpus:
        warnings.warn("no GPU is found: the network runs on the processor", stacklevel=2)
    count = workers or max(1, gpus)
    threads = GPU_THREADS
    while threads > TASK_THREADS and threads * count > cores():
        threads //= 2
    with suppress(ImportError):
        from dask_cuda import LocalCUDACluster

        if gpus:
            return LocalCUDACluster(n_workers=count, threads_per_worker=threads, resources=GPU)
    return _own_gpu_each(count, threads, gpus)


def _own_gpu_each(count: int, threads: int, gpus: int) -> Any:
    """What dask-cuda would start: a worker sees one GPU only, the next one's worker the next."""
    from distributed import Nanny, Scheduler, SpecCluster
    from distributed.system import MEMORY_LIMIT

    allowed = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    names = allowed or [str(number) for number in range(max(1, gpus))]
    shared = {
        "host": "127.0.0.1",
        "nthreads": threads,
        "resources": GPU,
        "memory_limit": int(MEMORY_LIMIT // count),
        "silence_logs": logging.WARN,
        "preload": __name__,
    }
    specs = {
        i: {"cls": Nanny, "options": {**shared, "env": {"CUDA_VISIBLE_DEVICES": names[i % len(names)]}}}
        for i in range(count)
    }
    scheduler = {"cls": Scheduler, "options": {"host": "127.0.0.1", "dashboard_address": ":8787"}}
    return SpecCluster(workers=specs, scheduler=scheduler, silence_logs=logging.WARN)


# --- what workers need ------------------------------------------------------------------------------------------


def check_workers(client: Client, folder: Place, checkpoint: Checkpoint | None = None) -> None:
    """Whether all workers can do the work, asked before it starts; raises ClusterError, in one line, where not.

    folder: where the output's records will lie; it exists. checkpoint: the model, where one is used. How long to wait
    for a first worker is dask's setting `minemap.worker-timeout` (seconds, 60).
    """
    with lost_scheduler(client):
        _wait_for_one(client)
        found: Any = client.get_versions(packages=[*EXACT[1:], *PRESENT])
        _compare_versions(found)
        with _marked(folder) as mark:
            answers = client.run(_lacking, mark, checkpoint, on_error="return")
        _refuse({worker: str(answer) for worker, answer in answers.items() if answer})
        _check_failures(client)


def _wait_for_one(client: Client) -> None:
    """A task of nothing, so that a cluster that grows with its tasks starts its first worker."""
    import dask

    seconds = float(dask.config.get("minemap.worker-timeout", 60))
    probe = client.submit(os.getpid, pure=False)
    try:
        probe.result(timeout=seconds)
    except TimeoutError as error:
        probe.cancel()
        address = client.scheduler.address if client.scheduler else "the scheduler"
        raise ClusterError(
            f"{address} has no worker that took a task within {seconds:g} s: start some (dask worker {address})"
        ) from error


def _compare_versions(found: Mapping[str, Any]) -> None:
    here = found["client"]["packages"]
    others = {worker: answer["packages"] for worker, answer in found["workers"].items()}
    trouble = {worker: differences(here, there, EXACT, PRESENT) for worker, there in others.items()}
    scheduler = found["scheduler"]["packages"]  # it unpickles the graph
    trouble["the scheduler"] = differences(here, scheduler, ("python", "minemap", "dask", "distributed"), ("xarray",))
    _refuse({name: f"has {text}; install the same there as here" for name, text in trouble.items() if text})
    other = {w: text for w, there in others.items() if (text := differences(here, there, PRESENT, ()))}
    if other:
        warnings.warn(f"{_first(other)} has {next(iter(other.values()))}: pixels may differ", stacklevel=4)


def versions() -> tuple[tuple[str, str], ...]:
    """What must be the same on all workers, here; "" for a package that is not installed."""
    found = {"python": platform.python_version()}
    for name in EXACT[1:]:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return tuple((name, found.get(name, "")) for name in EXACT)


@lru_cache
def check_versions(wanted: tuple[tuple[str, str], ...]) -> None:
    """Once in each process that works: workers may join a run that has begun. Raises ClusterError."""
    if text := differences(dict(wanted), dict(versions()), EXACT, ()):
        raise ClusterError(f"a worker on {platform.node()} has {text}; install the same there as where you started")


def differences(
    here: Mapping[str, str | None],
    there: Mapping[str, str | None],
    exact: tuple[str, ...],
    present: tuple[str, ...],
) -> str:
    """What is another version there, or missing though it is here: "torch 2.5 (here 2.6), no zarr"; "" if nothing."""
    told = [f"no {name}" for name in (*exact, *present) if here.get(name) and not there.get(name)]
    pairs = {name: (_public(name, there[name]), _public(name, here.get(name))) for name in exact if there.get(name)}
    return ", ".join([*(f"{name} {a} (here {b or 'none'})" for name, (a, b) in pairs.items() if a != b), *told])


def _public(name: str, version: str | None) -> str:
    """What counts of a version: of Python's the first two numbers, of others all but the build's mark (+cu132)."""
    text = version or ""
    return ".".join(text.split(".")[:2]) if name == "python" else text.split("+")[0]


@contextmanager
def _marked(folder: Place) -> Iterator[Place]:
    """A file of ours in a folder, by which a worker knows that it sees the same."""
    mark = folder / f".seen-by-workers-{uuid4().hex}"
    write_atomically(mark, "")
    try:
        yield mark
    finally:
        mark.unlink(missing_ok=True)


def _lacking(mark: Place, checkpoint: Checkpoint | None) -> str:
    """Runs on a worker: what it lacks, "" when nothing."""
    try:
        if checkpoint is not None:
            load_same(checkpoint.path, checkpoint.sha256)
    except MinemapError as error:
        return f"lacks the model: {error}"
    if not mark.exists():
        return f"does not see {mark.parent}: put the output on a file system that all workers share"
    try:
        own = mark.with_name(f"{mark.name}-{uuid4().hex}")
        write_atomically(own, "")
        own.unlink()
    except OSError:
        return f"may not write to {mark.parent}: let its user write there"
    return ""


def _refuse(trouble: Mapping[str, str]) -> None:
    if trouble:
        raise ClusterError(f"{_first(trouble)} {next(iter(trouble.values()))}")


def _first(trouble: Mapping[str, str]) -> str:
    name = next(iter(trouble))
    more = f" (and {len(trouble) - 1} more)" if len(trouble) > 1 else ""
    return f"{name if name.startswith('the ') else f'worker {name}'}{more}"


def _check_failures(client: Client) -> None:
    def allowed(dask_scheduler: Any) -> int:
        return dask_scheduler.allowed_failures

    with suppress(ValueError):  # a scheduler that runs no foreign code
        found = client.run_on_scheduler(allowed)
        if found < FAILURES:
            warnings.warn(
                f"this scheduler gives up a super-tile after {found} workers died under it: set "
                f"distributed.scheduler.allowed-failures to {FAILURES} or more there",
                stacklevel=3,
            )
