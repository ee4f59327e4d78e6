"""What happens to sound on its way: noise, filters, rooms, pitch, tempo."""

from __future__ import annotations

import av
import av.filter
import numpy as np
import scipy.signal
import soxr

from avcl_jax.data.media import DecodedMedia
from avcl_jax.fingerprint.benchmark.timeline import (
    Piece,
    TimeMap,
    Transformed,
    to_int16,
    unmoved,
    with_sound,
)


def audio_noise(media: DecodedMedia, rng: np.random.Generator, *, snr_db: float) -> Transformed:
    """Adds pink noise.

    Args:
        media: the clip.
        rng: draws the noise.
        snr_db: energy of the sound over that of the noise, of the whole clip.
    """
    count = len(media.waveform)
    spectrum = np.fft.rfft(rng.standard_normal(count))
    spectrum /= np.sqrt(np.maximum(np.arange(len(spectrum)), 1))
    hiss = np.fft.irfft(spectrum, count)
    hiss *= _rms(media.waveform) / (_rms(hiss) or 1.0) * 10 ** (-snr_db / 20)
    return unmoved(with_sound(media, _limited(media.waveform + hiss)))


def audio_filter(
    media: DecodedMedia, rng: np.random.Generator, *, low_hz: float, high_hz: float
) -> Transformed:
    """Keeps a band of frequencies, as a telephone or a small loudspeaker does.

    Args:
        media: the clip.
        rng: not used.
        low_hz: lower edge.
        high_hz: upper edge; what is above half the sample rate is not there anyway.
    """
    nyquist = media.sample_rate_hz / 2
    edges: float | list[float] = low_hz
    kind = "highpass"
    if high_hz < 0.98 * nyquist:
        edges, kind = [low_hz, high_hz], "bandpass"
    sections = scipy.signal.butter(4, edges, kind, fs=media.sample_rate_hz, output="sos")
    return unmoved(with_sound(media, _limited(scipy.signal.sosfilt(sections, media.waveform))))


def reverberation(
    media: DecodedMedia, rng: np.random.Generator, *, decay_seconds: float, direct_db: float
) -> Transformed:
    """Plays the sound in a room: its echo is noise that decays exponentially.

    Args:
        media: the clip.
        rng: draws the room.
        decay_seconds: time in which the echo falls by 60 dB.
        direct_db: energy of the direct sound over that of the echo.
    """
    count = round(decay_seconds * media.sample_rate_hz)
    times = np.arange(1, count + 1) / media.sample_rate_hz
    room = rng.standard_normal(count) * 10 ** (-3 * times / decay_seconds)
    room *= 10 ** (-direct_db / 20) / np.sqrt(np.sum(room**2))
    echo = scipy.signal.oaconvolve(media.waveform.astype(float), np.concatenate([[1.0], room]))
    heard = echo[: len(media.waveform)]
    heard *= _rms(media.waveform) / (_rms(heard) or 1.0)
    return unmoved(with_sound(media, _limited(heard)))


def pitch(media: DecodedMedia, rng: np.random.Generator, *, semitones: float) -> Transformed:
    """Moves the pitch at the same tempo.

    Args:
        media: the clip.
        rng: draws up or down.
        semitones: by how much.
    """
    rate = 2 ** (float(rng.choice([-semitones, semitones])) / 12)
    # Played faster or slower, which moves the pitch, and then brought back to the old tempo.
    played = at_speed(media.waveform, media.sample_rate_hz, rate)
    moved = at_tempo(played, media.sample_rate_hz, 1 / rate, samples=len(media.waveform))
    return unmoved(with_sound(media, moved))


def tempo(media: DecodedMedia, rng: np.random.Generator, *, percent: float) -> Transformed:
    """Plays the sound faster or slower at the same pitch; the picture keeps its speed.

    Args:
        media: the clip.
        rng: draws faster or slower.
        percent: by how much.
    """
    rate = either_way(percent, rng)
    changed = with_sound(media, at_tempo(media.waveform, media.sample_rate_hz, rate))
    begin = media.audio_start_seconds
    end = begin + len(changed.waveform) / changed.sample_rate_hz
    same = TimeMap.identity(media.duration_seconds)
    return Transformed(changed, same, TimeMap((Piece(begin, end, begin, rate),)))


def either_way(percent: float, rng: np.random.Generator) -> float:
    """Returns a rate that is as many per cent faster or slower than 1."""
    return 1 + float(rng.choice([-percent, percent])) / 100


def at_speed(waveform: np.ndarray, sample_rate_hz: int, rate: float) -> np.ndarray:
    """Returns the audio played `rate` times as fast, its pitch raised by the same factor.

    Args:
        waveform: int16 [samples].
        sample_rate_hz: sample rate of `waveform`.
        rate: above 0.
    """
    return soxr.resample(waveform, sample_rate_hz * rate, sample_rate_hz)


def at_tempo(
    waveform: np.ndarray, sample_rate_hz: int, rate: float, samples: int | None = None
) -> np.ndarray:
    """Returns the sound played `rate` times as fast at the same pitch, by FFmpeg's atempo.

    Args:
        waveform: int16 [samples].
        sample_rate_hz: its rate.
        rate: 0.5 to 100.
        samples: how many to return, where that is known better than by dividing.
    """
    graph = av.filter.Graph()
    source = graph.add_abuffer(format="s16", sample_rate=sample_rate_hz, layout="mono")
    change = graph.add("atempo", f"{rate:.6f}")
    sink = graph.add("abuffersink")
    source.link_to(change)
    change.link_to(sink)
    graph.configure()
    frame = av.AudioFrame.from_ndarray(waveform[None], format="s16", layout="mono")
    frame.sample_rate, frame.pts = sample_rate_hz, 0
    source.push(frame)
    source.push(None)
    pieces = []
    while True:
        try:
            heard = sink.pull()
        except (av.error.EOFError, av.error.BlockingIOError):
            break
        assert isinstance(heard, av.AudioFrame)
        pieces.append(heard.to_ndarray()[0])
    joined = np.concatenate(pieces)
    # atempo loses or adds a window.
    whole = np.zeros(round(len(waveform) / rate) if samples is None else samples, np.int16)
    whole[: len(joined)] = joined[: len(whole)]
    return whole


def _rms(waveform: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(waveform, dtype=float))))


def _limited(waveform: np.ndarray) -> np.ndarray:
    """As int16, made softer where it would be clipped, which would be a distortion of its own."""
    peak = float(np.abs(waveform).max(initial=0.0))
    return to_int16(waveform * min(1.0, 32767 / peak) if peak else waveform)
