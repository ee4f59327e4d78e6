"""Segments are the encoder's own clips, at places that depend on nothing but the hop."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from avcl_jax.data import media as media_module
from avcl_jax.export.runs import open_encoders
from avcl_jax.fingerprint import segments as segments_module
from avcl_jax.fingerprint.benchmark.timeline import excerpt
from avcl_jax.fingerprint.segments import Segmenter
from avcl_jax.fingerprint.settings import FingerprintSettings
from tests.fingerprint.synthetic import FPS, RATE_HZ, SETTINGS, clip, write


@pytest.fixture(scope="module")
def segmenter(encoders):
    return Segmenter(open_encoders(encoders), SETTINGS)


@pytest.mark.parametrize("speed", [1, 2])
def test_a_segment_is_what_the_encoder_makes_of_that_clip(encoders, speed):
    source = open_encoders(encoders)
    segmenter = Segmenter(source, FingerprintSettings(speed=speed, time_bins=1))
    media = clip(0, 4.0)
    found = segmenter.of_media(media)
    start, end = 1.25, 1.25 + 0.5 * speed  # segment 5
    part = excerpt(media, start, end)
    picture = source.encoders["video"](part.frames, FPS, speed=speed)[0]
    sound = source.encoders["audio"](part.waveform, RATE_HZ, speed=speed)[0]
    np.testing.assert_allclose(found.features["video"][5], picture, atol=1e-4)
    np.testing.assert_allclose(found.features["audio"][5], sound, atol=1e-4)


def test_segments_cover_the_clip_and_say_what_is_missing(segmenter):
    media = clip(0, 4.0)
    # The sound begins late, ends early and has a silent second.
    waveform = media.waveform[RATE_HZ // 2 : -RATE_HZ // 2].copy()
    waveform[RATE_HZ : 2 * RATE_HZ] = 3
    found = segmenter.of_media(
        dataclasses.replace(media, waveform=waveform, audio_start_seconds=0.5)
    )
    starts = 0.25 * np.arange(15)
    assert len(found) == 15  # the last begins at 3.5
    assert found.present["video"].all()
    heard = (starts >= 0.5) & (starts <= 3.0)
    silent = (starts >= 1.5) & (starts <= 2.0)
    np.testing.assert_array_equal(found.present["audio"], heard & ~silent)
    assert not found.features["audio"][~found.present["audio"]].any()


def test_a_long_file_in_intervals_is_as_one(segmenter, tmp_path, monkeypatch):
    path = write(tmp_path / "clip.mp4", clip(0, 7.0))
    whole = segmenter.of_file(path)
    monkeypatch.setattr(segments_module, "_INTERVAL_SECONDS", 2.0)
    parts = segmenter.of_file(path)
    assert len(parts) == len(whole)
    assert parts.duration_seconds == pytest.approx(whole.duration_seconds, abs=0.01)
    for modality in ("video", "audio"):
        np.testing.assert_array_equal(parts.present[modality], whole.present[modality])
        np.testing.assert_allclose(
            parts.features[modality], whole.features[modality], atol=0.02, rtol=0.02
        )


def test_a_rate_undoes_a_faster_playback_and_keeps_the_pitch(segmenter):
    media = clip(0, 4.0)
    faster = dataclasses.replace(
        media, frame_seconds=media.frame_seconds / 1.25, duration_seconds=3.2
    )
    undone = segmenter.of_media(faster, rate=1.25)
    np.testing.assert_allclose(
        undone.features["video"][:8], segmenter.of_media(media).features["video"][:8], atol=1e-4
    )
    # A steady tone is the same at every rate.
    tone = (8000 * np.sin(2 * np.pi * 500 * np.arange(4 * RATE_HZ) / RATE_HZ)).astype(np.int16)
    steady = dataclasses.replace(media, waveform=tone)
    slow, plain = (segmenter.of_media(steady, rate=r).features["audio"][4] for r in (1.25, 1.0))
    np.testing.assert_allclose(slow, plain, atol=0.05 * np.abs(plain).max())


@pytest.mark.parametrize("modality", ["video", "audio"])
def test_what_no_encoder_takes_is_not_decoded(encoders, tmp_path, monkeypatch, modality):
    other = {"video": "audio", "audio": "video"}[modality]
    path = write(tmp_path / "clip.mp4", clip(0, 2.0))
    segmenter = Segmenter(open_encoders(encoders / modality), SETTINGS)

    def decoded(*_, **__):
        raise AssertionError(f"{other} is decoded")

    name = {"video": "decode_frames", "audio": "decode_audio"}[other]
    monkeypatch.setattr(media_module, name, decoded)
    assert segmenter.of_file(path).present[modality].any()
