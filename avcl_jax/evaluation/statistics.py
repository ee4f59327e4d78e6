"""Metrics of ranking and classification, their confidence intervals, and paired tests.

Ties count against the scorer: a model that gives everything the same score must not gain from the
order of items. Without ties, values are those of scikit-learn. Clips of one video are not
independent, so sources are resampled: a bootstrap of sources for intervals, and an exchange of two
runs' outcomes source by source for the paired test.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest, norm, rankdata


def top_k_hits(scores: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """Returns float64 [n], 1 where the own class is among the k best; a tie counts against it.

    Args:
        scores: float [n, classes], finite; higher is more likely.
        labels: int [n] in [0, classes).

    Raises:
        ValueError: if a score is not finite.
    """
    if not np.isfinite(scores).all():
        raise ValueError(f"{int((~np.isfinite(scores)).sum())} scores are not finite")
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    return ((scores >= own).sum(axis=1) <= k).astype(np.float64)


def class_mean(values: np.ndarray, labels: np.ndarray) -> float:
    """Returns the mean over the classes that have items of the mean over their items."""
    return float(np.mean([np.mean(values[labels == label]) for label in np.unique(labels)]))


def gap_closed(random: float, pretrained: float, supervised: float) -> float:
    """Returns (pretrained − random) / (supervised − random); NaN if supervision gains nothing."""
    gap = supervised - random
    return (pretrained - random) / gap if gap > 0 else float("nan")


def average_precision(scores: np.ndarray, relevant: np.ndarray) -> float:
    """Returns the mean precision at the ranks of the relevant items, NaN without any.

    Args:
        scores: float [n].
        relevant: bool [n].
    """
    relevant = np.asarray(relevant, bool)
    if not relevant.any():
        return float("nan")
    ordered = relevant[np.lexsort((relevant, -scores))]  # of equal scores, the wrong ones first
    places = np.flatnonzero(ordered) + 1
    return float(np.mean(np.arange(1, len(places) + 1) / places))


def roc_auc(scores: np.ndarray, relevant: np.ndarray) -> float:
    """Returns the chance that a relevant item scores above another; a tie counts half.

    Half, not nothing: this is the metric's definition (Mann and Whitney), and chance stays 0.5.
    NaN if all items are relevant or none. Takes the arguments of `average_precision`.
    """
    relevant = np.asarray(relevant, bool)
    positives, negatives = int(relevant.sum()), int((~relevant).sum())
    if not positives or not negatives:
        return float("nan")
    above = rankdata(scores)[relevant].sum() - positives * (positives + 1) / 2
    return float(above / (positives * negatives))


def d_prime(auc: float) -> float:
    """Returns √2 · Φ⁻¹(AUC), the distance of two unit normal distributions with that AUC.

    Gemmeke et al., Audio Set, ICASSP 2017; there computed from the mean AUC over classes.

    An AUC of 1 or 0, for which it is infinite, is taken for one a millionth away: at most ±6.7.
    """
    return float(np.sqrt(2.0) * norm.ppf(np.clip(auc, 1e-6, 1 - 1e-6)))


def micro_average_precision(scores: np.ndarray, correct: np.ndarray, findable: np.ndarray) -> float:
    """Returns the average precision of all answers to all queries in one list, by score.

    µAP as the image and video copy detection challenges use it (Perronnin et al., CVPR 2009): an
    answer to a query that has no source is wrong wherever it stands, and a source that no answer
    names costs recall. NaN if no query has a source.

    Args:
        scores: float [n, answers], -inf where a query has fewer.
        correct: bool [n, answers]: it names the query's source; at most one per query.
        findable: bool [n], queries that have a source.
    """
    given, count = np.isfinite(scores), int(findable.sum())
    if not count:
        return float("nan")
    if not (right := correct[given]).any():
        return 0.0
    return average_precision(scores[given], right) * float(right.sum()) / count


def recall_at_precision(
    scores: np.ndarray, correct: np.ndarray, findable: np.ndarray, *, precision: float
) -> float:
    """Returns the largest recall at a threshold whose precision is at least `precision`.

    Takes the arguments of `micro_average_precision`; answers of one score pass a threshold
    together.
    """
    given, count = np.isfinite(scores), int(findable.sum())
    if not count:
        return float("nan")
    order = np.argsort(-scores[given], kind="stable")
    found = np.cumsum(correct[given][order])
    reached = found / np.arange(1, len(found) + 1)
    last_of_tie = np.append(np.diff(scores[given][order]) != 0, True)[: len(found)]
    return float(found[last_of_tie & (reached >= precision)].max(initial=0) / count)


# Statistics by name; each maps arrays by unit, [n, …], to a scalar.
STATISTICS: Mapping[str, Callable[..., float]] = {
    "mean": lambda values: float(np.mean(values)),
    "median": lambda values: float(np.median(values)),
    "class_mean": class_mean,
    # Of the accuracies of three networks on the same items.
    "gap_closed": lambda *correct: gap_closed(*(float(np.mean(c)) for c in correct)),
    # Right answers over answers, where units give different numbers of them.
    "ratio": lambda counts, totals: (
        float(np.sum(counts) / np.sum(totals)) if np.any(totals) else float("nan")
    ),
    "mean_average_precision": lambda scores, relevant: _over_classes(
        average_precision, scores, relevant
    ),
    "mean_auc": lambda scores, relevant: _over_classes(roc_auc, scores, relevant),
    "d_prime": lambda scores, relevant: d_prime(_over_classes(roc_auc, scores, relevant)),
    "micro_average_precision": micro_average_precision,
    "recall_at_precision_90": functools.partial(recall_at_precision, precision=0.9),
}
# Statistics of hits and misses whose value is 0 or 1 only where all units are alike.
_PROPORTIONS = ("mean", "class_mean", "ratio")
_CONFIDENCE = 0.95


def _over_classes(
    metric: Callable[[np.ndarray, np.ndarray], float], scores: np.ndarray, relevant: np.ndarray
) -> float:
    """Returns the mean over the classes that have both relevant and other items."""
    return float(np.nanmean([metric(s, r) for s, r in zip(scores.T, relevant.T, strict=True)]))


class Interval(NamedTuple):
    """An estimate and the bounds of its confidence interval."""

    value: float
    low: float
    high: float


class Comparison(NamedTuple):
    """Difference of two runs on the same units, NaN if a statistic is not defined in one.

    `difference` is the second run minus the first; `p_value` is two-sided, of the hypothesis that
    it does not matter which run is which.
    """

    difference: Interval
    p_value: float


def bootstrap(
    kind: str, inputs: Sequence[np.ndarray], sources: np.ndarray, *, resamples: int, seed: int
) -> Interval:
    """Returns a statistic with its 95 % percentile bootstrap interval over sources.

    Where all units are hits, or all misses, the interval is the exact one (Clopper and Pearson
    1934) of the number of sources.

    Args:
        kind: a key of `STATISTICS`.
        inputs: arrays [n, …] that it takes.
        sources: [n], units of one source are drawn together.

    Raises:
        ValueError: if arrays differ in length or are empty.
    """
    groups = _groups(inputs, sources)
    value = STATISTICS[kind](*inputs)
    if np.isnan(value):
        return Interval(value, value, value)
    if kind in _PROPORTIONS and value in (0.0, 1.0):
        trials = inputs[1] if kind == "ratio" else np.ones(len(sources))
        if (inputs[0] == value * trials).all():  # resamples would say that nothing else can be
            counted = sum(bool(trials[group].any()) for group in groups)
            bounds = binomtest(int(value) * counted, counted).proportion_ci(_CONFIDENCE)
            return Interval(value, float(bounds.low), float(bounds.high))
    return Interval(value, *_bounds(_resampled(kind, inputs, groups, resamples, seed)))


def compare(
    kind: str,
    first: Sequence[np.ndarray],
    second: Sequence[np.ndarray],
    sources: np.ndarray,
    *,
    resamples: int,
    seed: int,
) -> Comparison:
    """Compares two runs on the same units: 95 % interval of the difference, and a paired test.

    The interval is the paired bootstrap over sources; the test exchanges the two runs' outcomes for
    a random half of the sources, which under the hypothesis changes nothing. Takes the arguments of
    `bootstrap` for two runs with the same units in the same order, and raises the same;
    `resamples` is also the number of exchanges.
    """
    groups = _groups([*first, *second], sources)
    statistic = STATISTICS[kind]
    observed = statistic(*second) - statistic(*first)
    if np.isnan(observed):
        return Comparison(Interval(observed, observed, observed), observed)
    # One seed draws the same sources from both runs.
    drawn = [_resampled(kind, run, groups, resamples, seed) for run in (first, second)]
    _, numbers = np.unique(np.asarray(sources), return_inverse=True)
    rng = np.random.default_rng([seed, 1])
    extreme = 0
    for _ in range(resamples):
        swapped = (rng.random(len(groups)) < 0.5)[numbers]
        # Units first, so that arrays of any shape are exchanged unit by unit.
        ours = [np.where(swapped, b.T, a.T).T for a, b in zip(first, second, strict=True)]
        theirs = [np.where(swapped, a.T, b.T).T for a, b in zip(first, second, strict=True)]
        # A hair of tolerance: the observed exchange itself must count as extreme.
        extreme += abs(statistic(*theirs) - statistic(*ours)) >= abs(observed) - 1e-12
    interval = Interval(observed, *_bounds(drawn[1] - drawn[0]))
    return Comparison(interval, (1 + extreme) / (1 + resamples))


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p-values corrected for being several (Holm 1979), in the order given; NaN stays."""
    values = np.asarray(p_values)
    order = np.argsort(values)  # NaN last
    factors = np.count_nonzero(~np.isnan(values)) - np.arange(len(values))
    corrected = np.empty(len(values))
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(factors * values[order]))
    return corrected.tolist()


def _bounds(drawn: np.ndarray) -> tuple[float, float]:
    """Returns percentiles of the resamples in which the statistic is defined, NaN without any."""
    if not len(defined := drawn[~np.isnan(drawn)]):
        return float("nan"), float("nan")
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(defined, (tail, 1 - tail))
    return float(low), float(high)


def _groups(inputs: Sequence[np.ndarray], sources: np.ndarray) -> list[np.ndarray]:
    """Returns the positions of the units of each source."""
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
    seed: int,
) -> np.ndarray:
    """Returns float64 [resamples], the statistic of as many sources, drawn with replacement."""
    rng, results = np.random.default_rng(seed), np.empty(resamples)
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
