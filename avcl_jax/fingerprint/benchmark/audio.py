"""Transformations of the audio: noise, filters, rooms, pitch, tempo, re-encoding, exchange."""

from __future__ import annotations

import dataclasses
import io

import av
import numpy as np
import scipy.signal

from avcl_jax.data.media import DecodedMedia, decode_audio
from avcl_jax.data.spectrogram import samples_at
from avcl_jax.fingerprint.benchmark.timeline import (
    Piece,
    Rng,
    Transformed,
    as_footage_of,
    at_speed,
    at_tempo,
    resampled,
    unmoved,
    with_audio,
    without_audio,
)


def audio_noise(media: DecodedMedia, rng: Rng, *, snr_db: float) -> Transformed:
    """Adds pink noise, `snr_db` weaker than the audio in energy over the whole clip."""
    count = len(media.waveform)
    spectrum = np.fft.rfft(rng.standard_normal(count))
    spectrum /= np.sqrt(np.maximum(np.arange(len(spectrum)), 1))
    hiss = np.fft.irfft(spectrum, count)
    hiss *= _rms(media.waveform) / (_rms(hiss) or 1.0) * 10 ** (-snr_db / 20)
    return unmoved(with_audio(media, _limited(media.waveform + hiss)))


def audio_filter(media: DecodedMedia, rng: Rng, *, low_hz: float, high_hz: float) -> Transformed:
    """Keeps a band of frequencies, as a telephone or a small loudspeaker does."""
    edges: float | list[float] = low_hz
    kind = "highpass"  # the sample rate bounds the band
    if high_hz < 0.98 * media.sample_rate_hz / 2:
        edges, kind = [low_hz, high_hz], "bandpass"
    sections = scipy.signal.butter(4, edges, kind, fs=media.sample_rate_hz, output="sos")
    return unmoved(with_audio(media, _limited(scipy.signal.sosfilt(sections, media.waveform))))


def reverberation(
    media: DecodedMedia, rng: Rng, *, decay_seconds: float, direct_db: float
) -> Transformed:
    """Plays the audio in a room: its echo is noise that decays by 60 dB in `decay_seconds`.

    The direct audio has `direct_db` more energy than the echo.
    """
    count = round(decay_seconds * media.sample_rate_hz)
    times = np.arange(1, count + 1) / media.sample_rate_hz
    room = rng.standard_normal(count) * 10 ** (-3 * times / decay_seconds)
    room *= 10 ** (-direct_db / 20) / np.sqrt(np.sum(room**2))
    echo = scipy.signal.oaconvolve(media.waveform.astype(float), np.concatenate([[1.0], room]))
    echo = echo[: len(media.waveform)]
    echo *= _rms(media.waveform) / (_rms(echo) or 1.0)
    return unmoved(with_audio(media, _limited(echo)))


def pitch(media: DecodedMedia, rng: Rng, *, semitones: float) -> Transformed:
    """Moves the pitch up or down at the same tempo."""
    rate = 2 ** (float(rng.choice([-semitones, semitones])) / 12)
    # Played faster or slower, which moves the pitch, and then brought back to the old tempo.
    played = at_speed(media.waveform, media.sample_rate_hz, rate)
    moved = at_tempo(played, media.sample_rate_hz, 1 / rate, samples=len(media.waveform))
    return unmoved(with_audio(media, moved))


def tempo(media: DecodedMedia, rng: Rng, *, percent: float) -> Transformed:
    """Plays the audio faster or slower at the same pitch; the video keeps its speed."""
    rate = 1 + float(rng.choice([-percent, percent])) / 100
    changed = with_audio(media, at_tempo(media.waveform, media.sample_rate_hz, rate))
    begin = media.audio_start_seconds
    end = begin + len(changed.waveform) / changed.sample_rate_hz
    pieces = (Piece(begin, end, begin, rate),)
    return dataclasses.replace(unmoved(media), media=changed, audio_pieces=pieces)


def audio_codec(
    media: DecodedMedia, rng: Rng, *, codec: str, rate_hz: int, kilobits: int
) -> Transformed:
    """Encodes the audio by an encoder of FFmpeg at a low bit rate (kbit/s), and decodes it."""
    stream = io.BytesIO()
    # Not by `write_mp4`, which times the samples: libopus then ends 1 ms later.
    with av.open(stream, "w", format="matroska") as container:
        audio = container.add_stream(codec, rate=rate_hz, layout="mono")
        assert isinstance(audio, av.AudioStream)
        audio.bit_rate = 1000 * kilobits
        samples = resampled(media.waveform, media.sample_rate_hz, rate_hz)
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate = rate_hz
        container.mux([*audio.encode(frame), *audio.encode()])
    decoded = decode_audio(stream.getvalue(), sample_rate_hz=media.sample_rate_hz)
    if decoded is None:
        raise RuntimeError(f"{codec} returned no audio")
    # The containers' zero is the first audible sample: FFmpeg drops the priming samples.
    places = np.arange(len(media.waveform)) - round(decoded.start_seconds * media.sample_rate_hz)
    return unmoved(with_audio(media, samples_at(decoded.waveform, places)))


def audio_removed(media: DecodedMedia, rng: Rng) -> Transformed:
    """Removes the audio."""
    return dataclasses.replace(unmoved(without_audio(media)), audio_pieces=())


def audio_swapped(media: DecodedMedia, rng: Rng, other: DecodedMedia) -> Transformed:
    """Replaces the audio by that of another clip, repeated if it is too short."""
    waveform = as_footage_of(other, media).waveform
    swapped = dataclasses.replace(media, waveform=waveform, audio_start_seconds=0.0)
    return dataclasses.replace(unmoved(swapped), audio_pieces=())


def _rms(waveform: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(waveform, dtype=float))))


def _limited(waveform: np.ndarray) -> np.ndarray:
    """Returns int16, made softer where it would be clipped, which would be a distortion."""
    peak = float(np.abs(waveform).max(initial=0.0))
    softer = waveform * min(1.0, 32767 / peak) if peak else waveform
    return np.clip(np.rint(softer), -32768, 32767).astype(np.int16)
