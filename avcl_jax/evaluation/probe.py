"""Linear probes: how much of a label a frozen representation gives to a linear classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from avcl_jax.errors import UserError
from avcl_jax.evaluation.linear_classifier import fit_probe
from avcl_jax.evaluation.metrics import confusion_matrix, top_k_hits


@dataclass(frozen=True)
class ProbeResult:
    """Result of a linear probe.

    Attributes:
        accuracy: fraction of test items classified rightly; a tie counts as wrong.
        chance: 1 / number of classes.
        cost: C chosen on the training items.
        confusion: int [classes, classes], rows true, columns predicted.
        known: bool [m], test items that have a label.
        correct: float64 [known items], 1 where classified rightly.
    """

    accuracy: float
    chance: float
    cost: float
    confusion: np.ndarray
    known: np.ndarray
    correct: np.ndarray


def linear_probe(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    *,
    train_sources: np.ndarray,
    classes: int,
    costs: Sequence[float],
    folds: int,
    iterations: int,
    tolerance: float,
    seed: int,
) -> ProbeResult:
    """Classifies test items by `linear_classifier.fit_probe` of the training items.

    The test items are looked at once, by the classifier with the chosen C. Items with a negative
    label are unknown and left out.

    Args:
        train_features: float [n, C].
        train_labels: int [n].
        test_features: float [m, C].
        test_labels: int [m].
        train_sources: int [n], source of each training item.
        classes: number of classes.
        costs: candidates for C.
        folds: number of cross-validation folds.
        iterations: largest number of iterations of a training.
        tolerance: largest gradient at which a training ends.
        seed: seed of the assignment to folds.

    Raises:
        UserError: as `fit_probe`, or if a split has no labelled item.
    """
    train_known, known = np.asarray(train_labels) >= 0, np.asarray(test_labels) >= 0
    for name, labelled in (("training", train_known), ("test", known)):
        if not labelled.any():
            raise UserError(f"no {name} item has a label")
    probe = fit_probe(
        train_features[train_known],
        train_labels[train_known],
        train_sources[train_known],
        classes=classes,
        costs=costs,
        folds=folds,
        iterations=iterations,
        tolerance=tolerance,
        seed=seed,
    )
    scores = probe.classifier.scores(test_features, np.flatnonzero(known))
    labels = test_labels[known]
    correct = top_k_hits(scores, labels, 1)
    return ProbeResult(
        accuracy=float(correct.mean()),
        chance=1.0 / classes,
        cost=probe.cost,
        confusion=confusion_matrix(labels, scores.argmax(axis=1), classes),
        known=known,
        correct=correct,
    )


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
