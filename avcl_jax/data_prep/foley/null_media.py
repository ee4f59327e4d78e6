"""Media of stationary noise for the null controls.

Frames are independent noise or one still image, and audio is stationary noise, so speed and
direction of a rendered view cannot be recognised unless decoding, resizing or rendering reveals
them.
"""

from __future__ import annotations

import cv2
import numpy as np
from scipy import fft

from avcl_jax.data_prep.foley.scene import SAMPLE_RATE_HZ, SIZE, SPLITS, VIDEO_FPS

VIDEOS = ("white", "coloured", "still")
AUDIO = ("white", "pink")


def render_null(seed: int, split: str, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Renders one noise video, uint8 [frames, 64, 64, 3] and float32 [samples] of equal length.

    Kinds of video and of audio take turns by index.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, SPLITS.index(split), index]))
    num_frames = int(rng.integers(8 * VIDEO_FPS, 10 * VIDEO_FPS + 1))
    video = VIDEOS[index % len(VIDEOS)]
    audio = AUDIO[index // len(VIDEOS) % len(AUDIO)]
    return _frames(rng, num_frames, video), _sound(rng, num_frames, audio)


def _frames(rng: np.random.Generator, num_frames: int, kind: str) -> np.ndarray:
    count = 1 if kind == "still" else num_frames
    noise = rng.standard_normal((count, SIZE, SIZE, 3), dtype=np.float32)
    if kind != "white":
        coarse = rng.uniform(1.0, 3.0)
        blurred = [
            cv2.GaussianBlur(n, (0, 0), coarse, borderType=cv2.BORDER_REFLECT) for n in noise
        ]
        noise = np.stack(blurred) / np.std(blurred)
    frames = 128 + rng.uniform(-30, 30, size=3) + rng.uniform(12, 32) * noise
    frames = np.clip(frames, 0, 255).astype(np.uint8)
    return np.repeat(frames, num_frames, axis=0) if kind == "still" else frames


def _sound(rng: np.random.Generator, num_frames: int, kind: str) -> np.ndarray:
    samples = num_frames * SAMPLE_RATE_HZ // VIDEO_FPS
    # Filtered on a longer stretch and cut to its middle: no edge, no wrap-around.
    margin = SAMPLE_RATE_HZ
    spectrum = fft.rfft(rng.standard_normal(samples + 2 * margin))
    if kind == "pink":
        spectrum /= np.sqrt(np.maximum(np.arange(len(spectrum)), 20 * len(spectrum) / 8000))
    noise = fft.irfft(spectrum, samples + 2 * margin)[margin : margin + samples]
    return (10 ** (rng.uniform(-30, -18) / 20) * noise / noise.std()).astype(np.float32)
