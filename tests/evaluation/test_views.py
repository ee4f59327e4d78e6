"""Rendering and encoding of whole splits: complete, in order, padded, repeatable."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from avcl_jax import experiment
from avcl_jax.batched import batched_map, render_all
from avcl_jax.data.records import RecordDataset
from avcl_jax.data.selection import UsableRecords
from avcl_jax.data.views import BACKWARD, FORWARD
from avcl_jax.evaluation.views import PretrainedRun, drawn_pairs, fixed_views, random_views
from tests.evaluation.conftest import small_config

SPEC = experiment.render_spec(small_config("unused"))
MEDIA = ("video", "spectrogram")


@pytest.fixture(scope="module")
def source(small_records):
    return UsableRecords(RecordDataset(small_records, "test"), SPEC)


def _fixed(source, position):
    return fixed_views(source, position, SPEC, speeds=(0, 2), clips=2)


@pytest.mark.parametrize(("chunk", "threads"), [(5, 1), (16, 3), (64, 2)])
def test_every_record_is_encoded_once_in_order_and_in_one_shape(source, chunk, threads):
    shapes = []

    def compute(factor, arrays):
        shapes.append(arrays["video"].shape)
        return {
            "brightness": factor * arrays["video"].astype(np.float32).mean(axis=(1, 2, 3, 4, 5))
        }

    encode = batched_map(
        compute, {"one": 1.0, "two": 2.0}, inputs=("video",), chunk=chunk, threads=threads
    )
    found = encode(lambda position: _fixed(source, position), range(len(source)))
    assert shapes == [(chunk, 4, 4, 16, 16, 3)]  # traced once
    np.testing.assert_array_equal(found["record_index"], np.arange(16))
    expected = [_fixed(source, position)["video"].mean() for position in range(16)]
    np.testing.assert_allclose(found["one/brightness"], expected, rtol=1e-5)
    np.testing.assert_allclose(found["two/brightness"], 2 * found["one/brightness"])
    assert "video" not in found
    assert found["label_motion"].shape == (16,)


def test_random_views_are_balanced_and_a_function_of_seed_and_position(source):
    def render(position, seed=3):
        return random_views(
            source,
            position,
            SPEC,
            speeds=(0, 1, 2),
            directions=(FORWARD, BACKWARD),
            views=12,
            seed=seed,
        )

    arrays = render_all(render, range(len(source)), threads=3)
    for row in range(len(source)):
        pairs = list(zip(arrays["video_speed"][row], arrays["video_direction"][row], strict=True))
        assert all(pairs.count((s, d)) == 2 for s in range(3) for d in range(2))
    np.testing.assert_array_equal(arrays["audio_speed"], arrays["video_speed"])
    np.testing.assert_array_equal(arrays["video"][7], render(7)["video"])
    assert (render(7)["video"] != render(7, seed=4)["video"]).any()


def test_drawn_pairs_have_the_arrays_of_a_training_batch(source):
    arrays = drawn_pairs(source, 2, SPEC, pairs=5, seed=0)
    assert arrays["video"].shape == (5, 2, 4, 16, 16, 3)
    assert arrays["spectrogram"].shape == (5, 2, 10, 8)
    assert arrays["has_audio"].shape == (5, 2)
    for name in ("has_video", "order", "speed_mask", "order_mask", "record_index"):
        assert arrays[name].shape == (5,)
    again = drawn_pairs(source, 2, SPEC, pairs=5, seed=0)
    np.testing.assert_array_equal(arrays["video"], again["video"])
    assert (arrays["video"] != drawn_pairs(source, 2, SPEC, pairs=5, seed=1)["video"]).any()


def test_pairs_are_the_same_views_whatever_transform_of_sound_a_run_was_trained_with(source):
    views = dataclasses.replace(SPEC.views, audio_transform="independent")
    other = dataclasses.replace(SPEC, views=views)
    for position in range(4):
        first = drawn_pairs(source, position, SPEC, pairs=6, seed=0)
        second = drawn_pairs(source, position, other, pairs=6, seed=0)
        for name, value in first.items():
            np.testing.assert_array_equal(value, second[name], err_msg=name)


def test_features_are_means_over_views_and_embeddings_keep_them_all(small_run, source):
    run = PretrainedRun.load(small_run[1])
    arrays = render_all(lambda position: _fixed(source, position), range(3), threads=1)
    media = {name: arrays[name].reshape(6, 2, *arrays[name].shape[2:]) for name in MEDIA}
    masks = {name: np.ones(6, bool) for name in ("has_video", "has_audio")}
    # As a training batch of six videos.
    outputs = jax.jit(run.outputs)(run.variables, media | masks)
    # Of three views the last one is paired with itself, and counts once.
    odd = arrays | {name: arrays[name][:, :3] for name in MEDIA}
    for modality, (given, views) in itertools.product(("video", "audio"), ((arrays, 4), (odd, 3))):
        found = jax.jit(run.features)(run.variables, {k: given[k] for k in (*MEDIA, *masks)})
        by_view = {
            kind: np.asarray(outputs[f"{modality}_{kind}"]).reshape(3, 4, -1)[:, :views]
            for kind in ("features", "embeddings")
        }
        for kind, expected in (
            ("features", by_view["features"].mean(axis=1)),
            ("embeddings", by_view["embeddings"].reshape(3, -1)),
        ):
            np.testing.assert_allclose(found[f"{modality}_{kind}"], expected, atol=1e-5, rtol=1e-5)
