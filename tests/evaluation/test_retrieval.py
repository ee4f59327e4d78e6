"""Ranking against scikit-learn, against a loop, and against encoders that know nothing."""

from __future__ import annotations

import types

import numpy as np
import pytest
from sklearn.metrics import top_k_accuracy_score
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.neighbors import NearestNeighbors

from avcl_jax.evaluation import retrieval
from avcl_jax.evaluation.protocol import point_values
from avcl_jax.evaluation.retrieval import (
    chance_recall,
    measure_cross_modal,
    nearest,
    rank_queries,
)


def _paired(rng: np.random.Generator, items: int, dim: int, noise: float):
    gallery = rng.normal(size=(items, dim))
    return gallery + noise * rng.normal(size=gallery.shape), gallery


def _ranks(queries, gallery, ids, gallery_ids):
    sides = {"query_ids": ids, "gallery_ids": gallery_ids}
    return rank_queries(queries, gallery, **sides, recall_at=())[0]["rank"]


def test_recall_is_scikit_learns_top_k_accuracy_and_has_its_chance():
    queries, gallery = _paired(np.random.default_rng(0), 83, 16, 1.5)
    ids = np.arange(83)
    values, metrics = rank_queries(
        queries,
        gallery,
        query_ids=ids,
        gallery_ids=ids,
        recall_at=(5, 10, 82, 84),
        suffix="_x",
        what=", a title",
    )
    similarity = cosine_similarity(queries, gallery)
    assert set(metrics) == {1, 5, 10, 82}  # 84 is more than the gallery
    assert values.keys() == {"rank_x", "hit1_x", "hit5_x", "hit10_x", "hit82_x"}
    assert 0.1 < values["hit1_x"].mean() < 0.9
    for k, metric in metrics.items():
        assert values[f"hit{k}_x"].mean() == top_k_accuracy_score(ids, similarity, k=k)
        assert metric.chance == pytest.approx(k / 83)
        assert (metric.kind, metric.inputs, metric.what) == (
            "mean",
            (f"hit{k}_x",),
            f"R@{k}, a title",
        )
        assert metric.headline == (k in (1, 5))
    order = np.argsort(-similarity, axis=1)
    np.testing.assert_array_equal(values["rank_x"], 1 + np.argmax(order == ids[:, None], axis=1))


def test_neighbours_are_scikit_learns():
    queries, gallery = _paired(np.random.default_rng(1), 60, 8, 1.0)
    reference = NearestNeighbors(n_neighbors=9, metric="cosine", algorithm="brute").fit(gallery)
    expected = reference.kneighbors(queries, return_distance=False)
    np.testing.assert_array_equal(nearest(queries, gallery, k=9), expected)
    assert nearest(queries, gallery, k=61).shape == (60, 60)


def test_chance_is_the_frequency_of_random_orders():
    rng = np.random.default_rng(2)
    gallery_ids, query_ids = rng.integers(0, 5, size=40), np.arange(5)
    shuffled = np.stack([rng.permutation(gallery_ids)[:3] for _ in range(20_000)])
    hit = (shuffled[:, None, :] == query_ids[None, :, None]).any(axis=-1).mean()
    chance = chance_recall(query_ids, gallery_ids, (3, 40))
    assert chance == {3: pytest.approx(hit, abs=0.01), 40: 1.0}


@pytest.mark.parametrize("compared", [61 * 7, 1, 10**6])
def test_ranks_are_those_of_a_loop_whatever_the_blocks(compared, monkeypatch):
    monkeypatch.setattr(retrieval, "_COMPARED", compared)
    rng = np.random.default_rng(0)
    queries, gallery = rng.normal(size=(30, 5)), rng.normal(size=(61, 5))
    gallery[40:] = gallery[:21]  # equal items are ties
    ids, gallery_ids = rng.integers(0, 9, 30), rng.integers(0, 9, 61)
    ranks = _ranks(queries, gallery, ids, gallery_ids)
    similarity = cosine_similarity(queries, gallery)
    for query in range(30):
        right = gallery_ids == ids[query]
        above = (similarity[query] >= similarity[query][right].max() - 1e-6) & ~right
        assert ranks[query] == 1 + above.sum()


def _cross_modal(video, audio, recall_at=(1, 5), has_audio=None):
    """Metrics of records with these embeddings, by name, and outcomes."""
    count = len(video)
    features = {
        "has_video": np.ones(count, bool),
        "has_audio": np.ones(count, bool) if has_audio is None else has_audio,
        "record_index": np.arange(count),
        "x/video_embeddings": video,
        "x/audio_embeddings": audio,
    }
    records = types.SimpleNamespace(
        record_ids=[f"record {n}" for n in range(count)],
        sources=[f"source {n // 2}" for n in range(count)],
        num_selected=count + 1,
    )
    return measure_cross_modal(records, features, "x", recall_at)


def test_perfect_random_and_collapsed_embeddings_find_what_they_should():
    rng = np.random.default_rng(0)
    eye, video = np.eye(40), rng.normal(size=(200, 8))
    # Almost equal, as rounding leaves a collapsed encoder.
    collapsed = np.tile(rng.normal(size=(1, 128)), (40, 1)) + 1e-8 * rng.normal(size=(40, 128))
    for embeddings, low, high in (
        ((eye, eye), 1, 1),
        ((rng.normal(size=(40, 8)), rng.normal(size=(40, 8))), 10, 31),
        ((video, video[rng.permutation(200)]), 85, 116),
        ((collapsed, collapsed), 40, 40),
    ):
        measured = _cross_modal(*embeddings)
        values, gallery = point_values(measured), len(embeddings[0])
        for way in ("audio_to_video", "video_to_audio"):
            assert low <= values[f"{way}_median_rank"] <= high
            assert measured.metrics[f"{way}_median_rank"].chance == (gallery + 1) / 2
            if low in (1, gallery):
                assert set(measured.outcomes.values[f"rank_{way}"]) == {low}
                assert values[f"{way}_r5"] == (low == 1)
            else:
                assert abs(values[f"{way}_r5"] - 5 / gallery) < 0.15
                assert measured.metrics[f"{way}_r5"].chance == pytest.approx(5 / gallery)
    assert measured.details["embedding_std"]["video_embeddings"] < 1e-6


def test_a_record_without_audio_is_neither_query_nor_item():
    has_audio = np.arange(6) != 2
    measured = _cross_modal(np.eye(6), np.eye(6), has_audio=has_audio)
    assert measured.outcomes.units == [f"record {n}" for n in (0, 1, 3, 4, 5)]
    assert measured.outcomes.sources == [f"source {n // 2}" for n in (0, 1, 3, 4, 5)]
    assert (measured.details["gallery"], measured.details["left_out"]) == (5, 2)
    assert measured.metrics["audio_to_video_r1"].chance == 1 / 5
    nothing = _cross_modal(np.eye(6), np.eye(6), has_audio=has_audio & False)
    assert (nothing.metrics, nothing.outcomes.units) == ({}, [])


def test_bad_input_says_what_and_which():
    eye, ids = np.eye(4), np.arange(4)
    bad = eye.copy()
    bad[2, 0] = np.nan
    with pytest.raises(ValueError, match="contains NaN"):
        _ranks(bad, eye, ids, ids)
