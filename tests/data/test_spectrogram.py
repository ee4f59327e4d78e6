"""Log-mel: librosa's numbers, the right place and speed, and no clock in stationary noise."""

from __future__ import annotations

import dataclasses
import itertools
import warnings

import jax.numpy as jnp
import librosa
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

from avcl_jax.data.spectrogram import (
    LogMelSpec,
    gather_windows,
    log_mel,
    mel_constants,
    mel_decibels,
)
from avcl_jax.data.views import BACKWARD, FORWARD, Clip, ViewSpec

VIEWS = ViewSpec(num_frames=12, clip_seconds=0.75, speeds=(1, 2, 4, 8), audio_transform="shared")
SPEC = LogMelSpec(16_000, 48, 40, 0.75, 60.0, 7_600.0, 1e-6, 0.0, 1.0)


def windows_of(waveform, clip, start=0.0):
    return gather_windows(waveform, clip, SPEC, VIEWS, audio_start_seconds=start)


@pytest.mark.parametrize("xp", [np, jnp], ids=["numpy", "jax"])
@pytest.mark.parametrize("speed", range(4))
def test_agrees_with_librosa(xp, speed):
    rng = np.random.default_rng(speed)
    waveform = np.clip(rng.normal(0, 3000, 160_000), -32768, 32767).astype(np.int16)
    begin = 12_345
    ours = log_mel(xp.asarray(windows_of(waveform, Clip(begin / 16_000, speed, FORWARD))), SPEC, xp)
    power = librosa.feature.melspectrogram(
        y=waveform[begin:].astype(np.float32) / 32768,
        sr=16_000,
        n_fft=250,
        hop_length=250 * VIEWS.speeds[speed],
        win_length=250,
        window="hann",
        center=False,
        power=2.0,
        n_mels=40,
        fmin=60.0,
        fmax=7_600.0,
    )
    np.testing.assert_allclose(ours, np.log(power.T[:48] + 1e-6), atol=1e-4)


@pytest.mark.parametrize("window", [2, 99, 250, 256, 400])
@pytest.mark.parametrize("rate_hz", [8000, 16_000, 44_100])
@pytest.mark.parametrize("low_hz", [0.0, 60.0, 1000.0, 1200.0])
def test_window_and_filters_are_librosas_to_the_last_bit(window, rate_hz, low_hz):
    for mels, high_hz in itertools.product((1, 40, 128), (1300.0, 3800.0, 4000.0)):
        spec = LogMelSpec(rate_hz, 10, mels, window * 10 / rate_hz, low_hz, high_hz, 1e-6, 0.0, 1.0)
        hann, filters = mel_constants(spec)
        np.testing.assert_array_equal(
            hann, librosa.filters.get_window("hann", window).astype(np.float32), strict=True
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # bands narrower than the resolution are empty
            expected = librosa.filters.mel(
                sr=rate_hz, n_fft=window, n_mels=mels, fmin=low_hz, fmax=high_hz
            )
        np.testing.assert_array_equal(filters, expected, strict=True)


@pytest.mark.parametrize(("samples", "window", "hop"), [(40_000, 1024, 512), (999, 999, 512)])
def test_decibels_are_librosas(samples, window, hop):
    waveform = np.random.default_rng(0).normal(0, 3000, samples).astype(np.int16)
    waveform[samples // 2 :] = 0
    power = librosa.feature.melspectrogram(
        y=waveform / np.float32(32768), sr=16_000, n_fft=window, hop_length=hop, n_mels=48
    )
    ours = mel_decibels(waveform, 16_000, window=window, hop=hop, mels=48)
    np.testing.assert_allclose(ours, librosa.power_to_db(power, top_db=None).T, atol=1e-3)


def test_standardised_and_float_input_alike():
    waveform = np.random.default_rng(0).integers(-9000, 9000, 20_000).astype(np.int16)
    clip = Clip(0.1, 0, FORWARD)
    plain = log_mel(windows_of(waveform, clip), SPEC)
    scaled = dataclasses.replace(SPEC, mean=-7.0, std=3.0)
    np.testing.assert_allclose(log_mel(windows_of(waveform, clip), scaled), (plain + 7) / 3, 1e-5)
    as_float = waveform.astype(np.float32) / 32768
    np.testing.assert_allclose(log_mel(windows_of(as_float, clip), SPEC), plain, atol=1e-6)


def test_windows_are_at_their_times_and_reversed_means_reversed():
    waveform = np.arange(160_000, dtype=np.int32)
    for speed, factor in enumerate(VIEWS.speeds):
        forward = windows_of(waveform, Clip(1.5, speed, FORWARD), start=0.5)
        np.testing.assert_array_equal(forward[:, 0], 16_000 + 250 * factor * np.arange(48))
        np.testing.assert_array_equal(np.diff(forward, axis=1), 1)
        backward = windows_of(waveform, Clip(1.5, speed, BACKWARD), start=0.5)
        np.testing.assert_array_equal(backward, forward[::-1, ::-1])


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
def test_beyond_its_ends_the_sound_is_silent(direction):
    waveform = np.full(9_000, 7, np.int16)
    clip = Clip(0.5, 1, direction)  # 24,000 samples from the 4,000th before the waveform begins
    windows = windows_of(waveform, clip, start=0.75)
    padded = np.concatenate([np.zeros(4_000, np.int16), waveform, np.zeros(24_000, np.int16)])
    np.testing.assert_array_equal(windows, windows_of(padded, clip, start=0.5))
    assert windows.dtype == np.int16
    assert set(np.unique(windows)) == {0, 7}
    assert not windows_of(waveform, clip, start=9.0).any()


def test_pitch_does_not_change_with_speed():
    tone = (8000 * np.sin(2 * np.pi * 1000 * np.arange(160_000) / 16_000)).astype(np.int16)
    peaks = {
        int(log_mel(windows_of(tone, Clip(0.2, speed, FORWARD)), SPEC).mean(0).argmax())
        for speed in range(4)
    }
    assert len(peaks) == 1


def noise_accuracy(render, kind, seed=0, clips=1600):
    """Accuracy of four statistics of spectrograms of stationary noise on speed (chance 1/4)."""
    rng = np.random.default_rng(seed)
    spectrum = np.fft.rfft(rng.normal(size=clips * 2048 * 4))
    if kind == "pink":
        spectrum[1:] /= np.sqrt(np.arange(1, len(spectrum)))
    noise = np.fft.irfft(spectrum)
    noise = (noise / noise.std() * 3000).clip(-32768, 32767).astype(np.int16)
    rows, labels = [], []
    for _ in range(clips):
        speed = int(rng.integers(4))
        start = rng.uniform(0, len(noise) / 16_000 - 6.1)
        mel = render(noise, Clip(start, speed, FORWARD))
        steps = np.diff(mel, axis=0)
        centred = mel - mel.mean(0)
        rows.append(
            [
                mel.var(0).mean(),
                np.square(steps).mean(),
                (centred[1:] * centred[:-1]).mean() / centred.var(),
                mel.mean(),
            ]
        )
        labels.append(speed)
    half = clips // 2
    model = make_pipeline(
        StandardScaler(), PolynomialFeatures(2), LogisticRegression(max_iter=2000)
    )
    return model.fit(rows[:half], labels[:half]).score(rows[half:], labels[half:])


@pytest.mark.parametrize("kind", ["white", "pink"])
def test_speed_of_stationary_noise_cannot_be_told(kind):
    accuracy = noise_accuracy(lambda wave, clip: log_mel(windows_of(wave, clip), SPEC), kind)
    assert accuracy <= 0.30


def test_the_null_control_finds_the_averaging_that_leaks():
    def averaged(wave, clip):
        factor = VIEWS.speeds[clip.speed]
        start = round(clip.start_seconds * 16_000)
        windows = wave[start : start + 250 * 48 * factor].reshape(48 * factor, 250)
        return log_mel(windows, SPEC).reshape(48, factor, 40).mean(1)

    assert noise_accuracy(averaged, "white", clips=600) > 0.6


def test_settings_without_meaning_are_refused():
    with pytest.raises(ValueError, match=r"windows of 239\.9"):
        dataclasses.replace(SPEC, frames=50.01)
    with pytest.raises(ValueError, match="below 8000 Hz"):
        dataclasses.replace(SPEC, max_hz=9000.0)
