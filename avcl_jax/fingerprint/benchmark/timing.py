"""What happens to time: frame rate, speed, excerpts, insertion into other footage."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import cv2
import numpy as np

from avcl_jax.data.media import DecodedMedia, no_frames
from avcl_jax.fingerprint.benchmark.audio import at_speed, at_tempo, either_way
from avcl_jax.fingerprint.benchmark.timeline import (
    Piece,
    TimeMap,
    Transformed,
    excerpt,
    resampled,
    unmoved,
)


def frame_rate(media: DecodedMedia, rng: np.random.Generator, *, every: int) -> Transformed:
    """Keeps one frame of every few.

    Args:
        media: the clip.
        rng: not used.
        every: of how many frames one is kept.
    """
    return unmoved(
        dataclasses.replace(
            media, frames=media.frames[::every], frame_seconds=media.frame_seconds[::every]
        )
    )


def speed(media: DecodedMedia, rng: np.random.Generator, *, percent: float) -> Transformed:
    """Plays picture and sound faster or slower; the pitch is kept, as players keep it.

    Args:
        media: the clip.
        rng: draws faster or slower.
        percent: by how much.
    """
    return _played(media, either_way(percent, rng), at_tempo)


def speed_and_pitch(
    media: DecodedMedia, rng: np.random.Generator, *, rates: Sequence[float]
) -> Transformed:
    """Plays video and audio faster, and the pitch rises with the speed.

    Examples are films of 24 frames per second shown at 25 (PAL speed-up), broadcasts that save time
    and "sped up" music.

    Args:
        media: the clip.
        rng: draws one of the rates.
        rates: seconds of the clip per second of the copy.
    """
    return _played(media, float(rng.choice(rates)), at_speed)


def _played(
    media: DecodedMedia, rate: float, play: Callable[[np.ndarray, int, float], np.ndarray]
) -> Transformed:
    """Plays video and audio at a rate; `play` is a function of `sound` for the audio."""
    waveform = media.waveform
    if media.has_audio:
        waveform = play(waveform, media.sample_rate_hz, rate)
    played = dataclasses.replace(
        media,
        frame_seconds=media.frame_seconds / rate,
        waveform=waveform,
        audio_start_seconds=media.audio_start_seconds / rate,
        duration_seconds=media.duration_seconds / rate,
    )
    times = TimeMap((Piece(0.0, played.duration_seconds, 0.0, rate),))
    return Transformed(played, times, times)


def trim(media: DecodedMedia, rng: np.random.Generator, *, kept: float) -> Transformed:
    """Keeps one part of the clip.

    Args:
        media: the clip.
        rng: draws where the part begins.
        kept: its share of the clip's duration.
    """
    return _part(media, rng, kept * media.duration_seconds)


def truncate(media: DecodedMedia, rng: np.random.Generator, *, seconds: float) -> Transformed:
    """Keeps a few seconds of the clip.

    Args:
        media: the clip.
        rng: draws where they begin.
        seconds: how many; a shorter clip is kept whole.
    """
    return _part(media, rng, min(seconds, media.duration_seconds))


def _part(media: DecodedMedia, rng: np.random.Generator, seconds: float) -> Transformed:
    begin = float(rng.uniform(0.0, media.duration_seconds - seconds))
    times = TimeMap((Piece(0.0, seconds, begin),))
    return Transformed(excerpt(media, begin, begin + seconds), times, times)


def splice(
    media: DecodedMedia, rng: np.random.Generator, other: DecodedMedia, *, foreign: float
) -> Transformed:
    """Puts a part of the clip between two parts of another; the whole is as long as the clip.

    Args:
        media: the clip.
        rng: draws which part of it, and how much of the other comes before.
        other: another clip, of any size and rates; repeated if it is too short.
        foreign: share of the result that is of the other clip.
    """
    duration = media.duration_seconds
    own = (1 - foreign) * duration
    before = float(rng.uniform(0.25, 0.75)) * (duration - own)
    begin = float(rng.uniform(0.0, duration - own))
    filling = as_footage_of(other, media)
    parts = [
        excerpt(filling, 0.0, before),
        excerpt(media, begin, begin + own),
        excerpt(filling, before, duration - own),
    ]
    times = TimeMap((Piece(before, before + own, begin),))
    return Transformed(joined(parts), times, times)


def as_footage_of(other: DecodedMedia, media: DecodedMedia) -> DecodedMedia:
    """Returns another clip in the size, sample rate and duration of `media`.

    What `media` lacks is left out; what only `other` lacks is black, or silent.
    """
    filled = repeated(other, media.duration_seconds)
    frames, frame_seconds = filled.frames, filled.frame_seconds
    if not media.has_video:
        frames, frame_seconds = no_frames(), np.empty(0)
    elif not filled.has_video:
        frames, frame_seconds = np.zeros_like(media.frames), media.frame_seconds
    else:
        height, width = media.frames.shape[1:3]
        frames = np.stack(
            [cv2.resize(f, (width, height), interpolation=cv2.INTER_AREA) for f in frames]
        )
    waveform = np.empty(0, np.int16)
    rate = media.sample_rate_hz
    if media.has_audio:
        waveform = np.zeros(round(media.duration_seconds * rate), np.int16)
        if filled.has_audio:
            heard = resampled(filled.waveform, filled.sample_rate_hz, rate)[: len(waveform)]
            waveform[: len(heard)] = heard
    return DecodedMedia(frames, frame_seconds, waveform, rate, 0.0, media.duration_seconds)


def repeated(media: DecodedMedia, duration_seconds: float) -> DecodedMedia:
    """Returns the clip again and again until it lasts `duration_seconds`."""
    parts = []
    left = duration_seconds
    while left > 1e-6:
        length = min(left, media.duration_seconds)
        parts.append(excerpt(media, 0.0, length))
        left -= length
    return joined(parts)


def joined(parts: list[DecodedMedia]) -> DecodedMedia:
    """Returns excerpts, of the same size and sample rate, one after the other."""
    begins = np.cumsum([0.0, *(part.duration_seconds for part in parts)])
    return DecodedMedia(
        frames=np.concatenate([part.frames for part in parts]),
        frame_seconds=np.concatenate(
            [part.frame_seconds + begin for part, begin in zip(parts, begins[:-1], strict=True)]
        ),
        waveform=np.concatenate([part.waveform for part in parts]),
        sample_rate_hz=parts[0].sample_rate_hz,
        audio_start_seconds=0.0,
        duration_seconds=float(begins[-1]),
    )
