"""Workers: asked before work starts, replaced when they die, given less when memory runs out."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import dask
import numpy as np
import pytest
import torch
import zarr
from conftest import shrunk
from distributed import Client, LocalCluster

from minemap import map_area
from minemap.checkpoint import BUNDLED, load_model, load_same
from minemap.cluster import (
    EXACT,
    PRESENT,
    _lacking,
    check_versions,
    check_workers,
    connect,
    differences,
    gpu_share,
    versions,
    worker_count,
)
from minemap.errors import CheckpointError, ClusterError, TooLittleMemoryError
from minemap.inference import Runner, Settings
from minemap.mapping import _job
from minemap.planning import plan
from minemap.running import STAGE, _place, _watched, graph
from minemap.store import Store

HERE = {"python": "3.11.7.final.0", "minemap": "0.1.0", "torch": "2.15.0+cu132", "numpy": "2.4.1", "dask": "2026.8.0"}


@pytest.fixture(scope="module")
def small(scene):
    """A box of two super-tiles of 512 px or a few more."""
    return shrunk(scene.bbox, 1 / 3)


@pytest.fixture(scope="module")
def alone(small, options, tmp_path_factory):
    """The map that this process makes by itself."""
    out = tmp_path_factory.mktemp("alone") / "map.zarr"
    map_area(small, "2023", out, **options)
    return out


@pytest.fixture(scope="module")
def scheduler():
    """A scheduler with one worker process, as someone else would run it."""
    with LocalCluster(n_workers=1, threads_per_worker=2, dashboard_address=":0") as made:
        yield made


def same(one, other):
    for name in ("probability", "observations", "quicklook"):
        a, b = (zarr.open_array(Path(path) / "utm32620" / name, mode="r")[:] for path in (one, other))
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("there", "told"),
    [
        (HERE, ""),
        ({**HERE, "torch": "2.15.0+cpu", "python": "3.11.9.final.0"}, ""),
        ({**HERE, "python": "3.12.1.final.0"}, "python 3.12 (here 3.11)"),
        ({**HERE, "torch": None, "numpy": None}, "no torch, no numpy"),
        (
            {**HERE, "minemap": "0.2.0", "dask": "2025.1.0"},
            "minemap 0.2.0 (here 0.1.0), dask 2025.1.0 (here 2026.8.0)",
        ),
        ({**HERE, "numpy": "1.26.4"}, ""),
    ],
)
def test_versions_are_compared(there, told):
    assert differences(HERE, there, EXACT, PRESENT) == told
    assert differences(HERE, {**HERE, "numpy": "1.26.4"}, PRESENT, ()) == "numpy 1.26.4 (here 2.4.1)"


def test_a_scheduler_without_workers_is_told_after_a_while(small, options, tmp_path):
    with (
        LocalCluster(n_workers=0, dashboard_address=":0") as made,
        dask.config.set({"minemap.worker-timeout": 0.5}),
        pytest.raises(ClusterError, match=r"no worker that took a task within 0.5 s: start some \(dask worker tcp"),
    ):
        map_area(small, "2023", tmp_path / "map.zarr", cluster=made.scheduler_address, **options)
    assert not (tmp_path / "map.zarr").exists()


def test_a_port_where_something_else_listens_is_told_in_time(small, options, serve, tmp_path, monkeypatch):
    """A web server, as a scheduler's dashboard is one."""
    monkeypatch.setattr("minemap.cluster.GREETING", 1)
    address = serve(tmp_path).replace("http", "tcp")
    with pytest.raises(ClusterError, match=rf"no Dask scheduler answers at {address}: .*not its dashboard's"):
        map_area(small, "2023", tmp_path / "map.zarr", cluster=address, **options)


def test_a_port_where_another_speaks_first_is_told(small, options, tmp_path, monkeypatch):
    """Its words would be read as the length of a message."""
    monkeypatch.setattr("minemap.cluster.GREETING", 3)

    def greet(server):
        with server.accept()[0] as guest:
            guest.sendall(b"SSH-2.0-other\r\n" * 4)

    with socket.create_server(("127.0.0.1", 0)) as server:
        talk = threading.Thread(target=greet, args=(server,))
        talk.start()
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ClusterError, match="no Dask scheduler answers at tcp://"):
            map_area(small, "2023", tmp_path / "m.zarr", cluster=address, **options)
        talk.join()


def test_it_is_said_when_no_worker_is_left(monkeypatch, caplog):
    monkeypatch.setattr("minemap.running.ALONE", 1)
    nobody = LocalCluster(n_workers=0, dashboard_address=":0")
    with nobody as made, Client(made) as client, _watched([], None, client, lambda *_: None):
        deadline = time.monotonic() + 20
        while "no worker is left" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.2)
    assert "no worker is left: start some" in caplog.text


def test_workers_are_checked_when_they_work_too():
    """Those that join a run after it began."""
    check_versions(versions())
    others = tuple((name, "2.0.1" if name == "torch" else version) for name, version in versions())
    with pytest.raises(ClusterError, match=r"a worker on \S+ has torch 2.* \(here 2.0.1\); install the same"):
        check_versions(others)


def test_a_worker_with_another_torch_is_refused_before_work_starts(small, options, tmp_path):
    """A real worker in an environment whose installed torch says that it is another one."""
    for name, version in (("torch", "2.0.1"), ("segmentation_models_pytorch", "0.1")):
        about = tmp_path / "site" / f"{name}-{version}.dist-info" / "METADATA"
        about.parent.mkdir(parents=True)
        about.write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")
    path = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
    with LocalCluster(n_workers=0, dashboard_address=":0") as made:
        words = [sys.executable, "-m", "distributed.cli.dask_worker", made.scheduler_address]
        words += ["--nthreads", "1", "--no-nanny", "--no-dashboard", "--local-directory", str(tmp_path)]
        worker = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.DEVNULL)
        try:
            with pytest.raises(
                ClusterError, match=r"worker tcp://\S+ has torch 2.0.1 \(here 2[^)]+\); install the same"
            ):
                map_area(small, "2023", tmp_path / "map.zarr", cluster=made.scheduler_address, **options)
        finally:
            worker.kill()
            worker.wait()
    assert not (tmp_path / "map.zarr").exists()


def test_what_a_worker_lacks(model, tmp_path):
    checkpoint = load_model(model)
    (tmp_path / "seen").touch()
    assert _lacking(tmp_path / "seen", checkpoint) == ""
    assert "put the output on a file system that all workers share" in _lacking(tmp_path / "no" / "seen", checkpoint)
    elsewhere = Path("/nowhere/site-packages/minemap/weights/demo-2026")
    bundled = load_model("demo-2026")
    assert load_same(elsewhere, bundled.sha256).path == BUNDLED / "demo-2026"
    with pytest.raises(CheckpointError, match="holds another model here"):
        load_same(elsewhere, checkpoint.sha256)
    with pytest.raises(CheckpointError, match="is not there: put the model on a file system"):
        load_same(tmp_path / "mine", checkpoint.sha256)


def test_a_remote_scheduler_gives_the_same_bytes(alone, small, options, scheduler, tmp_path, caplog):
    out = tmp_path / "map.zarr"
    with caplog.at_level(logging.INFO, "minemap"):
        map_area(small, "2023", out, cluster=scheduler.scheduler_address, **options)
    with Client(scheduler) as client:
        assert gpu_share(client) == {}
    assert "dashboard" in caplog.text
    same(alone, out)
    made = plan(small, "2023", out, **options)
    job = _job(made, Store(out), {"utm32620": 0}, 1)
    keys = [k for k in dict(graph(made.work, job).__dask_graph__()) if isinstance(k, str)]
    records = sorted(p.stem for p in (tmp_path / "map.zarr.meta" / "ledger").glob("*/*/*.json"))
    assert sorted(k.rsplit("-", 1)[0] for k in keys) == [f"supertile-utm32620-{name}" for name in records]


def test_gpu_workers_without_a_gpu(alone, small, options, tmp_path, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: its pixels may differ from the processor's")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,7")
    with pytest.warns(UserWarning, match="no GPU is found: the network runs on the processor"):
        context = connect("gpu", 2)
        client = context.__enter__()
    try:
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        assert [w["resources"] for w in workers] == [{"GPU": 1}] * 2
        share, threads = gpu_share(client)["GPU"], max(w["nthreads"] for w in workers)
        assert sum([share] * threads) <= 1 < share * (threads + 1)
        assert sorted(client.run(os.getenv, "CUDA_VISIBLE_DEVICES").values()) == ["3", "7"]
    finally:
        context.__exit__(None, None, None)
    with pytest.warns(UserWarning, match="no GPU is found"):
        map_area(small, "2023", tmp_path / "map.zarr", cluster="gpu", **options)
    same(alone, tmp_path / "map.zarr")


def test_a_super_tile_that_kills_its_workers_is_named(small, options, tmp_path):
    out = tmp_path / "map.zarr"
    over = threading.Event()

    def kill(client):
        while not over.wait(0.05):
            with_work = [w for w, tasks in client.processing().items() if tasks]
            pids = {n["id"]: n["pid"] for n in client.scheduler_info(n_workers=-1)["workers"].values() if "pid" in n}
            for worker in with_work:
                found = pids.get(worker) or client.run(os.getpid, workers=[worker], on_error="ignore").get(worker)
                if found and list(Store(out).meta.glob("cells")):
                    os.kill(found, signal.SIGKILL)

    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as made,
        Client(made) as client,
    ):
        killer = threading.Thread(target=kill, args=(client,), daemon=True)
        killer.start()
        try:
            with (
                pytest.warns(UserWarning, match="gives up a super-tile after 0 workers died"),
                pytest.raises(ClusterError, match=r"super-tile utm32620-\d+_\d+: 1 workers died under it"),
            ):
                map_area(small, "2023", out, client=client, **options)
        finally:
            over.set()
            killer.join()
    assert map_area(small, "2023", out, **options)["km2_observed"] > 0


@pytest.mark.parametrize("task", [f"{STAGE}-utm32620-1_3-9f0c", ("array-36a4", 1, 0)])
def test_whatever_task_died_its_super_tile_is_named(task):
    assert _place(task, ["utm32620-1_2", "utm32620-1_3"]) == "utm32620-1_3"


class Greedy(torch.nn.Module):
    """A network that needs more memory than there is for more than `fits` windows at a time."""

    def __init__(self, network, fits, error):
        super().__init__()
        self.network, self.fits, self.error = network, fits, error

    def forward(self, x):
        if len(x) > self.fits:
            raise self.error
        return self.network(x)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_batches_halve_when_memory_runs_out(error, model, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # of a GPU
    runner = Runner(load_model(model), Settings("fp32"))
    runner.batch = 4  # that it halves twice
    windows = np.random.default_rng(0).uniform(0, 0.4, (4, 6, 320, 320)).astype(np.float32)
    whole = runner(windows)
    assert runner.batch == 4
    network = runner.forward
    runner.forward = Greedy(network, 1, error)
    np.testing.assert_allclose(runner(windows), whole, atol=1e-5)
    assert runner.batch == 1
    runner.forward = Greedy(network, 0, error)
    with pytest.raises(TooLittleMemoryError, match="not even one window of 320 px fits into memory"):
        runner(windows)


def test_another_failure_of_the_network_is_no_lack_of_memory(model):
    runner = Runner(load_model(model), Settings("fp32"))
    runner.forward = Greedy(runner.forward, 0, RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        runner(np.zeros((4, 6, 320, 320), np.float32))


def test_cores_are_shared_by_the_processes_of_a_machine(monkeypatch):
    """Each process runs as many network streams as cores are left for it."""
    monkeypatch.setattr("minemap.inference.cores", lambda: 8)
    assert [Settings.for_machine("fp32", workers).streams for workers in (1, 3, 9)] == [8, 2, 1]
    three = LocalCluster(n_workers=3, threads_per_worker=1, processes=False, dashboard_address=":0")
    with three as made, Client(made) as client:
        assert worker_count(client) == 3
    assert worker_count(None) == 1


def test_workers_that_have_all_are_accepted(scheduler, model, tmp_path):
    start = time.monotonic()
    with Client(scheduler) as client:
        check_workers(client, tmp_path, load_model(model))
    assert list(tmp_path.iterdir()) == [] and time.monotonic() - start < 60
