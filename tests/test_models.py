"""Networks: shapes, size, the frozen encoder, the identity start, and each part against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from minemap import models
from minemap.errors import InputError
from minemap.models.fill import fill_absent
from minemap.models.minec2fnet import (
    CBAM,
    DetailHead,
    GatedFusion,
    MineC2FNet,
    Refinement,
    channel_mean,
    spatial_mean,
    teacher_network,
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def _shake(network: torch.nn.Module, scale: float = 0.05) -> None:
    for p in network.parameters():
        p.data += scale * torch.randn_like(p)


@pytest.mark.parametrize(("architecture", "dates"), [(a, 1 + (a == "minenetcd")) for a in models.ARCHITECTURES])
def test_contract(architecture: str, dates: int) -> None:
    network = models.build(architecture, in_channels=6).eval().to(memory_format=torch.channels_last)
    x = torch.randn(2, 6 * dates, 64, 96)
    with torch.no_grad():
        logits = network(x)
        with torch.autocast("cpu", torch.bfloat16):
            rough = network(x.to(memory_format=torch.channels_last))
    assert logits.shape == (2, 1, 64, 96)
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()
    assert (rough.float() - logits).abs().max() < 0.3 * logits.std() + 0.05


def test_unknown_architecture_names_the_known() -> None:
    with pytest.raises(InputError, match="minec2fnet"):
        models.build("surprise")


def test_whole_network_is_below_25_million_parameters() -> None:
    assert sum(p.numel() for p in MineC2FNet(detail=True).parameters()) < 25e6


PARTS = ("gated_fusion", "cbam", "refinement", "detail")


@pytest.mark.parametrize("on", [(), PARTS[:1], PARTS[:2], PARTS[:3], PARTS, PARTS[1:3]])
def test_starts_as_its_teacher(on: tuple[str, ...]) -> None:
    teacher = teacher_network().eval()
    switches = {part: part in on for part in PARTS}
    student = MineC2FNet(**switches).start_from(teacher).eval()
    x = torch.randn(2, 6, 64, 64)
    with torch.no_grad():
        assert torch.allclose(student(x), teacher(x), atol=1e-5)


def test_all_off_is_the_plain_fpn() -> None:
    student = MineC2FNet(gated_fusion=False, cbam=False, refinement=False)
    assert sum(p.numel() for p in student.parameters()) == sum(p.numel() for p in teacher_network().parameters())


def test_frozen_encoder_never_moves() -> None:
    teacher = teacher_network()
    before = {k: v.clone() for k, v in teacher.encoder.state_dict().items()}
    student = MineC2FNet().start_from(teacher, fresh=True).train()
    optimiser = torch.optim.AdamW(student.parameters(), lr=1e-2)
    for _ in range(3):
        optimiser.zero_grad()
        student(torch.randn(2, 6, 64, 64)).square().mean().backward()
        optimiser.step()
    assert student.training
    assert not student.teacher_encoder.training
    assert all(p.grad is None for p in student.teacher_encoder.parameters())
    after = student.teacher_encoder.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    moved = student.encoder.state_dict()
    assert not all(torch.equal(before[k], moved[k]) for k in before)


def test_given_teacher_features_change_nothing() -> None:
    student = MineC2FNet().eval()
    _shake(student.levels)
    x = torch.randn(1, 6, 64, 64)
    with torch.no_grad():
        assert torch.equal(student(x), student(x, student.teacher_features(x)))


def test_detail_head_sees_single_pixels() -> None:
    """One changed input pixel may change the logits nearby at full resolution, not only in blocks of four."""
    head = DetailHead(6, 8, 8)
    _shake(head, 0.3)
    x, shallow, deep = torch.randn(1, 6, 32, 32), torch.randn(1, 8, 16, 16), torch.randn(1, 8, 8, 8)
    logits = torch.zeros(1, 1, 32, 32)
    changed = x.clone()
    changed[0, :, 16, 16] += 3
    with torch.no_grad():
        moved = (head(changed, shallow, deep, logits) != head(x, shallow, deep, logits))[0, 0].nonzero()
    assert len(moved)
    assert (moved - 16).abs().max() <= 3


def test_gated_fusion_is_a_convolution() -> None:
    fusion = GatedFusion(8)
    _shake(fusion, 1)
    a, b = torch.randn(2, 8, 5, 6), torch.randn(2, 8, 5, 6)
    gate = torch.sigmoid(F.conv2d(torch.cat([a, b], 1), fusion.weight.reshape(1, 16, 1, 1), fusion.bias))
    assert torch.allclose(fusion(a, b), gate * a + (1 - gate) * b, atol=1e-5)


def test_cbam_against_numpy() -> None:
    cbam = CBAM(32)
    _shake(cbam, 0.5)
    x = torch.randn(1, 32, 4, 5)
    v = x[0].numpy()
    w1, b1, w2, b2 = (p.detach().numpy() for p in cbam.channel.mlp.parameters())
    mlp = lambda vector: w2 @ np.maximum(w1 @ vector + b1, 0) + b2  # noqa: E731
    twice_sigmoid = lambda z: 2 / (1 + np.exp(-z))  # noqa: E731
    v = v * twice_sigmoid(mlp(v.mean((1, 2))) + mlp(v.max((1, 2))))[:, None, None]
    summary = np.pad(np.stack([v.mean(0), v.max(0)]), ((0, 0), (3, 3), (3, 3)))
    kernel, bias = (p.detach().numpy() for p in cbam.spatial.conv.parameters())
    space = [[(summary[:, i : i + 7, j : j + 7] * kernel[0]).sum() for j in range(5)] for i in range(4)]
    expected = v * twice_sigmoid(np.array(space) + bias)
    answer = cbam(x).detach().numpy()[0]
    assert np.allclose(answer, expected, atol=1e-4)


def test_refinement_is_repeated_residual() -> None:
    refinement = Refinement(32, steps=2, group_width=16)
    _shake(refinement, 0.2)
    x = torch.randn(1, 32, 6, 6)
    expected = x
    for conv, attention in zip(refinement.convs, refinement.attentions, strict=True):
        expected = expected + attention(F.conv2d(expected, conv.weight, conv.bias, padding=1, groups=2))
    assert torch.allclose(refinement(x), expected, atol=1e-5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_means(memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 5, 6, 7).contiguous(memory_format=memory_format)
    assert torch.allclose(spatial_mean(x), x.mean((2, 3)), atol=1e-6)
    assert torch.allclose(channel_mean(x), x.mean(1, keepdim=True), atol=1e-6)


def test_filling_around_a_chip_is_reflection() -> None:
    chip = torch.rand(1, 3, 20, 24) + 0.1
    pads = (30, 42, 50, 26)  # left, right, top, bottom: more than once over
    expected = np.pad(chip.numpy(), [(0, 0), (0, 0), (50, 26), (30, 42)], mode="reflect")
    assert np.array_equal(fill_absent(F.pad(chip, pads)).numpy(), expected)


def test_filling_keeps_what_was_observed_and_leaves_no_hole() -> None:
    x = torch.rand(3, 6, 40, 40) + 0.1
    x[0, :, torch.rand(40, 40) < 0.9] = 0
    x[1, 3:] = 0
    x[1, :, 10:20, 5:33] = 0
    filled = fill_absent(x)
    seen = (x != 0).any(dim=1)
    for i in range(3):
        assert torch.equal(filled[i][:, seen[i]], x[i][:, seen[i]])
        assert (filled[i, :3] > 0).all()
    assert (filled[1, 3:] == 0).all()
    assert torch.equal(fill_absent(x[:1]), filled[:1])


def test_surroundings_that_are_absent_equal_reflected_ones() -> None:
    student = MineC2FNet().eval()
    _shake(student.levels)
    chip = torch.randn(1, 6, 48, 48)
    reflected = torch.from_numpy(np.pad(chip.numpy(), [(0, 0), (0, 0), (24, 24), (24, 24)], mode="reflect"))
    with torch.no_grad():
        assert torch.equal(student(F.pad(chip, (24, 24, 24, 24))), student(reflected))


def test_nothing_observed_is_finite() -> None:
    student = MineC2FNet().eval()
    _shake(student.levels)
    with torch.no_grad():
        assert torch.isfinite(student(torch.zeros(1, 6, 64, 64))).all()


SMALL = {"encoder": "tu-regnetx_002", "group_width": 8}
VISIBLE = {"encoder": "resnet18", "gated_fusion": False, "detail": True}


def _mixed() -> torch.Tensor:
    """Six bands, RGB alone, no SWIR, nothing."""
    x = torch.randn(4, 6, 64, 64)
    x[1, 3:] = 0
    x[2, 4:] = 0
    x[3] = 0
    return x


def test_images_without_infrared_have_a_network_of_their_own() -> None:
    network = MineC2FNet(**SMALL, visible=VISIBLE).eval()
    for part in (network.levels, network.visible.levels):
        _shake(part)
    x = _mixed()
    with torch.no_grad():
        answer = network(x)
        assert torch.equal(answer[1], network.visible(x[:, :3])[1])
        for i in (0, 2, 3):
            assert torch.equal(answer[i], network._answer(x, None)[i])
        assert torch.equal(network(x[[1, 1]])[0], network.visible(x[[1, 1]][:, :3])[0])


def test_a_network_for_the_visible_is_folded_too() -> None:
    from minemap.models.folding import for_inference

    network = MineC2FNet(**SMALL, visible=VISIBLE | {"encoder": "tu-tf_efficientnet_lite0"}).eval()
    x = _mixed()
    with torch.no_grad():
        before = network(x)
        assert torch.allclose(for_inference(network)(x), before, atol=1e-4 * before.abs().max().item(), rtol=0)


@pytest.mark.parametrize(
    ("architecture", "encoder", "norms"),
    [
        ("minec2fnet", "densenet121", 124),
        ("minec2fnet", "tu-tf_efficientnet_lite0", 0),
        ("fpn", "resnet34", 0),
        ("unet", "resnet50", 0),
    ],
)
def test_a_network_folded_for_inference_is_the_same_function(architecture: str, encoder: str, norms: int) -> None:
    from minemap.models.folding import for_inference

    name = "encoder" if architecture == "minec2fnet" else "encoder_name"
    network = models.build(architecture, in_channels=6, **{name: encoder}).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 6, 64, 64)
    with torch.no_grad():
        before = network(x)
        folded = for_inference(network)
        assert torch.allclose(folded(x), before, atol=1e-4 * before.abs().max().item(), rtol=0)
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules()) == norms
