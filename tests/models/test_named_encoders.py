"""Encoders by name: published sizes, shapes, masks, constants, and what a name refuses."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avcl_jax import experiment
from avcl_jax.configs import pretrain
from avcl_jax.errors import UserError
from avcl_jax.models import encoders
from avcl_jax.models.audio_encoders import AudioConvNet
from avcl_jax.models.encoders import create_encoder, published_name
from avcl_jax.models.s3d import S3D
from avcl_jax.models.transformers import AudioTransformer, VideoTransformer
from avcl_jax.models.video_resnet import VideoResNet

# Running a network once takes less time than optimising its machine code.
QUICK = {"xla_backend_optimization_level": 0}
CLIP, SPECTROGRAM = (1, 16, 112, 112, 3), (1, 64, 64)
# Input, parameters without classifier, shape of the feature map. Sources are in docs/encoders.md.
PUBLISHED = {
    ("video", "r2plus1d_18"): (CLIP, 31_300_125, (2, 7, 7, 512)),
    ("video", "r2plus1d_34"): (CLIP, 61_626_461, (2, 7, 7, 512)),
    ("video", "r2plus1d_50"): (CLIP, 53_130_091, (2, 7, 7, 2048)),
    ("video", "r3d_18"): (CLIP, 33_166_272, (2, 7, 7, 512)),
    ("video", "mc3_18"): (CLIP, 11_490_240, (16, 7, 7, 512)),
    ("video", "r2plus1d_18_avid"): ((1, 8, 224, 224, 3), 15_379_136, (1, 7, 7, 512)),
    ("video", "s3d"): ((1, 16, 224, 224, 3), 7_910_048, (2, 7, 7, 1024)),
    ("video", "s3dg"): ((1, 16, 224, 224, 3), 9_135_056, (2, 7, 7, 1024)),
    # ViViT counts 117.3 M and 88.9 M with 400 classes, 307,600 parameters of them.
    ("video", "vivit_b"): ((1, 32, 224, 224, 3), 117_319_312 - 307_600, (16, 14, 14, 768)),
    ("video", "vivit_b_joint"): ((1, 32, 224, 224, 3), 88_952_464 - 307_600, (16, 14, 14, 768)),
    ("video", "vivit_s"): ((1, 32, 224, 224, 3), 30_194_304, (16, 14, 14, 384)),
    # torchvision's resnet18 counts 11,176,512; a spectrogram has two input channels fewer.
    ("audio", "resnet_18"): (SPECTROGRAM, 11_176_512 - 2 * 7 * 7 * 64, (2, 2, 512)),
    ("audio", "resnet_9"): (SPECTROGRAM, 4_899_520, (2, 2, 512)),
    ("audio", "conv_10"): ((1, 200, 257), 4_725_696, (13, 17, 512)),
    ("audio", "ast_s"): ((1, 1024, 128), 21_589_632, (64, 8, 384)),
    ("audio", "ast_b"): ((1, 1024, 128), 85_646_592, (64, 8, 768)),
}


def make(modality, name, **settings):
    given = {"subtract_time_mean": False} if modality == "video" else {}
    return create_encoder(modality, name, given | settings)


def test_every_published_name_is_counted():
    named = {
        (modality, name)
        for modality, known in encoders.BY_MODALITY.items()
        for name, architecture in known.items()
        if architecture.fixed
    }
    assert named == set(PUBLISHED)


@pytest.mark.parametrize(("modality", "name"), PUBLISHED)
def test_published_encoder_has_its_size_and_its_name(modality, name):
    shape, parameters, feature_map = PUBLISHED[modality, name]
    encoder = make(modality, name)
    outputs, variables = jax.eval_shape(
        functools.partial(encoder.init_with_output, train=False),
        jax.random.key(0),
        jax.ShapeDtypeStruct(shape, jnp.float32),
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == parameters
    assert outputs["map"].shape == (1, *feature_map)
    assert outputs["features"].shape == (1, feature_map[-1])
    assert published_name(encoder) == name


SMALL = {
    "bottleneck": VideoResNet(
        (4, 6), (1, 1), "r2plus1d", "r2plus1d", block="bottleneck", subtract_time_mean=True
    ),
    "mc3": VideoResNet((4, 6), (1, 1), "mc3", "r3d", subtract_time_mean=False),
    "avid": VideoResNet(
        widths=(4, 6),
        depths=(1, 1),
        factorisation="r2plus1d_plain",
        stem="r3d_pool",
        block="norm_after_sum",
        pool="max",
        subtract_time_mean=False,
    ),
    "s3dg": S3D(width=0.05, gating=True, subtract_time_mean=False),
    "factorised": VideoTransformer(8, 1, 2, (2, 8, 8), "factorised", subtract_time_mean=True),
    "joint": VideoTransformer(8, 1, 2, (2, 8, 8), "joint", subtract_time_mean=False),
    "convnet": AudioConvNet((4, 6), "max"),
    "audio transformer": AudioTransformer(8, 1, 2, (4, 8)),
}


@functools.cache
def initial(name):
    """Input and random variables of a small encoder."""
    encoder = SMALL[name]
    x = small_input(encoder)
    shapes = jax.eval_shape(functools.partial(encoder.init, train=False), jax.random.key(0), x)
    rng = np.random.default_rng(0)
    # Drawn here: compiling the initialisation takes longer than all the rest.
    return x, jax.tree.map(
        lambda leaf: jnp.asarray(
            0.5 + rng.random(leaf.shape)
            if leaf.ndim == 1
            else rng.normal(0, (leaf.size / leaf.shape[-1]) ** -0.5, leaf.shape),
            leaf.dtype,
        ),
        shapes,
    )


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def trained(encoder, variables, x, mask=None):
    """Outputs in training, and the statistics after it."""
    return encoder.apply(variables, x, train=True, mask=mask, mutable=["batch_stats"])


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def evaluated(encoder, variables, x):
    return encoder.apply(variables, x, train=False)


def small_input(encoder):
    audio = isinstance(encoder, AudioConvNet | AudioTransformer)
    clip = (4, 8, 32, 32, 3) if isinstance(encoder, S3D) else (4, 4, 16, 16, 3)
    shape = (4, 16, 16) if audio else clip
    return jax.random.normal(jax.random.key(1), shape)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "s3dg" else n for n in SMALL]
)
def test_rows_are_independent_and_missing_ones_are_not_counted(name):
    """In training, what stands in a missing row changes neither the others nor the statistics."""
    x, variables = initial(name)
    mask = jnp.array([True, True, False, True])
    out, stats = trained(SMALL[name], variables, x, mask)
    other, other_stats = trained(SMALL[name], variables, x.at[2].multiply(30.0), mask)
    assert isinstance(SMALL[name], encoders.EncoderContract)
    assert out.keys() == {"features", "map"}
    features = np.asarray(out["features"])
    assert features.dtype == np.float32
    assert np.ptp(features[np.asarray(mask)], axis=0).max() > 1e-3
    np.testing.assert_allclose(other["features"][mask], features[mask], atol=1e-5)
    assert np.abs(other["features"][2] - features[2]).max() > 1e-4
    for a, b in zip(jax.tree.leaves(stats), jax.tree.leaves(other_stats), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("silenced", ["space", "time"])
def test_factorised_attention_goes_over_one_axis_at_a_time(silenced):
    """Without one of the two attentions, a token is heard along the axis of the other only."""
    encoder = SMALL["factorised"].clone(subtract_time_mean=False)
    x, initialised = initial("factorised")
    variables = jax.tree.map(jnp.asarray, initialised)
    output = variables["params"][f"layer1_{silenced}"]["attention"]["out"]
    output["kernel"] = jnp.zeros_like(output["kernel"])
    changed = x.at[:, :2, :8, :8].multiply(-1.0)  # the first token alone
    moved = np.abs(
        evaluated(encoder, variables, changed)["map"] - evaluated(encoder, variables, x)["map"]
    ).max(axis=(0, -1))
    reached = np.zeros(moved.shape, bool)
    reached[(slice(None), 0, 0) if silenced == "space" else 0] = True
    assert moved[reached].min() > 1e-4
    assert moved[~reached].max() == 0


@pytest.mark.parametrize("name", ["mc3", "convnet", pytest.param("s3dg", marks=pytest.mark.slow)])
def test_frozen_normalisation_uses_and_keeps_the_running_statistics(name):
    encoder = SMALL[name]
    x, variables = initial(name)
    # Statistics that are not those of this batch, nor those of a fresh encoder.
    variables = variables | {
        "batch_stats": jax.tree.map(lambda leaf: leaf + 0.25, variables["batch_stats"])
    }
    out, mutated = trained(encoder.clone(freeze_norm=True), variables, x)
    expected = evaluated(encoder, variables, x)["features"]
    np.testing.assert_allclose(out["features"], expected, atol=1e-5)
    kept = mutated.get("batch_stats", variables["batch_stats"])
    jax.tree.map(np.testing.assert_array_equal, kept, variables["batch_stats"])


def test_constants_of_normalisation_reach_the_layers():
    x, variables = initial("convnet")
    usual, fast = trained(SMALL["convnet"], variables, x)
    slow_encoder = SMALL["convnet"].clone(norm_momentum=0.999, norm_epsilon=1.0)
    out, slow = trained(slow_encoder, variables, x)
    before, slow_mean, fast_mean = (
        s["batch_stats"]["stem_norm"]["norm"]["mean"] for s in (variables, slow, fast)
    )
    np.testing.assert_allclose(100 * (slow_mean - before), fast_mean - before, rtol=1e-2, atol=1e-4)
    assert np.abs(out["features"] - usual["features"]).max() > 0.01


def test_colours_are_standardised_before_anything_else():
    plain = SMALL["mc3"]
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    coloured = plain.clone(channel_mean=mean, channel_std=std)
    x = jax.random.uniform(jax.random.key(2), (2, 4, 16, 16, 3))
    _, variables = initial("mc3")
    by_hand = ((np.asarray(x) - np.float32(mean)) / np.float32(std)).astype(np.float32)
    np.testing.assert_allclose(
        evaluated(coloured, variables, x)["features"],
        evaluated(plain, variables, by_hand)["features"],
        rtol=1e-4,
        atol=1e-5,
    )
    with pytest.raises(ValueError, match="come together"):
        plain.clone(channel_mean=mean).apply(variables, x, train=False)


@pytest.mark.parametrize("longer", [6, 1])
@pytest.mark.parametrize("name", ["joint", "factorised", "audio transformer"])
def test_positions_of_another_grid_are_interpolated(name, longer):
    """As numpy interpolates along each axis between the centres of the patches."""
    encoder = SMALL[name]
    x, variables = initial(name)
    patch = encoder.patch if name.startswith("audio") else encoder.tubelet
    # Another length in time and, where it grows, another height or number of mels.
    sizes = [longer * patch[0], x.shape[2] * (1 + (longer > 1)), *x.shape[3:]]
    x = jax.random.normal(jax.random.key(2), (2, *sizes))
    positions = np.asarray(variables["params"]["positions"])
    assert np.ptp(positions) > 0.1
    expected = positions
    for axis, size in enumerate(patch, start=1):
        count, trained = x.shape[axis] // size, positions.shape[axis]
        centres = (np.arange(count) + 0.5) * trained / count - 0.5

        def interpolate(values, centres=centres, trained=trained):
            return np.interp(centres, np.arange(trained), values)

        expected = np.apply_along_axis(interpolate, axis, expected)
    assert expected.shape != positions.shape
    whole = {"params": variables["params"] | {"positions": jnp.asarray(expected, jnp.float32)}}
    np.testing.assert_allclose(
        evaluated(encoder, variables, x)["features"],
        evaluated(encoder, whole, x)["features"],
        atol=1e-5,
    )


def test_a_general_name_reads_its_own_section_and_a_setting_of_no_encoder_is_refused():
    config = pretrain.get_config()
    settings = {"model.video.name": "transformer", "model.video.transformer.depth": 2}
    config.update_from_flattened_dict(settings)
    encoder = experiment.encoder(config, "video")
    assert (type(encoder), encoder.depth, encoder.tubelet) == (VideoTransformer, 2, (2, 8, 8))
    for name in ("inception", "resnet"):
        config.model.video.name = name
        assert type(experiment.encoder(config, "video")) is encoders.VIDEO[name].encoder
    for name in ("convnet", "transformer", "resnet"):
        config.model.audio.name = name
        assert type(experiment.encoder(config, "audio")) is encoders.AUDIO[name].encoder
    with config.unlocked():
        config.model.video.widths = (24, 48)  # as runs of older versions have it
    with pytest.raises(ValueError, match=r"model.video has no setting 'widths': it has channel_"):
        experiment.encoder(config, "video")


def test_what_a_name_does_not_allow_is_one_clear_error():
    with pytest.raises(
        ValueError, match=r"unknown video encoder 'r2d2': use one of resnet, r2plus"
    ):
        create_encoder("video", "r2d2", {})
    with pytest.raises(ValueError, match=r"'r3d_18' fixes stem to 'r3d': leave stem out.*resnet"):
        make("video", "r3d_18", stem="r2plus1d")
    with pytest.raises(ValueError, match=r"'vivit_s' has no setting 'lowering': it has atten"):
        make("video", "vivit_s", lowering="auto")
    with pytest.raises(ValueError, match=r"the audio encoder 'convnet' needs the setting 'pool'"):
        create_encoder("audio", "convnet", {"widths": (4,)})
    with pytest.raises(ValueError, match=r"tubelet \(2, 16, 16\) must divide the clip's 8x40x32"):
        jax.eval_shape(
            functools.partial(make("video", "vivit_s").init, train=False),
            jax.random.key(0),
            jnp.zeros((1, 8, 40, 32, 3)),
        )
    with pytest.raises(ValueError, match="at least 8 frames of 32x32, got 4 of 32x32"):
        SMALL["s3dg"].init(jax.random.key(0), jnp.zeros((1, 4, 32, 32, 3)), train=False)


@pytest.mark.parametrize(
    ("preset", "error"),
    [
        ("demo", "48x40: set spectrogram.mels"),
        ("kinetics400", "24x80: set spectrogram.frames"),
    ],
)
@pytest.mark.parametrize(("modality", "name"), PUBLISHED)
def test_a_published_name_is_all_that_a_preset_needs(preset, error, modality, name):
    """But that the patches of AST must divide the spectrogram; the error proposes what to set."""
    config = pretrain.get_config(preset)
    config.update_from_flattened_dict({f"model.{modality}.name": name})
    encoder = getattr(experiment.audio_visual_model(config), f"{modality}_encoder")
    assert published_name(encoder) == name
    assert encoder.dtype == jnp.dtype(config.model.dtype)
    shape = experiment.render_spec(config).batch_shapes(1)["video"][0][1:]
    if modality == "audio":
        shape = (1, config.spectrogram.frames, config.spectrogram.mels)
    init = functools.partial(encoder.init, train=False)
    if name.startswith("ast"):
        with pytest.raises(UserError, match=error):
            jax.eval_shape(init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))
        shape = (1, 32, 80)
    shapes = jax.eval_shape(init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))
    assert shapes["params"]
