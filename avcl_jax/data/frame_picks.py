"""Choice of the source frames that a clip shows.

Chosen by time, as a player shows them, frames can reveal the playback speed. A file of a lower rate
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

import numpy as np

# Fraction of the clip's frame rate. Files of a lower rate are shown by time, and only at speeds at
# which no frame repeats.
SLOWEST = 0.45
# Relative deviation from a multiple of the clip's rate up to which frames are chosen by time.
_IN_STEP = 0.001
# Largest fraction of a file's clips that may deviate from a constant rate by more than a frame:
# beyond it, frame numbers do not measure time.
_UNEVEN_CLIPS = 0.2
_EPSILON = 1e-6  # seconds, for rounded times


def by_time(frame_seconds: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Returns the numbers of the last frames that began at or before each time, int64 [...].

    Args:
        frame_seconds: float64 [source frames], strictly increasing.
        times: [...] seconds.
    """
    numbers = np.searchsorted(frame_seconds, times + _EPSILON, side="right") - 1
    return np.clip(numbers, 0, len(frame_seconds) - 1)


def in_step(frame_seconds: np.ndarray, step: float) -> bool:
    """Tests whether frames chosen by time have equal steps at every speed.

    Args:
        frame_seconds: float64 [source frames], at least 2, strictly increasing.
        step: seconds between two frames of a clip at speed 1.
    """
    gaps = np.diff(frame_seconds)
    ratio = step / gaps.mean()
    whole = ratio > 1 - _IN_STEP and abs(ratio - round(ratio)) < _IN_STEP
    return bool(whole and gaps.max() <= step + _EPSILON)


def offsets(frame_seconds: np.ndarray, *, num_frames: int, step: float) -> np.ndarray | None:
    """Returns frame numbers of a clip at speed 1 relative to its first, int64 [num_frames].

    These are b_k − b_0; None if the file's frames are chosen by time.

    Args:
        frame_seconds: float64 [source frames], strictly increasing.
        num_frames: frames of a clip.
        step: seconds between two of them at speed 1.
    """
    if len(frame_seconds) < 2 or in_step(frame_seconds, step):
        return None
    first, last = float(frame_seconds[0]), float(frame_seconds[-1])
    gap = (last - first) / (len(frame_seconds) - 1)
    if gap > step / SLOWEST:
        return None
    length = round(num_frames * step / gap)
    spans = frame_seconds[length:] - frame_seconds[:-length]
    uneven = np.abs(spans - length * gap) > 1.1 * gap  # a frame and rounding
    if not len(spans) or uneven.mean() > _UNEVEN_CLIPS:
        return None
    even = 0.5 if num_frames % 2 == 0 else 0.0
    x = (np.arange(num_frames) - (num_frames - 1) / 2) * step / gap
    nearest = np.sign(x) * (np.floor(np.abs(x) + 0.5 - even) + even)
    return np.rint(nearest - nearest[0]).astype(np.int64)


def by_number(
    frame_seconds: np.ndarray, first_offsets: np.ndarray, speed: int, middle: float
) -> np.ndarray | None:
    """Returns the numbers of the frames of a clip, int64 [num_frames]; None if there are too few.

    Args:
        frame_seconds: float64 [source frames], strictly increasing.
        first_offsets: int64 [num_frames], from `offsets`.
        speed: playback speed.
        middle: mean of the times of the first and the last frame of the clip, seconds.
    """
    numbers = speed * first_offsets
    free = len(frame_seconds) - 1 - numbers[-1]
    if free < 0:
        return None
    at = np.interp(middle, frame_seconds, np.arange(len(frame_seconds)))
    return numbers + np.clip(np.rint(at - numbers[-1] / 2), 0, free).astype(np.int64)
