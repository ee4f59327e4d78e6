"""Mono mix in which channels do not cancel and silent channels do not lower the level."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import av
import numpy as np

# A channel with less than this fraction of the energy of the strongest one is silent (-40 dB).
_SILENT_FRACTION = 1e-4
# In a mix of unrelated channels energies add up. With less than this fraction of their sum, the
# channels cancel.
_CANCELLED_FRACTION = 0.5
# Fraction of the audible seconds that must cancel, because in stereo music single seconds may.
_CANCELLED_SECONDS = 0.05


class ChannelEnergies:
    """Sums of products of the samples of two channels, for each second of a clip."""

    def __init__(self, sample_rate_hz: int):
        """Starts without samples."""
        self._rate = sample_rate_hz
        self._count = 0
        self._seconds: list[np.ndarray] = []

    def add(self, samples: np.ndarray) -> None:
        """Adds the samples that follow, float64 [channels, samples]."""
        for part in np.split(
            samples, range(-self._count % self._rate, samples.shape[1], self._rate), axis=1
        ):
            if self._count % self._rate == 0 and part.shape[1]:
                self._seconds.append(np.zeros((len(part),) * 2))
            if part.shape[1]:
                self._seconds[-1] += part @ part.T
            self._count += part.shape[1]

    def per_second(self) -> np.ndarray:
        """Returns float64 [seconds, channels, channels]; a remainder is added to the last one."""
        seconds = np.array(self._seconds)
        if len(seconds) > 1 and self._count % self._rate:
            seconds[-2] += seconds[-1]
            seconds = seconds[:-1]
        return seconds


def choose_weights(
    energies: np.ndarray, weights: np.ndarray, names: Sequence[str]
) -> tuple[np.ndarray, dict[str, str]]:
    """Decides how the channels of a clip are mixed.

    The usual mix is kept unless a channel is silent or the mix cancels. Silent channels are left
    out, as if the file did not have them: one dead channel of two does not cost 6 dB. If the mix of
    the rest has lost more than half of the channels' energy in more than a twentieth of the audible
    seconds, as with a right channel that is the inverted left, only the strongest channel is used.

    Args:
      energies: float64 [seconds, channels, channels] of `ChannelEnergies`, at least one second.
      weights: float64 [channels] of the usual mix, not negative; their sum is 1.
      names: Names of the channels.

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


def mix_to_mono(frames: Sequence[Any]) -> tuple[list[Any], dict[str, str]]:
    """Mixes frames whose usual mix would cancel or be too quiet; leaves the others as they are.

    One decision applies to all frames of one channel layout.

    Args:
      frames: Decoded `av.AudioFrame`s of one clip.

    Returns:
      As many frames with their times, mono where they were mixed here, and messages by kind of
      note.
    """
    energies: dict[str, ChannelEnergies] = {}
    for frame, samples in _channels(frames):
        energies.setdefault(frame.layout.name, ChannelEnergies(frame.sample_rate)).add(samples)
    weights: dict[str, np.ndarray] = {}
    notes: dict[str, str] = {}
    for name, products in energies.items():
        usual = _usual_weights(name)
        names = [
            str(number) if channel.name == "NONE" else channel.name  # of a file without a layout
            for number, channel in enumerate(av.AudioLayout(name).channels, start=1)
        ]
        mix, messages = choose_weights(products.per_second(), usual, names)
        if mix is not usual:
            weights[name] = mix
        notes |= messages
    if not weights:
        return list(frames), notes
    mixed = {
        id(frame): _mono_frame(frame, weights[frame.layout.name] @ samples)
        for frame, samples in _channels(frames)
        if frame.layout.name in weights
    }
    return [mixed.get(id(frame), frame) for frame in frames], notes


def _channels(frames: Sequence[Any]) -> Iterator[tuple[Any, np.ndarray]]:
    """Yields frames that have several channels with their samples, float64 [channels, samples]."""
    converters: dict[str, Any] = {}
    for frame in frames:
        count = frame.layout.nb_channels
        if count < 2:
            continue
        converter = converters.setdefault(
            f"{frame.format.name} {frame.layout.name} {frame.sample_rate}",
            av.AudioResampler(format="flt", layout=frame.layout, rate=frame.sample_rate),
        )
        for packed in converter.resample(frame):
            yield frame, packed.to_ndarray().reshape(-1, count).T.astype(np.float64)


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
