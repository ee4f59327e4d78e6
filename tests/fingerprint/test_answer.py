"""Answers by hand: intervals, what a match requires, and the verdict over several sources."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from avcl_jax.fingerprint.answer import Match, QueryResult, SegmentScore, make_match
from avcl_jax.fingerprint.calibration import THRESHOLD
from avcl_jax.fingerprint.database import SourceRow
from avcl_jax.fingerprint.matching import Alignment
from avcl_jax.fingerprint.scores import Scored

SOURCES = [
    SourceRow("clip", "digest", 60.0, "clip.mp4"),
    SourceRow("other", "another digest", 9.0, None),
]


def scored(
    starts: list[float],
    strengths: list[float],
    *,
    rate: float = 1.0,
    agrees: list[bool] | None = None,
    shared_by: list[int] | None = None,
    score: float = THRESHOLD,
    rivals: tuple[int, ...] = (),
) -> Scored:
    values = np.array(strengths)
    alignment = Alignment(
        source=0,
        rate=rate,
        offset_seconds=5.0,
        by_modality={"video": 1.5},
        query_seconds=np.array(starts),
        agrees=np.ones(len(values), bool) if agrees is None else np.array(agrees),
        by_segment={"video": values},
    )
    shared = np.ones(len(values), int) if shared_by is None else np.array(shared_by)
    return Scored(alignment, score, ("video",), shared, rivals)


def match_of(found: Scored, required=(), known=None) -> Match:
    return make_match(found, SOURCES, 1.0, required=required, known=known or {})


def intervals(found: Scored) -> list[tuple[float, float, int]]:
    match = match_of(found)
    return [(i.query_start, i.query_end, i.shared_by) for i in match.intervals]


def test_segments_that_touch_make_one_interval_and_a_gap_two() -> None:
    assert intervals(scored([0, 0.5, 1.5, 2.75], [4, 4, 4, 4])) == [(0, 2.5, 1), (2.75, 3.75, 1)]
    agrees = [True, False, False, True]
    assert intervals(scored([0, 1, 2, 3], [4] * 4, agrees=agrees)) == [(0, 1, 1), (3, 4, 1)]
    assert intervals(scored([0, 1], [4, 4], agrees=[False, False])) == []


def test_an_interval_ends_where_others_share_the_next_and_counts_the_lower_middle() -> None:
    found = scored([0, 0.5, 1, 1.5, 2], [4] * 5, shared_by=[1, 1, 3, 5, 1])
    assert intervals(found) == [(0, 1, 1), (1, 2, 3), (2, 3, 1)]


def test_an_interval_of_less_than_a_quarter_of_the_strongest_is_chance() -> None:
    found = scored([0, 1, 3, 5], [2.0, 2.0, 1.0, 0.99])
    assert intervals(found) == [(0, 2, 1), (3, 4, 1)]


def test_places_in_the_reference_follow_the_rate_and_segments_without_video_have_no_score() -> None:
    match = match_of(scored([0, 1], [4.0, np.nan], rate=2.0, rivals=(1,)))
    (interval, _) = (*match.intervals, None)
    assert (interval.query_start, interval.query_end) == (0, 0.5)
    assert (interval.reference_start, interval.reference_end) == (5, 6)
    assert match.segments == [SegmentScore(0, 0.5, 4.0, None), SegmentScore(1, 1.5, None, None)]
    assert (match.offset_seconds, match.rate, match.shared_with) == (5.0, 2.0, ("other",))
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
def test_a_match_needs_the_threshold_and_every_required_modality(score, required, accepted) -> None:
    found = scored([0, 1], [4, 4], score=score, rivals=(1,))
    assert match_of(found, required).accepted is accepted
    # The file itself needs neither, lies where it was found, and is shared with nobody.
    same = match_of(found, required, {0: 7.0})
    assert (same.accepted, same.same_file, same.shared_with) == (True, True, ())
    assert (same.offset_seconds, same.rate, same.what_matched) == (7.0, 1.0, "the same file")


def test_the_verdict_is_of_the_best_match_that_nobody_shares() -> None:
    match = match_of(scored([0, 1], [4, 4]))
    shared = dataclasses.replace(match, source="shared", shared_with=("clip",))
    weak = dataclasses.replace(match, source="weak", accepted=False)
    same = dataclasses.replace(match, source="same", same_file=True)
    for matches, verdict, sources in (
        ([], "no match", ()),
        ([weak], "no match", ()),
        ([shared, weak], "shared", ("shared",)),
        ([shared, match, weak], "match", ("shared", "clip")),
        ([same, match], "same file", ("same",)),
    ):
        result = QueryResult(matches, query_seconds=2.0)
        assert (result.verdict, result.sources) == (verdict, sources)
    assert QueryResult([shared, match], query_seconds=2.0).best is match


def test_the_modalities_that_match_are_said_in_words() -> None:
    video = match_of(scored([0, 1], [4, 4]))
    both = dataclasses.replace(video, audio_score=0.5)
    neither = dataclasses.replace(both, matched=())
    said = {
        "the video matches, the audio was not compared": video,
        "the video does not match, the audio was not compared": dataclasses.replace(
            video, matched=()
        ),
        "only the video matches": both,
        "video and audio match": dataclasses.replace(both, matched=("video", "audio")),
        "neither video nor audio matches alone, together they do": neither,
        "neither video nor audio matches alone": dataclasses.replace(neither, score=2.0),
    }
    assert [match.what_matched for match in said.values()] == list(said)
