"""Every preset of fine-tuning builds, and full-size steps lower."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from avcl_jax import experiment
from avcl_jax.data.selection import Selection
from avcl_jax.evaluation.classifier import (
    FROZEN,
    ClipClassifier,
    Inputs,
    classifier_training,
    parts,
)
from avcl_jax.evaluation.finetune import clip_spec, optimizer_of, protocol_of
from avcl_jax.export import Encoder
from avcl_jax.training.sharding import create_mesh
from configs import finetune, pretrain

PRESETS = ("demo", "demo_audio", "ucf101", "hmdb51", "kinetics400", "esc50", "esc10", "vggsound")
RECORDS = {"ucf101": 9537, "hmdb51": 3570, "esc50": 1600, "esc10": 320}


def encoder_for(preset: str, modality: str) -> Encoder:
    """The encoder that the preset is meant for, without weights."""
    config = pretrain.get_config("demo" if preset.startswith(("demo", "esc10")) else "kinetics400")
    module = experiment.encoder(config, modality)
    preprocessing = experiment.preprocessings(config)[modality]
    return Encoder.of_module(module, {}, preprocessing, source={})


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_says_clips_splits_and_a_schedule(preset):
    config = finetune.get_config(preset)
    spec = clip_spec(config, encoder_for(preset, config.modality))
    assert spec.modality == config.modality
    pairs = list(zip(config.data.train_select, config.data.test_select, strict=True))
    assert len(pairs) == {"ucf101": 3, "hmdb51": 3, "esc50": 5, "esc10": 5}.get(preset, 1)
    for train, test in pairs:
        assert str(Selection.parse(train)) == train != test or train == test == ""
    records = RECORDS.get(preset, 100_000)
    _, schedule, steps = optimizer_of(config, records)
    assert steps == round(config.epochs * records / config.global_batch_size)
    rates = [float(schedule(step)) for step in (steps // 2, steps - 1)]
    assert config.optimizer.learning_rate >= rates[0] > rates[1] >= 0
    assert "trained together" in protocol_of(config).definition[0]


@pytest.mark.parametrize(
    ("preset", "trained"), [("ucf101", 31_300_125 + 101 * 513), ("esc50", None)]
)
@pytest.mark.slow
def test_a_full_size_step_lowers(preset, trained):
    config = finetune.get_config(preset)
    encoder = encoder_for(preset, config.modality)
    spec = clip_spec(config, encoder)
    classes = {"ucf101": 101, "esc50": 50}[preset]
    classifier = ClipClassifier(
        encoder=encoder.module.clone(dtype=jnp.dtype(config.model.dtype)),
        heads={"head": classes},
        dropout=config.head.dropout,
        train_statistics=config.batch_norm == "train",
    )
    optimizer, schedule, _ = optimizer_of(config, RECORDS[preset])
    key = jax.random.key(0)
    example = jax.ShapeDtypeStruct((1, *encoder.input_shape), jnp.float32)
    weights = jax.eval_shape(
        lambda key, clip: encoder.module.init(key, clip, train=False), key, example
    )

    inputs = Inputs(
        spec,
        encoder.preprocess,
        experiment.augmentation(config),
    )

    steps = []

    def create(weights):
        state, step = classifier_training(
            classifier,
            optimizer,
            dataclasses.replace(encoder, params=weights),
            inputs,
            freeze=tuple(config.freeze),
            schedule=schedule,
            label_smoothing=config.label_smoothing,
            key=key,
            mesh=create_mesh(1),
        )
        steps.append(step)
        return state

    state = jax.eval_shape(create, weights)
    names = jax.tree.leaves(parts(state.params, tuple(config.freeze)))
    leaves = zip(jax.tree.leaves(state.params), names, strict=True)
    if trained is not None:
        assert sum(leaf.size for leaf, part in leaves if part != FROZEN) == trained
    rows = config.global_batch_size
    batch = {
        "clips": jax.ShapeDtypeStruct((rows, *spec.shape), spec.dtype),
        "label": jax.ShapeDtypeStruct((rows,), jnp.int32),
        "record_index": jax.ShapeDtypeStruct((rows,), jnp.int32),
    }
    assert "convolution" in steps[0].lower(state, batch).as_text()
