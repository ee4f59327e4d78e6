"""Weights under PyTorch's names: what is read, what is refused by name, and the way back."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from avcl_jax import experiment
from avcl_jax.configs import export as export_config
from avcl_jax.configs import import_weights as import_config
from avcl_jax.data.preprocessing import VideoPreprocessing
from avcl_jax.errors import UserError
from avcl_jax.export import export_encoder, load_encoder
from avcl_jax.export.torch_names import kernel_from_torch, kernel_to_torch
from avcl_jax.export.torch_weights import (
    export_weights,
    from_torch,
    import_weights,
    read_state_dict,
    to_torch,
)
from avcl_jax.models.encoders import create_encoder
from avcl_jax.models.video_resnet import VideoResNet

# Names and shapes of the state dicts of AVID-CMA's and GDT's whole models, written by
# tests/models/testdata/make_state_dict_shapes.py.
SHAPES = Path(__file__).parent / "models" / "testdata"
ENCODERS = {
    ("avid", "r2plus1d_18_avid"): "video",
    ("avid", "conv_10"): "audio",
    ("gdt", "r2plus1d_18"): "video",
    ("gdt", "resnet_9"): "audio",
}


def state_dict(code_base: str) -> dict[str, np.ndarray]:
    shapes = json.loads((SHAPES / f"{code_base}.json").read_text())
    return {
        name: np.zeros(shape, np.int64 if name.endswith("tracked") else np.float32)
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize(("code_base", "name"), ENCODERS)
def test_names_and_shapes_of_published_code_are_all_accounted_for(code_base, name):
    modality = ENCODERS[code_base, name]
    state = state_dict(code_base)
    variables = from_torch(state, code_base=code_base, name=name, modality=modality)
    back = to_torch(variables, code_base=code_base, name=name, modality=modality)
    encoder = {"video": ("video_model.", "video_network."), "audio": ("audio_model.", "audio_net")}
    theirs = {
        key: array.shape
        for key, array in state.items()
        if key.startswith(encoder[modality])
        and not key.endswith("num_batches_tracked")
        and not key.startswith("audio_network.base.fc.")
    }
    assert {key: array.shape for key, array in back.items()} == theirs


def test_what_is_missing_left_over_or_of_another_shape_is_named():
    state = state_dict("avid")

    def load():
        return from_torch(state, code_base="avid", name="conv_10", modality="audio")

    load()
    state["audio_model.block2.conv1.wieght"] = state.pop("audio_model.block2.conv1.weight")
    with pytest.raises(UserError, match=r"conv1\.weight missing; .*conv1\.wieght left over"):
        load()
    state["audio_model.block2.conv1.weight"] = state.pop("audio_model.block2.conv1.wieght")
    state["audio_model.block9.bn1.num_batches_tracked"] = np.zeros((), np.int64)
    with pytest.raises(UserError, match=r"block9\.bn1\.num_batches_tracked left over"):
        load()
    del state["audio_model.block9.bn1.num_batches_tracked"]
    state["audio_model.block1.conv1.weight"] = np.zeros((64, 32, 3, 3), np.float32)
    with pytest.raises(
        UserError, match=r"block1\.conv1\.weight is \(3, 3, 32, 64\).*has \(3, 3, 64, 64\)"
    ):
        load()
    with pytest.raises(UserError, match=r"not the weights of gdt's resnet_9: .* missing"):
        from_torch(state, code_base="gdt", name="resnet_9", modality="audio")
    with pytest.raises(UserError, match="avid has no audio encoder 'resnet_9': it has r2plus1d"):
        from_torch(state, code_base="avid", name="resnet_9", modality="audio")
    with pytest.raises(UserError, match="unknown code base 'timm': use one of torchvision"):
        from_torch(state, code_base="timm", name="conv_10", modality="audio")


@pytest.mark.parametrize("mels_first", [False, True])
def test_kernels_mean_the_same_in_both_layouts(mels_first):
    """One value of the convolution by hand, with PyTorch's [out, in, rows, columns]."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(5, 4, 3, 2)).astype(np.float32)
    patch = rng.normal(size=(4, 3, 2)).astype(np.float32)  # channels, rows, columns
    theirs = np.einsum("oirc,irc->o", kernel, patch)
    ours = kernel_from_torch(kernel, mels_first=mels_first)
    # Ours is [frames, mels]; theirs may be [mels, frames].
    window = patch.transpose(2, 1, 0) if mels_first else patch.transpose(1, 2, 0)
    np.testing.assert_allclose(np.einsum("fmio,fmi->o", ours, window), theirs, rtol=1e-5)
    np.testing.assert_array_equal(kernel_to_torch(ours, mels_first=mels_first), kernel)


def test_safetensors_are_read_without_the_prefix_of_data_parallel(tmp_path):
    path = tmp_path / "weights.safetensors"
    array = np.arange(6, dtype=np.float32)
    safetensors.numpy.save_file({"module.a.weight": array, "module.b": array[:2]}, path)
    state = read_state_dict(path)
    assert state.keys() == {"a.weight", "b"}
    np.testing.assert_array_equal(state["a.weight"], array)
    path.write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"weights\.safetensors is not a safetensors file"):
        read_state_dict(path)


@pytest.mark.slow
def test_import_and_export_are_inverse_through_files(tmp_path):
    """mc3_18, the smallest, from a file to an encoder that is loaded, and back to the same file."""
    encoder = create_encoder("video", "mc3_18", {"subtract_time_mean": False})
    variables = jax.jit(encoder.init, static_argnames="train")(
        jax.random.key(0), jnp.zeros((1, 4, 16, 16, 3)), train=False
    )
    variables = jax.tree.map(lambda leaf: np.asarray(leaf) + 0.01, variables)
    state = to_torch(variables, code_base="torchvision", name="mc3_18", modality="video")
    checkpoint = tmp_path / "mc3_18.safetensors"
    safetensors.numpy.save_file(state | {"fc.bias": np.zeros(400, np.float32)}, checkpoint)
    config = import_config.get_config("torchvision,mc3_18")
    config.checkpoint = str(checkpoint)
    directory = import_weights(config, tmp_path)
    loaded = load_encoder(directory)
    assert loaded.config["source"]["name"] == "mc3_18"
    jax.tree.map(np.testing.assert_array_equal, dict(loaded.params), dict(variables))
    frames = np.random.default_rng(0).integers(0, 256, (16, 120, 160, 3), np.uint8)
    (features,) = loaded(frames, 15.0, batch_size=1)
    square = jnp.asarray(loaded.preprocess(frames, 15.0)[0], jnp.float32) / 255
    mean, std = np.float32((0.43216, 0.394666, 0.37645)), np.float32((0.22803, 0.22145, 0.216989))
    by_hand = (np.asarray(square) - mean) / std
    apply = jax.jit(lambda variables, x: encoder.apply(variables, x, train=False)["features"])
    (expected,) = apply(variables, by_hand[None])
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)
    config = export_config.get_config("torchvision")
    config.encoder = str(directory)
    written = safetensors.numpy.load_file(export_weights(config, tmp_path / "back"))
    assert written.keys() == state.keys()
    for name, array in state.items():
        np.testing.assert_array_equal(written[name], array)


def test_only_published_networks_have_names_elsewhere(tmp_path):
    encoder = VideoResNet((4, 6), (0, 1), "r3d", "patch4", subtract_time_mean=False)
    example = jnp.zeros((1, 4, 16, 16, 3))
    shapes = jax.eval_shape(
        functools.partial(encoder.init, train=False), jax.random.key(0), example
    )
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    export_encoder(
        tmp_path,
        encoder=encoder,
        params=variables,
        preprocessing=VideoPreprocessing(4, 0.5, 16, 0.5, 0.25),
        source={},
    )
    config = export_config.get_config("torchvision")
    config.encoder = str(tmp_path)
    with pytest.raises(UserError, match="contains a VideoResNet that is not a published"):
        export_weights(config, tmp_path)


@pytest.mark.parametrize("name", ["absent.pth", "absent.safetensors"])
def test_a_file_that_is_not_there_is_said_to_be_absent(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"No such file or directory: '{tmp_path}/{name}'"):
        read_state_dict(tmp_path / name)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"checkpoint": ""}, "config.checkpoint is missing"),
        ({"modalities": "audio_visual"}, "modalities 'audio_visual' must be 'video' or 'audio'"),
        ({"code_base": "timm"}, "unknown code base 'timm': use one of torchvision"),
        ({"model.audio.name": "conv_11"}, "unknown audio encoder 'conv_11': use one of resnet"),
        ({"model.audio.name": "resnet_9"}, "avid has no audio encoder 'resnet_9'"),
        ({"spectrogram.max_hz": 9e9}, "Hz must increase and end at or below"),
    ],
)
def test_settings_of_an_import_are_checked_before_its_checkpoint_is_read(
    tmp_path, monkeypatch, overrides, said
):
    monkeypatch.setattr("avcl_jax.export.torch_weights.read_state_dict", None)
    config = import_config.get_config("avid,conv_10")
    config.update_from_flattened_dict({"checkpoint": "weights.pth"} | overrides)
    with pytest.raises(UserError, match=said):
        import_weights(config, tmp_path)
    # Nor is an encoder before the code base of an export.
    monkeypatch.setattr("avcl_jax.export.torch_weights.load_encoder", None)
    config = export_config.get_config("torchvision")
    config.code_base = "timm"
    with pytest.raises(UserError, match="unknown code base 'timm': use one of torchvision"):
        export_weights(config, tmp_path)


@pytest.mark.parametrize(
    ("preset", "modality"),
    [("torchvision,s3d", "video"), ("gdt,r2plus1d_34", "video"), ("avid,conv_10", "audio")],
)
def test_presets_say_what_the_weights_were_trained_on(preset, modality):
    config = import_config.get_config(preset)
    assert config.modalities == modality
    assert config.model[modality].name == preset.split(",")[1]
    assert (config.pixels.mean, config.pixels.std) == (0.0, 1.0)
    assert experiment.preprocessings(config).keys() == {"video", "audio"}  # windows are whole
    if modality == "video":
        assert len(config.model.video.channel_mean) == 3
