"""A picture of sound, for clips that have no other: log-mel bytes that the page draws."""

from __future__ import annotations

import base64
from typing import Any

import librosa
import numpy as np

_COLUMNS, _MELS, _RANGE_DB = 480, 64, 70.0
_MIN_WINDOW = 512


def spectrogram(waveform: np.ndarray, sample_rate_hz: int, start_seconds: float) -> dict[str, Any]:
    """Computes what the page draws.

    Args:
        waveform: int16 [samples].
        sample_rate_hz: its rate.
        start_seconds: time of its first sample.

    Returns:
        `start_seconds`, `seconds`, `columns`, `rows`, and `data`: base64 of bytes [columns, rows],
        lowest pitch first, 255 is the loudest.
    """
    hop = max(1, -(-len(waveform) // _COLUMNS))
    window = max(_MIN_WINDOW, 1 << (hop - 1).bit_length())
    power = librosa.feature.melspectrogram(
        y=waveform.astype(np.float32) / 32768,
        sr=sample_rate_hz,
        n_fft=window,
        hop_length=hop,
        n_mels=_MELS,
    )
    decibel = librosa.power_to_db(power, ref=max(float(power.max()), 1e-9), top_db=_RANGE_DB)
    loudness = np.round(255 * (1 + decibel.T / _RANGE_DB)).clip(0, 255).astype(np.uint8)
    return {
        "start_seconds": start_seconds,
        "seconds": len(waveform) / sample_rate_hz,
        "columns": loudness.shape[0],
        "rows": loudness.shape[1],
        "data": base64.b64encode(loudness.tobytes()).decode("ascii"),
    }
