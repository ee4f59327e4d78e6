"""Metrics against scikit-learn and by hand, with ties in worst-case order."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    roc_auc_score,
    top_k_accuracy_score,
)

from avcl_jax.evaluation.statistics import (
    average_precision,
    class_mean,
    d_prime,
    micro_average_precision,
    recall_at_precision,
    roc_auc,
    top_k_hits,
)


def _scores(seed: int, n: int = 60, classes: int = 7) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    scores = rng.permutation(n * classes).reshape(n, classes) / (n * classes)  # no two are equal
    return scores, rng.integers(0, classes, n)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_without_ties_top_k_and_class_mean_are_those_of_sklearn(seed: int) -> None:
    scores, labels = _scores(seed)
    for k in (1, 3, 5):
        expected = top_k_accuracy_score(labels, scores, k=k, labels=range(7))
        assert top_k_hits(scores, labels, k).mean() == pytest.approx(expected)
    hits = top_k_hits(scores, labels, 1)
    expected = balanced_accuracy_score(labels, scores.argmax(axis=1))
    assert class_mean(hits, labels) == pytest.approx(expected)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_without_ties_average_precision_and_auc_are_those_of_sklearn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, relevant = rng.permutation(80) / 80, rng.random(80) < 0.3
    relevant[:2] = True, False
    assert average_precision(scores, relevant) == pytest.approx(
        average_precision_score(relevant, scores)
    )
    assert roc_auc(scores, relevant) == pytest.approx(roc_auc_score(relevant, scores))
    # All queries findable, one answer each: µAP is the average precision scaled by what was found.
    share = relevant.mean()
    answers = scores[:, None], relevant[:, None], np.ones(80, bool)
    assert micro_average_precision(*answers) == pytest.approx(
        average_precision_score(relevant, scores) * share
    )


def test_auc_with_ties_is_that_of_sklearn() -> None:
    scores, relevant = np.array([1, 1, 2, 2, 3, 0]), np.array([1, 0, 1, 0, 1, 0], bool)
    assert roc_auc(scores, relevant) == pytest.approx(roc_auc_score(relevant, scores))


def test_ties_stand_before_what_is_right() -> None:
    constant, labels = np.zeros((4, 5)), np.array([0, 1, 2, 3])
    assert top_k_hits(constant, labels, 4).sum() == 0
    assert top_k_hits(constant, labels, 5).sum() == 4
    # Two of four relevant, all tied: they stand at ranks 3 and 4.
    relevant = np.array([True, False, True, False])
    assert average_precision(np.zeros(4), relevant) == pytest.approx((1 / 3 + 2 / 4) / 2)
    assert roc_auc(np.zeros(4), relevant) == 0.5


def test_known_values() -> None:
    relevant = np.array([1, 0, 1, 0, 0], bool)
    perfect = np.array([5.0, 1, 4, 2, 3])
    assert average_precision(perfect, relevant) == 1
    assert roc_auc(perfect, relevant) == 1
    assert roc_auc(-perfect, relevant) == 0
    assert average_precision(-perfect, relevant) == pytest.approx((1 / 4 + 2 / 5) / 2)
    assert np.isnan(average_precision(perfect, np.zeros(5, bool)))
    assert np.isnan([roc_auc(perfect, np.full(5, all_of_them)) for all_of_them in (0, 1)]).all()
    assert d_prime(0.5) == 0
    assert d_prime(0.9) == pytest.approx(1.8123876, abs=1e-6)  # √2 · 1.2815516
    assert [d_prime(1.0), d_prime(0.0)] == pytest.approx([6.72236, -6.72236], abs=1e-4)


def test_answers_to_queries_without_a_source_cost_precision() -> None:
    # By score: right, distractor, right; of four findable queries one is never answered right, and
    # one not at all.
    scores = np.array([[0.9, -np.inf], [0.8, 0.7], [0.1, -np.inf], [-np.inf, -np.inf]])
    correct = np.array([[1, 0], [0, 1], [0, 0], [0, 0]], bool)
    answers = scores, correct, np.ones(4, bool)
    assert micro_average_precision(*answers) == pytest.approx((1 / 1 + 2 / 3) / 4)
    assert recall_at_precision(*answers, precision=0.9) == 0.25
    assert recall_at_precision(*answers, precision=2 / 3) == 0.5
    # Answers of one score pass together: no threshold lies between them.
    tied, one = np.array([[0.9], [0.9]]), np.array([True, False])
    assert recall_at_precision(tied, one[:, None], one, precision=0.9) == 0
    assert recall_at_precision(tied, one[:, None], one, precision=0.5) == 1
    assert micro_average_precision(tied, one[:, None], one) == 0.5
    nothing = tied, np.zeros((2, 1), bool)
    for metric in (micro_average_precision, functools.partial(recall_at_precision, precision=0.9)):
        assert metric(*nothing, one) == 0
        assert np.isnan(metric(*nothing, one & False))


def test_a_score_that_is_not_finite_is_no_hit() -> None:
    with pytest.raises(ValueError, match="2 scores are not finite"):
        top_k_hits(np.full((1, 2), np.nan), np.array([0]), 1)
