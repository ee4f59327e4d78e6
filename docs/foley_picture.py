"""Draws docs/foley.webp: five videos of the demo over 1.75 seconds, frames above sound.

PYTHONPATH=. python docs/foley_picture.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from avcl_jax.data.spectrogram import LogMelSpec, log_mel
from avcl_jax.data_prep.foley.audio import render_audio
from avcl_jax.data_prep.foley.scene import (
    MATERIALS,
    MOTIONS,
    SAMPLE_RATE_HZ,
    VIDEO_FPS,
    classes_of,
    draw_scene,
)
from avcl_jax.data_prep.foley.video import render_video

START_SECONDS, SECONDS = 1.0, 1.75
FRAMES = 14
SPEC = LogMelSpec(
    sample_rate_hz=SAMPLE_RATE_HZ,
    frames=112,
    mels=40,
    clip_seconds=SECONDS,
    min_hz=60.0,
    max_hz=7_600.0,
    floor=1e-6,
    mean=0.0,
    std=1.0,
)


def draw(path: Path) -> None:
    """Writes the picture: one row of frames and one spectrogram for each pair of classes."""
    pairs = list(zip(MOTIONS, MATERIALS, strict=True))
    first = {classes_of(0, "train", index): index for index in reversed(range(25))}
    figure, axes = plt.subplots(
        2 * len(pairs), 1, figsize=(10, 8.6), height_ratios=[1.0, 0.8] * len(pairs)
    )
    for row, pair in enumerate(pairs):
        scene = draw_scene(0, "train", first[pair])
        begin = int(START_SECONDS * VIDEO_FPS)
        frames = render_video(scene)[begin : begin + 2 * FRAMES : 2]
        start = int(START_SECONDS * SAMPLE_RATE_HZ)
        windows = render_audio(scene)[start : start + SPEC.frames * SPEC.window]
        mel = log_mel(windows.reshape(SPEC.frames, SPEC.window), SPEC)
        above, below = axes[2 * row], axes[2 * row + 1]
        above.imshow(np.concatenate(list(frames), axis=1), interpolation="bicubic", aspect="auto")
        above.set_title(f"{pair[0]} · {pair[1]}", fontsize=9, pad=2, loc="left")
        below.imshow(mel.T, origin="lower", aspect="auto", cmap="magma")
        for axis in (above, below):
            axis.axis("off")
    figure.subplots_adjust(left=0.01, right=0.99, top=0.975, bottom=0.01, hspace=0.2)
    figure.savefig(path, dpi=80, pil_kwargs={"quality": 80})


if __name__ == "__main__":
    draw(Path(__file__).with_name("foley.webp"))
