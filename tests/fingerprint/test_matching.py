"""What a query answers: source, place, pace; with one modality missing or wrong; and "no match"."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from avcl_jax.fingerprint.error import FingerprintError
from tests.fingerprint.synthetic import RATE_HZ, clip, excerpt


def test_an_excerpt_is_found_where_it_was_cut(library):
    match = library.query(excerpt(clip(3), 1.5, 4.5)).best
    assert match.source == "clip 3"
    assert match.offset_seconds == pytest.approx(1.5, abs=0.15)
    assert match.rate == pytest.approx(1.0, abs=0.06)
    (interval,) = match.intervals
    assert interval.query_start == pytest.approx(0.0, abs=0.3)
    assert interval.query_end == pytest.approx(3.0, abs=0.3)
    assert interval.reference_start == pytest.approx(1.5, abs=0.4)
    assert interval.reference_end == pytest.approx(4.5, abs=0.4)


@pytest.mark.parametrize("rate", [0.8, 1.25])
def test_another_pace_is_found_with_its_rate(library, rate):
    media = clip(5)
    query = dataclasses.replace(
        media,
        frame_seconds=media.frame_seconds / rate,
        duration_seconds=6 / rate,
        waveform=np.empty(0, np.int16),
        sample_rate_hz=0,
    )
    match = library.query(query).best
    assert match.source == "clip 5"
    assert match.rate == pytest.approx(rate, abs=0.06)
    assert match.offset_seconds == pytest.approx(0.0, abs=0.3)
    assert match.audio_score is None


def test_either_modality_suffices(library):
    whole = excerpt(clip(7), 1.0, 5.0)
    silent = dataclasses.replace(whole, waveform=np.empty(0, np.int16), sample_rate_hz=0)
    heard = dataclasses.replace(whole, frames=whole.frames[:0], frame_seconds=np.empty(0))
    for query in (silent, heard):
        assert library.query(query).best.source == "clip 7"
    foreign = dataclasses.replace(whole, waveform=clip(99).waveform[: 4 * RATE_HZ])
    match = library.query(foreign).best
    assert match.source == "clip 7"
    assert match.video_score > 2 * max(match.audio_score, 1)


def test_one_modality_alone_can_be_asked_for(library):
    swapped = dataclasses.replace(clip(1), waveform=clip(2).waveform)
    assert library.query(swapped, modalities=("video",)).best.source == "clip 1"
    match = library.query(swapped, modalities=("audio",)).best
    assert match.source == "clip 2"
    assert match.video_score is None
    both = library.query(swapped)
    assert {m.source for m in both.matches if m.accepted} == {"clip 1", "clip 2"}


def test_what_is_not_in_the_library_is_no_match(library):
    results = [library.query(clip(n, 3.0)) for n in range(100, 112)]
    assert sum(result.best is not None for result in results) <= 1
    assert all(result.matches for result in results)  # the nearest are shown all the same


def test_spliced_into_other_footage_only_the_part_is_marked(library):
    foreign, own = clip(50), clip(9)
    parts = [excerpt(foreign, 0, 2), excerpt(own, 2, 5), excerpt(foreign, 2, 3)]
    query = dataclasses.replace(
        clip(0),
        frames=np.concatenate([p.frames for p in parts]),
        waveform=np.concatenate([p.waveform for p in parts]),
    )
    match = library.query(query).best
    assert match.source == "clip 9"
    assert match.offset_seconds == pytest.approx(0.0, abs=0.3)
    longest = max(match.intervals, key=lambda i: i.query_end - i.query_start)
    assert longest.query_start == pytest.approx(2.0, abs=0.6)
    assert longest.query_end == pytest.approx(5.0, abs=0.6)


def test_shorter_than_a_segment_is_said(library):
    with pytest.raises(FingerprintError, match=r"lasts 0\.25 s.*longer"):
        library.query(excerpt(clip(0), 0.0, 0.25))
