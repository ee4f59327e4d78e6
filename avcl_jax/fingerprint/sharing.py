"""What the sources of an index share: copies, parts of each other, and what many have in common.

1. Excerpts of each source are queries to the others: neighbours vote, and the sources with most
   votes are aligned (`matching`). One search for all segments is most of the work.
2. Along each alignment the details decide where both agree (`agreement`).
3. What agrees is joined into intervals of pairs. Sources that agree nearly everywhere are copies,
   and copies of copies a group. What several groups have, such as an intro, a logo or music, is
   told apart from what only two have.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np

from avcl_jax.export.encoder import MODALITIES
from avcl_jax.fingerprint import matching
from avcl_jax.fingerprint.agreement import CHANGED, EVIDENCE_SECONDS, SAME, agree, runs
from avcl_jax.fingerprint.database import SourceRow, Transaction, transaction
from avcl_jax.fingerprint.details import AUDIO_HZ, VIDEO_HZ, Candidate, Details
from avcl_jax.fingerprint.library import Library

Relation = Literal["same file", "copy", "contained", "partial"]
# Shorter parts agree by chance.
LEAST_SECONDS = 2.0
# Groups that share an interval, at least, to list it as shared material and not by pairs.
MANY = 4
# Fraction of a source, of what can be compared, that a copy of it shares.
_MOST = 0.75
_WINDOW_SECONDS = 12.0
# Below, a window resembles a source for a moment only.
_LEAST_VOTES = 0.3
# Sources whose neighbours are searched together.
_BLOCK_SEGMENTS = 4096
# Spans of one line: they predict the same time within this, with no longer gap between them.
_SAME_LINE_SECONDS, _GAP_SECONDS = 0.75, 2.0
# Intervals are measured to about this.
_TOLERANCE_SECONDS = 0.5


class Seconds(NamedTuple):
    """An interval of a source."""

    start: float
    end: float


class Interval(NamedTuple):
    """What two sources share.

    Attributes:
        sides: of the first source and of the second.
        matched: modalities that agree.
        shared_by: sources that have it, copies counted once.
    """

    sides: tuple[Seconds, Seconds]
    matched: tuple[str, ...]
    shared_by: int = 2


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two sources that share something; if one is contained in the other, it is the first."""

    first: SourceRow
    second: SourceRow
    relation: Relation
    intervals: Sequence[Interval]

    @property
    def matched(self) -> tuple[str, ...]:
        """Modalities that agree in any interval."""
        return tuple(m for m in MODALITIES if any(m in i.matched for i in self.intervals))

    @property
    def seconds(self) -> float:
        """Length of all intervals."""
        return sum(i.sides[0].end - i.sides[0].start for i in self.intervals)


class Occurrence(NamedTuple):
    """A part of a source."""

    source: SourceRow
    seconds: Seconds


@dataclasses.dataclass(frozen=True)
class Material:
    """What several sources share, that are not copies of each other: intro, logo, music, scene."""

    occurrences: Sequence[Occurrence]
    matched: tuple[str, ...]
    shared_by: int  # sources, copies counted once


@dataclasses.dataclass(frozen=True)
class Sharing:
    """What the sources of an index share.

    Attributes:
        groups: sources that are copies of each other, directly or through others.
        pairs: copies first, longest first; without those that share only what many have.
    """

    groups: Sequence[Sequence[SourceRow]]
    pairs: Sequence[Pair]
    materials: Sequence[Material]


class _Span(NamedTuple):
    """Seconds of a source that agree with another: its time is offset + rate · this one's."""

    modality: str
    begin: float
    end: float
    rate: float
    offset: float

    def there(self, seconds: float) -> float:
        return self.offset + self.rate * seconds

    def inverted(self) -> _Span:
        """Returns the span of the other source."""
        begin, end = self.there(self.begin), self.there(self.end)
        return _Span(self.modality, begin, end, 1 / self.rate, -self.offset / self.rate)


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
        directory: of the index.
        spans: modality -> length of a segment in seconds.
        min_seconds: shortest interval to report, at least `LEAST_SECONDS`.
        progress: wraps the numbers of the sources.
    """
    spans_by_pair: dict[tuple[int, int], list[_Span]] = defaultdict(list)
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
        if intervals := _intervals(own, min_seconds):
            found[key] = intervals
    return _described(library, found)


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
) -> Iterator[tuple[int, _Span]]:
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
) -> Iterator[_Span]:
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
                times = alignment.query_seconds
                inside = (times >= ends[0]) & (times < ends[1]) & ~np.isnan(similarity)
                if inside.any() and similarity[inside].mean() >= limits.similarity:
                    yield _Span(modality, *ends, agreement.rate, agreement.offset_seconds)


def _intervals(spans: Sequence[_Span], min_seconds: float) -> list[Interval]:
    """Joins the spans of a pair, in times of the first source."""
    lines: list[list[_Span]] = []
    for span in sorted(spans, key=lambda s: s.begin):
        middle = (span.begin + span.end) / 2
        for line in lines:
            last = max(line, key=lambda s: s.end)
            near = abs(last.there(middle) - span.there(middle)) <= _SAME_LINE_SECONDS
            if near and span.begin <= last.end + _GAP_SECONDS:
                line.append(span)
                break
        else:
            lines.append([span])
    # What repeats itself, as a loop does, agrees along several lines: the longest counts.
    lines.sort(key=lambda line: min(s.begin for s in line) - max(s.end for s in line))
    intervals: list[Interval] = []
    for line in lines:
        for interval in _of_line(line, min_seconds):
            if not any(_overlap(interval, other) for other in intervals):
                intervals.append(interval)
    return sorted(intervals)


def _overlap(interval: Interval, other: Interval) -> bool:
    """Returns whether half of the interval is in the other, on either side."""
    return any(
        2 * (min(own.end, its.end) - max(own.start, its.start)) > own.end - own.start
        for own, its in zip(interval.sides, other.sides, strict=True)
    )


def _of_line(line: Sequence[_Span], min_seconds: float) -> Iterator[Interval]:
    """Yields the intervals of spans of one line, by the modalities that agree."""
    begin, end = min(s.begin for s in line), max(s.end for s in line)
    cells = np.zeros((len(MODALITIES), round((end - begin) * VIDEO_HZ) + 1), bool)
    for span in line:
        first, last = (round((t - begin) * VIDEO_HZ) for t in (span.begin, span.end))
        cells[MODALITIES.index(span.modality), first:last] = True
    shortest = (min_seconds - _TOLERANCE_SECONDS) * VIDEO_HZ
    for first, last in runs(_bridged(np.any(cells, axis=0))):
        if last - first < shortest:
            continue
        for a, b in _pieces(cells[:, first:last], shortest):
            inside = cells[:, first + a : first + b]
            matched = tuple(
                m for m, here in zip(MODALITIES, inside.mean(axis=1) >= 0.5, strict=True) if here
            )
            ends = [begin + (first + n) / VIDEO_HZ for n in (a, b)]
            # The spans nearest to the ends: the line may drift.
            spans = [min(line, key=lambda s: max(s.begin - t, t - s.end, 0.0)) for t in ends]
            there = [max(0.0, span.there(t)) for span, t in zip(spans, ends, strict=True)]
            yield Interval((Seconds(*ends), Seconds(*there)), matched or MODALITIES)


def _bridged(mask: np.ndarray) -> np.ndarray:
    """Closes gaps of up to a second."""
    closed = mask.copy()
    for begin, end in runs(~mask):
        if begin > 0 and end < len(mask) and end - begin <= VIDEO_HZ:
            closed[begin:end] = True
    return closed


def _pieces(cells: np.ndarray, shortest: float) -> list[tuple[int, int]]:
    """Cuts cells, bool [modalities, n], where the modalities change, but into no short pieces."""
    state = np.sum([_bridged(row).astype(int) << n for n, row in enumerate(cells)], axis=0)
    cuts = [0, *(np.flatnonzero(np.diff(state)) + 1).tolist(), cells.shape[1]]
    while len(cuts) > 2:
        lengths = np.diff(cuts)
        n = int(np.argmin(lengths))
        if lengths[n] >= shortest:
            break
        # Into the longer neighbour.
        before = n == len(lengths) - 1 or (n > 0 and lengths[n - 1] >= lengths[n + 1])
        del cuts[n if before else n + 1]
    return list(itertools.pairwise(cuts))


def _described(library: Library, found: Mapping[tuple[int, int], list[Interval]]) -> Sharing:
    """Names the relations of pairs, and counts who shares each interval."""
    sources = library.sources
    found = dict(found)
    by_content: dict[str, list[int]] = defaultdict(list)
    for number, source in enumerate(sources):
        by_content[source.content].append(number)
    for same in by_content.values():
        for second in same[1:]:
            whole = Seconds(0.0, sources[second].duration_seconds)
            matched = tuple(
                m
                for m in MODALITIES
                if m in library.vectors and library.vectors_of(m, second, 0, 1 << 30)[1].any()
            )
            found[same[0], second] = [Interval((whole, whole), matched)]
    relations = {key: _relation(library, key, found[key]) for key in found}
    copies = [key for key, (relation, _) in relations.items() if relation in ("same file", "copy")]
    group_of = _components(range(len(sources)), copies)
    counts = _sharers(found, sources, group_of)
    materials, shared_by = _materials(found, sources, group_of, counts)
    pairs = []
    for (first, second), intervals in found.items():
        relation, turned = relations[first, second]
        counted = [
            interval._replace(shared_by=shared_by[first, second, n])
            for n, interval in enumerate(intervals)
        ]
        if relation not in ("same file", "copy") and all(i.shared_by >= MANY for i in counted):
            continue
        ends = sources[first], sources[second]
        if turned:
            ends = ends[::-1]
            counted = sorted(i._replace(sides=i.sides[::-1]) for i in counted)
        pairs.append(Pair(*ends, relation, counted))
    order = ("same file", "copy", "contained", "partial")
    pairs.sort(key=lambda p: (order.index(p.relation), -p.seconds, p.first.name, p.second.name))
    members: dict[int, list[SourceRow]] = defaultdict(list)
    for number, group in group_of.items():
        members[group].append(sources[number])
    groups = sorted((g for g in members.values() if len(g) > 1), key=lambda g: (-len(g), g[0].name))
    return Sharing(groups, pairs, materials)


def _relation(
    library: Library, key: tuple[int, int], intervals: Sequence[Interval]
) -> tuple[Relation, bool]:
    """Returns how two sources are related, and whether the second is contained in the first."""
    sources = [library.sources[n] for n in key]
    if sources[0].content == sources[1].content:
        return "same file", False
    hop = library.settings.hop_seconds
    whole = [True, True]
    present = [
        {m: library.vectors_of(m, n, 0, s.segments)[1] for m in library.vectors}
        for n, s in zip(key, sources, strict=True)
    ]
    for modality in library.vectors:
        if not all(own[modality].any() for own in present):
            continue
        for side, own in enumerate(present):
            covered = np.zeros(len(own[modality]), bool)
            for interval in intervals:
                if modality in interval.matched:
                    seconds = interval.sides[side]
                    covered[round(seconds.start / hop) : round(seconds.end / hop)] = True
            whole[side] &= bool(covered[own[modality]].mean() >= _MOST)
    if all(whole):
        return "copy", False
    return ("contained" if any(whole) else "partial"), whole[1]


_Node = TypeVar("_Node")


def _components(nodes: Iterable[_Node], edges: Iterable[tuple[_Node, _Node]]) -> dict[_Node, int]:
    """Returns the number of the connected component of each node."""
    parent = {node: node for node in nodes}

    def root(node: _Node) -> _Node:
        while parent[node] != node:
            parent[node] = node = parent[parent[node]]
        return node

    for one, other in edges:
        parent[root(other)] = root(one)
    numbers: dict[_Node, int] = {}
    return {node: numbers.setdefault(root(node), len(numbers)) for node in parent}


def _cells(seconds: Seconds) -> range:
    """Returns the numbers of the quarters of a second."""
    return range(round(seconds.start * VIDEO_HZ), round(seconds.end * VIDEO_HZ))


def _sharers(
    found: Mapping[tuple[int, int], Sequence[Interval]],
    sources: Sequence[SourceRow],
    group_of: Mapping[int, int],
) -> dict[int, list[set[int]]]:
    """Returns the groups that share each quarter of a second of the sources."""
    counts: dict[int, list[set[int]]] = {}
    for key, intervals in found.items():
        for side, number in enumerate(key):
            if number not in counts:
                length = len(_cells(Seconds(0.0, sources[number].duration_seconds))) + 1
                counts[number] = [{group_of[number]} for _ in range(length)]
            for interval in intervals:
                for cell in _cells(interval.sides[side]):
                    if cell < len(counts[number]):
                        counts[number][cell].add(group_of[key[1 - side]])
    return counts


def _materials(
    found: Mapping[tuple[int, int], Sequence[Interval]],
    sources: Sequence[SourceRow],
    group_of: Mapping[int, int],
    counts: Mapping[int, Sequence[set[int]]],
) -> tuple[list[Material], dict[tuple[int, int, int], int]]:
    """Finds what many groups share, and by how many each interval of a pair is shared."""
    # Runs of cells that many share are the nodes; intervals that lie in two of them join them.
    nodes: dict[int, list[tuple[int, int]]] = {}
    for number, groups in counts.items():
        many = np.array([len(own) >= MANY for own in groups])
        nodes[number] = [run for run in runs(many) if run[1] - run[0] >= VIDEO_HZ]

    def node_of(number: int, seconds: Seconds) -> tuple[int, int] | None:
        cells = _cells(seconds)
        for begin, stop in nodes[number]:
            if 2 * (min(stop, cells.stop) - max(begin, cells.start)) > len(cells):
                return number, begin
        return None

    edges, ends = [], {}
    for key, intervals in found.items():
        for n, interval in enumerate(intervals):
            both = [node_of(key[side], interval.sides[side]) for side in (0, 1)]
            if both[0] is not None and both[1] is not None:
                edges.append((both[0], both[1]))
                ends[*key, n] = both[0], interval.matched
    every = [(number, begin) for number, own in nodes.items() for begin, _ in own]
    component_of = _components(every, edges)
    members: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for node, component in component_of.items():
        members[component].append(node)
    sizes = {c: len({group_of[number] for number, _ in own}) for c, own in members.items()}
    matched: dict[int, set[str]] = defaultdict(set)
    shared_by = {}
    for key, intervals in found.items():
        for n, interval in enumerate(intervals):
            cells = [
                len(counts[key[0]][cell])
                for cell in _cells(interval.sides[0])
                if cell < len(counts[key[0]])
            ]
            shared_by[*key, n] = max(2, statistics.median_low(cells or [2]))
            if (*key, n) in ends:
                node, modalities = ends[*key, n]
                component = component_of[node]
                shared_by[*key, n] = max(shared_by[*key, n], sizes[component])
                matched[component] |= set(modalities)
    length_of = {(number, begin): end for number, own in nodes.items() for begin, end in own}
    materials = [
        Material(
            [
                Occurrence(
                    sources[node[0]], Seconds(node[1] / VIDEO_HZ, length_of[node] / VIDEO_HZ)
                )
                for node in sorted(own)
            ],
            tuple(m for m in MODALITIES if m in matched[component]),
            sizes[component],
        )
        for component, own in members.items()
        if sizes[component] >= MANY
    ]
    materials.sort(key=lambda m: (-m.shared_by, m.occurrences[0].source.name))
    return materials, shared_by
