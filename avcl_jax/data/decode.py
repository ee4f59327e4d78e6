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
            height, width, _, _ = simplejpeg.decode_jpeg_header(frame)
            size = size or (height, width)
            if (height, width) != size:
                raise ValueError(f"is {height}x{width}, expected {size[0]}x{size[1]}")
            if image is None:
                image = np.empty((height, width, 3), np.uint8)
            simplejpeg.decode_jpeg(frame, colorspace="RGB", buffer=image)
        except ValueError as error:
            raise ValueError(f"frame {number} of {len(frames)}: {error}") from error
        yield image


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
