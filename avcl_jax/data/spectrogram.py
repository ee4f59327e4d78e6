"""Log-mel spectrograms whose frames never overlap, at any playback speed.

One definition for numpy and jax.numpy, equal to librosa's (HTK off, Slaney normalisation) to 1e-4;
window and filters bitwise.

The window of a frame has the length of the hop at speed 1. Faster playback keeps the window and
lengthens the hop, so pitch does not change and no two frames of any speed share a sample. This is
the rendering whose null control passes: overlapping windows, and averages over the skipped time,
tell the speed of stationary noise.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from avcl_jax.data.views import BACKWARD, Clip, ViewSpec
from avcl_jax.errors import UserError

INT16_SCALE = np.float32(1.0 / 32768.0)
# Slaney's mel scale. Computed here, because importing librosa takes longer than a whole query, and
# the first spectrogram after its installation takes 20 s more, in which numba compiles.
_LINEAR_HZ, _HZ_PER_MEL, _LOG_STEP = 1000.0, 200.0 / 3, np.log(6.4) / 27


@dataclasses.dataclass(frozen=True)
class LogMelSpec:
    """Definition of the spectrogram.

    Attributes:
        sample_rate_hz: rate of the waveform.
        frames: frames of a clip at every speed.
        mels: mel bands, between `min_hz` and `max_hz`.
        clip_seconds: interval that a clip covers at speed 1; with `frames` it sets the window.
        floor: power added before the logarithm; full scale is 1.
        mean: subtracted from log-mel values.
        std: log-mel values are divided by it.
    """

    sample_rate_hz: int
    frames: int
    mels: int
    clip_seconds: float
    min_hz: float
    max_hz: float
    floor: float
    mean: float
    std: float

    def __post_init__(self) -> None:
        """Refuses windows that are not a whole number of samples, and bands above Nyquist."""
        window = self.sample_rate_hz * self.clip_seconds / self.frames
        if abs(window - round(window)) > 1e-6 or window < 2:
            raise UserError(
                f"{self.frames} frames in {self.clip_seconds:g} s at {self.sample_rate_hz} Hz make "
                f"windows of {window:g} samples: choose frames or clip_seconds so that it is whole"
            )
        if not 0 <= self.min_hz < self.max_hz <= self.sample_rate_hz / 2:
            raise UserError(
                f"mel range {self.min_hz:g} to {self.max_hz:g} Hz must increase and end at or "
                f"below {self.sample_rate_hz / 2:g} Hz"
            )

    @property
    def window(self) -> int:
        """Samples in a window, and in the hop at speed 1."""
        return round(self.sample_rate_hz * self.clip_seconds / self.frames)


@functools.lru_cache(maxsize=16)
def mel_constants(spec: LogMelSpec) -> tuple[np.ndarray, np.ndarray]:
    """Returns the Hann window [window] and the mel filters [mels, bins], float32."""
    return _constants(spec.window, spec.sample_rate_hz, spec.mels, spec.min_hz, spec.max_hz)


def _constants(
    window: int, sample_rate_hz: int, mels: int, min_hz: float, max_hz: float
) -> tuple[np.ndarray, np.ndarray]:
    phases = np.linspace(-np.pi, np.pi, window + 1)[:-1]
    hann = (0.5 + 0.5 * np.cos(phases)).astype(np.float32)
    low, high = _mels(np.array([min_hz, max_hz]))
    edges = _hertz(np.linspace(low, high, mels + 2))
    # Triangles of the same area between the edges of the bands.
    distances = edges[:, None] - np.fft.rfftfreq(window, 1 / sample_rate_hz)
    widths = np.diff(edges)[:, None]
    rising, falling = -distances[:-2] / widths[:-1], distances[2:] / widths[1:]
    triangles = np.maximum(0, np.minimum(rising, falling)).astype(np.float32)
    areas = 2 / (edges[2:] - edges[:-2])
    return hann, (triangles * areas[:, None]).astype(np.float32)


def _mels(hertz: np.ndarray) -> np.ndarray:
    """Returns frequencies on Slaney's scale: linear up to 1 kHz, which is 15 mel, then log."""
    above = np.log(np.maximum(hertz, _LINEAR_HZ) / _LINEAR_HZ) / _LOG_STEP
    return np.where(hertz < _LINEAR_HZ, hertz / _HZ_PER_MEL, _LINEAR_HZ / _HZ_PER_MEL + above)


def _hertz(mels: np.ndarray) -> np.ndarray:
    """The inverse of `_mels`."""
    corner = _LINEAR_HZ / _HZ_PER_MEL
    above = _LINEAR_HZ * np.exp(_LOG_STEP * (mels - corner))
    return np.where(mels < corner, _HZ_PER_MEL * mels, above)


def gather_windows(
    waveform: np.ndarray,
    clip: Clip,
    spec: LogMelSpec,
    views: ViewSpec,
    *,
    audio_start_seconds: float,
) -> np.ndarray:
    """Cuts the windows of a clip out of a waveform, int16 or float [samples].

    Backward playback reverses the samples, not only the frames. `audio_start_seconds` is the time
    of the waveform's first sample on the video's timeline.

    Returns:
        [frames, window], dtype of the waveform; silent beyond its ends.
    """
    start = round((clip.start_seconds - audio_start_seconds) * spec.sample_rate_hz)
    hop = spec.window * views.speeds[clip.speed]
    end = start + hop * spec.frames
    if start >= 0 and end <= len(waveform):
        windows = waveform[start:end].reshape(spec.frames, hop)[:, : spec.window]
    else:
        starts = start + hop * np.arange(spec.frames)
        windows = samples_at(waveform, starts[:, None] + np.arange(spec.window))
    return windows[::-1, ::-1] if clip.direction == BACKWARD else windows


def samples_at(waveform: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Returns the samples at integer positions of any shape, zero (silence) beyond the ends."""
    inside = (positions >= 0) & (positions < len(waveform))
    return np.where(inside, waveform[np.where(inside, positions, 0)], waveform.dtype.type(0))


def log_mel(windows: Any, spec: LogMelSpec, xp: Any = np) -> Any:
    """Computes the standardised natural logarithm of mel power, float32 [..., frames, mels].

    log(mel(|rfft(hann * x)|^2) + floor), minus `spec.mean`, over `spec.std`, of windows [...,
    frames, window] int16, or float in [-1, 1]. `xp` is `numpy`, or `jax.numpy` in traced functions.
    """
    hann, filters = mel_constants(spec)
    if xp.issubdtype(windows.dtype, xp.integer):
        windows = windows.astype(xp.float32) * INT16_SCALE
    spectrum = xp.fft.rfft(windows * hann.reshape((1,) * (windows.ndim - 1) + (-1,)), axis=-1)
    power = xp.square(spectrum.real) + xp.square(spectrum.imag)
    # By default accelerators multiply in TF32 or bfloat16: off by 3e-4 and 2e-3 (simulated).
    highest = {} if xp is np else {"precision": "highest"}
    mel = xp.matmul(power.astype(xp.float32), filters.T, **highest)
    return ((xp.log(mel + np.float32(spec.floor)) - spec.mean) / spec.std).astype(xp.float32)


def mel_decibels(
    waveform: np.ndarray, sample_rate_hz: int, *, window: int, hop: int, mels: int
) -> np.ndarray:
    """Computes mel power in decibels of full scale, at least -100: the spectrogram to look at.

    Args:
        waveform: int16 [samples].
        window: samples in a Hann window, centred on multiples of `hop`.
        mels: mel bands, up to the Nyquist frequency.

    Returns:
        float32 [1 + samples // hop, mels].
    """
    hann, filters = _constants(window, sample_rate_hz, mels, 0.0, sample_rate_hz / 2)
    padded = np.pad(waveform, window // 2) * INT16_SCALE
    windows = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop]
    power = np.square(np.abs(np.fft.rfft(windows * hann))).astype(np.float32)
    return 10 * np.log10(np.maximum(power @ filters.T, np.float32(1e-10)))
