"""Metrics of ranking and classification, with ties counted against the one who scored.

A model that gives everything the same score must not gain from the order in which items happen to
stand. Where no two scores are equal, values are those of scikit-learn.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import norm, rankdata


def label_ranks(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns int64 [n], the rank from 1 of each item's own class, after all that tie with it.

    Args:
        scores: float [n, classes], higher is more likely.
        labels: int [n] in [0, classes).

    Raises:
        ValueError: if shapes do not match, a label is no class, or a score is not finite.
    """
    scores, labels = _check(scores, labels)
    own = scores[np.arange(len(labels)), labels][:, None]
    return (scores >= own).sum(axis=1)


def top_k_hits(scores: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """Returns float64 [n], 1 where the own class is among the k best; a tie counts against it."""
    return (label_ranks(scores, labels) <= k).astype(np.float64)


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Returns int64 [classes, classes], rows true, columns predicted."""
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (labels, predicted), 1)
    return counts


def class_mean(values: np.ndarray, labels: np.ndarray) -> float:
    """Returns the mean over classes of the mean over their items (mean class accuracy).

    Classes without an item are left out.
    """
    present = np.unique(labels)
    return float(np.mean([np.mean(values[labels == label]) for label in present]))


def gap_closed(random: float, pretrained: float, supervised: float) -> float:
    """Returns the fraction of the gap between random and supervised that pretraining closes.

    (pretrained − random) / (supervised − random); NaN if supervision gains nothing over a random
    encoder.
    """
    if supervised <= random:
        return float("nan")
    return (pretrained - random) / (supervised - random)


def average_precision(scores: np.ndarray, relevant: np.ndarray) -> float:
    """Returns the mean precision at the ranks of the relevant items.

    Args:
        scores: float [n].
        relevant: bool [n].

    Returns:
        nan if nothing is relevant.
    """
    scores, relevant = np.asarray(scores), np.asarray(relevant, bool)
    if not relevant.any():
        return float("nan")
    ordered = relevant[np.lexsort((relevant, -scores))]  # of equal scores, the wrong ones first
    places = np.flatnonzero(ordered) + 1
    return float(np.mean(np.arange(1, len(places) + 1) / places))


def roc_auc(scores: np.ndarray, relevant: np.ndarray) -> float:
    """Returns the chance that a relevant item scores above another; a tie counts half.

    Half, not nothing: this is the metric's definition (Mann and Whitney), and chance stays 0.5.

    Args:
        scores: float [n].
        relevant: bool [n].

    Returns:
        nan if all or none are relevant.
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


def micro_average_precision(
    confidences: np.ndarray, correct: np.ndarray, *, findable: int
) -> float:
    """Returns the average precision of all answers to all queries in one list, by confidence.

    µAP as the image and video copy detection challenges use it (Perronnin et al., CVPR 2009): an
    answer to a query that has no source is wrong wherever it stands, and a source that no answer
    names costs recall.

    Args:
        confidences: float [answers].
        correct: bool [answers], whether it names the query's source; at most one a query.
        findable: number of queries that have a source.

    Raises:
        ValueError: if no query has a source, or more answers are correct than queries have one.
    """
    confidences, correct = np.asarray(confidences), np.asarray(correct, bool)
    if findable < 1 or correct.sum() > findable:
        raise ValueError(f"{int(correct.sum())} correct answers to {findable} queries")
    if not correct.any():
        return 0.0
    return average_precision(confidences, correct) * float(correct.sum()) / findable


def recall_at_precision(
    confidences: np.ndarray, correct: np.ndarray, *, findable: int, precision: float
) -> float:
    """Returns the largest recall at a threshold whose precision is at least `precision`.

    Args: as `micro_average_precision`; answers of one confidence pass a threshold together.
    """
    confidences, correct = np.asarray(confidences), np.asarray(correct, bool)
    if findable < 1 or correct.sum() > findable:
        raise ValueError(f"{int(correct.sum())} correct answers to {findable} queries")
    order = np.argsort(-confidences, kind="stable")
    found = np.cumsum(correct[order])
    reached = found / np.arange(1, len(found) + 1)
    last_of_tie = np.append(np.diff(confidences[order]) != 0, True) if len(found) else found > 0
    passing = found[last_of_tie & (reached >= precision)]
    return float(passing.max() / findable) if len(passing) else 0.0


def _check(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores, labels = np.asarray(scores), np.asarray(labels)
    if scores.ndim != 2 or labels.shape != scores.shape[:1]:
        raise ValueError(f"scores {scores.shape} and labels {labels.shape} do not match")
    if len(labels) and not 0 <= labels.min() <= labels.max() < scores.shape[1]:
        raise ValueError(
            f"labels reach from {labels.min()} to {labels.max()}, there are {scores.shape[1]} "
            "classes"
        )
    if not np.isfinite(scores).all():
        raise ValueError(f"{int((~np.isfinite(scores)).sum())} scores are not finite")
    return scores, labels
