"""What benchmarks of the training step feed it: a batch without data, all draws from the bank."""

from __future__ import annotations

from typing import Any

import ml_collections
import numpy as np

from avcl_jax import experiment
from avcl_jax.data.pipeline import batch_shapes
from avcl_jax.objectives import feature_bank
from avcl_jax.training.step import LossSpec


def random_batch(config: ml_collections.ConfigDict, *, seed: int = 0) -> dict[str, Any]:
    """A batch of noise and random labels, in which every video has picture, sound and every task.

    Args:
        config: as `configs/pretrain.py` returns it.
        seed: of everything random.

    Returns:
        numpy arrays as `data.pipeline.train_batches` delivers them.
    """
    rng = np.random.default_rng(seed)
    rows = config.global_batch_size
    shapes = batch_shapes(experiment.render_spec(config), rows, config.bank.health_labels)
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


def draw_all(
    bank: feature_bank.FeatureBank, key: Any, spec: LossSpec, **arguments: Any
) -> list[feature_bank.BankSample]:
    """The rows that a step draws for all of its terms.

    Args:
        bank: feature bank.
        key: of the step.
        spec: terms and sampling; with a bank.
        **arguments: of `feature_bank.sample`, the same for all terms.
    """
    assert spec.bank is not None
    return [
        feature_bank.sample(
            bank,
            key,
            anchor_modality=anchor,
            target_modality=target,
            sampling=spec.bank,
            terms=spec.bank_terms,
            **arguments,
        )
        for anchor, target in spec.bank_terms
    ]
