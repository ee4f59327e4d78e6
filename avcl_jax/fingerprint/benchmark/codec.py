"""Real re-encoding, through FFmpeg's encoders and decoders and a file in memory."""

from __future__ import annotations

import dataclasses
import io
from fractions import Fraction

import av
import cv2
import numpy as np

from avcl_jax.data.media import DecodedMedia, decode_audio, decode_frames
from avcl_jax.fingerprint.benchmark.timeline import (
    Transformed,
    resampled,
    unmoved,
    with_sound,
)

_TICKS = Fraction(1, 90_000)


def video_codec(media: DecodedMedia, rng: np.random.Generator, *, quality: int) -> Transformed:
    """Encodes the pictures as H.264, and decodes them.

    Args:
        media: the clip.
        rng: not used.
        quality: x264's constant rate factor, 0 (lossless) to 51.
    """
    height, width = media.frames.shape[1:3]
    even = (width + width % 2, height + height % 2)  # what 4:2:0 can hold
    stream = io.BytesIO()
    with av.open(stream, "w", format="matroska") as container:
        video = container.add_stream(
            "libx264",
            rate=Fraction(media.fps or 1.0).limit_denominator(1000),
            # Without looking ahead: with it, x264 of FFmpeg 8.1 gives pictures of 64 pixels other
            # bits each time (its macroblock tree reads what nobody has written).
            options={
                "crf": str(quality),
                "preset": "veryfast",
                "threads": "1",
                "rc-lookahead": "0",
            },
        )
        video.width, video.height = even
        video.pix_fmt = "yuv420p"
        video.codec_context.time_base = _TICKS
        for image, seconds in zip(media.frames, media.frame_seconds, strict=True):
            right, below = even[0] - width, even[1] - height
            whole = cv2.copyMakeBorder(image, 0, below, 0, right, cv2.BORDER_REPLICATE)
            frame = av.VideoFrame.from_ndarray(whole, format="rgb24")
            frame.pts, frame.time_base = round(seconds / _TICKS), _TICKS
            container.mux(video.encode(frame))
        container.mux(video.encode())
    shown = list(decode_frames(stream.getvalue(), short_side=None, max_fps=None))
    if len(shown) != len(media.frames):
        raise RuntimeError(f"x264 returned {len(shown)} of {len(media.frames)} frames")
    frames = np.stack([frame.image[:height, :width] for frame in shown])
    return unmoved(dataclasses.replace(media, frames=frames))


def audio_codec(
    media: DecodedMedia, rng: np.random.Generator, *, codec: str, rate_hz: int, kilobits: int
) -> Transformed:
    """Encodes the sound at a low bit rate, and decodes it.

    Args:
        media: the clip.
        rng: not used.
        codec: FFmpeg's name of an encoder: libmp3lame, aac or libopus.
        rate_hz: sample rate to encode at.
        kilobits: kbit/s.
    """
    stream = io.BytesIO()
    with av.open(stream, "w", format="matroska") as container:
        audio = container.add_stream(codec, rate=rate_hz, layout="mono")
        assert isinstance(audio, av.AudioStream)
        audio.bit_rate = 1000 * kilobits
        sound = resampled(media.waveform, media.sample_rate_hz, rate_hz)
        frame = av.AudioFrame.from_ndarray(sound[None], format="s16", layout="mono")
        frame.sample_rate = rate_hz
        container.mux([*audio.encode(frame), *audio.encode()])
    heard = decode_audio(stream.getvalue(), sample_rate_hz=media.sample_rate_hz)
    if heard is None:
        raise RuntimeError(f"{codec} returned no sound")
    # The containers' zero is the first sample that is heard: FFmpeg drops the priming samples.
    waveform = np.zeros(len(media.waveform), np.int16)
    begin = round(heard.start_seconds * media.sample_rate_hz)
    part = heard.waveform[: len(waveform) - begin]
    waveform[begin : begin + len(part)] = part
    return unmoved(with_sound(media, waveform))
