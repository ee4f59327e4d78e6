"""The sound of a scene: every contact by modal synthesis, sliding noise, room, hum, background.

The material is the micro-structure of a contact's sound. Partials, decays, knock, pitch, equaliser,
room and background come from the same distributions for every material, and a glide is placed so
that its energy-weighted mean pitch is that of a steady tone: mean spectrum and loudness must not
give the material away.
"""

from __future__ import annotations

import numpy as np
from scipy import fft

from data_prep.foley.scene import SAMPLE_RATE_HZ, Scene

CONTACT_SECONDS = 0.8
ROOM_SECONDS = 0.4
GLIDE_OCTAVES_PER_SECOND = (0.6, 0.95)
BEAT_FLOOR = 0.1
RATTLE = (0.012, 0.02)
DISTRACT = 0.15
VIBRATO = (0.03, 0.10)
TREMOLO = (0.0, 0.5)
DECAY = (0.12, 0.26)
NOISE = (-44, -26)


def render_sound(scene: Scene) -> np.ndarray:
    """Render the sound of a scene.

    Args:
        scene: What happens when.

    Returns:
        float32 [samples] in (-1, 1) at `SAMPLE_RATE_HZ`, exactly as long as the video.
    """
    rng = np.random.default_rng(scene.sound_seed)
    samples = scene.num_frames * SAMPLE_RATE_HZ // 16
    lead = int(-scene.path_seconds[0] * SAMPLE_RATE_HZ)
    body = np.zeros(lead + samples + int((CONTACT_SECONDS + 0.5) * SAMPLE_RATE_HZ), np.float32)
    contacts = _contacts(rng, scene)
    starts = lead + np.round(scene.contact_seconds * SAMPLE_RATE_HZ).astype(int)
    for start, contact in zip(starts, contacts, strict=True):
        body[start : start + len(contact)] += contact
    seconds = (np.arange(len(body)) - lead) / SAMPLE_RATE_HZ
    body += _sliding(rng, scene, seconds)
    background = _background(rng, len(body)) + DISTRACT * _distractors(rng, scene, len(body))
    mixed = _room_and_equaliser(rng, body, background)[lead : lead + samples]
    gain = 0.3 * 10 ** (rng.uniform(-2.0, 2.0) / 20)
    return np.tanh(gain * mixed).astype(np.float32)


def _contacts(rng: np.random.Generator, scene: Scene) -> np.ndarray:
    """Sounds [C, samples] of the contacts, each at the pitch and energy of its moment."""
    u = np.arange(int(CONTACT_SECONDS * SAMPLE_RATE_HZ), dtype=np.float32) / SAMPLE_RATE_HZ
    decay = np.exp(rng.uniform(np.log(DECAY[0]), np.log(DECAY[1])))
    partials = int(rng.integers(3, 7))
    ratios = np.cumsum(np.concatenate([[1.0], rng.uniform(0.55, 1.15, size=partials - 1)]))
    weights = ratios ** -rng.uniform(0.3, 1.0) * rng.uniform(0.5, 1.0, size=partials)
    weights /= np.sqrt(np.sum(weights**2))
    decays = decay / (1 + 0.12 * (ratios - 1))

    vibrato = rng.uniform(*VIBRATO) * np.sin(2 * np.pi * (rng.uniform(4, 9) * u + rng.uniform()))
    tremolo = 1 - rng.uniform(*TREMOLO) * (
        0.5 + 0.5 * np.cos(2 * np.pi * (rng.uniform(4, 20) * u + rng.uniform()))
    )
    octaves = vibrato
    warped = u  # integral of the glide: time as the phase sees it
    envelope = np.exp(-u[None, :] / decays[:, None].astype(np.float32))
    if scene.material in ("drop", "drum"):
        octaves = octaves + _glide(rng, u, decay, rising=scene.material == "drop")
    elif scene.material == "gong":
        envelope = envelope * _beating(rng, u, partials)
    elif scene.material == "rattle":
        envelope = envelope * _micro_impacts(rng, u, decay)
    warped = np.cumsum(2**octaves).astype(np.float32) / SAMPLE_RATE_HZ
    envelope = envelope * tremolo.astype(np.float32)
    envelope *= np.sqrt(decay / 2 / (np.mean(envelope**2, axis=1, keepdims=True) * u[-1]))

    count = len(scene.contact_seconds)
    semitones = rng.normal(0, 0.35, size=count)
    pitch = scene.pitch_hz(scene.contact_seconds) * 2 ** (semitones / 12)
    phases = rng.uniform(0, 2 * np.pi, size=partials)
    angle = 2 * np.pi * (pitch[:, None] * ratios).astype(np.float32)[..., None] * warped
    sound = np.sin(angle + phases[:, None].astype(np.float32))
    energy = scene.energy(scene.contact_seconds)
    # A harder impact excites the upper partials more: energy can be heard whatever the gain.
    tilt = ratios[None, :] ** (-0.9 * (1 - np.minimum(energy, 1.2)[:, None]))
    sound = np.einsum("cpu,pu,cp->cu", sound, envelope, (weights * tilt).astype(np.float32))

    knock = np.exp(-u[:800] / rng.uniform(0.002, 0.006)) * rng.uniform(0.2, 0.6)
    sound[:, :800] += knock * rng.standard_normal((count, 800), dtype=np.float32)
    sound *= np.minimum(u / 0.001, 1) * np.minimum((u[-1] - u) / 0.1, 1)
    return sound * (energy * scene.contact_strength).astype(np.float32)[:, None]


def _glide(rng, u, decay, *, rising):
    """Time warped by a pitch glide whose energy-weighted mean log pitch is zero."""
    octaves_per_second = rng.uniform(*GLIDE_OCTAVES_PER_SECOND) * (1 if rising else -1)
    extent = np.minimum(u, 0.45)
    octaves = octaves_per_second * extent
    weight = np.exp(-2 * u / decay)
    return octaves - np.sum(octaves * weight) / np.sum(weight)


def _beating(rng, u, partials):
    """Amplitude [P, samples] of partials split into close pairs."""
    beats_hz = rng.uniform(7.5, 10.5) * rng.uniform(0.93, 1.07, size=(partials, 1))
    phase = rng.uniform(-0.15, 0.15, size=(partials, 1))
    am = np.cos(np.pi * (beats_hz * u + phase)) ** 2
    return np.sqrt(BEAT_FLOOR**2 + (1 - BEAT_FLOOR**2) * am).astype(np.float32)


def _micro_impacts(rng, u, decay):
    """Amplitude [samples] of a train of irregular small impacts instead of one."""
    times = np.cumsum(rng.uniform(0.045, 0.085, size=10)) - 0.045
    times[0] = 0.0
    since = u - times[np.searchsorted(times, u, side="right") - 1].astype(np.float32)
    return np.exp(-since / rng.uniform(*RATTLE)).astype(np.float32)


def _sliding(rng, scene, seconds):
    """Rolling noise whose loudness follows speed and energy."""
    speed = np.interp(seconds, scene.path_seconds, scene.speed())
    noise = rng.standard_normal(len(seconds), dtype=np.float32)
    noise[1:] = noise[1:] + 0.7 * noise[:-1]
    level = 0.03 * rng.uniform(0.7, 1.3)
    return (level * np.minimum(speed / 60, 2) * scene.energy(seconds)).astype(np.float32) * noise


def _background(rng, count):
    """Spectrum of stationary background noise and hum, as a time signal [count]."""
    seconds = np.arange(800) / SAMPLE_RATE_HZ  # a whole number of cycles of 60 Hz and of 100 Hz
    hum = np.zeros(800)
    mains = rng.choice([60.0, 100.0])
    for harmonic in range(1, 6):
        level = 0.03 * rng.uniform(0, 1) ** 2
        hum += level * np.sin(2 * np.pi * (mains * harmonic * seconds + rng.uniform()))
    noise = rng.standard_normal(count, dtype=np.float32)
    return 10 ** (rng.uniform(*NOISE) / 20) * noise + np.resize(hum, count).astype(np.float32)


def _distractors(rng, scene, count):
    """Other sounds, with soft onsets, whose micro-structure is any of the materials'."""
    track = np.zeros(count, np.float32)
    at = 0
    while True:
        at += int(rng.exponential(0.7) * SAMPLE_RATE_HZ)
        length = int(rng.uniform(0.4, 1.2) * SAMPLE_RATE_HZ)
        if at + length > count:
            return track
        u = np.arange(length, dtype=np.float32) / SAMPLE_RATE_HZ
        window = np.sin(np.pi * u / u[-1]) ** 2
        hz = np.exp(rng.uniform(np.log(300), np.log(4000)))
        octaves = rng.uniform(-1.2, 1.2) * (u - u[-1] / 2)
        kind = rng.integers(3)
        if kind == 0:
            octaves *= 0
        if kind == 2:
            window = window * (0.2 + 0.8 * np.cos(np.pi * rng.uniform(5, 18) * u) ** 2)
        track[at : at + length] += (
            rng.uniform(0.3, 1)
            * window
            * np.sin(2 * np.pi * np.cumsum(hz * 2**octaves) / SAMPLE_RATE_HZ)
        ).astype(np.float32)


def _room_and_equaliser(rng, body, background):
    """Object through a random room, then everything through one random equaliser."""
    length = fft.next_fast_len(len(body) + int(ROOM_SECONDS * SAMPLE_RATE_HZ), real=True)
    tail = np.arange(int(ROOM_SECONDS * SAMPLE_RATE_HZ), dtype=np.float32) / SAMPLE_RATE_HZ
    room = rng.standard_normal(len(tail), dtype=np.float32) * np.exp(
        -tail / rng.uniform(0.02, 0.06)
    )
    room *= 10 ** (rng.uniform(-16, -8) / 20) / np.sqrt(np.sum(room**2))
    room[0] += 1.0
    hz = fft.rfftfreq(length, 1 / SAMPLE_RATE_HZ)
    octaves = np.log2(np.maximum(hz, 60.0) / 60.0)
    knots = rng.normal(0, 4.0, size=8)
    decibels = np.interp(octaves, np.linspace(0, 7.1, 8), knots - knots.mean())
    tilt = rng.uniform(-3.0, 0.0) * octaves  # the background alone is between white and pink
    equaliser = (10 ** (decibels / 20)).astype(np.float32)
    spectrum = fft.rfft(body, length) * fft.rfft(room, length)
    colour = (10 ** ((tilt - tilt.mean()) / 20)).astype(np.float32)
    spectrum += fft.rfft(background, length) * colour
    return fft.irfft(spectrum * equaliser, length)[: len(body)]
