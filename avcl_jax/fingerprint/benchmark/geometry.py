"""Where things are in the picture: crop, scale, flip, rotation, bars."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import cv2
import numpy as np

from avcl_jax.data.media import DecodedMedia
from avcl_jax.fingerprint.benchmark.timeline import Transformed, unmoved

_SMALLEST_SIDE = 16  # pixels: a smaller picture shows nothing


def of_frames(media: DecodedMedia, change: Callable[[np.ndarray], np.ndarray]) -> Transformed:
    """Returns the clip with every frame changed alike.

    Args:
        media: the clip.
        change: uint8 [height, width, 3] to the same of any one size.
    """
    frames = np.stack([change(frame) for frame in media.frames])
    return unmoved(dataclasses.replace(media, frames=frames))


def crop(media: DecodedMedia, rng: np.random.Generator, *, side: float) -> Transformed:
    """Keeps a part of the picture, the same throughout the clip.

    Args:
        media: the clip.
        rng: draws where the part lies.
        side: its height and width, as a share of the picture's.
    """
    height, width = media.frames.shape[1:3]
    kept = max(1, round(height * side)), max(1, round(width * side))
    top = int(rng.integers(height - kept[0] + 1))
    left = int(rng.integers(width - kept[1] + 1))
    return of_frames(media, lambda f: f[top : top + kept[0], left : left + kept[1]])


def scale(media: DecodedMedia, rng: np.random.Generator, *, factor: float) -> Transformed:
    """Makes the picture smaller, as sites do that offer a clip in a lower resolution.

    Args:
        media: the clip.
        rng: not used.
        factor: by which height and width shrink; neither below 16 pixels.
    """
    height, width = media.frames.shape[1:3]
    size = (
        min(width, max(_SMALLEST_SIDE, round(width * factor))),
        min(height, max(_SMALLEST_SIDE, round(height * factor))),
    )
    return of_frames(media, lambda f: cv2.resize(f, size, interpolation=cv2.INTER_AREA))


def flip(media: DecodedMedia, rng: np.random.Generator) -> Transformed:
    """Exchanges left and right."""
    return of_frames(media, lambda f: f[:, ::-1])


def rotate(media: DecodedMedia, rng: np.random.Generator, *, degrees: float) -> Transformed:
    """Turns the picture about its centre; its corners become black.

    Args:
        media: the clip.
        rng: draws the sense.
        degrees: by how much.
    """
    height, width = media.frames.shape[1:3]
    centre = ((width - 1) / 2, (height - 1) / 2)
    turn = cv2.getRotationMatrix2D(centre, float(rng.choice([-degrees, degrees])), 1.0)
    return of_frames(media, lambda f: cv2.warpAffine(f, turn, (width, height)))


def pad(media: DecodedMedia, rng: np.random.Generator, *, side: float) -> Transformed:
    """Puts black bars above and below the picture, or left and right of it.

    Args:
        media: the clip.
        rng: draws which.
        side: height of each bar as a share of the picture's height (or width).
    """
    height, width = media.frames.shape[1:3]
    if rng.integers(2):
        bars = (0, 0, round(width * side), round(width * side))
    else:
        bars = (round(height * side), round(height * side), 0, 0)
    return of_frames(media, lambda f: cv2.copyMakeBorder(f, *bars, cv2.BORDER_CONSTANT, value=0))
