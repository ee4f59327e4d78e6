"""Result of a query."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

from avcl_jax.fingerprint.calibration import THRESHOLD
from avcl_jax.fingerprint.database import SourceRow
from avcl_jax.fingerprint.matching import Alignment
from avcl_jax.fingerprint.scores import Scored, strength

# Intervals with a smaller fraction of the resemblance of the strongest interval are due to chance.
_WEAKEST_INTERVAL = 0.25


@dataclasses.dataclass(frozen=True)
class Interval:
    """Seconds of the query and the seconds of the reference that they resemble.

    Attributes:
        query_start: seconds.
        query_end: seconds.
        reference_start: seconds.
        reference_end: seconds.
        shared_by: number of sources that match here as well as this one, itself included.
    """

    query_start: float
    query_end: float
    reference_start: float
    reference_end: float
    shared_by: int


@dataclasses.dataclass(frozen=True)
class SegmentScore:
    """Similarity of a part of the query to the source at its time.

    Attributes:
        query_start: seconds.
        query_end: seconds.
        video: standard deviations above chance; None without video to compare.
        audio: the same of the audio.
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
        path: path of its file; None if it was added from memory.
        offset_seconds: time in the source of the query's beginning.
        rate: seconds of the source per second of the query.
        score: −log10 of the chance that an unrelated query finds as much; no upper bound.
        accepted: whether that chance is small enough to call it a match, and all required
            modalities match.
        same_file: whether the query has the content of this file.
        matched: modalities that suffice for a match without the other.
        shared_with: names of other sources that match equally well; none if a part of the query
            that only this one matches suffices for a match.
        video_score: evidence of the video, 0 is chance; None where it was not compared.
        audio_score: the same of the audio.
        duration_seconds: length of the source.
        intervals: intervals that agree.
        segments: similarity all along the query, in order.
    """

    source: str
    path: str | None
    offset_seconds: float
    rate: float
    score: float
    accepted: bool
    same_file: bool
    matched: tuple[str, ...]
    shared_with: tuple[str, ...]
    video_score: float | None
    audio_score: float | None
    duration_seconds: float
    intervals: Sequence[Interval]
    segments: Sequence[SegmentScore]

    @property
    def what_matched(self) -> str:
        """Says which modalities match."""
        if self.same_file:
            return "the same file"
        compared = [
            name
            for name, score in (("video", self.video_score), ("audio", self.audio_score))
            if score is not None
        ]
        if len(compared) == 1:
            (other,) = {"video", "audio"} - set(compared)
            verb = "matches" if self.matched else "does not match"
            return f"the {compared[0]} {verb}, the {other} was not compared"
        if len(self.matched) == 1:
            return f"only the {self.matched[0]} matches"
        if self.matched:
            return "video and audio match"
        together = self.score >= THRESHOLD
        return f"neither video nor audio matches alone{', together they do' * together}"


@dataclasses.dataclass(frozen=True)
class QueryResult:
    """All that a query found.

    Attributes:
        matches: one per source, best first, also those that are not accepted.
        query_seconds: length of the query.
        required: modalities that had to match.
        empty: modalities of the query without content to compare: silent audio, or video of one
            colour.
        threshold: score from which a match is accepted.
    """

    matches: Sequence[Match]
    query_seconds: float
    required: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()
    threshold: float = THRESHOLD

    @property
    def best(self) -> Match | None:
        """The best accepted match that is not shared with other sources, None without one."""
        return next((m for m in self.matches if m.accepted and not m.shared_with), None)

    @property
    def verdict(self) -> str:
        """Returns "same file", "match", "shared" (by several sources alike) or "no match"."""
        if self.best is not None:
            return "same file" if self.best.same_file else "match"
        return "shared" if any(m.accepted for m in self.matches) else "no match"

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of all sources that match; for the same file, only of its copies."""
        accepted = [m for m in self.matches if m.accepted]
        return tuple(m.source for m in accepted if m.same_file or self.verdict != "same file")

    @property
    def remark(self) -> str:
        """Says which modality of the query was empty while the other was compared; "" if none."""
        if len(self.empty) != 1:
            return ""
        (empty,) = self.empty
        what = {"audio": "the audio is silent", "video": "the video shows one colour"}[empty]
        (other,) = {"video", "audio"} - {empty}
        return f"{what}: only the {other} was compared"


def make_match(
    scored: Scored,
    source: SourceRow,
    segment_seconds: float,
    *,
    rivals: Sequence[str],
    required: Sequence[str] = (),
    same_file_from: float | None = None,
) -> Match:
    """Returns the match that describes a scored alignment.

    Args:
        scored: the alignment and its scores.
        source: source of the alignment.
        segment_seconds: length of a segment at the reference's pace.
        rivals: names of the sources that match equally well.
        required: modalities that have to match.
        same_file_from: if the query is the source's own file, the second at which it begins.
    """
    alignment = scored.alignment
    rate, offset, same = alignment.rate, alignment.offset_seconds, same_file_from is not None
    if same_file_from is not None:
        rate, offset = 1.0, same_file_from
    intervals = [
        Interval(a, b, a * rate + offset, b * rate + offset, count)
        for a, b, count in _intervals(scored, segment_seconds / alignment.rate)
    ]
    return Match(
        source=source.name,
        path=source.path,
        offset_seconds=offset,
        rate=rate,
        score=scored.score,
        accepted=same or (scored.score >= THRESHOLD and all(m in scored.matched for m in required)),
        same_file=same,
        matched=tuple(alignment.by_modality) if same else scored.matched,
        shared_with=() if same else tuple(rivals),
        video_score=alignment.by_modality.get("video"),
        audio_score=alignment.by_modality.get("audio"),
        duration_seconds=source.duration_seconds,
        intervals=intervals,
        segments=_segment_scores(alignment, segment_seconds / alignment.rate),
    )


def _intervals(scored: Scored, length: float) -> list[tuple[float, float, int]]:
    """Returns start and end of the intervals of the query that agree, and how many share them."""
    alignment = scored.alignment
    runs: list[tuple[float, float, float, list[int]]] = []
    resemblance = strength(alignment)
    for n in alignment.agrees.nonzero()[0].tolist():
        start, count = float(alignment.query_seconds[n]), int(scored.shared_by[n])
        if runs and start <= runs[-1][1] and (runs[-1][3][0] == 1) == (count == 1):
            begin, _, total, counts = runs.pop()
            runs.append((begin, start + length, total + resemblance[n], [*counts, count]))
        else:
            if runs and start < runs[-1][1]:  # segments overlap, intervals do not
                runs[-1] = (runs[-1][0], start, *runs[-1][2:])
            runs.append((start, start + length, float(resemblance[n]), [count]))
    least = _WEAKEST_INTERVAL * max((total for _, _, total, _ in runs), default=0.0)
    return [
        (a, b, int(statistics.median_low(counts))) for a, b, total, counts in runs if total >= least
    ]


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
