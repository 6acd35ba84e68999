"""Notebooks run offline from top to bottom, and are kept without outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


SWITCH = "switch to a live catalogue here"
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


@each
def test_notebook_is_clean_and_one_cell_goes_live(path):
    cells = code_cells(path)
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells), "strip the outputs"
    (switch,) = [cell for cell in cells if SWITCH in cell["metadata"].get("tags", [])]
    (live,) = [cell for cell in cells if "LIVE" in "".join(cell["source"])]
    assert switch is live


@each
def test_notebook_runs(path, tmp_path, monkeypatch, capsys):
    import matplotlib

    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for cell in code_cells(path):
        exec(compile("".join(cell["source"]), f"{path.name}:{cell['id']}", "exec"), names)
    assert (tmp_path / "map.png").exists()
    if path.stem in ("01_first_map", "04_scale_out"):
        assert "dashboard: http" in capsys.readouterr().out
