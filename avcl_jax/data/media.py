"""Media files to upright frames and mono audio on one timeline (PyAV, that is FFmpeg).

All times are seconds on the *file's* timeline, whose zero is where a player starts showing it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import numpy as np

from avcl_jax.data.frame_images import FrameImages
from avcl_jax.data.images import decode_jpegs
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
from avcl_jax.data.record_format import Record

# Names of other modules that callers take from here.
__all__ = ["REASONS", "MediaError", "Sound", "Source"]

_MAX_BACK_SECONDS = 0.5
_FPS_SLACK_SECONDS = 0.002  # time stamps in whole milliseconds make 30 fps vary


class MediaInfo(NamedTuple):
    """Header of a file; None where it has no such stream or does not say."""

    format: str  # FFmpeg's name of the container
    duration_seconds: float | None  # of the longest stream
    video: tuple[str, int, int] | None  # codec, stored width and height
    audio: tuple[str, int, str] | None  # codec, rate in Hz, channel layout


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

    Yields:
        Frames from `start_seconds` until before `end_seconds`, at strictly increasing times; none
        when the file has no video. An alpha channel is ignored.

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


@dataclasses.dataclass(frozen=True)
class DecodedMedia:
    """Video and mono audio of one clip on one timeline: a `Record` whose frames are pixels.

    `frames` are uint8 [frames, height, width, 3], RGB, upright; [0, 0, 0, 3] without video.
    """

    frames: np.ndarray
    frame_seconds: np.ndarray
    waveform: np.ndarray
    sample_rate_hz: int
    audio_start_seconds: float
    duration_seconds: float

    @property
    def has_video(self) -> bool:
        """True if there are frames."""
        return len(self.frames) > 0

    @property
    def has_audio(self) -> bool:
        """True if there are samples."""
        return len(self.waveform) > 0

    @property
    def fps(self) -> float:
        """Mean rate of the frames; 0 with fewer than two."""
        if len(self.frames) < 2:
            return 0.0
        return (len(self.frames) - 1) / float(self.frame_seconds[-1] - self.frame_seconds[0])

    def shown_at(self, seconds: np.ndarray | float) -> np.ndarray:
        """Returns the numbers of the frames on screen at some times, as a player shows them.

        It is the last frame that began before; the first one before that began.
        """
        begun = np.searchsorted(self.frame_seconds, np.asarray(seconds) + 1e-6, side="right")
        return np.maximum(begun - 1, 0)


def no_frames() -> np.ndarray:
    """Returns the frames of a clip without video."""
    return np.empty((0, 0, 0, 3), np.uint8)


def decode_media(
    path: Source,
    *,
    short_side: int | None,
    max_fps: float | None,
    sample_rate_hz: int,
    start_seconds: float = 0.0,
    end_seconds: float | None = None,
    modalities: Collection[str] = ("video", "audio"),
) -> DecodedMedia:
    """Decodes some modalities of a media file, or of an interval of it, into memory.

    Arguments are those of `decode_frames` and `decode_audio`.

    Raises:
        MediaError: if the file cannot be decoded, or has none of the modalities in the interval.
    """
    interval: dict[str, Any] = {"start_seconds": start_seconds, "end_seconds": end_seconds}
    frames, audio = [], None
    if "video" in modalities:
        frames = list(decode_frames(path, short_side=short_side, max_fps=max_fps, **interval))
    if "audio" in modalities:
        audio = decode_audio(path, sample_rate_hz=sample_rate_hz, **interval)
    if not frames and audio is None:
        raise MediaError("empty", f"no {' and no '.join(modalities)} in this interval")
    ends = []
    if frames:
        gap = frames[-1].seconds - frames[-2].seconds if len(frames) > 1 else 0.0
        ends.append(frames[-1].seconds + (frames[-1].duration_seconds or gap))
    if audio is not None:
        ends.append(audio.start_seconds + len(audio.waveform) / sample_rate_hz)
    return DecodedMedia(
        frames=np.stack([frame.image for frame in frames]) if frames else no_frames(),
        frame_seconds=np.array([frame.seconds for frame in frames]) - start_seconds,
        waveform=np.empty(0, np.int16) if audio is None else audio.waveform,
        sample_rate_hz=0 if audio is None else sample_rate_hz,
        audio_start_seconds=0.0 if audio is None else audio.start_seconds - start_seconds,
        duration_seconds=max(ends) - start_seconds,
    )


def decode_record(record: Record) -> DecodedMedia:
    """Decodes a prepared record into memory.

    Raises:
        ValueError: if a frame is not a JPEG.
    """
    frames = decode_jpegs(record.frames) if record.has_video else no_frames()
    names = [field.name for field in dataclasses.fields(DecodedMedia) if field.name != "frames"]
    return DecodedMedia(frames, *(getattr(record, name) for name in names))
