"""Details: what tells sources of one template apart."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import scipy.stats

from avcl_jax.fingerprint import details
from avcl_jax.fingerprint.database import transaction
from avcl_jax.fingerprint.details import NO_DETAILS, Candidate, Details, describe, judge
from avcl_jax.fingerprint.index import FingerprintIndex
from tests.fingerprint.synthetic import RATE_HZ, SETTINGS, clip


@pytest.mark.parametrize("freedom", [2, 3, 6, 15, 40])
def test_chances_are_those_of_scipy(freedom):
    for t in (-30.0, -1.0, 0.0, 0.2, 1.5, 8.0, 1e4):
        expected = scipy.stats.t.sf(t, freedom)
        assert details.student_tail(t, freedom) == pytest.approx(expected, rel=1e-11)
    for chances in ([0.3], [1.0, 1.0], [1e-40, 0.2], [0.5, 1e-9, 1e-3]):
        expected = scipy.stats.combine_pvalues(chances).pvalue
        assert details.fisher(chances) == pytest.approx(expected, rel=1e-11)
    assert details.fisher([]) == 1.0
    assert details.fisher([0.0, 0.5]) < 1e-290


def speech(seed: int, seconds: float = 8.0) -> np.ndarray:
    """Noise in bands that change every tenth of a second, int16."""
    rng = np.random.default_rng(seed)
    count = round(seconds * RATE_HZ)
    spectrum = np.fft.rfft(rng.normal(size=count).reshape(-1, RATE_HZ // 10), axis=1)
    gains = rng.uniform(-3, 3, (len(spectrum), 12)).repeat(34, axis=1)[:, : spectrum.shape[1]]
    waveform = np.fft.irfft(spectrum * np.exp(gains), axis=1).ravel()
    return (6000 * waveform / np.abs(waveform).max()).astype(np.int16)


def report(seed: int, seconds: float = 8.0):
    """A clip of one template: the same video but for a text, and other speech."""
    media = clip(0, seconds)
    rng = np.random.default_rng((1, seed))
    text = 110 + 36 * rng.integers(0, 2, (1, 4, 12, 1), np.uint8).repeat(2, axis=2)
    frames = media.frames.copy()
    frames[:, 17:21] = text
    return dataclasses.replace(media, frames=frames, waveform=speech(seed, seconds))


def excerpt(media, start: float, end: float):
    """Part of a clip, a third as loud and with other noise."""
    rng = np.random.default_rng(9)
    shown = (media.frame_seconds >= start) & (media.frame_seconds < end)
    samples = media.waveform[round(start * RATE_HZ) : round(end * RATE_HZ)] / 3
    noisy = samples + 40 * rng.normal(size=len(samples))
    frames = media.frames[shown].astype(int) + rng.integers(-3, 4, media.frames[shown].shape)
    return dataclasses.replace(
        media,
        frames=frames.clip(0, 255).astype(np.uint8),
        frame_seconds=media.frame_seconds[shown] - start,
        waveform=noisy.astype(np.int16),
        duration_seconds=end - start,
    )


def candidates(numbers, *, offset: float = 2.1, rate: float = 1.0, **left_out) -> list[Candidate]:
    return [
        Candidate(describe(report(n), 8.0)._replace(**left_out), 0.0, rate, offset) for n in numbers
    ]


def query(number: int, *, seconds: float = 4.0) -> Details:
    return describe(excerpt(report(number), 2.1, 2.1 + seconds), seconds, finer=4)


NO_VIDEO = {"video": NO_DETAILS.video}
NO_AUDIO = {"audio": NO_DETAILS.audio}


@pytest.mark.parametrize("left_out", [{}, NO_VIDEO, NO_AUDIO])
def test_a_noisy_excerpt_is_told_from_others_of_its_template(left_out):
    judged = judge(query(3)._replace(**left_out), candidates(range(10)))
    scores = [judgement.score for judgement in judged]
    assert np.argmax(scores) == 3
    assert scores[3] > 3
    assert max(scores[:3] + scores[4:]) < 1
    for modality, fields in (("video", NO_VIDEO), ("audio", NO_AUDIO)):
        assert (judged[3].by_modality[modality] > 2) == (fields is not left_out)


@pytest.mark.parametrize("seconds", [1.5, 4.0])
@pytest.mark.parametrize("left_out", [{}, NO_VIDEO, NO_AUDIO])
def test_a_clip_that_is_not_there_is_not_found(seconds, left_out):
    for other in range(20, 24):
        asked = query(other, seconds=seconds)._replace(**left_out)
        assert max(judgement.score for judgement in judge(asked, candidates(range(10)))) < 1.5


def test_an_alignment_may_be_wrong_by_a_quarter_of_a_second_and_a_twentieth_of_the_rate():
    asked = query(3)
    for offset, rate in ((2.35, 1.0), (1.85, 1.0), (2.1 - 0.1, 1 / 0.95)):
        found = candidates(range(6), offset=offset, rate=rate, **NO_VIDEO)
        assert judge(asked, found)[3].score > 3
    assert judge(asked, candidates(range(6), offset=3.1, **NO_VIDEO))[3].score < 1


def test_details_begin_where_the_candidate_says():
    later = [
        c._replace(details=Details(c.details.video[8:], c.details.audio[32:]), begin_seconds=2.0)
        for c in candidates(range(6))
    ]
    assert judge(query(3), later)[3].score > 3
    wrong = [c._replace(begin_seconds=0.0) for c in later]
    assert judge(query(3), wrong)[3].score < 1


def test_other_audio_outweighs_the_same_video():
    dubbed = describe(
        dataclasses.replace(excerpt(report(3), 2.1, 6.1), waveform=speech(99, 4.0)), 4.0, finer=4
    )
    assert judge(dubbed, candidates(range(10)))[3].score == 0
    # Where the audio is not to be compared, it says nothing.
    silent = judge(dubbed, candidates(range(10)), modalities=["video"])
    assert silent[3].score > 2
    assert silent[3].by_modality["audio"] == 0


@pytest.mark.parametrize("part", [slice(0, 120), slice(136, 256)])
def test_audio_that_agrees_in_one_half_of_the_time_is_other_audio(part):
    asked, foreign = query(3), query(20)
    asked.audio[part] = foreign.audio[part]
    others = candidates(range(10))
    line = details._best_line(asked, others[3])
    assert line.fraction < 0.35 < line.worst
    # The alignment, not the line of what agrees.
    assert (line.rate, line.offset_seconds) == (1.0, 2.1)
    assert judge(asked, others)[3] == (0.0, {"video": 0.0, "audio": 0.0})


def test_noise_for_a_quarter_of_the_time_is_not_other_audio():
    asked = query(3)
    asked.audio[:72] = query(20).audio[:72]
    assert judge(asked, candidates(range(10)))[3].by_modality["audio"] > 2.5


def test_few_candidates_tell_nothing_and_none_are_none():
    assert judge(query(1), candidates([0, 1, 2]))[1].score == 0
    assert judge(query(1), candidates([0, 1, 2, 3]))[1].score > 1
    assert judge(query(1), []) == []


def test_the_chance_is_that_of_students_t_with_the_spread_of_the_others():
    values = np.array([0.1, 0.44, 0.46, 0.45, 0.47, 0.43, np.nan])
    chances = details._chances(values, np.full(7, 1e-9))
    others = values[1:6]
    spread = 1.482602 * np.median(np.abs(others - 0.45))
    assert chances[0] == pytest.approx(scipy.stats.t.sf((0.45 - 0.1) / spread, 4), rel=1e-5)
    assert math.isnan(chances[6])
    at_least = details._chances(values, np.full(7, 0.1))
    assert at_least[0] == pytest.approx(scipy.stats.t.sf(0.35 / 0.1, 4))


def test_images_as_near_as_the_best_ones_are_of_its_template_and_no_copies():
    residuals = np.array([2.0, 2.1, 6.0, 6.1, 5.9, 6.05, 5.95])
    least = np.full(7, 0.25)
    assert details._chances(residuals, least)[0] < 1e-4
    assert details._chances(residuals, least, rivals=True)[0] > 0.01


def test_details_of_intervals_are_those_of_the_whole_but_for_the_first_moments():
    media = report(5)
    whole = describe(media, 8.0)
    assert whole.video.shape == (32, 176)
    assert whole.audio.shape == (128,)
    second = describe(excerpt_exact(media, 3.1), 4.9, begin_seconds=3.1)
    both = details.joined([describe(media, 3.1), second])
    np.testing.assert_array_equal(both.video, whole.video)
    differs = np.flatnonzero(both.audio != whole.audio) / 16
    assert set(differs) <= {3.125, 3.1875, 3.25, 3.3125}
    assert not both.audio[:2].any()  # nothing before them


def excerpt_exact(media, start: float):
    """The rest of a clip from a time on; the frame on screen begins it."""
    first = int(start * 16)
    return dataclasses.replace(
        media,
        frames=media.frames[first:],
        frame_seconds=media.frame_seconds[first:] - start,
        waveform=media.waveform[round(start * RATE_HZ) :],
        duration_seconds=media.duration_seconds - start,
    )


def test_silence_and_one_colour_are_nothing_to_compare():
    media = report(0)
    quiet = media.waveform.copy()
    quiet[3 * RATE_HZ : 6 * RATE_HZ] = 0
    frames = media.frames.copy()
    frames[16:48] = 128
    made = describe(dataclasses.replace(media, waveform=quiet, frames=frames), 8.0)
    assert not made.audio[round(3.2 * 16) : round(5.8 * 16)].any()
    assert made.audio[round(6.3 * 16) :].all()
    assert not made.video[4:12].any()
    assert made.video[:4].any(axis=1).all()
    assert made.video[12:].any(axis=1).all()
    nothing = describe(dataclasses.replace(media, frames=media.frames[:0], waveform=quiet[:0]), 8.0)
    assert not nothing.video.any()
    assert not nothing.audio.any()


@pytest.mark.parametrize("gain", [4, 0.02])
def test_louder_and_softer_audio_has_the_same_signs(gain):
    media = report(2)
    waveform = np.round(media.waveform * gain).astype(np.int16)
    changed = dataclasses.replace(media, waveform=waveform)
    first, second = (describe(m, 8.0).audio for m in (media, changed))
    assert np.bitwise_count(first ^ second).mean() < 0.5


def test_an_index_keeps_details_by_the_second(encoders, tmp_path):
    index = FingerprintIndex.create(tmp_path / "index", encoders, SETTINGS)
    index.add([("report", report(1)), ("other", report(2))])
    expected = describe(report(1), 8.0)
    source = next(s for s in index.sources() if s.name == "report")
    with transaction(index.directory) as opened:
        made, begin = opened.details_of(source, 2.4, 5.2)
        assert begin == 2.0
        np.testing.assert_array_equal(made.video, expected.video[8:24])
        np.testing.assert_array_equal(made.audio, expected.audio[32:96])
        made, begin = opened.details_of(source, -3.0, 99.0)
        assert begin == 0.0
        np.testing.assert_array_equal(made.audio, expected.audio)
        assert not len(opened.details_of(source, 9.0, 12.0)[0].audio)
    index.remove(["report"])
    with transaction(index.directory) as opened:
        assert not len(opened.details_of(source, 0.0, 8.0)[0].video)


def test_look_alikes_are_found_and_others_are_not(encoders, tmp_path):
    index = FingerprintIndex.create(tmp_path / "index", encoders, SETTINGS)
    index.add((f"report {n}", report(n)) for n in range(16))
    for number in (2, 7):
        result = index.query(excerpt(report(number), 2.1, 6.1))
        assert result.best is not None
        assert result.best.source == f"report {number}"
        assert result.best.offset_seconds == pytest.approx(2.1, abs=0.3)
        assert result.sources == (f"report {number}",)
    for other in (30, 31, 32):
        assert not index.query(excerpt(report(other), 2.1, 6.1)).sources
