"""Spatial augmentation on the host: one crop for all frames of a clip.

A crop that moved from frame to frame would be a clock (design section 2.1).
"""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
from jaxtyping import UInt8

# One thread per worker: grain has the parallelism, and OpenCV's pool would oversubscribe the cores.
cv2.setNumThreads(0)


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


def apply_crop(
    frames: UInt8[np.ndarray, "time height width 3"], crop: Crop, image_size: int
) -> UInt8[np.ndarray, "time size size 3"]:
    """Cuts, mirrors, turns and resizes all frames of a clip alike; shrinking does not alias."""
    window = frames[:, crop.top : crop.top + crop.size, crop.left : crop.left + crop.size]
    if crop.flip:
        window = window[:, :, ::-1]
    if crop.turns:
        window = np.rot90(window, crop.turns, axes=(1, 2))
    if crop.size == image_size:
        return np.ascontiguousarray(window)
    interpolation = cv2.INTER_AREA if crop.size > image_size else cv2.INTER_LINEAR
    out = np.empty((len(window), image_size, image_size, 3), np.uint8)
    for source, target in zip(window, out, strict=True):
        source = np.ascontiguousarray(source)
        cv2.resize(source, (image_size, image_size), dst=target, interpolation=interpolation)
    return out
