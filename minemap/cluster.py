"""Where super-tiles are computed: this process, local processes, GPU workers, or any Dask scheduler."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .errors import InputError, MinemapError
from .inference import cores

if TYPE_CHECKING:
    from distributed import Client

TASK_THREADS = 2  # a worker reads the next super-tile while the network runs on this one
GPU = {"GPU": 1}


class ClusterError(MinemapError):
    """A scheduler that can't be reached, or workers that can't do the work."""


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
        with _local(cluster, workers) as made, Client(made) as client:
            yield client
        return
    if "://" not in cluster:
        raise InputError(f"unknown cluster {cluster!r}: give local, gpu, or a scheduler's address (tcp://HOST:PORT)")
    try:
        client = Client(cluster, timeout="10s")
    except (OSError, ValueError) as error:
        raise ClusterError(f"no Dask scheduler answers at {cluster}: start one, or check the address") from error
    with client:
        yield client


def worker_count(client: Client | None, workers: int | None) -> int:
    """Processes that share this machine's cores, for the number of network streams in each."""
    if client is None:
        return 1
    hosts = [worker["host"] for worker in client.scheduler_info(n_workers=-1)["workers"].values()]
    return max((hosts.count(host) for host in hosts), default=workers or 1)


def _local(kind: str, workers: int | None) -> Any:
    from distributed import LocalCluster

    if kind == "gpu":
        try:
            from dask_cuda import LocalCUDACluster

            return LocalCUDACluster(n_workers=workers, threads_per_worker=1, resources=GPU)
        except ImportError:
            return LocalCluster(n_workers=workers or 1, threads_per_worker=1, resources=GPU)
    return LocalCluster(n_workers=workers or max(1, cores() // 2), threads_per_worker=TASK_THREADS)
