"""A classifier on an encoder, and the step that trains all of it, or its head and some layers.

Names of parameters decide which are trained; the others take no part in the gradient and do not
change by a bit.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from avcl_jax.data.augment import (
    PhotometricSpec,
    SpectralSpec,
    photometric,
    spectral,
    standardize,
    to_unit_range,
)
from avcl_jax.data.clips import AudioClipSpec, ClipSpec
from avcl_jax.data.preprocessing import VideoPreprocessing
from avcl_jax.data.spectrogram import log_mel
from avcl_jax.errors import UserError
from avcl_jax.export import Encoder
from avcl_jax.training.metrics import Metrics, average
from avcl_jax.training.sharding import replicated, rows_sharding
from avcl_jax.training.state import TrainState, state_shardings

Augmentation = tuple[PhotometricSpec, SpectralSpec]


class ClipClassifier(nn.Module):
    """An encoder, dropout of its features, a linear layer.

    Attributes:
        encoder: module returning a dict with `features`.
        classes: number of classes.
        dropout: fraction of features set to zero in training.
        train_statistics: the encoder's batch normalisation uses and updates the statistics of the
            batch in training; otherwise it stays in evaluation mode.
    """

    encoder: nn.Module
    classes: int
    dropout: float
    train_statistics: bool

    @nn.compact
    def __call__(self, inputs: Array, *, train: bool) -> Array:
        """Returns float32 logits [batch, classes]."""
        outputs: Any = self.encoder(inputs, train=train and self.train_statistics)
        features = outputs["features"].astype(jnp.float32)
        features = nn.Dropout(self.dropout, deterministic=not train)(features)
        return nn.Dense(self.classes, name="head")(features)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """From clips as they are rendered to what the encoder takes, on the device.

    Attributes:
        spec: clips.
        preprocess: preprocessing of the encoder, which standardises pixels.
        augmentation: augmentation of video and of spectrograms, in training.
    """

    spec: ClipSpec
    preprocess: Any
    augmentation: Augmentation

    def __call__(self, clips: Array, key: Array | None) -> Array:
        """Returns float32 pixels [batch, time, size, size, 3] or log-mel [batch, frames, mels].

        Args:
            clips: uint8 frames or int16 windows.
            key: random key of the augmentation; None for none.
        """
        of_video, of_audio = self.augmentation
        # The augmentation draws for each view; a clip is a video's only one.
        if isinstance(self.spec, AudioClipSpec):
            spectrogram = log_mel(clips, self.spec.log_mel, jnp)
            if key is None:
                return spectrogram
            return spectral(key, spectrogram[:, None], of_audio)[:, 0]
        assert isinstance(self.preprocess, VideoPreprocessing)
        pixels = to_unit_range(clips)
        if key is not None:
            pixels = photometric(key, pixels[:, None], of_video)[:, 0]
        return standardize(pixels, self.preprocess.mean, self.preprocess.std)


def trained_mask(params: Mapping[str, Any], freeze: Sequence[str]) -> Any:
    """Returns the mask of the trained parameters.

    Args:
        params: parameters of the classifier.
        freeze: beginnings of paths such as "encoder/stem".

    Returns:
        A tree like `params` of bool, False where frozen.

    Raises:
        UserError: if a name freezes nothing, or the head or the whole encoder is frozen.
    """
    paths = [
        "/".join(key.key for key in path)
        for path, _ in jax.tree_util.tree_flatten_with_path(dict(params))[0]
    ]
    for name in freeze:
        frozen = [path for path in paths if path.startswith(name)]
        if not frozen or any(not path.startswith("encoder/") for path in frozen):
            layers = sorted({"/".join(p.split("/")[:2]) for p in paths if p.startswith("encoder/")})
            raise UserError(
                f"freeze {name!r} must name layers of the encoder, some of {', '.join(layers)}"
            )
    trained = [not any(path.startswith(name) for name in freeze) for path in paths]
    if freeze and not any(
        used and path.startswith("encoder/") for used, path in zip(trained, paths, strict=True)
    ):
        raise UserError(
            f"freeze {tuple(freeze)} leaves no layer of the encoder to train: use "
            "configs/linear_probe.py, which probes a frozen encoder"
        )
    return jax.tree.unflatten(jax.tree.structure(dict(params)), trained)


def _split(params: Any, mask: Any) -> tuple[Any, Any]:
    """Trained and frozen parameters; None stands where the other one has a value."""
    return (
        jax.tree.map(lambda p, m: p if m else None, params, mask),
        jax.tree.map(lambda p, m: None if m else p, params, mask),
    )


def _join(trained: Any, frozen: Any) -> Any:
    return jax.tree.map(
        lambda t, f: f if t is None else t, trained, frozen, is_leaf=lambda leaf: leaf is None
    )


def scale_updates(*, head_factor: float, head_steps: int) -> optax.GradientTransformation:
    """Multiplies the head's updates by `head_factor`; the encoder's are zero for `head_steps`.

    After an optimizer whose updates are proportional to its learning rate, as those of
    `training.optimizer` are, this is a learning rate of its own for the head.
    """

    def update(updates: Any, count: Array, params: Any = None) -> tuple[Any, Array]:
        del params
        factors = {"encoder": (count >= head_steps).astype(jnp.float32), "head": head_factor}
        scaled = {
            name: jax.tree.map(lambda leaf, f=factors[name]: leaf * f, tree)
            for name, tree in updates.items()
        }
        return scaled, count + 1

    return optax.GradientTransformation(lambda _: jnp.zeros((), jnp.int32), update)


def create_classifier_state(
    classifier: ClipClassifier,
    optimizer: optax.GradientTransformation,
    encoder: Encoder,
    *,
    input_shape: tuple[int, ...],
    freeze: Sequence[str],
    key: Array,
    mesh: Mesh,
) -> tuple[TrainState, Any, Any]:
    """Draws the head, takes the encoder's weights as they are, and shards everything.

    Args:
        input_shape: shape of one clip.
        freeze: see `trained_mask`.
        key: random key of the head.

    Returns:
        The state, its shardings, and the mask of the trained parameters.

    Raises:
        UserError: if the encoder does not take clips of this shape.
        UserError: see `trained_mask`.
    """
    if freeze and classifier.train_statistics:
        raise UserError(
            f"freeze {tuple(freeze)} leaves the running statistics of frozen layers moving: set "
            "batch_norm='frozen'"
        )
    # Of the clips that the encoder was trained on, which learned positions have their shape from.
    example = jnp.zeros((1, *encoder.input_shape), jnp.float32)
    weights = dict(encoder.params)
    shapes = jax.eval_shape(functools.partial(classifier.init, train=False), key, example)
    clip = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    jax.eval_shape(functools.partial(classifier.apply, train=False), shapes, clip)
    mask = trained_mask(shapes["params"], freeze)

    def init(key: Array, weights: Any) -> TrainState:
        fresh = classifier.init(key, example, train=False)
        variables = {
            kind: {**tree, **({"encoder": weights[kind]} if kind in weights else {})}
            for kind, tree in fresh.items()
        }
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=variables["params"],
            batch_stats=variables.get("batch_stats", {}),
            opt_state=optimizer.init(_split(variables["params"], mask)[0]),
            ema_params=None,
            ema_batch_stats=None,
            bank=None,
        )

    shardings = state_shardings(jax.eval_shape(init, key, weights), mesh)
    return jax.jit(init, out_shardings=shardings)(key, weights), shardings, mask


def classifier_step(
    classifier: ClipClassifier,
    optimizer: optax.GradientTransformation,
    inputs: Inputs,
    *,
    mask: Any,
    schedule: optax.Schedule,
    label_smoothing: float,
    mesh: Mesh,
    shardings: Any,
) -> Callable[[TrainState, Mapping[str, Array], Array], tuple[TrainState, Metrics]]:
    """Returns the jitted step `(state, batch, key) -> (state, metrics)`; the state is donated.

    The loss is cross-entropy with a fraction `label_smoothing` spread over all classes. `key` is
    the same at every step; the step number is folded in.
    """

    def step(state: TrainState, batch: Any, key: Array) -> tuple[TrainState, Metrics]:
        augment_key, dropout_key = jax.random.split(jax.random.fold_in(key, state.step))
        prepared = inputs(batch["clips"], augment_key)
        trained, frozen = _split(state.params, mask)

        def objective(trained: Any) -> tuple[Array, Any]:
            logits, changed = classifier.apply(
                {"params": _join(trained, frozen), "batch_stats": state.batch_stats},
                prepared,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": dropout_key},
            )
            targets = optax.smooth_labels(
                jax.nn.one_hot(batch["label"], classifier.classes), label_smoothing
            )
            loss = optax.softmax_cross_entropy(logits, targets).mean()
            hits = (logits.argmax(axis=-1) == batch["label"]).astype(jnp.float32)
            return loss, (hits.mean(), changed.get("batch_stats", {}))

        (loss, (accuracy, statistics)), gradients = jax.value_and_grad(objective, has_aux=True)(
            trained
        )
        updates, opt_state = optimizer.update(gradients, state.opt_state, trained)
        new_state = TrainState(
            step=state.step + 1,
            params=_join(optax.apply_updates(trained, updates), frozen),
            batch_stats=statistics,
            opt_state=opt_state,
            ema_params=None,
            ema_batch_stats=None,
            bank=None,
        )
        metrics = {
            "loss": average(loss),
            "accuracy": average(accuracy),
            "learning_rate": average(jnp.asarray(schedule(state.step))),
            "health/gradient_norm": average(optax.tree.norm(gradients)),
        }
        return new_state, metrics

    whole = replicated(mesh)
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(shardings, rows_sharding(mesh), whole),
        out_shardings=(shardings, whole),
    )


def mean_softmax(
    classifier: ClipClassifier, inputs: Inputs
) -> Callable[[Any, Mapping[str, Array]], dict[str, Array]]:
    """Returns a function from variables and `clips` [records, clips, ...] to `probabilities`.

    Each clip's softmax, averaged over the clips of a record: float32 [records, classes].
    """

    def probabilities(variables: Any, arrays: Mapping[str, Array]) -> dict[str, Array]:
        clips = arrays["clips"]
        records, count = clips.shape[:2]
        flat = inputs(clips.reshape(-1, *clips.shape[2:]), None)
        logits: Any = classifier.apply(variables, flat, train=False)
        return {"probabilities": jax.nn.softmax(logits).reshape(records, count, -1).mean(axis=1)}

    return probabilities
