"""What a browser can play: files as they are where it can, small conversions where it cannot."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from avcl_jax.data.media import decode_audio, decode_frames, probe
from avcl_jax.data.media_error import MediaError

# Of a conversion: at these bounds it has at most 40 MB.
MAX_SECONDS = 180.0
_SHORT_SIDE, _MAX_FPS = 360, 30.0
_PEAK_BITS, _SOUND_BITS = 1_500_000, 96_000
_SOUND_RATE_HZ = 44_100
_CLOCK = 90_000

_PIXELS = ("yuv420p", "yuvj420p")
# FFmpeg's container -> type for the browser, codecs of the picture and of the sound that Chromium,
# Firefox and Safari of today all play.
_PLAYABLE = {
    "mov,mp4,m4a,3gp,3g2,mj2": (
        "mp4",
        ("h264", "vp9", "av1"),
        ("aac", "mp3", "mp3float", "opus", "flac"),
    ),
    "matroska,webm": ("webm", ("vp8", "vp9", "av1"), ("vorbis", "opus")),
    "mp3": ("mpeg", (), ("mp3", "mp3float")),
    "wav": ("wav", (), ("pcm_s16le", "pcm_u8")),
    "flac": ("flac", (), ("flac",)),
    "ogg": ("ogg", (), ("vorbis", "opus", "flac")),
}


def playable_type(path: Path) -> str | None:
    """Returns the media type under which browsers play a file as it is; None if some do not.

    Raises:
        MediaError: if it cannot be opened or is no recording.
    """
    info = probe(path)
    if info.format not in _PLAYABLE or not info.duration_seconds:
        return None
    subtype, pictures, sounds = _PLAYABLE[info.format]
    if info.audio is not None and info.audio[0] not in sounds:
        return None
    if info.video is None:
        return f"audio/{subtype}"
    if info.video[0] not in pictures:
        return None
    with av.open(f"file:{path}", metadata_errors="replace") as container:
        contexts = [s.codec_context for s in container.streams.video if s.codec_context]
    return f"video/{subtype}" if contexts and contexts[0].pix_fmt in _PIXELS else None


def convert(path: Path, out: Path, *, start_seconds: float, end_seconds: float) -> None:
    """Converts an interval to small H.264 and AAC in MP4; a damaged rest is left out.

    Args:
        path: what FFmpeg reads.
        out: new file; its zero is `start_seconds`.
        start_seconds: on the file's timeline.
        end_seconds: the same; at most `MAX_SECONDS` are converted.

    Raises:
        MediaError: if nothing there can be decoded, or it cannot be encoded or written.
    """
    try:
        _convert(path, out, start_seconds, end_seconds)
    except (av.error.FFmpegError, OSError) as error:  # sizes that H.264 does not know; a full disk
        raise MediaError("unreadable", f"no preview can be made: {error.strerror}") from error


def _convert(path: Path, out: Path, start_seconds: float, end_seconds: float) -> None:
    interval = {
        "start_seconds": start_seconds,
        "end_seconds": min(end_seconds, start_seconds + MAX_SECONDS),
    }
    frames = decode_frames(path, short_side=_SHORT_SIDE, max_fps=_MAX_FPS, **interval)
    broken: list[MediaError] = []
    shown = _until_damage(frames, broken)
    first = next(shown, None)
    try:
        sound = decode_audio(path, sample_rate_hz=_SOUND_RATE_HZ, **interval)
    except MediaError as error:
        broken.append(error)
        sound = None
    if first is None and sound is None:
        raise broken[0] if broken else MediaError("outside", "nothing in this interval")
    with av.open(str(out), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        video: Any = None
        if first is not None:
            height, width = (max(2, n // 2 * 2) for n in first.image.shape[:2])
            video = container.add_stream("libx264", rate=30)
            video.height, video.width, video.pix_fmt = height, width, "yuv420p"
            video.codec_context.time_base = Fraction(1, _CLOCK)
            video.options = {
                "crf": "25",
                "preset": "veryfast",
                "maxrate": str(_PEAK_BITS),
                "bufsize": str(_PEAK_BITS),
                "threads": "1",
            }
        audio: Any = None
        if sound is not None:
            audio = container.add_stream("aac", rate=_SOUND_RATE_HZ, layout="mono")
            audio.bit_rate = _SOUND_BITS
        if first is not None:
            for frame in itertools.chain([first], shown):
                image = _even(frame.image, height, width)
                picture = av.VideoFrame.from_ndarray(image, format="rgb24")
                picture.pts = round((frame.seconds - start_seconds) * _CLOCK)
                picture.time_base = Fraction(1, _CLOCK)
                container.mux(video.encode(picture))
            container.mux(video.encode())
        if sound is not None:
            samples = av.AudioFrame.from_ndarray(sound.waveform[None], format="s16", layout="mono")
            samples.sample_rate = _SOUND_RATE_HZ
            samples.pts = max(0, round((sound.start_seconds - start_seconds) * _SOUND_RATE_HZ))
            samples.time_base = Fraction(1, _SOUND_RATE_HZ)
            container.mux([*audio.encode(samples), *audio.encode()])


def _until_damage(frames: Iterator[Any], broken: list[MediaError]) -> Iterator[Any]:
    with contextlib.closing(frames):  # type: ignore[type-var]  # a generator, said to be less
        try:
            yield from frames
        except MediaError as error:
            broken.append(error)


def _even(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Cuts off an odd row or column, as H.264 wants; where it is the only one, it is doubled."""
    missing = ((0, max(0, height - image.shape[0])), (0, max(0, width - image.shape[1])), (0, 0))
    return np.ascontiguousarray(np.pad(image, missing, mode="edge")[:height, :width])
