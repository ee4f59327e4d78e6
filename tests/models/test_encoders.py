"""Encoders and heads: published sizes, masks, and the same function however it is lowered."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avcl_jax import experiment
from avcl_jax.configs import pretrain
from avcl_jax.models.audio_encoders import AudioResNet
from avcl_jax.models.audio_visual import AudioVisualModel
from avcl_jax.models.convolution import matrix_unit
from avcl_jax.models.heads import normalize
from avcl_jax.models.video_resnet import VideoResNet

SMALL_VIDEO = VideoResNet((8, 12), (1, 1), "r2plus1d_plain", "patch4", subtract_time_mean=True)
SMALL_AUDIO = AudioResNet((8, 12), (1, 1), "patch", (2, 4))
MODEL = AudioVisualModel(SMALL_VIDEO, SMALL_AUDIO, 16, 20, 24, (1, 2, 4, 8))


@pytest.fixture(scope="module")
def inputs():
    keys = jax.random.split(jax.random.key(3))
    return {
        "video": jax.random.normal(keys[0], (5, 2, 4, 16, 16, 3)),
        "spectrogram": jax.random.normal(keys[1], (5, 2, 8, 16)),
        "has_video": jnp.array([True, True, False, True, True]),
        "has_audio": jnp.array([True, True, True, False, True]),
    }


@pytest.fixture(scope="module")
def variables(inputs):
    # Jitted: op by op it takes five times as long.
    return jax.jit(MODEL.init, static_argnames="train")(jax.random.key(0), **inputs, train=False)


def test_outputs_have_their_shapes_and_unit_norm(inputs, variables):
    out = MODEL.apply(variables, **inputs, train=False)
    shapes = {name: value.shape for name, value in out.items()}
    assert shapes == {
        "video_features": (5, 2, 12),
        "audio_features": (5, 2, 12),
        "video_embeddings": (5, 2, 16),
        "audio_embeddings": (5, 2, 16),
        "speed_video": (5, 2, 4),
        "speed_audio": (5, 2, 4),
        "direction_video": (5, 2, 2),
        "direction_audio": (5, 2, 2),
        "order_vv": (5, 3),
        "order_aa": (5, 3),
        "order_va": (5, 2, 3),
    }
    for name in ("video_embeddings", "audio_embeddings"):
        np.testing.assert_allclose(np.linalg.norm(out[name], axis=-1), 1.0, rtol=1e-5)


def test_missing_rows_do_not_touch_the_others(inputs, variables):
    def features(inputs):
        return MODEL.apply(variables, **inputs, train=True, mutable=["batch_stats"])

    out, stats = features(inputs)
    spoiled = inputs | {
        "video": inputs["video"].at[2].set(50.0),
        "spectrogram": inputs["spectrogram"].at[3].set(50.0),
    }
    other, other_stats = features(spoiled)
    np.testing.assert_allclose(
        np.delete(other["video_features"], 2, 0), np.delete(out["video_features"], 2, 0), atol=1e-5
    )
    np.testing.assert_allclose(
        np.delete(other["audio_features"], 3, 0), np.delete(out["audio_features"], 3, 0), atol=1e-5
    )
    both = np.asarray(inputs["has_video"] & inputs["has_audio"])
    np.testing.assert_allclose(other["order_va"][both], out["order_va"][both], atol=1e-4)
    for a, b in zip(jax.tree.leaves(stats), jax.tree.leaves(other_stats), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_order_va_pairs_one_view_with_the_other(inputs, variables):
    """Changing the sound of view 2 changes (v1, a2) and leaves (v2, a1)."""
    out = MODEL.apply(variables, **inputs, train=False)["order_va"]
    changed = inputs | {"spectrogram": inputs["spectrogram"].at[:, 1].multiply(-2.0)}
    other = MODEL.apply(variables, **changed, train=False)["order_va"]
    assert np.abs(other[:, 0] - out[:, 0]).max() > 1e-3
    np.testing.assert_array_equal(other[:, 1], out[:, 1])


def test_subtracting_the_time_mean_hides_what_stands_still():
    x = jax.random.normal(jax.random.key(0), (2, 4, 16, 16, 3))
    still = jax.random.normal(jax.random.key(1), (2, 1, 16, 16, 3))
    variables = SMALL_VIDEO.init(jax.random.key(2), x, train=False)
    plain = SMALL_VIDEO.apply(variables, x, train=False)["features"]
    moved = SMALL_VIDEO.apply(variables, x + still, train=False)["features"]
    np.testing.assert_allclose(moved, plain, atol=1e-4)
    keeps = dataclasses.replace(SMALL_VIDEO, subtract_time_mean=False)
    itself = keeps.apply(variables, x - x.mean(axis=1, keepdims=True), train=False)["features"]
    np.testing.assert_allclose(plain, itself, atol=1e-5)
    assert np.abs(keeps.apply(variables, x + still, train=False)["features"] - plain).max() > 0.01


def of_stages(unit, **settings):
    return VideoResNet(
        (4, 8, 16),
        (1, 1, 1),
        "r2plus1d",
        "r2plus1d",
        subtract_time_mean=True,
        lowering="direct",
        matrix_unit=unit,
        **settings,
    )


@pytest.mark.parametrize(
    ("unit", "columns", "packs"),
    [
        (1, 32, [1, 1, 1]),
        (8, 32, [2, 1, 1]),
        (16, 32, [4, 2, 1]),
        (1024, 32, [4, 2, 1]),  # an end with single pixels, at most twice as many a stage
        (16, 36, [2, 1, 1]),
        (16, 30, [1, 1, 1]),
    ],
)
def test_neighbouring_pixels_fill_a_matrix_unit_where_rows_allow_it(unit, columns, packs):
    assert of_stages(unit)._packs(columns) == packs
    assert of_stages(unit, block="bottleneck")._packs(columns) == [1, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize(("unit", "columns"), [(16, 32), (16, 20)])
def test_packed_pixels_give_the_results_of_single_ones(unit, columns):
    keys = iter(jax.random.split(jax.random.key(3), 200))
    video = jax.random.normal(next(keys), (3, 2, 8, columns, 3))
    mask = jnp.array([True, True, False])
    variables = of_stages(1).init(jax.random.key(1), video, train=False)
    own = of_stages(unit).init(jax.random.key(1), video, train=False)
    jax.tree.map(np.testing.assert_array_equal, variables, own)
    # Scales that are zero would hide whole branches.
    variables = jax.tree.map(
        lambda leaf: leaf + 0.1 * jax.random.uniform(next(keys), leaf.shape), variables
    )

    def run(unit):
        def loss(params):
            out, mutated = of_stages(unit).apply(
                variables | {"params": params},
                video,
                train=True,
                mask=mask,
                mutable=["batch_stats"],
            )
            return jnp.sin(out["map"]).sum(), (out, mutated)

        return jax.jit(jax.grad(loss, has_aux=True))(variables["params"])

    (gradients, outputs), (expected_gradients, expected) = run(unit), run(1)
    jax.tree.map(lambda *a: np.testing.assert_allclose(*a, atol=1e-4), outputs, expected)
    # Rounding moves a value near zero to the other side of a ReLU.
    for got, wanted in zip(*map(jax.tree.leaves, (gradients, expected_gradients)), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-2 * float(jnp.abs(wanted).max()))


def test_only_a_chip_with_such_units_and_the_lowering_auto_pack_pixels():
    assert matrix_unit("TPU v5 lite") == 128
    assert matrix_unit(jax.devices()[0].device_kind) == 1
    config = pretrain.get_config("kinetics400")
    for lowering, unit in (("auto", 128), ("direct", 1)):
        config.model.video.lowering = lowering
        video = experiment.audio_visual_model(config, matrix_unit=128).video_encoder
        assert video.matrix_unit == unit
    assert experiment.audio_visual_model(config).video_encoder.matrix_unit == 1


def test_normalize_is_finite_at_zero():
    gradient = jax.grad(lambda x: normalize(x).sum())(jnp.zeros((2, 3)))
    assert np.isfinite(gradient).all()


def test_what_does_not_fit_is_one_clear_error():
    clip = jnp.zeros((1, 4, 18, 16, 3))
    with pytest.raises(
        ValueError, match=r"stem 'patch4' \(1, 4, 4\) must divide .* 4x18x16: set i"
    ):
        SMALL_VIDEO.init(jax.random.key(0), clip, train=False)
    with pytest.raises(ValueError, match=r"patch \(2, 4\) must divide the spectrogram's 8x15"):
        SMALL_AUDIO.init(jax.random.key(0), jnp.zeros((1, 8, 15)), train=False)
    wrong = dataclasses.replace(SMALL_VIDEO, depths=(1,))
    with pytest.raises(ValueError, match="equally long"):
        wrong.init(jax.random.key(0), jnp.zeros((1, 4, 16, 16, 3)), train=False)
