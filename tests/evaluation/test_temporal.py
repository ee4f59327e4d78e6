"""Scores of temporal tasks: exact chance, masks, confusion."""

from __future__ import annotations

import types

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, confusion_matrix

from avcl_jax.evaluation.protocol import point_values
from avcl_jax.evaluation.temporal import measure_tasks, score_task


def test_agrees_with_scikit_learn_on_balanced_labels_of_any_shape():
    rng = np.random.default_rng(1)
    labels = rng.permutation(np.arange(600) % 3).reshape(300, 2)
    logits = rng.normal(size=(300, 2, 3)) + np.eye(3)[labels]
    score = score_task(logits, labels, np.ones((300, 2), dtype=bool), seed=0)
    truth, predicted = labels.ravel(), logits.argmax(axis=-1).ravel()
    np.testing.assert_array_equal(score.confusion, confusion_matrix(truth, predicted))
    assert score.accuracy == pytest.approx(balanced_accuracy_score(truth, predicted))
    np.testing.assert_array_equal(score.correct, truth == predicted)


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


def test_the_scored_views_are_seeded_and_as_many_as_can_be():
    labels = np.array([0] * 30 + [1] * 12 + [2] * 20)
    mask = np.ones(62, dtype=bool)
    mask[40] = False  # eleven of class 1 remain

    def scored(seed: int, classes: int = 3) -> np.ndarray:
        return score_task(np.ones((62, classes)), labels, mask, seed=seed).scored

    np.testing.assert_array_equal(np.bincount(labels[scored(5)]), [11, 11, 11])
    assert not scored(5)[40]
    np.testing.assert_array_equal(scored(5), scored(5))
    assert (scored(5) != scored(6)).any()
    with pytest.raises(ValueError, match=r"balance 4 classes: .* have \[30, 11, 20, 0\]"):
        scored(5, classes=4)


def _task_arrays(rng, records=40, pairs=6):
    """Labels and masks of pairs of views, as `drawn_pairs` gives them, without logits."""
    shape = (records, pairs)
    arrays = {f"{task}_mask": np.ones(shape, bool) for task in ("speed", "direction", "order")}
    arrays["video_moves"] = np.ones(shape, bool)
    arrays |= {f"has_{m}": np.ones(shape, bool) for m in ("video", "audio")}
    arrays["order"] = rng.integers(0, 3, shape).astype(np.int32)
    for modality in ("video", "audio"):
        arrays[f"{modality}_speed"] = rng.integers(0, 4, (*shape, 2)).astype(np.int32)
        arrays[f"{modality}_direction"] = rng.integers(0, 2, (*shape, 2)).astype(np.int32)
    return arrays


class _Records(types.SimpleNamespace):
    """Records of which four lack a modality of a run of two, one of these for being too short."""

    num_too_short = 1

    def __len__(self) -> int:
        return len(self.record_ids)

    def lacking(self, modalities) -> range:
        assert modalities == ("video", "audio")
        return range(4)


def _measure(arrays):
    names = [str(n) for n in range(len(arrays["has_video"]))]
    config = types.SimpleNamespace(views=types.SimpleNamespace(speeds=(1, 2, 4, 8)))
    source = types.SimpleNamespace(encoders={"video": None, "audio": None})
    run = types.SimpleNamespace(config=config, source=source)
    return measure_tasks(run, _Records(record_ids=names, sources=names), arrays, seed=0)


def test_perfect_random_and_constant_answers_give_known_accuracies():
    rng = np.random.default_rng(0)
    arrays = _task_arrays(rng)
    perfect = np.eye(4)[arrays["video_speed"]]
    constant = np.broadcast_to(np.eye(4)[2], perfect.shape)
    noise = rng.normal(size=perfect.shape)
    for answers, low, high in (
        (perfect, 1.0, 1.0),
        (constant, 0.25, 0.25),  # exactly, because classes are balanced
        (noise, 0.15, 0.35),
    ):
        measured = _measure(arrays | {"speed_video": answers})
        accuracy = point_values(measured)["speed_video"]
        assert low <= accuracy <= high
        confusion = np.array(measured.details["confusion"]["speed_video"])
        values = measured.outcomes.values
        assert values["scored_speed_video"].sum() == confusion.sum()
        assert values["correct_speed_video"].sum() == np.trace(confusion)
        assert len(values["scored_speed_video"]) == 40  # by record
        assert measured.details["views_scored"]["speed_video"] == confusion.sum()
        assert (measured.details["too_short"], measured.details["incomplete"]) == (1, 3)
        assert measured.metrics["speed_video"].chance == 0.25


def test_a_task_that_no_record_has_is_left_out_and_half_a_task_refused():
    arrays = _task_arrays(np.random.default_rng(0))
    answers = {"speed_video": np.eye(4)[arrays["video_speed"]]}
    answers["speed_audio"] = np.eye(4)[arrays["audio_speed"]]
    arrays["has_video"][:] = False
    measured = _measure(arrays | answers)
    assert set(measured.metrics) == {"speed_audio"}
    assert "speed, audio" in measured.sections[0]
    arrays["audio_speed"][:] = 1
    with pytest.raises(ValueError, match="cannot balance 4 classes"):
        _measure(arrays | answers)
    arrays["has_audio"][:] = False
    assert _measure(arrays | answers).sections == []
