"""Samples that an example holds as numbers, to mono sound."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np

from avcl_jax.data.media import Sound
from avcl_jax.data.media_error import MediaError
from avcl_jax.data.mono import ChannelEnergies, choose_weights
from avcl_jax.data.sound_timeline import lay_out

_INTEGER_SCALE = 32768.0  # of 16-bit samples, whatever type holds them
# Lossy codecs overshoot full scale by less than that.
_LOUDEST = 8.0
_SMALLEST = 1e-30
_PART_SAMPLES = 1 << 16  # FFmpeg counts the samples of a frame in 32 bits
_DMVR = (
    "32-bit integers read as floats, which DMVR's generate_from_file.py writes (it asks FFmpeg for "
    "s32le and reads float32): write these examples again from the media, with f32le"
)


@dataclasses.dataclass(frozen=True)
class Samples:
    """Sound as numbers.

    Attributes:
      packets: When each starts in seconds, and its samples: int or float [samples, channels].
      sample_rate_hz: Of all.
      full_scale: Value of the loudest sample; None for 1 (floats) or 32,768 (integers).
    """

    packets: Sequence[tuple[float, np.ndarray]]
    sample_rate_hz: int
    full_scale: float | None

    @property
    def end_seconds(self) -> float:
        """When the last sample has sounded."""
        return max(start + len(data) / self.sample_rate_hz for start, data in self.packets)


def mono_sound(
    samples: Samples, *, sample_rate_hz: int, start_seconds: float, end_seconds: float | None
) -> Sound | None:
    """Mixes channels by their mean, or as `avcl_jax.data.mono` says, and resamples.

    16-bit mono at the wanted rate comes out as it went in.

    Args:
      samples: What the example holds.
      sample_rate_hz: Rate to resample to.
      start_seconds: Samples before are left out.
      end_seconds: Samples from here on are left out; None for all.

    Returns:
      The sound; None when there is none in this interval.

    Raises:
      MediaError: If the numbers are no samples, or their times leap.
    """
    frames = []
    rate = samples.sample_rate_hz
    weights, notes = _weights(samples.packets, rate)
    for start, data in samples.packets:
        mixed = _mono(data, samples.full_scale, weights)
        for first in range(0, len(mixed), _PART_SAMPLES):
            part = mixed[first : first + _PART_SAMPLES]
            kind = "s16" if part.dtype == np.int16 else "flt"
            frame = av.AudioFrame.from_ndarray(part[None], format=kind, layout="mono")
            frame.sample_rate = rate
            frame.time_base = Fraction(1, rate)
            frame.pts = round(start * rate) + first
            frames.append(frame)
    if not frames:
        return None
    first_seconds, waveform, _ = lay_out(frames, zero=0.0, sample_rate_hz=sample_rate_hz)
    skip = max(0, int(np.ceil((start_seconds - first_seconds) * sample_rate_hz - 1e-6)))
    first_seconds += skip / sample_rate_hz
    waveform = waveform[skip:]
    if end_seconds is not None:
        waveform = waveform[: max(0, round((end_seconds - first_seconds) * sample_rate_hz))]
    return Sound(first_seconds, waveform, notes) if len(waveform) else None


def _weights(
    packets: Sequence[tuple[float, np.ndarray]], sample_rate_hz: int
) -> tuple[np.ndarray, dict[str, str]]:
    """Returns the weights of the channels of all packets, and messages by kind of note."""
    count = max((data.shape[1] for _, data in packets), default=1)
    usual = np.full(count, 1 / count)
    if count == 1:
        return usual, {}
    sums = ChannelEnergies(sample_rate_hz)
    for _, data in packets:
        sums.add(data.T.astype(np.float64))
    energies = sums.per_second()
    if not energies.size or not np.isfinite(energies).all():  # `_mono` says what is wrong
        return usual, {}
    return choose_weights(energies, usual, [str(number + 1) for number in range(count)])


def _mono(data: np.ndarray, full_scale: float | None, weights: np.ndarray) -> np.ndarray:
    """Returns int16 or float32 [samples]; raises MediaError for numbers that are no samples."""
    if not data.size:
        return np.empty(0, np.int16)
    is_float = data.dtype.kind == "f"
    scale = full_scale or (1.0 if is_float else _INTEGER_SCALE)
    if is_float:
        loudest = float(np.abs(data).max())
        if not np.isfinite(loudest):
            raise MediaError("bad_samples", f"samples that are not numbers, as of {_DMVR}")
        if 0 < loudest < _SMALLEST or loudest > _LOUDEST * 1e6:
            raise MediaError("bad_samples", f"samples up to {loudest:g}, as of {_DMVR}")
    else:
        loudest = float(max(int(data.max()), -int(data.min())))
    if loudest > scale * (_LOUDEST if is_float else 1):
        raise MediaError(
            "bad_samples",
            f"samples up to {loudest:g} where {scale:g} is full scale: say --full-scale",
        )
    if data.shape[1] == 1 and not is_float and scale == _INTEGER_SCALE:
        # 32,768 itself, which some converters write, does not fit.
        return np.minimum(data[:, 0], 32767).astype(np.int16)
    return (data @ weights / scale).astype(np.float32)
