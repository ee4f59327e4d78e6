"""Colours of the picture, and what damages it: noise and blur."""

from __future__ import annotations

import cv2
import numpy as np

from avcl_jax.data.media import DecodedMedia
from avcl_jax.fingerprint.benchmark.geometry import of_frames
from avcl_jax.fingerprint.benchmark.timeline import Transformed

_HUES = 180  # OpenCV counts hue of 8-bit pictures in steps of two degrees


def photometric(media: DecodedMedia, rng: np.random.Generator, *, amount: float) -> Transformed:
    """Changes brightness, contrast, gamma, saturation and hue, the same throughout the clip.

    Args:
        media: the clip.
        rng: draws the sense of each change; their sizes are fixed.
        amount: relative change of contrast, gamma and saturation; brightness moves by a quarter of
            it of the full range, hue by 40 degrees times it.
    """
    senses = rng.choice([-1.0, 1.0], 5)
    levels = np.linspace(0, 1, 256) ** ((1 + amount) ** senses[0])
    levels = (levels - 0.5) * (1 + amount) ** senses[1] + 0.5 + senses[2] * amount / 4
    lookup = np.rint(np.clip(levels, 0, 1) * 255).astype(np.uint8)
    saturation = (1 + amount) ** senses[3]
    hue = senses[4] * 40 * amount / 360 * _HUES

    def change(frame: np.ndarray) -> np.ndarray:
        colours = cv2.cvtColor(frame, cv2.COLOR_RGB2HSV).astype(np.float32)
        colours[..., 0] = np.rint(colours[..., 0] + hue) % _HUES
        colours[..., 1] = np.rint(np.clip(colours[..., 1] * saturation, 0, 255))
        return lookup[cv2.cvtColor(colours.astype(np.uint8), cv2.COLOR_HSV2RGB)]

    return of_frames(media, change)


def noise(media: DecodedMedia, rng: np.random.Generator, *, deviation: float) -> Transformed:
    """Adds Gaussian noise, anew in every frame.

    Args:
        media: the clip.
        rng: draws the noise.
        deviation: of the noise, of 255.
    """

    def change(frame: np.ndarray) -> np.ndarray:
        noisy = frame + deviation * rng.standard_normal(frame.shape, np.float32)
        return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)

    return of_frames(media, change)


def blur(media: DecodedMedia, rng: np.random.Generator, *, deviation: float) -> Transformed:
    """Blurs every frame with a Gaussian.

    Args:
        media: the clip.
        rng: not used.
        deviation: of the Gaussian, as a share of the picture's short side.
    """
    sigma = deviation * min(media.frames.shape[1:3])
    return of_frames(media, lambda f: cv2.GaussianBlur(f, (0, 0), sigma))
