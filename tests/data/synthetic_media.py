"""Media files whose truth is known: a white frame and a click at every full second."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

SOUND_RATE = 48_000
CLICK_SECONDS = 0.01


def flash_seconds(times: Sequence[float]) -> list[float]:
    """Returns the times of the frames that are white: the first at or after each full second."""
    return [next(t for t in times if t >= second - 1e-9) for second in range(1, int(times[-1]) + 1)]


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
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
) -> None:
    """Writes one file with PyAV.

    Args:
      path: Its suffix decides the container.
      video_codec: FFmpeg's name of the encoder.
      audio_codec: The same for sound; None for none.
      frame_times: When each frame appears, in seconds.
      sound_seconds: Length of the sound.
      sound_offset_seconds: When it starts; the clicks stay on full seconds of the timeline.
      sound_gap: From, to: sound that is left out, so that its packets have a gap.
      side: Of the square picture.
      options: Of the video encoder.
      container_options: Of the muxer.
    """
    ticks = Fraction(1, 90_000)
    with av.open(str(path), "w", options=container_options or {}) as container:
        video = container.add_stream(video_codec, rate=25, options=options or {})
        video.width = video.height = side
        video.pix_fmt = "yuv420p"
        video.codec_context.time_base = ticks
        streams = [video]
        white = set(flash_seconds(frame_times))
        packets = []
        for seconds in frame_times:
            image = np.full((side, side, 3), 255 if seconds in white else 30, np.uint8)
            image[: side // 4, : side // 4, 0] = 200  # a red patch, top left: what is upright
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = round(seconds / ticks), ticks
            packets += video.encode(frame)
        packets += video.encode()
        if audio_codec is not None:
            audio = container.add_stream(audio_codec, rate=SOUND_RATE, layout="mono")
            streams.append(audio)
            wanted = audio.codec_context.format.name
            resampler = av.AudioResampler(format=wanted, layout="mono", rate=SOUND_RATE)
            sound = click_waveform(sound_seconds, sound_offset_seconds)
            size = 960
            for first in range(0, sound.shape[1] - size + 1, size):
                at = sound_offset_seconds + first / SOUND_RATE
                if sound_gap and sound_gap[0] <= at < sound_gap[1]:
                    continue
                frame = av.AudioFrame.from_ndarray(
                    np.ascontiguousarray(sound[:, first : first + size]), "s16", "mono"
                )
                frame.sample_rate = SOUND_RATE
                frame.pts = round(at * SOUND_RATE)
                frame.time_base = Fraction(1, SOUND_RATE)
                for piece in resampler.resample(frame):
                    piece.pts = frame.pts
                    packets += audio.encode(piece)
            packets += audio.encode()
        for packet in sorted(
            packets, key=lambda p: float((p.dts if p.dts is not None else p.pts) * p.time_base)
        ):
            container.mux(packet)
