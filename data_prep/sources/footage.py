"""What every source gives: JPEG frames with their times, and mono sound."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import av
import cv2
import numpy as np
import simplejpeg
from av.video.reformatter import Interpolation, VideoReformatter

from avcl_jax.data.media import Sound
from avcl_jax.data.media_error import MediaError

_JPEG, _PASSED_ON = b"\xff\xd8\xff", ("YCbCr", "RGB", "Gray")


class JpegFrame(NamedTuple):
    """One frame as it goes into the record.

    Attributes:
      seconds: When it appears, on the source's timeline.
      duration_seconds: How long it stays; 0 when the source does not say.
      height: In pixels.
      width: In pixels.
      data: JPEG file.
    """

    seconds: float
    duration_seconds: float
    height: int
    width: int
    data: bytes


class Footage(Protocol):
    """One clip as its source has it, on the source's own timeline."""

    @property
    def stated_seconds(self) -> float | None:
        """Where the source says that it ends; None when it does not say."""

    @property
    def promised(self) -> bool:
        """Whether it is damaged if it ends before."""

    def frames(
        self, *, short_side: int, max_fps: float | None, quality: int
    ) -> Iterator[JpegFrame]:
        """Yields frames at strictly increasing times; none when there is no picture.

        Args:
          short_side: Larger frames are scaled down to this height or width.
          max_fps: Frames are dropped to this rate; None keeps all.
          quality: Of frames that are encoded here.
        """

    def sound(self, *, sample_rate_hz: int, until_seconds: float = np.inf) -> Sound | None:
        """Returns mono sound at this rate, of the clip or up to a time; None when there is none."""


def earlier_end(end_seconds: float | None, until_seconds: float) -> float | None:
    """Returns the earlier of two ends, of which None and infinity are none."""
    end = min(until_seconds, np.inf if end_seconds is None else end_seconds)
    return None if end == np.inf else end


def encode(image: np.ndarray, quality: int) -> bytes:
    """Returns uint8 [height, width, 3] RGB as a JPEG file."""
    return simplejpeg.encode_jpeg(image, quality=quality, colorspace="RGB", colorsubsampling="420")


class StillEncoder:
    """Makes single images into frames of a record.

    JPEG files that are small enough are passed on as they are, so that they lose nothing; others
    are decoded, scaled by the filter that films are scaled with, and encoded.
    """

    def __init__(self, *, short_side: int, quality: int):
        """Frames are at most this high or wide, whichever is shorter; see `ClipOptions`."""
        self._short_side = short_side
        self._quality = quality
        # Kept over all frames: setting one up takes twenty times as long as a 64x64 frame.
        self._reformatter = VideoReformatter()

    def __call__(self, image: bytes | np.ndarray) -> tuple[int, int, bytes]:
        """Returns height, width and JPEG file.

        Args:
          image: Encoded file, or uint8 [height, width, 1 or 3].

        Raises:
          MediaError: If it cannot be decoded.
        """
        if isinstance(image, np.ndarray):
            pixels = np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image
        elif image.startswith(_JPEG):
            pixels, is_good = _decode_jpeg(image)
            height, width = pixels.shape[:2]
            if is_good and min(height, width) <= self._short_side:
                return height, width, image
        else:
            pixels = _decode_other(image)
        height, width = pixels.shape[:2]
        scale = min(1.0, self._short_side / min(height, width))
        if scale < 1:
            pixels = self._reformatter.reformat(
                av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24"),
                width=max(1, round(width * scale)),
                height=max(1, round(height * scale)),
                format="rgb24",
                interpolation=Interpolation.AREA,
                threads=1,
            ).to_ndarray()
        return *pixels.shape[:2], encode(np.ascontiguousarray(pixels), self._quality)


def _decode_jpeg(data: bytes) -> tuple[np.ndarray, bool]:
    """Returns pixels, and whether training can read the file as it is."""
    try:
        _, _, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        if colorspace in _PASSED_ON:
            return simplejpeg.decode_jpeg(data, colorspace="RGB"), True
    except ValueError as error:
        raise MediaError("damaged", f"a frame is no whole JPEG file: {error}") from error
    return _decode_other(data), False


def _decode_other(data: bytes) -> np.ndarray:
    """Decodes what OpenCV reads: PNG, BMP, WebP, and JPEG for print."""
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data else None
    if pixels is None:
        raise MediaError("damaged", f"a frame of {len(data)} bytes is no whole image file")
    return pixels
