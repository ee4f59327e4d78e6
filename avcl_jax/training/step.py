"""One step of pretraining, written for the global batch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Container, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from avcl_jax.errors import UserError
from avcl_jax.models.audio_visual import module_rows
from avcl_jax.objectives import bank_health, feature_bank
from avcl_jax.objectives.temporal import TASKS
from avcl_jax.objectives.views import MODALITIES, Views
from avcl_jax.training import accumulate
from avcl_jax.training.averages import Metrics, average
from avcl_jax.training.objective import LossSpec, total_loss
from avcl_jax.training.sharding import replicated, rows_sharding
from avcl_jax.training.state import TrainState


def _embedding_spread(embeddings: Array, present: Array) -> Array:
    """Standard deviation of the coordinates over the batch, times sqrt(dim).

    About 1 for embeddings spread over the sphere, 0 for a collapse to one point. Embeddings have
    length 1, so the norm of their mean is sqrt(1 - spread²).
    """
    rows = embeddings.reshape(-1, embeddings.shape[-1])
    weight = present.reshape(-1, 1).astype(jnp.float32)
    total = jnp.maximum(weight.sum(), 1.0)
    mean = (rows * weight).sum(axis=0, keepdims=True) / total
    variance = (jnp.square(rows - mean) * weight).sum(axis=0) / total
    return jnp.sqrt(variance.sum())


def _view_metrics(views: Views, readable: Array, *, encoders: Container[str]) -> Metrics:
    """Fraction of readable videos' views without each trained modality, and spreads."""
    metrics: Metrics = {}
    for modality, present in views.present.items():
        if f"{modality}_encoder" in encoders:
            lacking = 1.0 - present.mean(axis=1)
            metrics[f"data/without_{modality}"] = average(
                jnp.sum(lacking, where=readable) / jnp.maximum(readable.sum(), 1), readable.sum()
            )
        metrics[f"health/{modality}_embedding_std"] = average(
            _embedding_spread(views.embeddings[modality], present),
            present.any().astype(jnp.float32),
        )
    return metrics


def average_weight(step: Array, decay: float) -> Array:
    """Weight of the newest values in the moving average, (1 − d) / (1 − d^(step + 1)).

    The weight of each step is then proportional to d to the power of its age: the bias-corrected
    average of Adam (Kingma & Ba, ICLR 2015, section 3), which excludes the initialisation. `step`
    is the number of previous steps; at 0 the weight is 1.
    """
    # `expm1` avoids the cancellation in 1 − d^(step + 1) if d is close to 1.
    return (1.0 - decay) / -jnp.expm1((step + 1) * math.log(decay))


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    *,
    schedule: optax.Schedule,
    loss_spec: LossSpec,
    prepare: Callable[..., dict[str, Array]],
    ema_decay: float,
    micro_batches: int,
    mesh: Mesh,
) -> Callable[[TrainState, Mapping[str, Array], Array], tuple[TrainState, Metrics]]:
    """Builds the function `(state, batch, key) -> (state, metrics)`, for `jit_train_step`.

    `key` is the same at every step; the step number is folded in. Metrics are averages to merge
    over a log period: `<term>/loss` over the examples that count, `loss` over the steps. The model
    runs on `micro_batches` parts of a batch in turn, the losses on the whole batch
    (`training.accumulate`). `prepare` makes its inputs of a batch and a `key`.

    Raises:
        UserError: if `ema_decay` is not in [0, 1).
    """
    if not 0 <= ema_decay < 1:
        raise UserError(f"optimizer.ema_decay {ema_decay} must be at least 0 and below 1")

    def train_step(
        state: TrainState, batch: Mapping[str, Array], key: Array
    ) -> tuple[TrainState, Metrics]:
        augment_key, bank_key = jax.random.split(jax.random.fold_in(key, state.step))
        inputs = prepare(batch, key=augment_key)
        # Outputs that no term reads would take memory for the whole batch.
        used = {*(f"{modality}_embeddings" for modality in MODALITIES), *loss_spec.active(TASKS)}

        def forward(params: Any, inputs: Any) -> tuple[dict[str, Array], Any]:
            variables = {"params": params, "batch_stats": state.batch_stats}
            outputs, mutated = model.apply(variables, **inputs, train=True, mutable=["batch_stats"])
            outputs = {name: value for name, value in outputs.items() if name in used}
            return outputs, mutated["batch_stats"]

        objective = functools.partial(
            total_loss,
            batch=batch,
            state=state,
            loss_spec=loss_spec,
            key=bank_key,
            mesh=mesh,
        )
        grads, (metrics, views), statistics = accumulate.gradients(
            forward, objective, state.params, inputs, parts=micro_batches, mesh=mesh
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        present = accumulate.split_rows(views.present, micro_batches, mesh)
        rows = jax.vmap(module_rows)(present)
        batch_stats = accumulate.merge_statistics(state.batch_stats, statistics, rows)
        ema_params, ema_batch_stats = state.ema_params, state.ema_batch_stats
        if ema_params is not None:
            weight = average_weight(state.step, ema_decay)
            ema_params = optax.incremental_update(params, ema_params, weight)
            ema_batch_stats = optax.incremental_update(batch_stats, ema_batch_stats, weight)
        bank = state.bank
        if bank is not None:
            health = bank_health.bank_metrics(bank, views, label_names=loss_spec.bank_labels)
            metrics |= {f"bank/{metric}": average(*value) for metric, value in health.items()}
            bank = feature_bank.insert(bank, views, mesh=mesh)
        metrics |= _view_metrics(views, ~batch["unreadable"], encoders=grads)
        metrics["health/gradient_norm"] = average(optax.tree.norm(grads))
        for modality in MODALITIES:
            if (name := f"{modality}_encoder") in grads:
                metrics[f"health/{name}_gradient_norm"] = average(optax.tree.norm(grads[name]))
        metrics["health/parameter_norm"] = average(optax.tree.norm(params))
        metrics["learning_rate"] = average(jnp.asarray(schedule(state.step)))
        new_state = TrainState(
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            ema_params=ema_params,
            ema_batch_stats=ema_batch_stats,
            bank=bank,
        )
        return new_state, metrics

    return train_step


def jit_train_step(
    step: Callable[..., tuple[TrainState, Metrics]], mesh: Mesh, shardings: Any
) -> Any:
    """Jits a step of `make_train_step`; the old state is donated to the new one.

    `shardings` are those of the state.
    """
    rows, whole = rows_sharding(mesh), replicated(mesh)
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(shardings, rows, whole),
        out_shardings=(shardings, whole),
    )
