"""One entry of a manifest to records: cut into clips if asked to, each decoded, scaled, encoded."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import math
import re
from collections.abc import Sequence

import cv2
import numpy as np
import simplejpeg

from avcl_jax.data import media
from avcl_jax.data.media import MediaError
from avcl_jax.data.record_format import Record, is_silent, peak
from avcl_jax.data_prep.footage import Footage, JpegFrame, open_example, open_media
from avcl_jax.data_prep.manifest import Entry, PrepareError

# Kinds of notes on files that are prepared nevertheless. `--reject` takes these names, which are
# then the reasons. The list is closed.
NOTES = {
    "antiphase": "the channels cancel in the mono mix: only the strongest one is used",
    "dead_channel": "a channel is silent next to the others: it is left out of the mono mix",
    "silent": "no audio sample is louder than -60 dB of full scale",
    "still": "nothing moves in the video",
}
# Reasons that preparation adds to those of avcl_jax.data.media. All lists are closed.
REASONS = media.REASONS | {
    "no_video": "no video, and --require asks for it",
    "no_audio": "no audio, and --require asks for it",
    "too_short": "shorter than --min-seconds",
    "too_long": "longer than --max-seconds",
    "too_small": "the frames' shorter side is below --min-side",
    "bad_example": "an example of a record file that lacks a feature, or has another type",
    "bad_samples": "audio samples that are not numbers, or far beyond full scale",
    "timeout": "took longer than --timeout-seconds",
    "crashed": "the decoder crashed",
    **{kind: f"{meaning}, and --reject names it" for kind, meaning in NOTES.items()},
}
_MISSING_SECONDS, _MISSING_FRACTION = 0.5, 0.02

# Cells per side of a frame -> smallest change of the mean brightness of a cell, in levels of 255,
# that is motion. In still videos H.264 changes cells of 16x16 by up to 4 (CRF 28, 96 lines) or 6
# (CRF 38, 360 lines); in moving videos, real or of the demo, the smallest change measured is 54. If
# only a mouth moves, cells of 16x16 change by 6, but cells of 64x64 by 53; in a still video with
# noise that cells of 16x16 tolerate those change by up to 36.
_LEVELS = {16: 8.0, 64: 40.0}
_SMALLEST = max(_LEVELS)  # pixels; JPEG is decoded at a fraction of its size down to this
# In a shorter time real motion may be as small as noise.
_MIN_STILL_SECONDS = 0.5

FORMS = "SECONDS, SECONDS/STEP, scenes or scenes:SECONDS"
_NUMBER = r"\d+(?:\.\d+)?"
# Scenes are detected in small frames: their content changes, not their detail.
_SCENE_SIDE, _SCENE_QUALITY = 64, 95
# A remainder made by rounding is not a clip.
_SLACK_SECONDS = 1e-3


@dataclasses.dataclass(frozen=True)
class ClipOptions:
    """Settings that decide the content of a record; clips outside the limits are rejected."""

    short_side: int  # pixels; larger frames are scaled down to this height or width
    max_fps: float | None  # frames of faster videos are dropped; None keeps all
    quality: int  # of JPEG, 1 to 100
    sample_rate_hz: int
    min_seconds: float
    max_seconds: float
    min_side: int  # pixels
    require: tuple[str, ...]  # some of "video", "audio"
    file_format: str  # of the shards, one of FILE_FORMATS
    cut: str = ""  # as `parse_cut` reads it
    reject: tuple[str, ...] = ()  # some of NOTES


def prepare_clip(entry: Entry, options: ClipOptions) -> tuple[Record, dict[str, str]]:
    """Decodes, scales and encodes one clip.

    Time 0 of the record is its first frame, or the start of the clip without video. Audio before
    that is cut; for audio that starts later the record has `audio_start_seconds`.

    Returns the record, and messages by kind of note; raises MediaError with one of `REASONS`.
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
    video_end = _video_end(frames, entry)
    rate = options.sample_rate_hz
    # If the file does not state its length, no more than decides that it is too long.
    audio = footage.audio(rate, start + options.max_seconds + 2 * _MISSING_SECONDS)
    if not frames and audio is None:
        raise MediaError("outside" if start or end else "empty", "neither video nor audio here")
    zero = frames[0].seconds if frames else max(start, audio.start_seconds if audio else 0.0)
    waveform, audio_start, audio_end = np.empty(0, np.int16), 0.0, -np.inf
    if audio is not None:
        audio_end = audio.start_seconds + len(audio.waveform) / rate
        _check_not_longer(audio_end - start - _MISSING_SECONDS, options)
        # Samples that belong before the first frame; less than a thousandth of one does not.
        skip = max(0, int(np.ceil((zero - audio.start_seconds) * rate - 1e-3)))
        waveform = audio.waveform[skip:]
        audio_start = max(0.0, round(audio.start_seconds + skip / rate - zero, 9))
    if not frames and "video" in options.require:
        raise MediaError("no_video", "the file has no video")
    if not len(waveform) and "audio" in options.require:
        raise MediaError("no_audio", "the file has no audio")
    last = max(video_end, audio_end)
    if (
        stated is not None
        and expected_end is not None
        and footage.promised
        and last < expected_end - max(_MISSING_SECONDS, _MISSING_FRACTION * expected_end)
    ):
        raise MediaError("truncated", f"ends at {last:.2f} s, its header says {expected_end:.2f} s")
    duration = float(last - zero)
    if duration < options.min_seconds or duration <= 0:
        raise MediaError("too_short", f"{duration:.2f} s, at least {options.min_seconds:g} s")
    notes = dict(audio.notes) if audio is not None and len(waveform) else {}
    if len(waveform) and is_silent(waveform):
        notes["silent"] = f"the loudest of {len(waveform)} samples is {peak(waveform)}"
    if frames and is_still([frame.data for frame in frames], video_end - frames[0].seconds):
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
        sample_rate_hz=rate if len(waveform) else 0,
        audio_start_seconds=audio_start if len(waveform) else 0.0,
        duration_seconds=round(duration, 9),
        height=frames[0].height if frames else 0,
        width=frames[0].width if frames else 0,
        labels=entry.labels,
        is_still="still" in notes,
    )
    return record, notes


def open_footage(entry: Entry) -> Footage:
    """Opens the media file or the example of an entry; raises MediaError if it cannot be read."""
    interval = (entry.start_seconds, entry.end_seconds)
    if entry.example is None:
        return open_media(entry.path, *interval)
    return open_example(entry.path, entry.example, *interval)


def _check_not_longer(seconds: float, options: ClipOptions) -> None:
    if seconds > options.max_seconds:
        raise MediaError(
            "too_long",
            f"{seconds:.0f} s, at most {options.max_seconds:g}: cut it by start and end in a "
            "manifest, or by --cut, or raise --max-seconds",
        )


def _frames(footage: Footage, entry: Entry, options: ClipOptions) -> list[JpegFrame]:
    frames: list[JpegFrame] = []
    for frame in footage.frames(options.short_side, options.max_fps, options.quality):
        side = min(frame.height, frame.width)
        if not frames and side < min(options.min_side, options.short_side):
            raise MediaError("too_small", f"the frames have {frame.width}x{frame.height} pixels")
        _check_not_longer(frame.seconds - entry.start_seconds, options)
        frames.append(frame)
    return frames


def _video_end(frames: Sequence[JpegFrame], entry: Entry) -> float:
    """Returns the end of the last frame in seconds, -inf without any."""
    if not frames:
        return -np.inf
    last = frames[-1].duration_seconds
    if not last:
        gaps = np.diff([frame.seconds for frame in frames])
        last = float(np.median(gaps)) if len(gaps) else 0.04
    end = frames[-1].seconds + last
    return end if entry.end_seconds is None else min(end, entry.end_seconds)


@dataclasses.dataclass(frozen=True)
class Cut:
    """Intervals to cut a video into."""

    seconds: float | None  # length of a clip; of scenes at most this, None for whole scenes
    step_seconds: float | None  # from the start of a clip to that of the next; None for scenes


def parse_cut(text: str) -> Cut:
    """Parses `--cut`; raises PrepareError if it is wrong, or PySceneDetect is not installed."""
    found = re.fullmatch(rf"({_NUMBER})(?:/({_NUMBER}))?", text)
    if found:
        seconds = float(found[1])
        step = float(found[2] or seconds)
        if seconds > 0 and step > 0:
            return Cut(seconds, step)
    found = re.fullmatch(rf"scenes(?::({_NUMBER}))?", text)
    if found and float(found[1] or 1) > 0:
        if importlib.util.find_spec("scenedetect") is None:
            raise PrepareError("--cut=scenes needs PySceneDetect: pip install 'avcl-jax[scenes]'")
        return Cut(float(found[1]) if found[1] else None, None)
    raise PrepareError(f"--cut is {text!r}, expected {FORMS}, with numbers above 0")


def pieces(entry: Entry, cut: Cut, *, min_seconds: float) -> list[Entry]:
    """Cuts one entry into clips.

    A remainder shorter than a clip is left out, as are scenes shorter than `min_seconds`; a video
    shorter than one clip is one clip.

    Raises MediaError if the video cannot be read.
    """
    if cut.step_seconds is None:
        intervals = [
            part
            for start, end in _scenes(entry)
            if end - start >= min_seconds
            for part in _split(start, end, cut.seconds)
        ]
    else:
        assert cut.seconds is not None
        end = _end_seconds(entry)
        span = end - entry.start_seconds
        count = 1 + math.floor((span - cut.seconds + _SLACK_SECONDS) / cut.step_seconds)
        starts = [entry.start_seconds + number * cut.step_seconds for number in range(count)]
        intervals = [(start, start + cut.seconds) for start in starts] or [
            (entry.start_seconds, end)
        ]
    return [
        dataclasses.replace(
            entry,
            record_id=f"{entry.record_id}#{start:g}-{end:g}",
            start_seconds=start,
            end_seconds=end,
        )
        for start, end in intervals
    ]


def _split(start: float, end: float, seconds: float | None) -> list[tuple[float, float]]:
    """Cuts a scene into equal parts that are no longer than `seconds`."""
    count = 1 if seconds is None else max(1, math.ceil((end - start - _SLACK_SECONDS) / seconds))
    return list(itertools.pairwise(np.linspace(start, end, count + 1).round(6).tolist()))


def _end_seconds(entry: Entry) -> float:
    """Returns the end of an entry, decoding the whole file if its header does not state it."""
    footage = open_footage(entry)
    stated = footage.stated_seconds
    if stated is None:
        ends = [
            frame.seconds + frame.duration_seconds
            for frame in footage.frames(16, None, _SCENE_QUALITY)
        ]
        audio = footage.audio(8000)
        if audio is not None:
            ends.append(audio.start_seconds + len(audio.waveform) / 8000)
        stated = max(ends, default=0.0)
    return stated if entry.end_seconds is None else min(stated, entry.end_seconds)


def _scenes(entry: Entry) -> list[tuple[float, float]]:
    """Returns start and end of each scene, by PySceneDetect's detector of content changes."""
    from scenedetect import FrameTimecode
    from scenedetect.detectors import AdaptiveDetector

    detector = AdaptiveDetector(min_scene_len=1)
    times: list[float] = []
    changes: list[int] = []
    end = 0.0
    # The detector counts frames, whatever their times are.
    for frame in open_footage(entry).frames(_SCENE_SIDE, None, _SCENE_QUALITY):
        times.append(frame.seconds)
        end = frame.seconds + frame.duration_seconds
        image = simplejpeg.decode_jpeg(frame.data, colorspace="BGR")
        found = detector.process_frame(FrameTimecode(len(times) - 1, fps=25.0), image)
        changes += [int(change.frame_num) for change in found]
    if not times:
        return [(entry.start_seconds, _end_seconds(entry))]
    edges = [times[number] for number in sorted(set(changes)) if number > 0]
    return list(itertools.pairwise([times[0], *edges, end]))


def is_still(frames: Sequence[bytes], seconds: float) -> bool:
    """Returns whether all frames show the same image, but for codec noise.

    A slideshow is not still, a black screen is, and less than half a second never is. Frames, JPEG
    files of one size, are read until one differs: where something moves these are few.
    """
    if seconds < _MIN_STILL_SECONDS:
        return False
    first = _means(frames[0])
    return not any(
        np.abs(mean - reference).max() >= levels
        for frame in frames[1:]
        for mean, reference, levels in zip(_means(frame), first, _LEVELS.values(), strict=True)
    )


def _means(frame: bytes) -> list[np.ndarray]:
    """Returns the mean brightness of cells of each size, float32 [cells, cells]."""
    grey = simplejpeg.decode_jpeg(
        frame, colorspace="GRAY", min_height=_SMALLEST, min_width=_SMALLEST
    )[..., 0].astype(np.float32)
    return [cv2.resize(grey, (cells,) * 2, interpolation=cv2.INTER_AREA) for cells in _LEVELS]
