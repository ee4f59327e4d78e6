"""Training an encoder of the same shape on labels: the upper bound, and the null controls' network.

The stopping rule looks at the training loss alone: no test item, and no held-out item, takes part.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from avcl_jax.errors import UserError

# A traced input transform, for instance uint8 pixels to standardised floats.
Prepare = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class FitSpec:
    """How a classifier is trained, and when it is done.

    The learning rate stays constant until the training loss has converged: the mean loss of an
    epoch is below `loss_target`, or the mean over the last `window` epochs is not lower than that
    over the `window` epochs before by the share `improvement`, a plateau; at the latest after
    `max_epochs`. Then it falls to zero in a straight line over `decay_epochs`, and training is
    done.

    Attributes:
        batch_size: views in a step.
        learning_rate: of AdamW while it is constant.
        weight_decay: of AdamW.
        loss_target: training loss that counts as converged at the full learning rate.
        window: epochs whose mean is compared.
        improvement: relative fall of that mean below which the loss is on a plateau.
        max_epochs: bound on the epochs of the full learning rate.
        decay_epochs: epochs in which the learning rate falls.
    """

    batch_size: int
    learning_rate: float
    weight_decay: float
    loss_target: float
    window: int
    improvement: float
    max_epochs: int
    decay_epochs: int


def converged(losses: Sequence[float], spec: FitSpec) -> str | None:
    """Decides from training losses alone whether the full learning rate has done its work.

    Args:
        losses: mean training loss of every epoch so far.
        spec: the rule.

    Returns:
        "target", "plateau", "max_epochs", or None to go on.
    """
    if losses[-1] < spec.loss_target:
        return "target"
    if len(losses) >= 2 * spec.window:
        last = np.mean(losses[-spec.window :])
        before = np.mean(losses[-2 * spec.window : -spec.window])
        if last > (1.0 - spec.improvement) * before:
            return "plateau"
    return "max_epochs" if len(losses) >= spec.max_epochs else None


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
        stopped: why the full learning rate ended: "target", "plateau" or "max_epochs".
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
        """Parameters of the encoder alone, and its batch statistics where it has any."""
        return {kind: tree["encoder"] for kind, tree in self.variables.items() if "encoder" in tree}

    def predict(self, views: np.ndarray, *, batch_size: int) -> dict[str, np.ndarray]:
        """Returns logits float32 [n, classes] of each label for views [n, ...]."""
        apply = jax.jit(functools.partial(self.classifier.apply, train=False))
        collected: list[dict[str, np.ndarray]] = []
        for start in range(0, len(views), batch_size):
            batch = views[start : start + batch_size]
            missing = batch_size - len(batch)
            padded = np.concatenate([batch, np.repeat(batch[-1:], missing, axis=0)])
            logits = jax.device_get(apply(self.variables, padded))
            collected.append({name: value[: len(batch)] for name, value in logits.items()})
        return {name: np.concatenate([c[name] for c in collected]) for name in collected[0]}


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
        UserError: if there are fewer items than a batch, shapes differ, or the loss is not finite.
    """
    items, num_views = views.shape[:2]
    if items < spec.batch_size:
        raise UserError(f"{items} items do not fill one batch of {spec.batch_size}")
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
    steps = items // spec.batch_size
    losses: list[float] = []

    def epoch(state: Any, rates: np.ndarray) -> tuple[Any, float]:
        order = rng.permutation(items)
        metrics = []
        for number, rate in enumerate(rates):
            chosen = order[number * spec.batch_size : (number + 1) * spec.batch_size]
            view = rng.integers(num_views, size=len(chosen))
            targets = {name: values[chosen, view] for name, values in labels.items()}
            state, result = step(state, views[chosen, view], targets, np.float32(rate))
            metrics.append(result)
        loss, accuracy = np.mean(jax.device_get(metrics), axis=0)
        if not np.isfinite(loss):
            raise UserError(
                f"the training loss of epoch {len(losses)} is {loss}; lower learning_rate"
            )
        losses.append(float(loss))
        return state, float(accuracy)

    stopped = None
    while stopped is None:
        state, accuracy = epoch(state, np.full(steps, spec.learning_rate))
        stopped = converged(losses, spec)
    falling = np.linspace(spec.learning_rate, 0.0, spec.decay_epochs * steps, endpoint=False)
    for rates in falling.reshape(spec.decay_epochs, steps):
        state, accuracy = epoch(state, rates)
    seconds = time.monotonic() - began
    logging.info(
        "%s: %d epochs in %.0f s, training loss %.3f, accuracy %.3f",
        *(stopped, len(losses), seconds, losses[-1], accuracy),
    )
    return Fit(classifier, state[0], losses, accuracy, stopped, seconds)


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
        return jnp.stack(losses).mean(), (jnp.stack(hits).mean(), updated.get("batch_stats", {}))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, views: Any, targets: Any, learning_rate: Any) -> Any:
        variables, optimizer_state = state
        optimizer_state.hyperparams["learning_rate"] = learning_rate
        (loss, (accuracy, batch_stats)), gradients = jax.value_and_grad(
            loss_function, has_aux=True
        )(variables["params"], variables.get("batch_stats", {}), views, targets)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        variables = {"params": params, "batch_stats": batch_stats}
        return (variables, optimizer_state), jnp.stack([loss, accuracy])

    return step
