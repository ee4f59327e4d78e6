"""Media for browsers: files as they are if browsers play them, else small conversions."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import secrets
from collections import OrderedDict
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import librosa
import numpy as np
from starlette.exceptions import HTTPException

from avcl_jax.data.media import MediaError, decode_audio, decode_frames, probe
from avcl_jax.fingerprint.database import SourceRow
from avcl_jax.fingerprint.web.decoder import Decoder, DecoderError

_KEPT = 12
# Limits of a conversion, which then has at most 40 MB.
MAX_SECONDS = 180.0
_SHORT_SIDE, _MAX_FPS, _PEAK_BITS = 360, 30.0, "1500000"
_RATE_HZ, _AUDIO_BITS = 44_100, 96_000
_CLOCK = 90_000
# Spectrogram of audio without video.
_COLUMNS, _MELS, _RANGE_DB, _MIN_WINDOW = 480, 64, 70.0, 512
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
    """Conversions in a directory; the oldest make room for new ones."""

    def __init__(self, directory: Path, decoder: Decoder):
        """Takes the directory, which the caller deletes."""
        self._directory = directory
        self._decoder = decoder
        self._paths: OrderedDict[str, Path] = OrderedDict()
        self._turn = asyncio.Lock()

    def get(self, name: str) -> Path:
        """Returns the conversion of a clip.

        Raises:
            HTTPException: if it has made room for others.
        """
        if name not in self._paths:
            raise HTTPException(404, "this clip is no longer kept: drop it again")
        return self._paths[name]

    async def convert_clip(self, path: Path, seconds: float) -> tuple[str | None, str | None]:
        """Converts a clip if browsers do not play it.

        Returns:
            Media type, None where it cannot be shown; name for `get`, None where none is needed.
        """
        name = secrets.token_urlsafe(18)
        # The clip was compared, so that only its rest is damaged: the match stands without it.
        with contextlib.suppress(DecoderError):
            kind = await self._decoder.run(playable_type, path)
            if kind is not None:
                return kind, None
            await self._convert(name, path, 0.0, seconds)
            return "video/mp4", name
        return None, None

    async def convert_source(self, row: SourceRow, start: float, end: float) -> Path:
        """Converts a part of a source.

        Raises:
            HTTPException: if it cannot be shown.
        """
        name = f"{row.content[:24]}-{start:.1f}-{end:.1f}"
        async with self._turn:  # browsers ask for several ranges at once
            with source_file(row) as path:
                if name not in self._paths:
                    await self._convert(name, path, start, end)
        self._paths.move_to_end(name)
        return self._paths[name]

    async def _convert(self, name: str, path: Path, start: float, end: float) -> None:
        out = self._directory / f"preview-{secrets.token_hex(12)}.mp4"
        try:
            await self._decoder.run(convert, path, out, start_seconds=start, end_seconds=end)
        except DecoderError:
            out.unlink(missing_ok=True)
            raise
        self._paths[name] = out
        while len(self._paths) > _KEPT:
            self._paths.popitem(last=False)[1].unlink(missing_ok=True)


@contextlib.contextmanager
def source_file(row: SourceRow) -> Iterator[Path]:
    """Opens a block that decodes the file of a source.

    Raises:
        HTTPException: if there is no file, or the block cannot decode it.
    """
    if row.path is None:
        raise HTTPException(404, f"{row.name} was indexed from memory: there is no file to show")
    path = Path(row.path)
    if not path.is_file():
        raise HTTPException(
            404, f"{path} is not there any more: put it back, or index it where it is now"
        )
    try:
        yield path
    except DecoderError as error:
        raise HTTPException(422, f"{row.name} cannot be shown: {error}") from error


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
        path: file that FFmpeg reads.
        out: new file; its zero is `start_seconds`.
        start_seconds: time in the file.
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
    try:
        with av.open(str(out), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            video_stream: Any = None
            if first is not None:
                height, width = (max(2, n // 2 * 2) for n in first.image.shape[:2])
                rates = {"maxrate": _PEAK_BITS, "bufsize": _PEAK_BITS}
                options = {"crf": "25", "preset": "veryfast", "threads": "1", **rates}
                video_stream = container.add_stream("libx264", rate=30, options=options)
                video_stream.height, video_stream.width = height, width
                video_stream.pix_fmt = "yuv420p"
                video_stream.codec_context.time_base = Fraction(1, _CLOCK)
            audio_stream: Any = None
            if audio is not None:
                audio_stream = container.add_stream("aac", rate=_RATE_HZ, layout="mono")
                audio_stream.bit_rate = _AUDIO_BITS
            if first is not None:
                with contextlib.suppress(MediaError):  # a damaged rest is left out
                    for frame in itertools.chain([first], frames):
                        image = _even(frame.image, height, width)
                        encoded = av.VideoFrame.from_ndarray(image, format="rgb24")
                        encoded.pts = round((frame.seconds - start_seconds) * _CLOCK)
                        encoded.time_base = Fraction(1, _CLOCK)
                        container.mux(video_stream.encode(encoded))
                container.mux(video_stream.encode())
            if audio is not None:
                samples = av.AudioFrame.from_ndarray(
                    audio.waveform[None], format="s16", layout="mono"
                )
                samples.sample_rate = _RATE_HZ
                samples.pts = max(0, round((audio.start_seconds - start_seconds) * _RATE_HZ))
                samples.time_base = Fraction(1, _RATE_HZ)
                container.mux([*audio_stream.encode(samples), *audio_stream.encode()])
    except (av.error.FFmpegError, OSError) as error:  # sizes that H.264 does not know; a full disk
        raise MediaError("unreadable", f"no preview can be made: {error.strerror}") from error


def _even(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Cuts off an odd row or column, for H.264; the only one is doubled."""
    missing = ((0, max(0, height - image.shape[0])), (0, max(0, width - image.shape[1])), (0, 0))
    return np.ascontiguousarray(np.pad(image, missing, mode="edge")[:height, :width])


def spectrogram(waveform: np.ndarray, sample_rate_hz: int, start_seconds: float) -> dict[str, Any]:
    """Computes what the page draws of audio without video.

    Args:
        waveform: int16 [samples].
        sample_rate_hz: rate of the samples.
        start_seconds: time of the first sample.

    Returns:
        `start_seconds`, `seconds`, `columns`, `rows`, and `data`: base64 of bytes [columns, rows],
        lowest pitch first, 255 is the loudest.
    """
    hop = max(1, -(-len(waveform) // _COLUMNS))
    power = librosa.feature.melspectrogram(
        y=waveform.astype(np.float32) / 32768,
        sr=sample_rate_hz,
        n_fft=max(_MIN_WINDOW, 1 << (hop - 1).bit_length()),
        hop_length=hop,
        n_mels=_MELS,
    )
    decibel = librosa.power_to_db(power, ref=max(float(power.max()), 1e-9), top_db=_RANGE_DB)
    loudness = np.round(255 * (1 + decibel.T / _RANGE_DB)).clip(0, 255).astype(np.uint8)
    return {
        "start_seconds": start_seconds,
        "seconds": len(waveform) / sample_rate_hz,
        "columns": loudness.shape[0],
        "rows": loudness.shape[1],
        "data": base64.b64encode(loudness.tobytes()).decode("ascii"),
    }
