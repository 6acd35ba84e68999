"""Killed anywhere and run again, a map is byte for byte that of a run left alone, and nothing is computed twice.

The full number of kills is `python -m benchmarks kills`.
"""

from __future__ import annotations

import random

import pytest

from benchmarks.kills import Case, Outcome, kill_processes, kill_workers


@pytest.fixture(scope="module")
def case(scene, model, inner):
    return Case(inner, scene.items, str(model))


@pytest.fixture(scope="module")
def whole(case, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "map.zarr"
    assert case.map(out)["super_tiles_computed"] >= 4
    return out


@pytest.mark.parametrize("kill", [kill_processes, kill_workers])
def test_kills_leave_no_trace(kill, case, whole, tmp_path):
    outcome = kill(case, whole, tmp_path, 2, random.Random(1))
    assert outcome == Outcome(kills=2, maps=outcome.maps, differing=0, again=0) and outcome.maps >= 1
