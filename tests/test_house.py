"""The house: style, types, packaging, documents."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import minemap

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def read_order():
    """The modules of ARCHITECTURE.md in their reading order: a module imports only from those before it."""
    table = (ROOT / "ARCHITECTURE.md").read_text().split("\n| module | what |\n")[1].split("\n\n")[0]
    cells = [line.split("|")[1] for line in table.splitlines()[1:]]
    return [name.strip("`/") for cell in cells for name in cell.strip().split(", ")]


ORDER = read_order()


@pytest.mark.parametrize("words", [("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",)])
def test_style_and_types(words):
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_environment_agrees_with_pyproject():
    text = (ROOT / "environment.yml").read_text()
    assert f"python{PROJECT['requires-python']}" in text
    (extras,) = re.findall(r"-e \.\[(.*)\]", text)
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    assert {"az", "gpu", "gs", "imagenet", "notebooks", "s3", "test"} == set(PROJECT["optional-dependencies"])


def test_version_is_one():
    assert minemap.__version__ == PROJECT["version"]


def test_front_door_is_small_and_complete():
    assert len(minemap.__all__) <= 10
    for name in minemap.__all__:
        assert getattr(minemap, name) is not None
    assert callable(minemap.composite) and callable(minemap.predict)
    with pytest.raises(AttributeError, match="no attribute 'nonesuch'"):
        _ = minemap.nonesuch


def modules():
    for path in sorted((ROOT / "minemap").rglob("*.py")):
        parts = path.relative_to(ROOT / "minemap").with_suffix("").parts
        if not parts[0].startswith("__"):
            assert parts[0] in ORDER, path
            yield parts[0], path


def imported(path):
    """Top-level modules of ours that a file imports, in any form."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            source = ".".join((*package, *(node.module or "").split("."))).strip(".")
            names = [f"{source}.{name.name}" for name in node.names]
        for root, _, rest in (name.partition(".") for name in names):
            if root == "minemap" and rest.split(".")[0] in ORDER:
                yield rest.split(".")[0]


def test_imports_go_one_way():
    for own, path in modules():
        for target in set(imported(path)) - {own}:
            assert ORDER.index(target) < ORDER.index(own), f"{path.name} imports {target}"


def test_the_architecture_names_every_module_once():
    assert sorted(ORDER) == sorted({own for own, _ in modules()})


def test_readme_begins_with_the_two_commands():
    commands = re.findall(r"^(make \w+|\w+ .*)$", (ROOT / "README.md").read_text().split("```")[1], re.MULTILINE)
    assert [c.split("#")[0].strip() for c in commands] == ["make demo", "make test"]
    assert "make test" in (ROOT / ".ci" / "run").read_text()
