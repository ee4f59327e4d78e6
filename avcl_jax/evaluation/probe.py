"""Linear probes: how much of a label a frozen representation gives to a linear classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits


@dataclass(frozen=True)
class ProbeResult:
    """What a probe reached.

    Attributes:
        accuracy: share of test items classified rightly.
        chance: 1 / number of classes.
        cost: inverse regularisation chosen on the training items.
        cross_validation_accuracy: mean accuracy over the held-out training folds at that cost.
        confusion: int [classes, classes], rows true, columns predicted.
        known: bool [m], test items that have a label.
        correct: bool [known items], which of these are classified rightly.
    """

    accuracy: float
    chance: float
    cost: float
    cross_validation_accuracy: float
    confusion: np.ndarray
    known: np.ndarray
    correct: np.ndarray


def linear_probe(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    *,
    train_groups: np.ndarray,
    costs: Sequence[float],
    folds: int,
    seed: int,
) -> ProbeResult:
    """Standardises features and classifies them by multinomial logistic regression.

    The cost is chosen by cross-validation of the training items alone. Mean and deviation are those
    of the training items (of the training folds while the cost is chosen); the test items are
    looked at once, by the chosen classifier. Folds keep a source whole,
    so that two clips cut from one video cannot stand on both sides. Items with a negative label are
    unknown and left out.

    Args:
        train_features: float [n, C].
        train_labels: int [n].
        test_features: float [m, C].
        test_labels: int [m].
        train_groups: int [n], source of each training item.
        costs: inverse regularisation strengths to choose from; the smallest wins a tie.
        folds: number of cross-validation folds.
        seed: of the assignment to folds.

    Returns:
        The accuracy on the test items and how it came about.

    Raises:
        ValueError: if a split holds no labelled item, features are not finite, a class has fewer
            training items than folds, or a test label never occurs in training.
    """
    train_known, test_known = np.asarray(train_labels) >= 0, np.asarray(test_labels) >= 0
    train_features, train_labels = _select(train_features, train_labels, train_known, "training")
    test_features, test_labels = _select(test_features, test_labels, test_known, "test")
    classes, counts = np.unique(train_labels, return_counts=True)
    if len(classes) < 2:
        raise ValueError(
            f"a probe needs two classes, the training items hold only {classes.tolist()}"
        )
    unseen = np.setdiff1d(test_labels, classes)
    if len(unseen):
        raise ValueError(f"test labels {unseen.tolist()} never occur among the training items")
    if counts.min() < folds:
        rarest = classes[counts.argmin()]
        raise ValueError(
            f"class {rarest} has {counts.min()} training items, fewer than the {folds} folds; "
            "use fewer folds"
        )
    search = GridSearchCV(
        _classifier(),
        {"logisticregression__C": sorted(costs)},
        cv=StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=seed),
    )
    # On matrices this small, threads of BLAS cost six times what they save.
    with threadpool_limits(1):
        search.fit(train_features, train_labels, groups=np.asarray(train_groups)[train_known])
        predicted = search.predict(test_features)
    confusion = np.zeros((len(classes), len(classes)), dtype=np.int64)
    np.add.at(
        confusion,
        (np.searchsorted(classes, test_labels), np.searchsorted(classes, predicted)),
        1,
    )
    return ProbeResult(
        accuracy=float(np.mean(predicted == test_labels)),
        chance=1.0 / len(classes),
        cost=float(search.best_params_["logisticregression__C"]),
        cross_validation_accuracy=float(search.best_score_),
        confusion=confusion,
        known=test_known,
        correct=predicted == test_labels,
    )


def _classifier() -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))


def _select(
    features: np.ndarray, labels: np.ndarray, known: np.ndarray, name: str
) -> tuple[np.ndarray, np.ndarray]:
    features = np.asarray(features, dtype=np.float64)[known]
    if not len(features):
        raise ValueError(f"no {name} item has a label")
    if features.ndim != 2 or not np.isfinite(features).all():
        raise ValueError(f"{name} features {features.shape} must be a finite matrix [items, C]")
    return features, np.asarray(labels)[known]


def trivial_statistics(
    video: np.ndarray, log_mel: np.ndarray, *, cells: int
) -> Mapping[str, np.ndarray]:
    """Describes views by statistics that know nothing of motion or of fine structure.

    Args:
        video: uint8 [V, T, H, W, 3], the views of one record.
        log_mel: float [V, F, M], natural logarithm of the mel power under each view.
        cells: the picture is divided into cells × cells for the histogram of position.

    Returns:
        mean_colour [3]; position_histogram [cells²], the share of all change between frames that
        falls into each cell; mean_loudness [1], dB of the mel power; mean_log_mel [M]. All are
        averaged over the views.
    """
    colour = video.reshape(-1, 3).mean(axis=0) / 255.0
    change = np.abs(np.diff(video.astype(np.float32).mean(axis=-1), axis=1)).mean(axis=(0, 1))
    rows = np.array_split(np.arange(change.shape[0]), cells)
    columns = np.array_split(np.arange(change.shape[1]), cells)
    histogram = np.array([change[np.ix_(r, c)].sum() for r in rows for c in columns])
    power = np.exp(log_mel.astype(np.float64)).sum(axis=-1).mean(axis=-1)
    return {
        "mean_colour": colour,
        "position_histogram": histogram / max(float(histogram.sum()), 1e-6),
        "mean_loudness": 10.0 * np.log10(power).mean(keepdims=True),
        "mean_log_mel": log_mel.mean(axis=(0, 1)),
    }
