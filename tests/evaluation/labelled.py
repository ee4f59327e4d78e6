"""A labelled data set, encoders and a config with which classifiers train in seconds."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from avcl_jax import experiment
from avcl_jax.configs import finetune
from avcl_jax.data.records import Record
from avcl_jax.export import Encoder, export_encoder
from tests.evaluation.conftest import FPS, record_of, write_records
from tests.training.small import small_config

COUNT, RATE_HZ, SIDE, SECONDS = 96, 16_000, 24, 1.0
COLOURS = ((200, 40, 40), (40, 200, 40), (40, 40, 200))
NAMES = {
    "class": ["red", "green", "blue"],
    "shuffled": ["a", "b", "c"],
    "split1": ["test", "train", "unused"],
    "split2": ["test", "train", "unused"],
    "part": ["labelled", "unlabelled", "silent", "mixed"],
}
# Overrides of configs/finetune.py for tests: the same code, small numbers.
OVERRIDES = {
    "data.label": "class",
    "execution.workers": 0,
    "execution.threads": 2,
    "data.train_split": "all",
    "data.test_split": "all",
    "data.train_select": ("split1=train",),
    "data.test_select": ("split1=test",),
    "clip.seconds": 0.0,
    "clip.num_frames": 0,
    "clip.image_size": 0,
    "photometric.hue": 0.0,
    "photometric.gray_probability": 0.0,
    "global_batch_size": 16,
    "epochs": 6.0,
    "optimizer.warmup_epochs": 0.5,
    "optimizer.learning_rate": 1e-2,
    "test.clips": 2,
    "execution.chunk": 16,
    "bootstrap.resamples": 50,
    "execution.log_every": 4,
    "execution.checkpoint_every": 9,
    "execution.keep_checkpoints": 2,
}


def make_record(number: int, shuffled: int) -> Record:
    """Pictures of one colour and a tone of one pitch, both of the class `number % 3`."""
    rng = np.random.default_rng(number)
    kind = number % 3
    pictures = rng.normal(COLOURS[kind], 20, size=(round(SECONDS * FPS), SIDE, SIDE, 3))
    seconds = np.arange(round(SECONDS * RATE_HZ)) / RATE_HZ
    tone = 6000 * np.sin(2 * np.pi * (400, 1200, 3600)[kind] * seconds)
    silent = number % 16 == 15
    # Every fourth record is in no list, so that "not train" is not "test".
    split1 = 2 if number % 4 == 3 else int(number % 2 == 0)
    split2 = 2 if number % 4 == 3 else int(number % 2 == 1 or number > COUNT // 2)
    unlabelled = number % 32 == 7
    part = 1 if unlabelled else 2 if silent else 3 if number % 16 == 11 else 0
    waveform = np.empty(0) if silent else tone + rng.normal(0, 300, len(seconds))
    labels = {
        "class": -1 if unlabelled else kind,
        "shuffled": shuffled,
        "split1": split1,
        "split2": split2,
        "part": part,
    }
    name, source = f"clip {number}", f"video {number // 2}"
    return record_of(name, source, pictures, waveform, labels, seconds=SECONDS, rate_hz=RATE_HZ)


def write_labelled(directory: Path) -> Path:
    """Writes the data set, one split `all`; returns its directory."""
    shuffled = np.random.default_rng(3).integers(3, size=COUNT).tolist()
    records = [make_record(number, shuffled[number]) for number in range(COUNT)]
    directory.mkdir(parents=True)
    return write_records(directory, "toy", NAMES, {"all": records})


def make_encoders(seed: int = 0, **overrides: object) -> dict[str, Encoder]:
    """Newly drawn encoders of both modalities, a few thousand parameters each."""
    # The demo's encoder sees only what moves; these classes are colours.
    moving = {"model.video.subtract_time_mean": False}
    config = small_config(Path("unused"), **moving | overrides)
    encoders = {}
    modules = {
        "video": experiment.encoder(config, "video"),
        "audio": experiment.encoder(config, "audio"),
    }
    for modality, preprocessing in experiment.preprocessings(config).items():
        empty = Encoder.of_module(modules[modality], {}, preprocessing, source={"step": 0})
        encoders[modality] = dataclasses.replace(empty, params=drawn_weights(empty, seed))
    return encoders


def drawn_weights(encoder: Encoder, seed: int) -> dict[str, Any]:
    """Weights without a program that initialises them: compiling that takes seconds."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(
        functools.partial(encoder.module.init, train=False),
        jax.random.key(0),
        jax.ShapeDtypeStruct((1, *encoder.input_shape), jnp.float32),
    )

    def draw(path: Any, leaf: Any) -> np.ndarray:
        if path[-1].key == "kernel":
            fan_in = np.prod(leaf.shape[:-1])
            return rng.normal(0, np.sqrt(2 / fan_in), leaf.shape).astype(np.float32)
        ones = path[-1].key in ("scale", "var")
        return np.full(leaf.shape, float(ones), np.float32)

    return dict(jax.tree_util.tree_map_with_path(draw, shapes))


def write_encoders(
    directory: Path,
    seed: int = 0,
    overrides: Mapping[str, object] = MappingProxyType({}),
    **source: object,
) -> Path:
    """Exports `make_encoders`, without the StableHLO that nothing here runs.

    Args:
        directory: where to.
        seed: of the weights.
        overrides: of their config.
        source: what else they say of where they come from; `data` is what they were trained on.
    """
    with mock.patch("avcl_jax.export.encoder._stablehlo", return_value=b""):
        for modality, encoder in make_encoders(seed, **overrides).items():
            export_encoder(
                directory / modality,
                encoder=encoder.module,
                params=encoder.params,
                preprocessing=encoder.preprocess,
                source={"step": 0} | source,
            )
    return directory


def toy_config(
    records: Path, encoders: Path, *, preset: str = "demo", **overrides
) -> ml_collections.ConfigDict:
    """A small config; `**{"a.b": 1}` overrides `config.a.b`."""
    config = finetune.get_config(preset)
    given = {"data.directory": str(records), "encoder": str(encoders)}
    with config.unlocked():
        config.update_from_flattened_dict(OVERRIDES | given | overrides)
    return config
