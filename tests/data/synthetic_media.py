"""Media files whose truth is known: a white frame and a click at every full second."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import simplejpeg

from avcl_jax.data.record_format import Record
from avcl_jax.data_prep.clip import ClipOptions
from avcl_jax.data_prep.manifest import Entry

OPTIONS = ClipOptions(
    short_side=64,
    max_fps=None,
    quality=90,
    sample_rate_hz=16000,
    min_seconds=0.0,
    max_seconds=60.0,
    min_side=16,
    require=(),
    file_format="tfrecord",
)
SOUND_RATE = 48_000
SOUND_BLOCK = 960
CLICK_SECONDS = 0.01


def flash_seconds(times: Sequence[float]) -> list[float]:
    """Returns the times of the frames that are white: the first at or after each full second."""
    return [next(t for t in times if t >= second - 1e-9) for second in range(1, int(times[-1]) + 1)]


def entry(path: Path, start: float = 0.0, end: float | None = None) -> Entry:
    return Entry(str(path), "train", path.name, path.name, start, end, {})


def shown_flashes(record: Record) -> np.ndarray:
    """Returns the times of the frames that are white in their lower right quarter."""
    frames = [simplejpeg.decode_jpeg(frame) for frame in record.frames]
    bright = [f[f.shape[0] // 2 :, f.shape[1] // 2 :].mean() > 128 for f in frames]
    return record.frame_seconds[np.flatnonzero(bright)]


def heard_clicks(record: Record) -> np.ndarray:
    """Returns the times at which bursts begin."""
    loud = np.flatnonzero(np.abs(record.waveform.astype(int)) > 3000)
    starts = loud[np.diff(loud, prepend=-99999) > 1600]
    return record.audio_start_seconds + starts / record.sample_rate_hz


def click_waveform(seconds: float, offset_seconds: float = 0.0) -> np.ndarray:
    """Returns int16 [1, samples]: faint noise, and a burst at every full second of the timeline."""
    rng = np.random.default_rng(0)
    sound = rng.normal(0, 20, round(seconds * SOUND_RATE))
    for second in range(1, int(seconds + offset_seconds) + 1):
        at = round((second - offset_seconds) * SOUND_RATE)
        if 0 <= at < len(sound):
            burst = sound[at : at + round(CLICK_SECONDS * SOUND_RATE)]
            burst += rng.normal(0, 9000, len(burst))
    return np.clip(sound, -32768, 32767).astype(np.int16)[None]


def write_flash_and_click(
    path: Path,
    *,
    video_codec: str,
    audio_codec: str | None,
    frame_times: Sequence[float],
    sound_seconds: float,
    sound_offset_seconds: float = 0.0,
    sound_gap: tuple[float, float] | None = None,
    side: int = 64,
    size: tuple[int, int] | None = None,
    pixel_format: str = "yuv420p",
    sample_rate_hz: int = SOUND_RATE,
    layout: str = "mono",
    ticks: Fraction = Fraction(1, 90_000),
    options: dict[str, str] | None = None,
    sound_options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
) -> None:
    """Writes a video whose frames and audio tell the time; the suffix decides the container.

    Args:
      sound_seconds: Length of the audio, of which no packets are written in `sound_gap`, seconds.
      sound_offset_seconds: Start of the audio; the clicks stay on full seconds of the timeline.
      size: Width and height of a video that is not square.
      pixel_format: One with an alpha channel is transparent on the left.
      layout: Layout of channels, which are all alike.
      ticks: Unit of the encoder's times; a container without them needs the frame's duration.
    """
    width, height = size or (side, side)
    with av.open(str(path), "w", options=container_options or {}) as container:
        video = container.add_stream(video_codec, rate=25, options=options or {})
        video.width, video.height = width, height
        video.pix_fmt = pixel_format
        video.codec_context.time_base = ticks
        white = set(flash_seconds(frame_times))
        packets = []
        for seconds in frame_times:
            image = np.full((height, width, 4), 255 if seconds in white else 30, np.uint8)
            image[: height // 4, : width // 4, 0] = 200  # a red patch, top left: what is upright
            image[..., 3] = 255
            if "a" in pixel_format.split("p")[0]:
                image[:, : width // 2, 3] = 0
            frame = av.VideoFrame.from_ndarray(image, format="rgba")
            frame.pts, frame.time_base = round(seconds / ticks), ticks
            packets += video.encode(frame)
        packets += video.encode()
        if audio_codec is not None:
            audio = container.add_stream(
                audio_codec, rate=sample_rate_hz, layout=layout, options=sound_options or {}
            )
            sound = click_waveform(sound_seconds, sound_offset_seconds)
            wanted = audio.codec_context.format.name
            resampler = av.AudioResampler(format=wanted, layout=layout, rate=sample_rate_hz)
            channels = len(av.AudioLayout(layout).channels)
            begin = round(sound_offset_seconds * SOUND_RATE)
            for first in range(0, sound.shape[1] - SOUND_BLOCK + 1, SOUND_BLOCK):
                at = begin + first
                if sound_gap and sound_gap[0] <= at / SOUND_RATE < sound_gap[1]:
                    continue
                block = np.repeat(sound[0, first : first + SOUND_BLOCK], channels)[None]
                frame = av.AudioFrame.from_ndarray(block, "s16", layout)
                frame.sample_rate, frame.pts, frame.time_base = SOUND_RATE, at, Fraction(1, 48000)
                for piece in resampler.resample(frame):
                    if sample_rate_hz == SOUND_RATE:
                        piece.pts = at
                    packets += audio.encode(piece)
            for piece in resampler.resample(None):
                packets += audio.encode(piece)
            packets += audio.encode()
        for packet in sorted(
            packets, key=lambda p: float((p.dts if p.dts is not None else p.pts) * p.time_base)
        ):
            container.mux(packet)


def write_clip(
    path: Path, frames: int, *, fps: float = 10, side: int = 32, **changes: object
) -> Path:
    """Writes an ordinary H.264 and AAC clip, or one with some arguments changed."""
    arguments = {
        "video_codec": "libx264",
        "audio_codec": "aac",
        "frame_times": [number / fps for number in range(frames)],
        "sound_seconds": frames / fps,
        "side": side,
    }
    write_flash_and_click(path, **arguments | changes)
    return path


def write_channels(
    path: Path, channels: np.ndarray, *, layout: str, codec: str, block: int = 1024
) -> None:
    """Writes audio alone: int16 [channels, samples] at 48 kHz, in frames of `block` samples."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=SOUND_RATE, layout=layout)
        wanted = stream.codec_context.format.name
        resampler = av.AudioResampler(format=wanted, layout=layout, rate=SOUND_RATE)
        for first in range(0, channels.shape[1], block):
            part = np.ascontiguousarray(channels[:, first : first + block].T).reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(part, "s16", layout)
            frame.sample_rate, frame.pts, frame.time_base = SOUND_RATE, first, Fraction(1, 48000)
            for piece in resampler.resample(frame):
                container.mux(stream.encode(piece))
        container.mux(stream.encode())


def write_patches(
    path: Path,
    colours: np.ndarray,
    *,
    size: tuple[int, int] = (112, 64),
    tags: Mapping[str, int],
    pixel_format: str = "yuv444p",
) -> None:
    """Writes five equal frames of upright bars, without loss.

    Args:
      colours: [bars, 3], the values of Y, U and V that are stored.
      tags: Attributes of encoder and frames: `colorspace` and the like, as in ITU-T H.273.
      pixel_format: One without subsampling.
    """
    width, height = size
    bars = np.repeat(colours, -(-width // len(colours)), axis=0)[:width]
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25, options={"preset": "ultrafast", "qp": "0"})
        video.width, video.height, video.pix_fmt = width, height, pixel_format
        for name, value in tags.items():
            setattr(video.codec_context, name, value)
        for number in range(5):
            frame = av.VideoFrame(width, height, pixel_format)
            for channel, plane in enumerate(frame.planes):
                wide = plane.line_size != width and pixel_format.endswith("le")
                sample = np.dtype(np.uint16 if wide else np.uint8)
                rows = np.zeros((height, plane.line_size // sample.itemsize), sample)
                rows[:, :width] = bars[:, channel]
                plane.update(rows.tobytes())
            frame.pts, frame.time_base = number, Fraction(1, 25)
            for name, value in tags.items():
                setattr(frame, name, value)
            container.mux(video.encode(frame))
        container.mux(video.encode())


def write_stretches(
    path: Path, stretches: Sequence[tuple[tuple[int, int], Fraction]], *, seconds: float
) -> None:
    """Writes an MPEG transport stream at 25 frames per second that changes its frames.

    Each stretch has width and height, and the width of a pixel over its height.
    """
    options = {"preset": "ultrafast", "tune": "zerolatency", "x264-params": "repeat-headers=1"}
    number = 0
    with av.open(str(path), "w", format="mpegts") as container:
        video = container.add_stream("libx264", rate=25, options=options)
        for part, ((width, height), aspect) in enumerate(stretches):
            encoder = video.codec_context if part == 0 else av.CodecContext.create("libx264", "w")
            encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuv420p"
            encoder.time_base, encoder.framerate = Fraction(1, 25), Fraction(25)
            encoder.sample_aspect_ratio, encoder.options = aspect, options
            y, x = np.mgrid[:height, :width]
            for k in range(round(seconds * 25) + 1):
                frame = None
                if k < round(seconds * 25):
                    image = np.stack([x * 4 + k * 5, y * 4, np.full_like(x, k * 9)], -1) % 256
                    frame = av.VideoFrame.from_ndarray(image.astype(np.uint8), format="rgb24")
                    frame.pts, frame.time_base = number, Fraction(1, 25)
                    number += 1
                for packet in encoder.encode(frame):
                    packet.stream = video
                    container.mux(packet)
