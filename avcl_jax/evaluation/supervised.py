"""Training an encoder of the same shape on labels: the upper bound, and the null controls' network.

The stopping rule looks at the training loss alone: no test item, and no held-out item, takes part.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

# A traced input transform, for instance uint8 pixels to standardised floats.
Prepare = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class FitSpec:
    """How a classifier is trained, and when it is done.

    Training is done at the end of an epoch whose mean training loss is below `loss_target`, or when
    the learning rate has been divided `decays` times and the loss is on a plateau again; a plateau
    is `patience` epochs in a row without an epoch's loss below (1 − `improvement`) × the lowest.

    Attributes:
        batch_size: views in a step.
        learning_rate: of AdamW at the beginning.
        weight_decay: of AdamW.
        loss_target: training loss that counts as converged.
        improvement: relative fall of the loss that ends a plateau.
        patience: epochs without such a fall that make a plateau.
        decays: how often the learning rate is divided by `decay_factor` before stopping.
        decay_factor: divisor of the learning rate on a plateau.
        max_epochs: bound on the time; the result says when it was met.
    """

    batch_size: int
    learning_rate: float
    weight_decay: float
    loss_target: float
    improvement: float
    patience: int
    decays: int
    decay_factor: float
    max_epochs: int


class Plateau:
    """Decides after each epoch, from training losses alone, whether to go on.

    A small state machine apart from the loop, so that the stated rule can be tested by itself.
    """

    def __init__(self, spec: FitSpec):
        """Begins with the full learning rate."""
        self._spec = spec
        self._lowest = np.inf
        self._stale = 0
        self.decays = 0

    def after(self, loss: float) -> Literal["continue", "decay", "converged", "plateau"]:
        """Takes the mean training loss of an epoch and says what to do next."""
        if loss < self._spec.loss_target:
            return "converged"
        if loss < (1.0 - self._spec.improvement) * self._lowest:
            self._lowest, self._stale = loss, 0
            return "continue"
        self._stale += 1
        if self._stale < self._spec.patience:
            return "continue"
        if self.decays == self._spec.decays:
            return "plateau"
        self.decays += 1
        self._stale = 0
        return "decay"


class Classifier(nn.Module):
    """An encoder with one linear head for each label.

    Attributes:
        encoder: module returning a dict with `features`.
        classes: number of classes of each label, as sorted pairs (name, number).
        prepare: input transform.
    """

    encoder: nn.Module
    classes: tuple[tuple[str, int], ...]
    prepare: Prepare

    @nn.compact
    def __call__(self, views: Any, *, train: bool) -> dict[str, jax.Array]:
        """Returns float32 logits [batch, classes] of each label."""
        features = self.encoder(self.prepare(views), train=train)["features"]
        return {
            name: nn.Dense(number, name=f"{name}_head")(features) for name, number in self.classes
        }


@dataclasses.dataclass(frozen=True)
class Fit:
    """A trained classifier and how it came about.

    Attributes:
        classifier: the module.
        variables: its parameters and batch statistics.
        losses: mean training loss of every epoch.
        accuracy: accuracy on the training views of the last epoch, mean over labels.
        stopped: "converged", "plateau" or "max_epochs".
        seconds: time taken.
    """

    classifier: Classifier
    variables: Mapping[str, Any]
    losses: list[float]
    accuracy: float
    stopped: str
    seconds: float

    @property
    def encoder_variables(self) -> dict[str, Any]:
        """Parameters and batch statistics of the encoder alone."""
        return {kind: tree["encoder"] for kind, tree in self.variables.items()}

    def predict(self, views: np.ndarray, *, batch_size: int) -> dict[str, np.ndarray]:
        """Returns logits float32 [n, classes] of each label for views [n, ...]."""
        apply = _predict_function(self.classifier)
        collected: list[dict[str, np.ndarray]] = []
        for start in range(0, len(views), batch_size):
            batch = views[start : start + batch_size]
            missing = batch_size - len(batch)
            padded = np.concatenate([batch, np.repeat(batch[-1:], missing, axis=0)])
            logits = jax.device_get(apply(self.variables, padded))
            collected.append({name: value[: len(batch)] for name, value in logits.items()})
        return {name: np.concatenate([c[name] for c in collected]) for name in collected[0]}


@functools.lru_cache(maxsize=8)
def _predict_function(classifier: Classifier) -> Callable[..., dict[str, jax.Array]]:
    return jax.jit(functools.partial(classifier.apply, train=False))


def fit_classifier(
    encoder: nn.Module,
    views: np.ndarray,
    labels: Mapping[str, np.ndarray],
    *,
    classes: Mapping[str, int],
    prepare: Prepare,
    spec: FitSpec,
    seed: int,
) -> Fit:
    """Trains an encoder from scratch, with a linear head for each label, until it has converged.

    An epoch shows one randomly chosen view of every item.

    Args:
        encoder: unbound module; its parameters are drawn anew.
        views: [n, V, ...], V rendered views of each of n items.
        labels: of each task int [n, V].
        classes: number of classes of each task.
        prepare: input transform.
        spec: how to train, and when to stop.
        seed: of parameters and order.

    Returns:
        The trained classifier.

    Raises:
        ValueError: if there are fewer items than a batch, shapes differ, or the loss is not finite.
    """
    items, num_views = views.shape[:2]
    if items < spec.batch_size:
        raise ValueError(f"{items} items do not fill one batch of {spec.batch_size}")
    for name, values in labels.items():
        if values.shape != (items, num_views):
            raise ValueError(f"labels {name} {values.shape} do not match views {views.shape[:2]}")
    began = time.monotonic()
    classifier = Classifier(encoder.clone(), tuple(sorted(classes.items())), prepare)
    rng = np.random.default_rng(seed)
    initialise = jax.jit(functools.partial(classifier.init, train=False))
    variables = initialise(jax.random.key(seed), views[: spec.batch_size, 0])
    optimizer = optax.inject_hyperparams(optax.adamw)(
        learning_rate=spec.learning_rate, weight_decay=spec.weight_decay
    )
    state = (variables, optimizer.init(variables["params"]))
    step = _train_step(classifier, optimizer)
    plateau, losses, accuracies, decision = Plateau(spec), [], [], "max_epochs"
    for epoch in range(spec.max_epochs):
        order = rng.permutation(items)
        metrics = []
        for start in range(0, items - spec.batch_size + 1, spec.batch_size):
            chosen = order[start : start + spec.batch_size]
            view = rng.integers(num_views, size=len(chosen))
            targets = {name: values[chosen, view] for name, values in labels.items()}
            state, result = step(state, views[chosen, view], targets)
            metrics.append(result)
        loss, accuracy = np.mean(jax.device_get(metrics), axis=0)
        if not np.isfinite(loss):
            raise ValueError(f"the training loss of epoch {epoch} is {loss}; lower learning_rate")
        losses.append(float(loss))
        accuracies.append(float(accuracy))
        decision = plateau.after(losses[-1])
        if decision in ("converged", "plateau"):
            break
        if decision == "decay":
            state[1].hyperparams["learning_rate"] /= spec.decay_factor
    stopped = decision if decision in ("converged", "plateau") else "max_epochs"
    seconds = time.monotonic() - began
    logging.info(
        "%s after %d epochs and %.0f s: training loss %.3f, accuracy %.3f",
        *(stopped, len(losses), seconds, losses[-1], accuracies[-1]),
    )
    return Fit(classifier, state[0], losses, accuracies[-1], stopped, seconds)


def _train_step(classifier: Classifier, optimizer: Any) -> Callable[..., Any]:
    def loss_function(params: Any, batch_stats: Any, views: Any, targets: Any) -> Any:
        logits, updated = classifier.apply(
            {"params": params, "batch_stats": batch_stats},
            views,
            train=True,
            mutable=["batch_stats"],
        )
        losses = [
            optax.softmax_cross_entropy_with_integer_labels(logits[name], targets[name]).mean()
            for name in logits
        ]
        hits = [(logits[name].argmax(axis=-1) == targets[name]).mean() for name in logits]
        return jnp.stack(losses).mean(), (jnp.stack(hits).mean(), updated["batch_stats"])

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, views: Any, targets: Any) -> Any:
        variables, optimizer_state = state
        (loss, (accuracy, batch_stats)), gradients = jax.value_and_grad(
            loss_function, has_aux=True
        )(variables["params"], variables["batch_stats"], views, targets)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        variables = {"params": params, "batch_stats": batch_stats}
        return (variables, optimizer_state), jnp.stack([loss, accuracy])

    return step
