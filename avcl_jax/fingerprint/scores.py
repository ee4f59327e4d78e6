"""Scores of alignments: of a whole query or a part, by modality, and without what sources share.

A query may be cut together from several sources, which agree with a part of it each, and many
sources may have the same logo, jingle or trailer. Both need the evidence of a part of a query.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from avcl_jax.fingerprint.calibration import THRESHOLD, Calibration
from avcl_jax.fingerprint.matching import Alignment, fuse

# Shorter parts of a query are not scored: there are many, and each is weak evidence.
_SHORTEST_PART_SECONDS = 3.0
# Two sources match a part of the query equally well if the similarity of one, averaged over these
# seconds, is at least this fraction of the other's. For recodings of the same footage the fraction
# is nearly 1, for other footage nearly 0.
_SMOOTHING_SECONDS = 2.0
_EQUALLY = 0.5


@dataclasses.dataclass(frozen=True)
class Scored:
    """An alignment with its scores.

    Attributes:
        score: −log10 of the chance that an unrelated query finds as much.
        matched: modalities that reach the threshold without the other.
        shared_by: int [segments], number of sources that match each segment of the query as well
            as this one, itself included.
        rivals: numbers of other sources that match equally well, so that the rest of the query does
            not suffice for a match with this one; none below the threshold.
    """

    alignment: Alignment
    score: float
    matched: tuple[str, ...]
    shared_by: np.ndarray
    rivals: tuple[int, ...]


def score_alignments(
    alignments: Sequence[Alignment],
    calibrations: Callable[[Sequence[str]], Calibration],
    *,
    spans: Mapping[str, float],
    query_seconds: float,
    segments: int,
) -> list[Scored]:
    """Scores the alignments of one query, one per source; returns the best first.

    Args:
        alignments: result of `align`.
        calibrations: modalities -> calibration of their evidence together.
        spans: modality -> length of a segment, of the modalities that were compared.
        query_seconds: length of the query.
        segments: number of segments in the index.
    """
    together = calibrations(list(spans))

    def score_of(part: _Part) -> float:
        return part.score(together, spans)

    best_parts = []
    for alignment in alignments:
        whole = _Part(alignment, np.ones(len(alignment.agrees), bool), query_seconds, segments)
        parts = _parts(alignment, query_seconds, min(spans.values()))
        # Each part is another query that may match by chance.
        tried = [_Part(alignment, *part, segments * len(parts)) for part in parts]
        best_parts.append(max([whole, *tried], key=score_of))
    best_parts.sort(key=lambda part: (-score_of(part), -part.alignment.evidence(spans)))
    accepted = [part.alignment for part in best_parts if score_of(part) >= THRESHOLD]
    scored = []
    for part in best_parts:
        score = score_of(part)
        matched = [
            m
            for m in part.alignment.by_segment
            if part.score(calibrations([m]), {m: spans[m]}) >= THRESHOLD
        ]
        others = [a for a in accepted if a is not part.alignment and score >= THRESHOLD]
        equal = [_equally_well(part.alignment, other) for other in others]
        shared_by = 1 + sum(equal, np.zeros(len(part.inside), int))
        rivals = [
            other.source
            for other, shared in zip(others, equal, strict=True)
            if score_of(part.without(shared)) < THRESHOLD
        ]
        scored.append(Scored(part.alignment, score, tuple(matched), shared_by, tuple(rivals)))
    return scored


@dataclasses.dataclass(frozen=True)
class _Part:
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
        return dataclasses.replace(self, inside=left, seconds=seconds)


def strength(alignment: Alignment) -> np.ndarray:
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
    return (near @ strength(alignment)) / near.sum(axis=1)
