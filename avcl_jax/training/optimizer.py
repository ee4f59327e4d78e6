"""Learning-rate schedule and optimizers, from optax."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import optax

from avcl_jax.errors import UserError

OptimizerName = Literal["adamw", "sgd"]


def warmup_cosine(*, learning_rate: float, warmup_steps: int, steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then cosine to 0 at the last step; the warm-up must be shorter."""
    if not 0 <= warmup_steps < steps:
        raise UserError(
            f"optimizer.warmup_steps {warmup_steps} must be at least 0 and below steps {steps}"
        )
    return optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup_steps, steps)


def warmup_multistep(
    *, learning_rate: float, warmup_steps: int, milestones: Sequence[int], factor: float
) -> optax.Schedule:
    """Linear warm-up from 0, then constant, multiplied by `factor` at each milestone after it."""
    if list(milestones) != sorted(set(milestones)) or min(milestones, default=1) <= warmup_steps:
        raise UserError(
            f"milestones at steps {tuple(milestones)} must increase and come after the "
            f"{warmup_steps} steps of warm-up"
        )
    # join_schedules counts from the border, so the milestones do too.
    falls = {int(step) - warmup_steps: factor for step in milestones}
    constant = optax.piecewise_constant_schedule(learning_rate, falls)
    if not warmup_steps:
        return constant
    rise = optax.linear_schedule(0.0, learning_rate, warmup_steps)
    return optax.join_schedules([rise, constant], [warmup_steps])


def _decay_mask(params: Any) -> Any:
    """True for kernels; biases, scales of normalisations and positions are not decayed."""
    # Not by the number of axes: biases of attention have two, positions four or five.
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def create_optimizer(
    *,
    name: OptimizerName,
    schedule: optax.Schedule | Mapping[str, optax.Schedule | None],
    weight_decay: float,
    momentum: float,
    beta2: float,
    clip_norm: float,
    part_of: Callable[[Any], Any] | None = None,
) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW, or SGD with Nesterov momentum.

    Args:
        schedule: learning rate by step; or that of each part of the parameters, None for a part
            that does not change.
        weight_decay: decay of kernels only; decoupled for AdamW.
        momentum: first-moment decay (AdamW's beta 1).
        beta2: second-moment decay of AdamW.
        clip_norm: largest global gradient norm; 0 does not clip.
        part_of: maps parameters to the name of the part of each, if `schedule` has parts.
    """
    if name not in ("adamw", "sgd"):
        raise UserError(f"unknown optimizer {name!r}: use 'adamw' or 'sgd'")

    def rule(schedule: optax.Schedule | None) -> optax.GradientTransformation:
        if schedule is None:
            return optax.set_to_zero()
        if name == "adamw":
            return optax.adamw(
                schedule, momentum, beta2, weight_decay=weight_decay, mask=_decay_mask
            )
        decay = optax.add_decayed_weights(weight_decay, mask=_decay_mask)
        return optax.chain(decay, optax.sgd(schedule, momentum, nesterov=True))

    if isinstance(schedule, Mapping):
        assert part_of is not None
        update = optax.partition({part: rule(rate) for part, rate in schedule.items()}, part_of)
    else:
        update = rule(schedule)
    # Both have the same empty state, so a run that resumes may begin or cease to clip.
    clip = optax.clip_by_global_norm(clip_norm) if clip_norm > 0 else optax.identity()
    return optax.chain(clip, update)
