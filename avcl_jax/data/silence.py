"""The one rule for silence, for preparation, training, evaluation and fingerprinting."""

from __future__ import annotations

import numpy as np

# Digital silence and dither peak at or below this, -60 dB of full scale: all silences are alike.
SILENCE_PEAK = 33


def peak(waveform: np.ndarray) -> int:
    """Returns the largest magnitude of int16 samples of any shape; 0 without samples."""
    # Not by np.abs, which leaves -32,768 negative.
    return max(int(waveform.max(initial=0)), -int(waveform.min(initial=0)))


def is_silent(waveform: np.ndarray) -> bool:
    """Returns whether int16 samples of any shape are silent."""
    return peak(waveform) <= SILENCE_PEAK
