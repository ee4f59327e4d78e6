"""Whole clips in memory: cut into segments, transformed, and fingerprinted."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import numpy as np

from avcl_jax.data.images import decode_jpegs
from avcl_jax.data.media import MediaError, Source, decode_audio, decode_frames
from avcl_jax.data.record_format import Record


@dataclasses.dataclass(frozen=True)
class DecodedMedia:
    """Video and mono audio of one clip on one timeline, whose zero is the clip's start.

    Attributes:
        frames: uint8 [frames, height, width, 3], RGB, upright; [0, 0, 0, 3] without video.
        frame_seconds: float64 [frames], strictly increasing, when each frame appears.
        waveform: int16 [samples]; empty without audio.
        sample_rate_hz: rate of `waveform`; 0 without audio.
        audio_start_seconds: time of `waveform[0]`.
        duration_seconds: end of the last frame or of the last sample, whichever is later.
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

    Arguments are those of `media.decode_frames` and `media.decode_audio`.

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
    return DecodedMedia(
        frames=decode_jpegs(record.frames) if record.has_video else no_frames(),
        frame_seconds=record.frame_seconds,
        waveform=record.waveform,
        sample_rate_hz=record.sample_rate_hz,
        audio_start_seconds=record.audio_start_seconds,
        duration_seconds=record.duration_seconds,
    )
