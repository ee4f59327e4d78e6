"""Decoded audio frames to one mono waveform whose sample index tells the time.

In the mono mix, channels do not cancel and silent channels do not lower the level.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import av
import numpy as np

from avcl_jax.data.media_streams import MediaError

# A channel with less than this fraction of the energy of the strongest one is silent (-40 dB).
_SILENT_FRACTION = 1e-4
# In a mix of unrelated channels energies add up. With less than this fraction of their sum, the
# channels cancel.
_CANCELLED_FRACTION = 0.5
# Fraction of the audible seconds that must cancel, because in stereo music single seconds may.
_CANCELLED_SECONDS = 0.05
_JITTER_SECONDS = 0.008  # millisecond time bases and, median filtered, Vorbis stay below
_MEDIAN_FRAMES = 9  # one wrong time stamp among nine moves nothing
_MAX_BACK_SECONDS = 0.5
_MAX_SILENCE_SECONDS = 60.0


class Sound(NamedTuple):
    """Mono audio, int16 [samples]; silence where the file has none.

    `notes` are messages about its channels, by kind of note (see `choose_weights`).
    """

    start_seconds: float
    waveform: np.ndarray
    notes: Mapping[str, str]


def lay_out(
    frames: Sequence[Any],
    *,
    zero: float,
    sample_rate_hz: int,
    start_seconds: float,
    end_seconds: float | None,
) -> Sound | None:
    """Mixes down, resamples, and puts audio where its time stamps say, silence elsewhere.

    Args:
        frames: decoded `av.AudioFrame`s in order; their times are overwritten.
        zero: presentation time in seconds that becomes time 0.

    Returns:
        The audio until before `end_seconds`; None without samples in this interval.

    Raises:
        MediaError: if the time stamps leap.
    """
    if not frames:
        return None
    frames, notes = _mix(frames)
    pieces = [
        (start, _resample(segment, sample_rate_hz)) for start, segment in _segments(frames, zero)
    ]
    first_seconds = round(pieces[0][0], 9)  # no femtoseconds from adding up frame lengths
    places = [round((start - first_seconds) * sample_rate_hz) for start, _ in pieces]
    ends = [at + len(piece) for at, (_, piece) in zip(places, pieces, strict=True)]
    waveform = np.zeros(max(ends), np.int16)
    for at, (_, piece) in zip(places, pieces, strict=True):
        begin = max(0, at)
        waveform[begin : begin + len(piece)] = piece[: len(waveform) - begin]
    skip = max(0, int(np.ceil((start_seconds - first_seconds) * sample_rate_hz - 1e-6)))
    first_seconds += skip / sample_rate_hz
    waveform = waveform[skip:]
    if end_seconds is not None:
        waveform = waveform[: max(0, round((end_seconds - first_seconds) * sample_rate_hz))]
    return Sound(first_seconds, waveform, notes) if len(waveform) else None


def _segments(frames: Sequence[Any], zero: float) -> Iterator[tuple[float, Sequence[Any]]]:
    """Cuts decoded audio where its times leave the sample count, or its format changes.

    Time stamps jitter, by a millisecond in Matroska and by ten for single Vorbis frames, without a
    sample being missing; so the deviation of times from the running sample count is median
    filtered, and only a lasting change is a gap or an overlap. Yields start in seconds and frames
    of segments.
    """
    lengths = np.array([frame.samples / frame.sample_rate for frame in frames])
    counted = np.concatenate([[0.0], np.cumsum(lengths)[:-1]])
    deviation = np.empty(len(frames))
    previous = 0.0
    for number, frame in enumerate(frames):
        # Without a time stamp a frame follows the one before it.
        previous = previous if frame.time is None else frame.time - zero - counted[number]
        deviation[number] = previous
    leaps = np.diff(deviation)
    if np.any(leaps < -_MAX_BACK_SECONDS) or np.any(leaps > _MAX_SILENCE_SECONDS):
        raise MediaError("bad_timestamps", f"the audio leaps by {np.abs(leaps).max():.1f} s")
    smooth = []
    for number in range(len(frames)):
        # Narrower at both ends, and always symmetric: a step is found where it is.
        half = min(_MEDIAN_FRAMES // 2, number, len(frames) - 1 - number)
        smooth.append(float(np.median(deviation[number - half : number + half + 1])))
    formats = [(frame.sample_rate, frame.layout.name, frame.format.name) for frame in frames]
    first = 0
    for number in range(1, len(frames) + 1):
        alike = number < len(frames) and formats[number] == formats[first]
        if alike and abs(smooth[number] - smooth[first]) <= _JITTER_SECONDS:
            continue
        yield counted[first] + float(np.median(deviation[first:number])), frames[first:number]
        first = number


def _resample(frames: Sequence[Any], sample_rate_hz: int) -> np.ndarray:
    """Mixes several channels down and resamples (libswresample); returns int16 [samples]."""
    resampler = av.AudioResampler(format="s16", layout="mono", rate=sample_rate_hz)
    parts, position = [], 0
    for frame in frames:
        # Gapless inside a segment, however its time stamps jitter.
        frame.time_base = Fraction(1, frame.sample_rate)
        frame.pts = position
        position += frame.samples
        parts += [out.to_ndarray()[0] for out in resampler.resample(frame)]
    parts += [out.to_ndarray()[0] for out in resampler.resample(None)]
    return np.concatenate(parts) if parts else np.empty(0, np.int16)


def channel_energies(parts: Iterable[np.ndarray], sample_rate_hz: int) -> np.ndarray:
    """Sums products of the samples of two channels, for each second of a clip.

    `parts` are its samples in order, float64 [channels, samples]. Returns float64 [seconds,
    channels, channels]; a remainder is added to the last second.
    """
    seconds: list[np.ndarray] = []
    count = 0
    for samples in parts:
        borders = range(-count % sample_rate_hz, samples.shape[1], sample_rate_hz)
        for part in np.split(samples, borders, axis=1):
            if not part.shape[1]:
                continue
            if count % sample_rate_hz == 0:
                seconds.append(np.zeros((len(part),) * 2))
            seconds[-1] += part @ part.T
            count += part.shape[1]
    if len(seconds) > 1 and count % sample_rate_hz:
        remainder = seconds.pop()
        seconds[-1] += remainder
    return np.array(seconds)


def choose_weights(
    energies: np.ndarray, weights: np.ndarray, names: Sequence[str]
) -> tuple[np.ndarray, dict[str, str]]:
    """Decides how the channels of a clip are mixed.

    The usual mix is kept unless a channel is silent or the mix cancels. Silent channels are left
    out, as if the file did not have them: one dead channel of two does not cost 6 dB. If the mix of
    the rest has lost more than half of the channels' energy in more than a twentieth of the audible
    seconds, as with a right channel that is the inverted left, only the strongest channel is used.

    Args:
        energies: float64 [seconds, channels, channels], at least one second.
        weights: float64 [channels] of the usual mix, not negative; their sum is 1.
        names: names of the channels.

    Returns:
        Weights of the mix, `weights` itself for the usual one, and messages by kind of note.
    """
    each = np.einsum("scc->sc", energies) * (weights > 0)
    single = each.sum(axis=0)
    heard = (single > 0) & (single >= _SILENT_FRACTION * single.max())
    if not heard.any():
        return weights, {}
    silent = [names[int(n)] for n in np.flatnonzero((weights > 0) & ~heard)]
    mix = weights * heard / (weights * heard).sum() if silent else weights
    separate = each @ mix**2
    audible = separate >= _SILENT_FRACTION * separate.max()
    cancels = np.einsum("c,scd,d->s", mix, energies, mix) < _CANCELLED_FRACTION * separate
    if cancels[audible].mean() > _CANCELLED_SECONDS:
        strongest = int(single.argmax())
        message = f"the mono mix cancels: only channel {names[strongest]} is used"
        return np.eye(len(names))[strongest], {"antiphase": message}
    if silent:
        return mix, {"dead_channel": f"left out of the mono mix as silent: {', '.join(silent)}"}
    return weights, {}


def _mix(frames: Sequence[Any]) -> tuple[list[Any], dict[str, str]]:
    """Mixes frames whose usual mix would cancel or be too quiet; leaves the others as they are.

    One decision applies to all frames of one channel layout. Returns the frames with their times,
    and messages by kind of note.
    """
    weights: dict[str, np.ndarray] = {}
    notes: dict[str, str] = {}
    several = [frame for frame in frames if frame.layout.nb_channels > 1]
    for name in dict.fromkeys(frame.layout.name for frame in several):
        alike = [frame for frame in several if frame.layout.name == name]
        parts = (samples for _, samples in _channels(alike))
        usual = _usual_weights(name)
        names = [
            str(number) if channel.name == "NONE" else channel.name  # of a file without a layout
            for number, channel in enumerate(av.AudioLayout(name).channels, start=1)
        ]
        energies = channel_energies(parts, alike[0].sample_rate)
        mix, messages = choose_weights(energies, usual, names)
        if mix is not usual:
            weights[name] = mix
        notes |= messages
    if not weights:
        return list(frames), notes
    mixed = {
        id(frame): _mono_frame(frame, weights[frame.layout.name] @ samples)
        for frame, samples in _channels([f for f in several if f.layout.name in weights])
    }
    return [mixed.get(id(frame), frame) for frame in frames], notes


def _channels(frames: Sequence[Any]) -> Iterator[tuple[Any, np.ndarray]]:
    """Yields frames with their samples, float64 [channels, samples]."""
    converters: dict[str, Any] = {}
    for frame in frames:
        converter = converters.setdefault(
            f"{frame.format.name} {frame.layout.name} {frame.sample_rate}",
            av.AudioResampler(format="flt", layout=frame.layout, rate=frame.sample_rate),
        )
        for packed in converter.resample(frame):
            samples = packed.to_ndarray().reshape(-1, frame.layout.nb_channels)
            yield frame, samples.T.astype(np.float64)


def _mono_frame(frame: Any, samples: np.ndarray) -> Any:
    mono = av.AudioFrame.from_ndarray(samples.astype(np.float32)[None], "flt", "mono")
    mono.sample_rate, mono.pts = frame.sample_rate, frame.pts
    if frame.time_base is not None:
        mono.time_base = frame.time_base
    return mono


@functools.lru_cache(maxsize=64)
def _usual_weights(layout: str) -> np.ndarray:
    """Returns the weights of FFmpeg's mono mix of a channel layout, float64 [channels]."""
    count = av.AudioLayout(layout).nb_channels
    resampler = av.AudioResampler(format="flt", layout="mono", rate=8000)
    frame = av.AudioFrame.from_ndarray(
        np.eye(count, dtype=np.float32).reshape(1, -1), "flt", layout
    )
    frame.sample_rate = 8000
    (mixed,) = resampler.resample(frame)
    weights = mixed.to_ndarray()[0].astype(np.float64)
    return np.asarray(weights / weights.sum())
