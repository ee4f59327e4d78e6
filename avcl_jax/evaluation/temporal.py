"""Temporal tasks: accuracy against an exact chance level, and confusion."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from avcl_jax.errors import UserError
from avcl_jax.evaluation.metrics import confusion_matrix


@dataclass(frozen=True)
class TaskScore:
    """How well one temporal task is solved on held-out views.

    Attributes:
        accuracy: share of views (or pairs of views) classified rightly.
        chance: 1 / number of classes, exact because every class is scored equally often.
        confusion: int [classes, classes], rows true, columns predicted; every row has the same sum.
        scored: bool [...], the views that were scored: an equal number of each class.
        correct: bool [...], which of these are classified rightly.
    """

    accuracy: float
    chance: float
    confusion: np.ndarray
    scored: np.ndarray
    correct: np.ndarray

    def as_results(self) -> dict[str, float | list[list[int]]]:
        """Returns the mapping that results.json stores."""
        return {
            "accuracy": self.accuracy,
            "chance": self.chance,
            "confusion": self.confusion.tolist(),
        }


def balanced_subset(labels: np.ndarray, mask: np.ndarray, *, classes: int, seed: int) -> np.ndarray:
    """Returns bool [n], a random choice among the masked items with every class equally often.

    Views are drawn at random, so their labels are balanced only on average; scoring an equal number
    of each class makes chance exactly 1 / classes for whatever cannot tell them apart, a constant
    answer included.

    Args:
        labels: int [n] in [0, classes).
        mask: bool [n], items the task is defined for.
        classes: number of classes.
        seed: of the choice.

    Raises:
        UserError: if a class never occurs under the mask.
    """
    labels, mask = np.asarray(labels), np.asarray(mask, dtype=bool)
    members = [np.flatnonzero(mask & (labels == c)) for c in range(classes)]
    size = min(len(m) for m in members)
    if size == 0:
        counts = [len(m) for m in members]
        raise UserError(
            f"cannot balance {classes} classes: the held-out views hold {counts} of them"
        )
    rng = np.random.default_rng(seed)
    chosen = np.zeros(len(labels), dtype=bool)
    for member in members:
        chosen[rng.choice(member, size, replace=False)] = True
    return chosen


def score_task(logits: np.ndarray, labels: np.ndarray, mask: np.ndarray, *, seed: int) -> TaskScore:
    """Scores one classifier on an equal number of views of each class.

    Args:
        logits: float [..., K].
        labels: int [...] in [0, K).
        mask: bool [...], where the task is defined.
        seed: of the choice of the views that balance the classes.

    Raises:
        ValueError: if shapes do not match, a logit under the mask is not finite, or a class is
            missing.
    """
    logits, labels, mask = np.asarray(logits), np.asarray(labels), np.asarray(mask, dtype=bool)
    classes = logits.shape[-1]
    if logits.shape[:-1] != labels.shape or labels.shape != mask.shape:
        raise ValueError(
            f"logits {logits.shape}, labels {labels.shape} and mask {mask.shape} do not match"
        )
    shape = labels.shape
    logits, labels, mask = logits.reshape(-1, classes), labels.reshape(-1), mask.reshape(-1)
    if not np.isfinite(logits[mask]).all():
        raise ValueError("a logit of a masked-in view is not finite")
    chosen = balanced_subset(labels, mask, classes=classes, seed=seed)
    truth, predicted = labels[chosen], logits[chosen].argmax(axis=-1)
    correct = np.zeros(len(labels), bool)
    correct[chosen] = truth == predicted
    return TaskScore(
        accuracy=float(np.mean(truth == predicted)),
        chance=1.0 / classes,
        confusion=confusion_matrix(truth, predicted, classes),
        scored=chosen.reshape(shape),
        correct=correct.reshape(shape),
    )
