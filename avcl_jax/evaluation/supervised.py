"""Training an encoder of the same shape on labels: upper bounds of probes, and null controls.

The budget is fixed: no test item, no held-out item and no loss decides when training ends.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
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
from avcl_jax.objectives.temporal import TASKS

# A traced input transform, for instance uint8 pixels to standardised floats.
Prepare = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class FitSpec:
    """Training of a classifier.

    The learning rate of AdamW is constant, and falls to zero in a straight line over the last
    `decay_epochs` of the `epochs`. Whether that was enough shows in the training loss, which is
    reported with the results.
    """

    batch_size: int
    learning_rate: float
    weight_decay: float
    epochs: int
    decay_epochs: int

    def rates(self, steps: int) -> np.ndarray:
        """Returns the learning rate of every step, for a number of steps per epoch."""
        constant = np.full((self.epochs - self.decay_epochs) * steps, self.learning_rate)
        falling = np.linspace(self.learning_rate, 0.0, self.decay_epochs * steps, endpoint=False)
        return np.concatenate([constant, falling]).astype(np.float32)


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
    """

    classifier: Classifier
    variables: Mapping[str, Any]
    losses: list[float]

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
        outputs = compute(lambda position: {"clips": views[position]}, range(len(views)))
        return {name.removeprefix("fit/"): values for name, values in outputs.items()}


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
    """Trains an encoder from scratch, with a linear head for each label.

    An epoch shows one randomly chosen view of every item.

    Args:
        encoder: unbound module; its parameters are newly drawn.
        views: [n, V, ...], V rendered views of each of n items.
        labels: int [n, V] by task.
        classes: number of classes of each task.

    Raises:
        UserError: if there are fewer items than a batch, or the loss is not finite.
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
    steps = items // spec.batch_size
    rates = spec.rates(steps)
    optimizer = optax.inject_hyperparams(optax.adamw)(
        learning_rate=lambda step: jnp.asarray(rates)[step], weight_decay=spec.weight_decay
    )
    state = (variables, optimizer.init(variables["params"]))
    step = _train_step(classifier, optimizer)
    losses: list[float] = []
    for epoch in range(spec.epochs):
        order = rng.permutation(items)
        of_steps = []
        for number in range(steps):
            batch = order[number * spec.batch_size : (number + 1) * spec.batch_size]
            view = rng.integers(num_views, size=len(batch))
            targets = {name: values[batch, view] for name, values in labels.items()}
            state, loss = step(state, views[batch, view], targets)
            of_steps.append(loss)
        losses.append(float(np.mean(jax.device_get(of_steps))))
        if not np.isfinite(losses[-1]):
            raise UserError(
                f"the training loss of epoch {epoch} is {losses[-1]}; lower learning_rate"
            )
    return Fit(classifier, state[0], losses)


def _train_step(classifier: Classifier, optimizer: Any) -> Callable[..., Any]:
    def loss_function(params: Any, batch_stats: Any, views: Any, targets: Any) -> Any:
        variables = {"params": params, "batch_stats": batch_stats}
        logits, updated = classifier.apply(variables, views, train=True, mutable=["batch_stats"])
        losses = [
            optax.softmax_cross_entropy_with_integer_labels(logits[name], targets[name]).mean()
            for name in logits
        ]
        return jnp.stack(losses).mean(), updated.get("batch_stats", {})

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, views: Any, targets: Any) -> Any:
        variables, optimizer_state = state
        params = variables["params"]
        (loss, batch_stats), gradients = jax.value_and_grad(loss_function, has_aux=True)(
            params, variables.get("batch_stats", {}), views, targets
        )
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        params = optax.apply_updates(params, updates)
        return ({"params": params, "batch_stats": batch_stats}, optimizer_state), loss

    return step


@dataclasses.dataclass(frozen=True)
class NullControl:
    """Scores of networks on noise, which is the same at every speed and in both directions.

    A network that leaves chance has found a trace of the rendering, and then the accuracies on real
    videos prove nothing.

    Attributes:
        scores: scores of the tasks of one view, by name: `speed_video`, `direction_audio`, ….
        train_loss: mean training loss of the last epoch, by modality.
        views: test views of each task.
    """

    scores: dict[str, TaskScore]
    train_loss: dict[str, float]
    views: int


def render_null_views(
    source: UsableRecords, spec: RenderSpec, *, views: int, seed: int, threads: int
) -> dict[str, np.ndarray]:
    """Renders `views` views of each record of noise, all speeds and directions equally often.

    Raises:
        UserError: if `views` is not a multiple of the combinations of speed and direction.
    """
    speeds = range(len(spec.views.speeds))
    if views % (2 * len(speeds)):
        raise UserError(
            f"{views} views of each record do not give the {2 * len(speeds)} combinations of speed "
            f"and direction equally often: use a multiple of {2 * len(speeds)}"
        )
    render = functools.partial(
        random_views,
        source,
        spec=spec,
        speeds=speeds,
        directions=(FORWARD, BACKWARD),
        views=views,
        seed=seed,
    )
    return render_all(render, range(len(source)), threads=threads)


def null_control(
    train: Mapping[str, Any],
    test: Mapping[str, Any],
    *,
    encoders: Mapping[str, nn.Module],
    prepare: Mapping[str, Prepare],
    num_speeds: int,
    spec: FitSpec,
    seed: int,
) -> NullControl:
    """Trains one network per modality on the tasks of one view of noise; tests it on other noise.

    Args:
        train: arrays of `render_null_views`.
        test: arrays of other records.
        encoders: small unbound networks by modality.
    """
    scores: dict[str, TaskScore] = {}
    losses: dict[str, float] = {}
    for modality, encoder in encoders.items():
        tasks = {task.kind: task for task in TASKS.values() if task.reads == (modality,)}

        def items(arrays: Mapping[str, np.ndarray], values: Any, modality: str = modality) -> Any:
            """Views of all records as items of one view each, so that an epoch shows them all."""
            views = np.asarray(values)[arrays[f"has_{modality}"]]
            return views.reshape(-1, 1, *views.shape[2:])

        fit = fit_classifier(
            encoder,
            items(train, train[MODALITY_INPUTS[modality]]),
            {kind: items(train, task.labels(train)) for kind, task in tasks.items()},
            classes={k: len(task.classes(range(num_speeds))) for k, task in tasks.items()},
            prepare=prepare[modality],
            spec=spec,
            seed=seed,
        )
        views = items(test, test[MODALITY_INPUTS[modality]])[:, 0]
        logits = fit.predict(views, batch_size=spec.batch_size)
        for kind, task in tasks.items():
            labels = items(test, task.labels(test))[:, 0]
            mask = np.ones(len(labels), dtype=bool)
            scores[task.name] = score_task(logits[kind], labels, mask, seed=seed)
        losses[modality] = fit.losses[-1]
    scored = min(int(score.confusion.sum()) for score in scores.values())
    return NullControl(scores, losses, scored)
