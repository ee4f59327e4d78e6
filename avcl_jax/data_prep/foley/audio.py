"""Audio of a scene: every contact by modal synthesis, sliding noise, room, hum, background.

The material is the micro-structure of a contact's tone (`material.py`). Partials, decay, knock,
pitch, equaliser, room and background come from the same distributions for every material, and a
glide is placed so that its energy-weighted mean pitch is that of a steady tone: mean spectrum and
loudness do not give the material away. Vibrato, tremolo and tones in the background put
glides and beats into the audio of *every* material, or a random network would recognise it: only
the trend after a contact is the material's own. (Without them a random encoder's probe reached 95 %
where it now stays near 50 %.)
"""

from __future__ import annotations

import numpy as np
from scipy import fft

from avcl_jax.data_prep.foley.scene import SAMPLE_RATE_HZ, VIDEO_FPS, Scene

CONTACT_SECONDS = 0.8
ROOM_SECONDS = 0.4
HIGHEST_PARTIAL_HZ = 6_600

# Partials of one object do not beat in step.
RATE_SPREAD = 0.04

# What every material may have.
VIBRATO_OCTAVES = (0.03, 0.09)
TREMOLO_DEPTH = (0.0, 0.35)
BACKGROUND_TONES = 0.2
BACKGROUND_NOISE_DECIBELS = (-46.0, -33.0)


def render_audio(scene: Scene) -> np.ndarray:
    """Renders float32 [samples] in (-1, 1) at `SAMPLE_RATE_HZ`, exactly as long as the video."""
    rng = np.random.default_rng(scene.audio_seed)
    samples = scene.num_frames * SAMPLE_RATE_HZ // VIDEO_FPS
    lead = int(-scene.path_seconds[0] * SAMPLE_RATE_HZ)
    body = np.zeros(lead + samples + int((CONTACT_SECONDS + 0.5) * SAMPLE_RATE_HZ), np.float32)
    contacts = _contacts(rng, scene)
    starts = lead + np.round(scene.contact_seconds * SAMPLE_RATE_HZ).astype(int)
    for start, contact in zip(starts, contacts, strict=True):
        body[start : start + len(contact)] += contact
    body += _sliding(rng, scene, (np.arange(len(body)) - lead) / SAMPLE_RATE_HZ)
    background = _noise_and_hum(rng, len(body)) + BACKGROUND_TONES * _tones(rng, len(body))
    mixed = room_and_equaliser(rng, body, background)[lead : lead + samples]
    gain = 0.3 * 10 ** (rng.uniform(-2.0, 2.0) / 20)
    return np.tanh(gain * mixed).astype(np.float32)


def _contacts(rng: np.random.Generator, scene: Scene) -> np.ndarray:
    """Returns tones [contacts, samples], each at the pitch and energy of its moment."""
    u = np.arange(int(CONTACT_SECONDS * SAMPLE_RATE_HZ), dtype=np.float32) / SAMPLE_RATE_HZ
    decay = scene.decay_seconds
    partials = int(rng.integers(4, 6))
    ratios = np.cumsum(np.concatenate([[1.0], rng.uniform(0.7, 1.0, size=partials - 1)]))
    weights = ratios ** -rng.uniform(0.4, 0.9) * rng.uniform(0.7, 1.0, size=partials)
    weights /= np.sqrt(np.sum(weights**2))
    decays = (decay / (1 + 0.12 * (ratios - 1))).astype(np.float32)

    vibrato, tremolo = _vibrato_and_tremolo(rng, u)
    octaves = vibrato + scene.octaves(u)
    rates = rng.uniform(1 - RATE_SPREAD, 1 + RATE_SPREAD, size=(partials, 1))
    envelope = np.exp(-u / decays[:, None]) * tremolo * scene.amplitude(rates * u)
    envelope = envelope.astype(np.float32)
    # Every material has the energy of a plain decay.
    envelope *= np.sqrt(decay / 2 / (np.mean(envelope**2, axis=1, keepdims=True) * CONTACT_SECONDS))

    count = len(scene.contact_seconds)
    pitch = scene.pitch_hz(scene.contact_seconds) * 2 ** (rng.normal(0, 0.35, size=count) / 12)
    warped = (np.cumsum(2**octaves) / SAMPLE_RATE_HZ).astype(np.float32)
    angle = 2 * np.pi * (pitch[:, None] * ratios).astype(np.float32)[..., None] * warped
    tones = np.sin(angle + rng.uniform(0, 2 * np.pi, size=(partials, 1)).astype(np.float32))
    energy = scene.energy(scene.contact_seconds)
    # A harder impact excites the upper partials more: energy can be heard whatever the gain.
    tilt = ratios ** (-0.9 * (1 - np.minimum(energy, 1.2)[:, None]))
    # A partial that would glide past half the sample rate would come back gliding the other way.
    tilt *= np.clip((HIGHEST_PARTIAL_HZ - pitch[:, None] * ratios) / 800, 0, 1)
    tones = np.einsum("cpu,pu,cp->cu", tones, envelope, (weights * tilt).astype(np.float32))

    knock = np.exp(-u[:800] / rng.uniform(0.002, 0.006)) * rng.uniform(0.2, 0.6)
    tones[:, :800] += knock * rng.standard_normal((count, 800), dtype=np.float32)
    tones *= np.minimum(u / 0.001, 1) * np.minimum((CONTACT_SECONDS - u) / 0.1, 1)
    return tones * (energy * scene.contact_strength).astype(np.float32)[:, None]


def _vibrato_and_tremolo(rng: np.random.Generator, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Draws octaves [samples] and amplitude [samples] of a modulation common to all materials."""
    octaves = rng.uniform(*VIBRATO_OCTAVES)
    vibrato = octaves * np.sin(2 * np.pi * (rng.uniform(4, 9) * u + rng.uniform()))
    depth = rng.uniform(*TREMOLO_DEPTH)
    swell = 0.5 + 0.5 * np.cos(2 * np.pi * (rng.uniform(3, 6) * u + rng.uniform()))
    return vibrato, (1 - depth * swell).astype(np.float32)


def _sliding(rng: np.random.Generator, scene: Scene, seconds: np.ndarray) -> np.ndarray:
    """Returns rolling noise [samples] whose loudness follows speed and energy."""
    speed = np.interp(seconds, scene.path_seconds, scene.speed())
    noise = rng.standard_normal(len(seconds), dtype=np.float32)
    noise[1:] += 0.7 * noise[:-1]
    level = 0.07 * rng.uniform(0.9, 1.1) * np.minimum(speed / 60, 2) * scene.energy(seconds)
    return level.astype(np.float32) * noise


def _noise_and_hum(rng: np.random.Generator, count: int) -> np.ndarray:
    """Draws the stationary background [samples]."""
    seconds = np.arange(800) / SAMPLE_RATE_HZ  # a whole number of cycles of 60 Hz and of 100 Hz
    hum = np.zeros(len(seconds))
    mains = rng.choice([60.0, 100.0])
    for harmonic in range(1, 6):
        level = 0.02 * rng.uniform(0, 1) ** 2
        hum += level * np.sin(2 * np.pi * (mains * harmonic * seconds + rng.uniform()))
    noise = rng.standard_normal(count, dtype=np.float32)
    noise *= 10 ** (rng.uniform(*BACKGROUND_NOISE_DECIBELS) / 20)
    return noise + np.resize(hum, count).astype(np.float32)


def _tones(rng: np.random.Generator, count: int) -> np.ndarray:
    """Draws tones [samples] that swell and fade, steady, gliding or beating, alike reversed."""
    track = np.zeros(count, np.float32)
    start = int(rng.exponential(0.7) * SAMPLE_RATE_HZ)
    while start + (length := int(rng.uniform(0.4, 1.2) * SAMPLE_RATE_HZ)) <= count:
        u = np.arange(length, dtype=np.float32) / SAMPLE_RATE_HZ
        level = rng.uniform(0.3, 1.0) * np.sin(np.pi * u / u[-1]) ** 2
        hz = np.exp(rng.uniform(np.log(300), np.log(4000)))
        kind = rng.integers(3)
        if kind == 1:
            hz = hz * 2 ** (rng.uniform(-1.2, 1.2) * (u - u[-1] / 2))
        elif kind == 2:
            level = level * (0.2 + 0.8 * np.cos(np.pi * rng.uniform(5, 18) * u) ** 2)
        turns = np.cumsum(hz) / SAMPLE_RATE_HZ if kind == 1 else hz * u
        track[start : start + length] += level * np.sin(2 * np.pi * turns)
        start += int(rng.exponential(0.7) * SAMPLE_RATE_HZ)
    return track


def room_and_equaliser(
    rng: np.random.Generator, body: np.ndarray, background: np.ndarray
) -> np.ndarray:
    """Returns the object in a random room, and all through one random equaliser, [samples]."""
    length = fft.next_fast_len(len(body) + int(ROOM_SECONDS * SAMPLE_RATE_HZ), real=True)
    tail = np.arange(int(ROOM_SECONDS * SAMPLE_RATE_HZ), dtype=np.float32) / SAMPLE_RATE_HZ
    room = rng.standard_normal(len(tail), dtype=np.float32)
    room *= np.exp(-tail / rng.uniform(0.02, 0.06))
    room *= 10 ** (rng.uniform(-16, -8) / 20) / np.sqrt(np.sum(room**2))
    room[0] += 1.0
    octaves = np.log2(np.maximum(fft.rfftfreq(length, 1 / SAMPLE_RATE_HZ), 60.0) / 60.0)
    knots = rng.normal(0, 3.0, size=8)
    equaliser = 10 ** (np.interp(octaves, np.linspace(0, 7.1, 8), knots - knots.mean()) / 20)
    tilt = rng.uniform(-3.0, 0.0) * octaves  # the background alone is between white and pink
    colour = 10 ** ((tilt - tilt.mean()) / 20)
    spectrum = fft.rfft(body, length) * fft.rfft(room, length)
    spectrum += fft.rfft(background, length) * colour.astype(np.float32)
    return fft.irfft(spectrum * equaliser.astype(np.float32), length)[: len(body)]
