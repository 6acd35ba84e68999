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
# Reading order of ARCHITECTURE.md: a module imports only from those before it.
ORDER = [
    "errors",
    "files",
    "sentinel2",
    "landsat",
    "sensors",
    "grid",
    "vectors",
    "scenes",
    "reader",
    "cube",
    "compositing",
    "spectral",
    "tiles",
    "water",
    "models",
    "checkpoint",
    "inference",
    "zones",
    "store",
    "cluster",
    "supertile",
    "planning",
    "running",
    "mapping",
    "sites",
    "uncertainty",
    "areas",
    "consistency",
    "annual",
    "changes",
    "polygons",
    "assessment",
    "stac_item",
    "pyramid",
    "export",
    "page",
    "report",
    "landscape",
    "demo",
    "training",
    "showcase",
    "cli",
]


@pytest.mark.parametrize("words", [("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",)])
def test_style_and_types(words):
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_environment_agrees_with_pyproject():
    text = (ROOT / "environment.yml").read_text()
    assert f"python{PROJECT['requires-python']}" in text
    (extras,) = re.findall(r"-e \.\[(.*)\]", text)
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    assert {"gpu", "imagenet", "notebooks", "test"} == set(PROJECT["optional-dependencies"])


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


def test_imports_go_one_way():
    for own, path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom):
                continue
            package = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            source = ".".join((*package, *(node.module or "").split("."))).strip(".")
            for name in node.names:
                root, _, target = f"{source}.{name.name}".partition(".")
                target = target.split(".")[0]
                if root == "minemap" and target in ORDER and target != own:
                    assert ORDER.index(target) < ORDER.index(own), f"{path.name} imports {target}"


def test_every_module_is_in_the_architecture():
    text = (ROOT / "ARCHITECTURE.md").read_text()
    for name, _ in modules():
        assert f"`{name}" in text, name


def test_readme_begins_with_the_two_commands():
    commands = re.findall(r"^(make \w+|\w+ .*)$", (ROOT / "README.md").read_text().split("```")[1], re.MULTILINE)
    assert [c.split("#")[0].strip() for c in commands] == ["make demo", "make test"]
    assert "make test" in (ROOT / ".ci" / "run").read_text()
