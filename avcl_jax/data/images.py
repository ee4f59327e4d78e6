"""JPEG frames to pixels, and one square crop for all frames of a clip.

A crop that moved from frame to frame would be a clock.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import cv2
import numpy as np
import simplejpeg

from avcl_jax.data.render_spec import CropSpec

if TYPE_CHECKING:
    from jaxtyping import UInt8

# grain has the parallelism; OpenCV's own pool of threads would oversubscribe the cores.
cv2.setNumThreads(0)
# Up to this factor, two source pixels cover an output pixel, and averaging areas takes five times
# as long as interpolation.
_LINEAR_SHRINKS = 1.25
_ROTATIONS = {  # by quarter turns, counter-clockwise
    1: cv2.ROTATE_90_COUNTERCLOCKWISE,
    2: cv2.ROTATE_180,
    3: cv2.ROTATE_90_CLOCKWISE,
}


def each_jpeg(frames: Sequence[bytes], size: tuple[int, int] | None = None) -> Iterator[np.ndarray]:
    """Decodes JPEG frames of one size, grey or RGB, one after another into the same memory.

    libjpeg-turbo (simplejpeg) without its fast DCT and fast upsampling: pixels are the same on
    every machine and library build.

    Args:
        size: required height and width; None for those of the first frame.

    Yields:
        uint8 [height, width, 3], RGB; the next frame overwrites it. It stays in the processor's
        cache for the crop that follows, which an array of all frames does not.

    Raises:
        ValueError: if a frame is not a JPEG, or sizes differ; before that size is allocated.
    """
    image: np.ndarray | None = None
    for number, frame in enumerate(frames):
        try:
            found = simplejpeg.decode_jpeg_header(frame)[:2]
            size = size or found
            if found != size:
                raise ValueError(f"is {found[0]}x{found[1]}, expected {size[0]}x{size[1]}")
            if image is None:
                image = np.empty((*size, 3), np.uint8)
            simplejpeg.decode_jpeg(frame, colorspace="RGB", buffer=image)
        except ValueError as error:
            raise ValueError(f"frame {number} of {len(frames)}: {error}") from error
        yield image


def decode_jpegs(frames: Sequence[bytes]) -> np.ndarray:
    """Decodes JPEG frames of one size, at least one, to uint8 [frames, height, width, 3], RGB.

    Raises:
        ValueError: if there is no frame, a frame is not a JPEG, or sizes differ.
    """
    if not frames:
        raise ValueError("decode_jpegs needs at least one frame, got none")
    return np.stack([image.copy() for image in each_jpeg(frames)])


@dataclasses.dataclass(frozen=True)
class Crop:
    """Square window of a frame, mirrored left to right, then turned counter-clockwise."""

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
    """Returns the largest square in the middle."""
    size = min(height, width)
    return Crop((height - size) // 2, (width - size) // 2, size, False)


def crops_along(height: int, width: int, crops: int) -> list[Crop]:
    """Returns the largest squares at equal distances along the longer side; one is centred."""
    if crops == 1:
        return [center_crop(height, width)]
    size = min(height, width)
    tops = np.linspace(0, height - size, crops).round().astype(int)
    lefts = np.linspace(0, width - size, crops).round().astype(int)
    return [Crop(int(t), int(left), size, False) for t, left in zip(tops, lefts, strict=True)]


def crop_frame(
    frame: UInt8[np.ndarray, "height width 3"], crop: Crop, out: UInt8[np.ndarray, "size size 3"]
) -> None:
    """Cuts, mirrors, turns and resizes one frame into `out`; shrinking does not alias.

    OpenCV mirrors and turns: numpy copies a reversed view pixel by pixel, which took thirty times
    as long and more than decoding.
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
    """Crops all frames of a clip alike (`crop_frame`)."""
    out = np.empty((len(frames), image_size, image_size, 3), np.uint8)
    for source, target in zip(frames, out, strict=True):
        crop_frame(source, crop, target)
    return out
