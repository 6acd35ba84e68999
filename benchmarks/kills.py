"""SIGKILLs at random moments, of workers and of the whole process; then the map must be that of a run left alone.

A record in the ledger says that a super-tile is done: one that changes later was computed twice.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

COMMAND = "import sys; from minemap.cli import main; sys.exit(main(sys.argv[1:]))"
LONGEST = 600.0  # seconds without any new record


@dataclass(frozen=True)
class Case:
    """What is mapped again and again."""

    bbox: tuple[float, float, float, float]
    items: Path
    model: str
    chunk: int = 512

    def command(self, out: Path) -> list[str]:
        words = ["map", "--bbox", *map(str, self.bbox), "--date", "2023", "--out", str(out), "--quiet"]
        words += ["--stac", str(self.items), "--model", self.model, "--chunk", str(self.chunk)]
        return [sys.executable, "-c", COMMAND, *words]

    def map(self, out: Path, **options: Any) -> dict[str, Any]:
        from minemap import map_area

        return map_area(self.bbox, "2023", out, stac=self.items, model=self.model, chunk=self.chunk, **options)


@dataclass
class Outcome:
    """kills that landed, maps that were completed, arrays that differ from the undisturbed ones, tiles made twice."""

    kills: int = 0
    maps: int = 0
    differing: int = 0
    again: int = 0


def records(out: Path) -> dict[str, str]:
    """The ledger: a record's name and text."""
    ledger = out.with_name(out.name + ".meta") / "ledger"
    return {str(p.relative_to(ledger)): p.read_text() for p in ledger.glob("*/*/[!.]*.json")}


def changed(before: dict[str, str], after: dict[str, str]) -> int:
    return sum(after.get(name) != text for name, text in before.items())


def differing(one: Path, other: Path) -> int:
    """Arrays that are not the same in two maps, byte for byte."""
    import zarr

    from minemap.store import LAYERS, Store

    count = 0
    for group in Store(one).groups():
        for name in LAYERS:
            if (one / group / name).exists():
                a, b = (np.asarray(zarr.open_array(path / group / name, mode="r")[:]) for path in (one, other))
                count += a.tobytes() != b.tobytes()
    return count


def kill_processes(case: Case, whole: Path, folder: Path, kills: int, rng: random.Random) -> Outcome:
    """Kills the process that maps, `kills` times, and starts the same command again until the map is whole."""
    outcome = Outcome()
    while outcome.kills < kills:
        out = folder / f"processes{outcome.maps}.zarr"
        status: int | None = None
        while status != 0:
            before = records(out)
            process = subprocess.Popen(case.command(out), stderr=subprocess.PIPE, text=True)
            if outcome.kills < kills:
                _strike(process, out, len(before), rng)
            told = process.communicate(timeout=LONGEST)[1]
            status = process.returncode
            if status not in (0, -signal.SIGKILL):
                raise RuntimeError(f"the run failed by itself: {told}")
            outcome.kills += status != 0
            outcome.again += changed(before, records(out))
        outcome.maps += 1
        outcome.differing += differing(whole, out)
    return outcome


def _strike(process: subprocess.Popen[str], out: Path, before: int, rng: random.Random) -> None:
    """Every fourth kill at any moment from the start, the others when one more super-tile is done, or soon after."""
    if rng.random() < 0.25:
        _wait(process, rng.uniform(0, 10))
    else:
        while process.poll() is None and len(records(out)) == before:
            time.sleep(0.02)
        _wait(process, rng.uniform(0, 0.7))
    process.send_signal(signal.SIGKILL)


def _wait(process: subprocess.Popen[str], seconds: float) -> None:
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)


def kill_workers(case: Case, whole: Path, folder: Path, kills: int, rng: random.Random) -> Outcome:
    """Kills one of two workers after every super-tile or so, `kills` times; Dask's nannies start others."""
    from distributed import Client, LocalCluster

    outcome = Outcome()
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0", silence_logs=50) as cluster,
        Client(cluster) as client,
    ):
        while outcome.kills < kills:
            out = folder / f"workers{outcome.maps}.zarr"
            left = kills - outcome.kills
            _map_under_fire(case, out, cluster, client, left, rng, outcome)
            outcome.maps += 1
            outcome.differing += differing(whole, out)
    return outcome


def _map_under_fire(
    case: Case, out: Path, cluster: Any, client: Any, kills: int, rng: random.Random, outcome: Outcome
) -> None:
    failed: list[BaseException] = []
    run = threading.Thread(target=_until_done, args=(case, out, client, failed), daemon=True)
    run.start()
    seen: dict[str, str] = {}
    since = 0
    while run.is_alive():
        now = records(out)
        outcome.again += changed(seen, now)
        seen |= now
        if kills and len(seen) > since:
            time.sleep(rng.uniform(0, 0.7))
            pid = rng.choice(list(cluster.workers.values())).pid
            if pid and run.is_alive():
                os.kill(pid, signal.SIGKILL)
                outcome.kills, kills, since = outcome.kills + 1, kills - 1, len(seen)
        time.sleep(0.02)
    outcome.again += changed(seen, records(out))
    if failed:
        raise failed[0]


def _until_done(case: Case, out: Path, client: Any, failed: list[BaseException]) -> None:
    """A super-tile whose workers die too often ends a run with one line; the same command goes on."""
    from minemap.errors import ClusterError

    for _ in range(20):
        try:
            case.map(out, client=client)
            return
        except ClusterError:
            continue
        except BaseException as error:
            failed.append(error)
            return
    failed.append(RuntimeError("20 runs, and the map is not whole"))
