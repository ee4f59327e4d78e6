"""Parts of fine-tuning: mean softmax, what is trained and how fast, presets and full-size steps."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from scipy.special import softmax

from avcl_jax import experiment
from avcl_jax.configs import finetune, pretrain
from avcl_jax.data.clips import ClipRecords, VideoClipSpec
from avcl_jax.data.records import RecordDataset
from avcl_jax.data.render_spec import CropSpec
from avcl_jax.data.selection import Selection
from avcl_jax.data.spectrogram import log_mel
from avcl_jax.data.views import ViewSpec
from avcl_jax.errors import UserError
from avcl_jax.evaluation.classifier import (
    FROZEN,
    ClipClassifier,
    Inputs,
    classifier_training,
    parts,
    predict,
)
from avcl_jax.evaluation.finetune import clip_spec, optimizer_of, protocol_of
from avcl_jax.export import Encoder
from avcl_jax.models.encoders import create_encoder
from avcl_jax.training.sharding import create_mesh
from tests.evaluation.labelled import make_encoders, toy_config, write_labelled


def test_the_prediction_is_the_mean_softmax_over_ten_clips(tmp_path):
    records = write_labelled(tmp_path / "records")
    config = toy_config(records, tmp_path)
    encoder = make_encoders()["video"]
    spec = clip_spec(config, encoder)
    inputs = Inputs(spec, encoder.preprocess, experiment.augmentation(config))
    data, unused = RecordDataset(records, "all"), Selection.parse("split1=unused")
    source = ClipRecords(data, unused, spec, ("shuffled",))
    classifier = ClipClassifier(encoder.module, {"head": 3}, 0.5)
    rng = np.random.default_rng(0)
    kernel = rng.normal(0, 3, (12, 3)).astype(np.float32)
    head = {"kernel": kernel, "bias": np.array([0.1, -0.2, 0.0], np.float32)}
    variables = {
        "params": {"encoder": encoder.params["params"], "head": head},
        "batch_stats": {"encoder": encoder.params["batch_stats"]},
    }
    found = predict(
        classifier,
        variables,
        inputs,
        source,
        clips=10,
        crops=1,
        chunk=5,  # 24 records do not fill it
        part_records=1024,
        threads=1,
        directory=epath.Path(tmp_path / "predictions"),
    )
    assert found.shape == (24, 3)
    encode = jax.jit(encoder.apply)
    for position in (0, 1, 23):
        clips = source.fixed(position, clips=10)
        features = np.asarray(encode(encoder.params, clips))
        assert features.shape == (10, 12)
        by_hand = softmax(features @ head["kernel"] + head["bias"], axis=-1).mean(axis=0)
        np.testing.assert_allclose(found[position], by_hand, atol=1e-5)
        assert np.abs(softmax(features.mean(axis=0) @ head["kernel"]) - by_hand).max() > 1e-4


@pytest.mark.parametrize(("modality", "preset"), [("video", "demo"), ("audio", "demo_audio")])
def test_inputs_are_augmented_in_training_alone(modality, preset):
    config, encoder = toy_config("unused", "unused", preset=preset), make_encoders()[modality]
    spec = clip_spec(config, encoder)
    inputs = Inputs(spec, encoder.preprocess, experiment.augmentation(config))
    clips = np.random.default_rng(0).integers(0, 255, (2, *spec.shape)).astype(spec.dtype)
    audio = modality == "audio"
    plain = log_mel(clips, spec.log_mel) if audio else encoder.preprocess.standardise(clips)
    np.testing.assert_allclose(inputs(clips, None), plain, atol=1e-4)
    first, second = (np.asarray(inputs(clips, jax.random.key(n))) for n in (0, 1))
    assert min(np.abs(first - plain).max(), np.abs(first - second).max()) > 0.01


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_head_has_a_learning_rate_of_its_own_and_begins_alone(name):
    config = toy_config(
        "unused",
        "unused",
        **{
            "freeze": ("encoder/stem",),
            "epochs": 8.0,
            "optimizer.name": name,
            "optimizer.schedule": "multistep",
            "optimizer.warmup_epochs": 0.0,
            "optimizer.learning_rate": 0.1,
            "optimizer.momentum": 0.0,
            "optimizer.weight_decay": 0.0,
            "optimizer.clip_norm": 0.0,
            "optimizer.head_factor": 5.0,
            "optimizer.head_epochs": 2.0,
        },
    )
    optimizer, schedule, steps = optimizer_of(config, config.global_batch_size)
    assert (steps, float(schedule(0))) == (8, pytest.approx(0.1))
    params = {"encoder": {"stem": jnp.ones(2), "layer": jnp.ones(2)}, "head": {"w": jnp.ones(2)}}
    gradients = jax.tree.map(jnp.ones_like, params)
    state = optimizer.init(params)
    moved = []
    for _ in range(4):
        updates, state = optimizer.update(gradients, state, params)
        encoder = updates["encoder"]
        moved.append(
            [float(u[0]) for u in (encoder["stem"], encoder["layer"], updates["head"]["w"])]
        )
    alone, both = [0, 0, -0.5], [0, -0.1, -0.5]
    np.testing.assert_allclose(moved, [alone, alone, both, both], rtol=1e-5)


def test_names_say_which_layers_are_frozen():
    params = {
        "encoder": {"stem_conv": {"kernel": 1}, "stem_norm": {"scale": 1}, "layer": {"kernel": 1}},
        "head": {"kernel": 1},
    }
    encoder = {"stem_conv": "frozen", "stem_norm": "frozen", "layer": "encoder"}
    some = parts(params, ("encoder/stem",))
    assert {name: set(tree.values()) for name, tree in some["encoder"].items()} == {
        name: {part} for name, part in encoder.items()
    }
    assert some["head"] == {"kernel": "head"}
    assert set(jax.tree.leaves(parts(params, ()))) == {"encoder", "head"}
    with pytest.raises(UserError, match="leaves no layer of the encoder to train"):
        parts(params, ("encoder/stem", "encoder/layer"))
    for wrong in ("layer", "head", ""):
        with pytest.raises(UserError, match=re.escape(f"freeze {wrong!r} must name layers")):
            parts(params, (wrong,))


def test_clips_that_tubelets_do_not_fill_are_refused():
    encoder = make_encoders()["video"]
    settings = {"width": 8, "depth": 1, "heads": 2, "tubelet": (2, 8, 8), "attention": "joint"}
    settings["subtract_time_mean"] = False
    module = create_encoder("video", "transformer", settings)
    shapes = jax.eval_shape(
        functools.partial(module.init, train=False),
        jax.random.key(0),
        jax.ShapeDtypeStruct((1, *encoder.input_shape), jnp.float32),
    )
    weights = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), dict(shapes))
    crop = CropSpec(16, 1.0, False, False)
    seven_frames = VideoClipSpec(ViewSpec(7, 0.5, (1,), "shared"), crop)
    message = "must divide the clip's 7x16x16: set num_frames to a multiple of 2"
    with pytest.raises(ValueError, match=message):
        classifier_training(
            ClipClassifier(module, {"head": 3}),
            optax.sgd(0.1),
            dataclasses.replace(encoder, params=weights),
            Inputs(seven_frames, encoder.preprocess, (None, None)),
            freeze=(),
            schedule=optax.constant_schedule(0.1),
            label_smoothing=0.0,
            key=jax.random.key(0),
            mesh=create_mesh(1),
        )


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

    inputs = Inputs(spec, encoder.preprocess, experiment.augmentation(config))

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
