"""Classification over the official folds of a data set, with settings from training folds alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC
from threadpoolctl import threadpool_limits

from avcl_jax.evaluation.metrics import top_k_hits
from avcl_jax.evaluation.protocol import ProtocolError

Kernel = Literal["linear", "rbf"]


@dataclass(frozen=True)
class FoldResult:
    """What came out, item by item and fold by fold.

    Attributes:
        correct: float64 [n], 1 where the item's class has the highest mean decision value, when
            its fold was the test fold; a tie counts as wrong. NaN in folds that are not tested.
        predicted: int64 [n], class in [0, classes); -1 in folds that are not tested.
        costs: of each tested fold, chosen on the other folds.
        inner_accuracy: of each tested fold, mean accuracy over the other folds at that cost, each
            held out in turn.
    """

    correct: np.ndarray
    predicted: np.ndarray
    costs: list[float]
    inner_accuracy: list[float]


def classify_folds(
    features: np.ndarray,
    labels: np.ndarray,
    folds: np.ndarray,
    sources: Sequence[str],
    *,
    classes: int,
    kernel: Kernel,
    costs: Sequence[float],
    tested: Sequence[int] | None = None,
) -> FoldResult:
    """Tests every fold, or those of `tested`, with a support vector machine that saw none of it.

    Features are standardised by mean and deviation of the training clips; every clip of a training
    item is a training example of its class; an item is classified by the mean of its clips'
    decision values, one class against the rest. The cost is that with the highest accuracy over
    items when each of the training folds is held out in turn, the smallest of equal ones.

    Args:
        features: float [n, clips, C].
        labels: int [n] in [0, classes).
        folds: int [n].
        sources: [n], none of which may be in two folds.
        classes: their number.
        kernel: "linear" is liblinear's L2-regularised squared hinge loss, "rbf" libsvm's with gamma
            1 / (C · variance).
        costs: of which to choose.
        tested: numbers of the folds to test, increasing; None is all of them.

    Raises:
        ProtocolError: as `check_folds`.
    """
    check_folds(labels, folds, sources)
    names = np.unique(folds)
    costs = sorted(costs)
    tests = range(len(names)) if tested is None else np.searchsorted(names, tested).tolist()

    def scores(train: np.ndarray, wanted: Sequence[float]) -> dict[float, np.ndarray]:
        """Mean decision values [items that are not in training, classes], for each cost."""
        scaler = StandardScaler().fit(_clips(features[train]))
        known = scaler.transform(_clips(features[train]))
        unknown = scaler.transform(_clips(features[~train]))
        answers = np.repeat(labels[train], features.shape[1])
        found = {}
        for cost in wanted:
            model = _machine(kernel, cost).fit(known, answers)
            decisions = _decisions(model, unknown, classes)
            found[cost] = decisions.reshape(-1, features.shape[1], classes).mean(axis=1)
        return found

    inner = np.full((len(names), len(names), len(costs)), np.nan)
    # Of more than one thread, those of BLAS cost more than they save on matrices of this size.
    with threadpool_limits(1):
        # One training without folds a and b serves two choices: that for a, which asks about b,
        # and that for b, which asks about a.
        for a, b in itertools.combinations(range(len(names)), 2):
            if a not in tests and b not in tests:
                continue
            train = ~np.isin(folds, names[[a, b]])
            held = folds[~train]
            for number, found in enumerate(scores(train, costs).values()):
                hits = top_k_hits(found, labels[~train], 1)
                inner[a, b, number] = hits[held == names[b]].mean()
                inner[b, a, number] = hits[held == names[a]].mean()
        accuracy = np.nanmean(inner[list(tests)], axis=1)
        best = accuracy.argmax(axis=1)  # the first, so the smallest cost, of equal ones
        correct, predicted = np.full(len(labels), np.nan), np.full(len(labels), -1)
        for name, chosen in zip(names[list(tests)], best, strict=True):
            train = folds != name
            cost = costs[chosen]
            found = scores(train, [cost])[cost]
            correct[~train] = top_k_hits(found, labels[~train], 1)
            predicted[~train] = found.argmax(axis=1)
    return FoldResult(
        correct,
        predicted,
        [costs[number] for number in best],
        accuracy.max(axis=1).tolist(),
    )


def check_folds(labels: np.ndarray, folds: np.ndarray, sources: Sequence[str]) -> None:
    """Refuses items that `classify_folds` cannot classify.

    Args:
        labels: int [n].
        folds: int [n].
        sources: [n].

    Raises:
        ProtocolError: if there are fewer than three folds, a source is in two of them, or training
            without two of them would have one class.
    """
    names = np.unique(folds)
    if len(names) < 3:
        raise ProtocolError(f"nested cross-validation needs three folds, there are {len(names)}")
    for pair in itertools.combinations(names, 2):
        if len(np.unique(labels[~np.isin(folds, pair)])) < 2:
            raise ProtocolError(
                f"without folds {pair[0]} and {pair[1]}, numbered from 0, training records have "
                "fewer than two classes"
            )
    seen: dict[str, int] = {}
    for fold, source in zip(folds.tolist(), sources, strict=True):
        if seen.setdefault(source, fold) != fold:
            raise ProtocolError(
                f"source {source} is in two folds: a test fold would have been heard in training"
            )


def _clips(features: np.ndarray) -> np.ndarray:
    return features.reshape(-1, features.shape[-1]).astype(np.float64)


def _machine(kernel: Kernel, cost: float) -> LinearSVC | SVC:
    if kernel == "linear":
        # The primal problem: the dual does not converge in thousands of passes at large costs.
        return LinearSVC(C=cost, dual=False)
    return SVC(C=cost, kernel="rbf", gamma="scale", decision_function_shape="ovr")


def _decisions(model: LinearSVC | SVC, features: np.ndarray, classes: int) -> np.ndarray:
    """Returns [n, classes]; a class that training did not have is never chosen."""
    values = model.decision_function(features)
    if values.ndim == 1:
        values = np.stack([-values, values], axis=1)
    decisions = np.full((len(values), classes), values.min() - 1.0)
    decisions[:, model.classes_] = values
    return decisions
