"""Query segments to sources: votes for consistent offsets, then a close look at the best.

1. Each query segment's nearest reference segments vote for a source and an offset, in bins. The
   query was rendered at several playback rates, each of which votes for itself.
2. The sources with most votes are aligned closely: along lines of consistent rate and offset, the
   similarity of every query segment to the reference segment of its time, measured against the
   similarity to unrelated segments (the cohort). Both modalities share the line, and evidence for
   it adds up; a modality that is missing, wrong or exchanged adds nothing, and takes nothing away.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import threadpoolctl

from avcl_jax.fingerprint.segments import SegmentFeatures
from avcl_jax.fingerprint.snapshot import Neighbours, Snapshot

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
# Disagreement beyond this counts no more: a part of a query may be of something else.
_WORST = -1.0
# Segments of a library from which a search is work for more than one thread.
_THREADS_FROM = 50_000


@dataclasses.dataclass(frozen=True)
class Rendering:
    """A query as it is played at one rate.

    Attributes:
        rate: seconds of reference per second of query.
        segments: of the query so played.
    """

    rate: float
    segments: SegmentFeatures


@dataclasses.dataclass(frozen=True)
class Alignment:
    """A query laid onto a source.

    Attributes:
        source: number of the source.
        rate: seconds of reference per second of query.
        offset_seconds: reference time of the query's beginning.
        evidence: fused, 0 is chance; see `calibration` for what it means.
        by_modality: the same of each modality that was compared.
        query_seconds: float64 [segments] beginning of each query segment.
        agrees: bool [segments] whether it resembles the reference at its place.
        by_segment: modality -> float64 [segments], how much it resembles it, in standard deviations
            above chance; NaN where the query has no such segment.
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
class _Query:
    """A rendering as vectors.

    Attributes:
        rate: of the rendering.
        seconds: float64 [segments], beginnings at this rate.
        vectors: modality -> float32 [segments, d], zeros where missing.
        present: modality -> bool [segments].
        mean: modality -> float32 [segments], of the similarity to the cohort.
        scale: modality -> float32 [segments], its standard deviation.
        neighbours: modality -> nearest reference segments of the segments that are present.
    """

    rate: float
    seconds: np.ndarray
    vectors: Mapping[str, np.ndarray]
    present: Mapping[str, np.ndarray]
    mean: Mapping[str, np.ndarray]
    scale: Mapping[str, np.ndarray]
    neighbours: Mapping[str, Neighbours]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A query laid beside a library: what is the same for each choice of modalities to compare.

    Attributes:
        queries: of each rendering.
        hop_seconds: of the reference segments.
        windows: `Snapshot.vectors_of` that remembers what it gave.
    """

    queries: Sequence[_Query]
    hop_seconds: float
    windows: Callable[[str, int, int, int], tuple[np.ndarray, np.ndarray]]


def prepare(
    snapshot: Snapshot,
    renderings: Sequence[Rendering],
    modalities: Sequence[str],
    *,
    hop_seconds: float,
    exclude: int | None = None,
) -> Prepared:
    """Finds the nearest reference segments of a query.

    Args:
        snapshot: the library.
        renderings: of the query, the segments `hop_seconds` / `QUERY_DENSITY` apart.
        modalities: all that will be compared.
        hop_seconds: of the reference segments.
        exclude: number of a source that is not looked at.
    """
    step = hop_seconds / QUERY_DENSITY
    small = snapshot.num_segments < _THREADS_FROM
    with _thread_pools().limit(limits=1) if small else contextlib.nullcontext():
        queries = [_prepare(snapshot, r, step, modalities, exclude) for r in renderings]
    return Prepared(queries, hop_seconds, functools.cache(snapshot.vectors_of))


def align(
    prepared: Prepared, spans: Mapping[str, float], known: Sequence[tuple[int, float]] = ()
) -> list[Alignment]:
    """Finds where in the library a query may come from.

    Args:
        prepared: the query.
        spans: modality -> length of a segment; of the modalities to compare.
        known: number and offset in seconds of sources that are the unchanged query; they are
            aligned there, whatever the votes say.

    Returns:
        The best alignment of each source that was looked at closely, best first.
    """
    queries = [q for q in prepared.queries if any(q.present[m].any() for m in spans)]
    votes: dict[tuple[int, int, int], float] = {}
    for number, query in enumerate(queries):
        for modality in spans:
            _vote(query, number, modality, prepared.hop_seconds, votes)
    best: dict[int, Alignment] = {}
    # Matrices so small that a second thread only waits: twenty times slower on a busy machine.
    with _thread_pools().limit(limits=1, user_api="blas"):
        for source, number, place in _candidates(votes):
            found = _look_closely(prepared, queries[number], source, place, spans)
            if found is not None and (source not in best or found.evidence > best[source].evidence):
                best[source] = found
        unchanged = [query for query in queries if query.rate == 1.0]
        for source, offset in known if unchanged else ():
            place = round(offset / _BIN_SECONDS)
            found = _look_closely(prepared, unchanged[0], source, place, spans)
            if found is not None:
                best[source] = found
    return sorted(best.values(), key=lambda a: -a.evidence)


@functools.cache
def _thread_pools() -> threadpoolctl.ThreadpoolController:
    return threadpoolctl.ThreadpoolController()


def _prepare(
    snapshot: Snapshot,
    rendering: Rendering,
    hop: float,
    modalities: Sequence[str],
    exclude: int | None,
) -> _Query:
    segments = rendering.segments
    vectors, present, mean, scale, neighbours = {}, {}, {}, {}, {}
    for modality in modalities:
        present[modality] = here = segments.present[modality]
        vectors[modality] = snapshot.projections[modality](segments.features[modality])
        vectors[modality][~here] = 0
        chance = vectors[modality] @ snapshot.cohort[modality].T
        # With a cohort of none or one there is no telling what is usual.
        known = chance.shape[1] > 1
        mean[modality] = chance.mean(axis=1) if known else np.zeros(len(here), np.float32)
        spread = chance.std(axis=1) if known else np.zeros(len(here), np.float32)
        scale[modality] = np.maximum(spread, vectors[modality].shape[1] ** -0.5)
        neighbours[modality] = snapshot.search(
            modality, vectors[modality][here], _NEIGHBOURS, exclude
        )
    seconds = hop * np.arange(len(segments))
    return _Query(rendering.rate, seconds, vectors, present, mean, scale, neighbours)


def _vote(
    query: _Query,
    number: int,
    modality: str,
    hop: float,
    votes: dict[tuple[int, int, int], float],
) -> None:
    """Adds, per segment, its best neighbour in each bin: (source, rendering, offset bin)."""
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
            # Neighbouring bins share: a drifting offset crosses their border.
            for shift, share in ((0, 1.0), (-1, 0.5), (1, 0.5)):
                key = (source, number, place + shift)
                votes[key] = votes.get(key, 0.0) + share * weight / len(here)


def _candidates(votes: dict[tuple[int, int, int], float]) -> list[tuple[int, int, int]]:
    """The best places, a few of each source, so that none crowds out the others."""
    chosen: list[tuple[int, int, int]] = []
    of_source: dict[int, int] = {}
    for key, _ in sorted(votes.items(), key=lambda item: (-item[1], item[0])):
        if of_source.get(key[0], 0) < _PLACES:
            of_source[key[0]] = of_source.get(key[0], 0) + 1
            chosen.append(key)
        if len(of_source) >= CANDIDATES:
            break
    return chosen


def _look_closely(
    prepared: Prepared,
    query: _Query,
    source: int,
    place: int,
    spans: Mapping[str, float],
) -> Alignment | None:
    """Best line near a bin."""
    hop = prepared.hop_seconds
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
        window, here = prepared.windows(modality, source, first, int(index.max()) + 1)
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
    # Short clips meet the same segments along several slopes: of these, 1 is the likeliest.
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
