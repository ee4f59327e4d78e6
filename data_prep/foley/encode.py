"""Write pictures and sound as a real MP4: H.264 by libx264, AAC mono, through PyAV.

Every video frame is an intra frame at one quantiser and the audio encoder runs without noise
substitution and noise shaping in time. A group of pictures, a rate control that settles or B frames
on every other place would be a cue for speed, direction or order that is not in the scene.
"""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

X264_OPTIONS = {"preset": "veryfast", "qp": "16", "g": "1", "x264-params": "threads=1"}
AAC_OPTIONS = {"aac_coder": "fast", "aac_pns": "0", "aac_tns": "0"}
AAC_BITS_PER_SECOND = 96_000


def write_mp4(
    path: Path, frames: np.ndarray, waveform: np.ndarray, *, video_fps: int, sample_rate_hz: int
) -> None:
    """Write one file; it appears under its name only when complete.

    Args:
        path: Where to write, ending in `.mp4`.
        frames: uint8 [frames, height, width, 3] RGB, both sides even.
        waveform: float32 [samples] in [-1, 1].
        video_fps: Rate of the frames.
        sample_rate_hz: Rate of the waveform.

    Raises:
        OSError: The file could not be written, for instance because the disk is full.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with av.open(str(partial), "w", format="mp4") as container:
            video = container.add_stream("libx264", rate=video_fps, options=X264_OPTIONS)
            video.height, video.width = frames.shape[1:3]
            video.pix_fmt = "yuv420p"
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
            sound = av.AudioFrame.from_ndarray(waveform[None], format="fltp", layout="mono")
            sound.sample_rate = sample_rate_hz
            sound.pts, sound.time_base = 0, Fraction(1, sample_rate_hz)
            container.mux(audio.encode(sound))
            container.mux(audio.encode())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
