"""`minemap demo`: mines are where the truth has them, on a seed that no training saw."""

from __future__ import annotations

import csv
import json

import pytest

from minemap.checkpoint import load_model


@pytest.mark.parametrize("seed", [4])
def test_demo_finds_the_mines(seed, minemap, tmp_path):
    assert "100" in json.dumps(load_model("demo-2026").recipe.training), "the seeds of its training begin at 100"
    out = tmp_path / "demo"
    done = minemap("demo", "--out", out, "--seed", seed, "--size", 720, "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["iou"] >= 0.6
    assert summary["km2_mine"] == pytest.approx(summary["truth_km2"], rel=0.3)
    with (out / "areas.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["iou"]) == summary["iou"] and float(row["observed_fraction"]) > 0.8
    assert (out / "map.png").stat().st_size > 50_000
    assert 50_000 < (out / "map.html").stat().st_size < 10e6
