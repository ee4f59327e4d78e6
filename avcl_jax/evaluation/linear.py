"""Linear classifiers of frozen features, and the choice of their C by held-out groups of items.

Logistic regression has the objective of scikit-learn's, which is convex, so that the solution does
not depend on the solver; items are sharded over devices. At 180,000 clips of 512 features and 309
classes an iteration is 0.2 TFLOP: scikit-learn takes minutes per C on a laptop, an accelerator
seconds. Support vector machines, as is usual for ESC, are scikit-learn's.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC
from sklearn.utils import assert_all_finite, gen_batches
from threadpoolctl import threadpool_limits

from avcl_jax.errors import UserError
from avcl_jax.evaluation.statistics import STATISTICS, top_k_hits
from avcl_jax.training import sharding

_MEMORY = 10  # pairs of steps and gradients that L-BFGS keeps
_BLOCK = 8192  # rows that the host copies at a time

# "rbf" is a baseline of classical features, and not linear.
Kind = Literal["logistic", "svm", "rbf"]
# Maps features [m, channels] and rows, int [n], to logits or decision values [n, classes].
_Scores = Callable[[np.ndarray, np.ndarray], np.ndarray]
# Trains classifiers on some of the examples, one for each C.
_Fits = Callable[[np.ndarray, Sequence[float]], list[_Scores]]


@dataclass(frozen=True)
class LinearProbe:
    """A classifier and the choice of its C.

    Attributes:
        classifier: scores of the classifier that was trained on all items.
        cost: inverse regularisation strength C.
        held_out: C -> mean score over the held-out groups.
    """

    classifier: _Scores
    cost: float
    held_out: Mapping[float, float]

    def scores(self, features: np.ndarray) -> np.ndarray:
        """Returns scores [n, classes] of features [n, channels] or, means over, [n, clips, …]."""
        flat = features.reshape(-1, features.shape[-1])
        scores = self.classifier(flat, np.arange(len(flat)))
        return _over_clips(scores, len(flat) // len(features))


def fit_probe(
    features: np.ndarray,
    targets: np.ndarray,
    groups: np.ndarray,
    *,
    classes: int,
    costs: Sequence[float],
    classifier: Kind,
    iterations: int,
    tolerance: float,
    machines: dict[Any, Any] | None = None,
) -> LinearProbe:
    """Chooses C by holding out each group of items in turn, and trains on all items.

    Features are standardised by the items that a classifier is trained on. C is the one with the
    highest mean score over the held-out groups, the smallest of equally good ones. The score is
    accuracy, a tie between classes counting as wrong, or mean average precision if an item may have
    several classes.

    Args:
        features: float32 [n, channels], or [n, clips, channels]: then each clip is an example, and
            an item gets the mean score of its clips.
        targets: int [n], or bool [n, classes] for several classes per item.
        groups: int [n], as `held_out_groups` makes them, or the official fold of each item.
        classifier: "logistic" regression, "svm" (liblinear: one class against the rest, squared
            hinge loss, L2), or "rbf" (libsvm, gamma 1 / (channels · variance)).
        iterations: most iterations of logistic regression, which ends when no entry of the
            gradient of the mean loss is larger than `tolerance`.
        machines: support vector machines of other splits, to which those of this one are added.
            Of official folds each pair is held out twice, by the split of the one and of the other.

    Raises:
        ValueError: if features are not finite.
    """
    assert_all_finite(features, input_name="features")
    clips = features.shape[1] if features.ndim == 3 else 1
    flat, answers = features.reshape(-1, features.shape[-1]), targets.repeat(clips, axis=0)

    def examples(mask: np.ndarray) -> np.ndarray:
        return np.flatnonzero(mask.repeat(clips))

    if classifier == "logistic":
        fits = _regressions(flat, answers, classes, iterations, tolerance)
    else:
        fits = _machines(flat, answers, classes, classifier, {} if machines is None else machines)
    costs, names = sorted(costs), np.unique(groups)
    reached = np.empty((len(names), len(costs)))
    for place, group in enumerate(names):
        held, own = groups == group, targets[groups == group]
        for number, fit in enumerate(fits(examples(~held), costs)):
            scores = _over_clips(fit(flat, examples(held)), clips)
            reached[place, number] = (
                STATISTICS["mean_average_precision"](scores, own)
                if targets.ndim == 2
                else top_k_hits(scores, own, 1).mean()
            )
    means = np.nanmean(reached, axis=0)
    cost = costs[int(means.argmax())]
    (fit,) = fits(np.arange(len(flat)), [cost])
    return LinearProbe(fit, cost, dict(zip(costs, means.tolist(), strict=True)))


def _over_clips(scores: np.ndarray, clips: int) -> np.ndarray:
    return scores.reshape(-1, clips, scores.shape[-1]).mean(axis=1)


def held_out_groups(
    targets: np.ndarray, sources: Sequence[Any] | np.ndarray, *, folds: int, seed: int
) -> np.ndarray:
    """Assigns the sources of items to random folds, so that clips of one video are held out
    together: int [n] in [0, folds).

    Raises:
        UserError: if there are fewer sources than folds, or mAP is not defined on any fold.
    """
    check_sources(sources, folds)
    names, first, numbers = np.unique(np.asarray(sources), return_index=True, return_inverse=True)
    # Numbered by first appearance: the folds do not depend on how sources are called.
    order = np.argsort(np.argsort(first))
    group = (np.random.default_rng(seed).permutation(len(names)) % folds)[order[numbers]]
    if targets.ndim == 2 and not any(
        ranked_classes(targets[group == fold]).any() for fold in range(folds)
    ):
        raise UserError(
            "no held-out fold has positive and negative items of any class, so mAP is not defined: "
            "set probe.folds lower"
        )
    return group


def ranked_classes(targets: np.ndarray) -> np.ndarray:
    """Returns bool [classes], true for classes that have positive and negative items."""
    return np.logical_and(targets.any(axis=0), ~targets.all(axis=0))


def check_sources(sources: Sequence[Any] | np.ndarray, folds: int) -> None:
    """Raises a UserError if there are fewer sources of training items than folds."""
    if (count := len(np.unique(np.asarray(sources)))) < folds:
        raise UserError(
            f"{folds} folds need as many training sources, got {count}: set probe.folds lower"
        )


def _machines(
    features: np.ndarray, targets: np.ndarray, classes: int, kind: Kind, trained: dict[Any, Any]
) -> _Fits:
    """Trains support vector machines, or takes those that were trained on the same examples."""

    def fits(rows: np.ndarray, costs: Sequence[float]) -> list[_Scores]:
        examples, answers = features[rows].astype(np.float64), targets[rows]
        digests = [hashlib.sha256(array).digest() for array in (examples, answers)]
        for cost in costs:
            if (kind, cost, *digests) in trained:
                continue
            # The primal problem: the dual does not converge in thousands of passes at large C.
            machine = LinearSVC(C=cost, dual=False) if kind == "svm" else SVC(C=cost)
            # More than one thread of BLAS costs more than it saves on matrices of this size.
            with threadpool_limits(1):
                model = make_pipeline(StandardScaler(), machine).fit(examples, answers)
            trained[kind, cost, *digests] = model
        models = [trained[kind, cost, *digests] for cost in costs]
        return [functools.partial(_decisions, model, classes) for model in models]

    return fits


def _decisions(model: Any, classes: int, features: np.ndarray, rows: np.ndarray) -> np.ndarray:
    values = model.decision_function(features[rows].astype(np.float64))
    if values.ndim == 1:
        values = np.stack([-values, values], axis=1)
    # A class that training did not have is never chosen.
    decisions = np.full((len(values), classes), values.min() - 1.0)
    decisions[:, model.classes_] = values
    return decisions


def _regressions(
    features: np.ndarray, targets: np.ndarray, classes: int, iterations: int, tolerance: float
) -> _Fits:
    """Trains logistic regressions.

    The objective is C · Σ loss + ½ ‖weights‖²; the bias is not penalised. The loss is softmax
    cross-entropy, or the sum of the classes' binary cross-entropies, which are then independent of
    each other. Device memory holds two copies of the features, split over the devices; the host
    makes none.
    """
    mesh = sharding.create_mesh(1, jax.local_devices())

    def placed(values: np.ndarray) -> jax.Array:
        """Puts rows on the devices without a copy of all; pads to whole devices by zeros."""
        padded = -(-len(values) // mesh.size) * mesh.size

        def shard(index: Any) -> np.ndarray:
            part = values[index]
            missing = len(range(padded)[index[0]]) - len(part)
            return np.pad(part, [(0, missing)] + [(0, 0)] * (part.ndim - 1)) if missing else part

        shape = (padded, *values.shape[1:])
        return jax.make_array_from_callback(shape, sharding.rows_sharding(mesh), shard)

    examples = placed(features.astype(np.float32, copy=False))
    answers = placed(targets if targets.ndim == 2 else targets.astype(np.int32))

    def fits(rows: np.ndarray, costs: Sequence[float]) -> list[_Scores]:
        mean, scale = _moments(features, rows)
        weight = np.zeros(len(features), np.float32)
        weight[rows] = 1.0 / len(rows)
        data = examples, mean, scale, answers, placed(weight)

        def fit(cost: float) -> _Scores:
            decay = np.float32(0.5 / (cost * len(rows)))
            solution = _minimise(*data, decay, tolerance, classes=classes, iterations=iterations)
            weights, bias = jax.device_get(solution)
            return lambda features, rows: np.concatenate(
                [
                    ((features[rows[block]] - mean) / scale) @ weights + bias
                    for block in gen_batches(len(rows), _BLOCK)
                ]
            )

        return [fit(cost) for cost in costs]

    return fits


def _moments(features: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and deviation of each channel, float32; 1 for the deviation of a constant.

    Sums go through blocks of rows: at once, all features would be copied as float64.
    """
    scaler = StandardScaler()
    for block in gen_batches(len(rows), _BLOCK):
        scaler.partial_fit(features[rows[block]])
    mean, scale = scaler.mean_, np.sqrt(scaler.var_)
    scale[scale <= 1e-6 * np.abs(mean)] = 1.0  # zero, or nothing but rounding
    return mean.astype(np.float32), scale.astype(np.float32)


@jax.jit(static_argnames=("classes", "iterations"))
def _minimise(
    features: Any,
    mean: Any,
    scale: Any,
    targets: Any,
    weight: Any,
    decay: Any,
    tolerance: float,
    *,
    classes: int,
    iterations: int,
) -> tuple[jax.Array, jax.Array]:
    """Returns weights [channels, classes] and bias [classes] for standardised features."""
    features = (features - mean[None]) / scale[None]

    def loss(parameters: Any) -> jax.Array:
        weights, bias = parameters
        # By default accelerators multiply float32 with reduced precision.
        logits = jnp.matmul(features, weights, precision="highest") + bias[None]
        if targets.ndim == 2:
            losses = optax.sigmoid_binary_cross_entropy(logits, targets).sum(axis=-1)
        else:
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return (losses * weight).sum() + decay * jnp.square(weights).sum()

    solver = optax.lbfgs(memory_size=_MEMORY)
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry: Any) -> Any:
        parameters, state, count, _ = carry
        value, gradient = value_and_grad(parameters, state=state)
        updates, state = solver.update(
            gradient, state, parameters, value=value, grad=gradient, value_fn=loss
        )
        parameters = optax.apply_updates(parameters, updates)
        largest = jnp.stack([jnp.abs(g).max() for g in gradient]).max()
        return parameters, state, count + 1, largest

    def unfinished(carry: Any) -> jax.Array:
        return (carry[2] < iterations) & (carry[3] > tolerance)

    start = jnp.zeros((features.shape[1], classes)), jnp.zeros(classes)
    begin = (start, solver.init(start), jnp.int32(0), jnp.float32(jnp.inf))
    return jax.lax.while_loop(unfinished, step, begin)[0]
