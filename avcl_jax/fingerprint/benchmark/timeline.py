"""Time in transformed clips: excerpts, speed, insertion, and the truth about every moment."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence

import av
import av.filter
import cv2
import numpy as np
import soxr

from avcl_jax.data.media import DecodedMedia
from avcl_jax.data.spectrogram import samples_at

Rng = np.random.Generator


@dataclasses.dataclass(frozen=True)
class Piece:
    """An interval of the transformed clip that contains the original at a constant rate."""

    begin_seconds: float
    end_seconds: float
    source_seconds: float  # moment of the original at `begin_seconds`
    rate: float = 1.0  # seconds of the original per second of the transformed clip


@dataclasses.dataclass(frozen=True)
class Transformed:
    """A transformed clip, and the pieces of the original in it: in order, without overlap."""

    media: DecodedMedia
    video_pieces: tuple[Piece, ...]
    audio_pieces: tuple[Piece, ...]

    def has_offset(self, offset_seconds: float, tolerance_seconds: float) -> bool:
        """Returns whether some moment of the video or the audio has an answer's offset.

        An offset is time in the original minus time in the transformed clip. At another speed it
        changes along the clip: every one that occurs counts.
        """
        for piece in (*self.video_pieces, *self.audio_pieces):
            first = piece.source_seconds - piece.begin_seconds
            last = first + (piece.rate - 1.0) * (piece.end_seconds - piece.begin_seconds)
            low, high = min(first, last) - tolerance_seconds, max(first, last) + tolerance_seconds
            if low <= offset_seconds <= high:
                return True
        return False


def unmoved(media: DecodedMedia) -> Transformed:
    """Returns a transformed clip whose times are those of the original."""
    pieces = (Piece(0.0, media.duration_seconds, 0.0),)
    return Transformed(media, pieces, pieces)


def with_audio(media: DecodedMedia, waveform: np.ndarray) -> DecodedMedia:
    """Returns the clip with other samples, at the same rate and from the same moment on."""
    video_end = 0.0
    if media.has_video:
        video_end = float(media.frame_seconds[-1]) + (1 / media.fps if media.fps else 0.0)
    audio_end = media.audio_start_seconds + len(waveform) / media.sample_rate_hz
    return dataclasses.replace(media, waveform=waveform, duration_seconds=max(video_end, audio_end))


def without_audio(media: DecodedMedia) -> DecodedMedia:
    """Returns the clip's video alone."""
    return dataclasses.replace(
        media, waveform=np.empty(0, np.int16), sample_rate_hz=0, audio_start_seconds=0.0
    )


def resampled(waveform: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    """Returns int16 samples at another rate."""
    return waveform if from_hz == to_hz else soxr.resample(waveform, from_hz, to_hz)


def excerpt(media: DecodedMedia, begin_seconds: float, end_seconds: float) -> DecodedMedia:
    """Returns the part of a clip between two moments, on a timeline that starts at the first.

    Audio before the clip's own begins, or after it ends, is silence.
    """
    inside = (media.frame_seconds >= begin_seconds - 1e-6) & (
        media.frame_seconds < end_seconds - 1e-6
    )
    waveform = media.waveform
    if media.has_audio:
        first, count = (
            round(seconds * media.sample_rate_hz)
            for seconds in (begin_seconds - media.audio_start_seconds, end_seconds - begin_seconds)
        )
        waveform = samples_at(waveform, first + np.arange(count))
    return dataclasses.replace(
        media,
        frames=media.frames[inside],
        frame_seconds=media.frame_seconds[inside] - begin_seconds,
        waveform=waveform,
        audio_start_seconds=0.0,
        duration_seconds=end_seconds - begin_seconds,
    )


def joined(parts: Sequence[DecodedMedia]) -> DecodedMedia:
    """Returns excerpts, of the same size and sample rate, one after the other."""
    begins = np.cumsum([0.0, *(part.duration_seconds for part in parts)]).tolist()
    times = [part.frame_seconds + begin for part, begin in zip(parts, begins[:-1], strict=True)]
    return dataclasses.replace(
        parts[0],
        frames=np.concatenate([part.frames for part in parts]),
        frame_seconds=np.concatenate(times),
        waveform=np.concatenate([part.waveform for part in parts]),
        duration_seconds=begins[-1],
    )


def as_footage_of(other: DecodedMedia, media: DecodedMedia) -> DecodedMedia:
    """Returns another clip in the size, sample rate and duration of `media`, repeated to fill it.

    Modalities that `media` lacks are left out; those that only `other` lacks are black, or silent.
    """
    parts, left = [], media.duration_seconds
    while left > 1e-6:
        parts.append(excerpt(other, 0.0, min(left, other.duration_seconds)))
        left -= parts[-1].duration_seconds
    filled = joined(parts)
    frames, frame_seconds, waveform = media.frames, media.frame_seconds, media.waveform
    if media.has_video and filled.has_video:
        height, width = frames.shape[1:3]
        frames = np.stack(
            [cv2.resize(f, (width, height), interpolation=cv2.INTER_AREA) for f in filled.frames]
        )
        frame_seconds = filled.frame_seconds
    elif media.has_video:
        frames = np.zeros_like(frames)
    if media.has_audio:
        waveform = np.zeros(round(media.duration_seconds * media.sample_rate_hz), np.int16)
        if filled.has_audio:
            audio = resampled(filled.waveform, filled.sample_rate_hz, media.sample_rate_hz)
            waveform = samples_at(audio, np.arange(len(waveform)))
    return dataclasses.replace(
        media,
        frames=frames,
        frame_seconds=frame_seconds,
        waveform=waveform,
        audio_start_seconds=0.0,
    )


def at_speed(waveform: np.ndarray, sample_rate_hz: int, rate: float) -> np.ndarray:
    """Returns int16 samples played `rate` times as fast, the pitch raised by the same factor."""
    return soxr.resample(waveform, sample_rate_hz * rate, sample_rate_hz)


def at_tempo(
    waveform: np.ndarray, sample_rate_hz: int, rate: float, samples: int | None = None
) -> np.ndarray:
    """Returns int16 [samples] played `rate` times as fast (0.5 to 100) at the same pitch.

    By FFmpeg's atempo; `samples` is the length, where it is known better than by dividing.
    """
    graph = av.filter.Graph()
    source = graph.add_abuffer(format="s16", sample_rate=sample_rate_hz, layout="mono")
    sink = graph.add("abuffersink")
    graph.link_nodes(source, graph.add("atempo", f"{rate:.6f}"), sink).configure()
    frame = av.AudioFrame.from_ndarray(waveform[None], format="s16", layout="mono")
    frame.sample_rate, frame.pts = sample_rate_hz, 0
    source.push(frame)
    source.push(None)
    blocks: list[np.ndarray] = []
    with contextlib.suppress(av.error.EOFError, av.error.BlockingIOError):
        while isinstance(block := sink.pull(), av.AudioFrame):
            blocks.append(block.to_ndarray()[0])
    count = round(len(waveform) / rate) if samples is None else samples
    return samples_at(np.concatenate(blocks), np.arange(count))  # atempo loses or adds a window


def speed(media: DecodedMedia, rng: Rng, *, percent: float) -> Transformed:
    """Plays video and audio faster or slower; the pitch is kept, as players keep it."""
    return _played(media, 1 + float(rng.choice([-percent, percent])) / 100, at_tempo)


def speed_and_pitch(media: DecodedMedia, rng: Rng, *, rates: Sequence[float]) -> Transformed:
    """Plays video and audio faster, by one of `rates`, and the pitch rises with the speed.

    Examples are films of 24 frames per second shown at 25 (PAL speed-up), broadcasts that save time
    and "sped up" music.
    """
    return _played(media, float(rng.choice(rates)), at_speed)


def _played(
    media: DecodedMedia, rate: float, play: Callable[[np.ndarray, int, float], np.ndarray]
) -> Transformed:
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
    pieces = (Piece(0.0, played.duration_seconds, 0.0, rate),)
    return Transformed(played, pieces, pieces)


def trim(media: DecodedMedia, rng: Rng, *, kept: float) -> Transformed:
    """Keeps one part of the clip, the fraction `kept` of its duration."""
    return truncate(media, rng, seconds=kept * media.duration_seconds)


def truncate(media: DecodedMedia, rng: Rng, *, seconds: float) -> Transformed:
    """Keeps `seconds` of the clip; a shorter clip is kept whole."""
    seconds = min(seconds, media.duration_seconds)
    begin = float(rng.uniform(0.0, media.duration_seconds - seconds))
    pieces = (Piece(0.0, seconds, begin),)
    return Transformed(excerpt(media, begin, begin + seconds), pieces, pieces)


def splice(media: DecodedMedia, rng: Rng, other: DecodedMedia, *, foreign: float) -> Transformed:
    """Puts a part of the clip between two parts of another, for as long as the clip lasts.

    The fraction `foreign` of the result is of the other clip, of any size and rates.
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
    pieces = (Piece(before, before + own, begin),)
    return Transformed(joined(parts), pieces, pieces)
