"""Program of a training: mesh, initialisation, objective and train step of a config."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from avcl_jax import experiment
from avcl_jax.errors import UserError
from avcl_jax.models.convolution import matrix_unit
from avcl_jax.objectives import feature_bank
from avcl_jax.objectives.bank_exchange import ExchangeBytes, exchange_bytes
from avcl_jax.objectives.temporal import TASKS
from avcl_jax.objectives.views import MODALITIES
from avcl_jax.training import sharding
from avcl_jax.training.inputs import prepare_inputs
from avcl_jax.training.objective import CONTRASTIVE_TERMS, LossSpec
from avcl_jax.training.optimizer import create_optimizer, warmup_cosine
from avcl_jax.training.state import TrainState, create_state
from avcl_jax.training.step import make_train_step

LEAST_VIDEOS = 2  # in a batch, as one has no negatives


def loss_spec(config: ml_collections.ConfigDict) -> LossSpec:
    """Weights of the objective; terms of a modality that is not trained have weight 0."""
    reads: dict[str, set[str]] = {name: set(task.reads) for name, task in TASKS.items()}
    # Both directions of a contrastive term read the same modalities.
    reads |= {name: set(directions[0]) for name, directions in CONTRASTIVE_TERMS.items()}
    trained = set(trained_modalities(config))
    return LossSpec(
        weights={
            term: weight if reads.get(term, set()) <= trained else 0.0
            for term, weight in config.loss.weights.items()
        },
        temperature=config.loss.temperature,
        positive_weight=config.loss.positive_weight,
        bank=experiment.bank_sampling(config) if config.bank.size else None,
        bank_warmup_steps=config.bank.warmup_steps,
        bank_labels=tuple(config.bank.health_labels),
    )


def trained_modalities(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    """Modalities whose encoders a config trains."""
    return MODALITIES if config.modalities == "audio_visual" else (config.modalities,)


def bank_start(config: ml_collections.ConfigDict) -> int | None:
    """Step after which the feature bank is used: warm-up is over and the bank is full.

    None where no term of the loss draws from a bank.
    """
    if not config.bank.size or not loss_spec(config).bank_terms:
        return None
    fills = config.bank.size // (2 * config.global_batch_size)
    return max(config.bank.warmup_steps, fills)


def build(
    config: ml_collections.ConfigDict, devices: Sequence[jax.Device] | None = None
) -> tuple[Any, Callable[[jax.Array], tuple[TrainState, Any]], Callable[..., Any]]:
    """Builds mesh, initialisation and train step of a config; reads no data.

    Args:
        devices: all available ones by default; others to compile for other machines.

    Returns:
        The mesh, a function from a random key to (state, its shardings), and the train step, which
        `jit_train_step` takes.

    Raises:
        UserError: if batch, bank and devices do not fit.
    """
    mesh = sharding.create_mesh(config.execution.fsdp, devices)
    sharding.check_batch(config.global_batch_size, mesh, config.micro_batches)
    if config.global_batch_size < LEAST_VIDEOS:
        raise UserError(
            f"global_batch_size {config.global_batch_size}: a video is contrasted with the other "
            f"videos of its batch; use at least {LEAST_VIDEOS}"
        )
    if config.bank.size:
        feature_bank.check_size(
            config.bank.size, global_batch_size=config.global_batch_size, shards=mesh.size
        )
        if config.bank.dtype not in ("float32", "bfloat16"):
            raise UserError(f"bank.dtype {config.bank.dtype!r} must be 'float32' or 'bfloat16'")
    spec = experiment.render_spec(config)
    unit = matrix_unit(mesh.devices.flat[0].device_kind)
    model = experiment.audio_visual_model(config, matrix_unit=unit)
    section = config.optimizer
    schedule = warmup_cosine(
        learning_rate=section.learning_rate, warmup_steps=section.warmup_steps, steps=config.steps
    )
    optimizer = create_optimizer(schedule=schedule, **experiment.optimizer_settings(config))

    empty_bank = functools.partial(
        feature_bank.create,
        config.bank.size,
        config.model.embedding_dim,
        jnp.dtype(config.bank.dtype),
        labels=experiment.bank_labels(config),
    )

    def init(key: jax.Array) -> tuple[TrainState, Any]:
        bank = empty_bank if config.bank.size else None
        return create_state(
            model, optimizer, key=key, spec=spec, mesh=mesh, ema=section.ema_decay > 0, bank=bank
        )

    step = make_train_step(
        model,
        optimizer,
        schedule=schedule,
        loss_spec=loss_spec(config),
        prepare=functools.partial(
            prepare_inputs,
            spec=spec,
            pixel_mean=config.pixels.mean,
            pixel_std=config.pixels.std,
            augmentation=experiment.augmentation(config),
            mesh=mesh,
        ),
        ema_decay=section.ema_decay,
        micro_batches=config.micro_batches,
        mesh=mesh,
    )
    return mesh, init, step


def bank_exchange(config: ml_collections.ConfigDict, shards: int) -> ExchangeBytes:
    """Counts bytes that the bank of a config exchanges per device and step; 0 without a bank."""
    spec = loss_spec(config)
    if spec.bank is None:
        return ExchangeBytes(0, 0)
    return exchange_bytes(
        size=config.bank.size,
        dim=config.model.embedding_dim,
        dtype=config.bank.dtype,
        labels=experiment.bank_labels(config),
        global_batch_size=config.global_batch_size,
        shards=shards,
        terms=spec.bank_terms,
        sampling=spec.bank,
    )
