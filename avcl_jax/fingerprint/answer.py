"""Result of a query."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

from avcl_jax.export.runs import MODALITIES
from avcl_jax.fingerprint.calibration import THRESHOLD
from avcl_jax.fingerprint.database import SourceRow
from avcl_jax.fingerprint.scores import Scored, strength

# Intervals with a smaller fraction of the resemblance of the strongest interval are due to chance.
_WEAKEST_INTERVAL = 0.25


@dataclasses.dataclass(frozen=True)
class Interval:
    """Seconds of the query and of the reference that agree, and how many sources match there."""

    query_start: float
    query_end: float
    reference_start: float
    reference_end: float
    shared_by: int


@dataclasses.dataclass(frozen=True)
class SegmentScore:
    """Similarity of seconds of the query to the source, in standard deviations above chance.

    It is None for a modality that the query lacks there.
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
        if self.video_score is None or self.audio_score is None:
            compared, other = MODALITIES if self.audio_score is None else MODALITIES[::-1]
            verb = "matches" if self.matched else "does not match"
            return f"the {compared} {verb}, the {other} was not compared"
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
        empty: modality of the query without content to compare (silent audio, or video of one
            colour), beside one that was compared.
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
        remarks = {
            "audio": "the audio is silent: only the video was compared",
            "video": "the video shows one colour: only the audio was compared",
        }
        return "".join(remarks[modality] for modality in self.empty)


def make_match(
    scored: Scored,
    sources: Sequence[SourceRow],
    segment_seconds: float,
    *,
    required: Sequence[str],
    known: Mapping[int, float],
) -> Match:
    """Returns the match that describes a scored alignment.

    Args:
        scored: the alignment and its scores.
        sources: all sources, by number.
        segment_seconds: length of a segment at the reference's pace.
        required: modalities that have to match.
        known: number of each source whose file is the query -> second at which the query begins.
    """
    alignment, length = scored.alignment, segment_seconds / scored.alignment.rate
    source, same = sources[alignment.source], alignment.source in known
    rate = 1.0 if same else alignment.rate
    offset = known.get(alignment.source, alignment.offset_seconds)
    columns = [
        [None if math.isnan(value) else value for value in alignment.by_segment[m].tolist()]
        if m in alignment.by_segment
        else [None] * len(alignment.query_seconds)
        for m in MODALITIES
    ]
    return Match(
        source=source.name,
        path=source.path,
        offset_seconds=offset,
        rate=rate,
        score=scored.score,
        accepted=same or (scored.score >= THRESHOLD and set(required) <= set(scored.matched)),
        same_file=same,
        matched=tuple(alignment.by_modality) if same else scored.matched,
        shared_with=() if same else tuple(sources[number].name for number in scored.rivals),
        video_score=alignment.by_modality.get("video"),
        audio_score=alignment.by_modality.get("audio"),
        duration_seconds=source.duration_seconds,
        intervals=[
            Interval(a, b, a * rate + offset, b * rate + offset, count)
            for a, b, count in _intervals(scored, length)
        ],
        segments=[
            SegmentScore(start, start + length, video, audio)
            for start, video, audio in zip(alignment.query_seconds.tolist(), *columns, strict=True)
        ],
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
