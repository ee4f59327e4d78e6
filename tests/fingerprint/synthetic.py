"""Clips that differ from each other and from moment to moment, in memory and as files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import scipy.io.wavfile
import scipy.ndimage

from avcl_jax.data.encode import write_mp4
from avcl_jax.data.media import DecodedMedia, no_frames
from avcl_jax.fingerprint.settings import FingerprintSettings

FPS, RATE_HZ, SIDE = 16, 8000, 24
SETTINGS = FingerprintSettings(rates=(1.0, 0.8, 1.25), dimensions=48)


def bytes_taken(count: int) -> int:
    """Takes this much address space, of which nothing is touched."""
    return len(bytes(count))


def clip(
    seed: int,
    seconds: float = 6.0,
    *,
    video: bool = True,
    audio: bool = True,
    fps: int = FPS,
    rate_hz: int = RATE_HZ,
    size: tuple[int, int] = (SIDE, SIDE),
) -> DecodedMedia:
    """Returns slowly changing noise and tones, of which no two moments are alike."""
    rng = np.random.default_rng(seed)
    count = round(seconds * fps)
    noise = scipy.ndimage.gaussian_filter(rng.normal(size=(count, *size, 3)), (2, 3, 3, 0))
    frames = np.clip(128 + 60 * noise / noise.std(), 0, 255).astype(np.uint8)
    # A tone every eighth of a second.
    tones = rng.uniform(100, 3000, size=round(seconds * 8) + 1)
    frequency = np.repeat(tones, rate_hz // 8)[: round(seconds * rate_hz)]
    sound = 8000 * np.sin(2 * np.pi * np.cumsum(frequency) / rate_hz)
    return DecodedMedia(
        frames=frames if video else no_frames(),
        frame_seconds=np.arange(count if video else 0) / fps,
        waveform=sound.astype(np.int16) if audio else np.empty(0, np.int16),
        sample_rate_hz=rate_hz if audio else 0,
        audio_start_seconds=0.0,
        duration_seconds=seconds,
    )


def leader(seconds: float) -> DecodedMedia:
    """Returns black video, with the noise of coding, and silence."""
    media = clip(0, seconds)
    noise = np.random.default_rng(1).integers(0, 3, media.frames.shape, np.uint8)
    return dataclasses.replace(media, frames=noise, waveform=np.zeros_like(media.waveform))


def write(path: Path, media: DecodedMedia) -> Path:
    """Writes a clip of H.264 and AAC to MP4, which browsers play, or Matroska; or audio to WAV."""
    if path.suffix == ".wav":
        scipy.io.wavfile.write(path, RATE_HZ, media.waveform)
        return path
    write_mp4(
        path,
        zip(media.frame_seconds, media.frames.repeat(2, 1).repeat(2, 2), strict=True),
        media.waveform,
        fps=FPS,
        sample_rate_hz=RATE_HZ,
        audio_bits_per_second=64_000,
        video_options={"crf": "10", "threads": "1"},
        container="mp4" if path.suffix == ".mp4" else "matroska",
    )
    return path
