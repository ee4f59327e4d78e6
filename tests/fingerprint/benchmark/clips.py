"""Clips of the benchmark's tests, and the truth about them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from avcl_jax.data.media import DecodedMedia
from avcl_jax.fingerprint.benchmark.timeline import Piece
from tests.fingerprint import synthetic

FPS, RATE, SECONDS = 8, 16_000, 6
HEIGHT, WIDTH = 48, 64


def clip(seed: int = 0, **modalities: bool) -> DecodedMedia:
    """Six seconds of noise that changes, and of tones with clicks over faint noise."""
    size = (HEIGHT, WIDTH)
    media = synthetic.clip(seed, SECONDS, fps=FPS, rate_hz=RATE, size=size, **modalities)
    times = np.arange(len(media.waveform)) / RATE
    noise = np.random.default_rng(seed).standard_normal(len(times))
    noise *= np.where((times * 4) % 1 < 0.05, 6000, 100)
    return dataclasses.replace(media, waveform=(media.waveform * 0.4 + noise).astype(np.int16))


def log_mel(media: DecodedMedia) -> np.ndarray:
    """Coarse log spectrogram [frames, bands] of the audio."""
    count = len(media.waveform) // 512
    windows = media.waveform[: count * 512].reshape(count, 512) / 32768 * np.hanning(512)
    power = np.abs(np.fft.rfft(windows)) ** 2
    return np.log(power[:, 1:].reshape(count, 32, 8).mean(axis=2) + 1e-7)


def source_seconds(pieces: Sequence[Piece], seconds: np.ndarray) -> np.ndarray:
    """Moments of the original [n]; NaN where the transformed clip contains something else."""
    moments = np.full(len(seconds), np.nan)
    for piece in pieces:
        inside = (seconds >= piece.begin_seconds) & (seconds < piece.end_seconds)
        since = seconds[inside] - piece.begin_seconds
        moments[inside] = piece.source_seconds + piece.rate * since
    return moments
