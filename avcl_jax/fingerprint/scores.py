"""Alignments to matches: scores of a whole query or a part, by modality, and shared parts.

A query may be cut together from several sources, which agree with a part of it each, and many
sources may have the same logo, jingle or trailer. Both need the evidence of a part of a query.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from avcl_jax.export.runs import MODALITIES
from avcl_jax.fingerprint.answer import Interval, Match, SegmentScore
from avcl_jax.fingerprint.calibration import THRESHOLD, Calibration
from avcl_jax.fingerprint.database import SourceRow
from avcl_jax.fingerprint.matching import Alignment, fuse

# Shorter parts of a query are not scored: there are many, and each is weak evidence.
_SHORTEST_PART_SECONDS = 3.0
# Two sources match a part of the query equally well if the similarity of one, averaged over these
# seconds, is at least this fraction of the other's. For recodings of the same footage the fraction
# is nearly 1, for other footage nearly 0.
_SMOOTHING_SECONDS = 2.0
_EQUALLY = 0.5
# Intervals with a smaller fraction of the resemblance of the strongest interval are due to chance.
_WEAKEST_INTERVAL = 0.25


def make_matches(
    alignments: Sequence[Alignment],
    calibrations: Callable[[Sequence[str]], Calibration],
    sources: Sequence[SourceRow],
    *,
    spans: Mapping[str, float],
    segment_seconds: float,
    query_seconds: float,
    required: Sequence[str] = (),
    known: Mapping[int, float],
) -> list[Match]:
    """Scores the alignments of one query, one per source; returns the best match first.

    Args:
        calibrations: modalities -> calibration of their evidence together.
        sources: all sources of the index, by number.
        spans: modality -> length of a segment, of the modalities that were compared.
        segment_seconds: length of a segment of the answer.
        known: number of each source whose file is the query -> second at which the query begins.
    """
    together = calibrations(list(spans))
    segments = sum(source.segments for source in sources)
    parts = []
    for alignment in alignments:
        tried = _parts(alignment, query_seconds, min(spans.values()))
        whole = _Part(alignment, np.ones(len(alignment.agrees), bool), query_seconds, segments)
        # Each part is another query that may match by chance.
        some = [_Part(alignment, *part, segments * len(tried)) for part in tried]
        parts.append(max([whole, *some], key=lambda part: part.score(together, spans)))
    parts.sort(key=lambda p: (-p.score(together, spans), -p.alignment.evidence(spans)))
    accepted = [p.alignment for p in parts if p.score(together, spans) >= THRESHOLD]
    matches = []
    for part in parts:
        alignment, score = part.alignment, part.score(together, spans)
        source, same = sources[alignment.source], alignment.source in known
        rate = 1.0 if same else alignment.rate
        offset = known.get(alignment.source, alignment.offset_seconds)
        matched = tuple(
            m
            for m in alignment.by_segment
            if part.score(calibrations([m]), {m: spans[m]}) >= THRESHOLD
        )
        others = [a for a in accepted if a is not alignment and score >= THRESHOLD]
        equal = [_equally_well(alignment, other) for other in others]
        rivals = [
            sources[other.source].name
            for other, shared in zip(others, equal, strict=True)
            if part.without(shared).score(together, spans) < THRESHOLD
        ]
        length = segment_seconds / alignment.rate
        intervals = _intervals(alignment, 1 + sum(equal, np.zeros(len(part.inside), int)), length)
        match = Match(
            source=source.name,
            path=source.path,
            offset_seconds=offset,
            rate=rate,
            score=score,
            accepted=same or (score >= THRESHOLD and set(required) <= set(matched)),
            same_file=same,
            matched=tuple(alignment.by_modality) if same else matched,
            shared_with=() if same else tuple(rivals),
            video_score=alignment.by_modality.get("video"),
            audio_score=alignment.by_modality.get("audio"),
            duration_seconds=source.duration_seconds,
            intervals=[
                Interval(a, b, a * rate + offset, b * rate + offset, count)
                for a, b, count in intervals
            ],
            segments=[
                SegmentScore(start, start + length, video, audio)
                for start, video, audio in zip(
                    alignment.query_seconds.tolist(), *_columns(alignment), strict=True
                )
            ],
        )
        matches.append(match)
    return matches


class _Part(NamedTuple):
    """Part of a query beside a source."""

    alignment: Alignment  # of the whole query
    inside: np.ndarray  # bool [segments], those of the part
    seconds: float
    segments: int  # of the index, times the number of parts that were tried

    def score(self, calibration: Calibration, spans: Mapping[str, float]) -> float:
        """Returns the score by the modalities of `spans`."""
        # The evidence of the whole is that to which the calibration was fitted.
        evidence = (
            self.alignment.evidence(spans)
            if self.inside.all()
            else _evidence(self.alignment, self.inside, spans)
        )
        return calibration.score(evidence, query_seconds=self.seconds, segments=self.segments)

    def without(self, segments: np.ndarray) -> _Part:
        """Returns the rest of the part."""
        left = self.inside & ~segments
        seconds = self.seconds * float(left.sum()) / max(int(self.inside.sum()), 1)
        return self._replace(inside=left, seconds=seconds)


def _strength(alignment: Alignment) -> np.ndarray:
    """Returns how much each segment resembles the source, all modalities together: [segments]."""
    return fuse([np.nan_to_num(values) for values in alignment.by_segment.values()])


def _evidence(alignment: Alignment, inside: np.ndarray, spans: Mapping[str, float]) -> float:
    """Evidence, as `align` measures it, of some segments of the query."""
    times = alignment.query_seconds
    step = float(times[-1] - times[0]) / max(len(times) - 1, 1) * alignment.rate
    total = 0.0
    for modality, span in spans.items():
        values = alignment.by_segment.get(modality, np.full(len(inside), np.nan))
        some = values[inside & ~np.isnan(values)]
        if len(some):
            total += max(float(some.mean()), 0.0) ** 2 * (len(some) * step + span) / span
    return float(np.sqrt(total))


def _parts(
    alignment: Alignment, query_seconds: float, span_seconds: float
) -> list[tuple[np.ndarray, float]]:
    """Halves, quarters and so on of a query, at steps of half their length, as segment masks."""
    starts = alignment.query_seconds
    ends = starts + span_seconds / alignment.rate
    parts = []
    length = query_seconds / 2
    while length >= _SHORTEST_PART_SECONDS:
        for begin in np.arange(0, query_seconds - length + 1e-6, length / 2):
            inside = (starts >= begin - 1e-6) & (ends <= begin + length + 1e-6)
            if inside.any():
                parts.append((inside, length))
        length /= 2
    return parts


def _equally_well(alignment: Alignment, other: Alignment) -> np.ndarray:
    """Marks segments that resemble this source and another about equally: bool [segments]."""
    own = _smoothed(alignment)
    there = np.interp(alignment.query_seconds, other.query_seconds, _smoothed(other), 0.0, 0.0)
    return (own > 2.0) & (there >= _EQUALLY * own)


def _smoothed(alignment: Alignment) -> np.ndarray:
    """Strength, averaged over time."""
    times = alignment.query_seconds
    near = np.abs(times[:, None] - times) <= _SMOOTHING_SECONDS / 2
    return (near @ _strength(alignment)) / near.sum(axis=1)


def _intervals(
    alignment: Alignment, shared_by: np.ndarray, length: float
) -> list[tuple[float, float, int]]:
    """Returns start and end of the intervals of the query that agree, and how many share them."""
    runs: list[tuple[float, float, float, list[int]]] = []
    resemblance = _strength(alignment)
    for n in alignment.agrees.nonzero()[0].tolist():
        start, count = float(alignment.query_seconds[n]), int(shared_by[n])
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


def _columns(alignment: Alignment) -> Iterator[list[float | None]]:
    """Yields the similarity of all segments, by modality; None where there is none."""
    missing = np.full(len(alignment.query_seconds), np.nan)
    for modality in MODALITIES:
        values = alignment.by_segment.get(modality, missing)
        yield [None if np.isnan(value) else value for value in values.tolist()]
