"""Training state: its contents, creation and shardings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from avcl_jax.data.rendering import RenderSpec
from avcl_jax.objectives import feature_bank
from avcl_jax.training import sharding


@flax.struct.dataclass
class TrainState:
    """State of training, a pytree; donated to each step.

    Attributes:
        step: int32 scalar, steps taken.
        params: parameters, float32.
        batch_stats: running statistics of batch normalisation, float32.
        opt_state: state of the optimizer.
        ema_params: exponential moving average of the parameters, or None.
        ema_batch_stats: the same average of `batch_stats`, for use with `ema_params`; or None.
        bank: feature bank, or None.
    """

    step: Any
    params: Any
    batch_stats: Any
    opt_state: Any
    ema_params: Any = None
    ema_batch_stats: Any = None
    bank: feature_bank.FeatureBank | None = None


def example_inputs(spec: RenderSpec, videos: int = 2) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the model's inputs for a batch of `videos`."""
    size, views = spec.crop.image_size, spec.views
    return {
        "video": jax.ShapeDtypeStruct((videos, 2, views.num_frames, size, size, 3), jnp.float32),
        "spectrogram": jax.ShapeDtypeStruct(
            (videos, 2, spec.log_mel.frames, spec.log_mel.mels), jnp.float32
        ),
        "has_video": jax.ShapeDtypeStruct((videos,), jnp.bool_),
        "has_audio": jax.ShapeDtypeStruct((videos, 2), jnp.bool_),
    }


def create_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    *,
    key: jax.Array,
    spec: RenderSpec,
    mesh: Mesh,
    ema: bool,
    bank: Callable[[], feature_bank.FeatureBank] | None,
) -> tuple[TrainState, Any]:
    """Creates the state of pretraining in its shardings.

    Args:
        model: `AudioVisualModel`.
        optimizer: its optimizer.
        key: JAX random key of the initialisation.
        spec: rendering, for the shapes of the inputs.
        mesh: mesh of `sharding.create_mesh`.
        ema: keep an average of the parameters and the statistics.
        bank: makes an empty feature bank; None to train without.

    Returns:
        The state and its shardings.
    """

    def init(key: jax.Array) -> TrainState:
        inputs: Any = {k: jnp.zeros(x.shape, x.dtype) for k, x in example_inputs(spec).items()}
        variables = model.init(key, **inputs, train=False)
        params, batch_stats = variables["params"], variables.get("batch_stats", {})
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=batch_stats,
            opt_state=optimizer.init(params),
            # Copies, because donated buffers must not be shared.
            ema_params=jax.tree.map(jnp.copy, params) if ema else None,
            ema_batch_stats=jax.tree.map(jnp.copy, batch_stats) if ema else None,
            bank=None if bank is None else bank(),
        )

    return in_shardings(init, key, mesh=mesh)


def in_shardings(
    init: Callable[..., TrainState], *arguments: Any, mesh: Mesh
) -> tuple[TrainState, Any]:
    """Creates a state directly in its shardings: no device ever allocates more than its part.

    Args:
        init: pure function of `arguments` to the state.
        mesh: devices.

    Returns:
        The state and its shardings.
    """
    shardings = state_shardings(jax.eval_shape(init, *arguments), mesh)
    return jax.jit(init, out_shardings=shardings)(*arguments), shardings


def state_shardings(shapes: TrainState, mesh: Mesh) -> Any:
    """Shardings of a state of the given shapes."""
    whole = sharding.replicated(mesh)
    return TrainState(
        step=whole,
        params=sharding.parameter_shardings(mesh, shapes.params),
        batch_stats=jax.tree.map(lambda _: whole, shapes.batch_stats),
        opt_state=sharding.parameter_shardings(mesh, shapes.opt_state),
        ema_params=sharding.parameter_shardings(mesh, shapes.ema_params),
        ema_batch_stats=jax.tree.map(lambda _: whole, shapes.ema_batch_stats),
        bank=None if shapes.bank is None else feature_bank.shardings(mesh),
    )
