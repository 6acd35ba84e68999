"""A network for images without infrared: put into one of six bands, and started from packaged ImageNet weights."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minemap import models
from minemap.checkpoint import Checkpoint, Recipe, save
from minemap.errors import InputError
from minemap.sentinel2 import BANDS
from minemap.training import encoders
from minemap.training.config import make_config
from minemap.training.loop import MEAN, STD, make_recipe, start_network
from minemap.training.visible import combine, move_threshold

SMALL = {"encoder": "tu-regnetx_002", "group_width": 8}
ENCODER = "tu-tf_efficientnet_lite0"


def _checkpoint(folder: Path, threshold: float, bands: tuple[str, ...], **options: object) -> Checkpoint:
    torch.manual_seed(len(bands))
    options = {"in_channels": len(bands), **options}
    recipe = Recipe(
        name=folder.name,
        architecture="minec2fnet",
        options=options,
        bands=bands,
        mean=tuple(MEAN[b] for b in bands),
        std=tuple(STD[b] for b in bands),
        threshold=threshold,
        training={"imagenet": len(bands) == 3},
    )
    return save(folder, models.build("minec2fnet", **options), recipe)


@pytest.mark.parametrize("detail", [True, False])
def test_each_kind_of_image_keeps_its_answer_and_one_threshold_holds(tmp_path: Path, detail: bool) -> None:
    full = _checkpoint(tmp_path / "full", 0.6, BANDS, **SMALL)
    options = {"encoder": "resnet18", "gated_fusion": False, "detail": detail}
    visible = _checkpoint(tmp_path / "visible", 0.3, BANDS[:3], **options)
    both = combine(full, visible, tmp_path / "both")
    x = torch.randn(2, 6, 64, 64)
    rgb = torch.where(torch.arange(6)[:, None, None] < 3, x, 0)
    with torch.no_grad():
        network = both.network()
        assert torch.equal(network(x), full.network()(x))
        shown = network(rgb).sigmoid() >= both.recipe.threshold
        assert torch.equal(shown, visible.network()(x[:, :3]).sigmoid() >= visible.recipe.threshold)
        assert 0 < shown.float().mean() < 1
    assert both.recipe.threshold == 0.6
    assert both.recipe.training["visible"] == {"imagenet": True}


def test_another_threshold_is_not_that_of_images_without_infrared(tmp_path: Path) -> None:
    full = _checkpoint(tmp_path / "full", 0.6, BANDS, **SMALL)
    visible = _checkpoint(tmp_path / "visible", 0.3, BANDS[:3], encoder="resnet18", gated_fusion=False)
    both = combine(full, visible, tmp_path / "both").network()
    x = torch.randn(2, 6, 64, 64)
    rgb = torch.where(torch.arange(6)[:, None, None] < 3, x, 0)
    with torch.no_grad():
        before, shown = both(x), both(rgb).sigmoid() >= 0.6
        move_threshold(both, 0.6, 0.45)
        assert torch.equal(both(x), before)
        assert torch.equal(both(rgb).sigmoid() >= 0.45, shown)


def test_networks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    full = _checkpoint(tmp_path / "full", 0.6, BANDS, **SMALL)
    other = _checkpoint(tmp_path / "other", 0.3, BANDS[1:4], encoder="resnet18", gated_fusion=False)
    with pytest.raises(InputError, match="blue, green, red"):
        combine(full, other, tmp_path / "both")
    visible = _checkpoint(tmp_path / "visible", 0.3, BANDS[:3], encoder="resnet18", gated_fusion=False)
    scaled = save(tmp_path / "scaled", visible.network(), replace(visible.recipe, mean=(0.1, 0.1, 0.1)))
    with pytest.raises(InputError, match="otherwise"):
        combine(full, scaled, tmp_path / "both")
    assert not (tmp_path / "both").exists()


def test_packaged_weights_are_taken_with_bands_in_our_order() -> None:
    network = models.build("fpn", in_channels=6, encoder_name=ENCODER)
    encoders.load_imagenet(network.encoder, ENCODER, BANDS)
    origin = importlib.util.find_spec(encoders.PACKAGED[ENCODER]).origin
    (file,) = Path(origin).parent.glob("models/*.pth")
    stored = torch.load(file, weights_only=True)
    stem = network.encoder.model.conv_stem.weight
    for ours, theirs in ((0, 2), (1, 1), (2, 0)):  # blue, green, red of red, green, blue
        assert torch.equal(stem[:, ours], stored["_conv_stem.weight"][:, theirs])
    torch.testing.assert_close(stem[:, 3:], (stem[:, :3].mean(dim=1, keepdim=True) / 4).expand(-1, 3, -1, -1))
    few = models.build("fpn", in_channels=3, encoder_name=ENCODER).encoder
    encoders.load_imagenet(few, ENCODER, ("nir", "red", "ndvi"))  # by name, not by place
    assert torch.equal(few.model.conv_stem.weight, stem[:, [3, 2, 3]])
    last = network.encoder.model.blocks[6][0].bn3
    assert torch.equal(last.running_var, stored["_blocks.15._bn2.running_var"])


def test_training_starts_from_packaged_weights_when_asked() -> None:
    config = make_config(
        {"out": "nowhere", "bands": ["blue", "green", "red"], "encoder": ENCODER, "imagenet": True}
        | {"gated_fusion": False, "selection": "none"}
    )
    network = start_network(config, make_recipe(config), None)
    expected = models.build("fpn", in_channels=3, encoder_name=ENCODER).encoder
    encoders.load_imagenet(expected, ENCODER, BANDS[:3])
    assert all(torch.equal(a, b) for a, b in zip(network.encoder.parameters(), expected.parameters(), strict=True))


def test_a_fresh_student_starts_from_packaged_weights_beside_its_teacher(tmp_path: Path) -> None:
    teacher = models.build("fpn", in_channels=6, encoder_name=ENCODER).eval()
    config = make_config({"out": str(tmp_path), "encoder": ENCODER, "imagenet": True, "fresh": True})
    student = start_network(config, make_recipe(config), teacher)
    expected = models.build("fpn", in_channels=6, encoder_name=ENCODER).encoder
    encoders.load_imagenet(expected, ENCODER, BANDS)
    for ours, theirs in ((student.encoder, expected), (student.teacher_encoder, teacher.encoder)):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("architecture", ["unet", "minec2fnet", "minenetcd"])
def test_every_network_starts_from_imagenet(tmp_path: Path, architecture: str) -> None:
    options = {"architecture": architecture, "encoder": ENCODER, "imagenet": True}
    config = make_config({"out": str(tmp_path), **options})
    network = start_network(config, make_recipe(config), None)
    expected = models.build("fpn", in_channels=6, encoder_name=ENCODER).encoder
    encoders.load_imagenet(expected, ENCODER, BANDS)
    for encoder in (network.encoder, getattr(network, "teacher_encoder", expected)):
        assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), expected.parameters(), strict=True))


def test_weights_out_of_reach_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # else half a minute of retries
    config = make_config({"out": str(tmp_path), "architecture": "minenetcd", "encoder": "resnet18", "imagenet": True})
    with pytest.raises(InputError, match="no ImageNet weights of resnet18 within reach"):
        start_network(config, make_recipe(config), None)


@pytest.mark.parametrize("name", ["resnet", "tu-resnet", "tf_efficientnet_lite0"])
def test_an_encoder_that_does_not_exist(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"no encoder '{name}': take one of"):
        make_recipe(make_config({"out": str(tmp_path), "encoder": name}))


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(encoders.PACKAGED, ENCODER, "no_such_package")
    with pytest.raises(InputError, match=r"no_such_package: install minemap\[imagenet\]"):
        encoders.load_imagenet(None, ENCODER, BANDS)
