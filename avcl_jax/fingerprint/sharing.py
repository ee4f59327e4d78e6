"""Search for footage and audio that the sources of an index share.

1. Excerpts of each source are queries to the others: neighbours vote, and the sources with most
   votes are aligned (`matching`). One search for all segments is most of the work.
2. Along each alignment the details decide where both agree (`agreement`).
3. What agrees is joined into intervals of pairs. Sources that agree nearly everywhere are copies,
   and copies of copies a group. What several groups have, such as an intro, a logo or music, is
   told apart from what only two have.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from avcl_jax.fingerprint import matching
from avcl_jax.fingerprint.agreement import CHANGED, EVIDENCE_SECONDS, SAME, agree, runs
from avcl_jax.fingerprint.database import Transaction, transaction
from avcl_jax.fingerprint.details import AUDIO_HZ, VIDEO_HZ, Candidate, Details
from avcl_jax.fingerprint.intervals import Span, join
from avcl_jax.fingerprint.library import Library
from avcl_jax.fingerprint.relations import Sharing, relate

# Shorter parts agree by chance.
LEAST_SECONDS = 2.0
_WINDOW_SECONDS = 12.0
# Below, a window resembles a source for a moment only.
_LEAST_VOTES = 0.3
# Sources whose neighbours are searched together.
_BLOCK_SEGMENTS = 4096


def find_shared(
    library: Library,
    directory: Path,
    spans: Mapping[str, float],
    *,
    min_seconds: float,
    progress: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> Sharing:
    """Compares every source of an index with all others.

    Args:
        directory: directory of the index.
        spans: modality -> length of a segment in seconds.
        min_seconds: shortest interval to report, at least `LEAST_SECONDS`.
        progress: wraps the numbers of the sources.
    """
    spans_by_pair: dict[tuple[int, int], list[Span]] = defaultdict(list)
    neighbours = _neighbours(library, list(spans))
    with transaction(directory) as opened:
        for number in progress(range(len(library.sources))):
            for other, span in _spans_of(
                library, opened, number, next(neighbours), spans, min_seconds
            ):
                if number < other:
                    spans_by_pair[number, other].append(span)
                else:
                    spans_by_pair[other, number].append(span.inverted())
    found = {}
    for key, own in spans_by_pair.items():
        durations = [library.sources[number].duration_seconds for number in key]
        if intervals := join(own, durations, min_seconds):
            found[key] = intervals
    return relate(library, found)


def _neighbours(
    library: Library, modalities: Sequence[str]
) -> Iterator[dict[str, matching.Neighbours]]:
    """Yields the nearest segments of the segments of each source, by modality."""
    block: list[int] = []
    segments = 0
    for number, source in enumerate(library.sources):
        block.append(number)
        segments += source.segments
        if segments >= _BLOCK_SEGMENTS or number == len(library.sources) - 1:
            found = [library.neighbours(m, block, matching.NEIGHBOURS) for m in modalities]
            for own in zip(*found, strict=True):
                yield dict(zip(modalities, own, strict=True))
            block, segments = [], 0


def _spans_of(
    library: Library,
    opened: Transaction,
    number: int,
    neighbours: Mapping[str, matching.Neighbours],
    spans: Mapping[str, float],
    min_seconds: float,
) -> Iterator[tuple[int, Span]]:
    """Yields other sources with what agrees with them, in times of this one."""
    source, hop = library.sources[number], library.settings.hop_seconds
    details, _ = opened.details_of(source, 0.0, source.duration_seconds)
    longest = max(spans.values())
    count = min(max(1, round((_WINDOW_SECONDS - longest) / hop) + 1), source.segments)
    # Half of each window is in the next one; the last ends with the source.
    firsts = [*range(0, source.segments - count, max(1, count // 2)), source.segments - count]
    present = {m: library.vectors_of(m, number, 0, source.segments)[1] for m in spans}
    for first in firsts:
        own = {}
        for modality, here in present.items():
            rows = slice(int(here[:first].sum()), int(here[: first + count].sum()))
            similarity, others, segments = (values[rows] for values in neighbours[modality])
            own[modality] = similarity, others, segments
        queries = matching.prepare_excerpt(library, number, first, count, own)
        compared = {m: s for m, s in spans.items() if present[m][first : first + count].any()}
        begin, seconds = first * hop, (count - 1) * hop + longest
        window = _part(details, begin, seconds)
        for alignment in matching.align(library, queries, compared, least_votes=_LEAST_VOTES):
            for span in _agreeing(library, opened, window, seconds, alignment, min_seconds):
                yield (
                    alignment.source,
                    span._replace(
                        begin=begin + span.begin,
                        end=begin + span.end,
                        offset=span.offset - span.rate * begin,
                    ),
                )


def _part(details: Details, begin: float, seconds: float) -> Details:
    ends = [slice(round(begin * hz), round((begin + seconds) * hz)) for hz in (VIDEO_HZ, AUDIO_HZ)]
    return Details(details.video[ends[0]], details.audio[ends[1]])


def _agreeing(
    library: Library,
    opened: Transaction,
    window: Details,
    seconds: float,
    alignment: matching.Alignment,
    min_seconds: float,
) -> Iterator[Span]:
    """Yields what agrees along an alignment, in seconds of the window."""
    rate, offset = alignment.rate, alignment.offset_seconds
    there = library.sources[alignment.source]
    details, start = opened.details_of(there, offset - 1.0, offset + rate * seconds + 1.0)
    agreement = agree(
        window,
        Candidate(details, start, rate, offset),
        seconds=min(min_seconds, EVIDENCE_SECONDS),
    )
    for modality, masks in agreement.moments.items():
        similarity = alignment.by_segment.get(modality)
        if similarity is None:
            continue
        for limits, mask in zip((SAME, CHANGED), masks, strict=True):
            for begin, end in runs(mask):
                ends = begin / VIDEO_HZ, end / VIDEO_HZ
                if ends[1] - ends[0] < limits.seconds:
                    continue
                times = alignment.query_seconds
                inside = (times >= ends[0]) & (times < ends[1]) & ~np.isnan(similarity)
                if inside.any() and similarity[inside].mean() >= limits.similarity:
                    line = agreement.rate, agreement.offset_seconds
                    yield Span(modality, limits is SAME, *ends, *line)
