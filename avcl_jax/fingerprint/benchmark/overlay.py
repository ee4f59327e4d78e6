"""What people put on top of a picture: a sign, a caption."""

from __future__ import annotations

import cv2
import numpy as np

from avcl_jax.data.media import DecodedMedia
from avcl_jax.fingerprint.benchmark.geometry import of_frames
from avcl_jax.fingerprint.benchmark.timeline import Transformed

_TEXTS = ("WATCH THIS!", "you will not believe it", "part 2 of 3", "LIVE", "follow for more")
_FONT = cv2.FONT_HERSHEY_SIMPLEX
_FINE = 8  # a sign is drawn this many times larger and shrunk, which smooths its edges


def overlay(media: DecodedMedia, rng: np.random.Generator, *, area: float) -> Transformed:
    """Covers a corner with an opaque sign: a disc with a star in it, of random colours.

    Args:
        media: the clip.
        rng: draws colours and corner.
        area: of the square that holds the sign, as a share of the picture's.
    """
    height, width = media.frames.shape[1:3]
    side = max(2, min(height, width, round(float(np.sqrt(area * height * width)))))
    disc, star = (rng.integers(0, 256, 3).tolist() for _ in range(2))
    angles = np.arange(10) * np.pi / 5 - np.pi / 2
    radii = np.where(np.arange(10) % 2, 0.18, 0.42) * side * _FINE
    points = np.stack([np.cos(angles), np.sin(angles)], 1) * radii[:, None] + side * _FINE / 2
    large = (side * _FINE, side * _FINE)
    mask = np.zeros(large, np.uint8)
    middle = (side * _FINE // 2, side * _FINE // 2)
    cv2.circle(mask, middle, side * _FINE // 2, 255, -1)
    sign = np.full((*large, 3), disc, np.uint8)
    cv2.fillPoly(sign, [points.astype(np.int32)], star)
    sign = cv2.resize(sign, (side, side), interpolation=cv2.INTER_AREA).astype(np.float32)
    cover = cv2.resize(mask, (side, side), interpolation=cv2.INTER_AREA)[..., None] / 255
    top, left = int(rng.integers(2)) * (height - side), int(rng.integers(2)) * (width - side)

    def change(frame: np.ndarray) -> np.ndarray:
        changed = frame.copy()
        corner = changed[top : top + side, left : left + side]
        corner[:] = np.rint(cover * sign + (1 - cover) * corner).astype(np.uint8)
        return changed

    return of_frames(media, change)


def caption(
    media: DecodedMedia, rng: np.random.Generator, *, height: float, lines: int
) -> Transformed:
    """Writes white text on black bars across the picture, at the bottom and from there upwards.

    Args:
        media: the clip.
        rng: draws the words.
        height: of each bar, as a share of the picture's.
        lines: how many bars; the second is at the top.
    """
    rows, columns = media.frames.shape[1:3]
    bar = max(1, round(rows * height))
    band = np.zeros((bar, columns, 3), np.uint8)
    bands = []
    for text in rng.choice(_TEXTS, lines, replace=False):
        drawn = band.copy()
        (wide, tall), below = cv2.getTextSize(text, _FONT, 1.0, 1)
        size = min(0.9 * columns / wide, 0.9 * bar / (tall + below))
        left = round((columns - size * wide) / 2)
        baseline = round((bar + size * (tall - below)) / 2)
        thickness = max(1, round(size * 1.5))
        white = (255, 255, 255)
        cv2.putText(drawn, text, (left, baseline), _FONT, size, white, thickness, cv2.LINE_AA)
        bands.append(drawn)

    def change(frame: np.ndarray) -> np.ndarray:
        changed = frame.copy()
        changed[-bar:] = bands[0]
        if lines > 1:
            changed[:bar] = bands[1]
        return changed

    return of_frames(media, change)
