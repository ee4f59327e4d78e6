"""Video of a scene: a glowing object with a comet trail and fading marks over clutter.

Hue, texture, shape, clutter, distractors and the camera's jitter are random and bound to nothing.
Trail and marks last about as long as a frame at eight times the speed (0.5 s), so that the arrow of
time can be seen at every speed; the trail's clock is the same in every video, so that speed can be
seen too.
"""

from __future__ import annotations

import colorsys

import cv2
import numpy as np

from avcl_jax.data_prep.foley.motion import sway
from avcl_jax.data_prep.foley.scene import SIZE, VIDEO_FPS, Scene

TRAIL_SECONDS = 0.4
MARK_OVER_DECAY = 1.2  # a mark glows a little longer than the tone of its contact
RING_GROWTH_SECONDS = 0.12
SUBSTEPS = 6
SPRITE = 48
SENSOR_NOISE = 1.5

# Opacity [frames, 64, 64] and colour [3] in [0, 1].
Layer = tuple[np.ndarray, np.ndarray]

_GRID = np.arange(SIZE, dtype=np.float32)


def render_video(scene: Scene) -> np.ndarray:
    """Renders uint8 [frames, 64, 64, 3] RGB; frame j is at time j / `VIDEO_FPS`."""
    rng = np.random.default_rng(scene.video_seed)
    seconds = np.arange(scene.num_frames) / VIDEO_FPS
    energy = scene.energy(seconds).astype(np.float32)
    hue = rng.uniform()
    backdrop = np.ascontiguousarray(_backdrop(rng, hue).transpose(2, 0, 1))
    layers = _distractors(rng, seconds)
    trail_colour = _colour(hue + rng.uniform(-0.12, 0.12), rng.uniform(0.6, 0.9), 1.0)
    layers.append((_trail(scene) * (0.1 + 0.8 * energy)[:, None, None], trail_colour))
    layers.append((marks(scene), _colour(rng.uniform(), rng.uniform(0.1, 0.5), 1.0)))
    sprite = _sprite(rng, hue)
    spin = rng.uniform(0, 360) + rng.choice([-1, 1]) * rng.uniform(40, 120) * seconds
    places, radii = scene.place(seconds), scene.radius(seconds)
    offsets = _shake(rng, len(seconds))
    grain = rng.normal(0.5, SENSOR_NOISE, size=(4 * SIZE, 4 * SIZE, 3)).astype(np.float32)
    corners = rng.integers(0, 3 * SIZE, size=(len(seconds), 2))
    frames = np.empty((len(seconds), SIZE, SIZE, 3), np.uint8)
    # Frame by frame and plane by plane: a frame stays in the cache, and numpy is slow on axes of 3.
    for number, (row, column) in enumerate(corners):
        planes = backdrop.copy()
        for opacity, colour in layers:
            planes += opacity[number] * (colour[:, None, None] - planes)
        frame = np.ascontiguousarray(planes.transpose(1, 2, 0))
        _paste(frame, sprite, places[number], radii[number], spin[number])
        frame = _shift(frame, offsets[number])
        frame *= 255
        frame += grain[row : row + SIZE, column : column + SIZE]
        frames[number] = np.clip(frame, 0, 255, out=frame)
    return frames


def _colour(hue: float, saturation: float, value: float) -> np.ndarray:
    return np.array(colorsys.hsv_to_rgb(hue % 1.0, saturation, value), np.float32)


def _backdrop(rng: np.random.Generator, hue: float) -> np.ndarray:
    """Draws a dim texture with polygons and discs, [64, 64, 3] in [0, 1]."""
    base = _colour(hue + rng.uniform(0.25, 0.75), rng.uniform(0.3, 0.8), rng.uniform(0.12, 0.4))
    canvas = np.ones((SIZE * 4, SIZE * 4, 3), np.float32) * base
    for cells, strength in ((3, 0.25), (9, 0.12)):
        coarse = rng.standard_normal((cells, cells, 3)).astype(np.float32)
        texture = cv2.resize(coarse, (SIZE * 4,) * 2, interpolation=cv2.INTER_CUBIC)
        canvas *= 1 + strength * texture
    for _ in range(rng.integers(3, 8)):
        colour = _colour(rng.uniform(), rng.uniform(0.2, 0.8), rng.uniform(0.1, 0.5)).tolist()
        centre = rng.uniform(0, SIZE * 4, size=2)
        if rng.uniform() < 0.4:
            x, y = centre.astype(int).tolist()
            cv2.circle(canvas, (x, y), int(rng.uniform(10, 34)), colour, -1)
        else:
            around = np.sort(rng.uniform(0, 2 * np.pi, size=rng.integers(3, 6)))
            far = rng.uniform(12, 48, size=len(around))[:, None]
            corners = centre + far * np.stack([np.cos(around), np.sin(around)], axis=-1)
            cv2.fillPoly(canvas, [corners.astype(np.int32)], colour)
    return np.clip(cv2.resize(canvas, (SIZE, SIZE), interpolation=cv2.INTER_AREA), 0.02, 0.75)


def _distractors(rng: np.random.Generator, seconds: np.ndarray) -> list[Layer]:
    """Draws silent discs that drift on slow reversible curves, without trail."""
    layers = []
    for _ in range(rng.integers(1, 5)):
        rate = rng.uniform(0.05, 0.3, size=2)
        phase = rng.uniform(0, 2 * np.pi, size=2)
        swing = rng.uniform(4, 18, size=2)
        centre = rng.uniform(8, SIZE - 8, size=2)
        place = centre + swing * np.sin(2 * np.pi * rate * seconds[:, None] + phase)
        x, y = _blobs(place, np.full(len(seconds), rng.uniform(1.5, 3.5)))
        colour = _colour(rng.uniform(), rng.uniform(0.3, 0.9), rng.uniform(0.4, 0.9))
        blob = y[:, :, None] * x[:, None, :]
        layers.append((np.float32(rng.uniform(0.4, 0.8)) * blob, colour))
    return layers


def _blobs(place: np.ndarray, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns Gaussian blobs with peak 1 at `place` [N, 2]: factors x and y, both [N, 64]."""
    scale = (1 / (2 * sigma**2)).astype(np.float32)[:, None]
    x = np.exp(-scale * (_GRID - place[:, :1].astype(np.float32)) ** 2)
    y = np.exp(-scale * (_GRID - place[:, 1:].astype(np.float32)) ** 2)
    return x, y


def _trail(scene: Scene) -> np.ndarray:
    """Returns the opacity [frames, 64, 64] of the comet trail, which fades exponentially."""
    fine = 1 / (VIDEO_FPS * SUBSTEPS)
    lead = 16 * SUBSTEPS
    count = lead + scene.num_frames * SUBSTEPS
    # The last substep of a frame is the frame's own time.
    seconds = (np.arange(count) - lead - SUBSTEPS + 1) * fine
    fade = np.exp(-np.arange(SUBSTEPS)[::-1] * fine / TRAIL_SECONDS).astype(np.float32)
    x, y = _blobs(scene.place(seconds), 0.55 * scene.radius(seconds))
    x, y = x.reshape(-1, SUBSTEPS, SIZE), y.reshape(-1, SUBSTEPS, SIZE)
    fresh = np.max(y[..., :, None] * (x * fade[:, None])[..., None, :], axis=1)
    trail = np.empty((scene.num_frames, SIZE, SIZE), np.float32)
    state = np.zeros((SIZE, SIZE), np.float32)
    forget = np.float32(np.exp(-1 / (VIDEO_FPS * TRAIL_SECONDS)))
    for i, layer in enumerate(fresh):
        state = np.maximum(state * forget, layer)
        if i >= lead // SUBSTEPS:
            trail[i - lead // SUBSTEPS] = state
    return trail


def marks(scene: Scene) -> np.ndarray:
    """Returns the opacity of contact marks, float32 [frames, 64, 64] in [0, 1].

    A flash, and a ring that grows and fades. The ring shows the contact's tone: it is wide where
    the pitch is low, bright where it is loud.
    """
    glow = MARK_OVER_DECAY * scene.decay_seconds
    shutter = np.linspace(0, 1 / VIDEO_FPS, 8)
    gain = 1 / scene.amplitude(np.linspace(0, glow, 200)).mean()  # as much light in every material
    drawn = np.zeros((scene.num_frames, SIZE, SIZE), np.float32)
    last = int(3.5 * glow * VIDEO_FPS)
    times = scene.contact_seconds
    force = scene.energy(times) * scene.contact_strength
    radius = scene.radius(times)
    for time, place, strength, size in zip(times, scene.contact_place, force, radius, strict=True):
        first = max(0, int(np.ceil(time * VIDEO_FPS - 1e-9)))
        ages = np.arange(first, min(first + last, scene.num_frames)) / VIDEO_FPS - time
        if not len(ages):
            continue
        x, y = _GRID - np.float32(place[0]), _GRID - np.float32(place[1])
        away = np.sqrt(y[:, None] ** 2 + x[None, :] ** 2)
        grown = size * 0.8 + (6 + 10 * strength) * (1 - np.exp(-ages / RING_GROWTH_SECONDS))
        grown = (grown * 2 ** (-scene.octaves(ages))).astype(np.float32)
        # What a shutter sees that is open from one frame to the next.
        loud = gain * scene.amplitude(np.maximum(ages[:, None] - shutter, 0)).mean(axis=1)
        light = (0.7 * np.exp(-ages / glow) * loud).astype(np.float32)[:, None, None]
        ring = np.exp(-(((away - grown[:, None, None]) / 1.3) ** 2))
        spot, fading = np.exp(-((away / np.float32(size * 1.5)) ** 2)), np.exp(-ages / 0.08)
        flash = spot * fading[:, None, None]
        opacity = np.float32(0.25 + 0.75 * strength)
        drawn[first : first + len(ages)] += opacity * (light * ring + flash)
    return np.minimum(drawn, 1.0)


def _sprite(rng: np.random.Generator, hue: float) -> np.ndarray:
    """Draws a shaded, textured body, [48, 48, 4] float32 RGBA, radius 18 pixels."""
    y, x = (np.mgrid[:SPRITE, :SPRITE].astype(np.float32) - (SPRITE - 1) / 2) / 18
    angle, away = np.arctan2(y, x), np.hypot(x, y)
    lobes = rng.integers(3, 7)
    outline = 1 - rng.uniform(0.0, 0.22) * (0.5 + 0.5 * np.cos(lobes * angle))
    alpha = np.clip((outline - away) * 9, 0, 1)
    light = np.clip(1.05 - 0.55 * np.hypot(x + 0.3, y + 0.3), 0.25, 1)
    body = _colour(hue, rng.uniform(0.35, 0.8), 1.0) * light[..., None]
    accent = _colour(hue + rng.uniform(0.3, 0.7), 0.8, rng.uniform(0.3, 1.0))
    tone = rng.uniform(0, 2 * np.pi)
    stripes = np.sin(rng.uniform(3, 6) * (x * np.cos(tone) + y * np.sin(tone)) + tone) > 0.35
    body[stripes] = 0.6 * body[stripes] + 0.4 * accent * light[stripes][:, None]
    rim = np.clip(1 - np.abs(outline - away - 0.06) * 10, 0, 1)[..., None]
    body = body + 0.5 * rim * (1 - body)
    sprite = np.concatenate([body * alpha[..., None], alpha[..., None]], axis=-1)
    return cv2.GaussianBlur(sprite.astype(np.float32), (0, 0), 1.2)


def _paste(frame, sprite, place, radius, angle_degrees):
    """Blends the sprite into one frame, in place."""
    middle = (SPRITE - 1) / 2
    matrix = cv2.getRotationMatrix2D((middle, middle), angle_degrees, radius / 18)
    matrix[:, 2] += place - middle
    layer = cv2.warpAffine(sprite, matrix, (SIZE, SIZE), flags=cv2.INTER_LINEAR)
    frame *= 1 - layer[..., 3:]
    frame += layer[..., :3]


def _shake(rng: np.random.Generator, count: int) -> np.ndarray:
    """Draws camera offsets [count, 2] in pixels: jitter on a slow sway, alike when reversed."""
    slow = sway(rng, np.arange(count) / VIDEO_FPS, (0.5, 1.5), (0.05, 0.15))
    return slow + 0.25 * rng.standard_normal((count, 2))


def _shift(frame: np.ndarray, offset: np.ndarray) -> np.ndarray:
    matrix, border = np.array([[1, 0, offset[0]], [0, 1, offset[1]]]), cv2.BORDER_REFLECT_101
    return cv2.warpAffine(frame, matrix, (SIZE, SIZE), flags=cv2.INTER_LINEAR, borderMode=border)
