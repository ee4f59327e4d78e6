"""Spatial augmentation on the host: one crop for all frames of a clip.

A crop that moved from frame to frame would be a clock.
"""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
from jaxtyping import UInt8

from avcl_jax.errors import UserError

# One thread per worker: grain has the parallelism, and OpenCV's pool would oversubscribe the cores.
cv2.setNumThreads(0)
# Down to this, two pixels of the source cover what one shows, and averaging areas takes five times
# as long.
_LINEAR_SHRINKS = 1.25
# By quarter turns, counter-clockwise.
_ROTATIONS = {
    1: cv2.ROTATE_90_COUNTERCLOCKWISE,
    2: cv2.ROTATE_180,
    3: cv2.ROTATE_90_CLOCKWISE,
}


@dataclasses.dataclass(frozen=True)
class CropSpec:
    """Spatial view of a clip.

    Attributes:
        image_size: height and width of the result.
        min_area: smallest share of the largest square that a random crop keeps.
        flip: mirror half of the random crops.
        quarter_turns: also turn them by 0, 90, 180 or 270 degrees; for media without an upright.
    """

    image_size: int
    min_area: float
    flip: bool
    quarter_turns: bool

    def __post_init__(self) -> None:
        """Refuses an area that no crop can have."""
        if not 0 < self.min_area <= 1:
            raise UserError(f"crop.min_area {self.min_area} must be above 0 and at most 1")


@dataclasses.dataclass(frozen=True)
class Crop:
    """A square window of the picture.

    Attributes:
        top: first row.
        left: first column.
        size: height and width.
        flip: mirror left to right.
        turns: quarter turns, counter-clockwise, after mirroring.
    """

    top: int
    left: int
    size: int
    flip: bool
    turns: int = 0


def random_crop(rng: np.random.Generator, height: int, width: int, spec: CropSpec) -> Crop:
    """Draws a square crop of uniform area and place, and how to mirror and turn it."""
    largest = min(height, width)
    size = max(1, round(largest * float(np.sqrt(rng.uniform(spec.min_area, 1.0)))))
    top = int(rng.integers(height - size + 1))
    left = int(rng.integers(width - size + 1))
    flip = bool(rng.integers(2))
    turns = int(rng.integers(4))
    return Crop(top, left, size, flip and spec.flip, turns * spec.quarter_turns)


def center_crop(height: int, width: int) -> Crop:
    """The largest square in the middle."""
    size = min(height, width)
    return Crop((height - size) // 2, (width - size) // 2, size, False)


def crop_frame(
    frame: UInt8[np.ndarray, "height width 3"], crop: Crop, out: UInt8[np.ndarray, "size size 3"]
) -> None:
    """Cuts, mirrors, turns and resizes one frame into `out`; shrinking does not alias.

    Mirrored and turned by OpenCV: numpy moves the pixels of a reversed view one by one, which took
    thirty times as long and more than decoding them.
    """
    window = frame[crop.top : crop.top + crop.size, crop.left : crop.left + crop.size]
    if crop.flip:
        window = cv2.flip(window, 1)
    if crop.turns:
        window = cv2.rotate(window, _ROTATIONS[crop.turns])
    size = len(out)
    if crop.size == size:
        out[...] = window
        return
    interpolation = cv2.INTER_AREA if crop.size > _LINEAR_SHRINKS * size else cv2.INTER_LINEAR
    cv2.resize(window, (size, size), dst=out, interpolation=interpolation)


def apply_crop(
    frames: UInt8[np.ndarray, "time height width 3"], crop: Crop, image_size: int
) -> UInt8[np.ndarray, "time size size 3"]:
    """Cuts, mirrors, turns and resizes all frames of a clip alike."""
    out = np.empty((len(frames), image_size, image_size, 3), np.uint8)
    for source, target in zip(frames, out, strict=True):
        crop_frame(source, crop, target)
    return out
