"""Scores of temporal tasks: exact chance, masks, confusion."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, confusion_matrix

from avcl_jax.evaluation.temporal import balanced_subset, score_task


def test_a_constant_answer_scores_exactly_chance_whatever_the_labels():
    labels = np.random.default_rng(0).choice(4, size=900, p=[0.7, 0.1, 0.1, 0.1])
    logits = np.tile([3.0, 0.0, 0.0, 0.0], (900, 1))
    score = score_task(logits, labels, np.ones(900, dtype=bool), seed=0)
    assert score.accuracy == score.chance == 0.25
    assert (score.confusion[:, 0] == score.confusion.sum(axis=1)).all()


def test_agrees_with_scikit_learn_on_balanced_labels_of_any_shape():
    rng = np.random.default_rng(1)
    labels = rng.permutation(np.arange(600) % 3).reshape(300, 2)
    logits = rng.normal(size=(300, 2, 3)) + np.eye(3)[labels]
    score = score_task(logits, labels, np.ones((300, 2), dtype=bool), seed=0)
    predicted = logits.argmax(axis=-1)
    np.testing.assert_array_equal(
        score.confusion, confusion_matrix(labels.ravel(), predicted.ravel())
    )
    assert score.accuracy == pytest.approx(
        balanced_accuracy_score(labels.ravel(), predicted.ravel())
    )
    assert score.accuracy == np.trace(score.confusion) / score.confusion.sum()


def test_items_outside_the_mask_do_not_count():
    labels = np.arange(400) % 2
    logits = np.eye(2)[labels]
    logits[200:] = np.nan
    mask = np.arange(400) < 200
    assert score_task(logits, labels, mask, seed=0).accuracy == 1.0
    logits[200:] = 1.0 - np.eye(2)[labels[200:]]
    assert score_task(logits, labels, np.ones(400, dtype=bool), seed=0).accuracy == 0.5
    with pytest.raises(ValueError, match="not finite"):
        score_task(np.full((4, 2), np.nan), np.arange(4) % 2, np.ones(4, dtype=bool), seed=0)


def test_the_balanced_subset_is_seeded_and_as_large_as_it_can_be():
    labels = np.array([0] * 30 + [1] * 12 + [2] * 20)
    mask = np.ones(62, dtype=bool)
    mask[40] = False  # eleven of class 1 remain
    chosen = balanced_subset(labels, mask, classes=3, seed=5)
    np.testing.assert_array_equal(np.bincount(labels[chosen]), [11, 11, 11])
    assert not chosen[40]
    np.testing.assert_array_equal(chosen, balanced_subset(labels, mask, classes=3, seed=5))
    assert (chosen != balanced_subset(labels, mask, classes=3, seed=6)).any()
    with pytest.raises(ValueError, match=r"\[30, 11, 20, 0\]"):
        balanced_subset(labels, mask, classes=4, seed=5)
