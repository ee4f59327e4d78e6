"""Inputs of the training step for benchmarks: a random batch, views, all draws from a bank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from avcl_jax import experiment
from avcl_jax.objectives import feature_bank
from avcl_jax.objectives.bank_rows import BankSample
from avcl_jax.objectives.views import MODALITIES, Modality, Views
from avcl_jax.training.objective import LossSpec


def random_batch(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Noise and random labels as a batch of `data.pipeline.train_batches`, numpy arrays.

    All records have video and audio and are in all temporal tasks.
    """
    rng = np.random.default_rng(0)
    rows = config.global_batch_size
    shapes = experiment.render_spec(config).batch_shapes(rows, config.bank.health_labels)
    kinds = {"speed": len(config.views.speeds), "direction": 2, "order": 3}
    batch: dict[str, Any] = {}
    for name, (shape, dtype) in shapes.items():
        task = name.rpartition("_")[2]
        if name in ("source_id", "record_index"):
            batch[name] = np.arange(rows, dtype=dtype)
        elif name == "video":
            batch[name] = rng.integers(0, 256, shape, dtype)
        elif name == "audio_windows":
            batch[name] = rng.integers(-1000, 1000, shape, dtype)
        elif dtype is np.float32:
            batch[name] = rng.normal(size=shape).astype(dtype)
        elif dtype is np.bool_:
            batch[name] = np.full(shape, name != "unreadable")
        else:
            batch[name] = rng.integers(0, kinds.get(task, 1), shape).astype(dtype)
    return batch


def complete_views(
    embeddings: Mapping[Modality, Any], source_id: Any, *, playbacks: int, labels: int
) -> Views:
    """Views with video and audio, whose playback and labels follow from the source.

    Args:
        embeddings: modality → [videos, 2, dim].
        source_id: int [videos].
        playbacks: number of playbacks.
        labels: number of labels.
    """
    both = jnp.stack([source_id, source_id], axis=1)
    return Views(
        embeddings=embeddings,
        present=dict.fromkeys(MODALITIES, jnp.ones_like(both, bool)),
        playback=dict.fromkeys(MODALITIES, both % playbacks),
        label=jnp.repeat(source_id[:, None], labels, axis=1),
        source_id=source_id,
        record_index=source_id,
    )


def draw_all(
    bank: feature_bank.FeatureBank,
    key: Any,
    views: Views,
    spec: LossSpec,
    *,
    mesh: Mesh | None = None,
) -> list[BankSample]:
    """Draws the rows for all terms of a step from a full bank.

    Args:
        key: key of the step.
        spec: terms and sampling, with a bank.
        mesh: devices; None for one.
    """
    assert spec.bank is not None
    return [
        feature_bank.sample(
            bank,
            key,
            views,
            term=term,
            terms=spec.bank_terms,
            sampling=spec.bank,
            active=feature_bank.is_full(bank),
            mesh=mesh,
        )
        for term in spec.bank_terms
    ]
