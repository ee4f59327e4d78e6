"""Media files to upright frames and mono audio on one timeline (PyAV, that is FFmpeg).

All times are seconds on the *file's* timeline, whose zero is where a player starts showing it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from avcl_jax.data.frame_images import FrameImages
from avcl_jax.data.media_streams import (
    REASONS,
    SEEK_MARGIN_SECONDS,
    MediaError,
    Source,
    find_stream,
    open_media,
    stream_frames,
    zero_seconds,
)
from avcl_jax.data.mono import Sound, lay_out

__all__ = [
    "REASONS",
    "Frame",
    "MediaError",
    "MediaInfo",
    "RateLimit",
    "Sound",
    "Source",
    "decode_audio",
    "decode_frames",
    "probe",
]

_MAX_BACK_SECONDS = 0.5
_FPS_SLACK_SECONDS = 0.002  # time stamps in whole milliseconds make 30 fps vary


class MediaInfo(NamedTuple):
    """Header of a file: FFmpeg's name of the container, duration of the longest stream, streams.

    Attributes:
        duration_seconds: None when the header does not say.
        video: codec, stored width and height; None without video.
        audio: codec, rate in Hz and channel layout; None without audio.
    """

    format: str
    duration_seconds: float | None
    video: tuple[str, int, int] | None
    audio: tuple[str, int, str] | None


class Frame(NamedTuple):
    """One displayed frame: when it appears, how long it stays (0 if the file does not say), image.

    `image` is uint8 [height, width, 3], RGB, upright, with square pixels.
    """

    seconds: float
    duration_seconds: float
    image: np.ndarray


class RateLimit:
    """Chooses frames, by their times, so that they keep to a rate on average."""

    def __init__(self, max_fps: float | None):
        """Takes the rate in frames per second; None keeps all."""
        self._interval = 1 / max_fps if max_fps else 0.0
        self._due: float | None = None

    def keeps(self, seconds: float) -> bool:
        """Tests whether the frame at this time, after those of earlier calls, stays."""
        due = seconds if self._due is None else self._due
        if seconds < due - _FPS_SLACK_SECONDS:
            return False
        # Counted from when a frame was due and not from when it came: 32 fps become 30, not 16.
        self._due = max(due, seconds - self._interval) + self._interval
        return True


def probe(path: Source) -> MediaInfo:
    """Reads the header of a local file of any name, or of a file's content.

    Raises:
        MediaError: if it cannot be opened, is not a recording, or has neither video nor audio.
    """
    with open_media(path) as (container, _):
        video, audio = find_stream(container, "video"), find_stream(container, "audio")
        if video is None and audio is None:
            raise MediaError("empty", "the file has neither video nor audio")
        return MediaInfo(
            container.format.name,
            container.duration / 1e6 if container.duration else None,
            video and (video.codec_context.name, video.width, video.height),
            audio and (audio.codec_context.name, audio.rate, audio.layout.name),
        )


def decode_frames(
    path: Source,
    *,
    short_side: int | None,
    max_fps: float | None,
    start_seconds: float = 0.0,
    end_seconds: float | None = None,
) -> Iterator[Frame]:
    """Decodes the video, upright and with square pixels, at its own times.

    Args:
        short_side: height or width to scale down to, whichever is shorter; never scales up.
        max_fps: average rate to which frames are dropped, by their times; None keeps all.
        end_seconds: frames that appear at this time or later are left out; None for all.

    Yields:
        Frames in the order of display, at strictly increasing times; none when the file has no
        video. An alpha channel is ignored.

    Raises:
        MediaError: if the file or the wanted part of its video cannot be decoded completely.
    """
    with open_media(path) as (container, log):
        stream = find_stream(container, "video")
        if stream is None:
            return
        zero = zero_seconds(container)
        rate = float(stream.guessed_rate or stream.average_rate or 0)
        limit = RateLimit(max_fps)
        last = -np.inf
        to_image = FrameImages(stream, short_side)
        for frame in stream_frames(container, stream, log, start_seconds):
            if frame.time is not None:
                seconds = frame.time - zero
            elif np.isfinite(last) and rate:
                seconds = last + 1 / rate
            else:
                raise MediaError("bad_timestamps", "the video has no time stamps")
            if seconds < last - _MAX_BACK_SECONDS:
                raise MediaError("bad_timestamps", f"the video leaps back at {last:.2f} s")
            if end_seconds is not None and seconds >= end_seconds - 1e-6:
                return
            if seconds <= last or seconds < start_seconds - 1e-6:
                continue  # a repeated frame, or one before the wanted part
            last = seconds
            to_image.check_shape(frame, seconds)
            if limit.keeps(seconds):
                duration = float(frame.duration * frame.time_base) if frame.duration else 0.0
                yield Frame(seconds, duration, to_image(frame))


def decode_audio(
    path: Source,
    *,
    sample_rate_hz: int,
    start_seconds: float = 0.0,
    end_seconds: float | None = None,
) -> Sound | None:
    """Decodes the audio to mono (see `mono`), so that a sample's index tells its time.

    Returns the audio from `start_seconds` until before `end_seconds`, with gaps filled by silence;
    None when the file has none there.

    Raises:
        MediaError: if the file or the wanted part of its audio cannot be decoded completely.
    """
    with open_media(path) as (container, log):
        stream = find_stream(container, "audio")
        if stream is None:
            return None
        zero = zero_seconds(container)
        frames: list[Any] = []
        decoded_seconds = 0.0
        for frame in stream_frames(container, stream, log, start_seconds):
            if end_seconds is not None:
                if frame.time is not None and frame.time - zero >= end_seconds:
                    break
                # Where times stand still, the samples are counted: memory has an end.
                if decoded_seconds > end_seconds + SEEK_MARGIN_SECONDS:
                    break
            if frame.samples:
                frames.append(frame)
                decoded_seconds += frame.samples / frame.sample_rate
        return lay_out(
            frames,
            zero=zero,
            sample_rate_hz=sample_rate_hz,
            start_seconds=start_seconds,
            end_seconds=end_seconds,
        )
