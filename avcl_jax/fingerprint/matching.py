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
from collections.abc import Mapping, Sequence

import numpy as np
import threadpoolctl

from avcl_jax.fingerprint.library import Library, Neighbours
from avcl_jax.fingerprint.segments import SegmentFeatures

# Query segments are denser than reference segments, so that some fall near the latter's times.
QUERY_DENSITY = 2
_NEIGHBOURS = 24
_BIN_SECONDS = 0.5
CANDIDATES = 16
_PLACES = 2
# Rates between those at which the query was rendered.
_SLOPES = (0.95, 0.975, 1.0, 1.025, 1.05)
_TIE = 0.01
_REACH_SECONDS = 0.75
# Lower similarity counts as this: a part of a query may come from another source.
_WORST = -1.0
# Segments of a library from which a search is enough work for several threads.
_THREADS_FROM = 50_000


@dataclasses.dataclass(frozen=True)
class Rendering:
    """A query played at one rate.

    Attributes:
        rate: seconds of reference per second of query.
        segments: segments with features, or for `prepare` with vectors.
    """

    rate: float
    segments: SegmentFeatures


@dataclasses.dataclass(frozen=True)
class Alignment:
    """A query aligned with a source.

    Attributes:
        source: number of the source.
        rate: seconds of reference per second of query.
        offset_seconds: reference time of the query's beginning.
        evidence: evidence of all modalities, 0 is chance; `calibration` makes it a score.
        by_modality: evidence of each modality that was compared.
        query_seconds: float64 [segments], beginning of each query segment.
        agrees: bool [segments], those that resemble the reference at their time.
        by_segment: modality -> float64 [segments], similarity in standard deviations above chance;
            NaN where the query has no such segment.
    """

    source: int
    rate: float
    offset_seconds: float
    evidence: float
    by_modality: Mapping[str, float]
    query_seconds: np.ndarray
    agrees: np.ndarray
    by_segment: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Query:
    """A rendering beside a library.

    Attributes:
        rate: seconds of reference per second of query.
        seconds: float64 [segments], beginnings at this rate.
        vectors: modality -> float32 [segments, d], zeros where missing.
        present: modality -> bool [segments].
        mean: modality -> float32 [segments], mean similarity to the cohort.
        scale: modality -> float32 [segments], standard deviation of that similarity.
        neighbours: modality -> nearest reference segments of the present segments.
    """

    rate: float
    seconds: np.ndarray
    vectors: Mapping[str, np.ndarray]
    present: Mapping[str, np.ndarray]
    mean: Mapping[str, np.ndarray]
    scale: Mapping[str, np.ndarray]
    neighbours: Mapping[str, Neighbours]


def prepare(
    library: Library,
    renderings: Sequence[Rendering],
    modalities: Sequence[str],
    *,
    hop_seconds: float,
    exclude: int | None = None,
) -> list[Query]:
    """Finds the nearest reference segments of each rendering of a query.

    Args:
        library: library to search.
        renderings: vectors of the query, the segments `hop_seconds` / `QUERY_DENSITY` apart.
        modalities: modalities that will be compared.
        hop_seconds: time from one reference segment to the next.
        exclude: number of a source to leave out.
    """
    step = hop_seconds / QUERY_DENSITY
    small = library.num_segments < _THREADS_FROM
    with _thread_pools().limit(limits=1) if small else contextlib.nullcontext():
        return [_prepare(library, r, step, modalities, exclude) for r in renderings]


def align(
    library: Library,
    queries: Sequence[Query],
    spans: Mapping[str, float],
    *,
    hop_seconds: float,
    known: Sequence[tuple[int, float]] = (),
) -> list[Alignment]:
    """Finds where in the library a query may come from.

    Args:
        library: library that was searched.
        queries: renderings of the query, from `prepare`.
        spans: modality -> length of a segment; of the modalities to compare.
        hop_seconds: time from one reference segment to the next.
        known: number and offset in seconds of sources that are the unchanged query; they are
            aligned there, whatever the votes.

    Returns:
        The best alignment of each source that was aligned, best first.
    """
    queries = [q for q in queries if any(q.present[m].any() for m in spans)]
    votes: dict[tuple[int, int, int], float] = {}
    for number, query in enumerate(queries):
        for modality in spans:
            _vote(query, number, modality, hop_seconds, votes)
    best: dict[int, Alignment] = {}
    # The matrices are so small that a second thread only waits: 20 times slower on a busy machine.
    with _thread_pools().limit(limits=1, user_api="blas"):
        for source, number, place in _candidates(votes):
            found = _align(library, queries[number], source, place, spans, hop_seconds)
            if found is not None and (source not in best or found.evidence > best[source].evidence):
                best[source] = found
        unchanged = [query for query in queries if query.rate == 1.0]
        for source, offset in known if unchanged else ():
            place = round(offset / _BIN_SECONDS)
            found = _align(library, unchanged[0], source, place, spans, hop_seconds)
            if found is not None:
                best[source] = found
    return sorted(best.values(), key=lambda a: -a.evidence)


@functools.cache
def _thread_pools() -> threadpoolctl.ThreadpoolController:
    return threadpoolctl.ThreadpoolController()


def _prepare(
    library: Library,
    rendering: Rendering,
    hop: float,
    modalities: Sequence[str],
    exclude: int | None,
) -> Query:
    segments = rendering.segments
    vectors, present, mean, scale, neighbours = {}, {}, {}, {}, {}
    for modality in modalities:
        present[modality] = here = segments.present[modality]
        vectors[modality] = segments.features[modality]
        chance = vectors[modality] @ library.vectors[modality].cohort.T
        # A cohort of none or one has no spread.
        known = chance.shape[1] > 1
        mean[modality] = chance.mean(axis=1) if known else np.zeros(len(here), np.float32)
        spread = chance.std(axis=1) if known else np.zeros(len(here), np.float32)
        scale[modality] = np.maximum(spread, vectors[modality].shape[1] ** -0.5)
        neighbours[modality] = library.search(
            modality, vectors[modality][here], _NEIGHBOURS, exclude
        )
    seconds = hop * np.arange(len(segments))
    return Query(rendering.rate, seconds, vectors, present, mean, scale, neighbours)


def _vote(
    query: Query,
    number: int,
    modality: str,
    hop: float,
    votes: dict[tuple[int, int, int], float],
) -> None:
    """Adds per segment the best neighbour in each bin: (source, rendering, offset bin)."""
    here = np.flatnonzero(query.present[modality])
    if not len(here):
        return
    found = query.neighbours[modality]
    surprise = (found.similarity - query.mean[modality][here, None]) / (
        query.scale[modality][here, None]
    )
    offsets = found.segment * hop - query.seconds[here, None]
    bins = np.round(offsets / _BIN_SECONDS).astype(int)
    for row in range(len(here)):
        seen: set[tuple[int, int]] = set()
        for source, place, weight in zip(
            found.source[row].tolist(), bins[row].tolist(), surprise[row].tolist(), strict=True
        ):
            if source < 0 or weight <= 0 or (source, place) in seen:
                continue
            seen.add((source, place))
            # Neighbouring bins get half, because a drifting offset crosses their border.
            for shift, fraction in ((0, 1.0), (-1, 0.5), (1, 0.5)):
                key = (source, number, place + shift)
                votes[key] = votes.get(key, 0.0) + fraction * weight / len(here)


def _candidates(votes: dict[tuple[int, int, int], float]) -> list[tuple[int, int, int]]:
    """Returns the bins with most votes, few per source, so that none crowds out the others."""
    chosen: list[tuple[int, int, int]] = []
    of_source: dict[int, int] = {}
    for key, _ in sorted(votes.items(), key=lambda item: (-item[1], item[0])):
        if of_source.get(key[0], 0) < _PLACES:
            of_source[key[0]] = of_source.get(key[0], 0) + 1
            chosen.append(key)
        if len(of_source) >= CANDIDATES:
            break
    return chosen


def _align(
    library: Library,
    query: Query,
    source: int,
    place: int,
    spans: Mapping[str, float],
    hop: float,
) -> Alignment | None:
    """Finds the best line near a bin of offsets."""
    step = hop / QUERY_DENSITY
    near = place * _BIN_SECONDS + np.arange(-_REACH_SECONDS, _REACH_SECONDS + step / 2, step)
    slopes = np.array(_SLOPES)
    middle = query.seconds[-1] / 2
    # [slopes, offsets, segments]: reference time of each query segment; lines turn about the
    # middle of the query, so that a slope does not move all of it.
    times = middle + slopes[:, None, None] * (query.seconds - middle) + near[None, :, None]
    index = np.round(times / hop).astype(int)
    # Every second query segment of a line lies between two reference segments.
    off_grid = np.abs(times / hop - index) > 0.3
    evidence, agreement, compared = {}, {}, {}
    for modality in spans:
        if not query.present[modality].any():
            continue
        first = max(0, int(index.min()))
        window, here = library.vectors_of(modality, source, first, int(index.max()) + 1)
        if not len(window):
            continue
        similarity = query.vectors[modality] @ window.T
        surprise = (similarity - query.mean[modality][:, None]) / query.scale[modality][:, None]
        local = index - first
        inside = (local >= 0) & (local < len(window))
        local = np.clip(local, 0, len(window) - 1)
        usable = query.present[modality] & ~off_grid
        met = usable & inside & here[local]
        z = np.where(met, surprise[np.arange(len(query.seconds)), local], 0.0)
        z = np.maximum(z, _WORST)
        count = np.maximum(usable.sum(axis=-1), 1)
        covered = query.present[modality].sum() * step + spans[modality]
        evidence[modality] = z.sum(axis=-1) / count * np.sqrt(covered / spans[modality])
        agreement[modality] = np.where(met, z, 0.0)
        compared[modality] = query.present[modality]
    if not evidence:
        return None
    fused = np.sqrt(sum(np.maximum(e, 0) ** 2 for e in evidence.values()))
    # Short clips meet the same segments along several slopes; a slope of 1 is the likeliest.
    likely = fused * np.where(slopes == 1, 1, 1 - _TIE)[:, None]
    slope, offset = np.unravel_index(int(np.argmax(likely)), fused.shape)
    rate = query.rate * slopes[slope]
    begin = middle * (1 - slopes[slope]) + near[offset]
    agrees = np.max([a[slope, offset] for a in agreement.values()], axis=0) > 2.0
    used = ~off_grid[slope, offset]
    return Alignment(
        source=source,
        rate=float(rate),
        offset_seconds=float(begin),
        evidence=float(fused[slope, offset]),
        by_modality={m: float(e[slope, offset]) for m, e in evidence.items()},
        query_seconds=query.seconds[used] / query.rate,
        agrees=agrees[used],
        by_segment={
            m: np.where(compared[m], a[slope, offset], np.nan)[used] for m, a in agreement.items()
        },
    )
