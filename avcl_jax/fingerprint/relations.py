"""Relations of sources that share intervals: copies, parts of each other, and what many have."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeVar

import numpy as np

from avcl_jax.export.encoder import MODALITIES
from avcl_jax.fingerprint.agreement import runs
from avcl_jax.fingerprint.database import SourceRow
from avcl_jax.fingerprint.intervals import CELLS_PER_SECOND, Interval, Seconds
from avcl_jax.fingerprint.library import Library

Relation = Literal["same file", "copy", "contained", "partial"]
# Groups that share an interval, at least, to list it as shared material and not by pairs.
MANY = 4
# Fraction of a source, in each modality that it has for some seconds, that a copy of it shares.
_MOST, _LEAST_SECONDS = 0.75, 2.0


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
    """Part that sources share which are not copies of each other: intro, logo, music, scene."""

    occurrences: Sequence[Occurrence]
    matched: tuple[str, ...]
    shared_by: int  # sources, copies counted once


@dataclasses.dataclass(frozen=True)
class Sharing:
    """Everything that the sources of an index share.

    Attributes:
        groups: sources that are copies of each other, directly or through others.
        pairs: copies first, longest first; without those that share only what many have.
        links: sources that are another name of a file, and the source of that file. Only the
            latter is compared.
    """

    groups: Sequence[Sequence[SourceRow]]
    pairs: Sequence[Pair]
    materials: Sequence[Material]
    links: Sequence[tuple[SourceRow, SourceRow]] = ()


def _links(sources: Sequence[SourceRow], same: Sequence[int]) -> dict[int, int]:
    """Finds, among sources of the same content, names of one file on the disk.

    Returns numbers of the other names, with that of the source to compare: not a symbolic link if
    there is one that is not.
    """
    files: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number in same if len(same) > 1 else ():
        with contextlib.suppress(OSError):  # the file is gone
            status = os.stat(sources[number].path or "")
            files[status.st_dev, status.st_ino].append(number)
    links: dict[int, int] = {}
    for names in files.values():
        kept = min(names, key=lambda number: (os.path.islink(sources[number].path or ""), number))
        links |= {number: kept for number in names if number != kept}
    return links


def relate(library: Library, found: Mapping[tuple[int, int], list[Interval]]) -> Sharing:
    """Names the relations of pairs, and counts who shares each interval."""
    sources = library.sources
    by_content: dict[str, list[int]] = defaultdict(list)
    for number, source in enumerate(sources):
        by_content[source.content].append(number)
    links: dict[int, int] = {}
    for numbers in by_content.values():
        links |= _links(sources, numbers)
    found = {key: own for key, own in found.items() if links.keys().isdisjoint(key)}
    for numbers in by_content.values():
        same = [number for number in numbers if number not in links]
        for second in same[1:]:
            whole = Seconds(0.0, sources[second].duration_seconds)
            matched = tuple(
                m
                for m in MODALITIES
                if m in library.vectors
                and library.vectors_of(m, second, 0, sources[second].segments)[1].any()
            )
            found[same[0], second] = [Interval((whole, whole), matched, matched)]
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
        if relation == "partial" and all(i.shared_by >= MANY for i in counted):
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
    names = [(sources[number], sources[kept]) for number, kept in sorted(links.items())]
    return Sharing(groups, pairs, materials, names)


def _relation(
    library: Library, key: tuple[int, int], intervals: Sequence[Interval]
) -> tuple[Relation, bool]:
    """Returns how two sources are related, and whether the second is contained in the first."""
    sources = [library.sources[n] for n in key]
    if sources[0].content == sources[1].content:
        return "same file", False
    hop = library.settings.hop_seconds
    whole = []
    for side, (number, source) in enumerate(zip(key, sources, strict=True)):
        fractions = []
        for modality in library.vectors:
            _, present = library.vectors_of(modality, number, 0, source.segments)
            covered = np.zeros(len(present), bool)
            for interval in intervals:
                # Video that was cropped or covered is a copy's if its audio is the same.
                if modality in interval.exact or (
                    modality in interval.matched and "audio" in interval.exact
                ):
                    seconds = interval.sides[side]
                    covered[round(seconds.start / hop) : round(seconds.end / hop)] = True
            if present.sum() * hop >= _LEAST_SECONDS:
                fractions.append(covered[present].mean())
        whole.append(all(fraction >= _MOST for fraction in fractions))
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
    return range(round(seconds.start * CELLS_PER_SECOND), round(seconds.end * CELLS_PER_SECOND))


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
        nodes[number] = [run for run in runs(many) if run[1] - run[0] >= CELLS_PER_SECOND]

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
    end_of = {(number, begin): end for number, own in nodes.items() for begin, end in own}

    def occurrence(node: tuple[int, int]) -> Occurrence:
        begin, end = (n / CELLS_PER_SECOND for n in (node[1], end_of[node]))
        return Occurrence(sources[node[0]], Seconds(begin, end))

    materials = [
        Material(
            [occurrence(node) for node in sorted(own)],
            tuple(m for m in MODALITIES if m in matched[component]),
            sizes[component],
        )
        for component, own in members.items()
        if sizes[component] >= MANY
    ]
    materials.sort(key=lambda m: (-m.shared_by, m.occurrences[0].source.name))
    return materials, shared_by
