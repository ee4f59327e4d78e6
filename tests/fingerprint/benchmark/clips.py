"""A small clip whose frames tell their time and whose audio changes all the time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from avcl_jax.data.media import DecodedMedia
from avcl_jax.fingerprint.benchmark.timeline import Piece

FPS, RATE, SECONDS = 8, 16_000, 6
HEIGHT, WIDTH = 48, 64


def clip(seed: int = 0, *, video: bool = True, audio: bool = True) -> DecodedMedia:
    """Six seconds: coloured discs that move, and a rising tone with clicks over faint noise."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    colours = rng.integers(60, 255, (3, 3))
    frames = np.empty((FPS * SECONDS, HEIGHT, WIDTH, 3), np.uint8)
    for number in range(len(frames)):
        frame = np.full((HEIGHT, WIDTH, 3), 40 + 20 * seed % 60, np.uint8)
        for place, colour in enumerate(colours):
            angle = 2 * np.pi * (number / (10 + 3 * place) + seed / 7 + place / 3)
            row, column = HEIGHT * (0.5 + 0.3 * np.sin(angle)), WIDTH * (0.5 + 0.35 * np.cos(angle))
            frame[(rows - row) ** 2 + (columns - column) ** 2 < (5 + 2 * place) ** 2] = colour
        frames[number] = frame
    times = np.arange(SECONDS * RATE) / RATE
    tone = 3000 * np.sin(2 * np.pi * (300 + 40 * seed + 200 * times) * times)
    tone += 6000 * rng.standard_normal(len(times)) * ((times * 4) % 1 < 0.05)
    tone += 100 * rng.standard_normal(len(times))
    return DecodedMedia(
        frames=frames if video else np.empty((0, 0, 0, 3), np.uint8),
        frame_seconds=np.arange(len(frames)) / FPS if video else np.empty(0),
        waveform=tone.astype(np.int16) if audio else np.empty(0, np.int16),
        sample_rate_hz=RATE if audio else 0,
        audio_start_seconds=0.0,
        duration_seconds=float(SECONDS),
    )


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
