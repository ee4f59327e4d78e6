"""Ground truth of transformed clips: excerpts, time maps, offsets."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from avcl_jax.fingerprint.benchmark import audio, timeline
from avcl_jax.fingerprint.benchmark.families import transform
from avcl_jax.fingerprint.benchmark.timeline import Piece, Transformed, excerpt
from tests.fingerprint.benchmark.clips import RATE, SECONDS, clip, source_seconds

CLIP, OTHER = clip(0), clip(5)


def test_an_offset_is_right_where_some_moment_lies():
    # Played at 2: 4 s of the copy begin 4 s before their source's zero and end level with it.
    pieces = (Piece(1.0, 3.0, 5.0), Piece(4.0, 5.5, 0.0, rate=2.0))
    offsets = np.array([-5.0, -3.0, -1.6, -1.4, 2.9, 4.0, 5.0, 5.1])
    for both in ((pieces, ()), ((), pieces)):  # the video's or the audio's
        right = [o for o in offsets if Transformed(CLIP, *both).has_offset(o, 1.0)]
        assert right == [-5.0, -3.0, -1.6, 4.0, 5.0]
    assert not Transformed(CLIP, (), ()).has_offset(0.0, 100.0)


def test_an_excerpt_has_the_frames_and_samples_of_its_time_and_silence_beyond():
    part = excerpt(CLIP, 1.5, 2.75)
    assert part.duration_seconds == 1.25
    np.testing.assert_array_equal(part.frames, CLIP.frames[12:22])
    np.testing.assert_allclose(part.frame_seconds, np.arange(10) / 8)
    np.testing.assert_array_equal(part.waveform, CLIP.waveform[24_000:44_000])
    late = dataclasses.replace(CLIP, waveform=CLIP.waveform[:RATE], audio_start_seconds=2.0)
    part = excerpt(late, 1.0, 4.0)
    assert len(part.waveform) == 3 * RATE
    assert not part.waveform[:RATE].any()
    np.testing.assert_array_equal(part.waveform[RATE : 2 * RATE], CLIP.waveform[:RATE])
    assert not part.waveform[2 * RATE :].any()
    assert not excerpt(late, 0.0, 1.0).waveform.any()


@pytest.mark.parametrize("family", ["trim", "splice", "truncation"])
def test_cut_copies_hold_the_samples_that_their_map_names(family):
    result = transform(CLIP, family, "medium", seed=3, clip="a", other=OTHER)
    assert result.video_pieces == result.audio_pieces
    moments = np.arange(0.1, result.media.duration_seconds - 0.05, 0.1)
    original = source_seconds(result.audio_pieces, moments)
    known = np.isfinite(original)
    assert known.any()
    heard = result.media.waveform[np.rint(moments[known] * RATE).astype(int)]
    # Cuts fall between samples: one or two further on is where the same sample is.
    places = np.rint(original[known] * RATE).astype(int)
    near = np.stack(
        [CLIP.waveform[np.minimum(places + d, len(CLIP.waveform) - 1)] for d in (-2, -1, 0, 1, 2)]
    )
    assert (near == heard).any(axis=0).all()
    foreign = np.isnan(original)
    assert foreign.any() == (family == "splice")


@pytest.mark.parametrize("rate", [0.75, 1.25])
def test_another_speed_keeps_the_pitch_and_moves_the_clicks(rate):
    tone = np.sin(2 * np.pi * 440 * np.arange(SECONDS * RATE) / RATE)
    tone *= np.arange(len(tone)) % RATE < RATE // 2  # half a second on, half a second off
    waveform = (8000 * tone).astype(np.int16)
    played = timeline.at_tempo(waveform, RATE, rate)
    assert len(played) == round(len(waveform) / rate)
    spectrum = np.abs(np.fft.rfft(played.astype(float)))
    assert np.argmax(spectrum) / len(played) * RATE == pytest.approx(440, abs=5)
    block = RATE // 20
    loud = np.abs(played[: len(played) // block * block].reshape(-1, block)).mean(axis=1) > 1000
    onsets = np.flatnonzero(np.diff(loud.astype(int)) == 1) * 0.05
    np.testing.assert_allclose(np.diff(onsets), 1 / rate, atol=0.11)


@pytest.mark.parametrize("semitones", [1.0, -2.0, 4.0])
def test_pitch_moves_by_semitones(semitones):
    tone = 8000 * np.sin(2 * np.pi * 440 * np.arange(SECONDS * RATE) / RATE)
    media = dataclasses.replace(CLIP, waveform=tone.astype(np.int16))
    moved = audio.pitch(media, np.random.default_rng(0), semitones=semitones).media.waveform
    assert len(moved) == len(tone)
    found = np.argmax(np.abs(np.fft.rfft(moved.astype(float)))) / len(moved) * RATE
    shift = 12 * np.log2(found / 440)
    assert abs(shift) == pytest.approx(abs(semitones), abs=0.1)


def test_noise_has_the_energy_asked_for():
    quiet = dataclasses.replace(CLIP, waveform=(CLIP.waveform // 4).astype(np.int16))
    noisy = audio.audio_noise(quiet, np.random.default_rng(0), snr_db=10).media.waveform
    added = noisy.astype(float) - quiet.waveform
    ratio = np.mean(quiet.waveform.astype(float) ** 2) / np.mean(added**2)
    assert 10 * np.log10(ratio) == pytest.approx(10, abs=0.1)


def test_a_filter_keeps_its_band_only():
    noise = 3000 * np.random.default_rng(0).standard_normal(SECONDS * RATE)
    media = dataclasses.replace(CLIP, waveform=noise.astype(np.int16))
    heard = audio.audio_filter(media, np.random.default_rng(0), low_hz=500, high_hz=2000)
    power = np.abs(np.fft.rfft(heard.media.waveform.astype(float))) ** 2
    hertz = np.fft.rfftfreq(len(heard.media.waveform), 1 / RATE)
    inside = power[(hertz > 600) & (hertz < 1800)].mean()
    assert power[(hertz < 200) | (hertz > 4000)].mean() < 1e-3 * inside


def test_a_room_goes_on_after_the_sound():
    burst = np.zeros(SECONDS * RATE)
    burst[:800] = 8000
    media = dataclasses.replace(CLIP, waveform=burst.astype(np.int16))
    rng = np.random.default_rng(0)
    heard = audio.reverberation(media, rng, decay_seconds=0.8, direct_db=0).media.waveform
    energy = [np.mean(heard[round(t * RATE) :][:800].astype(float) ** 2) for t in (0.1, 0.5, 1.2)]
    # 60 dB in 0.8 s are 30 dB in 0.4 s.
    assert 10 * np.log10(energy[0] / energy[1]) == pytest.approx(30, abs=4)
    assert energy[2] < 1


def test_short_footage_is_repeated_to_fill():
    short = excerpt(OTHER, 0.0, 1.5)
    filled = timeline.as_footage_of(short, CLIP)
    assert filled.frames.shape[1:] == CLIP.frames.shape[1:]
    assert len(filled.waveform) == len(CLIP.waveform)
    np.testing.assert_array_equal(filled.frames[12:24], short.frames)
    np.testing.assert_array_equal(filled.waveform[RATE * 3 // 2 : RATE * 3], short.waveform)
