"""One entry of a manifest to one record."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from avcl_jax.data import media
from avcl_jax.data.media import MediaError
from avcl_jax.data.record_format import Record
from avcl_jax.data.silence import is_silent, peak
from data_prep.manifest import Entry
from data_prep.sources.example_file import open_example
from data_prep.sources.footage import Footage, JpegFrame
from data_prep.sources.media_file import MediaFootage
from data_prep.still import is_still

# Kinds of notes on files that are prepared nevertheless. `--reject` takes these names, which are
# then the reasons. The list is closed.
NOTES = {
    "antiphase": "the channels cancel in the mono mix: only the strongest one is used",
    "dead_channel": "a channel is silent beside the others: it is left out of the mono mix",
    "silent": "no audio sample is louder than -60 dB of full scale",
    "still": "nothing moves in the video",
}
# Reasons that preparation adds to those of avcl_jax.data.media. All lists are closed.
REASONS = media.REASONS | {
    "no_video": "no picture, and --require asks for one",
    "no_audio": "no sound, and --require asks for it",
    "too_short": "shorter than --min-seconds",
    "too_long": "longer than --max-seconds",
    "too_small": "the picture's shorter side is below --min-side",
    "bad_example": "an example of a record file that lacks what it was to hold",
    "bad_samples": "sound samples that are no numbers, or far beyond full scale",
    "timeout": "took longer than --timeout-seconds",
    "crashed": "the decoder crashed",
    **{kind: f"{meaning}, and --reject names it" for kind, meaning in NOTES.items()},
}
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
      file_format: Of the shards that the records go to, one of `FILE_FORMATS`.
      cut: How long videos are cut, as `data_prep.cut` reads it; "" for not at all.
      reject: Some of `NOTES`: clips with such a note are rejected.
    """

    short_side: int
    max_fps: float | None
    quality: int
    sample_rate_hz: int
    min_seconds: float
    max_seconds: float
    min_side: int
    require: tuple[str, ...]
    file_format: str
    cut: str = ""
    reject: tuple[str, ...] = ()


def prepare_clip(entry: Entry, options: ClipOptions) -> tuple[Record, dict[str, str]]:
    """Decodes, scales and encodes one clip.

    Time 0 of the record is its first frame's, or where it starts when there is no picture. Sound
    before that is cut; sound that starts later says so in `audio_start_seconds`.

    Returns:
      The record, and messages by kind of note.

    Raises:
      MediaError: With one of `REASONS`.
    """
    footage = open_footage(entry)
    start, end = entry.start_seconds, entry.end_seconds
    stated = footage.stated_seconds
    if stated is not None and start > 0 and start >= stated:
        raise MediaError("outside", f"starts at {start:g} s, the file ends at {stated:.2f} s")
    expected_end = min((x for x in (stated, end) if x is not None), default=None)
    if expected_end is not None:
        _check_not_longer(expected_end - start, options)
    frames = _frames(footage, entry, options)
    picture_end = _picture_end(frames, entry)
    sound = footage.sound(
        sample_rate_hz=options.sample_rate_hz,
        # Of a file that does not say how long it is, no more than decides that it is too long.
        until_seconds=start + options.max_seconds + 2 * _MISSING_SECONDS,
    )
    if not frames and sound is None:
        raise MediaError("outside" if start or end else "empty", "neither picture nor sound here")
    zero = frames[0].seconds if frames else max(start, sound.start_seconds if sound else 0.0)
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
        stated is not None
        and expected_end is not None
        and footage.promised
        and last < expected_end - max(_MISSING_SECONDS, _MISSING_SHARE * expected_end)
    ):
        raise MediaError("truncated", f"ends at {last:.2f} s, its header says {expected_end:.2f} s")
    duration = float(last - zero)
    if duration < options.min_seconds or duration <= 0:
        raise MediaError("too_short", f"{duration:.2f} s, at least {options.min_seconds:g} wanted")
    notes = dict(sound.notes) if sound is not None and len(waveform) else {}
    if len(waveform) and is_silent(waveform):
        notes["silent"] = f"the loudest of {len(waveform)} samples is {peak(waveform)}"
    if frames and is_still([frame.data for frame in frames], picture_end - frames[0].seconds):
        notes["still"] = f"all {len(frames)} frames are alike"
    for kind in options.reject:
        if kind in notes:
            raise MediaError(kind, notes[kind])
    record = Record(
        record_id=entry.record_id,
        source_id=entry.source_id,
        frames=[frame.data for frame in frames],
        frame_seconds=np.round(np.array([f.seconds for f in frames], np.float64) - zero, 9),
        waveform=waveform,
        sample_rate_hz=options.sample_rate_hz if len(waveform) else 0,
        audio_start_seconds=audio_start if len(waveform) else 0.0,
        duration_seconds=round(duration, 9),
        height=frames[0].height if frames else 0,
        width=frames[0].width if frames else 0,
        labels=entry.labels,
        is_still="still" in notes,
    )
    return record, notes


def open_footage(entry: Entry) -> Footage:
    """Opens what an entry names.

    Raises:
      MediaError: If it cannot be read.
    """
    if entry.example is None:
        return MediaFootage(entry.path, entry.start_seconds, entry.end_seconds)
    return open_example(entry.path, entry.example, entry.start_seconds, entry.end_seconds)


def _check_not_longer(seconds: float, options: ClipOptions) -> None:
    if seconds > options.max_seconds:
        raise MediaError(
            "too_long",
            f"{seconds:.0f} s, at most {options.max_seconds:g}: cut it by start and end in a "
            "manifest, or by --cut, or raise --max-seconds",
        )


def _frames(footage: Footage, entry: Entry, options: ClipOptions) -> list[JpegFrame]:
    frames: list[JpegFrame] = []
    for frame in footage.frames(
        short_side=options.short_side, max_fps=options.max_fps, quality=options.quality
    ):
        side = min(frame.height, frame.width)
        if not frames and side < min(options.min_side, options.short_side):
            raise MediaError("too_small", f"the picture has {frame.width}x{frame.height} pixels")
        _check_not_longer(frame.seconds - entry.start_seconds, options)
        frames.append(frame)
    return frames


def _picture_end(frames: Sequence[JpegFrame], entry: Entry) -> float:
    """Returns when the last frame ends, -inf without any."""
    if not frames:
        return -np.inf
    last = frames[-1].duration_seconds
    if not last:
        gaps = np.diff([frame.seconds for frame in frames])
        last = float(np.median(gaps)) if len(gaps) else 0.04
    end = frames[-1].seconds + last
    return end if entry.end_seconds is None else min(end, entry.end_seconds)
