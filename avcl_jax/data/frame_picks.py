"""Choice of the source frames that a clip shows.

Frames of a file that is at least as fast as a clip are chosen by time: the frame on screen, as a
player shows it. A slower file repeats frames that way, more of them at low playback speed than at
high, and a network reads the speed from the repetitions. Its frames are therefore chosen by number:
at playback speed s the clip shows the frames

    m + s · b_k,   b_k = the multiple of 1 (of 1/2 and odd, for an even K) nearest to
                   (k − (K − 1) / 2) · step / gap,   k = 0 … K − 1,

where m is the frame number nearest to the middle of the clip, `step` the time between two frames
of a clip at speed 1 and `gap` the mean time between two frames of the file. Frames repeat where b
does, so in the same places at every speed, and b_{K−1−k} = −b_k, so in the same places in both
directions.

A repetition at speed s lasts s · step of the source, so that equal repetitions at every speed and
frames within a fixed time of the source exclude each other. What holds is, in seconds of playback
(source seconds / s), that a frame is shown within `gap` of its time, at every speed.
"""

from __future__ import annotations

import numpy as np

# Slower files are shown by time, and only at speeds at which they repeat no frame.
SLOWEST = 0.45  # of the frame rate of a clip
# By time, unless more of the clips at speed 1 than this would repeat a frame.
_REPEATING_CLIPS = 0.25
# Files that deviate from a constant rate by more than a frame in more of their clips are not
# chosen by number: a number does not tell a time there.
_UNEVEN_CLIPS = 0.05
_PROBES = 32  # clips that are tried to see how many repeat a frame
_EPSILON = 1e-6  # of float times; far below any frame's duration


def by_time(frame_seconds: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Numbers of the frames on screen: the last that began at or before each time.

    Args:
        frame_seconds: float64 [source frames], strictly increasing.
        times: [...].

    Returns:
        int64 [...].
    """
    numbers = np.searchsorted(frame_seconds, times + _EPSILON, side="right") - 1
    return np.clip(numbers, 0, len(frame_seconds) - 1)


def repeating(
    frame_seconds: np.ndarray, first: float, last: float, *, num_frames: int, step: float
) -> float:
    """Fraction of clips chosen by time that show a frame twice.

    Args:
        frame_seconds: float64 [source frames], strictly increasing.
        first: earliest start of a clip.
        last: latest start.
        num_frames: frames of a clip.
        step: source seconds between two of them.
    """
    starts = np.linspace(first, max(first, last), _PROBES)
    numbers = by_time(frame_seconds, starts[:, None] + step * np.arange(num_frames))
    return float((np.diff(numbers) == 0).any(axis=-1).mean())


def has_long_gaps(frame_seconds: np.ndarray, step: float) -> bool:
    """Whether a clip at speed 1, with `step` seconds between frames, can show a frame twice."""
    return bool((np.diff(frame_seconds) > step + _EPSILON).any())


def offsets(frame_seconds: np.ndarray, *, num_frames: int, step: float) -> np.ndarray | None:
    """Frame numbers of a clip at speed 1, relative to the first, where chosen by number.

    Args:
        frame_seconds: float64 [source frames], strictly increasing.
        num_frames: frames of a clip.
        step: seconds between two of them at speed 1.

    Returns:
        int64 [num_frames] b_k − b_0; None for a file whose frames are chosen by time.
    """
    if len(frame_seconds) < 2 or not has_long_gaps(frame_seconds, step):
        return None
    first, last = float(frame_seconds[0]), float(frame_seconds[-1])
    gap = (last - first) / (len(frame_seconds) - 1)
    if gap > step / SLOWEST:
        return None
    end = last - step * (num_frames - 1)
    share = repeating(frame_seconds, first, end, num_frames=num_frames, step=step)
    if share <= _REPEATING_CLIPS:
        return None
    length = round(num_frames * step / gap)
    spans = frame_seconds[length:] - frame_seconds[:-length]
    uneven = np.abs(spans - length * gap) > 1.1 * gap  # one frame; time stamps may be rounded
    if not len(spans) or uneven.mean() > _UNEVEN_CLIPS:
        return None
    even = 0.5 if num_frames % 2 == 0 else 0.0
    x = (np.arange(num_frames) - (num_frames - 1) / 2) * step / gap
    nearest = np.sign(x) * (np.floor(np.abs(x) + 0.5 - even) + even)
    return np.rint(nearest - nearest[0]).astype(np.int64)


def by_number(
    frame_seconds: np.ndarray, first_offsets: np.ndarray, speed: int, middle: float
) -> np.ndarray | None:
    """Numbers of the frames that a clip shows, chosen by number.

    Args:
        frame_seconds: float64 [source frames], strictly increasing.
        first_offsets: of `offsets`.
        speed: playback speed.
        middle: seconds, between the times of the first and of the last frame of the clip.

    Returns:
        int64 [num_frames]; None if the file has too few frames.
    """
    numbers = speed * first_offsets
    free = len(frame_seconds) - 1 - numbers[-1]
    if free < 0:
        return None
    at = np.interp(middle, frame_seconds, np.arange(len(frame_seconds)))
    return numbers + np.clip(np.rint(at - numbers[-1] / 2), 0, free).astype(np.int64)
