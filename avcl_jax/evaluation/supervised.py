"""Training an encoder of the same shape on labels: upper bounds of probes, and null controls.

The stopping rule looks at the training loss alone: no test item, and no held-out item, takes part.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from avcl_jax.batched import batched_map, render_all
from avcl_jax.data.rendering import RenderSpec
from avcl_jax.data.selection import UsableRecords
from avcl_jax.data.views import BACKWARD, FORWARD
from avcl_jax.errors import UserError
from avcl_jax.evaluation.temporal import TaskScore, score_task
from avcl_jax.evaluation.views import MODALITY_INPUTS, random_views

# A traced input transform, for instance uint8 pixels to standardised floats.
Prepare = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class FitSpec:
    """Training of a classifier, and its end.

    The learning rate stays constant until the training loss has converged: the mean loss of an
    epoch is below `loss_target`, or the mean over the last `window` epochs is not lower than that
    over the `window` epochs before by the share `improvement`, a plateau; at the latest after
    `max_epochs`. Then it falls to zero in a straight line over `decay_epochs`, and training is
    done.

    Attributes:
        batch_size: views in a step.
        learning_rate: learning rate of AdamW while it is constant.
        weight_decay: weight decay of AdamW.
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
        "target", "plateau", "max_epochs", or None to continue.
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
    """A trained classifier.

    Attributes:
        classifier: the module.
        variables: its parameters and batch statistics.
        losses: mean training loss of every epoch.
        stopped: why the full learning rate ended: "target", "plateau" or "max_epochs".
    """

    classifier: Classifier
    variables: Mapping[str, Any]
    losses: list[float]
    stopped: str

    @property
    def encoder_variables(self) -> dict[str, Any]:
        """Parameters of the encoder alone, and its batch statistics where it has any."""
        return {kind: tree["encoder"] for kind, tree in self.variables.items() if "encoder" in tree}

    def predict(self, views: np.ndarray, *, batch_size: int) -> dict[str, np.ndarray]:
        """Returns logits float32 [n, classes] of each label for views [n, ...]."""

        def logits(variables: Any, arrays: Mapping[str, Any]) -> dict[str, jax.Array]:
            return self.classifier.apply(variables, arrays["clips"], train=False)  # type: ignore[return-value] # Flax gives Any or a tuple

        compute = batched_map(
            logits, {"fit": self.variables}, inputs=("clips",), chunk=batch_size, threads=1
        )
        found = compute(lambda position: {"clips": views[position]}, range(len(views)))
        return {name.removeprefix("fit/"): values for name, values in found.items()}


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
        encoder: unbound module; its parameters are newly drawn.
        views: [n, V, ...], V rendered views of each of n items.
        labels: int [n, V] by task.
        classes: number of classes of each task.
        spec: how to train, and when to stop.

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

    def epoch(state: Any, rates: np.ndarray) -> Any:
        order = rng.permutation(items)
        of_steps = []
        for number, rate in enumerate(rates):
            chosen = order[number * spec.batch_size : (number + 1) * spec.batch_size]
            view = rng.integers(num_views, size=len(chosen))
            targets = {name: values[chosen, view] for name, values in labels.items()}
            state, loss = step(state, views[chosen, view], targets, np.float32(rate))
            of_steps.append(loss)
        loss = np.mean(jax.device_get(of_steps))
        if not np.isfinite(loss):
            raise UserError(
                f"the training loss of epoch {len(losses)} is {loss}; lower learning_rate"
            )
        losses.append(float(loss))
        return state

    stopped = None
    while stopped is None:
        state = epoch(state, np.full(steps, spec.learning_rate))
        stopped = converged(losses, spec)
    falling = np.linspace(spec.learning_rate, 0.0, spec.decay_epochs * steps, endpoint=False)
    for rates in falling.reshape(spec.decay_epochs, steps):
        state = epoch(state, rates)
    return Fit(classifier, state[0], losses, stopped)


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
        return jnp.stack(losses).mean(), updated.get("batch_stats", {})

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, views: Any, targets: Any, learning_rate: Any) -> Any:
        variables, optimizer_state = state
        optimizer_state.hyperparams["learning_rate"] = learning_rate
        (loss, batch_stats), gradients = jax.value_and_grad(loss_function, has_aux=True)(
            variables["params"], variables.get("batch_stats", {}), views, targets
        )
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        variables = {"params": params, "batch_stats": batch_stats}
        return (variables, optimizer_state), loss

    return step


@dataclasses.dataclass(frozen=True)
class NullControl:
    """Accuracies of networks on noise, which is the same at every speed and in both directions.

    A network that leaves chance has found a trace of the rendering, and then the accuracies on real
    videos prove nothing.

    Attributes:
        scores: scores by task, `speed_video`, `direction_video`, `speed_audio`, `direction_audio`.
        train_loss: mean training loss of the last epoch, by modality.
        views: test views of each task.
    """

    scores: dict[str, TaskScore]
    train_loss: dict[str, float]
    views: int


def render_null_views(
    source: UsableRecords, spec: RenderSpec, *, views: int, seed: int, threads: int
) -> dict[str, np.ndarray]:
    """Renders views of every record at all speeds and directions, equally often.

    Args:
        source: records of stationary noise.
        spec: the rendering under test: the one that training uses.
        views: views per record.

    Raises:
        UserError: if `views` is not a multiple of the combinations of speed and direction.
    """
    speeds = range(len(spec.views.speeds))
    combinations = 2 * len(speeds)
    if views % combinations:
        raise UserError(
            f"{views} views of each record do not give the {combinations} combinations of speed "
            f"and direction equally often: use a multiple of {combinations}"
        )

    def render(position: int) -> dict[str, np.ndarray]:
        return random_views(
            source,
            position,
            spec,
            speeds=speeds,
            directions=(FORWARD, BACKWARD),
            views=views,
            seed=seed,
        )

    return render_all(render, range(len(source)), threads=threads)


def null_control(
    train: Mapping[str, np.ndarray],
    test: Mapping[str, np.ndarray],
    *,
    encoders: Mapping[str, nn.Module],
    prepare: Mapping[str, Prepare],
    num_speeds: int,
    spec: FitSpec,
    seed: int,
) -> NullControl:
    """Trains one network per modality on speed and direction of noise; tests it on other noise.

    Args:
        train: arrays of `render_null_views`.
        test: the same of other records.
        encoders: small unbound networks by modality, "video" and "audio".
        num_speeds: number of playback speeds.
        spec: how to train.

    Returns:
        Accuracies on the test views.
    """
    scores: dict[str, TaskScore] = {}
    losses: dict[str, float] = {}
    for modality, encoder in encoders.items():
        name = MODALITY_INPUTS[modality]
        present = train[f"has_{modality}"], test[f"has_{modality}"]
        tasks = {"direction": 2, "speed": num_speeds}
        fit = fit_classifier(
            encoder,
            _one_view_items(train[name][present[0]]),
            {t: train[f"{modality}_{t}"][present[0]].reshape(-1, 1) for t in tasks},
            classes=tasks,
            prepare=prepare[modality],
            spec=spec,
            seed=seed,
        )
        logits = fit.predict(
            _one_view_items(test[name][present[1]])[:, 0], batch_size=spec.batch_size
        )
        for task in tasks:
            labels = test[f"{modality}_{task}"][present[1]].reshape(-1)
            mask = np.ones(len(labels), dtype=bool)
            scores[f"{task}_{modality}"] = score_task(logits[task], labels, mask, seed=seed)
        losses[modality] = fit.losses[-1]
    views = min(int(score.confusion.sum()) for score in scores.values())
    return NullControl(scores, losses, views)


def _one_view_items(views: np.ndarray) -> np.ndarray:
    """Returns [records, views, …] as items of one view each, so that an epoch shows them all."""
    return views.reshape(-1, 1, *views.shape[2:])
