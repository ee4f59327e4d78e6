"""Training an encoder of the same shape on labels: upper bounds of probes, and null controls.

The budget is fixed: no test item, no held-out item and no loss decides when training ends.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

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
from avcl_jax.evaluation.classifier import ClipClassifier
from avcl_jax.evaluation.temporal import TaskScore, score_task
from avcl_jax.evaluation.views import MODALITY_INPUTS, random_views
from avcl_jax.objectives.temporal import TASKS

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


@dataclasses.dataclass(frozen=True)
class Fit:
    """A trained classifier.

    Attributes:
        variables: parameters and batch statistics of `classifier`.
        losses: mean training loss of every epoch.
    """

    classifier: ClipClassifier
    prepare: Prepare
    variables: Mapping[str, Any]
    losses: list[float]

    @property
    def encoder_variables(self) -> dict[str, Any]:
        """Parameters of the encoder alone, and its batch statistics where it has any."""
        return {kind: tree["encoder"] for kind, tree in self.variables.items() if "encoder" in tree}

    def predict(self, views: np.ndarray, *, batch_size: int) -> dict[str, np.ndarray]:
        """Returns logits float32 [n, classes] of each label for views [n, ...]."""

        def logits(variables: Any, arrays: Mapping[str, Any]) -> dict[str, jax.Array]:
            return self.classifier.apply(variables, self.prepare(arrays["clips"]), train=False)  # type: ignore[return-value] # Flax gives Any or a tuple

        compute = batched_map(
            logits, {"fit": self.variables}, inputs=("clips",), chunk=batch_size, threads=1
        )
        outputs = compute(lambda position: {"clips": views[position]}, range(len(views)))
        return {
            name.removeprefix("fit/").removesuffix("_head"): values
            for name, values in outputs.items()
        }


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
        prepare: traced input transform, for instance uint8 pixels to standardised floats.

    Raises:
        UserError: if there are fewer items than a batch, or the loss is not finite.
    """
    items, num_views = views.shape[:2]
    if items < spec.batch_size:
        raise UserError(f"{items} items do not fill one batch of {spec.batch_size}")
    for name, values in labels.items():
        if values.shape != (items, num_views):
            raise ValueError(f"labels {name} {values.shape} do not match views {views.shape[:2]}")
    heads = {f"{name}_head": number for name, number in sorted(classes.items())}
    classifier = ClipClassifier(encoder.clone(), heads)
    steps = items // spec.batch_size
    rates = spec.rates(steps)
    optimizer = optax.inject_hyperparams(optax.adamw)(
        learning_rate=lambda step: jnp.asarray(rates)[step], weight_decay=spec.weight_decay
    )

    @jax.jit
    def begin(views: Any) -> Any:
        return classifier.init(jax.random.key(seed), prepare(views), train=False)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, views: Any, targets: Any) -> Any:
        variables, optimizer_state = state
        params, statistics = variables["params"], variables.get("batch_stats", {})

        def objective(params: Any) -> Any:
            variables = {"params": params, "batch_stats": statistics}
            logits, updated = classifier.apply(
                variables, prepare(views), train=True, mutable=["batch_stats"]
            )
            losses = [
                optax.softmax_cross_entropy_with_integer_labels(logits[f"{name}_head"], own).mean()
                for name, own in targets.items()
            ]
            return jnp.stack(losses).mean(), updated.get("batch_stats", {})

        (loss, statistics), gradients = jax.value_and_grad(objective, has_aux=True)(params)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        params = optax.apply_updates(params, updates)
        return ({"params": params, "batch_stats": statistics}, optimizer_state), loss

    variables = begin(views[: spec.batch_size, 0])
    state = (variables, optimizer.init(variables["params"]))
    rng, losses = np.random.default_rng(seed), []
    for epoch in range(spec.epochs):
        order, of_steps = rng.permutation(items), []
        for batch in order[: steps * spec.batch_size].reshape(steps, -1):
            view = rng.integers(num_views, size=len(batch))
            targets = {name: values[batch, view] for name, values in labels.items()}
            state, loss = step(state, views[batch, view], targets)
            of_steps.append(loss)
        losses.append(float(np.mean(jax.device_get(of_steps))))
        if not np.isfinite(losses[-1]):
            raise UserError(
                f"the training loss of epoch {epoch} is {losses[-1]}; lower learning_rate"
            )
    return Fit(classifier, prepare, state[0], losses)


class NullControl(NamedTuple):
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
    """Renders each record of noise `views` times at every speed in either direction."""
    speeds = range(len(spec.views.speeds))
    render = functools.partial(
        random_views,
        source,
        spec=spec,
        speeds=speeds,
        directions=(FORWARD, BACKWARD),
        views=2 * len(speeds) * views,
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
