"""Writing of video and audio as a real MP4: H.264 by libx264, AAC mono, through PyAV.

By default every video frame is an intra frame at one quantiser, and the audio encoder runs without
noise substitution and temporal noise shaping. A group of frames, a rate control that settles or B
frames on every other place would be a cue for speed, direction or order that is not in the scene.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np

X264_OPTIONS = {"preset": "veryfast", "qp": "16", "g": "1", "x264-params": "threads=1"}
AAC_OPTIONS = {"aac_coder": "fast", "aac_pns": "0", "aac_tns": "0"}
AAC_BITS_PER_SECOND = 96_000


def encode_mp4(
    file: Any,
    frames: Sequence[np.ndarray] | np.ndarray,
    waveform: np.ndarray | None,
    *,
    video_fps: int,
    sample_rate_hz: int,
    video_options: Mapping[str, str] = X264_OPTIONS,
) -> None:
    """Encodes a file, given by its path or opened for writing.

    Args:
        file: Path as a string, or a file that can be searched.
        frames: uint8 [frames, height, width, 3] RGB, both sides even.
        waveform: float32 [samples] in [-1, 1]; None for no audio.
        video_fps: Rate of the frames.
        sample_rate_hz: Rate of the waveform.
        video_options: Options of libx264.
    """
    with av.open(file, "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=video_fps, options=dict(video_options))
        video.height, video.width = frames[0].shape[:2]
        video.pix_fmt = "yuv420p"
        if waveform is not None:
            audio = container.add_stream(
                "aac", rate=sample_rate_hz, options=AAC_OPTIONS, layout="mono"
            )
            audio.bit_rate = AAC_BITS_PER_SECOND
        for number, rgb in enumerate(frames):
            planes = cv2.cvtColor(rgb, cv2.COLOR_RGB2YUV_I420)
            frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, video_fps)
            container.mux(video.encode(frame))
        container.mux(video.encode())
        if waveform is not None:
            samples = av.AudioFrame.from_ndarray(waveform[None], format="fltp", layout="mono")
            samples.sample_rate = sample_rate_hz
            samples.pts, samples.time_base = 0, Fraction(1, sample_rate_hz)
            container.mux(audio.encode(samples))
            container.mux(audio.encode())


def write_mp4(path: Path, frames: np.ndarray, waveform: np.ndarray | None, **settings: Any) -> None:
    """Writes one file with the settings of `encode_mp4`; it gets its name only when complete.

    Raises:
        OSError: The file could not be written, for instance because the disk is full.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        encode_mp4(str(partial), frames, waveform, **settings)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
