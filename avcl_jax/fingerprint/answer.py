"""Answers to queries: alignments become matches, with scores of a whole query or a part.

A query may be cut together from several sources, which agree with a part of it each, and many
sources may have the same logo, jingle or trailer. Both need the evidence of a part of a query.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from avcl_jax.export.encoder import MODALITIES
from avcl_jax.fingerprint.calibration import Calibration
from avcl_jax.fingerprint.database import SourceRow
from avcl_jax.fingerprint.details import Judgement
from avcl_jax.fingerprint.matching import Alignment, fuse
from avcl_jax.fingerprint.settings import THRESHOLD

# Shorter parts of a query are not scored: there are many, and each is weak evidence.
_SHORTEST_PART_SECONDS = 3.0
# Two sources match a part of the query equally well if the similarity of one, averaged over these
# seconds, is at least this fraction of the other's. For recodings of the same footage the fraction
# is nearly 1, for other footage nearly 0.
_SMOOTHING_SECONDS = 2.0
_EQUALLY = 0.5
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
class ScoreBy:
    """Scores by embeddings and details, on the scale of `Match.score`; 0 is chance or unknown."""

    embeddings: float  # of the encoders: as much from an unrelated query, anywhere in the index
    details: float  # of images and audio: as far above other sources that the query resembles
    video_details: float  # of the images alone
    audio_details: float


@dataclasses.dataclass(frozen=True)
class Match:
    """A source from which a query may come."""

    source: str  # name in the index
    path: str | None  # of its file; None if it was added from memory
    offset_seconds: float  # time in the source of the query's beginning
    rate: float  # seconds of the source per second of the query
    score: float  # −log10 of the chance that an unrelated query finds as much; no upper bound
    score_by: ScoreBy  # the higher one of `embeddings` and `details` is the score
    accepted: bool  # that chance is small, and all required modalities match; or the same file
    same_file: bool  # the query has the content of this file
    matched: tuple[str, ...]  # modalities that suffice for a match without the other
    # Names of other sources that match equally well; none if a part of the query that only this
    # one matches suffices for a match.
    shared_with: tuple[str, ...]
    video_score: float | None  # evidence of the video, 0 is chance; None where it was not compared
    audio_score: float | None
    duration_seconds: float  # of the source
    intervals: Sequence[Interval]
    segments: Sequence[SegmentScore]  # all along the query, in order

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
    """All that a query found."""

    matches: Sequence[Match]  # one per source, best first, also those that are not accepted
    query_seconds: float
    # Modality of the query without content to compare (silent audio, or video of one colour),
    # beside one that was compared.
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


def make_matches(
    alignments: Sequence[Alignment],
    judgements: Sequence[Judgement],
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
        judgements: what the details say along each alignment.
        calibrations: modalities -> calibration of their evidence together.
        sources: all sources of the index, by number.
        spans: modality -> length of a segment, of the modalities that were compared.
        segment_seconds: length of a segment of the answer.
        known: number of each source whose file is the query -> second at which the query begins.
    """
    together = calibrations(list(spans))
    count = sum(source.segments for source in sources)
    judged = {a.source: judgement for a, judgement in zip(alignments, judgements, strict=True)}

    def of_encoders(part: _Part) -> float:
        return part.score(together, spans)

    def score_by(part: _Part) -> ScoreBy:
        own = judged[part.alignment.source]
        by_modality = {f"{m}_details": score for m, score in own.by_modality.items()}
        return ScoreBy(embeddings=of_encoders(part), details=own.score, **by_modality)

    def score_of(part: _Part) -> float:
        by = score_by(part)
        return max(by.embeddings, by.details)

    parts = []
    for alignment in alignments:
        tried = _parts(alignment, query_seconds, min(spans.values()))
        whole = _Part(alignment, np.ones(len(alignment.agrees), bool), query_seconds, count)
        # Each part is another query that may match by chance.
        some = [_Part(alignment, *part, count * len(tried)) for part in tried]
        parts.append(max([whole, *some], key=of_encoders))
    parts.sort(key=lambda p: (-score_of(p), -p.alignment.evidence(spans)))
    accepted = [p.alignment for p in parts if score_of(p) >= THRESHOLD]
    matches = []
    for part in parts:
        alignment, score = part.alignment, score_of(part)
        source, same = sources[alignment.source], alignment.source in known
        rate = 1.0 if same else alignment.rate
        offset = known.get(alignment.source, alignment.offset_seconds)
        matched = tuple(
            m
            for m in alignment.by_segment
            if judged[alignment.source].by_modality[m] >= THRESHOLD
            or part.score(calibrations([m]), {m: spans[m]}) >= THRESHOLD
        )
        shared = {
            other.source: _equally_well(alignment, other)
            for other in accepted
            if other is not alignment and score >= THRESHOLD
        }
        rivals = [
            n
            for n, equal in shared.items()
            if equal.any() and of_encoders(part.without(equal)) < THRESHOLD
        ]
        if judged[alignment.source].score >= THRESHOLD:
            for n in (n for n in rivals if judged[n].score < THRESHOLD):
                del shared[n]  # its details differ
            rivals = [n for n in rivals if n in shared]
        shared_by = 1 + sum(shared.values(), np.zeros(len(part.inside), int))
        length = segment_seconds / alignment.rate
        missing = np.full(len(part.inside), np.nan)
        similarity = [alignment.by_segment.get(m, missing) for m in MODALITIES]
        match = Match(
            source=source.name,
            path=source.path,
            offset_seconds=offset,
            rate=rate,
            score=score,
            score_by=score_by(part),
            accepted=same or (score >= THRESHOLD and set(required) <= set(matched)),
            same_file=same,
            matched=tuple(alignment.by_modality) if same else matched,
            shared_with=() if same else tuple(sources[n].name for n in rivals),
            video_score=alignment.by_modality.get("video"),
            audio_score=alignment.by_modality.get("audio"),
            duration_seconds=source.duration_seconds,
            intervals=[
                Interval(a, b, a * rate + offset, b * rate + offset, count)
                for a, b, count in _intervals(alignment, shared_by, length)
            ],
            segments=[
                SegmentScore(start, start + length, *(None if np.isnan(v) else v for v in values))
                for start, *values in np.stack([alignment.query_seconds, *similarity], 1).tolist()
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
