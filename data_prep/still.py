"""Detection of still pictures with audio: videos that change by codec noise only."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import simplejpeg

# A cell is a sixteenth of the frame wide and high. In a still picture H.264 changes its mean by up
# to 4 of 255 levels (CRF 28, 96 lines) or 6 (CRF 38, 360 lines). The least in a moving video of
# those measured, real or of the demo, is 54.
_CELLS, _LEVELS = 16, 8.0
_SMALLEST = 4 * _CELLS  # pixels; JPEG is decoded at a fraction of its size down to this
# In a shorter time real motion may be as small as noise.
_MIN_SECONDS = 0.5


def is_still(frames: Sequence[bytes], seconds: float) -> bool:
    """Returns whether all frames show the same picture.

    A slideshow is not still, a black screen is. Frames are read until one differs: for a video in
    which something moves these are few.

    Args:
      frames: JPEG files of one size.
      seconds: How long they are shown; less than half a second is never still.
    """
    if seconds < _MIN_SECONDS:
        return False
    first = _cells(frames[0])
    return all(np.abs(_cells(frame) - first).max() < _LEVELS for frame in frames[1:])


def _cells(frame: bytes) -> np.ndarray:
    """Returns the mean brightness of each cell, float32 [cells, cells]."""
    grey = simplejpeg.decode_jpeg(
        frame, colorspace="GRAY", min_height=_SMALLEST, min_width=_SMALLEST
    )
    return cv2.resize(grey[..., 0].astype(np.float32), (_CELLS,) * 2, interpolation=cv2.INTER_AREA)
