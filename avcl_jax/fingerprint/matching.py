"""Query segments to sources: votes for consistent offsets, then an alignment of the best.

1. The nearest reference segments of each query segment vote for a source and an offset, in bins.
   The query is rendered at several playback rates, each with its own votes.
2. The sources with most votes are aligned along lines of consistent rate and offset, by the
   similarity of every query segment to the reference segment of its time, measured against the
   similarity to unrelated segments (the cohort). Both modalities share the line, and their evidence
   adds up; a modality that is missing, wrong or exchanged adds nothing and takes nothing away.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import threadpoolctl

from avcl_jax.fingerprint.library import Library
from avcl_jax.fingerprint.segments import SegmentFeatures

# Query segments are denser than reference segments, so that some fall near the latter's times.
QUERY_DENSITY = 2
NEIGHBOURS = 24
_BIN_SECONDS = 0.5
CANDIDATES = 16
_PLACES = 2
# Rates between those at which the query was rendered.
_SLOPES = np.array([0.95, 0.975, 1.0, 1.025, 1.05])
_TIE = 0.01
_REACH_SECONDS = 0.75
# Lower similarity counts as this: a part of a query may come from another source.
_WORST = -1.0
# Segments of a library from which a search is enough work for several threads.
_THREADS_FROM = 50_000


# Of n segments, as `Library.search` returns them: similarity, source and segment, [n, NEIGHBOURS].
Neighbours = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Alignment:
    """A query aligned with a source."""

    source: int  # number
    rate: float  # seconds of reference per second of query
    offset_seconds: float  # reference time of the query's beginning
    by_modality: Mapping[str, float]  # evidence of each modality compared, 0 is chance
    query_seconds: np.ndarray  # float64 [segments], beginning of each query segment
    agrees: np.ndarray  # bool [segments], those that resemble the reference at their time
    # Modality -> float64 [segments], similarity in standard deviations above chance; NaN where the
    # query has no such segment.
    by_segment: Mapping[str, np.ndarray]

    def evidence(self, modalities: Iterable[str]) -> float:
        """Returns the evidence of these modalities together; `calibration` makes it a score."""
        return float(fuse([self.by_modality.get(m, 0.0) for m in modalities]))


def fuse(values: Sequence[Any]) -> Any:
    """Adds evidence, or similarity, of modalities as the sides of a right angle; none below 0."""
    return np.sqrt(sum(np.maximum(value, 0) ** 2 for value in values))


@dataclasses.dataclass(frozen=True)
class _Channel:
    """One modality of a query beside a library."""

    vectors: np.ndarray  # float32 [segments, d], zeros where missing
    present: np.ndarray  # bool [segments]
    mean: np.ndarray  # float32 [segments], of the similarity to the cohort
    scale: np.ndarray  # float32 [segments], its standard deviation
    neighbours: Neighbours  # of the present segments

    def surprise(self, similarity: np.ndarray, rows: Any = slice(None)) -> np.ndarray:
        """Returns similarity [rows, n] in standard deviations above that to the cohort."""
        return (similarity - self.mean[rows, None]) / self.scale[rows, None]


@dataclasses.dataclass(frozen=True)
class Query:
    """A rendering of a query beside a library: its rate, beginnings [segments] and modalities."""

    rate: float
    seconds: np.ndarray
    channels: Mapping[str, _Channel]


def prepare(
    library: Library,
    renderings: Sequence[SegmentFeatures],
    modalities: Sequence[str],
    *,
    exclude: int | None = None,
) -> list[Query]:
    """Finds the nearest reference segments of each rendering of a query.

    Args:
        renderings: vectors of the query (`Library.project`), `QUERY_DENSITY` segments per hop.
        exclude: number of a source to leave out.
    """

    def channel(rendering: SegmentFeatures, modality: str) -> _Channel:
        vectors, present = rendering.features[modality], rendering.present[modality]
        neighbours = library.search(modality, vectors[present], NEIGHBOURS, exclude)
        return _channel(library, modality, vectors, present, neighbours)

    small = library.num_segments < _THREADS_FROM
    step = library.settings.hop_seconds / QUERY_DENSITY
    with _thread_pools().limit(limits=1) if small else contextlib.nullcontext():
        return [
            Query(
                rendering.rate,
                step * np.arange(len(rendering)),
                {m: channel(rendering, m) for m in modalities},
            )
            for rendering in renderings
        ]


def prepare_excerpt(
    library: Library,
    number: int,
    first: int,
    count: int,
    neighbours: Mapping[str, Neighbours],
) -> list[Query]:
    """Makes a query of segments of the library itself, at every rate.

    Segments are repeated where a query has others between one and the next, and are the same at
    every rate: they are not encoded again.

    Args:
        number: source of the segments, from `first` on.
        neighbours: modality -> neighbours of the segments that are present.
    """
    repeat = functools.partial(np.repeat, repeats=QUERY_DENSITY, axis=0)
    step = library.settings.hop_seconds / QUERY_DENSITY
    channels = {}
    with _thread_pools().limit(limits=1, user_api="blas"):
        for modality, found in neighbours.items():
            vectors, here = library.vectors_of(modality, number, first, first + count)
            similarity, sources, segments = map(repeat, found)
            channels[modality] = _channel(
                library, modality, repeat(vectors), repeat(here), (similarity, sources, segments)
            )
    seconds = step * np.arange(count * QUERY_DENSITY)
    return [Query(rate, rate * seconds, channels) for rate in library.settings.rates]


def align(
    library: Library,
    queries: Sequence[Query],
    spans: Mapping[str, float],
    *,
    known: Mapping[int, float] | None = None,
    least_votes: float = 0.0,
) -> list[Alignment]:
    """Finds where in the library a query may come from.

    Args:
        queries: renderings of the query (`prepare`).
        spans: modality -> length of a segment, of the modalities to compare.
        known: number -> offset in seconds of sources that are the unchanged query; they are
            aligned there, whatever the votes.
        least_votes: sources with fewer are not aligned; one vote is a segment that resembles the
            source by as many standard deviations as the query has segments.

    Returns:
        The best alignment of each source that was aligned, best first.
    """
    queries = [q for q in queries if any(q.channels[m].present.any() for m in spans)]
    votes: dict[tuple[int, int, int], float] = {}
    for number, query in enumerate(queries):
        for modality in spans:
            _vote(query, number, modality, library.settings.hop_seconds, votes)
    best: dict[int, Alignment] = {}
    # The matrices are so small that a second thread only waits: 20 times slower on a busy machine.
    with _thread_pools().limit(limits=1, user_api="blas"):
        for source, number, place in _candidates(votes, least_votes):
            alignment = _align(library, queries[number], source, place, spans)
            if alignment is not None and (
                source not in best or alignment.evidence(spans) > best[source].evidence(spans)
            ):
                best[source] = alignment
        unchanged = [query for query in queries if query.rate == 1.0]
        for source, offset in (known or {}).items() if unchanged else ():
            alignment = _align(library, unchanged[0], source, round(offset / _BIN_SECONDS), spans)
            if alignment is not None:
                best[source] = alignment
    return sorted(best.values(), key=lambda a: -a.evidence(spans))


@functools.cache
def _thread_pools() -> threadpoolctl.ThreadpoolController:
    return threadpoolctl.ThreadpoolController()


def _channel(
    library: Library,
    modality: str,
    vectors: np.ndarray,
    present: np.ndarray,
    neighbours: Neighbours,
) -> _Channel:
    chance = vectors @ library.vectors[modality].cohort.T
    mean = spread = np.zeros(len(vectors), np.float32)
    if chance.shape[1] > 1:  # a cohort of none or one has no spread
        mean, spread = chance.mean(axis=1), chance.std(axis=1)
    scale = np.maximum(spread, vectors.shape[1] ** -0.5)
    return _Channel(vectors, present, mean, scale, neighbours)


def _vote(
    query: Query,
    number: int,
    modality: str,
    hop: float,
    votes: dict[tuple[int, int, int], float],
) -> None:
    """Adds per segment the best neighbour in each bin: (source, rendering, offset bin)."""
    channel = query.channels[modality]
    here = np.flatnonzero(channel.present)
    similarity, sources, segments = channel.neighbours
    surprise = channel.surprise(similarity, here)
    bins = np.round((segments * hop - query.seconds[here, None]) / _BIN_SECONDS).astype(int)
    for row in zip(sources.tolist(), bins.tolist(), surprise.tolist(), strict=True):
        seen: set[tuple[int, int]] = set()
        for source, place, weight in zip(*row, strict=True):
            if source < 0 or weight <= 0 or (source, place) in seen:
                continue
            seen.add((source, place))
            # Neighbouring bins get half, because a drifting offset crosses their border.
            for shift, fraction in ((0, 1.0), (-1, 0.5), (1, 0.5)):
                key = (source, number, place + shift)
                votes[key] = votes.get(key, 0.0) + fraction * weight / len(here)


def _candidates(
    votes: dict[tuple[int, int, int], float], least: float
) -> list[tuple[int, int, int]]:
    """Returns the bins with most votes, few per source, so that none crowds out the others."""
    bins: list[tuple[int, int, int]] = []
    of_source: dict[int, int] = {}
    enough = [item for item in votes.items() if item[1] >= least]
    for key, _ in sorted(enough, key=lambda item: (-item[1], item[0])):
        if of_source.get(key[0], 0) < _PLACES:
            of_source[key[0]] = of_source.get(key[0], 0) + 1
            bins.append(key)
        if len(of_source) >= CANDIDATES:
            break
    return bins


def _align(
    library: Library, query: Query, source: int, place: int, spans: Mapping[str, float]
) -> Alignment | None:
    """Finds the best line near a bin of offsets."""
    hop = library.settings.hop_seconds
    step = hop / QUERY_DENSITY
    near = place * _BIN_SECONDS + np.arange(-_REACH_SECONDS, _REACH_SECONDS + step / 2, step)
    middle = query.seconds[-1] / 2
    # [slopes, offsets, segments]: reference time of each query segment; lines turn about the
    # middle of the query, so that a slope does not move all of it.
    times = middle + _SLOPES[:, None, None] * (query.seconds - middle) + near[None, :, None]
    index = np.round(times / hop).astype(int)
    # Every second query segment of a line lies between two reference segments.
    off_grid = np.abs(times / hop - index) > 0.3
    first = max(0, int(index.min()))
    evidence, agreement = {}, {}
    for modality, span in spans.items():
        channel = query.channels[modality]
        window, here = library.vectors_of(modality, source, first, int(index.max()) + 1)
        if not channel.present.any() or not len(window):
            continue
        surprise = channel.surprise(channel.vectors @ window.T)
        inside = (index >= first) & (index < first + len(window))
        local = np.clip(index - first, 0, len(window) - 1)
        usable = channel.present & ~off_grid
        met = usable & inside & here[local]
        z = np.where(met, surprise[np.arange(len(query.seconds)), local], 0.0)
        z = np.maximum(z, _WORST)
        count = np.maximum(usable.sum(axis=-1), 1)
        covered = channel.present.sum() * step + span
        evidence[modality] = z.sum(axis=-1) / count * np.sqrt(covered / span)
        agreement[modality] = np.where(met, z, 0.0)
    if not evidence:
        return None
    # Short clips meet the same segments along several slopes; a slope of 1 is the likeliest.
    likely = fuse(list(evidence.values())) * np.where(_SLOPES == 1, 1, 1 - _TIE)[:, None]
    slope, offset = np.unravel_index(int(np.argmax(likely)), likely.shape)
    used = ~off_grid[slope, offset]
    return Alignment(
        source=source,
        rate=float(query.rate * _SLOPES[slope]),
        offset_seconds=float(middle * (1 - _SLOPES[slope]) + near[offset]),
        by_modality={m: float(e[slope, offset]) for m, e in evidence.items()},
        query_seconds=query.seconds[used] / query.rate,
        agrees=np.max([a[slope, offset] for a in agreement.values()], axis=0)[used] > 2.0,
        by_segment={
            m: np.where(query.channels[m].present, a[slope, offset], np.nan)[used]
            for m, a in agreement.items()
        },
    )
