"""The classifier's parts: mean softmax, feature standardisation, what is trained and how fast."""

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

from avcl_jax import experiment
from avcl_jax.data.clips import ClipRecords, VideoClipSpec
from avcl_jax.data.images import CropSpec
from avcl_jax.data.records import RecordDataset
from avcl_jax.data.selection import Selection
from avcl_jax.data.views import ViewSpec
from avcl_jax.errors import UserError
from avcl_jax.evaluation.classifier import (
    ClipClassifier,
    Inputs,
    classifier_training,
    parts,
    predict,
)
from avcl_jax.evaluation.finetune import clip_spec, optimizer_of
from avcl_jax.models.encoders import create_encoder
from avcl_jax.training.sharding import create_mesh
from tests.evaluation.labelled import make_encoders, toy_config, write_labelled


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def test_the_prediction_is_the_mean_softmax_over_ten_clips(tmp_path):
    records = write_labelled(tmp_path / "records")
    config = toy_config(records, tmp_path)
    encoder = make_encoders()["video"]
    spec = clip_spec(config, encoder)
    inputs = Inputs(
        spec,
        encoder.preprocess,
        experiment.augmentation(config),
    )
    source = ClipRecords(
        RecordDataset(records, "all"), Selection.parse("split1=unused"), spec, ("shuffled",)
    )
    classifier = ClipClassifier(encoder.module, {"head": 3}, 0.5)
    rng = np.random.default_rng(0)
    head = {
        "kernel": rng.normal(0, 3, (12, 3)).astype(np.float32),
        "bias": np.array([0.1, -0.2, 0.0], np.float32),
    }
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
        by_hand = softmax(features @ head["kernel"] + head["bias"]).mean(axis=0)
        np.testing.assert_allclose(found[position], by_hand, atol=1e-5)
        assert np.abs(softmax(features.mean(axis=0) @ head["kernel"]) - by_hand).max() > 1e-4


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
    module = create_encoder(
        "video",
        "transformer",
        {
            "width": 8,
            "depth": 1,
            "heads": 2,
            "tubelet": (2, 8, 8),
            "attention": "joint",
            "subtract_time_mean": False,
        },
    )
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
            dataclasses.replace(encoder, module=module, params=weights),
            Inputs(seven_frames, encoder.preprocess, (None, None)),
            freeze=(),
            schedule=optax.constant_schedule(0.1),
            label_smoothing=0.0,
            key=jax.random.key(0),
            mesh=create_mesh(1),
        )
