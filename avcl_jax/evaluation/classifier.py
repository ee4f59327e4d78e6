"""Classifiers on an encoder: fine-tuned, or trained from scratch on rendered views in memory.

In fine-tuning, names of parameters decide which are trained; the others take no part in the
gradient and do not change by a bit. Training from scratch gives upper bounds of probes, and null
controls. Its budget is fixed: no test item, no held-out item and no loss decides when it ends.
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
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array

from avcl_jax.batched import batched_map, cache_key, in_parts
from avcl_jax.data import augment
from avcl_jax.data.clips import AudioClipSpec, ClipRecords, ClipSpec
from avcl_jax.errors import UserError
from avcl_jax.export import Encoder
from avcl_jax.training.averages import Metrics, average
from avcl_jax.training.inputs import log_mel_of_rows
from avcl_jax.training.sharding import replicated, rows_sharding
from avcl_jax.training.state import TrainState, in_shardings

# Names of the parts of the parameters; the head is the linear layer.
ENCODER, HEAD, FROZEN = "encoder", "head", "frozen"


class ClipClassifier(nn.Module):
    """An encoder, dropout of its features, and a linear layer for each label.

    Attributes:
        encoder: module returning a dict with `features`.
        heads: number of classes by name of the layer.
        train_statistics: the encoder's batch normalisation uses and updates the statistics of the
            batch in training; otherwise it stays in evaluation mode.
    """

    encoder: nn.Module
    heads: Mapping[str, int]
    dropout: float = 0.0
    train_statistics: bool = True

    @nn.compact
    def __call__(self, inputs: Array, *, train: bool) -> dict[str, Array]:
        """Returns float32 logits [batch, classes] of each head."""
        outputs: Any = self.encoder(inputs, train=train and self.train_statistics)
        features = outputs["features"].astype(jnp.float32)
        features = nn.Dropout(self.dropout, deterministic=not train)(features)
        return {
            name: nn.Dense(classes, name=name)(features) for name, classes in self.heads.items()
        }


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Maps clips as they are rendered to inputs of the encoder, on the device.

    Attributes:
        preprocess: preprocessing of the encoder, which standardises pixels.
        augmentation: settings for video and for spectrograms, in training.
        mesh: devices over which clips are split; None for one.
    """

    spec: ClipSpec
    preprocess: Any
    augmentation: tuple[augment.PhotometricSpec, augment.SpectralSpec]
    mesh: Mesh | None = None

    def __call__(self, clips: Array, key: Array | None) -> Array:
        """Returns float32 pixels [batch, time, size, size, 3] or log-mel [batch, frames, mels] of
        uint8 frames or int16 windows, augmented if there is a key.
        """
        of_video, of_audio = self.augmentation
        # The augmentation draws for each view; a clip is a video's only one.
        if isinstance(self.spec, AudioClipSpec):
            spectrogram = log_mel_of_rows(clips, self.spec.log_mel, self.mesh)
            if key is None:
                return spectrogram
            return augment.spectral(key, spectrogram[:, None], of_audio)[:, 0]
        pixels = augment.to_unit_range(clips)
        if key is not None:
            pixels = augment.photometric(key, pixels[:, None], of_video)[:, 0]
        return augment.standardize(pixels, self.preprocess.mean, self.preprocess.std)


def parts(params: Mapping[str, Any], freeze: Sequence[str]) -> Any:
    """Returns the part of each parameter of a classifier: a tree like `params` of names.

    Paths that begin with an entry of `freeze`, such as "encoder/stem", are frozen.

    Raises:
        UserError: if a name freezes nothing, the head, or all of the encoder.
    """
    paths = jax.tree.map_with_path(lambda path, _: "/".join(key.key for key in path), dict(params))
    names = jax.tree.leaves(paths)
    for name in freeze:
        frozen = [path for path in names if path.startswith(name)]
        if not frozen or any(not path.startswith("encoder/") for path in frozen):
            layers = {"/".join(p.split("/")[:2]) for p in names if p.startswith("encoder/")}
            raise UserError(
                f"freeze {name!r} must name layers of the encoder, some of "
                f"{', '.join(sorted(layers))}"
            )

    def part(path: str) -> str:
        return FROZEN if path.startswith(tuple(freeze)) else path.split("/")[0]

    if ENCODER not in map(part, names):
        raise UserError(
            f"freeze {tuple(freeze)} leaves no layer of the encoder to train: use "
            "configs/linear_probe.py, which probes a frozen encoder"
        )
    return jax.tree.map(part, paths)


def classifier_training(
    classifier: ClipClassifier,
    optimizer: optax.GradientTransformation,
    encoder: Encoder,
    inputs: Inputs,
    *,
    freeze: Sequence[str],
    schedule: optax.Schedule,
    label_smoothing: float,
    key: Array,
    mesh: Mesh,
) -> tuple[TrainState, Callable[[TrainState, Any], tuple[TrainState, Metrics]]]:
    """Returns the state of a training and its jitted step, which donates the state.

    The head is drawn, the encoder's weights are taken as they are. The loss is cross-entropy with a
    fraction `label_smoothing` spread over all classes; the step number is folded into the key.

    Raises:
        UserError: if the encoder does not take such clips, or layers cannot be frozen.
    """
    if freeze and classifier.train_statistics:
        raise UserError(
            f"freeze {tuple(freeze)} leaves the running statistics of frozen layers moving: set "
            "batch_norm='frozen'"
        )
    # Of the clips that the encoder was trained on, which learned positions have their shape from.
    example = jnp.zeros((1, *encoder.input_shape), jnp.float32)
    shapes = jax.eval_shape(functools.partial(classifier.init, train=False), key, example)
    clip = jax.ShapeDtypeStruct((1, *inputs.spec.shape), jnp.dtype(inputs.spec.dtype))
    clip = jax.eval_shape(functools.partial(inputs, key=None), clip)
    jax.eval_shape(functools.partial(classifier.apply, train=False), shapes, clip)
    head_key, step_key = jax.random.split(key)

    def init(weights: Any) -> TrainState:
        variables = {
            kind: {**tree, **({ENCODER: weights[kind]} if kind in weights else {})}
            for kind, tree in classifier.init(head_key, example, train=False).items()
        }
        params, statistics = variables["params"], variables.get("batch_stats", {})
        return TrainState(jnp.zeros((), jnp.int32), params, statistics, optimizer.init(params))

    split_inputs = dataclasses.replace(inputs, mesh=mesh)
    step = functools.partial(_train_step, classifier, optimizer, split_inputs, schedule, step_key)
    state, shardings = in_shardings(init, dict(encoder.params), mesh=mesh)
    return state, jax.jit(
        lambda state, batch: step(
            state,
            batch["clips"],
            {HEAD: batch["label"]},
            label_smoothing=label_smoothing,
            freeze=freeze,
        ),
        donate_argnums=0,
        in_shardings=(shardings, rows_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
    )


def _train_step(
    classifier: ClipClassifier,
    optimizer: optax.GradientTransformation,
    inputs: Callable[[Array, Array], Array],
    schedule: optax.Schedule,
    key: Array,
    state: TrainState,
    clips: Any,
    targets: Mapping[str, Any],
    *,
    label_smoothing: float = 0.0,
    freeze: Sequence[str] = (),
) -> tuple[TrainState, Metrics]:
    """Takes one step by the mean loss over heads; `targets` are classes, int [batch] by head."""
    keys = jax.random.split(jax.random.fold_in(key, state.step))
    prepared, part = inputs(clips, keys[0]), parts(state.params, freeze)

    def objective(params: Any) -> tuple[Array, Any]:
        # So that no gradient of frozen layers is computed.
        params = jax.tree.map(
            lambda leaf, name: jax.lax.stop_gradient(leaf) if name == FROZEN else leaf, params, part
        )
        outputs, changed = classifier.apply(
            {"params": params, "batch_stats": state.batch_stats},
            prepared,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": keys[1]},
        )
        losses, hits = [], []
        for head, labels in targets.items():
            logits = outputs[head]
            one_hot = jax.nn.one_hot(labels, logits.shape[-1])
            smooth = optax.smooth_labels(one_hot, label_smoothing)
            losses.append(optax.softmax_cross_entropy(logits, smooth).mean())
            hits.append((logits.argmax(axis=-1) == labels).astype(jnp.float32).mean())
        loss, accuracy = jnp.stack(losses).mean(), jnp.stack(hits).mean()
        return loss, (accuracy, changed.get("batch_stats", {}))

    (loss, (accuracy, statistics)), gradients = jax.value_and_grad(objective, has_aux=True)(
        state.params
    )
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {
        "loss": average(loss),
        "accuracy": average(accuracy),
        "learning_rate": average(jnp.asarray(schedule(state.step))),
        "health/gradient_norm": average(optax.tree.norm(gradients)),
    }
    return TrainState(state.step + 1, params, statistics, opt_state), metrics


def predict(
    classifier: ClipClassifier,
    variables: Any,
    inputs: Inputs,
    source: ClipRecords,
    *,
    clips: int,
    crops: int,
    chunk: int,
    part_records: int,
    threads: int,
    directory: epath.Path,
) -> np.ndarray:
    """Returns the mean softmax over evenly spaced clips of every record, each in several crops:
    float32 [records, classes] in process 0, elsewhere empty.
    """

    def probabilities(variables: Any, arrays: Mapping[str, Array]) -> dict[str, Array]:
        clips = arrays["clips"]
        flat = inputs(clips.reshape(-1, *clips.shape[2:]), None)
        logits: Any = classifier.apply(variables, flat, train=False)
        softmax = jax.nn.softmax(logits[HEAD]).reshape(*clips.shape[:2], -1)
        return {"softmax": softmax.mean(axis=1)}

    compute = batched_map(
        probabilities, {"mean": variables}, inputs=("clips",), chunk=chunk, threads=threads
    )
    arrays = in_parts(
        directory / cache_key(clips, crops, source.fingerprint),
        len(source),
        lambda rows: compute(
            lambda row: {"clips": source.fixed(row, clips=clips, crops=crops)}, rows
        ),
        rows=part_records,
    )
    return arrays.get("mean/softmax", np.empty((0, classifier.heads[HEAD]), np.float32))


@dataclasses.dataclass(frozen=True)
class Fit:
    """A classifier that was trained from scratch.

    Attributes:
        variables: parameters and batch statistics of `classifier`.
        losses: mean training loss of every epoch.
    """

    classifier: ClipClassifier
    standardise: Callable[[Any], Any]
    variables: Mapping[str, Any]
    losses: list[float]

    @property
    def encoder_variables(self) -> dict[str, Any]:
        """Parameters of the encoder alone, and its batch statistics where it has any."""
        return {kind: tree[ENCODER] for kind, tree in self.variables.items() if ENCODER in tree}

    def predict(self, views: np.ndarray, *, batch_size: int) -> dict[str, np.ndarray]:
        """Returns logits float32 [n, classes] of each label for views [n, ...]."""

        def logits(variables: Any, arrays: Mapping[str, Any]) -> dict[str, jax.Array]:
            return self.classifier.apply(variables, self.standardise(arrays["clips"]), train=False)  # type: ignore[return-value] # Flax gives Any or a tuple

        compute = batched_map(
            logits, {"fit": self.variables}, inputs=("clips",), chunk=batch_size, threads=1
        )
        outputs = compute(lambda position: {"clips": views[position]}, range(len(views)))
        return {name.split("/")[1].removesuffix("_head"): a for name, a in outputs.items()}


def fit_classifier(
    encoder: Encoder,
    views: np.ndarray,
    labels: Mapping[str, np.ndarray],
    *,
    classes: Mapping[str, int],
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    epochs: int,
    decay_epochs: int,
    seed: int,
) -> Fit:
    """Trains an encoder from scratch, with a linear head for each label.

    An epoch shows one randomly chosen view of every item. The learning rate of AdamW is constant,
    and falls to zero in a straight line over the last `decay_epochs`. Whether the epochs were
    enough shows in the training loss, which is reported with the results.

    Args:
        encoder: module and preprocessing; its parameters are newly drawn.
        views: [n, V, ...], V rendered views of each of n items.
        labels: int [n, V] by task.
        classes: number of classes of each task.

    Raises:
        UserError: if there are fewer items than a batch, or a loss or gradient is not finite.
    """
    items, num_views = views.shape[:2]
    if items < batch_size:
        raise UserError(f"{items} items do not fill one batch of {batch_size}")
    heads = {f"{name}_head": number for name, number in sorted(classes.items())}
    classifier = ClipClassifier(encoder.module.clone(), heads)
    steps, standardise = items // batch_size, encoder.preprocess.standardise
    schedule = optax.linear_schedule(
        learning_rate, 0.0, decay_epochs * steps, transition_begin=(epochs - decay_epochs) * steps
    )
    optimizer = optax.adamw(schedule, weight_decay=weight_decay)

    @jax.jit
    def begin(views: Any) -> TrainState:
        variables = classifier.init(jax.random.key(seed), standardise(views), train=False)
        params, statistics = variables["params"], variables.get("batch_stats", {})
        return TrainState(jnp.zeros((), jnp.int32), params, statistics, optimizer.init(params))

    state = begin(views[:batch_size, 0])
    fixed = classifier, optimizer, lambda views, _: standardise(views), schedule
    step = functools.partial(_train_step, *fixed, jax.random.key(seed))
    jitted = jax.jit(step, donate_argnums=0)
    rng, losses = np.random.default_rng(seed), []
    for epoch in range(epochs):
        order, of_steps = rng.permutation(items), []
        for batch in order[: steps * batch_size].reshape(steps, -1):
            view = rng.integers(num_views, size=len(batch))
            targets = {f"{name}_head": values[batch, view] for name, values in labels.items()}
            state, metrics = jitted(state, views[batch, view], targets)
            # The last step's gradient is in no later loss.
            of_steps.append((metrics["loss"].total, metrics["health/gradient_norm"].total))
        means = np.mean(jax.device_get(of_steps), axis=0).tolist()
        for name, mean in zip(("loss", "gradient norm"), means, strict=True):
            if not np.isfinite(mean):
                raise UserError(
                    f"the training {name} of epoch {epoch} is {mean}; lower learning_rate"
                )
        losses.append(means[0])
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return Fit(classifier, standardise, variables, losses)
