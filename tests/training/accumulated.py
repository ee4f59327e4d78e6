"""Steps of one batch in one and in several micro-batches; run here and on eight devices.

As a module it writes an .npz of what `steps` and `spectrograms` return.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from typing import Any
from unittest import mock

import jax
import numpy as np

from avcl_jax import experiment
from avcl_jax.data.spectrogram import log_mel
from avcl_jax.models.audio_visual import AudioVisualModel
from avcl_jax.objectives import feature_bank
from avcl_jax.training import program, sharding
from avcl_jax.training.inputs import prepare_inputs
from avcl_jax.training.state import TrainState, state_shardings
from tests.hlo import collective_bytes
from tests.training.small import small_config

VIDEOS, STEPS = 16, 3
# Optimising machine code takes longer than running it.
QUICK = {"xla_backend_optimization_level": 0}
# Plain gradient descent with a high rate: what parameters change by is their gradient, and large.
OVERRIDES = {
    "global_batch_size": VIDEOS,
    "bank.size": 2 * VIDEOS,
    "bank.warmup_steps": 0,
    "bank.positive_window": 0.0625,
    "optimizer.name": "sgd",
    "optimizer.momentum": 0.0,
    "optimizer.weight_decay": 0.0,
    "optimizer.clip_norm": 0.0,
    "optimizer.learning_rate": 0.5,
    "optimizer.warmup_steps": 0,
}


class FrozenNorms(AudioVisualModel):
    """The model whose normalisations all go by the running statistics, those of the heads too."""

    def __call__(self, *args: Any, train: bool, **inputs: Any) -> dict[str, Any]:
        """As the model does in evaluation."""
        return super().__call__(*args, **inputs, train=False)


def frozen_model(config, **settings) -> AudioVisualModel:
    model = _MODEL(config, **settings)
    fields = ("video_encoder", "audio_encoder", "embedding_dim", "projection_hidden")
    return FrozenNorms(
        **{name: getattr(model, name) for name in (*fields, "temporal_hidden", "speeds")}
    )


_MODEL = experiment.audio_visual_model


def batch(seed: int) -> dict[str, np.ndarray]:
    """Noise with all labels; some videos lack a modality, four of each kind in even rows."""
    rng = np.random.default_rng(seed)
    rows = np.arange(VIDEOS)
    made = {
        "video": rng.integers(0, 256, (VIDEOS, 2, 4, 16, 16, 3), dtype=np.uint8),
        "spectrogram": rng.normal(size=(VIDEOS, 2, 16, 16)).astype(np.float32),
        "has_video": ~np.isin(rows, [2, 4, 6, 10]),
        "video_moves": rng.random(VIDEOS) < 0.9,
        "unreadable": np.zeros(VIDEOS, bool),
        "has_audio": ~np.isin(rows, [0, 8, 12, 13])[:, None] & (rng.random((VIDEOS, 2)) < 0.9),
        "order": rng.integers(0, 3, VIDEOS),
        "source_id": rng.permutation(VIDEOS) // 2 + 100 * seed,
        "record_index": rows + VIDEOS * seed,
        "label_material": rng.integers(0, 3, VIDEOS),
        **{f"{task}_mask": rng.random(VIDEOS) < 0.8 for task in ("speed", "direction", "order")},
        **{
            f"{modality}_{task}": rng.integers(0, classes, (VIDEOS, 2))
            for modality in ("video", "audio")
            for task, classes in (("speed", 4), ("direction", 2))
        },
    }
    return {n: v.astype(np.int32) if v.dtype == np.int64 else v for n, v in made.items()}


def initial(shapes: TrainState) -> TrainState:
    """A state with random parameters; compiling the initialisation takes longer than all else."""
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        scale = (leaf.size / leaf.shape[-1]) ** -0.5
        values = 0.5 + rng.random(leaf.shape) if leaf.ndim == 1 else rng.normal(size=leaf.shape)
        return (values * (1 if leaf.ndim == 1 else scale)).astype(leaf.dtype)

    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    bank = feature_bank.create(**feature_bank._shape(shapes.bank))
    params, statistics = (jax.tree.map(draw, t) for t in (shapes.params, shapes.batch_stats))
    return dataclasses.replace(zeros, params=params, batch_stats=statistics, bank=bank)


def prepare(micro_batches: int, *, frozen: bool, batches=None, **overrides: Any) -> Any:
    """The compiled step and its initial arguments."""
    config = small_config("unused", micro_batches=micro_batches, **OVERRIDES, **overrides)
    with mock.patch.object(experiment, "audio_visual_model", frozen_model if frozen else _MODEL):
        mesh, init, step = program.build(config)
        shapes = jax.eval_shape(lambda key: init(key)[0], jax.random.key(0))
    shardings = state_shardings(shapes, mesh)
    state = jax.device_put(initial(shapes), shardings)
    rows = sharding.rows_sharding(mesh)
    placed = [jax.device_put(b, rows) for b in batches or map(batch, range(STEPS))]
    jitted = jax.jit(step, out_shardings=(shardings, None))
    key = jax.random.key(1)
    compiled = jitted.lower(state, placed[0], key).compile(compiler_options=QUICK)
    return compiled, state, placed, key


def steps(micro_batches: int, *, frozen: bool, **options: Any) -> dict[str, np.ndarray]:
    """Metrics and changes of the state over some steps, by path."""
    compiled, state, batches, key = prepare(micro_batches, frozen=frozen, **options)
    results: dict[str, np.ndarray] = {}
    for number, rows in enumerate(batches):
        before = state
        state, metrics = compiled(state, rows, key)
        for name, metric in metrics.items():
            results[f"{number}/metric/{name}"] = np.asarray(metric.compute())
        flat = jax.tree_util.tree_flatten_with_path(state)[0]
        for (path, new), old in zip(flat, jax.tree.leaves(before), strict=True):
            name = jax.tree_util.keystr(path)
            changed = np.asarray(new, np.float32) - np.asarray(old, np.float32)
            results[f"{number}{name}"] = changed if ".params" in name else np.asarray(new)
    results["collectives"] = np.array(
        [collective_bytes(compiled.as_text())[k] for k in ("all-gather", "all-to-all")]
    )
    return results


def spectrograms() -> dict[str, np.ndarray]:
    """Spectrograms that devices compute of their rows, those of numpy, and bytes exchanged."""
    spec = experiment.render_spec(small_config("unused", **{"spectrogram.where": "device"}))
    mesh = sharding.create_mesh(1)
    rng = np.random.default_rng(0)
    shape = (VIDEOS, 2, spec.log_mel.frames, spec.log_mel.window)
    windows = rng.integers(-(2**15), 2**15, shape, dtype=np.int16)
    inputs = {**batch(0), "audio_windows": windows}
    prepared = functools.partial(
        prepare_inputs, spec=spec, pixel_mean=0.5, pixel_std=0.5, augmentation=None, key=None
    )
    placed = jax.device_put(inputs, sharding.rows_sharding(mesh))
    compiled = jax.jit(functools.partial(prepared, mesh=mesh)).lower(placed).compile()
    return {
        "spectrogram": np.asarray(compiled(placed)["spectrogram"]),
        "expected": log_mel(windows, spec.log_mel),
        # Only gathers: the condition on the pixels exchanges one boolean by an all-reduce.
        "collectives": np.array(collective_bytes(compiled.as_text())["all-gather"]),
    }


def main(path: str) -> None:
    """Writes the steps on all devices, whole and in two parts, and their spectrograms."""
    assert jax.device_count() == 8
    found = {
        f"{parts}|{name}": value
        for parts in (1, 2)
        for name, value in steps(parts, frozen=True).items()
    }
    np.savez(path, **found, **{f"inputs|{name}": value for name, value in spectrograms().items()})


if __name__ == "__main__":
    main(sys.argv[1])
