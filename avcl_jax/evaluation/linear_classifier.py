"""Logistic regression of any number of items: full-batch L-BFGS, items sharded over devices.

The objective is scikit-learn's, which is convex, so that what is found does not depend on how: a
test compares the two. At 180,000 clips of 512 features and 309 classes an iteration is 0.2 TFLOP;
scikit-learn takes minutes a cost on a laptop, an accelerator seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from avcl_jax.training import sharding

_MEMORY = 10  # pairs of steps and gradients that L-BFGS keeps


@dataclass(frozen=True)
class LinearClassifier:
    """Standardisation and weights.

    Attributes:
        mean: float32 [C], subtracted from features.
        scale: float32 [C], features are divided by it.
        weights: float32 [C, classes].
        bias: float32 [classes].
    """

    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    bias: np.ndarray

    def scores(self, features: np.ndarray) -> np.ndarray:
        """Returns float32 [n, classes], logits."""
        return ((features - self.mean) / self.scale) @ self.weights + self.bias


def fit_linear(
    features: np.ndarray,
    targets: np.ndarray,
    *,
    classes: int,
    cost: float,
    iterations: int,
    tolerance: float,
) -> LinearClassifier:
    """Standardises features and minimises cost · Σ loss + ½ ‖weights‖²; the bias is not penalised.

    Args:
        features: float32 [n, C]; all of them are held in device memory, split over the devices.
        targets: int [n] in [0, classes) for softmax cross-entropy, or bool [n, classes] for the sum
            of the classes' binary cross-entropies, which are then independent of each other.
        classes: their number.
        cost: inverse regularisation strength, as scikit-learn's C.
        iterations: at most.
        tolerance: it is done when no entry of the gradient of the mean loss is larger.

    Raises:
        ValueError: if shapes do not match.
    """
    count = len(features)
    if features.ndim != 2 or len(targets) != count or not count:
        raise ValueError(f"features {features.shape} and targets {targets.shape} do not match")
    mean = features.mean(axis=0, dtype=np.float64)
    scale = features.std(axis=0, dtype=np.float64)
    scale[scale == 0] = 1.0
    standardised = ((features - mean) / scale).astype(np.float32)
    mesh = sharding.create_mesh(1, jax.local_devices())
    padding = -count % mesh.size
    rows = sharding.rows_sharding(mesh)

    def placed(values: np.ndarray) -> jax.Array:
        filled = np.concatenate([values, np.repeat(values[:1], padding, axis=0)])
        return jax.device_put(filled, rows)

    several = targets.ndim == 2
    weight = np.concatenate([np.full(count, 1.0 / count), np.zeros(padding)]).astype(np.float32)
    data = (
        placed(standardised),
        placed(targets.astype(np.float32 if several else np.int32)),
        jax.device_put(weight, rows),
    )
    start = {
        "weights": jnp.zeros((features.shape[1], classes), jnp.float32),
        "bias": jnp.zeros(classes, jnp.float32),
    }
    found = _minimise(
        jax.device_put(start, sharding.replicated(mesh)),
        data,
        np.float32(0.5 / (cost * count)),
        np.float32(tolerance),
        iterations=iterations,
        several=several,
    )
    return LinearClassifier(
        mean.astype(np.float32),
        scale.astype(np.float32),
        np.asarray(found["weights"]),
        np.asarray(found["bias"]),
    )


def _loss(parameters: Any, data: Any, decay: jax.Array, *, several: bool) -> jax.Array:
    features, targets, weight = data
    logits = features @ parameters["weights"] + parameters["bias"][None]
    if several:
        losses = optax.sigmoid_binary_cross_entropy(logits, targets).sum(axis=-1)
    else:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return (losses * weight).sum() + decay * jnp.square(parameters["weights"]).sum()


@jax.jit(static_argnames=("iterations", "several"))
def _minimise(
    start: Any, data: Any, decay: jax.Array, tolerance: jax.Array, *, iterations: int, several: bool
) -> Any:
    solver = optax.lbfgs(memory_size=_MEMORY)

    def loss(parameters: Any) -> jax.Array:
        return _loss(parameters, data, decay, several=several)

    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry: Any) -> Any:
        parameters, state, count, _ = carry
        value, gradient = value_and_grad(parameters, state=state)
        updates, state = solver.update(
            gradient, state, parameters, value=value, grad=gradient, value_fn=loss
        )
        parameters = optax.apply_updates(parameters, updates)
        largest = jnp.stack([jnp.abs(g).max() for g in jax.tree.leaves(gradient)]).max()
        return parameters, state, count + 1, largest

    def unfinished(carry: Any) -> jax.Array:
        return (carry[2] < iterations) & (carry[3] > tolerance)

    begin = (start, solver.init(start), jnp.int32(0), jnp.float32(jnp.inf))
    return jax.lax.while_loop(unfinished, step, begin)[0]
