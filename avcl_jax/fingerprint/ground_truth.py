"""Metrics of an index by ground truth of the kind of the Video Similarity Challenge 2022.

Ground truth lists segments: an interval of a query that is a copy of an interval of a reference.
Pairs of query and reference are scored as in the challenge's descriptor track, segments as in its
matching track (Pizzi et al., The 2023 Video Similarity Dataset and Challenge, arXiv:2306.09489).
In both, precision and recall are taken at every score that occurs, so that ties count together,
and µAP is the sum of precision times the growth of recall. Other ties of this project's metrics
count as wrong; these are comparable with the challenge's.
"""

from __future__ import annotations

import csv
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np

from avcl_jax.fingerprint.settings import FingerprintError

Pair = tuple[str, str]  # names of query and reference


class Segment(NamedTuple):
    """An interval of a query that is an interval of a reference, in seconds."""

    query: str
    reference: str
    query_start: float
    query_end: float
    reference_start: float
    reference_end: float

    @property
    def pair(self) -> Pair:
        """Names of the query and the reference."""
        return self.query, self.reference

    @property
    def intervals(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """The intervals of the query and of the reference."""
        return (self.query_start, self.query_end), (self.reference_start, self.reference_end)


# Length of a file by its name, None where it is not known.
Length = Callable[[str], float | None]

# An end may be rounded up, and containers state lengths that differ by some frames.
_SLACK_SECONDS = 1.0
_COLUMNS = ("query_id", "ref_id", "query_start", "query_end", "ref_start", "ref_end")


class Curve(NamedTuple):
    """Precision and recall of all predictions of at least some score, float64 [scores] each.

    `scores` are those that occur, the highest first.
    """

    scores: np.ndarray
    precision: np.ndarray
    recall: np.ndarray

    @property
    def average_precision(self) -> float:
        """Sum of precision times the growth of recall; 0 without predictions."""
        return float((self.precision * np.diff(self.recall, prepend=0.0)).sum())

    def recall_at_precision(self, precision: float) -> float:
        """Returns the largest recall at a score whose precision is at least this; 0 at none."""
        return float(self.recall[self.precision >= precision].max(initial=0.0))

    def at(self, score: float) -> tuple[float | None, float]:
        """Returns precision, None without predictions, and recall of scores of at least this."""
        count = int((self.scores >= score).sum())
        if not count:
            return None, 0.0
        return float(self.precision[count - 1]), float(self.recall[count - 1])


class Names:
    """Files by their ids: the end of a path, with or without the suffix of the file."""

    def __init__(self, names: Iterable[str]):
        """Takes the paths, or other names, that ids mean."""
        self._names: dict[str, set[str]] = defaultdict(set)
        for name in names:
            parts = PurePath(name).parts
            for first in range(len(parts)):
                end = PurePath(*parts[first:])
                self._names[str(end)].add(name)
                self._names[str(end.with_suffix(""))].add(name)

    def find(self, text: str, *, among: str) -> str:
        """Returns the name that an id means.

        Args:
            text: the id.
            among: the names, in words.

        Raises:
            FingerprintError: if there is none, or several.
        """
        found = sorted(self._names.get(os.path.normpath(text), ()))
        if not found:
            raise FingerprintError(f"{text!r} is not among {among}")
        if len(found) > 1:
            raise FingerprintError(
                f"{text!r} may be {' or '.join(found[:3])}: write more of the path, or the suffix"
            )
        return found[0]


def read_segments(
    path: Path,
    *,
    queries: Names,
    references: Names,
    among: Pair,
    lengths: tuple[Length, Length],
) -> list[Segment]:
    """Reads the segments of a CSV file with the columns of the challenge, in any order.

    Args:
        among: the queries and the references in words.
        lengths: lengths of queries and of references, in seconds.

    Raises:
        FingerprintError: names the line and the value that cannot be used.
    """
    segments = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        try:
            missing = [name for name in _COLUMNS if name not in (rows.fieldnames or ())]
            if missing:
                given = ", ".join(map(repr, rows.fieldnames or ())) or "nothing"
                raise FingerprintError(
                    f"no column {missing[0]} in {given}: it needs {', '.join(_COLUMNS)}"
                )
            for row in rows:
                segments.append(_segment(row, queries, references, among))
                _check_inside(segments[-1], lengths)
        except (FingerprintError, UnicodeDecodeError, csv.Error) as error:
            raise FingerprintError(f"{path}, line {max(rows.line_num, 1)}: {error}") from None
    if not segments:
        raise FingerprintError(f"{path} has no segments: it needs at least one line")
    return segments


def _segment(
    row: Mapping[str, str | None], queries: Names, references: Names, among: Pair
) -> Segment:
    values = [row[name] or "" for name in _COLUMNS]
    query = queries.find(values[0], among=among[0])
    reference = references.find(values[1], among=among[1])
    times = []
    for name, value in zip(_COLUMNS[2:], values[2:], strict=True):
        try:
            times.append(float(value))
        except ValueError:
            times.append(math.nan)
        if not 0 <= times[-1] < math.inf:
            raise FingerprintError(f"{name} {value!r} must be a number of seconds, at least 0")
    segment = Segment(query, reference, *times)
    for side, (start, end) in zip(("query", "ref"), segment.intervals, strict=True):
        if not start < end:
            raise FingerprintError(f"{side}_end {end:g} must be after {side}_start {start:g}")
    return segment


def _check_inside(segment: Segment, lengths: tuple[Length, Length]) -> None:
    """Raises FingerprintError if an interval is not one of its file, as where times are in ms."""
    for side, name, (start, end), length in zip(
        ("query", "ref"), segment.pair, segment.intervals, lengths, strict=True
    ):
        seconds = length(name)
        if seconds is None:
            continue
        for column, value, latest in (
            ("start", start, seconds),
            ("end", end, seconds + _SLACK_SECONDS),
        ):
            if value > latest:
                raise FingerprintError(
                    f"{side}_{column} {value:g} is after the end of {name}, at {seconds:.2f} s: "
                    "give times in seconds"
                )


def pair_curve(scores: Mapping[Pair, float], true: Iterable[Pair]) -> Curve:
    """Returns precision and recall of pairs of query and reference."""
    expected = set(true)
    values = np.array(list(scores.values()), np.float64)
    right = np.array([pair in expected for pair in scores], bool)
    order = np.argsort(-values, kind="stable")
    found = np.cumsum(right[order])
    ends = np.append(np.diff(values[order]) != 0, True)[: len(order)]
    counts = np.arange(1, len(order) + 1)
    return Curve(values[order][ends], (found / counts)[ends], (found / len(expected))[ends])


def segment_curve(predicted: Iterable[tuple[Segment, float]], true: Iterable[Segment]) -> Curve:
    """Returns precision and recall of segments with their scores.

    Of query and reference alike, per pair: length of the union of predicted intervals, and of its
    intersection with the union of those true segments that a prediction overlaps in both. Precision
    is the sum of intersections over that of predictions, recall over the length of the true
    segments, and each the geometric mean of that of the queries and of the references.
    """
    expected: dict[Pair, list[Segment]] = defaultdict(list)
    for segment in true:
        expected[segment.pair].append(segment)
    total = sum((_lengths(segments) for segments in expected.values()), np.zeros(2))
    by_score: dict[float, list[Segment]] = defaultdict(list)
    for segment, score in predicted:
        by_score[score].append(segment)
    given: dict[Pair, list[Segment]] = defaultdict(list)
    # Per pair, [query and reference] lengths of predictions and of intersections.
    lengths: dict[Pair, tuple[np.ndarray, np.ndarray]] = {}
    covered, shared = np.zeros(2), np.zeros(2)
    points = []
    for score in sorted(by_score, reverse=True):
        for segment in by_score[score]:
            given[segment.pair].append(segment)
        for pair in {segment.pair for segment in by_score[score]}:
            before = lengths.get(pair, (np.zeros(2), np.zeros(2)))
            met = [s for s in expected.get(pair, ()) if any(_overlap(s, g) for g in given[pair])]
            own = _lengths(given[pair])
            both = own + _lengths(met) - _lengths([*given[pair], *met])
            lengths[pair] = own, both
            covered, shared = covered + own - before[0], shared + both - before[1]
        points.append((score, *_means(shared / covered, shared / total)))
    return Curve(*np.array(points).reshape(-1, 3).T)


def _means(*fractions: np.ndarray) -> list[float]:
    """Returns the geometric means of fractions [2] of the queries and of the references."""
    return [math.sqrt(max(float(np.prod(fraction)), 0.0)) for fraction in fractions]


def _overlap(first: Segment, second: Segment) -> bool:
    """Tests whether two segments share time in the query and in the reference."""
    pairs = zip(first.intervals, second.intervals, strict=True)
    return all(max(a[0], b[0]) < min(a[1], b[1]) for a, b in pairs)


def _lengths(segments: Sequence[Segment]) -> np.ndarray:
    """Returns float64 [query and reference], the lengths of the unions of the intervals."""
    return np.array([_union_length([s.intervals[side] for s in segments]) for side in (0, 1)])


def _union_length(intervals: Iterable[tuple[float, float]]) -> float:
    total, reached = 0.0, -math.inf
    for start, end in sorted(intervals):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total
