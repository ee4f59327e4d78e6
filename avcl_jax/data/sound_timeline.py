"""Decoded sound frames to one waveform whose sample index tells the time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np

from avcl_jax.data.media_error import MediaError
from avcl_jax.data.mono import mix_to_mono

_JITTER_SECONDS = 0.008  # millisecond time bases and, median filtered, Vorbis stay below
_MEDIAN_FRAMES = 9  # one wrong time stamp among nine moves nothing
_MAX_BACK_SECONDS = 0.5
_MAX_SILENCE_SECONDS = 60.0


def _segments(frames: Sequence[Any], zero: float) -> Iterator[tuple[float, Sequence[Any]]]:
    """Cuts decoded sound where its times leave the sample count, or its format changes.

    Time stamps jitter, by a millisecond in Matroska and by ten for single Vorbis frames, without
    a sample being missing; so the deviation of times from the running sample count is median
    filtered, and only a lasting change is a gap or an overlap.

    Yields:
      When the segment starts, and its frames.
    """
    lengths = np.array([frame.samples / frame.sample_rate for frame in frames])
    counted = np.concatenate([[0.0], np.cumsum(lengths)[:-1]])
    deviation = np.empty(len(frames))
    previous = 0.0
    for number, frame in enumerate(frames):
        # Without a time stamp a frame follows the one before it.
        previous = previous if frame.time is None else frame.time - zero - counted[number]
        deviation[number] = previous
    leaps = np.diff(deviation)
    if np.any(leaps < -_MAX_BACK_SECONDS) or np.any(leaps > _MAX_SILENCE_SECONDS):
        raise MediaError("bad_timestamps", f"the sound leaps by {np.abs(leaps).max():.1f} s")
    smooth = []
    for number in range(len(frames)):
        # Narrower at both ends, and always symmetric: a step is found where it is.
        half = min(_MEDIAN_FRAMES // 2, number, len(frames) - 1 - number)
        smooth.append(float(np.median(deviation[number - half : number + half + 1])))
    first = 0
    for number in range(1, len(frames) + 1):
        if number < len(frames):
            here, there = frames[first], frames[number]
            same = (here.sample_rate, here.layout.name, here.format.name) == (
                there.sample_rate,
                there.layout.name,
                there.format.name,
            )
            if same and abs(smooth[number] - smooth[first]) <= _JITTER_SECONDS:
                continue
        start = counted[first] + float(np.median(deviation[first:number]))
        yield start, frames[first:number]
        first = number


def _resample(frames: Sequence[Any], sample_rate_hz: int) -> np.ndarray:
    """Mixes several channels down and resamples (libswresample); returns int16 [samples]."""
    resampler = av.AudioResampler(format="s16", layout="mono", rate=sample_rate_hz)
    parts, position = [], 0
    for frame in frames:
        # Gapless inside a segment, however its time stamps jitter.
        frame.time_base = Fraction(1, frame.sample_rate)
        frame.pts = position
        position += frame.samples
        parts += [out.to_ndarray()[0] for out in resampler.resample(frame)]
    parts += [out.to_ndarray()[0] for out in resampler.resample(None)]
    return np.concatenate(parts) if parts else np.empty(0, np.int16)


def lay_out(
    frames: Sequence[Any], *, zero: float, sample_rate_hz: int
) -> tuple[float, np.ndarray, dict[str, str]]:
    """Mixes down, resamples, and puts sound where its time stamps say, silence elsewhere.

    Args:
      frames: At least one decoded `av.AudioFrame`, in order; their time stamps are overwritten.
      zero: Presentation time in seconds that becomes time 0.
      sample_rate_hz: Rate to resample to.

    Returns:
      Time of the first sample, int16 [samples], and messages about the channels by kind of note.

    Raises:
      MediaError: If the time stamps leap.
    """
    frames, notes = mix_to_mono(frames)
    pieces = [
        (start, _resample(segment, sample_rate_hz)) for start, segment in _segments(frames, zero)
    ]
    first_seconds = round(pieces[0][0], 9)  # no femtoseconds from adding up frame lengths
    places = [round((start - first_seconds) * sample_rate_hz) for start, _ in pieces]
    ends = [at + len(piece) for at, (_, piece) in zip(places, pieces, strict=True)]
    waveform = np.zeros(max(ends), np.int16)
    for at, (_, piece) in zip(places, pieces, strict=True):
        begin = max(0, at)
        waveform[begin : begin + len(piece)] = piece[: len(waveform) - begin]
    return first_seconds, waveform, notes
