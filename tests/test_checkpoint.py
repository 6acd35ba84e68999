"""Checkpoints: what is saved is what is loaded, and no damaged byte gets through."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minemap import checkpoint, models
from minemap.checkpoint import DEFAULT_MODEL, Checkpoint, Recipe, available, load_model, save
from minemap.errors import CheckpointError
from minemap.sentinel2 import BANDS

FILES = ("weights.safetensors", "recipe.json", "SHA256SUMS")


def a_recipe(**changes: object) -> Recipe:
    values: dict = {
        "name": "test",
        "architecture": "fpn",
        "options": {"in_channels": 6},
        "bands": BANDS,
        "mean": (0.1,) * 6,
        "std": (0.2,) * 6,
        "threshold": 0.5,
    }
    return Recipe(**(values | changes))


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return models.build("fpn", in_channels=6).eval()


@pytest.fixture
def saved(tmp_path: Path, network: torch.nn.Module) -> Checkpoint:
    return save(tmp_path / "model", network, a_recipe())


def test_round_trip_keeps_recipe_and_answers(saved: Checkpoint, network: torch.nn.Module) -> None:
    x = torch.randn(2, 6, 64, 64)
    loaded = load_model(saved.path).network()
    with torch.no_grad():
        expected, answer = network(x).sigmoid(), loaded(x).sigmoid()
    assert load_model(saved.path).recipe == a_recipe()
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert (answer - expected).abs().max() < 2e-3  # what float16 kernels cost at most here


@pytest.mark.parametrize("name", FILES)
def test_loads_by_folder_and_by_file(saved: Checkpoint, name: str) -> None:
    assert load_model(saved.path / name) == load_model(str(saved.path)) == saved


def test_checksum_file_is_what_sha256sum_reads(saved: Checkpoint) -> None:
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=saved.path, check=True)
    assert saved.sha256 == hashlib.sha256((saved.path / "SHA256SUMS").read_bytes()).hexdigest()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(name=st.sampled_from(FILES), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_refused(
    tmp_path_factory: pytest.TempPathFactory, small: Path, name: str, where: float, bit: int
) -> None:
    file = small / name
    good = file.read_bytes()
    bad = bytearray(good)
    bad[int(where * len(bad))] ^= 1 << bit
    file.write_bytes(bad)
    try:
        with pytest.raises(CheckpointError, match="fetch"):
            load_model(small)
    finally:
        file.write_bytes(good)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "model"
    return save(folder, models.build("segformer", in_channels=6, encoder_name="mit_b0"), a_recipe()).path


@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_refused(saved: Checkpoint, name: str) -> None:
    (saved.path / name).unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_model(saved.path)


def test_swapped_model_is_refused_by_an_older_handle(saved: Checkpoint, network: torch.nn.Module) -> None:
    save(saved.path, network, a_recipe(threshold=0.4))
    with pytest.raises(CheckpointError, match="another model"):
        saved.network()


def _rewrite(folder: Path, text: str) -> None:
    (folder / "recipe.json").write_text(text)
    (folder / "SHA256SUMS").write_text(checkpoint.checksums(folder))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "not JSON"),
        ("[]", "no recipe"),
        ('{"surprise": 1}', "keys must be among"),
        ('{"name": "x"}', "no recipe"),
    ],
)
def test_bad_recipes_are_refused(saved: Checkpoint, text: str, match: str) -> None:
    _rewrite(saved.path, text)
    with pytest.raises(CheckpointError, match=match):
        load_model(saved.path)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"options": {"in_channels": 5}}, "does not fit"),
        ({"architecture": "minec2fnet", "options": {"surprise": 1}}, "no network we can build"),
        ({"architecture": "surprise"}, "no network"),
    ],
)
def test_weights_that_do_not_fit_are_refused(saved: Checkpoint, changes: dict, match: str) -> None:
    _rewrite(saved.path, json.dumps(dataclasses.asdict(a_recipe(**changes))))
    with pytest.raises(CheckpointError, match=match):
        load_model(saved.path).network()


@pytest.mark.parametrize(
    "changes",
    [
        {"bands": ("blue", "purple")},
        {"bands": ("blue", "blue")},
        {"mean": (0.0,)},
        {"std": (0.0,) * 6},
        {"threshold": 1.5},
        {"window": 250},
        {"halo": 20},
        {"stride": 0},
        {"derived": ("ndwi",)},
    ],
)
def test_recipe_is_validated(changes: dict) -> None:
    with pytest.raises(CheckpointError, match="not valid"):
        a_recipe(**changes)


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(CheckpointError, match=DEFAULT_MODEL if DEFAULT_MODEL in available() else "none"):
        load_model("no-such-model")


def test_pickles_small(saved: Checkpoint) -> None:
    data = pickle.dumps(saved)
    assert len(data) < 4000
    assert pickle.loads(data) == saved


def test_imports_no_torch() -> None:
    code = "import sys, minemap.checkpoint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_normalise_equals_its_definition() -> None:
    recipe = a_recipe(mean=tuple(np.linspace(0.1, 0.3, 6)), std=tuple(np.linspace(0.05, 0.2, 6)))
    reflectance = np.random.default_rng(0).uniform(0, 1, (2, 6, 5, 7)).astype(np.float32)
    reflectance[0, :, 1, 2] = np.nan
    reflectance[1, 4] = np.nan
    scaled = recipe.normalise(torch.from_numpy(reflectance)).numpy()
    for i, j, y, x in np.ndindex(reflectance.shape):
        value = reflectance[i, j, y, x]
        expected = 0 if np.isnan(value) else (float(value) - recipe.mean[j]) / recipe.std[j]
        assert scaled[i, j, y, x] == pytest.approx(expected, abs=1e-5)
    assert scaled.dtype == np.float32


def test_ndvi_is_appended() -> None:
    recipe = a_recipe(derived=("ndvi",), mean=(0.0,) * 7, std=(1.0,) * 7)
    reflectance = np.full((6, 2, 2), 0.1, np.float32)
    reflectance[BANDS.index("nir")] = 0.3
    reflectance[:, 0, 0] = np.nan
    scaled = recipe.normalise(torch.from_numpy(reflectance)).numpy()
    assert scaled.shape == (7, 2, 2)
    assert scaled[6, 1, 1] == pytest.approx(0.5)
    assert (scaled[:, 0, 0] == 0).all()
