"""What a query answers: source, place, pace; with one modality missing or wrong; and "no match"."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from avcl_jax.fingerprint import matching
from avcl_jax.fingerprint.benchmark.timeline import excerpt, joined
from avcl_jax.fingerprint.index import FingerprintIndex
from avcl_jax.fingerprint.segments import SegmentFeatures
from avcl_jax.fingerprint.settings import FingerprintError
from tests.fingerprint.synthetic import RATE_HZ, SETTINGS, clip, leader


def test_an_excerpt_is_found_where_it_was_cut(library):
    match = library.query(excerpt(clip(3), 1.5, 4.5)).best
    assert match.source == "clip 3"
    assert match.offset_seconds == pytest.approx(1.5, abs=0.15)
    assert match.rate == pytest.approx(1.0, abs=0.06)
    (interval,) = match.intervals
    np.testing.assert_allclose(dataclasses.astuple(interval)[:4], (0.0, 3.0, 1.5, 4.5), atol=0.35)


@pytest.mark.parametrize("rate", [0.8, 1.25])
def test_another_pace_is_found_with_its_rate(library, rate):
    media = clip(5, audio=False)
    times = media.frame_seconds / rate
    query = dataclasses.replace(media, frame_seconds=times, duration_seconds=6 / rate)
    match = library.query(query).best
    assert (match.source, match.audio_score) == ("clip 5", None)
    assert match.rate == pytest.approx(rate, abs=0.06)
    assert match.offset_seconds == pytest.approx(0.0, abs=0.3)


def test_either_modality_suffices(library):
    for lacking in ("video", "audio"):
        half = excerpt(clip(7, **{lacking: False}), 1.0, 5.0)
        assert library.query(half).best.source == "clip 7"
    whole = excerpt(clip(7), 1.0, 5.0)
    foreign = dataclasses.replace(whole, waveform=clip(99).waveform[: 4 * RATE_HZ])
    match = library.query(foreign).best
    assert match.source == "clip 7"
    assert match.video_score > 2 * max(match.audio_score, 1)


def test_one_modality_alone_can_be_asked_for(library):
    swapped = dataclasses.replace(clip(1), waveform=clip(2).waveform)
    assert library.query(swapped, modalities=("video",)).best.source == "clip 1"
    match = library.query(swapped, modalities=("audio",)).best
    assert (match.source, match.video_score) == ("clip 2", None)
    assert set(library.query(swapped).sources) == {"clip 1", "clip 2"}


def test_what_is_not_in_the_library_is_no_match(library):
    results = [library.query(clip(n, 3.0)) for n in range(100, 112)]
    assert sum(result.best is not None for result in results) <= 1
    assert all(result.matches for result in results)  # the nearest are shown all the same
    with pytest.raises(FingerprintError, match=r"lasts 0\.25 s.*longer"):
        library.query(excerpt(clip(0), 0.0, 0.25))


def test_spliced_into_other_footage_only_the_part_is_marked(library):
    foreign, own = clip(50), clip(9)
    query = joined([excerpt(foreign, 0, 2), excerpt(own, 2, 5), excerpt(foreign, 2, 3)])
    match = library.query(query).best
    assert match.source == "clip 9"
    assert match.offset_seconds == pytest.approx(0.0, abs=0.3)
    longest = max(match.intervals, key=lambda i: i.query_end - i.query_start)
    assert longest.query_start == pytest.approx(2.0, abs=0.6)
    assert longest.query_end == pytest.approx(5.0, abs=0.6)


def test_votes_of_a_segment_count_once_per_bin_and_half_in_the_bins_beside_it():
    channel = matching._Channel(
        vectors=np.zeros((3, 4), np.float32),
        present=np.array([True, False, True]),
        mean=np.array([0.125, 0.0, 0.25], np.float32),
        scale=np.array([0.125, 1.0, 0.25], np.float32),
        neighbours=(
            np.array([[1.0, 0.875, 0.625, -np.inf], [0.75, 0.375, 0.25, 0.125]]),
            np.array([[0, 0, 8, -1], [0, 8, 0, 0]]),
            np.array([[8, 9, 40, -1], [12, 8, 0, 0]]),
        ),
    )
    query = matching.Query(1.0, np.array([0.0, 0.25, 0.5]), {"video": channel})
    votes = {(9, 0, 0): 3.0}
    matching._vote(query, 5, "video", 0.25, votes)
    # The first segment finds source 0 at 2.0 s, bin 4, and again in this bin, and the third at
    # 2.5 s, bin 5. Similarity at or below chance, and missing neighbours, do not vote.
    assert votes == (
        {(9, 0, 0): 3.0}
        | {(0, 5, place): vote for place, vote in ((3, 1.75), (4, 4.0), (5, 2.75), (6, 0.5))}
        | {(8, 5, place): vote for place, vote in ((19, 1.0), (20, 2.0), (21, 1.0))}
        | {(8, 5, place): vote for place, vote in ((2, 0.125), (3, 0.25), (4, 0.125))}
    )


OFFSET = 6.0


def query_along(
    references, slope: float, offset: float, *, rate: float = 1.0, count: int = 21
) -> matching.Query:
    """A query whose segments are the reference's along a line that turns about its middle."""
    seconds = 0.25 * np.arange(count)
    middle = seconds[-1] / 2
    index = (middle + slope * (seconds - middle) + offset) / references.settings.hop_seconds
    window, here = references.vectors_of("video", 0, 0, 40)
    window[~here] = 0.0
    number = np.round(index).astype(int)
    inside = (number >= 0) & (number < 40) & (np.abs(index - number) < 0.26)
    vectors = np.where(inside[:, None], window[np.clip(number, 0, 39)], 0.0).astype(np.float32)
    zeros = np.zeros(count, np.float32)
    neighbours = references.search("video", vectors, 24)
    channel = matching._Channel(vectors, np.ones(count, bool), zeros, zeros + 0.1, neighbours)
    return matching.Query(rate, seconds, {"video": channel})


def test_a_line_is_found_within_its_reach_with_the_evidence_of_its_segments(references):
    query = query_along(references, 1.0, OFFSET, rate=0.8)
    channel = query.channels["video"]
    channel.vectors[0] *= -1  # as unlike as can be
    channel.vectors[6] *= 0.25
    channel.present[2] = False
    for place in (11, 12, 13):
        found = matching._align(references, query, 0, place, {"video": 0.8})
        assert (found.source, found.offset_seconds, found.rate) == (0, OFFSET, 0.8)
        # Segments between two of the reference are left out; the reference lacks that at 8 s.
        np.testing.assert_allclose(found.query_seconds, 0.5 * np.arange(11) / 0.8)
        expected = [-1.0, np.nan, 10, 2.5, 0, 10, 10, 10, 10, 10, 10]
        np.testing.assert_allclose(found.by_segment["video"], expected, rtol=1e-5)
        assert found.agrees.tolist() == [False, False, True, True, False, *[True] * 6]
        # Of ten segments; 20 at a quarter of a second, the last of them as long as the span.
        evidence = 71.5 / 10 * np.sqrt((20 * 0.25 + 0.8) / 0.8)
        assert found.by_modality["video"] == pytest.approx(evidence, rel=1e-5)
        assert found.evidence(["video", "audio"]) == found.by_modality["video"]
    for source, place in ((0, 10), (1, 12)):  # further away, and another source
        other = matching._align(references, query, source, place, {"video": 0.8})
        assert other.by_modality["video"] < 0.4 * evidence
    channel.present[:] = np.arange(21) == 10
    one = matching._align(references, query, 0, 12, {"video": 0.8}).by_modality["video"]
    assert one == pytest.approx(10 * np.sqrt((0.25 + 0.8) / 0.8), rel=1e-5)  # of one segment
    channel.present[:] = False
    assert matching._align(references, query, 0, 12, {"video": 0.8}) is None


@pytest.mark.parametrize("place", [10, 13])
def test_the_reach_of_a_line_includes_its_ends(references, place):
    query = query_along(references, 1.0, 5.75)
    assert matching._align(references, query, 0, place, {"video": 0.8}).offset_seconds == 5.75


def test_the_best_line_of_all_renderings_is_kept_and_the_unchanged_query_lies_where_it_is(
    references,
):
    slow, right = query_along(references, 1.0, 9.0), query_along(references, 1.0, OFFSET)
    slow.channels["video"].vectors[8:] = 0.0  # a part alone
    found = matching.align(references, [slow, right], {"video": 0.8})
    assert (found[0].source, found[0].offset_seconds) == (0, OFFSET)
    evidence = [one.evidence(["video"]) for one in found]
    assert evidence == sorted(evidence, reverse=True)
    known = {
        one.source: one
        for one in matching.align(references, [right], {"video": 0.8}, known={1: 4.0})
    }
    assert abs(known[1].offset_seconds - 4.0) <= 0.75
    assert known[0].offset_seconds == OFFSET


def test_a_query_is_measured_against_the_cohort_and_finds_its_neighbours(references):
    window, present = references.vectors_of("video", 0, 12, 20)
    rendering = SegmentFeatures({"video": window}, {"video": present}, 4.0, 0.8)
    (query,) = matching.prepare(references, [rendering], ["video"])
    assert query.rate == 0.8
    assert query.seconds.tolist() == [0.25 * n for n in range(8)]
    channel = query.channels["video"]
    chance = window @ references.vectors["video"].values.T  # all are in the cohort
    np.testing.assert_allclose(channel.mean, chance.mean(axis=1), atol=1e-6)
    scale = np.where(present, chance.std(axis=1), 64**-0.5)
    np.testing.assert_allclose(channel.scale, scale, rtol=1e-5)
    similarity, sources, segments = channel.neighbours
    assert sources[:, 0].tolist() == [0] * 7
    assert segments[:, 0].tolist() == [12, 13, 14, 15, 17, 18, 19]
    np.testing.assert_allclose(similarity[:, 0], 1.0, rtol=1e-5)
    (other,) = matching.prepare(references, [rendering], ["video"], exclude=0)
    assert set(np.unique(other.channels["video"].neighbours[1])) == {1}


@pytest.mark.parametrize("slope", [0.95, 0.975, 1.025, 1.05])
def test_lines_of_other_rates_turn_about_the_middle_of_the_query(references, slope):
    query = query_along(references, slope, 2.0, count=61)  # 15 s
    found = matching._align(references, query, 0, 4, {"video": 1.0})
    assert found.rate == slope
    assert found.offset_seconds == pytest.approx(7.5 * (1 - slope) + 2.0)
    assert found.by_segment["video"].max() == pytest.approx(10, rel=1e-5)


@pytest.mark.parametrize(("offset", "outside"), [(-1.0, slice(None, 2)), (17.0, slice(-5, None))])
def test_a_query_that_reaches_over_the_source_has_no_evidence_there(references, offset, outside):
    query = query_along(references, 1.0, offset)
    place = round(offset / 0.5)
    found = matching._align(references, query, 0, place, {"video": 1.0})
    assert found.offset_seconds == offset
    expected = np.full(11, 10.0)
    expected[outside] = 0.0
    np.testing.assert_allclose(found.by_segment["video"], expected, rtol=1e-5)
    evidence = expected.sum() / 11 * np.sqrt(21 * 0.25 + 1.0)
    assert found.by_modality["video"] == pytest.approx(evidence, rel=1e-5)
    assert matching._align(references, query, 0, 200, {"video": 1.0}) is None


def test_evidence_is_added_at_a_right_angle_and_few_bins_per_source_become_candidates():
    assert matching.fuse([3.0, -4.0]) == 3.0
    assert matching.fuse([np.array([3.0, 0.0]), np.array([4.0, -1.0])]).tolist() == [5.0, 0.0]
    votes = {(0, number, 4): 100.0 - number for number in range(9)}
    votes |= {(source, 1, 4): float(source) for source in range(1, 30)}
    votes |= {(29, 0, 4): 29.0}
    bins = matching._candidates(votes, 0.0)
    assert bins[:4] == [(0, 0, 4), (0, 1, 4), (29, 0, 4), (29, 1, 4)]
    assert [source for source, _, _ in bins[4:]] == list(range(28, 14, -1))
    assert matching._candidates(votes, 93.0) == bins[:2]


@pytest.fixture(scope="module")
def channel(library, encoders, tmp_path_factory):
    """An index in which 15 of 60 sources begin with the same black leader and the same logo."""
    index = FingerprintIndex.create(tmp_path_factory.mktemp("channel"), encoders, SETTINGS)
    index.add(
        [
            *((f"film {n}", joined([leader(5), clip(200, 3.0), clip(n, 4.0)])) for n in range(15)),
            *((f"other {n}", clip(n, 4.0)) for n in range(300, 345)),
        ]
    )
    return index


def test_a_logo_of_fifteen_sources_is_no_single_source_without_a_part_of_its_own(channel):
    result = channel.query(joined([leader(5), clip(200, 3.0)]), count=16)
    names = {f"film {n}" for n in range(15)}
    assert (result.best, result.verdict, set(result.sources)) == (None, "shared", names)
    for match in result.matches[:15]:
        assert set(match.shared_with) == names - {match.source}
        (interval,) = match.intervals
        assert interval.query_start == pytest.approx(5.0, abs=0.6)
        assert interval.shared_by == 15
    result = channel.query(joined([leader(5), clip(200, 3.0), clip(4, 4.0)]))
    assert (result.verdict, result.best.source) == ("match", "film 4")
    shared, own = result.best.intervals
    assert (shared.shared_by, own.shared_by) == (15, 1)
    assert own.query_start == pytest.approx(8.0, abs=1.2)
    # Black and silence carry no evidence.
    assert channel.query(leader(5)).matches == []


def test_a_film_cut_together_from_three_has_three_sources(channel):
    numbers = (301, 302, 303)
    result = channel.query(joined([*(clip(n, 4.0) for n in numbers)]))
    accepted = {match.source: match for match in result.matches if match.accepted}
    assert set(accepted) == {f"other {n}" for n in numbers}
    for place, number in enumerate(numbers):
        match = accepted[f"other {number}"]
        (interval,) = match.intervals
        found = dataclasses.astuple(interval)[:4]
        np.testing.assert_allclose(found, (4 * place, 4 * place + 4, 0, 4), atol=0.6)
        assert match.shared_with == ()


def test_silent_audio_under_a_film_and_one_colour_over_its_audio_are_said(library):
    film = excerpt(clip(7), 1, 5)
    silent = dataclasses.replace(film, waveform=np.zeros_like(film.waveform))
    grey = dataclasses.replace(film, frames=np.full_like(film.frames, 99))
    for query, empty, said in (
        (film, (), ""),
        (silent, ("audio",), "the audio is silent: only the video was compared"),
        (grey, ("video",), "the video shows one colour: only the audio was compared"),
        (dataclasses.replace(silent, frames=grey.frames), (), ""),
        (excerpt(clip(7, video=False), 1, 5), (), ""),
    ):
        result = library.query(query)
        assert (result.empty, result.remark) == (empty, said)
    assert library.query(silent).best.source == "clip 7"
    assert library.query(silent, modalities=("audio",)).empty == ()
    assert library.query(silent, required=("audio",)).best is None
    with pytest.raises(FingerprintError, match="the query has no video, which is required"):
        library.query(excerpt(clip(7, video=False), 1, 5), required=("video",))
