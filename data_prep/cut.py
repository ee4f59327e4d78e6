"""Cutting of videos into clips: of a fixed length, overlapping or not, or scene by scene."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import math
import re

import numpy as np
import simplejpeg

from data_prep.clip import open_footage
from data_prep.manifest import Entry, PrepareError

FORMS = "SECONDS, SECONDS/STEP, scenes or scenes:SECONDS"
_NUMBER = r"\d+(?:\.\d+)?"
# Scenes are detected in small frames: their content changes, not their detail.
_SCENE_SIDE, _SCENE_QUALITY = 64, 95
# A remainder made by rounding is not a clip.
_SLACK_SECONDS = 1e-3


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

    Raises:
      MediaError: If the video cannot be read.
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
