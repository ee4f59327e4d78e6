"""Decoding of a clip, whatever its source: JPEG frames with their times, and mono audio."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import av
import cv2
import numpy as np
import simplejpeg
from av.video.reformatter import Interpolation, VideoReformatter

from avcl_jax.data import media
from avcl_jax.data.media import MediaError, Sound

_JPEG, _PASSED_ON = b"\xff\xd8\xff", ("YCbCr", "RGB", "Gray")
# Containers that state their duration. In the others FFmpeg guesses it from the bit rate.
_STATED_DURATION = ("mov", "matroska", "avi", "wav", "flac", "asf", "flv", "ogg")


class JpegFrame(NamedTuple):
    """One frame of a record."""

    seconds: float  # on the source's timeline
    duration_seconds: float  # 0 if it is not known
    height: int
    width: int
    data: bytes


@dataclasses.dataclass(frozen=True)
class Footage:
    """An interval of a clip in its source, on the source's own timeline.

    `frames` takes the settings of `ClipOptions`, and yields frames at strictly increasing times,
    none without video. It and `audio` raise MediaError where the source cannot be decoded.
    """

    start_seconds: float
    end_seconds: float | None  # None: the end of the source
    stated_seconds: float | None  # end that the source states
    promised: bool  # whether the source is damaged if it ends before
    frames: Callable[[int, float | None, int], Iterator[JpegFrame]]  # short side, fps, quality
    decode_audio: Callable[..., Sound | None]  # takes a sample rate, a start and an end

    def audio(self, sample_rate_hz: int, until_seconds: float = np.inf) -> Sound | None:
        """Returns mono audio of the interval or up to a time, None without."""
        end = min(until_seconds, np.inf if self.end_seconds is None else self.end_seconds)
        return self.decode_audio(
            sample_rate_hz=sample_rate_hz,
            start_seconds=self.start_seconds,
            end_seconds=None if end == np.inf else end,
        )


def open_media(source: str | bytes, start: float, end: float | None) -> Footage:
    """Returns an interval of a media file; raises MediaError if its header cannot be read."""

    def frames(short_side: int, max_fps: float | None, quality: int) -> Iterator[JpegFrame]:
        for frame in media.decode_frames(
            source, short_side=short_side, max_fps=max_fps, start_seconds=start, end_seconds=end
        ):
            height, width = frame.image.shape[:2]
            data = _encode(frame.image, quality)
            yield JpegFrame(frame.seconds, frame.duration_seconds, height, width, data)

    info = media.probe(source)
    promised = info.format.startswith(_STATED_DURATION)
    decode_audio = functools.partial(media.decode_audio, source)
    return Footage(start, end, info.duration_seconds, promised, frames, decode_audio)


def _encode(image: np.ndarray, quality: int) -> bytes:
    """Returns uint8 [height, width, 3] RGB as a JPEG file."""
    return simplejpeg.encode_jpeg(image, quality=quality, colorspace="RGB", colorsubsampling="420")


def encode_still(
    image: bytes | np.ndarray, short_side: int, quality: int, reformatter: VideoReformatter
) -> tuple[int, int, bytes]:
    """Converts a single image to a frame of a record: height, width and JPEG file.

    An image is an encoded file, or uint8 [height, width, 1 or 3]. JPEG files that are small enough
    are passed on unchanged, so that they lose nothing; others are decoded, scaled by the filter
    that videos are scaled with, and encoded. Making the reformatter, kept over all frames, takes
    twenty times as long as a 64x64 frame.

    Raises MediaError if it cannot be decoded.
    """
    if isinstance(image, np.ndarray):
        pixels, is_good = np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image, False
    else:
        pixels, is_good = _decode(image)
    height, width = pixels.shape[:2]
    scale = min(1.0, short_side / min(height, width))
    if scale == 1 and isinstance(image, bytes) and is_good:
        return height, width, image
    if scale < 1:
        pixels = reformatter.reformat(
            av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24"),
            width=max(1, round(width * scale)),
            height=max(1, round(height * scale)),
            format="rgb24",
            interpolation=Interpolation.AREA,
            threads=1,
        ).to_ndarray()
    return *pixels.shape[:2], _encode(np.ascontiguousarray(pixels), quality)


def _decode(data: bytes) -> tuple[np.ndarray, bool]:
    """Returns pixels, and whether training can read the file unchanged."""
    try:
        if data.startswith(_JPEG) and simplejpeg.decode_jpeg_header(data)[2] in _PASSED_ON:
            return simplejpeg.decode_jpeg(data, colorspace="RGB"), True
    except ValueError as error:
        raise MediaError("damaged", f"a frame is not a whole JPEG file: {error}") from error
    # OpenCV reads PNG, BMP, WebP, and JPEG for print.
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data else None
    if pixels is None:
        raise MediaError("damaged", f"a frame of {len(data)} bytes is not a whole image file")
    return pixels, False
