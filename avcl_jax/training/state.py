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

from avcl_jax.data.render_spec import RenderSpec
from avcl_jax.objectives import feature_bank
from avcl_jax.training import sharding


@flax.struct.dataclass
class TrainState:
    """State of training, a pytree; donated to each step."""

    step: Any  # int32 scalar, steps taken
    params: Any  # float32
    batch_stats: Any  # running statistics of batch normalisation, float32
    opt_state: Any
    ema_params: Any = None  # exponential moving average of the parameters
    ema_batch_stats: Any = None  # the same average of `batch_stats`, for use with `ema_params`
    bank: feature_bank.FeatureBank | None = None


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
    """Creates the state of pretraining in its shardings, which it returns too.

    Args:
        model: `AudioVisualModel`.
        spec: rendering, for the shapes of the inputs.
        ema: keep an average of the parameters and the statistics.
        bank: makes an empty feature bank; None to train without.
    """
    size, views, mel = spec.crop.image_size, spec.views, spec.log_mel

    def init(key: jax.Array) -> TrainState:
        inputs: Any = {
            "video": jnp.zeros((2, 2, views.num_frames, size, size, 3), jnp.float32),
            "spectrogram": jnp.zeros((2, 2, mel.frames, mel.mels), jnp.float32),
            "has_video": jnp.zeros(2, bool),
            "has_audio": jnp.zeros((2, 2), bool),
        }
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
    """Returns the state that the pure function `init` makes of `arguments`, and its shardings.

    No device ever allocates more than its part.
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
