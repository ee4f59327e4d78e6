"""Detection of still pictures with audio: videos that change by codec noise only."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import simplejpeg

# Cells per side of a frame -> smallest change of the mean brightness of a cell, in levels of 255,
# that is motion. In still pictures H.264 changes cells of 16x16 by up to 4 (CRF 28, 96 lines) or 6
# (CRF 38, 360 lines); in moving videos, real or of the demo, the smallest change measured is 54. If
# only a mouth moves, cells of 16x16 change by 6, but cells of 64x64 by 53; in a still picture with
# noise that cells of 16x16 tolerate those change by up to 36.
_LEVELS = {16: 8.0, 64: 40.0}
_SMALLEST = max(_LEVELS)  # pixels; JPEG is decoded at a fraction of its size down to this
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
    first = _means(frames[0])
    return not any(
        np.abs(mean - reference).max() >= levels
        for frame in frames[1:]
        for mean, reference, levels in zip(_means(frame), first, _LEVELS.values(), strict=True)
    )


def _means(frame: bytes) -> list[np.ndarray]:
    """Returns the mean brightness of cells of each size, float32 [cells, cells]."""
    grey = simplejpeg.decode_jpeg(
        frame, colorspace="GRAY", min_height=_SMALLEST, min_width=_SMALLEST
    )[..., 0].astype(np.float32)
    return [cv2.resize(grey, (cells,) * 2, interpolation=cv2.INTER_AREA) for cells in _LEVELS]
