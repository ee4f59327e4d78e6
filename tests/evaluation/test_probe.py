"""Probes: what they reach, what they never see, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest

from avcl_jax.evaluation.metrics import gap_closed
from avcl_jax.evaluation.probe import linear_probe, trivial_statistics

SETTINGS = {"costs": (1e-3, 1e-1, 10.0), "folds": 3, "seed": 0}


def _gaussians(rng: np.random.Generator, items: int, distance: float):
    labels = np.arange(items) % 3
    features = rng.normal(size=(items, 10)) * 5.0 + 100.0
    features[:, :3] += distance * np.eye(3)[labels]
    return features, labels


def test_separable_classes_are_found_and_noise_is_not():
    rng = np.random.default_rng(0)
    for distance, low, high in ((60.0, 0.97, 1.0), (0.0, 0.2, 0.47)):
        train, test = _gaussians(rng, 240, distance), _gaussians(rng, 150, distance)
        result = linear_probe(*train, *test, train_groups=np.arange(240), **SETTINGS)
        assert low <= result.accuracy <= high
        assert result.chance == pytest.approx(1 / 3)
        assert result.confusion.sum() == 150
        assert np.trace(result.confusion) / 150 == pytest.approx(result.accuracy)


def test_the_cost_does_not_depend_on_the_test_items():
    rng = np.random.default_rng(1)
    train, test = _gaussians(rng, 120, 6.0), _gaussians(rng, 90, 6.0)
    groups = np.arange(120)
    first = linear_probe(*train, *test, train_groups=groups, **SETTINGS)
    shuffled = (test[0] * 7.0 - 3.0, rng.permutation(test[1]))
    second = linear_probe(*train, *shuffled, train_groups=groups, **SETTINGS)
    assert first.cost == second.cost
    assert first.cross_validation_accuracy == second.cross_validation_accuracy
    assert first.accuracy != second.accuracy


def test_clips_of_one_source_stay_in_one_fold():
    # Each source has a signature of its own and no class: with its clips on both sides of a fold a
    # probe recognises the source and looks far better than it is.
    rng = np.random.default_rng(2)
    sources = np.repeat(np.arange(30), 8)
    signatures = rng.normal(size=(30, 40))[sources] * 3.0
    features = signatures + 0.1 * rng.normal(size=(240, 40))
    labels = (np.arange(30) % 3)[sources]
    test = (rng.normal(size=(30, 40)), np.arange(30) % 3)
    whole = linear_probe(features, labels, *test, train_groups=sources, **SETTINGS)
    torn = linear_probe(features, labels, *test, train_groups=np.arange(240), **SETTINGS)
    assert torn.cross_validation_accuracy > 0.95
    assert whole.cross_validation_accuracy < 0.7


def test_unknown_labels_are_left_out():
    rng = np.random.default_rng(3)
    features, labels = _gaussians(rng, 120, 60.0)
    test_features, test_labels = _gaussians(rng, 60, 60.0)
    labels[:30], test_labels[:15] = -1, -1
    features[:30] = np.nan
    result = linear_probe(
        features, labels, test_features, test_labels, train_groups=np.arange(120), **SETTINGS
    )
    assert result.confusion.sum() == 45


def test_bad_input_says_what_and_which():
    rng = np.random.default_rng(4)
    features, labels = _gaussians(rng, 30, 1.0)
    groups = np.arange(30)
    with pytest.raises(ValueError, match=r"\[7\] never occur"):
        linear_probe(features, labels, features, np.full(30, 7), train_groups=groups, **SETTINGS)
    rare = np.where(np.arange(30) < 2, 2, labels % 2)
    with pytest.raises(ValueError, match="fewer than the 3 folds"):
        linear_probe(features, rare, features, rare, train_groups=groups, **SETTINGS)
    with pytest.raises(ValueError, match="no test item has a label"):
        linear_probe(features, labels, features, np.full(30, -1), train_groups=groups, **SETTINGS)


def test_gap_closed():
    assert gap_closed(0.4, 0.7, 0.9) == pytest.approx(0.6)
    assert gap_closed(0.4, 0.2, 0.9) == pytest.approx(-0.4)
    assert np.isnan(gap_closed(0.9, 0.95, 0.9))


def test_trivial_statistics_say_what_they_claim():
    video = np.zeros((2, 5, 12, 12, 3), dtype=np.uint8)
    video[..., 0] = 255
    video[:, ::2, 9:, :3] = (255, 255, 255)  # flickers in the bottom left corner only
    log_mel = np.tile(np.arange(4.0), (2, 6, 1))
    log_mel[1] += np.log(0.01)
    statistics = trivial_statistics(video, log_mel, cells=4)
    assert statistics["mean_colour"][0] == 1.0
    assert 0 < statistics["mean_colour"][1] == statistics["mean_colour"][2] < 0.1
    histogram = statistics["position_histogram"].reshape(4, 4)
    assert histogram[3, 0] == pytest.approx(1.0)
    full = 10 * np.log10(np.exp(np.arange(4.0)).sum())
    assert statistics["mean_loudness"] == pytest.approx([full - 10.0])
    np.testing.assert_allclose(statistics["mean_log_mel"], np.arange(4.0) + np.log(0.1))
