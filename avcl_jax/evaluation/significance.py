"""Confidence intervals and paired tests that resample videos, not clips.

Clips cut from one video are not independent, so sources are what is drawn: a bootstrap of sources
for intervals, and an exchange of two runs' outcomes source by source for the paired test.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest

from avcl_jax.evaluation import metrics

# Metrics by how they come out of what is stored for each unit: arrays of the kind's inputs, [n, …].
STATISTICS: Mapping[str, Callable[..., float]] = {
    "mean": lambda values: float(np.mean(values)),
    "median": lambda values: float(np.median(values)),
    "class_mean": metrics.class_mean,
    # Of the accuracies of three networks on the same items.
    "gap_closed": lambda *correct: metrics.gap_closed(*(float(np.mean(c)) for c in correct)),
    # Right answers over answers, where units give different numbers of them.
    "ratio": lambda counts, totals: (
        float(np.sum(counts) / np.sum(totals)) if np.any(totals) else float("nan")
    ),
    "mean_average_precision": lambda scores, relevant: _over_classes(
        metrics.average_precision, scores, relevant
    ),
    "mean_auc": lambda scores, relevant: _over_classes(metrics.roc_auc, scores, relevant),
    "d_prime": lambda scores, relevant: metrics.d_prime(
        _over_classes(metrics.roc_auc, scores, relevant)
    ),
    "micro_average_precision": lambda scores, correct, findable: _of_rankings(
        metrics.micro_average_precision, scores, correct, findable
    ),
    "recall_at_precision_90": lambda scores, correct, findable: _of_rankings(
        functools.partial(metrics.recall_at_precision, precision=0.9), scores, correct, findable
    ),
}
# Statistics of hits and misses whose value is 0 or 1 only where all units are alike.
_PROPORTIONS = ("mean", "class_mean", "ratio")


def _over_classes(
    metric: Callable[[np.ndarray, np.ndarray], float], scores: np.ndarray, relevant: np.ndarray
) -> float:
    """Returns the mean over the classes that have both relevant and other items."""
    return float(np.nanmean([metric(s, r) for s, r in zip(scores.T, relevant.T, strict=True)]))


def _of_rankings(
    metric: Callable[..., float],
    scores: np.ndarray,
    correct: np.ndarray,
    findable: np.ndarray,
) -> float:
    """Returns a metric of all answers in one list.

    Args:
        metric: of `metrics`, that takes confidences, correct and findable.
        scores: float [n, answers], -inf where a query has fewer.
        correct: bool [n, answers].
        findable: bool [n], queries that have a source.
    """
    count = int(findable.sum())
    given = np.isfinite(scores)
    return metric(scores[given], correct[given], findable=count) if count else float("nan")


class Interval(NamedTuple):
    """An estimate and the bounds of its confidence interval."""

    value: float
    low: float
    high: float


class Comparison(NamedTuple):
    """How two runs differ on the same units.

    Attributes:
        difference: of the second run minus the first, with its interval.
        p_value: two-sided, of the hypothesis that it does not matter which run is which.
    """

    difference: Interval
    p_value: float


def bootstrap(
    kind: str,
    inputs: Sequence[np.ndarray],
    sources: np.ndarray,
    *,
    resamples: int,
    seed: int,
    confidence: float = 0.95,
) -> Interval:
    """Returns a statistic with its percentile bootstrap interval over sources.

    Where all units are hits, or all misses, the interval is the exact one (Clopper and Pearson
    1934) for so many sources.

    Args:
        kind: a key of `STATISTICS`.
        inputs: arrays [n, …] that it takes.
        sources: [n], units of one source are drawn together.
        resamples: number of resampled sets.
        seed: of the draws.
        confidence: of the interval.

    Raises:
        ValueError: if the kind is unknown, arrays differ in length or there is no unit.
    """
    groups = _groups(kind, inputs, sources)
    value = STATISTICS[kind](*inputs)
    if np.isnan(value):
        return Interval(value, value, value)
    if kind in _PROPORTIONS and value in (0.0, 1.0) and _all_alike(kind, inputs, value):
        # Resamples would say that nothing else can be.
        counted = len(groups)
        if kind == "ratio":  # a source without an answer is not a trial
            counted = sum(bool(inputs[1][group].any()) for group in groups)
        bounds = binomtest(int(value) * counted, counted).proportion_ci(confidence)
        return Interval(value, float(bounds.low), float(bounds.high))
    drawn = _resampled(kind, inputs, groups, resamples, np.random.default_rng(seed))
    return Interval(value, *_bounds(drawn, confidence))


def compare(
    kind: str,
    first: Sequence[np.ndarray],
    second: Sequence[np.ndarray],
    sources: np.ndarray,
    *,
    resamples: int,
    seed: int,
    confidence: float = 0.95,
) -> Comparison:
    """Compares two runs on the same units: interval of the difference, and a paired test.

    The interval is the paired bootstrap over sources; the test exchanges the two runs' outcomes for
    a random half of the sources, which under the hypothesis changes nothing.

    Args:
        kind: a key of `STATISTICS`.
        first: arrays [n, …] of one run.
        second: of the other, of the same units in the same order.
        sources: [n].
        resamples: number of resampled sets, and of exchanges.
        seed: of the draws.
        confidence: of the interval.

    Raises:
        ValueError: as `bootstrap`, or if the runs have different numbers of units.
    """
    groups = _groups(kind, [*first, *second], sources)
    _, numbers = np.unique(np.asarray(sources), return_inverse=True)
    statistic = STATISTICS[kind]
    observed = statistic(*second) - statistic(*first)
    drawn = _resampled(kind, second, groups, resamples, np.random.default_rng(seed)) - _resampled(
        kind, first, groups, resamples, np.random.default_rng(seed)
    )
    low, high = _bounds(drawn, confidence)
    rng = np.random.default_rng([seed, 1])
    extreme = 0
    for _ in range(resamples):
        exchanged = rng.random(len(groups)) < 0.5
        swapped = exchanged[numbers]
        ours = [_choose(swapped, a, b) for a, b in zip(first, second, strict=True)]
        theirs = [_choose(swapped, b, a) for a, b in zip(first, second, strict=True)]
        # A hair of tolerance: the observed exchange itself must count as extreme.
        extreme += abs(statistic(*theirs) - statistic(*ours)) >= abs(observed) - 1e-12
    return Comparison(Interval(observed, low, high), (1 + extreme) / (1 + resamples))


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p-values corrected for being several (Holm 1979), in the order given."""
    order = np.argsort(p_values)
    corrected = np.empty(len(p_values))
    largest = 0.0
    for place, index in enumerate(order):
        largest = max(largest, (len(p_values) - place) * p_values[index])
        corrected[index] = min(1.0, largest)
    return corrected.tolist()


def _all_alike(kind: str, inputs: Sequence[np.ndarray], value: float) -> bool:
    """Returns whether every unit is a hit (value 1), or every unit a miss (value 0)."""
    return bool((inputs[0] == value * (inputs[1] if kind == "ratio" else 1)).all())


def _bounds(drawn: np.ndarray, confidence: float) -> tuple[float, float]:
    """Returns percentiles of the resamples in which the statistic is defined, NaN without any."""
    defined = drawn[~np.isnan(drawn)]
    if not len(defined):
        return float("nan"), float("nan")
    tail = (1 - confidence) / 2
    low, high = np.quantile(defined, (tail, 1 - tail))
    return float(low), float(high)


def _choose(swapped: np.ndarray, kept: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.where(swapped.reshape(-1, *[1] * (kept.ndim - 1)), other, kept)


def _groups(kind: str, inputs: Sequence[np.ndarray], sources: np.ndarray) -> list[np.ndarray]:
    """Returns the positions of the units of each source."""
    if kind not in STATISTICS:
        raise ValueError(f"unknown statistic {kind!r}: use one of {', '.join(STATISTICS)}")
    lengths = {len(values) for values in [*inputs, sources]}
    if len(lengths) != 1 or not len(sources):
        raise ValueError(f"a statistic needs arrays of one length above 0, got {sorted(lengths)}")
    _, numbers = np.unique(np.asarray(sources), return_inverse=True)
    order = np.argsort(numbers, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1)


def _resampled(
    kind: str,
    inputs: Sequence[np.ndarray],
    groups: Sequence[np.ndarray],
    resamples: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Returns float64 [resamples]; the same generator gives the same draws of sources."""
    results = np.empty(resamples)
    if kind == "mean":  # sums of sources are enough, and a hundred times faster
        sums = np.array([inputs[0][group].sum() for group in groups], np.float64)
        sizes = np.array([len(group) for group in groups], np.float64)
    for number in range(resamples):
        draw = rng.integers(0, len(groups), len(groups))
        if kind == "mean":
            results[number] = sums[draw].sum() / sizes[draw].sum()
        else:
            units = np.concatenate([groups[group] for group in draw])
            results[number] = STATISTICS[kind](*(values[units] for values in inputs))
    return results
