"""Alignments by hand: scores of parts, intervals, rivals, the needs of a match, and the verdict."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from avcl_jax.fingerprint import answer
from avcl_jax.fingerprint.answer import Match, QueryResult, ScoreBy, SegmentScore
from avcl_jax.fingerprint.calibration import Calibration
from avcl_jax.fingerprint.database import SourceRow
from avcl_jax.fingerprint.details import Judgement
from avcl_jax.fingerprint.matching import Alignment
from avcl_jax.fingerprint.query import _line
from avcl_jax.fingerprint.settings import THRESHOLD

KNOWN = Calibration(location=3.0, growth=0.5, scale=0.7, segments=1000)
SOURCES = [
    SourceRow("clip", "digest", 60.0, "clip.mp4", 400),
    SourceRow("other", "another digest", 9.0, None, 500),
    SourceRow("third", "a third digest", 9.0, None, 100),
]


class Fixed:
    """A calibration that gives every evidence one score."""

    def __init__(self, score=THRESHOLD):
        self._score = score

    def score(self, evidence, **_):
        return self._score


def alignment(by_segment, starts, *, rate=1.0, **fields) -> Alignment:
    agrees = np.ones(len(starts), bool)
    made = Alignment(0, rate, 5.0, {}, np.array(starts, float), agrees, by_segment)
    return dataclasses.replace(made, **fields)


def constant(source: int, value: float, whole: float, *, seconds: float = 12.0) -> Alignment:
    """An alignment of one strength all along a query, by segments of 0.5 s."""
    starts = np.arange(0.0, seconds, 0.5)
    by_modality = {"video": whole, "audio": -1.0}
    strengths = {"video": np.full(len(starts), value)}
    return alignment(strengths, starts, source=source, by_modality=by_modality)


def matches(
    alignments, calibration, *, seconds=2.0, required=(), known=None, judged=()
) -> list[Match]:
    return answer.make_matches(
        alignments,
        judged or [Judgement(0.0, {"video": 0.0, "audio": 0.0})] * len(alignments),
        lambda modalities: calibration,
        SOURCES,
        spans={"video": 0.5},
        segment_seconds=1.0,
        query_seconds=seconds,
        required=required,
        known=known or {},
    )


@pytest.mark.parametrize("rate", [1.0, 1.25])
def test_evidence_of_a_part_is_the_mean_over_its_segments_and_grows_with_their_time(rate):
    by_segment = {"video": np.full(9, 3.0), "audio": np.array([4.0] * 5 + [np.nan] * 4)}
    query = alignment(by_segment, (1.0 + 0.25 * np.arange(9)) / rate, rate=rate)
    spans = {"video": 0.5, "audio": 1.0}
    video, audio = 3.0 * ((9 * 0.25 + 0.5) / 0.5) ** 0.5, 4.0 * (5 * 0.25 + 1.0) ** 0.5
    everything = answer._evidence(query, np.ones(9, bool), spans)
    assert everything == pytest.approx(np.hypot(video, audio))
    silent = answer._evidence(query, np.arange(9) > 6, spans)
    assert silent == pytest.approx(3.0 * ((2 * 0.25 + 0.5) / 0.5) ** 0.5)


def test_parts_are_halves_and_quarters_of_three_seconds_or_more():
    query = alignment({}, np.arange(12.0), rate=2.0)
    parts = answer._parts(query, 12.0, span_seconds=2.0)
    assert [seconds for _, seconds in parts] == [6.0] * 3 + [3.0] * 7
    assert [int(inside.sum()) for inside, _ in parts] == [6, 6, 6, 3, 2, 3, 2, 3, 2, 3]
    assert [int(inside.argmax()) for inside, _ in parts] == [0, 3, 6, 0, 2, 3, 5, 6, 8, 9]


def test_sources_match_equally_well_by_their_strength_averaged_over_two_seconds():
    single = alignment({"video": np.eye(5)[2] * 6}, np.arange(5.0))
    assert answer._smoothed(single).tolist() == [0, 2, 2, 2, 0]
    mixed = {"video": np.array([3.0, -1.0]), "audio": np.array([4.0, np.nan])}
    assert answer._strength(alignment(mixed, np.arange(2.0))).tolist() == [5, 0]
    own = constant(0, 4.0, 9.0, seconds=2.0)
    for other, equally in ((2.0, True), (1.9, False)):
        assert (answer._equally_well(own, constant(1, other, 9.0)) == equally).all()
    weak = constant(0, 2.0, 9.0)
    assert not answer._equally_well(weak, weak).any()
    # Where the other source has no segment it resembles nothing.
    later = dataclasses.replace(own, query_seconds=own.query_seconds + 5)
    for other, segments in ((own, range(4)), (later, range(10, 14))):
        equal = answer._equally_well(constant(0, 4.0, 9.0), other)
        assert equal.nonzero()[0].tolist() == list(segments)


def test_the_score_of_a_whole_query_is_of_its_evidence_and_of_a_part_of_its_segments():
    query = constant(0, 3.0, 8.0)
    whole = answer._Part(query, np.ones(24, bool), 12.0, 1000)
    spans = {"video": 0.5, "audio": 0.5}
    assert whole.score(KNOWN, spans) == KNOWN.score(8.0, query_seconds=12.0, segments=1000)
    video_only = dataclasses.replace(query, by_modality={"video": 8.0})
    assert whole._replace(alignment=video_only).score(KNOWN, spans) == whole.score(KNOWN, spans)
    one = whole._replace(inside=np.arange(24) == 3, seconds=0.5)
    assert one.without(np.zeros(24, bool)).seconds == 0.5
    assert one.without(one.inside).seconds == 0.0
    rest = whole.without(np.arange(24) < 18)
    assert (rest.inside.sum(), rest.seconds) == (6, 3.0)
    evidence = 3.0 * ((6 * 0.5 + 0.5) / 0.5) ** 0.5
    expected = KNOWN.score(evidence, query_seconds=3.0, segments=1000)
    assert rest.score(KNOWN, spans) == pytest.approx(expected)


def test_sources_that_share_the_only_part_are_rivals_and_a_part_counts_as_one_of_many_queries():
    first, second = constant(0, 5.0, 12.0), constant(1, 5.0, 0.0)
    half = np.where(second.query_seconds < 6, 0.0, 5.0)
    second = dataclasses.replace(second, by_segment={"video": half})
    three = [constant(2, 0.0, 3.0), second, first]
    clip, other, third = matches(three, KNOWN, seconds=12.0)
    # Of equal scores the one with more evidence for the whole query comes first.
    assert [match.source for match in (clip, other, third)] == ["clip", "other", "third"]
    # Ten halves and quarters are tried, in an index of a thousand segments.
    evidence = 5.0 * ((12 * 0.5 + 0.5) / 0.5) ** 0.5
    expected = KNOWN.score(evidence, query_seconds=6.0, segments=10_000)
    assert other.score == pytest.approx(expected)
    assert (other.shared_with, third.shared_with) == (("clip",), ())
    assert clip.shared_with == ()  # its first half suffices
    _, same, _ = matches(three, KNOWN, seconds=12.0, known={1: 0.0})
    assert (same.source, same.shared_with) == ("other", ())
    assert [i.shared_by for i in clip.intervals] == [1, 2]
    assert (clip.matched, third.matched) == (("video",), ())


def test_a_score_at_the_threshold_is_a_match_of_the_whole_and_of_each_modality():
    for match in matches([constant(n, 5.0, 8.0, seconds=2.0) for n in range(2)], Fixed()):
        assert (match.score, match.accepted) == (THRESHOLD, True)
        assert (match.matched, match.shared_with) == (("video",), ())
        assert [i.shared_by for i in match.intervals] == [2]


def test_details_accept_what_the_encoders_do_not_and_tell_rivals_apart():
    alike = [constant(n, 5.0, 8.0, seconds=2.0) for n in range(2)]
    own = Judgement(7.0, {"video": 3.0, "audio": 0.0})
    nothing = Judgement(0.0, {"video": 0.0, "audio": 0.0})
    # By the encoders neither, by details one.
    clip, other = matches(alike, Fixed(1.0), judged=[own, nothing])
    assert (clip.source, clip.score, clip.accepted, clip.matched) == ("clip", 7.0, True, ("video",))
    assert (clip.shared_with, [i.shared_by for i in clip.intervals]) == ((), [1])
    assert (other.score, other.accepted, other.matched) == (1.0, False, ())
    assert clip.score_by == ScoreBy(1.0, 7.0, video_details=3.0, audio_details=0.0)
    assert other.score_by == ScoreBy(1.0, 0.0, video_details=0.0, audio_details=0.0)
    # By the encoders both, which share all of the query; the details of one differ.
    strong = Calibration(location=0.0, growth=0.0, scale=1.0, segments=1000)
    assert [m.shared_with for m in matches(alike, strong)] == [("other",), ("clip",)]
    clip, other = matches(alike, strong, judged=[own, nothing])
    assert (clip.shared_with, [i.shared_by for i in clip.intervals]) == ((), [1])
    assert (other.shared_with, [i.shared_by for i in other.intervals]) == (("clip",), [2])
    # Copies have the same details.
    both = matches(alike, Fixed(1.0), judged=[own, own])
    assert [match.shared_with for match in both] == [("other",), ("clip",)]


def intervals(starts, strengths, agrees=True, shared_by=1):
    found = alignment({"video": np.array(strengths)}, starts)
    found = dataclasses.replace(found, agrees=np.broadcast_to(agrees, len(starts)))
    return answer._intervals(found, np.broadcast_to(shared_by, len(starts)), 1.0)


def test_intervals_touch_or_part_end_where_others_share_the_next_and_are_not_chance():
    assert intervals([0, 0.5, 1.5, 2.75], [4] * 4) == [(0, 2.5, 1), (2.75, 3.75, 1)]
    agrees = [True, False, False, True]
    assert intervals([0, 1, 2, 3], [4] * 4, agrees) == [(0, 1, 1), (3, 4, 1)]
    assert intervals([0, 1], [4, 4], False) == []
    # The lower middle of the numbers of sources that share it.
    shared = intervals([0, 0.5, 1, 1.5, 2], [4] * 5, shared_by=[1, 1, 3, 5, 1])
    assert shared == [(0, 1, 1), (1, 2, 3), (2, 3, 1)]
    # Less than a quarter of the strongest is chance.
    assert intervals([0, 1, 3, 5], [2.0, 2.0, 1.0, 0.99]) == [(0, 2, 1), (3, 4, 1)]


def test_places_in_the_reference_follow_the_rate_and_segments_without_video_have_no_score():
    strengths = {"video": np.array([4.0, np.nan])}
    (match,) = matches(
        [alignment(strengths, [0, 1], rate=2.0, by_modality={"video": 1.5})], Fixed()
    )
    (interval,) = match.intervals
    assert dataclasses.astuple(interval) == (0, 0.5, 5, 6, 1)
    assert match.segments == [SegmentScore(0, 0.5, 4.0, None), SegmentScore(1, 1.5, None, None)]
    assert (match.offset_seconds, match.rate, match.path) == (5.0, 2.0, "clip.mp4")
    assert (match.video_score, match.audio_score, match.duration_seconds) == (1.5, None, 60.0)


@pytest.mark.parametrize(
    ("score", "required", "accepted"),
    [
        (THRESHOLD, (), True),
        (THRESHOLD - 0.1, (), False),
        (THRESHOLD, ("video",), True),
        (THRESHOLD, ("video", "audio"), False),
    ],
)
def test_a_match_needs_the_threshold_and_every_required_modality(score, required, accepted):
    two = [constant(n, 4.0, 8.0, seconds=2.0) for n in range(2)]
    first, _ = matches(two, Fixed(score), required=required)
    assert first.accepted is accepted
    # The file itself needs neither, and lies where it was found.
    same, _ = matches(two, Fixed(score), required=required, known={0: 7.0})
    assert (same.accepted, same.same_file) == (True, True)
    assert (same.offset_seconds, same.rate, same.what_matched) == (7.0, 1.0, "the same file")
    assert same.matched == ("video", "audio")


def test_the_verdict_is_of_the_best_match_that_nobody_shares():
    (match,) = matches([constant(0, 4.0, 8.0, seconds=2.0)], Fixed())
    shared = dataclasses.replace(match, source="shared", shared_with=("clip",))
    weak = dataclasses.replace(match, source="weak", accepted=False)
    same = dataclasses.replace(match, source="same", same_file=True)
    for found, verdict, sources in (
        ([], "no match", ()),
        ([weak], "no match", ()),
        ([shared, weak], "shared", ("shared",)),
        ([shared, match, weak], "match", ("shared", "clip")),
        ([same, match], "same file", ("same",)),
    ):
        result = QueryResult(found, query_seconds=2.0)
        assert (result.verdict, result.sources) == (verdict, sources)
    assert QueryResult([shared, match], query_seconds=2.0).best is match


def test_the_modalities_that_match_are_said_in_words():
    (both,) = matches([constant(0, 4.0, 8.0, seconds=2.0)], Fixed())
    video = dataclasses.replace(both, audio_score=None)
    audio = dataclasses.replace(both, video_score=None, matched=("audio",))
    neither = dataclasses.replace(both, matched=())
    said = {
        "the video matches, the audio was not compared": video,
        "the video does not match, the audio was not compared": dataclasses.replace(
            video, matched=()
        ),
        "the audio matches, the video was not compared": audio,
        "only the video matches": both,
        "video and audio match": dataclasses.replace(both, matched=("video", "audio")),
        "neither video nor audio matches alone, together they do": neither,
        "neither video nor audio matches alone": dataclasses.replace(neither, score=2.0),
    }
    assert [match.what_matched for match in said.values()] == list(said)
    for details, by in ((2.5, ""), (2.6, " by details")):
        scores = ScoreBy(2.5, details, video_details=0.0, audio_details=details)
        line = _line(dataclasses.replace(both, score_by=scores))
        assert line.startswith(f"clip from 5.00 s, score 2.5{by}: only the video matches")
