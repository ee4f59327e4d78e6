"""Fine details of media, by which sources that share a template are told apart.

Slides of one lecture or reports of one studio are alike to an encoder, so that the evidence for the
right one is hardly above that for the others. Details keep what differs: small images, and the
signs of changes of the audio's spectrum over time and frequency (after Haitsma and Kalker, ISMIR
2002). The sources that a query resembles are compared along their alignments; how far the
best exceeds the others is judged by Student's t, because they themselves tell what chance gives.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import cv2
import numpy as np

from avcl_jax.data.media import DecodedMedia
from avcl_jax.export.encoder import MODALITIES

# Per second, of references; 240 bytes, so at a hop of 0.25 s 192 per segment.
VIDEO_HZ, AUDIO_HZ = 4, 16
# A query is finer by this factor, so that its details are found between those of a reference.
QUERY_FINER = 4
IMAGE_SHAPE = (11, 16)  # height and width of an image, of any aspect
IMAGE_BYTES = IMAGE_SHAPE[0] * IMAGE_SHAPE[1]
_WINDOW_SECONDS, _LAG_SECONDS = 0.256, 0.125  # the lag is a whole number of moments
_BANDS, _MIN_HZ, _MAX_HZ = 33, 200.0, 3400.0
# Power of a window relative to the median; below, and in silence, signs are noise.
_AUDIBLE = 1e-3
# Changes of rate and offset that are tried near an alignment, which is good to half a hop.
_RATES = (0.95, 0.975, 1.0, 1.025, 1.05)
_REACH_SECONDS = 0.3
_LEAST_SECONDS = 1.0
# Fractions of signs that differ have at least the spread of this many independent ones a moment.
_INDEPENDENT_SIGNS = 12
# More differ in other audio, along the best of all lines. A copy's are fewer in each of these parts
# of the time: the words that two speakers have in common, or a jingle, end before a clip does. In
# three parts, 2 of 29 recordings with noise were lost.
_SAME_AUDIO, _PARTS = 0.35, 2
_LEAST_OTHERS = 3
# A rival counts as this many standard deviations: images as near as a copy's are also those of a
# template that only some of the sources have.
_RIVAL = 3.0
_FLOOR = 1e-6  # of the usual power: bands without any have no changes
_WINDOWS = 1024
# Residuals of images vary by at least this factor, as a natural logarithm.
_VIDEO_SPREAD = 0.25
# Images of sources that share a template; others say nothing about it.
_ALIKE = 0.95
# Median absolute deviation of a normal distribution, in standard deviations.
_NORMAL_QUARTILE = 0.6744897501960817
# Of Gauss and Legendre, for integrals over angles.
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)


class Details(NamedTuple):
    """Details of media on their timeline; 0 where there is nothing to compare.

    Attributes:
        video: uint8 [moments, 176], grey images, `VIDEO_HZ` per second.
        audio: uint32 [moments], the signs, `AUDIO_HZ` per second.
        finer: factor of the moments per second.
    """

    video: np.ndarray
    audio: np.ndarray
    finer: int = 1


NO_DETAILS = Details(np.zeros((0, IMAGE_BYTES), np.uint8), np.zeros(0, np.uint32))


class Judgement(NamedTuple):
    """Scores of a candidate among others: -log10 of the chance of as much, 0 if unknown."""

    score: float  # by all modalities together
    by_modality: Mapping[str, float]


class Candidate(NamedTuple):
    """A source along its alignment with a query.

    Attributes:
        details: those after `begin_seconds` of the source.
        rate: seconds of the source per second of the query.
        offset_seconds: time in the source of the query's beginning.
    """

    details: Details
    begin_seconds: float
    rate: float
    offset_seconds: float


def describe(
    media: DecodedMedia, seconds: float, *, begin_seconds: float = 0.0, finer: int = 1
) -> Details:
    """Computes the details of the first seconds of decoded media.

    Args:
        begin_seconds: time of their beginning in the whole file, whose moments these are.
        finer: factor of the moments per second that an index keeps.
    """

    def moments(rate_hz: int) -> np.ndarray:
        ends = np.array([begin_seconds, begin_seconds + seconds])
        return np.arange(*np.ceil(ends * rate_hz - 1e-6)) / rate_hz - begin_seconds

    video, audio = moments(VIDEO_HZ * finer), moments(AUDIO_HZ * finer)
    lag = round(_LAG_SECONDS * AUDIO_HZ * finer)
    return Details(_images(media, video), _signs(media, audio, lag), finer)


def joined(parts: Sequence[Details]) -> Details:
    """Joins the details of intervals that follow each other."""
    return Details(
        np.concatenate([part.video for part in parts]),
        np.concatenate([part.audio for part in parts]),
    )


def _images(media: DecodedMedia, moments: np.ndarray) -> np.ndarray:
    images = np.zeros((len(moments), IMAGE_BYTES), np.uint8)
    if media.has_video:
        here = moments + 1e-6 >= media.frame_seconds[0]
        numbers, places = np.unique(media.shown_at(moments[here]), return_inverse=True)
        small = [
            cv2.resize(
                cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY),
                IMAGE_SHAPE[::-1],
                interpolation=cv2.INTER_AREA,
            )
            for frame in media.frames[numbers]
        ]
        flat = np.reshape(small, (-1, IMAGE_BYTES))
        # One colour is nothing to compare.
        images[here] = np.where(np.ptp(flat, axis=1, keepdims=True) > 0, flat, 0)[places]
    return images


def _signs(media: DecodedMedia, moments: np.ndarray, lag: int) -> np.ndarray:
    """Returns uint32 [moments]; `lag` is the number of moments in `_LAG_SECONDS`."""
    if not media.has_audio or not len(moments):
        return np.zeros(len(moments), np.uint32)
    here = moments - media.audio_start_seconds
    power = _bands(media.waveform, media.sample_rate_hz, here)
    loudness = power.sum(axis=1)
    usual = float(np.median(loudness[loudness > 0])) if loudness.any() else 1.0
    slopes = np.diff(np.log(power + _FLOOR * usual), axis=1)
    rises = np.zeros(slopes.shape, bool)
    rises[lag:] = slopes[lag:] > slopes[:-lag]
    signs = np.packbits(rises, axis=1).view(np.uint32)[:, 0]
    inside = (here >= _LAG_SECONDS) & (here < len(media.waveform) / media.sample_rate_hz)
    return np.where(inside & (loudness > _AUDIBLE * usual), signs, 0).astype(np.uint32)


def _bands(waveform: np.ndarray, sample_rate_hz: int, seconds: np.ndarray) -> np.ndarray:
    """Returns the power of each band in windows about these seconds, float32 [seconds, bands]."""
    window = round(_WINDOW_SECONDS * sample_rate_hz)
    edges = np.geomspace(_MIN_HZ, _MAX_HZ, _BANDS + 1) * window / sample_rate_hz
    taper = np.hanning(window).astype(np.float32)
    padded = np.pad(waveform.astype(np.float32) / 32768, window)
    windows = np.lib.stride_tricks.sliding_window_view(padded, window)
    starts = np.round(seconds * sample_rate_hz + window / 2).astype(int)
    starts = np.clip(starts, 0, len(windows) - 1)
    parts = []
    for first in range(0, len(starts), _WINDOWS):  # bounds the memory
        spectrum = np.fft.rfft(windows[starts[first : first + _WINDOWS]] * taper, axis=1)
        power = spectrum.real**2 + spectrum.imag**2
        parts.append(np.add.reduceat(power, np.round(edges).astype(int), axis=1)[:, :_BANDS])
    return np.concatenate(parts)


def judge(
    query: Details, candidates: Sequence[Candidate], modalities: Collection[str] = MODALITIES
) -> list[Judgement]:
    """Judges candidates by how far each exceeds the others.

    The chance is that for any of the candidates, by Student's t for each modality and Fisher's
    method for both. The score is 0 where fewer than three others can be compared, and where the
    audio can be and differs, all along or in a part.
    """
    if not candidates:
        return []
    query = query._replace(**{m: getattr(query, m)[:0] for m in MODALITIES if m not in modalities})
    lines = [_best_line(query, candidate) for candidate in candidates]
    fraction, spread, worst, _, _ = np.array(lines).T
    residuals = [
        _residual(query, c, line.rate, line.offset_seconds)
        for c, line in zip(candidates, lines, strict=True)
    ]
    residual, correlation = np.array(residuals).T
    residual = np.where(correlation >= _ALIKE, residual, np.nan)
    of_audio = _chances(fraction, spread)
    of_video = _chances(residual, np.full(len(residual), _VIDEO_SPREAD), rivals=True)
    of_video = np.where(worst > _SAME_AUDIO, np.nan, of_video)
    of_audio = np.where(worst > _SAME_AUDIO, np.nan, of_audio)
    judgements = []
    for values in zip(of_video, of_audio, strict=True):
        known = [value for value in values if not np.isnan(value)]
        together = fisher(known)
        scores = [
            max(0.0, -math.log10(max(chance * len(candidates), 1e-300)))
            for chance in (together, *np.nan_to_num(values, nan=1.0))
        ]
        judgements.append(Judgement(scores[0], dict(zip(MODALITIES, scores[1:], strict=True))))
    return judgements


def _chances(values: np.ndarray, least_spread: np.ndarray, *, rivals: bool = False) -> np.ndarray:
    """Returns the chance of a value as far below the others, NaN where there are too few.

    With `rivals`, another one that is nearly as low counts as spread.
    """
    chances = np.full(len(values), np.nan)
    for n in np.flatnonzero(np.isfinite(values)):
        others = np.delete(values, n)
        others = others[np.isfinite(others)]
        if len(others) < _LEAST_OTHERS:
            continue
        middle = np.median(others)
        spread = float(np.median(np.abs(others - middle))) / _NORMAL_QUARTILE
        if rivals:
            spread = max(spread, (middle - others.min()) / _RIVAL)
        t = (middle - values[n]) / max(spread, least_spread[n])
        chances[n] = student_tail(t, len(others) - 1)
    return chances


def student_tail(t: float, freedom: int) -> float:
    """Returns the chance that Student's t exceeds a value.

    It is the integral of sin^(freedom − 1) from 0 to the angle whose cotangent is t / √freedom.
    SciPy has it too, but its import would take a fifth of a query's time.
    """
    angle = math.atan2(math.sqrt(freedom), t)
    mean = float(_WEIGHTS @ np.sin(angle * (_NODES + 1) / 2) ** (freedom - 1)) / 2
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2))
    return angle * mean * scale / math.sqrt(math.pi)


def fisher(chances: Sequence[float]) -> float:
    """Returns the chance of a product of independent chances as small, by Fisher's method."""
    product = max(math.prod(chances), 1e-300)
    surprise = -math.log(product)
    # Without any chance the sum is empty, and nothing is surprising.
    terms = [surprise**k / math.factorial(k) for k in range(len(chances))]
    return product * sum(terms) if terms else 1.0


class _Line(NamedTuple):
    """Line near an alignment; NaN if the audio cannot be compared.

    Attributes:
        fraction: fraction of the signs that differ.
        spread: its spread by chance.
        worst: fraction in the part where most differ.
        rate: seconds of the source per second of the query.
        offset_seconds: time in the source of the query's beginning.
    """

    fraction: float
    spread: float
    worst: float
    rate: float
    offset_seconds: float


def _best_line(query: Details, candidate: Candidate) -> _Line:
    """Finds the line along which fewest signs differ; the alignment if the audio does not tell."""
    details, begin, rate, offset = candidate
    unknown = _Line(math.nan, math.nan, math.nan, rate, offset)
    if not len(query.audio) or not len(details.audio):
        return unknown
    query_hz = AUDIO_HZ * query.finer
    middle = len(query.audio) / query_hz / 2
    rates = rate * np.array(_RATES)[:, None]
    offsets = (
        offset + (rate - rates) * middle + np.arange(-_REACH_SECONDS, _REACH_SECONDS, 1 / query_hz)
    )
    seconds = begin + np.arange(len(details.audio)) / AUDIO_HZ
    places = np.round((seconds - offsets[..., None]) / rates[..., None] * query_hz).astype(int)
    inside = (places >= 0) & (places < len(query.audio))
    signs = np.where(inside, query.audio[np.where(inside, places, 0)], 0)
    both = (signs != 0) & (details.audio != 0)
    count = both.sum(axis=-1)
    differ = np.bitwise_count(signs ^ details.audio) * both
    enough = count >= _LEAST_SECONDS * AUDIO_HZ
    fraction = np.where(enough, differ.sum(axis=-1) / np.maximum(32 * count, 1), 1.0)
    best = np.unravel_index(int(np.argmin(fraction)), fraction.shape)
    if not enough[best]:
        return unknown
    parts = np.array_split(differ[best][both[best]], _PARTS)
    spread = 0.5 / math.sqrt(count[best] * _INDEPENDENT_SIGNS)
    line = _Line(float(fraction[best]), spread, max(p.mean() for p in parts) / 32, rate, offset)
    if line.worst > _SAME_AUDIO:
        return line
    return line._replace(rate=float(rates[best[0], 0]), offset_seconds=float(offsets[best]))


def _residual(
    query: Details, candidate: Candidate, rate: float, offset: float
) -> tuple[float, float]:
    """Compares the images along the best of the lines within an eighth of a second.

    Returns:
        Natural logarithm of the mean square of their differences, NaN if too few can be compared,
        and their correlation; both without the means of the images.
    """
    query_hz = VIDEO_HZ * query.finer
    seconds = candidate.begin_seconds + np.arange(len(candidate.details.video)) / VIDEO_HZ
    found = [(math.nan, math.nan)]
    for shift in range(-query_hz // 8, query_hz // 8 + 1):
        places = np.round((seconds - offset) / rate * query_hz).astype(int) + shift
        inside = (places >= 0) & (places < len(query.video))
        own, other = query.video[places[inside]], candidate.details.video[inside]
        both = own.any(axis=1) & other.any(axis=1)
        if both.sum() >= _LEAST_SECONDS * VIDEO_HZ:
            first, second = (i[both] - i[both].mean(axis=1, keepdims=True) for i in (own, other))
            norm = math.sqrt((first**2).sum() * (second**2).sum())
            residual = math.log(((first - second) ** 2).mean() + 1)
            found.append((residual, float((first * second).sum()) / norm))
    return min(found[1:] or found)
