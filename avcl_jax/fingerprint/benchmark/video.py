"""Transformations of the video: geometry, colours, damage, overlays, frame rate, re-encoding."""

from __future__ import annotations

import dataclasses
import functools
import io
from collections.abc import Iterable

import cv2
import numpy as np

from avcl_jax.data.encode import write_mp4
from avcl_jax.data.media import DecodedMedia, decode_frames
from avcl_jax.fingerprint.benchmark.timeline import Rng, Transformed, unmoved

_SMALLEST_SIDE = 16  # pixels: smaller frames show nothing
_HUES = 180  # OpenCV counts hue of 8-bit images in steps of two degrees
_TEXTS = ("WATCH THIS!", "you will not believe it", "part 2 of 3", "LIVE", "follow for more")
_FONT = cv2.FONT_HERSHEY_SIMPLEX
# Looking ahead, x264 of FFmpeg 8.1 gives frames of 64 pixels other bits each time: its macroblock
# tree reads uninitialised memory.
_NO_LOOKAHEAD = {"rc-lookahead": "0"}
_FINE = 8  # a sign is drawn this many times larger and shrunk, which smooths its edges


def _with_frames(media: DecodedMedia, frames: Iterable[np.ndarray]) -> Transformed:
    """Returns the clip with other frames, uint8 [height, width, 3] of any one size."""
    return unmoved(dataclasses.replace(media, frames=np.stack(list(frames))))


def crop(media: DecodedMedia, rng: Rng, *, side: float) -> Transformed:
    """Keeps one part of every frame, `side` of its height and width, at a random place."""
    height, width = media.frames.shape[1:3]
    rows, columns = max(1, round(height * side)), max(1, round(width * side))
    top, left = int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1))
    return _with_frames(media, media.frames[:, top : top + rows, left : left + columns])


def scale(media: DecodedMedia, rng: Rng, *, factor: float) -> Transformed:
    """Shrinks the frames by `factor` to no less than 16 pixels, as sites that offer resolutions."""
    sides = (min(n, max(_SMALLEST_SIDE, round(n * factor))) for n in media.frames.shape[1:3])
    resize = functools.partial(cv2.resize, dsize=tuple(sides)[::-1], interpolation=cv2.INTER_AREA)
    return _with_frames(media, map(resize, media.frames))


def flip(media: DecodedMedia, rng: Rng) -> Transformed:
    """Exchanges left and right."""
    return _with_frames(media, media.frames[:, :, ::-1])


def rotate(media: DecodedMedia, rng: Rng, *, degrees: float) -> Transformed:
    """Turns the frames about their centre, in a random sense; corners become black."""
    height, width = media.frames.shape[1:3]
    centre = ((width - 1) / 2, (height - 1) / 2)
    turn = cv2.getRotationMatrix2D(centre, float(rng.choice([-degrees, degrees])), 1.0)
    return _with_frames(media, (cv2.warpAffine(f, turn, (width, height)) for f in media.frames))


def pad(media: DecodedMedia, rng: Rng, *, side: float) -> Transformed:
    """Puts black bars above and below, or left and right, each `side` of the height or width."""
    rows, columns = (round(n * side) for n in media.frames.shape[1:3])
    rows, columns = (0, columns) if rng.integers(2) else (rows, 0)
    bars = ((0, 0), (rows, rows), (columns, columns), (0, 0))
    return _with_frames(media, np.pad(media.frames, bars))


def photometric(media: DecodedMedia, rng: Rng, *, amount: float) -> Transformed:
    """Changes brightness, contrast, gamma, saturation and hue, the same throughout the clip.

    Contrast, gamma and saturation change by the factor 1 + `amount` or its inverse, brightness by a
    quarter of `amount` of the full range, hue by 40 degrees times `amount`.
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

    return _with_frames(media, map(change, media.frames))


def noise(media: DecodedMedia, rng: Rng, *, deviation: float) -> Transformed:
    """Adds Gaussian noise of a standard deviation out of 255, drawn for every frame."""
    noisy = (f + deviation * rng.standard_normal(f.shape, np.float32) for f in media.frames)
    return _with_frames(media, (np.clip(np.rint(f), 0, 255).astype(np.uint8) for f in noisy))


def blur(media: DecodedMedia, rng: Rng, *, deviation: float) -> Transformed:
    """Blurs with a Gaussian whose deviation is a fraction of the frame's short side."""
    sigma = deviation * min(media.frames.shape[1:3])
    return _with_frames(media, (cv2.GaussianBlur(f, (0, 0), sigma) for f in media.frames))


def overlay(media: DecodedMedia, rng: Rng, *, area: float) -> Transformed:
    """Covers a corner, `area` of the frame, with a sign: a star on a disc, of random colours."""
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
    frames = media.frames.copy()
    for corner in frames[:, top : top + side, left : left + side]:
        corner[:] = np.rint(cover * sign + (1 - cover) * corner).astype(np.uint8)
    return _with_frames(media, frames)


def caption(media: DecodedMedia, rng: Rng, *, height: float, lines: int) -> Transformed:
    """Writes white text on black bars of `height` of the frame: one below, a second one above."""
    frames = media.frames.copy()
    bar, columns = max(1, round(frames.shape[1] * height)), frames.shape[2]
    for text, rows in zip(
        rng.choice(_TEXTS, lines, replace=False), (slice(-bar, None), slice(bar)), strict=False
    ):
        band = np.zeros((bar, columns, 3), np.uint8)
        (wide, tall), below = cv2.getTextSize(text, _FONT, 1.0, 1)
        size = min(0.9 * columns / wide, 0.9 * bar / (tall + below))
        place = round((columns - size * wide) / 2), round((bar + size * (tall - below)) / 2)
        thickness = max(1, round(size * 1.5))
        cv2.putText(band, text, place, _FONT, size, (255, 255, 255), thickness, cv2.LINE_AA)
        frames[:, rows] = band
    return _with_frames(media, frames)


def frame_rate(media: DecodedMedia, rng: Rng, *, every: int) -> Transformed:
    """Keeps one frame of `every`."""
    frames, times = media.frames[::every], media.frame_seconds[::every]
    return unmoved(dataclasses.replace(media, frames=frames, frame_seconds=times))


def video_codec(media: DecodedMedia, rng: Rng, *, quality: int) -> Transformed:
    """Encodes and decodes as H.264 of the constant rate factor `quality`, 0 (lossless) to 51."""
    height, width = media.frames.shape[1:3]
    right, below = width % 2, height % 2  # 4:2:0 needs even sides
    frames = (
        cv2.copyMakeBorder(image, 0, below, 0, right, cv2.BORDER_REPLICATE)
        for image in media.frames
    )
    stream = io.BytesIO()
    write_mp4(
        stream,
        zip(media.frame_seconds, frames, strict=True),
        None,
        fps=media.fps or 1.0,
        sample_rate_hz=0,
        audio_bits_per_second=0,
        video_options={"crf": str(quality), "preset": "veryfast", "threads": "1"} | _NO_LOOKAHEAD,
        variable_rate=True,
        container="matroska",
    )
    decoded = list(decode_frames(stream.getvalue(), short_side=None, max_fps=None))
    if len(decoded) != len(media.frames):
        raise RuntimeError(f"x264 returned {len(decoded)} of {len(media.frames)} frames")
    return _with_frames(media, (frame.image[:height, :width] for frame in decoded))
