"""Seconds that two sources share: from spans of excerpts that agree to intervals of a pair."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from avcl_jax.export.encoder import MODALITIES
from avcl_jax.fingerprint.agreement import runs

# Spans of one line predict the same time within this, with no longer gap between them.
_SAME_LINE_SECONDS, _GAP_SECONDS = 0.75, 2.0
# Intervals are measured to about this.
_TOLERANCE_SECONDS = 0.5
# Intervals are joined in quarters of a second.
CELLS_PER_SECOND = 4


class Seconds(NamedTuple):
    """An interval of a source."""

    start: float
    end: float


class Interval(NamedTuple):
    """Seconds that two sources share.

    Attributes:
        sides: interval of the first source, and of the second.
        matched: modalities that agree.
        exact: modalities among them that are not mixed, cropped or covered.
        shared_by: sources that have it, copies counted once.
    """

    sides: tuple[Seconds, Seconds]
    matched: tuple[str, ...]
    exact: tuple[str, ...]
    shared_by: int = 2


class Span(NamedTuple):
    """Seconds of a source that agree with another: its time is offset + rate · this one's."""

    modality: str
    exact: bool
    begin: float
    end: float
    rate: float
    offset: float

    def there(self, seconds: float) -> float:
        return self.offset + self.rate * seconds

    def inverted(self) -> Span:
        """Returns the span of the other source."""
        begin, end = self.there(self.begin), self.there(self.end)
        rate, offset = 1 / self.rate, -self.offset / self.rate
        return self._replace(begin=begin, end=end, rate=rate, offset=offset)


def join(spans: Sequence[Span], durations: Sequence[float], min_seconds: float) -> list[Interval]:
    """Joins the spans of a pair of sources that last so long, in times of the first one."""
    lines: list[list[Span]] = []
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
            interval = _inside(interval, durations)
            if not any(_overlap(interval, other) for other in intervals):
                intervals.append(interval)
    return sorted(intervals)


def _inside(interval: Interval, durations: Sequence[float]) -> Interval:
    """Cuts what reaches over an end of either source, on both sides."""
    first, second = interval.sides
    rate = (second.end - second.start) / (first.end - first.start)
    early = max(0.0, -first.start, -second.start / rate)
    late = max(0.0, first.end - durations[0], (second.end - durations[1]) / rate)
    cut = Seconds(first.start + early, first.end - late)
    return interval._replace(
        sides=(cut, Seconds(second.start + rate * early, second.end - rate * late))
    )


def _overlap(interval: Interval, other: Interval) -> bool:
    """Returns whether half of the interval is in the other, on both sides."""
    return all(
        2 * (min(own.end, its.end) - max(own.start, its.start)) > own.end - own.start
        for own, its in zip(interval.sides, other.sides, strict=True)
    )


def _of_line(line: Sequence[Span], min_seconds: float) -> Iterator[Interval]:
    """Yields the intervals of spans of one line, by the modalities that agree."""
    begin, end = min(s.begin for s in line), max(s.end for s in line)
    cells = np.zeros((len(MODALITIES), round((end - begin) * CELLS_PER_SECOND) + 1), bool)
    exact = cells.copy()
    for span in line:
        first, last = (round((t - begin) * CELLS_PER_SECOND) for t in (span.begin, span.end))
        cells[MODALITIES.index(span.modality), first:last] = True
        exact[MODALITIES.index(span.modality), first:last] |= span.exact
    shortest = (min_seconds - _TOLERANCE_SECONDS) * CELLS_PER_SECOND
    for first, last in runs(_bridged(np.any(cells, axis=0))):
        if last - first < shortest:
            continue
        for a, b in _pieces(cells[:, first:last], shortest):
            fractions = cells[:, first + a : first + b].mean(axis=1)
            most = min(0.5, fractions.max())
            matched, clear = (
                tuple(m for m, f in zip(MODALITIES, own, strict=True) if f >= most)
                for own in (fractions, exact[:, first + a : first + b].mean(axis=1))
            )
            ends = [begin + (first + n) / CELLS_PER_SECOND for n in (a, b)]
            # The spans nearest to the ends: the line may drift.
            spans = [min(line, key=lambda s: max(s.begin - t, t - s.end, 0.0)) for t in ends]
            there = [span.there(t) for span, t in zip(spans, ends, strict=True)]
            yield Interval((Seconds(*ends), Seconds(*there)), matched, clear)


def _bridged(mask: np.ndarray) -> np.ndarray:
    """Closes gaps of up to a second."""
    closed = mask.copy()
    for begin, end in runs(~mask):
        if begin > 0 and end < len(mask) and end - begin <= CELLS_PER_SECOND:
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
