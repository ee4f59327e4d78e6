"""Export: what is loaded computes what was trained, from raw media, and refuses what it must."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import jax
import jax.extend.backend
import jax.numpy as jnp
import librosa
import numpy as np
import pytest
import safetensors.numpy
from jaxlib import _jax

from avcl_jax.data.augment import standardize, to_unit_range
from avcl_jax.data.images import apply_crop, center_crop
from avcl_jax.data.preprocessing import (
    AudioPreprocessing,
    VideoPreprocessing,
)
from avcl_jax.data.spectrogram import LogMelSpec, gather_windows, log_mel
from avcl_jax.data.views import FORWARD, Clip, ViewSpec, clip_times, frame_indices
from avcl_jax.errors import UserError
from avcl_jax.export import ExportError, export_encoder, load_encoder
from avcl_jax.models.audio_encoders import AudioResNet
from avcl_jax.models.video_resnet import VideoResNet

VIDEO = VideoPreprocessing(num_frames=4, clip_seconds=0.5, image_size=16, mean=0.45, std=0.3)
_MELS = {"frames": 16, "mels": 12, "min_hz": 50.0, "max_hz": 4000.0}
LOG_MEL = LogMelSpec(sample_rate_hz=8000, clip_seconds=0.5, floor=1e-6, mean=-6.0, std=3.0, **_MELS)
AUDIO = AudioPreprocessing(LOG_MEL)


def _trained(module, example) -> dict:
    """Parameters and statistics that differ everywhere from fresh ones."""
    variables = jax.jit(module.init, static_argnames="train")(
        jax.random.key(0), example, train=False
    )
    leaves, structure = jax.tree.flatten(variables)
    rng = np.random.default_rng(1)
    moved = [leaf + np.abs(rng.normal(size=leaf.shape)).astype(np.float32) * 0.1 for leaf in leaves]
    return jax.tree.unflatten(structure, moved)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    module = VideoResNet(
        widths=(8, 16),
        depths=(1, 1),
        factorisation="r2plus1d",
        stem="patch4",
        subtract_time_mean=False,  # it would hide a wrong mean of the pixels
    )
    variables = _trained(module, jnp.zeros((1, 4, 16, 16, 3)))
    return module, variables, export(module, variables, VIDEO, tmp_path_factory)


@pytest.fixture(scope="module")
def audio(tmp_path_factory):
    module = AudioResNet(widths=(8, 16), depths=(1, 1), stem="patch", patch=(2, 2))
    variables = _trained(module, jnp.zeros((1, 16, 12)))
    return module, variables, export(module, variables, AUDIO, tmp_path_factory)


def export(module, variables, preprocessing, tmp_path_factory):
    directory = tmp_path_factory.mktemp("export") / "encoder"
    options = {"preprocessing": preprocessing, "source": {"step": 7}}
    return export_encoder(directory, encoder=module, params=variables, **options)


def _frames(seconds: float, fps: float) -> np.ndarray:
    rng = np.random.default_rng(2)
    return rng.integers(0, 256, size=(round(seconds * fps), 24, 40, 3), dtype=np.uint8)


def test_video_features_are_those_of_the_training_code_path(video):
    module, variables, directory = video
    frames = _frames(3.0, 25.0)
    loaded = load_encoder(directory)
    views = ViewSpec(4, 0.5, (1, 2, 4), "shared")
    clips = []
    for start in (0.0, 1.0, 2.0):
        shown = frame_indices(Clip(start, 1, FORWARD), np.arange(75) / 25.0, views)
        clips.append(apply_crop(frames[shown], center_crop(24, 40), 16))
    pixels = standardize(to_unit_range(jnp.asarray(np.stack(clips))), 0.45, 0.3)
    expected = jax.jit(module.apply, static_argnames="train")(variables, pixels, train=False)
    features = loaded(frames, 25.0, speed=2)
    np.testing.assert_allclose(features, expected["features"], atol=1e-6, rtol=1e-6)
    unpooled = loaded(frames, 25.0, speed=2, pooled=False)
    np.testing.assert_allclose(unpooled, expected["map"], atol=1e-5, rtol=1e-5)
    assert np.ptp(features, axis=0).max() > 1e-2


def test_audio_features_are_those_of_the_training_code_path(audio):
    module, variables, directory = audio
    waveform = np.random.default_rng(3).integers(-9000, 9000, size=16_000).astype(np.int16)
    views = ViewSpec(16, 0.5, (1, 2), "shared")
    windows = [
        gather_windows(waveform, Clip(s, 1, FORWARD), LOG_MEL, views, audio_start_seconds=0.0)
        for s in (0.0, 1.0)
    ]
    spectrograms = jnp.asarray(log_mel(np.stack(windows), LOG_MEL))
    expected = jax.jit(module.apply, static_argnames="train")(variables, spectrograms, train=False)
    features = load_encoder(directory)(waveform, 8000, speed=2)
    np.testing.assert_allclose(features, expected["features"], atol=1e-6, rtol=1e-6)
    floats = load_encoder(directory)(waveform / 32768.0, 8000, speed=2)
    np.testing.assert_allclose(floats, features, atol=1e-5)


def test_apply_is_pure_and_can_be_differentiated(video):
    encoder = load_encoder(video[2])
    batch = encoder.preprocess(_frames(1.0, 16.0), 16.0)

    @jax.jit
    def gradient(params):
        return jax.grad(lambda p: jnp.sum(jnp.square(encoder.apply(p, batch))))(params)

    gradients = gradient(encoder.params)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradients["params"])) > 0
    doubled = jax.tree.map(lambda leaf: leaf * 2, encoder.params)
    apply = jax.jit(encoder.apply)
    assert not np.allclose(apply(doubled, batch), apply(encoder.params, batch))


@pytest.mark.parametrize(("seconds", "clips"), [(0.1, 1), (0.5, 1), (0.75, 2), (2.0, 4), (2.2, 5)])
def test_clips_cover_media_of_any_length_and_rate(seconds, clips):
    starts = clip_times(0.0, seconds, 0.5)
    assert len(starts) == clips
    assert starts[0] == 0.0
    assert starts[-1] + 0.5 == pytest.approx(max(seconds, 0.5))
    assert all(np.diff(starts) <= 0.5 + 1e-9)
    for fps in (10.0, 29.97):
        assert VIDEO(_frames(seconds, fps), fps).shape == (clips, 4, 16, 16, 3)
    for rate in (8000, 44_100):
        waveform = np.sin(np.arange(round(seconds * rate)) * 2 * np.pi * 440 / rate)
        assert AUDIO(waveform, rate).shape == (clips, 16, 12)


def test_many_clips_are_encoded_in_padded_batches_of_one_shape(audio):
    encoder = load_encoder(audio[2])
    waveform = np.random.default_rng(4).normal(size=8000 * 4) * 0.1
    whole = encoder(waveform, 8000, batch_size=8)
    np.testing.assert_allclose(encoder(waveform, 8000, batch_size=3), whole, atol=1e-5)
    assert whole.shape == (8, 16)


def test_a_tone_at_another_rate_has_the_same_spectrogram():
    def tone(rate: int) -> np.ndarray:
        return 0.4 * np.sin(np.arange(rate) * 2 * np.pi * 700 / rate)

    original, resampled = AUDIO(tone(8000), 8000), AUDIO(tone(44_100), 44_100)
    loud = original > original.max() - 1.0
    np.testing.assert_allclose(resampled[loud], original[loud], atol=0.02)
    assert (original.argmax(axis=-1) == resampled.argmax(axis=-1)).mean() > 0.95
    some = tone(44_100)[:44_093]  # 7,998.7 samples
    expected = librosa.resample(some.astype(np.float32), orig_sr=44_100, target_sr=8000)
    np.testing.assert_array_equal(AUDIO(some, 44_100), AUDIO(expected, 8000))


@pytest.mark.parametrize("modality", ["video", "audio"])
def test_stablehlo_computes_the_features_of_the_encoder(modality, request):
    """By the client that programs in C++ call: bytes of the file, weights by name, a batch."""
    directory = request.getfixturevalue(modality)[2]
    encoder = load_encoder(directory)
    assert encoder.config["source"] == {"step": 7}
    described = encoder.config["stablehlo"]
    weights = safetensors.numpy.load((directory / "model.safetensors").read_bytes())
    assert described["inputs"] == [*sorted(weights), "batch"]
    rng = np.random.default_rng(0)
    batch = rng.integers(0, 256, described["batch"]).astype(np.uint8)
    if modality == "audio":
        batch = rng.normal(size=described["batch"]).astype(np.float32)
    program = jax.extend.backend.get_backend().compile_and_load(
        (directory / "encoder.stablehlo").read_bytes(), _jax.DeviceList((jax.devices()[0],))
    )
    inputs = [weights[name] for name in described["inputs"][:-1]] + [batch]
    results = program.execute_sharded([jax.device_put(value) for value in inputs])
    (features,) = results.disassemble_into_single_device_arrays()[0]
    expected = jax.jit(encoder.apply)(encoder.params, batch)
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_loaded_says_why(video, tmp_path):
    with pytest.raises(ExportError, match=r"lacks config\.json.*contains \[\]"):
        load_encoder(tmp_path)

    def refused(message: str, **changes: Any) -> None:
        for file in video[2].iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        config = json.loads((tmp_path / "config.json").read_text())
        config["format_version"] = changes.pop("format_version", 1)
        config["encoder"] |= changes
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ExportError, match=message):
            load_encoder(tmp_path)

    refused("unknown encoder 'Transformer'; known: ", **{"class": "Transformer"})
    refused(r"do not fit the architecture.*\(28,\).*\(36,\)", widths=[8, 24])
    refused("format 99", format_version=99)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ExportError, match=r"model\.safetensors is damaged"):
        load_encoder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ExportError, match=r"lacks model\.safetensors"):
        load_encoder(tmp_path)


def test_media_that_cannot_be_taken_say_why():
    with pytest.raises(UserError, match=r"\[T, H, W, 3\].*\(5, 3, 8, 8\)"):
        VIDEO(np.zeros((5, 3, 8, 8), np.uint8), 25.0)
    with pytest.raises(UserError, match="uint8 in 0 … 255, got float32"):
        VIDEO(np.zeros((5, 8, 8, 3), np.float32), 25.0)
    with pytest.raises(UserError, match="fps must be positive, got 0"):
        VIDEO(np.zeros((5, 8, 8, 3), np.uint8), 0)
    with pytest.raises(UserError, match=r"mono waveform.*\(2, 100\)"):
        AUDIO(np.zeros((2, 100), np.float32), 8000)
    with pytest.raises(UserError, match="int16 or float"):
        AUDIO(np.zeros(100, np.int32), 8000)
    with pytest.raises(UserError, match=r"whole number of at least 1, got 0\.5"):
        AUDIO(np.zeros(100, np.int16), 8000, speed=0.5)


def test_loading_imports_neither_tensorflow_nor_pickle_data(video):
    program = (
        "import sys; from avcl_jax.export import load_encoder; "
        f"load_encoder({str(video[2])!r}); assert 'tensorflow' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
    assert {file.name for file in video[2].iterdir()} == {
        "config.json",
        "encoder.stablehlo",
        "model.safetensors",
    }
