"""One clip's log-mel spectrogram against librosa's, which gives the same answer."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np

from avcl_jax.data.spectrogram import gather_windows, log_mel
from avcl_jax.data.views import FORWARD, Clip
from benchmarks import rendering
from benchmarks.baselines.pyav_dataloader import librosa_log_mel

_CALLS = 200


def compare(*, repeats: int) -> dict[str, Any]:
    """Times both from the waveform of a clip, in turns.

    Returns:
        `speedup`, `microseconds` of each, and their `largest_difference`.
    """
    rng = np.random.default_rng(0)
    clip = Clip(0.0, 0, FORWARD)
    samples = round(rendering.LOG_MEL.sample_rate_hz * rendering.VIEWS.clip_seconds)
    waveform = rng.integers(-8000, 8000, samples, dtype=np.int16)
    floats = waveform.astype(np.float32) / 32768

    def ours() -> np.ndarray:
        windows = gather_windows(
            waveform, clip, rendering.LOG_MEL, rendering.VIEWS, audio_start_seconds=0.0
        )
        return np.asarray(log_mel(windows, rendering.LOG_MEL))

    def librosas() -> np.ndarray:
        return librosa_log_mel(floats, clip)

    difference = float(np.abs(ours() - librosas()).max())
    assert difference < 1e-4, f"not the same answer: {difference}"
    times: dict[str, list[float]] = {"ours": [], "librosa": []}
    for _ in range(max(repeats, 5)):
        for name, function in (("ours", ours), ("librosa", librosas)):
            begin = time.perf_counter()
            for _ in range(_CALLS):
                function()
            times[name].append(1e6 * (time.perf_counter() - begin) / _CALLS)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "speedup": medians["librosa"] / medians["ours"],
        "microseconds": {name: round(value, 1) for name, value in medians.items()},
        "largest_difference": difference,
    }
