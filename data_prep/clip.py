"""One entry of a manifest to one record."""

from __future__ import annotations

import dataclasses

import numpy as np
import simplejpeg

from avcl_jax.data import media
from avcl_jax.data.media import MediaError
from avcl_jax.data.record_format import Record
from data_prep.manifest import Entry

# Reasons that preparation adds to those of avcl_jax.data.media. Both lists are closed.
REASONS = media.REASONS | {
    "no_video": "no picture, and --require asks for one",
    "no_audio": "no sound, and --require asks for it",
    "too_short": "shorter than --min-seconds",
    "too_long": "longer than --max-seconds",
    "too_small": "the picture's shorter side is below --min-side",
    "timeout": "took longer than --timeout-seconds",
    "crashed": "the decoder crashed",
}
# Containers that state their duration. In the others FFmpeg guesses it from the bit rate.
_STATED_DURATION = ("mov", "matroska", "avi", "wav", "flac", "asf", "flv", "ogg")
_MISSING_SECONDS, _MISSING_SHARE = 0.5, 0.02


@dataclasses.dataclass(frozen=True)
class ClipOptions:
    """How clips are prepared.

    Attributes:
      short_side: Height or width of the frames, whichever is shorter; smaller ones stay.
      max_fps: Faster pictures lose frames; None keeps all.
      quality: Of the JPEG frames, 1 to 100.
      sample_rate_hz: Of the sound.
      min_seconds: Shorter clips are rejected.
      max_seconds: Longer clips are rejected.
      min_side: Smaller pictures are rejected.
      require: Some of "video", "audio": clips without are rejected.
    """

    short_side: int
    max_fps: float | None
    quality: int
    sample_rate_hz: int
    min_seconds: float
    max_seconds: float
    min_side: int
    require: tuple[str, ...]


def prepare_clip(entry: Entry, options: ClipOptions) -> Record:
    """Decodes, scales and encodes one clip.

    Time 0 of the record is its first frame's, or where it starts when there is no picture. Sound
    before that is cut; sound that starts later says so in `audio_start_seconds`.

    Raises:
      MediaError: With one of `REASONS`.
    """
    info = media.probe(entry.path)
    start, end = entry.start_seconds, entry.end_seconds
    stated = info.duration_seconds
    if stated is not None and start >= stated:
        raise MediaError("outside", f"starts at {start:g} s, the file ends at {stated:.2f} s")
    expected_end = min((x for x in (stated, end) if x is not None), default=None)
    if expected_end is not None:
        _check_not_longer(expected_end - start, options)
    frames, seconds, picture_end = _encode_frames(entry, options)
    sound = media.decode_audio(
        entry.path,
        sample_rate_hz=options.sample_rate_hz,
        start_seconds=start,
        # Of a file that does not say how long it is, no more than decides that it is too long.
        end_seconds=start + options.max_seconds + 2 * _MISSING_SECONDS if end is None else end,
    )
    if not frames and sound is None:
        raise MediaError("outside" if start or end else "empty", "neither picture nor sound here")
    zero = seconds[0] if frames else max(start, sound.start_seconds if sound else 0.0)
    waveform, audio_start = np.empty(0, np.int16), 0.0
    sound_end = -np.inf
    if sound is not None:
        rate = options.sample_rate_hz
        sound_end = sound.start_seconds + len(sound.waveform) / rate
        _check_not_longer(sound_end - start - _MISSING_SECONDS, options)
        # Samples that belong before the first frame; less than a thousandth of one does not.
        skip = max(0, int(np.ceil((zero - sound.start_seconds) * rate - 1e-3)))
        waveform = sound.waveform[skip:]
        audio_start = max(0.0, round(sound.start_seconds + skip / rate - zero, 9))
    if not frames and "video" in options.require:
        raise MediaError("no_video", "the file has no picture")
    if not len(waveform) and "audio" in options.require:
        raise MediaError("no_audio", "the file has no sound")
    last = max(picture_end, sound_end)
    if (
        expected_end is not None
        and info.format.startswith(_STATED_DURATION)
        and last < expected_end - max(_MISSING_SECONDS, _MISSING_SHARE * expected_end)
    ):
        raise MediaError("truncated", f"ends at {last:.2f} s, its header says {expected_end:.2f} s")
    duration = float(last - zero)
    if duration < options.min_seconds or duration <= 0:
        raise MediaError("too_short", f"{duration:.2f} s, at least {options.min_seconds:g} wanted")
    height, width = 0, 0
    if frames:
        height, width, _, _ = simplejpeg.decode_jpeg_header(frames[0])
    return Record(
        record_id=entry.record_id,
        source_id=entry.source_id,
        frames=frames,
        frame_seconds=np.round(np.array(seconds, np.float64) - zero, 9),
        waveform=waveform,
        sample_rate_hz=options.sample_rate_hz if len(waveform) else 0,
        audio_start_seconds=audio_start if len(waveform) else 0.0,
        duration_seconds=round(duration, 9),
        height=height,
        width=width,
        labels=entry.labels,
    )


def _check_not_longer(seconds: float, options: ClipOptions) -> None:
    if seconds > options.max_seconds:
        raise MediaError(
            "too_long",
            f"{seconds:.0f} s, at most {options.max_seconds:g}: cut it by start and end in a "
            "manifest, or raise --max-seconds",
        )


def _encode_frames(entry: Entry, options: ClipOptions) -> tuple[list[bytes], list[float], float]:
    """Returns JPEG frames, when each appears, and when the last one ends (-inf without any)."""
    frames: list[bytes] = []
    seconds: list[float] = []
    last_duration = 0.0
    for frame in media.decode_frames(
        entry.path,
        short_side=options.short_side,
        max_fps=options.max_fps,
        start_seconds=entry.start_seconds,
        end_seconds=entry.end_seconds,
    ):
        if not frames and min(frame.image.shape[:2]) < min(options.min_side, options.short_side):
            height, width = frame.image.shape[:2]
            raise MediaError("too_small", f"the picture has {width}x{height} pixels")
        _check_not_longer(frame.seconds - entry.start_seconds, options)
        frames.append(
            simplejpeg.encode_jpeg(
                frame.image, quality=options.quality, colorspace="RGB", colorsubsampling="420"
            )
        )
        seconds.append(frame.seconds)
        last_duration = frame.duration_seconds
    if not frames:
        return frames, seconds, -np.inf
    if not last_duration:
        last_duration = float(np.median(np.diff(seconds))) if len(seconds) > 1 else 0.04
    end = seconds[-1] + last_duration
    return frames, seconds, end if entry.end_seconds is None else min(end, entry.end_seconds)
