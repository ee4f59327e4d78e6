"""Retrieval against scikit-learn, against a loop, and against a collapsed encoder."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import top_k_accuracy_score
from sklearn.neighbors import NearestNeighbors

from avcl_jax.evaluation.retrieval import (
    first_relevant_ranks,
    nearest,
    normalise,
    retrieval_scores,
)


def _paired(rng: np.random.Generator, items: int, dim: int, noise: float):
    gallery = rng.normal(size=(items, dim))
    return gallery + noise * rng.normal(size=gallery.shape), gallery


def test_recall_is_scikit_learns_top_k_accuracy():
    queries, gallery = _paired(np.random.default_rng(0), 83, 16, 1.5)
    ids = np.arange(83)
    scores = retrieval_scores(
        queries, gallery, query_ids=ids, gallery_ids=ids, recall_at=(5, 10, 50)
    )
    similarity = normalise(queries) @ normalise(gallery).T
    assert 0.1 < scores.recall(1) < 0.9
    for k in (1, 5, 10, 50):
        assert scores.recall(k) == top_k_accuracy_score(ids, similarity, k=k)
        assert scores.chance[k] == pytest.approx(k / 83)
    order = np.argsort(-similarity, axis=1)
    ranks = 1 + np.argmax(order == ids[:, None], axis=1)
    np.testing.assert_array_equal(scores.ranks, ranks)


def test_neighbours_are_scikit_learns():
    queries, gallery = _paired(np.random.default_rng(1), 60, 8, 1.0)
    reference = NearestNeighbors(n_neighbors=9, metric="cosine", algorithm="brute").fit(gallery)
    expected = reference.kneighbors(queries, return_distance=False)
    np.testing.assert_array_equal(nearest(queries, gallery, k=9), expected)


def test_classes_count_as_relevant_and_chance_is_the_frequency_of_random_orders():
    rng = np.random.default_rng(2)
    gallery_ids = rng.integers(0, 5, size=40)
    query_ids = np.arange(5)
    queries, gallery = rng.normal(size=(5, 6)), rng.normal(size=(40, 6))
    ranks = first_relevant_ranks(queries, gallery, query_ids=query_ids, gallery_ids=gallery_ids)
    similarity = normalise(queries) @ normalise(gallery).T
    for query in range(5):
        order = np.argsort(-similarity[query])
        expected = 1 + np.flatnonzero(gallery_ids[order] == query_ids[query])[0]
        assert ranks[query] == expected
    scores = retrieval_scores(
        queries, gallery, query_ids=query_ids, gallery_ids=gallery_ids, recall_at=(3,)
    )
    shuffled = np.stack([rng.permutation(gallery_ids)[:3] for _ in range(20_000)])
    hit = (shuffled[:, None, :] == query_ids[None, :, None]).any(axis=-1).mean()
    assert scores.chance[3] == pytest.approx(hit, abs=0.01)


def test_a_collapsed_encoder_ranks_last_not_first():
    collapsed = np.tile(np.random.default_rng(3).normal(size=(1, 128)), (50, 1))
    collapsed += 1e-8 * np.random.default_rng(4).normal(size=collapsed.shape)
    ids = np.arange(50)
    scores = retrieval_scores(collapsed, collapsed, query_ids=ids, gallery_ids=ids, recall_at=(5,))
    assert scores.recall(1) == 0.0
    assert scores.recall(5) == 0.0
    assert (scores.ranks == 50).all()


def test_outcomes_are_by_query_and_metrics_have_their_chance():
    eye, ids = np.eye(12), np.arange(12)
    scores = retrieval_scores(eye, eye, query_ids=ids, gallery_ids=ids, recall_at=(5, 20))
    values, metrics = scores.outcomes("_x", "x_{}", "a title")
    assert set(values) == {"rank_x", "hit1_x", "hit5_x"}  # 20 is more than the gallery
    assert values["hit5_x"].tolist() == [1.0] * 12
    assert {name: metric.chance for name, metric in metrics.items()} == {
        "x_r1": pytest.approx(1 / 12),
        "x_r5": pytest.approx(5 / 12),
    }
    assert metrics["x_r5"].inputs == ("hit5_x",)


def test_bad_input_says_what_and_which():
    eye, ids = np.eye(4), np.arange(4)
    with pytest.raises(ValueError, match="first identity 9"):
        first_relevant_ranks(eye, eye, query_ids=np.array([0, 1, 2, 9]), gallery_ids=ids)
    bad = eye.copy()
    bad[2, 0] = np.nan
    with pytest.raises(ValueError, match="first row 2"):
        first_relevant_ranks(bad, eye, query_ids=ids, gallery_ids=ids)
    with pytest.raises(ValueError, match="4-d and the gallery is 3-d"):
        first_relevant_ranks(eye, eye[:, :3], query_ids=ids, gallery_ids=ids)
