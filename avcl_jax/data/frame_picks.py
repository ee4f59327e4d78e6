"""Choice of the source frames that a clip shows.

Chosen by time, as a player shows them, frames tell the playback speed. A file slower than the clip
repeats frames at low speed. A file of 25 or 30 frames per second in a clip of 16 steps by 1 and 2
frames in turn at speed 1, and nearly evenly at speed 8: of a texture that drifts steadily, at
whatever velocity, mean frame differences told 99 % of 4 speeds. So only files whose rate is a
multiple of the clip's are shown by time. Frames of others are chosen by number: at playback speed s
the clip shows the frames

    m + s · b_k,   b_k = the multiple of 1 (of 1/2 and odd, for an even K) nearest to
                   (k − (K − 1) / 2) · step / gap,   k = 0 … K − 1,

where m is the frame number nearest to the middle of the clip, `step` the time between two frames
of a clip at speed 1 and `gap` the mean time between two frames of the file. The steps from frame to
frame are those of speed 1 times s, and equal read from either end, for b_{K−1−k} = −b_k.

A repetition at speed s lasts s · step of the source, so that equal repetitions at every speed and
frames within a fixed time of the source exclude each other. What holds is, in seconds of playback
(source seconds / s), that a frame is shown within `gap` of its time, at every speed.
"""

from __future__ import annotations

import numpy as np

# Slower files are shown by time, and only at speeds at which they repeat no frame.
SLOWEST = 0.45  # of the frame rate of a clip
# Files whose rate is this near to a multiple of that of the clip are shown by time.
_IN_STEP = 0.001
# Files that deviate from a constant rate by more than a frame in more of their clips are not
# chosen by number: a number does not tell a time there.
_UNEVEN_CLIPS = 0.2
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


def in_step(frame_seconds: np.ndarray, step: float) -> bool:
    """Whether clips chosen by time step evenly at every speed.

    Args:
        frame_seconds: float64 [source frames, at least 2], strictly increasing.
        step: seconds between two frames of a clip at speed 1.
    """
    gaps = np.diff(frame_seconds)
    ratio = step / gaps.mean()
    whole = ratio > 1 - _IN_STEP and abs(ratio - round(ratio)) < _IN_STEP
    return bool(whole and gaps.max() <= step + _EPSILON)


def offsets(frame_seconds: np.ndarray, *, num_frames: int, step: float) -> np.ndarray | None:
    """Frame numbers of a clip at speed 1, relative to the first, where chosen by number.

    Args:
        frame_seconds: float64 [source frames], strictly increasing.
        num_frames: frames of a clip.
        step: seconds between two of them at speed 1.

    Returns:
        int64 [num_frames] b_k − b_0; None for a file whose frames are chosen by time.
    """
    if len(frame_seconds) < 2 or in_step(frame_seconds, step):
        return None
    first, last = float(frame_seconds[0]), float(frame_seconds[-1])
    gap = (last - first) / (len(frame_seconds) - 1)
    if gap > step / SLOWEST:
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
