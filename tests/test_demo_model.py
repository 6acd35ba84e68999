"""The demo's checkpoint and how it is made."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from minemap.checkpoint import load_model
from minemap.models.minec2fnet import MineC2FNet
from minemap.sentinel2 import BANDS
from minemap.training import demo_model
from minemap.training.losses import IGNORE


@pytest.fixture(scope="module")
def scene() -> demo_model.Scene:
    return demo_model.make_scene(3, 512)


def test_a_training_scene_is_a_composite_with_its_truth(scene: demo_model.Scene) -> None:
    assert scene.image.shape == (len(BANDS), 512, 512) and scene.mask.shape == (512, 512)
    unseen = np.isnan(scene.image).any(axis=0)
    np.testing.assert_array_equal(scene.mask == IGNORE, unseen)
    assert 0.01 < (scene.mask == 1).mean() < 0.1
    assert np.nanmin(scene.image) > 0 and np.nanmax(scene.image) < 0.8


def test_windows_carry_their_masks_along(scene: demo_model.Scene) -> None:
    rng, mines = np.random.default_rng(0), 0
    for _ in range(40):
        image, mask = demo_model.window_of(scene, 192, rng)
        assert image.shape == (len(BANDS), 192, 192) and mask.shape == (192, 192)
        np.testing.assert_array_equal(np.isnan(image[0]), mask == IGNORE)
        mines += bool((mask == 1).any())
    assert mines >= 15


def test_training_moves_all_but_the_frozen_encoder(
    scene: demo_model.Scene,
) -> None:
    torch.manual_seed(0)
    recipe = demo_model.make_recipe([scene])
    network = MineC2FNet(**demo_model.OPTIONS)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    demo_model.fit(network, [scene], recipe, demo_model.Stage("test", 2, 2, 64, 1e-3))
    moved = {k.split(".")[0] for k, v in network.state_dict().items() if not torch.equal(v, before[k])}
    assert {"encoder", "decoder", "head", "levels"} <= moved
    assert "teacher_encoder" not in moved


def test_bundled_weights_are_small_and_say_what_they_are() -> None:
    checkpoint = load_model(demo_model.NAME)
    assert sum(file.stat().st_size for file in checkpoint.path.iterdir()) < 25e6
    assert "of no use on real imagery" in checkpoint.recipe.training["about"]
    assert "of no use on real imagery" in " ".join((checkpoint.path / "README.md").read_text().split())
    assert checkpoint.recipe.options == demo_model.OPTIONS
    assert isinstance(checkpoint.network(), MineC2FNet)


def test_bundled_weights_find_the_mines_of_a_seed_that_training_did_not_see(scene: demo_model.Scene) -> None:
    assert 3 not in demo_model.TRAINING_SEEDS
    checkpoint = load_model(demo_model.NAME)
    assert demo_model.intersection_over_union(checkpoint.network(), checkpoint.recipe, scene) > 0.7
