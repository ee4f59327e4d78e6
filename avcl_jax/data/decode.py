"""JPEG frames to pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import simplejpeg


def each_jpeg(frames: Sequence[bytes], size: tuple[int, int] | None = None) -> Iterator[np.ndarray]:
    """Decodes JPEG frames of one size one after another, all into the same memory.

    libjpeg-turbo (simplejpeg) with its fast DCT and fast upsampling left off: pixels are the same
    on every machine and library build.

    Args:
      frames: JPEG files, all of one height and width; grey ones become RGB.
      size: Height and width that they must have; None for those of the first.

    Yields:
      uint8 [height, width, 3], RGB; the next frame overwrites it. It stays in the processor's
      cache for whoever crops it, which an array of all frames does not.

    Raises:
      ValueError: If a frame is no JPEG, or sizes differ; before anything of that size is
        allocated.
    """
    image: np.ndarray | None = None
    for number, frame in enumerate(frames):
        try:
            if image is None:
                found = _size(frame)
                _check_size(found, size or found)
                image = np.empty((*found, 3), np.uint8)
            _decode_into(image, frame)
        except ValueError as error:
            raise ValueError(f"frame {number} of {len(frames)}: {error}") from error
        yield image


def _size(frame: bytes) -> tuple[int, int]:
    height, width, _, _ = simplejpeg.decode_jpeg_header(frame)
    return height, width


def _check_size(found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if found != wanted:
        raise ValueError(f"is {found[0]}x{found[1]}, expected {wanted[0]}x{wanted[1]}")


def _decode_into(image: np.ndarray, frame: bytes) -> None:
    """Decodes a frame of the size of `image`, whose header need not be read beforehand."""
    wanted = image.shape[:2]
    try:
        found = simplejpeg.decode_jpeg(frame, colorspace="RGB", buffer=image)
    except ValueError:
        _check_size(_size(frame), wanted)
        raise
    _check_size(found.shape[:2], wanted)


def decode_jpegs(frames: Sequence[bytes]) -> np.ndarray:
    """Decodes JPEG frames of one size into one array.

    Args:
      frames: As for `each_jpeg`, at least one.

    Returns:
      uint8 [len(frames), height, width, 3], RGB.

    Raises:
      ValueError: If there is no frame, a frame is no JPEG, or sizes differ.
    """
    if not frames:
        raise ValueError("decode_jpegs needs at least one frame, got none")
    return np.stack([image.copy() for image in each_jpeg(frames)])
