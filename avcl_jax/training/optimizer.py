"""Learning-rate schedule and optimizers, from optax."""

from __future__ import annotations

from typing import Any, Literal

import jax
import optax

OptimizerName = Literal["adamw", "sgd", "lars"]


def warmup_cosine(*, learning_rate: float, warmup_steps: int, steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then cosine to 0 at the last step.

    Raises:
        ValueError: if the warm-up is not shorter than the training.
    """
    if not 0 <= warmup_steps < steps:
        raise ValueError(
            f"optimizer.warmup_steps {warmup_steps} must be at least 0 and below steps {steps}"
        )
    return optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup_steps, steps)


def decay_mask(params: Any) -> Any:
    """True for kernels; biases and the scales of normalisations are not decayed."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def create_optimizer(
    *,
    name: OptimizerName,
    schedule: optax.Schedule,
    weight_decay: float,
    momentum: float,
    beta2: float,
    clip_norm: float,
) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW, SGD with Nesterov momentum, or LARS.

    Args:
        name: which.
        schedule: learning rate by step.
        weight_decay: of kernels only; decoupled for AdamW.
        momentum: first-moment decay (AdamW's beta 1).
        beta2: second-moment decay of AdamW.
        clip_norm: largest global gradient norm; 0 does not clip.

    Raises:
        ValueError: if the name is unknown.
    """
    if name == "adamw":
        update = optax.adamw(
            schedule, b1=momentum, b2=beta2, weight_decay=weight_decay, mask=decay_mask
        )
    elif name == "sgd":
        update = optax.chain(
            optax.add_decayed_weights(weight_decay, mask=decay_mask),
            optax.sgd(schedule, momentum=momentum, nesterov=True),
        )
    elif name == "lars":
        update = optax.lars(
            schedule,
            weight_decay=weight_decay,
            weight_decay_mask=decay_mask,
            trust_ratio_mask=decay_mask,
            momentum=momentum,
        )
    else:
        raise ValueError(f"unknown optimizer {name!r}: use 'adamw', 'sgd' or 'lars'")
    if clip_norm <= 0:
        return update
    return optax.chain(optax.clip_by_global_norm(clip_norm), update)
