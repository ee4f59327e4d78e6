"""Writing of media: MP4 files by libx264 and AAC, through PyAV, and images for pages."""

from __future__ import annotations

import base64
import contextlib
import itertools
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import av
import cv2
import numpy as np
import simplejpeg

from avcl_jax.paths import replacing

_CLOCK_HZ = 90_000  # of frames that are not evenly spaced


def write_mp4(
    file: Path | BinaryIO,
    frames: Iterable[tuple[float, np.ndarray]],
    waveform: np.ndarray | None,
    *,
    fps: float,
    sample_rate_hz: int,
    audio_bits_per_second: int,
    video_options: Mapping[str, str],
    audio_options: Mapping[str, str] | None = None,
    audio_start_seconds: float = 0.0,
    variable_rate: bool = False,
    container: str = "mp4",
    container_options: Mapping[str, str] | None = None,
) -> None:
    """Writes H.264 video and mono audio; a path gets its file only when it is complete.

    Args:
        file: path, or a file opened for writing that can be searched.
        frames: times in seconds and images, all of one size with even sides: uint8 [h, w, 3] RGB,
            or [3 h / 2, w] planes of I420; read while frames are encoded. None: no video.
        waveform: int16 or float32 in [-1, 1], [samples]; None or empty for no audio.
        fps: rate of the frames; times are multiples of its inverse unless `variable_rate`.
        variable_rate: frames are written at their times, to 1/90,000 s.

    Raises:
        FFmpegError: if FFmpeg refuses the size, a rate or an option.
        OSError: if the file cannot be written.
    """
    times = iter(frames)
    first = next(times, None)
    samples = None
    if waveform is not None and len(waveform):
        kind = "s16" if waveform.dtype == np.int16 else "fltp"
        samples = av.AudioFrame.from_ndarray(waveform[None], format=kind, layout="mono")
        samples.sample_rate, samples.time_base = sample_rate_hz, Fraction(1, sample_rate_hz)
    with (
        replacing(file) if isinstance(file, Path) else contextlib.nullcontext(file) as target,
        av.open(target, "w", format=container, options=dict(container_options or {})) as out,
    ):
        if first is not None:
            rate = Fraction(fps).limit_denominator(1000)
            clock = Fraction(_CLOCK_HZ) if variable_rate else rate
            video = out.add_stream("libx264", rate=rate, options=dict(video_options))
            height, video.width = first[1].shape[:2]
            video.height = height if first[1].ndim == 3 else height * 2 // 3
            video.pix_fmt = "yuv420p"
            video.codec_context.time_base = 1 / clock
        if samples is not None:
            audio: Any = out.add_stream(
                "aac", rate=sample_rate_hz, layout="mono", options=dict(audio_options or {})
            )
            audio.bit_rate = audio_bits_per_second
        if first is not None:
            for seconds, image in itertools.chain([first], times):
                layout = "rgb24" if image.ndim == 3 else "yuv420p"
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format=layout)
                frame.pts, frame.time_base = round(seconds * clock), 1 / clock
                out.mux(video.encode(frame))
            out.mux(video.encode())
        if samples is not None:
            samples.pts = round(audio_start_seconds * sample_rate_hz)
            out.mux([*audio.encode(samples), *audio.encode()])


def spectrogram_image(levels: np.ndarray, *, low: float, high: float) -> bytes:
    """Returns a PNG of a spectrogram, time to the right and low pitch below.

    `levels` are float [frames, bands]; `low` is drawn darkest, `high` brightest.
    """
    scaled = np.clip((levels - low) / max(high - low, 1e-9), 0.0, 1.0)
    shades = np.minimum(scaled.T[::-1] * 256, 255).astype(np.uint8)
    _, data = cv2.imencode(".png", cv2.applyColorMap(shades, cv2.COLORMAP_MAGMA))
    return data.tobytes()


def spectrogram_uri(levels: np.ndarray, *, low: float, high: float) -> str:
    """Returns the data URI of a `spectrogram_image`."""
    return data_uri("image/png", spectrogram_image(levels, low=low, high=high))


def frame_uri(frame: np.ndarray) -> str:
    """Returns a JPEG data URI of a uint8 [H, W, 3] frame."""
    return data_uri("image/jpeg", simplejpeg.encode_jpeg(np.ascontiguousarray(frame), quality=88))


def data_uri(kind: str, data: bytes) -> str:
    """Returns data of a media type as an address, for pages that need nothing from outside."""
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
