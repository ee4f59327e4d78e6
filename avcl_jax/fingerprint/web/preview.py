"""Media for browsers: files as they are if browsers play them, else small conversions."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import secrets
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np

from avcl_jax.data.encode import write_mp4
from avcl_jax.data.media import MediaError, decode_audio, decode_frames, probe
from avcl_jax.data.spectrogram import mel_decibels
from avcl_jax.fingerprint.web.decoder import Decoder, DecoderError

_KEPT = 12
# Limits of a conversion, which then has at most 40 MB.
MAX_SECONDS = 180.0
_SHORT_SIDE, _MAX_FPS, _RATE_HZ = 360, 30.0, 44_100
_VIDEO_OPTIONS = {"crf": "25", "preset": "veryfast", "threads": "1", "maxrate": "1500000"}
_VIDEO_OPTIONS["bufsize"] = _VIDEO_OPTIONS["maxrate"]
# Spectrogram of audio without video.
_COLUMNS, _MELS, _RANGE_DB, _SILENCE_DB, _MIN_WINDOW = 480, 64, 70.0, -90.0, 512
# FFmpeg's container -> subtype, video and audio codecs that Chromium, Firefox and Safari play.
_MP4_AUDIO = ("aac", "mp3", "mp3float", "opus", "flac")
_PLAYABLE: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "mov,mp4,m4a,3gp,3g2,mj2": ("mp4", ("h264", "vp9", "av1"), _MP4_AUDIO),
    "matroska,webm": ("webm", ("vp8", "vp9", "av1"), ("vorbis", "opus")),
    "mp3": ("mpeg", (), ("mp3", "mp3float")),
    "wav": ("wav", (), ("pcm_s16le", "pcm_u8")),
    "flac": ("flac", (), ("flac",)),
    "ogg": ("ogg", (), ("vorbis", "opus", "flac")),
}


class PreviewCache:
    """Conversions by name in a directory, which the caller deletes; the oldest make room."""

    def __init__(self, directory: Path, decoder: Decoder):
        """Starts empty."""
        self._directory = directory
        self._decoder = decoder
        self._paths: OrderedDict[str, Path] = OrderedDict()
        self._turn = asyncio.Lock()

    def get(self, name: str) -> Path | None:
        """Returns a conversion, None if it has made room for others."""
        return self._paths.get(name)

    async def convert(self, name: str, path: Path, start: float, end: float) -> Path:
        """Converts an interval of a file, unless there is a conversion of this name.

        Raises:
            DecoderError: if it cannot be decoded.
        """
        async with self._turn:  # browsers ask for several ranges at once
            if name not in self._paths:
                out = self._directory / f"preview-{secrets.token_hex(12)}.mp4"
                interval = {"start_seconds": start, "end_seconds": end}
                try:
                    await self._decoder.run(convert, path, out, **interval)
                except DecoderError:
                    for left in self._directory.glob(f"*{out.name}*"):
                        left.unlink()
                    raise
                self._paths[name] = out
                while len(self._paths) > _KEPT:
                    self._paths.popitem(last=False)[1].unlink(missing_ok=True)
            self._paths.move_to_end(name)
            return self._paths[name]


def playable_type(path: Path) -> str | None:
    """Returns the media type under which browsers play a file as it is; None if some do not.

    Raises:
        MediaError: if it cannot be opened or is not a recording.
    """
    info = probe(path)
    if info.format not in _PLAYABLE or not info.duration_seconds:
        return None
    subtype, video_codecs, audio_codecs = _PLAYABLE[info.format]
    if info.audio is not None and info.audio[0] not in audio_codecs:
        return None
    if info.video is None:
        return f"audio/{subtype}"
    if info.video[0] not in video_codecs:
        return None
    with av.open(f"file:{path}", metadata_errors="replace") as container:
        contexts = [s.codec_context for s in container.streams.video if s.codec_context]
    playable = contexts and contexts[0].pix_fmt in ("yuv420p", "yuvj420p")
    return f"video/{subtype}" if playable else None


def convert(path: Path, out: Path, *, start_seconds: float, end_seconds: float) -> None:
    """Converts an interval to small H.264 and AAC in MP4, as far as it can be decoded.

    Args:
        out: new file; its zero is `start_seconds`.
        end_seconds: time in the file; at most `MAX_SECONDS` are converted.

    Raises:
        MediaError: if nothing there can be decoded, or it cannot be encoded or written.
    """
    end_seconds = min(end_seconds, start_seconds + MAX_SECONDS)
    interval = {"start_seconds": start_seconds, "end_seconds": end_seconds}
    frames = decode_frames(path, short_side=_SHORT_SIDE, max_fps=_MAX_FPS, **interval)
    first = next(frames, None)
    audio = None
    with contextlib.suppress(MediaError):
        audio = decode_audio(path, sample_rate_hz=_RATE_HZ, **interval)
    if first is None and audio is None:
        raise MediaError("outside", "nothing in this interval")

    def images() -> Iterator[tuple[float, np.ndarray]]:
        with contextlib.suppress(MediaError):  # a damaged rest is left out
            for frame in itertools.chain([first] if first else [], frames):
                yield frame.seconds - start_seconds, _even(frame.image)

    try:
        write_mp4(
            out,
            images(),
            None if audio is None else audio.waveform,
            fps=_MAX_FPS,
            sample_rate_hz=_RATE_HZ,
            audio_bits_per_second=96_000,
            video_options=_VIDEO_OPTIONS,
            audio_start_seconds=max(0.0, audio.start_seconds - start_seconds) if audio else 0.0,
            variable_rate=True,
            container_options={"movflags": "+faststart"},
        )
    except (av.error.FFmpegError, OSError) as error:  # sizes that H.264 does not know; a full disk
        raise MediaError("unreadable", f"no preview can be made: {error.strerror}") from error


def _even(image: np.ndarray) -> np.ndarray:
    """Cuts off an odd row or column, for H.264; the only one is doubled."""
    height, width = (max(2, side // 2 * 2) for side in image.shape[:2])
    missing = [(0, max(0, n - side)) for n, side in zip((height, width), image.shape, strict=False)]
    return np.pad(image, [*missing, (0, 0)], mode="edge")[:height, :width]


def spectrogram(waveform: np.ndarray, sample_rate_hz: int, start_seconds: float) -> dict[str, Any]:
    """Computes what the page draws of audio without video.

    Args:
        waveform: int16 [samples].
        start_seconds: time of the first sample.

    Returns:
        `start_seconds`, `seconds`, `columns`, `rows`, and `data`: base64 of bytes [columns, rows],
        lowest pitch first, 255 is the loudest.
    """
    hop = max(1, -(-len(waveform) // _COLUMNS))
    window = max(_MIN_WINDOW, 1 << (hop - 1).bit_length())
    decibels = mel_decibels(waveform, sample_rate_hz, window=window, hop=hop, mels=_MELS)
    below = decibels - max(float(decibels.max()), _SILENCE_DB)
    loudness = np.round(255 * (1 + below / _RANGE_DB)).clip(0, 255).astype(np.uint8)
    return {
        "start_seconds": start_seconds,
        "seconds": len(waveform) / sample_rate_hz,
        "columns": loudness.shape[0],
        "rows": loudness.shape[1],
        "data": base64.b64encode(loudness.tobytes()).decode("ascii"),
    }
