"""JPEG frames to pixels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import simplejpeg


def decode_jpegs(frames: Sequence[bytes], size: tuple[int, int] | None = None) -> np.ndarray:
    """Decodes JPEG frames of one size into one array.

    Frames are decoded straight into the result by libjpeg-turbo (simplejpeg). Its fast DCT and
    fast upsampling are left off: pixels are the same on every machine and library build.

    Args:
      frames: JPEG files, all of one height and width; grey ones become RGB.
      size: Height and width that they must have; None for those of the first.

    Returns:
      uint8 [len(frames), height, width, 3], RGB.

    Raises:
      ValueError: If there is no frame, a frame is no JPEG, or sizes differ; before anything of
        that size is allocated.
    """
    if not frames:
        raise ValueError("decode_jpegs needs at least one frame, got none")
    video: np.ndarray | None = None
    for number, frame in enumerate(frames):
        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(frame)
            size = size or (height, width)
            if (height, width) != size:
                raise ValueError(f"is {height}x{width}, expected {size[0]}x{size[1]}")
            if video is None:
                video = np.empty((len(frames), height, width, 3), np.uint8)
            simplejpeg.decode_jpeg(frame, colorspace="RGB", buffer=video[number])
        except ValueError as error:
            raise ValueError(f"frame {number} of {len(frames)}: {error}") from error
    assert video is not None
    return video
