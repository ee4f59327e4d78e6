"""What a query answers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from avcl_jax.fingerprint.calibration import THRESHOLD
from avcl_jax.fingerprint.matching import Alignment
from avcl_jax.fingerprint.part import SourceRow


@dataclasses.dataclass(frozen=True)
class Interval:
    """Seconds of the query and the seconds of the reference that they resemble."""

    query_start: float
    query_end: float
    reference_start: float
    reference_end: float


@dataclasses.dataclass(frozen=True)
class SegmentScore:
    """How much a piece of the query resembles the source at its place.

    Attributes:
        query_start: seconds.
        query_end: seconds.
        video: standard deviations above chance; None without a picture to compare.
        audio: the same of the sound.
    """

    query_start: float
    query_end: float
    video: float | None
    audio: float | None


@dataclasses.dataclass(frozen=True)
class Match:
    """A source from which a query may come.

    Attributes:
        source: name in the index.
        path: of its file; None where it was added from memory.
        offset_seconds: time in the source of the query's beginning.
        rate: seconds of the source per second of the query.
        score: −log10 of the chance that an unrelated query finds as much; no upper bound.
        accepted: whether that chance is small enough to call it a match.
        video_score: evidence of the picture, 0 is chance; None where it was not compared.
        audio_score: the same of the sound.
        duration_seconds: of the source.
        intervals: where they agree.
        segments: how much they agree all along the query, in order.
    """

    source: str
    path: str | None
    offset_seconds: float
    rate: float
    score: float
    accepted: bool
    video_score: float | None
    audio_score: float | None
    duration_seconds: float
    intervals: Sequence[Interval]
    segments: Sequence[SegmentScore]


@dataclasses.dataclass(frozen=True)
class QueryResult:
    """All that a query found.

    Attributes:
        matches: one per source, best first, also those that are not accepted.
        query_seconds: length of the query.
        threshold: score from which a match is accepted.
    """

    matches: Sequence[Match]
    query_seconds: float
    threshold: float = THRESHOLD

    @property
    def best(self) -> Match | None:
        """The best accepted match; None is "no match"."""
        return self.matches[0] if self.matches and self.matches[0].accepted else None


def make_match(
    alignment: Alignment, source: SourceRow, score: float, segment_seconds: float
) -> Match:
    """Describes an alignment to those who asked.

    Args:
        alignment: found.
        source: its source.
        score: calibrated.
        segment_seconds: length of a segment at the reference's pace.
    """
    length = segment_seconds / alignment.rate
    runs: list[list[float]] = []
    for start in alignment.query_seconds[alignment.agrees].tolist():
        if runs and start <= runs[-1][1]:
            runs[-1][1] = start + length
        else:
            runs.append([start, start + length])
    rate, offset = alignment.rate, alignment.offset_seconds
    return Match(
        source=source.name,
        path=source.path,
        offset_seconds=offset,
        rate=rate,
        score=score,
        accepted=bool(score >= THRESHOLD),
        video_score=alignment.by_modality.get("video"),
        audio_score=alignment.by_modality.get("audio"),
        duration_seconds=source.duration_seconds,
        intervals=[Interval(a, b, *(np.array([a, b]) * rate + offset).tolist()) for a, b in runs],
        segments=_segment_scores(alignment, length),
    )


def _segment_scores(alignment: Alignment, length: float) -> list[SegmentScore]:
    starts = alignment.query_seconds.tolist()
    columns = {
        modality: [None if math.isnan(value) else value for value in values.tolist()]
        for modality, values in alignment.by_segment.items()
    }
    nothing = [None] * len(starts)
    video, audio = columns.get("video", nothing), columns.get("audio", nothing)
    return [
        SegmentScore(start, start + length, v, a)
        for start, v, a in zip(starts, video, audio, strict=True)
    ]
