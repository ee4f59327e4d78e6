"""Views: intervals of a video with a playback speed and a direction, and the frames they show.

Two views are drawn per video. The labels of the temporal tasks follow from the draw:

* speed and direction are drawn uniformly and independently of everything else;
* the relation of the two intervals (before, overlapping, after) is drawn uniformly whenever the
  two speeds can realise all three in the time there is, independently of speeds and directions.

So a classifier that knows only speeds, directions, frame rate and duration stays at chance. A video
on which a task is not feasible is masked out of that task rather than given the feasible label:
a three-second video that fits only 1x and 2x would otherwise teach "short means slow".

Chosen by time, as a player shows them, source frames can reveal the speed. A file of a lower rate
than the clip repeats frames at low speeds. From a file of 25 or 30 frames per second, a clip of 16
frames per second takes steps of 1 and 2 frames at speed 1 and nearly equal ones at speed 8: of a
texture that drifts steadily at any velocity, mean frame differences reveal 4 speeds in 99 % of
clips. Therefore frames are chosen by time only if the file's rate is a multiple of the clip's.
Otherwise they are chosen by number: at playback speed s, the clip of K frames shows the frames

    m + s · b_k,   b_k = the integer (for even K, the half of an odd integer) nearest to
                   (k − (K − 1) / 2) · step / gap,   k = 0 … K − 1,

where m is the frame number nearest to the middle of the clip, `step` the time between two frames
of a clip at speed 1 and `gap` the mean time between two frames of the file. Steps between frames
are s times those at speed 1, and equal in both directions, because b_{K−1−k} = −b_k.

A frame repeated at speed s stays for s · step of the source's time. So frames cannot both repeat
alike at every speed and be within a fixed time of the source. They are within `gap` of their times
in playback time (source time / s), at every speed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from avcl_jax.errors import UserError

FORWARD, BACKWARD = 0, 1
BEFORE, OVERLAPPING, AFTER = 0, 1, 2

# Before and after need a gap, overlapping an overlap, of this fraction of the shorter interval.
MARGIN = 0.25
# Float times are compared with this slack; far below any frame's duration.
_EPSILON = 1e-6
# Fraction of the clip's frame rate. Files of a lower rate are shown by time, and only at speeds at
# which no frame repeats.
_SLOWEST = 0.45
# Relative deviation from a multiple of the clip's rate up to which frames are chosen by time.
_IN_STEP = 0.001
# Largest fraction of a file's clips that may deviate from a constant rate by more than a frame:
# beyond it, frame numbers do not measure time.
_UNEVEN_CLIPS = 0.2


@dataclasses.dataclass(frozen=True)
class ViewSpec:
    """Timing of all views: clips of `num_frames` that cover `clip_seconds` at speed 1.

    Attributes:
        speeds: playback speeds, increasing.
        audio_transform: "shared": audio has the video's speed and direction; "independent": audio
            has its own, on an interval around the same middle.
    """

    num_frames: int
    clip_seconds: float
    speeds: tuple[int, ...]
    audio_transform: Literal["shared", "independent"]

    def __post_init__(self) -> None:
        """Refuses settings without meaning."""
        speeds = self.speeds
        whole = all(isinstance(speed, int) for speed in speeds)
        if not speeds or not whole or speeds[0] < 1 or list(speeds) != sorted(set(speeds)):
            raise UserError(f"speeds {speeds} must be whole numbers, increasing and at least 1")
        if self.num_frames < 2 or self.clip_seconds <= 0:
            raise UserError(
                f"num_frames {self.num_frames} must be at least 2 and clip_seconds "
                f"{self.clip_seconds} positive"
            )
        if self.audio_transform not in ("shared", "independent"):
            raise UserError(
                f"audio_transform {self.audio_transform!r} must be 'shared' or 'independent'"
            )

    @property
    def frame_seconds(self) -> float:
        """Time between two frames of a clip at speed 1."""
        return self.clip_seconds / self.num_frames


@dataclasses.dataclass(frozen=True)
class Timeline:
    """Usable part of a record, in which both video and audio, as far as present, exist.

    `frame_gap_seconds` is the mean time between neighbouring source frames; 0 without video.
    """

    start_seconds: float
    end_seconds: float
    frame_gap_seconds: float
    has_video: bool = True
    has_audio: bool = True

    @property
    def duration_seconds(self) -> float:
        """Length of the usable part."""
        return self.end_seconds - self.start_seconds


@dataclasses.dataclass(frozen=True)
class Clip:
    """One modality of one view: start of the interval on the video's timeline, and playback.

    `speed` is an index into `ViewSpec.speeds`, `direction` is `FORWARD` or `BACKWARD`.
    """

    start_seconds: float
    speed: int
    direction: int


@dataclasses.dataclass(frozen=True)
class ViewPair:
    """Two views of one video and their labels.

    `order` is the place of view 1 relative to view 2: `BEFORE`, `OVERLAPPING` or `AFTER`. The masks
    tell whether a task is defined for this video, and order for this pair of speeds.
    """

    video: tuple[Clip, ...]
    audio: tuple[Clip, ...]
    order: int
    speed_mask: bool
    direction_mask: bool
    order_mask: bool

    def labels(self) -> dict[str, Any]:
        """Returns `order` int32 and the masks bool, as a row of a training batch has them."""
        masks = {name: np.bool_(getattr(self, name)) for name in MASKS}
        return {"order": np.int32(self.order), **masks}


# Names of the masks of a `ViewPair` and of a batch, one per temporal task.
MASKS = ("speed_mask", "direction_mask", "order_mask")


def clip_times(start: float, end: float, span: float, count: int | None = None) -> list[float]:
    """Returns starts of `count` clips of `span` at equal distances in an interval, in seconds.

    A single clip lies in the middle; one that is longer than the interval starts with it. Without
    `count` the fewest clips cover the interval, from its start on; a rest of less than a twentieth
    of a clip, as containers round durations, adds none.
    """
    last = max(start, end - span)
    if count == 1:
        return [(start + last) / 2]
    covering = max(1, math.ceil((end - start) / span - 0.05))
    return np.linspace(start, last, count or covering).tolist()


def views_fit(duration_seconds: Any, frame_gap_seconds: Any, spec: ViewSpec) -> np.ndarray:
    """Tests whether views of each speed are feasible: bool [..., speeds].

    They are if they fit into the usable part, of `duration_seconds` [...], and repeat no source
    frame, or repeat frames alike at every speed. `frame_gap_seconds` [...] is the mean time between
    neighbouring source frames.
    """
    speeds = np.array(spec.speeds)
    long_enough = speeds * spec.clip_seconds <= np.asarray(duration_seconds)[..., None] + _EPSILON
    gap = np.asarray(frame_gap_seconds)[..., None]
    alike = gap <= spec.frame_seconds / _SLOWEST
    return long_enough & (alike | (speeds * spec.frame_seconds >= gap - _EPSILON))


def feasible_speeds(timeline: Timeline, spec: ViewSpec) -> list[int]:
    """Returns the indices of the speeds that `views_fit` allows."""
    fit = views_fit(timeline.duration_seconds, timeline.frame_gap_seconds, spec)
    return np.flatnonzero(fit).tolist()


def fitting_speed(timeline: Timeline, wanted: int, spec: ViewSpec) -> int:
    """Returns the index of the feasible speed nearest to the one at `wanted`; 0 if none is."""
    return min(feasible_speeds(timeline, spec) or [0], key=lambda speed: abs(speed - wanted))


def fixed_clips(
    timeline: Timeline, spec: ViewSpec, speeds: Sequence[int], count: int
) -> list[Clip]:
    """Returns `count` forward clips at each speed, at equal distances from first to last start.

    Speeds are indices into `spec.speeds`. One that is too fast for the timeline is replaced by the
    fastest that fits, or if none does by the slowest, and the clip then starts with the timeline.
    """
    clips = []
    for speed in (fitting_speed(timeline, wanted, spec) for wanted in speeds):
        span = spec.clip_seconds * spec.speeds[speed]
        starts = clip_times(timeline.start_seconds, timeline.end_seconds, span, count)
        clips += [Clip(start, speed, FORWARD) for start in starts]
    return clips


def order_fits(first_seconds: Any, second_seconds: Any, duration_seconds: Any) -> np.ndarray:
    """Tests whether intervals of two lengths [...] can be in any order in a video: bool [...]."""
    gap = MARGIN * np.minimum(first_seconds, second_seconds)
    return np.asarray(first_seconds + second_seconds + gap <= duration_seconds + _EPSILON)


def draw_views(
    rng: np.random.Generator, timeline: Timeline, spec: ViewSpec, frame_seconds: np.ndarray
) -> ViewPair:
    """Draws two views of a record with jointly balanced labels.

    `frame_seconds` are the times of its frames, float64 [source frames], strictly increasing.

    Raises:
        UserError: if not even the slowest feasible view fits.
    """
    speeds = feasible_speeds(timeline, spec)
    if not speeds:
        raise UserError(
            f"no view of {spec.clip_seconds:g} s at {1 / spec.frame_seconds:g} frames/s fits into "
            f"{timeline.duration_seconds:.3f} s of video whose frames are "
            f"{timeline.frame_gap_seconds:.3f} s apart"
        )
    video_speed = rng.choice(speeds, size=2)
    video_direction = rng.integers(2, size=2)
    if spec.audio_transform == "shared":
        audio_speed, audio_direction = video_speed, video_direction
    else:
        audio_speed, audio_direction = rng.choice(speeds, size=2), rng.integers(2, size=2)
    table = np.asarray(spec.speeds)
    video_spans = spec.clip_seconds * table[video_speed]
    audio_spans = spec.clip_seconds * table[audio_speed]
    spans = np.maximum(video_spans, audio_spans)
    order_mask = bool(order_fits(spans[0], spans[1], timeline.duration_seconds))
    order = int(rng.integers(3)) if order_mask else OVERLAPPING  # No label where the mask is False.
    if order_mask:
        # The shorter of video and audio of each view must overlap when the views do.
        starts = _place(rng, spans, order, timeline, np.minimum(video_spans, audio_spans))
    else:
        slack = np.maximum(timeline.duration_seconds - spans, 0.0)
        starts = timeline.start_seconds + rng.uniform(size=2) * slack
    middles = starts + spans / 2

    def clips(spans: np.ndarray, speed: np.ndarray, direction: np.ndarray) -> tuple[Clip, ...]:
        # Audio and video of a view share their middle: the same interval at the same speed.
        columns = (middles - spans / 2, speed, direction)
        return tuple(map(Clip, *(column.tolist() for column in columns)))

    video = clips(video_spans, video_speed, video_direction)
    audio = clips(audio_spans, audio_speed, audio_direction)
    speed_mask = _speeds_look_alike(timeline, spec, frame_seconds)
    return ViewPair(video, audio, order, speed_mask, direction_mask=True, order_mask=order_mask)


def _speeds_look_alike(timeline: Timeline, spec: ViewSpec, frame_seconds: np.ndarray) -> bool:
    """Tests whether a video is in the speed task.

    It depends on the video alone: if a draw decided, the task would favour some speeds.
    """
    if len(feasible_speeds(timeline, spec)) < len(spec.speeds):
        return False
    if not timeline.has_video or len(frame_seconds) < 2:
        return True
    offsets = _frame_offsets(frame_seconds, spec)
    if offsets is None:
        return _in_step(frame_seconds, spec)
    return bool(spec.speeds[-1] * offsets[-1] < len(frame_seconds))


def _place(
    rng: np.random.Generator, spans: np.ndarray, order: int, timeline: Timeline, inner: np.ndarray
) -> np.ndarray:
    """Starts of two intervals of the given spans in the given relation, drawn uniformly."""
    duration = timeline.duration_seconds
    if order == OVERLAPPING:
        # Two intervals overlap by their margin when their middles are not further apart than this.
        reach = inner.sum() / 2 - MARGIN * inner.min()
        half = spans / 2
        # The first middle anywhere inside the video from where a second one is within reach.
        first = rng.uniform(
            max(half[0], half[1] - reach), min(duration - half[0], duration - half[1] + reach)
        )
        second = rng.uniform(max(half[1], first - reach), min(duration - half[1], first + reach))
        starts = np.array([first, second]) - half
    else:
        # Uniform over all placements in this order: split the free time at two uniform points.
        gap = MARGIN * spans.min()
        free = max(duration - spans.sum() - gap, 0.0)
        before, until = np.sort(rng.uniform(0.0, free, size=2))
        left, right = (0, 1) if order == BEFORE else (1, 0)
        starts = np.empty(2)
        starts[left] = before
        starts[right] = until + spans[left] + gap
    return timeline.start_seconds + starts


def frame_indices(clip: Clip, frame_seconds: np.ndarray, spec: ViewSpec) -> np.ndarray:
    """Returns int64 [num_frames], indices of the source frames of a clip in playback order.

    `frame_seconds` is float64 [source frames], strictly increasing, on the video's timeline.
    """
    count, speed = len(frame_seconds), spec.speeds[clip.speed]
    times = clip.start_seconds + spec.frame_seconds * speed * np.arange(spec.num_frames)
    offsets = _frame_offsets(frame_seconds, spec)
    if offsets is not None and (free := count - 1 - speed * offsets[-1]) >= 0:
        middle = np.interp((times[0] + times[-1]) / 2, frame_seconds, np.arange(count))
        first = np.clip(np.rint(middle - speed * offsets[-1] / 2), 0, free)
        indices = speed * offsets + first.astype(np.int64)
    else:
        # The last frames that began at or before each time.
        begun = np.searchsorted(frame_seconds, times + _EPSILON, side="right")
        indices = np.clip(begun - 1, 0, count - 1)
    return indices[::-1] if clip.direction == BACKWARD else indices


def _in_step(frame_seconds: np.ndarray, spec: ViewSpec) -> bool:
    """Tests whether frames chosen by time, of at least 2, have equal steps at every speed."""
    gaps = np.diff(frame_seconds)
    ratio = spec.frame_seconds / gaps.mean()
    whole = ratio > 1 - _IN_STEP and abs(ratio - round(ratio)) < _IN_STEP
    return bool(whole and gaps.max() <= spec.frame_seconds + _EPSILON)


def _frame_offsets(frame_seconds: np.ndarray, spec: ViewSpec) -> np.ndarray | None:
    """Returns frame numbers of a clip at speed 1 relative to its first, int64 [num_frames].

    These are b_k − b_0; None if the file's frames are chosen by time.
    """
    step = spec.frame_seconds
    if len(frame_seconds) < 2 or _in_step(frame_seconds, spec):
        return None
    gap = float(frame_seconds[-1] - frame_seconds[0]) / (len(frame_seconds) - 1)
    if gap > step / _SLOWEST:
        return None
    length = round(spec.num_frames * step / gap)
    spans = frame_seconds[length:] - frame_seconds[:-length]
    uneven = np.abs(spans - length * gap) > 1.1 * gap  # a frame and rounding
    if not len(spans) or uneven.mean() > _UNEVEN_CLIPS:
        return None
    even = 0.5 if spec.num_frames % 2 == 0 else 0.0
    x = (np.arange(spec.num_frames) - (spec.num_frames - 1) / 2) * step / gap
    nearest = np.sign(x) * (np.floor(np.abs(x) + 0.5 - even) + even)
    return np.rint(nearest - nearest[0]).astype(np.int64)
