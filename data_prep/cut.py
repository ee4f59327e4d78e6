"""Long videos to clips: of a fixed length, overlapping if wanted, or free of scene changes."""

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
# Scenes are looked for in small pictures: their content changes, not their detail.
_SCENE_SIDE = 64
_SCENE_QUALITY = 95
# A rest that rounding makes is no clip.
_SLACK_SECONDS = 1e-3


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a video is cut.

    Attributes:
      seconds: Length of a clip; at most this for scenes; None for whole scenes.
      step_seconds: From the start of one clip to the start of the next; None for scenes.
    """

    seconds: float | None
    step_seconds: float | None


def parse_cut(text: str) -> Cut:
    """Reads `--cut`.

    Raises:
      PrepareError: If it makes no sense, or needs PySceneDetect and that is not installed.
    """
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
    """Cuts one entry.

    A rest shorter than a clip is left out, as are scenes shorter than `min_seconds`; a video that
    is shorter than one clip is one clip.

    Args:
      entry: A video, or a part of one.
      cut: How.
      min_seconds: Shorter scenes are left out.

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
    edges = np.linspace(start, end, count + 1).round(6).tolist()
    return list(itertools.pairwise(edges))


def _end_seconds(entry: Entry) -> float:
    """Returns where an entry ends, reading the whole file where its header does not say."""
    footage = open_footage(entry)
    stated = footage.stated_seconds
    if stated is None:
        ends = [
            frame.seconds + frame.duration_seconds
            for frame in footage.frames(short_side=16, max_fps=None, quality=_SCENE_QUALITY)
        ]
        sound = footage.sound(sample_rate_hz=8000)
        if sound is not None:
            ends.append(sound.start_seconds + len(sound.waveform) / 8000)
        stated = max(ends, default=0.0)
    return min(stated, stated if entry.end_seconds is None else entry.end_seconds)


def _scenes(entry: Entry) -> list[tuple[float, float]]:
    """Returns start and end of each scene, by PySceneDetect's detector of content changes."""
    from scenedetect import FrameTimecode
    from scenedetect.detectors import AdaptiveDetector

    detector = AdaptiveDetector(min_scene_len=1)
    times: list[float] = []
    changes: list[int] = []
    end = 0.0
    # The detector counts frames, whatever their times are.
    for frame in open_footage(entry).frames(
        short_side=_SCENE_SIDE, max_fps=None, quality=_SCENE_QUALITY
    ):
        times.append(frame.seconds)
        end = frame.seconds + frame.duration_seconds
        image = simplejpeg.decode_jpeg(frame.data, colorspace="BGR")
        found = detector.process_frame(FrameTimecode(len(times) - 1, fps=25.0), image)
        changes += [int(change.frame_num) for change in found]
    if not times:
        return [(entry.start_seconds, _end_seconds(entry))]
    edges = [times[number] for number in sorted(set(changes)) if number > 0]
    return list(itertools.pairwise([times[0], *edges, end]))
