"""Agreement of two sources along a line of constant rate and offset, by their details.

The encoders propose the line; the details decide. Unlike similarities of embeddings they need no
calibration, which is fitted to a library and fails where most of it has copies: signs of unrelated
audio differ in half of all cases, and changes of unrelated images are hardly correlated.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from avcl_jax.fingerprint.details import AUDIO_HZ, IMAGE_SHAPE, VIDEO_HZ, Candidate, Details

# Seconds over which agreement is measured, at most; in less, more agrees by chance.
EVIDENCE_SECONDS = 3.0
# Fraction of these seconds that can be compared, at least.
_LEAST_COMPARED = 0.5
# Rates and offsets that are tried near an alignment, which is good to half a hop.
_RATES = np.array([0.95, 0.975, 1.0, 1.025, 1.05])
_SHIFTS_SECONDS = np.arange(-0.3, 0.3, 1 / 32)
_IMAGE_SHIFTS_SECONDS = np.array([-0.25, 0.0, 0.25])


class Limits(NamedTuple):
    """Limits of agreement.

    Attributes:
        audio: fraction of signs that differ, at most.
        changes: correlation of the changes of images over time, at least.
        similarity: mean of the encoder's similarity, in standard deviations above chance, at least.
        seconds: length, at least.
    """

    audio: float
    changes: float
    similarity: float
    seconds: float


# Of copies, and of copies that were mixed with other audio, cropped or covered, which is weaker
# evidence: the encoders must agree too, and for longer. Synthetic voices say the same words in the
# same way, for two or three seconds.
SAME, CHANGED = Limits(0.28, 0.7, 0.5, 0.0), Limits(0.35, 0.5, 3.5, 4.0)
# Signs of each kind in a moment, at least.
_LEAST_SIGNS = 4
# Variance of grey over time below which images stand still. They are the same if the mean square of
# their difference is low beside the contrast.
_LEAST_CHANGE, _STILL_DIFFERENCE, _LEAST_CONTRAST = 4.0, 3.0, 100.0
# At the ends of an interval: fraction of signs that differ in a second with the end in its middle,
# higher than the limit by this, at most, and moments that can be compared there, at least;
# correlation of images, lower than within by this, at most.
_END_AUDIO, _LEAST_NEAR, _END_IMAGES = 0.04, 4, 0.25


class Agreement(NamedTuple):
    """Moments of a query that agree with a source along a line.

    Attributes:
        moments: modality -> for the limits `SAME` and `CHANGED`, bool [moments], `VIDEO_HZ` per
            second of the query.
        rate: seconds of the source per second of the query.
        offset_seconds: time in the source of the query's beginning.
    """

    moments: dict[str, list[np.ndarray]]
    rate: float
    offset_seconds: float


def agree(query: Details, candidate: Candidate, *, seconds: float = EVIDENCE_SECONDS) -> Agreement:
    """Compares a query with a source along the lines near an alignment.

    Args:
        query: details with as many moments per second as those of an index.
        candidate: source, and its alignment with the query.
        seconds: length over which agreement is measured.
    """
    audio, compared, rate, offset = _audio(query, candidate, round(seconds * AUDIO_HZ))
    candidate = candidate._replace(rate=rate, offset_seconds=offset)
    images = _Images.along(query, candidate, round(seconds * VIDEO_HZ))
    # Titles and slides that look alike under other audio are not copies.
    other_audio = compared.any() and not audio[-1].any()
    video = [images.agree(limits, still=not other_audio) for limits in (SAME, CHANGED)]
    steps = AUDIO_HZ // VIDEO_HZ
    whole = (a[: len(a) // steps * steps].reshape(-1, steps) for a in audio)
    by_quarter = [np.any(a, axis=1) for a in whole]
    return Agreement({"video": video, "audio": by_quarter}, rate, offset)


def _audio(
    query: Details, candidate: Candidate, width: int
) -> tuple[list[np.ndarray], np.ndarray, float, float]:
    """Compares signs over `width` moments along all lines near an alignment.

    Returns:
        bool [moments] of the query that agree, for `SAME` and `CHANGED`; those in the middle of a
        stretch that could be compared; rate and offset of the best line, or those of the alignment.
    """
    details, begin, rate, offset = candidate
    count = len(query.audio)
    none = [np.zeros(count, bool)] * 2, np.zeros(count, bool), rate, offset
    if count < width or not len(details.audio):
        return none
    seconds = np.arange(count) / AUDIO_HZ
    rates = rate * _RATES[:, None]
    offsets = offset + (rate - rates) * seconds[-1] / 2 + _SHIFTS_SECONDS
    times = offsets[..., None] + rates[..., None] * seconds - begin
    places = np.round(times * AUDIO_HZ).astype(int)
    inside = (places >= 0) & (places < len(details.audio))
    signs = np.where(inside, details.audio[np.where(inside, places, 0)], 0)
    both = _varied(signs) & _varied(query.audio)
    differ = np.bitwise_count(signs ^ query.audio) * both
    number = _sums(both, width)
    compared = number >= _LEAST_COMPARED * width
    fraction = np.where(compared, _sums(differ, width) / (32 * np.maximum(number, 1)), 1)
    best = np.unravel_index(int(np.argmin(fraction.min(axis=-1))), fraction.shape[:2])
    if fraction[best].min() > CHANGED.audio:
        return none[0], _spread(compared[best], width), rate, offset
    # Exact ends: a stretch may reach over them by half.
    short = AUDIO_HZ
    near = _sums(both[best], short, same=True)
    differing = _sums(differ[best], short, same=True) / (32 * np.maximum(near, 1))
    agreeing = []
    for limits in (SAME, CHANGED):
        clear = (differing <= limits.audio + _END_AUDIO) & (near >= _LEAST_NEAR)
        agreeing.append(_trimmed(_spread(fraction[best] <= limits.audio, width), clear))
    line = float(rates[best[0], 0]), float(offsets[best])
    return agreeing, _spread(compared[best], width), *line


def _varied(signs: np.ndarray) -> np.ndarray:
    """Marks signs that can be compared: bands without power have none, and agree in all audio."""
    rises = np.bitwise_count(signs)
    return (rises >= _LEAST_SIGNS) & (rises <= 32 - _LEAST_SIGNS)


class _Images(NamedTuple):
    """Images of a query beside those of a source, by stretches of some moments."""

    width: int
    changes: np.ndarray  # correlation of their changes [stretches], NaN where they stand still
    still: np.ndarray  # bool [stretches], that are the same still image
    alike: np.ndarray  # correlation of the images [moments], NaN where there are none

    @classmethod
    def along(cls, query: Details, candidate: Candidate, width: int) -> _Images:
        """Compares along the line, mirrored, and a little earlier and later; returns the best."""
        details, begin, rate, offset = candidate
        count = len(query.video)
        tried = []
        if count >= width and len(details.video):
            own = query.video.astype(np.float32)
            mirrored = details.video.reshape(-1, *IMAGE_SHAPE)[:, :, ::-1].reshape(-1, own.shape[1])
            for shift in _IMAGE_SHIFTS_SECONDS:
                times = offset + shift + rate * np.arange(count) / VIDEO_HZ - begin
                places = np.round(times * VIDEO_HZ).astype(int)
                inside = (places >= 0) & (places < len(details.video))
                for images in (details.video, mirrored):
                    other = np.where(inside[:, None], images[np.where(inside, places, 0)], 0)
                    tried.append(cls._compared(own, other.astype(np.float32), width))
        if not tried:
            nothing = np.zeros(0)
            return cls(width, nothing, nothing.astype(bool), nothing)
        return max(tried, key=lambda t: (np.nan_to_num(t.changes, nan=-1).max(), t.still.sum()))

    @classmethod
    def _compared(cls, first: np.ndarray, second: np.ndarray, width: int) -> _Images:
        both = np.any(first, axis=1) & np.any(second, axis=1)
        first, second = (
            np.where(both[:, None], images - images.mean(axis=1, keepdims=True), 0)
            for images in (first, second)
        )
        enough = _sums(both, width) >= _LEAST_COMPARED * width
        number = np.maximum(_sums(both, width), 1)
        pixels = first.shape[1]
        sums = [_sums(images.T, width) for images in (first, second)]  # [pixels, stretches]

        def moments(n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
            """Returns mean products of two clips, and of their changes."""
            product = _sums(((first, second)[n] * (first, second)[m]).sum(axis=1), width) / number
            change = product - (sums[n] * sums[m]).sum(axis=0) / number**2
            return product / pixels, change / pixels

        (power, other_power), (change, other_change) = (
            np.array([moments(n, n)[kind] for n in (0, 1)]) for kind in (0, 1)
        )
        product, joint = moments(0, 1)
        moving = np.minimum(change, other_change) >= _LEAST_CHANGE
        changes = joint / np.sqrt(np.maximum(change * other_change, 1e-9))
        difference = power + other_power - 2 * product
        still = np.maximum(change, other_change) < _LEAST_CHANGE
        still &= (difference <= _STILL_DIFFERENCE) & (
            np.minimum(power, other_power) >= _LEAST_CONTRAST
        )
        norms = np.sqrt((first**2).sum(axis=1) * (second**2).sum(axis=1))
        alike = np.where(both, (first * second).sum(axis=1) / np.maximum(norms, 1e-9), np.nan)
        return cls(width, np.where(enough & moving, changes, np.nan), enough & still, alike)

    def agree(self, limits: Limits, *, still: bool) -> np.ndarray:
        """Returns bool [moments] of the query that agree; still images only if `still`."""
        if not len(self.changes):
            return np.zeros(0, bool)
        stretches = np.nan_to_num(self.changes, nan=-1) >= limits.changes
        if still:
            stretches |= self.still
        covered = _spread(stretches, self.width)
        if not covered.any():
            return covered
        least = np.nanmedian(self.alike[covered]) - _END_IMAGES
        return _trimmed(covered, np.nan_to_num(self.alike, nan=-1) >= least)


def _sums(values: np.ndarray, width: int, *, same: bool = False) -> np.ndarray:
    """Sums of `width` neighbours along the last axis; with `same`, one centred at each."""
    if same:
        pad = [(0, 0)] * (values.ndim - 1) + [(width // 2, width - 1 - width // 2)]
        values = np.pad(values, pad)
    sums = np.cumsum(values, axis=-1, dtype=np.float64)
    later = sums[..., width:] - sums[..., :-width]
    return np.concatenate([sums[..., width - 1 : width], later], axis=-1)


def _spread(stretches: np.ndarray, width: int) -> np.ndarray:
    """Returns bool [moments], those in any of the stretches of `width`, bool [stretches]."""
    steps = np.zeros(len(stretches) + width)
    for n in np.flatnonzero(stretches):
        steps[n] += 1
        steps[n + width] -= 1
    return np.cumsum(steps)[:-1] > 0


def _trimmed(covered: np.ndarray, clear: np.ndarray) -> np.ndarray:
    """Cuts the ends of each run in `covered` that are not clear."""
    kept = np.zeros(len(covered), bool)
    for begin, end in runs(covered):
        inner = begin + np.flatnonzero(clear[begin:end])
        if len(inner):
            kept[inner[0] : inner[-1] + 1] = True
    return kept


def runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """Returns begin and end of each run of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
