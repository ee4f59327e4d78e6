"""Cards and maps of the report."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from avcl_jax import experiment
from avcl_jax.data.records import RecordDataset
from avcl_jax.data.selection import UsableRecords
from avcl_jax.evaluation.exhibits import Exhibits, class_plane, embedding_map
from tests.evaluation.conftest import small_config


def test_a_record_too_short_for_the_speed_is_shown_at_one_that_fits(small_records):
    config = small_config(small_records)
    config.views.speeds = (1, 4, 16)  # 0.25, 1 and 4 s; records last 3 s
    spec = dataclasses.replace(experiment.render_spec(config), spectrogram_on_device=False)
    source = UsableRecords(RecordDataset(small_records, "test"), spec)
    fast, fitting = (Exhibits(source, spec, speed=speed, stills=3) for speed in (2, 1))
    assert fast.card(0, "1") == fitting.card(0, "1")
    shown = fitting.card(0, "1 & 2", given="audio", kind="hit")
    assert shown.count("data:image/jpeg;base64,") == 3
    assert "<b>1 &amp; 2</b> test/0" in shown
    assert 'class="stills unseen"' in shown
    assert "low, across" in shown
    assert "unseen" not in fitting.card(0, "1")
    assert 'alt="spectrogram" class="unseen"' in fitting.card(0, "1", given="video")


def _clusters(rng: np.random.Generator, items: int, distance: float):
    labels = np.arange(items) % 3
    return rng.normal(size=(items, 20)) + distance * np.eye(3, 20)[labels], labels


@pytest.mark.parametrize(("distance", "low", "high"), [(8.0, 0.95, 1.0), (0.0, 0.0, 0.5)])
def test_the_plane_shows_classes_where_there_are_some_and_none_where_there_are_none(
    distance, low, high
):
    rng = np.random.default_rng(0)
    train, train_labels = _clusters(rng, 300, distance)
    test, labels = _clusters(rng, 150, distance)
    placed = class_plane(train, train_labels, test)
    assert placed.shape == (150, 2)
    centres = np.stack([placed[labels == c].mean(axis=0) for c in range(3)])
    nearest = np.linalg.norm(placed[:, None] - centres, axis=-1).argmin(axis=1)
    assert low <= (nearest == labels).mean() <= high


def test_the_map_keeps_clusters_together():
    features, labels = _clusters(np.random.default_rng(1), 90, 12.0)
    rows, placed = embedding_map(features, seed=0)
    np.testing.assert_array_equal(rows, np.arange(90))
    distances = np.linalg.norm(placed[:, None] - placed[None], axis=-1)
    np.fill_diagonal(distances, np.inf)
    assert (labels[distances.argmin(axis=1)] == labels).mean() > 0.95
