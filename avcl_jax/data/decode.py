"""JPEG frames to pixels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import simplejpeg


def decode_jpegs(frames: Sequence[bytes]) -> np.ndarray:
    """Decodes JPEG frames of one size into one array.

    Frames are decoded straight into the result by libjpeg-turbo (simplejpeg). Its fast DCT and
    fast upsampling are left off: pixels are the same on every machine and library build.

    Args:
      frames: JPEG files, all of one height and width; grey ones become RGB.

    Returns:
      uint8 [len(frames), height, width, 3], RGB.

    Raises:
      ValueError: If there is no frame, a frame is no JPEG, or sizes differ.
    """
    if not frames:
        raise ValueError("decode_jpegs needs at least one frame, got none")
    video: np.ndarray | None = None
    for number, frame in enumerate(frames):
        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(frame)
            if video is None:
                video = np.empty((len(frames), height, width, 3), np.uint8)
            if (height, width) != video.shape[1:3]:
                raise ValueError(
                    f"is {height}x{width} where frame 0 is {video.shape[1]}x{video.shape[2]}"
                )
            simplejpeg.decode_jpeg(frame, colorspace="RGB", buffer=video[number])
        except ValueError as error:
            raise ValueError(f"frame {number} of {len(frames)}: {error}") from error
    assert video is not None
    return video
