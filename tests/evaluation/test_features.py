"""Features of records: of what training renders, in whatever batches and parts."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from avcl_jax import experiment
from avcl_jax.batched import in_parts
from avcl_jax.data.clips import ClipRecords
from avcl_jax.data.records import RecordDataset, RecordReader
from avcl_jax.data.selection import Selection, UsableRecords
from avcl_jax.errors import UserError
from avcl_jax.evaluation.features import (
    FeatureSpec,
    classical_features,
    encoder_clips,
    record_features,
    rendered_clips,
)
from avcl_jax.evaluation.views import fixed_views
from avcl_jax.export.runs import open_encoders, random_like
from tests.evaluation.conftest import CLASS_NAMES, small_record, write_records

MEAN = FeatureSpec((1, 2), 2, "mean", "mean", chunk=5, threads=2, part_records=7)


@pytest.fixture(scope="module")
def source(small_run):
    return open_encoders(small_run[1])


def _clips(directory, source, modality, *, speeds=(1, 2), select=""):
    spec = encoder_clips(source.require(modality), dataclasses.replace(MEAN, speeds=speeds))
    records, selection = RecordDataset(directory, "test"), Selection.parse(select)
    return ClipRecords(records, selection, spec, shared_interval=True)


def _render(clips, position, count=2):
    return rendered_clips(clips, position, count)


def _features(source, clips, spec, directory):
    return record_features({"x": source}, [clips], spec, directory=directory)[0]["x"]


@pytest.mark.parametrize(("modality", "array"), [("video", "video"), ("audio", "spectrogram")])
def test_clips_are_those_that_the_training_pipeline_renders(
    small_run, small_records, source, modality, array
):
    config = small_run[0].copy_and_resolve_references()
    config.unlock()
    config.views.speeds = (1, 2)  # sound lasts longer than picture: clips are where both are
    spec = dataclasses.replace(experiment.render_spec(config), spectrogram_on_device=False)
    usable = UsableRecords(RecordDataset(small_records, "test"), spec)
    expected = fixed_views(usable, 3, spec, speeds=(0, 1), clips=2)[array]
    np.testing.assert_array_equal(_render(_clips(small_records, source, modality), 3), expected)


def test_silent_audio_does_not_move_the_clips_of_a_video(small_run, source, tmp_path):
    record = small_record("test", 3)
    record = dataclasses.replace(record, waveform=np.zeros(4000, np.int16))  # 1 of 3 s
    directory = write_records(tmp_path, "silent", CLASS_NAMES, {"test": [record]})
    spec = dataclasses.replace(experiment.render_spec(small_run[0]), spectrogram_on_device=False)
    usable = UsableRecords(RecordDataset(directory, "test"), spec)
    views = fixed_views(usable, 0, spec, speeds=(0, 1), clips=2)
    np.testing.assert_array_equal(_render(_clips(directory, source, "video"), 0), views["video"])


@pytest.mark.parametrize("modality", ["video", "audio"])
def test_features_do_not_depend_on_batches_and_parts(small_records, source, modality, tmp_path):
    clips = _clips(small_records, source, modality)
    found = _features(source, clips, MEAN, tmp_path)
    encoder = source.require(modality)
    each = [np.asarray(encoder.apply(encoder.params, _render(clips, n))) for n in range(len(clips))]
    np.testing.assert_allclose(found, [rows.mean(axis=0) for rows in each], atol=1e-5)
    by_clip = dataclasses.replace(MEAN, record_pooling="clips", chunk=16)
    rows = _features(source, clips, by_clip, tmp_path)
    np.testing.assert_allclose(rows, each, atol=1e-5)
    largest = dataclasses.replace(MEAN, record_pooling="mean_max")
    both = _features(source, clips, largest, tmp_path)
    expected = [np.concatenate([rows.mean(axis=0), rows.max(axis=0)]) for rows in each]
    np.testing.assert_allclose(both, expected, atol=1e-5)


def test_pooling_of_maps(small_records, source, tmp_path):
    encoder = source.require("audio")
    clips = _clips(small_records, source, "audio", speeds=(1,), select="motion=down")
    maps = np.asarray(encoder.apply(encoder.params, _render(clips, 0, 1), pooled=False))[0]
    expected = {
        "mean_max": maps.mean(axis=1),
        "bands_mean_max": maps.reshape(len(maps), -1),
    }
    for kind, over_time in expected.items():
        spec = dataclasses.replace(MEAN, clips=1, clip_pooling=kind)
        found = _features(source, clips, spec, tmp_path)[0]
        wanted = np.concatenate([over_time.mean(axis=0), over_time.max(axis=0)])
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    video = _clips(small_records, source, "video")
    with pytest.raises(UserError, match="'bands_mean_max' is for audio"):
        _features(source, video, spec, tmp_path)


def test_an_interrupted_computation_goes_on_with_the_parts_that_are_there(tmp_path):
    asked = []

    def compute(positions):
        asked.extend(positions)
        if 6 in positions and asked.count(6) == 1:
            raise KeyboardInterrupt
        return {"square": np.array(positions) ** 2}

    with pytest.raises(KeyboardInterrupt):
        in_parts(tmp_path, 8, compute, rows=3)
    assert asked == list(range(8))
    found = in_parts(tmp_path, 8, compute, rows=3)
    other = in_parts(tmp_path, 8, lambda rows: {"square": np.array(rows) ** 2}, rows=4)
    np.testing.assert_array_equal(other["square"], found["square"])
    np.testing.assert_array_equal(found["square"], np.arange(8) ** 2)
    assert asked == [*range(8), 6, 7]
    (tmp_path / "rows-0000003-0000006.npz").write_bytes(b"half")
    with pytest.raises(UserError, match=r"rows-0000003-0000006\.npz is damaged"):
        in_parts(tmp_path, 8, compute, rows=3)


def test_other_weights_and_clips_never_use_the_parts_of_others(small_records, source, tmp_path):
    clips = _clips(small_records, source, "audio", select="motion=down")
    others = _clips(small_records, source, "audio", select="motion=across")
    slower = _clips(small_records, source, "audio", select="motion=down", speeds=(1,))
    for network, records in (
        (source, clips),
        (source, others),
        (dataclasses.replace(source, fingerprint="b"), clips),
        (source, slower),
    ):
        _features(network, records, MEAN, tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_record_of_several_networks_and_sides_is_rendered_once(
    small_records, source, tmp_path, monkeypatch
):
    selections = ("motion=down", "material=high", "motion=across")
    sides = [_clips(small_records, source, "audio", select=select) for select in selections]
    networks = {"trained": source, "random": random_like(source, 0)}
    apart = [
        {name: _features(network, side, MEAN, tmp_path) for name, network in networks.items()}
        for side in sides
    ]
    read, opening = [], RecordReader.open
    monkeypatch.setattr(
        RecordReader, "open", lambda self, place: read.append(place.name) or opening(self, place)
    )
    together = record_features(networks, sides, MEAN, directory=tmp_path)
    assert sorted(read) == sorted(RecordDataset(small_records, "test").record_ids)
    assert len(read) == 16
    for side, expected in zip(together, apart, strict=True):
        for name in networks:
            np.testing.assert_allclose(side[name], expected[name], atol=1e-6)
        assert (side["trained"] != side["random"]).any()


def test_features_that_are_not_finite_are_refused(small_records, source, tmp_path):
    encoder = source.require("audio")
    broken = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), dict(encoder.params))
    encoders = {"audio": dataclasses.replace(encoder, params=broken)}
    clips = _clips(small_records, source, "audio")
    with pytest.raises(UserError, match="16 records have features that are not finite, first"):
        _features(dataclasses.replace(source, encoders=encoders), clips, MEAN, tmp_path)


def test_clips_that_make_no_sense_are_refused():
    for speeds, clips in (((), 1), ((1,), 0), ((0.5,), 1)):
        with pytest.raises(UserError, match="whole numbers of at least 1"):
            dataclasses.replace(MEAN, speeds=speeds, clips=clips)
    with pytest.raises(UserError, match="clip_pooling 'median' must be one of mean"):
        dataclasses.replace(MEAN, clip_pooling="median")


def test_classical_features_tell_pitch_and_change():
    time = np.arange(8000) / 8000
    low = (9000 * np.sin(2 * np.pi * 300 * time)).astype(np.int16)
    high = (9000 * np.sin(2 * np.pi * 3000 * time)).astype(np.int16)
    steady, above = (classical_features(w, 8000) for w in (low, high))
    assert steady["log_mel"].shape == (512,)
    assert steady["mfcc"].shape == (80,)
    assert steady["log_mel"][:128].argmax() < above["log_mel"][:128].argmax()
    noise = np.random.default_rng(0).normal(0, 3000, size=8000).astype(np.int16)
    gated = np.concatenate([noise[:4000], noise[4000:] // 100])
    even, changing = (classical_features(w, 8000)["log_mel"][128:256] for w in (noise, gated))
    assert changing.mean() > 2 * even.mean()
