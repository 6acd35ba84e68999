"""Scores against torchmetrics and against counting by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torchmetrics.functional.classification import (
    binary_accuracy,
    binary_calibration_error,
    binary_jaccard_index,
    binary_precision,
    binary_recall,
    multiclass_f1_score,
    multiclass_jaccard_index,
)

from minemap.training import metrics


@pytest.fixture
def case() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    mask = (rng.random((4, 30, 33)) < 0.3).astype(np.uint8)
    probability = np.clip(rng.normal(0.3 + 0.3 * mask, 0.2), 0.001, 0.999).astype(np.float32)
    mask[rng.random(mask.shape) < 0.1] = metrics.IGNORE
    return probability, mask


def test_pooled_scores_equal_torchmetrics(case: tuple[np.ndarray, np.ndarray]) -> None:
    probability, mask = case
    found = metrics.report(probability, mask, 0.5)
    p, t = torch.from_numpy(probability), torch.from_numpy(mask).long()
    expected = {
        "accuracy": binary_accuracy(p, t, ignore_index=255),
        "mine_iou": binary_jaccard_index(p, t, ignore_index=255),
        "precision": binary_precision(p, t, ignore_index=255),
        "recall": binary_recall(p, t, ignore_index=255),
        "miou": multiclass_jaccard_index((p >= 0.5).long(), t, 2, ignore_index=255),
        "mf1": multiclass_f1_score((p >= 0.5).long(), t, 2, ignore_index=255),
        "ece": binary_calibration_error(p, t, n_bins=15, ignore_index=255),
    }
    for key, value in expected.items():
        assert found[key] == pytest.approx(100 * float(value), abs=0.01), key


def test_the_papers_matrix() -> None:
    """The matrix in the paper's supplement gives these scores, not those that its table prints."""
    found = metrics.scores(np.array([6810, 352, 415, 2423]))
    assert found["accuracy"] == pytest.approx(0.9233, abs=1e-4)
    assert found["mf1"] == pytest.approx(0.905, abs=5e-4)
    assert found["miou"] == pytest.approx(0.829, abs=5e-4)


@settings(max_examples=50, deadline=None)
@given(arrays(np.uint8, (3, 6, 7), elements=st.sampled_from([0, 1, 255])), st.integers(0, 2**16))
def test_confusion_counts_every_decided_pixel_once(mask: np.ndarray, seed: int) -> None:
    predicted = np.random.default_rng(seed).random(mask.shape) < 0.5
    counts = metrics.confusion(predicted, mask)
    assert counts.sum() == (mask != 255).sum()
    assert counts[:, 3].sum() == sum(1 for p, m in zip(predicted.flat, mask.flat, strict=True) if p and m == 1)


def test_mean_over_images_is_a_mean_of_scores(case: tuple[np.ndarray, np.ndarray]) -> None:
    probability, mask = case
    single = [metrics.report(probability[[i]], mask[[i]], 0.5)["miou"] for i in range(len(mask))]
    assert metrics.report(probability, mask, 0.5)["miou_image"] == pytest.approx(np.mean(single))


def test_a_class_that_nobody_has_does_not_count() -> None:
    empty = metrics.report(np.zeros((1, 4, 4)), np.zeros((1, 4, 4), np.uint8), 0.5)
    assert empty["miou"] == 100
    assert np.isnan(empty["mine_iou"])


def test_boundary_f1_of_a_shifted_square() -> None:
    mask = np.zeros((1, 40, 40), np.uint8)
    mask[0, 10:20, 10:20] = 1
    shifted = {d: np.roll(mask == 1, d, axis=2) for d in (0, 2, 5)}
    scores = {d: metrics.boundary_f1(p, mask) for d, p in shifted.items()}
    assert scores[0] == scores[2] == 1  # tolerance 2
    # By hand, shifted by 5: of 36 boundary pixels, 7 of 10 on each long side and the 2 + 2 next to them at one end.
    assert scores[5] == pytest.approx((7 + 7 + 2 + 2) / 36)


def test_boundary_ignores_the_edge_and_undecided_pixels() -> None:
    mask = np.ones((1, 20, 20), np.uint8)
    assert np.isnan(metrics.boundary_f1(mask == 1, mask))
    square = np.pad(np.ones((1, 8, 8), np.uint8), ((0, 0), (6, 6), (6, 6)))
    assert metrics.boundary_f1(np.zeros((1, 20, 20), bool), square) == 0  # nothing found of what is there
    assert metrics.boundary_f1(square == 1, np.zeros_like(mask)) == 0
    mask[0, :, 10:] = metrics.IGNORE
    assert np.isnan(metrics.boundary_f1(np.ones((1, 20, 20), bool), mask))


def test_reliability_of_a_calibrated_guess() -> None:
    rng = np.random.default_rng(0)
    probability = rng.random((10, 200, 200)).astype(np.float32)
    mask = (rng.random(probability.shape) < probability).astype(np.uint8)
    table = metrics.reliability(probability, mask)
    assert np.allclose(table[:, 1], table[:, 2], atol=0.02)
    assert metrics.calibration_error(probability, mask) < 0.01
    assert table[:, 0].sum() == mask.size


def test_area_unbiased_threshold(case: tuple[np.ndarray, np.ndarray]) -> None:
    probability, mask = case
    threshold = metrics.area_unbiased_threshold(probability, mask)
    counted = mask != metrics.IGNORE
    assert (probability[counted] >= threshold).sum() == pytest.approx((mask == 1).sum(), abs=2)
