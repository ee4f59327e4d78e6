"""Five motions: paths in the square [-1, 1]² and the contacts that follow from them.

All motions draw their rate of contacts from one distribution and lose amplitude in the same way;
only the dynamics differ. Each starts at a random phase.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

PATH_RATE_HZ = 256
MIN_CONTACT_GAP_SECONDS = 0.16


@dataclass(frozen=True)
class Track:
    """A path and its contacts, in unit coordinates."""

    seconds: np.ndarray  # float64 [K], `PATH_RATE_HZ` per second
    position: np.ndarray  # float64 [K, 2]
    contact_seconds: np.ndarray  # float64 [C], increasing
    contact_strength: np.ndarray  # float64 [C], relative impact speed
    contact_position: np.ndarray  # float64 [C, 2]


def simulate(
    rng: np.random.Generator,
    name: str,
    *,
    start_seconds: float,
    end_seconds: float,
    energy_seconds: float,
) -> Track:
    """Simulates one of `MOTIONS` over an interval that begins before the file.

    The amplitude follows the energy, whose decay has the time constant `energy_seconds`.
    """
    count = int(np.ceil((end_seconds - start_seconds) * PATH_RATE_HZ)) + 1
    seconds = start_seconds + np.arange(count) / PATH_RATE_HZ
    contacts_per_second = rng.uniform(1.2, 2.05)
    amplitude = np.exp(-np.maximum(seconds, 0) / energy_seconds) ** 0.2
    position, contact_seconds, strength = MOTIONS[name](rng, seconds, contacts_per_second)
    # The whole motion wanders, slowly and alike in reverse: places do not draw its path.
    position = position * amplitude[:, None] + sway(rng, seconds, (0.1, 0.4), (0.06, 0.16))
    strength = strength * rng.uniform(0.65, 1.1, size=len(strength))
    keep = np.diff(contact_seconds, prepend=-np.inf) > MIN_CONTACT_GAP_SECONDS
    keep &= (contact_seconds > start_seconds) & (contact_seconds < end_seconds)
    contact_seconds, strength = contact_seconds[keep], strength[keep]
    place = [np.interp(contact_seconds, seconds, position[:, axis]) for axis in (0, 1)]
    return Track(seconds, position, contact_seconds, strength, np.stack(place, axis=-1))


def sway(
    rng: np.random.Generator,
    seconds: np.ndarray,
    size: tuple[float, float],
    rate_hz: tuple[float, float],
) -> np.ndarray:
    """Draws a slow swing along both axes, [seconds, 2], with size and rate from two ranges."""
    swing, rate = rng.uniform(*size, size=2), rng.uniform(*rate_hz, size=2)
    return swing * np.sin(2 * np.pi * rate * seconds[:, None] + rng.uniform(0, 2 * np.pi, size=2))


def _beats(rng: np.random.Generator, seconds: np.ndarray, rate: float, spread: float) -> np.ndarray:
    """Draws contact times around the path's time span, intervals jittered by 1 ± spread."""
    count = int((seconds[-1] - seconds[0]) * rate / (1 - spread)) + 6
    intervals = rng.uniform(1 - spread, 1 + spread, size=count) / rate
    return seconds[0] - rng.uniform(1, 2) / rate + np.concatenate([[0.0], np.cumsum(intervals)])


def _phase(seconds: np.ndarray, beats: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the beat before each time, and the phase towards the next, in [0, 1)."""
    before = np.searchsorted(beats, seconds, side="right") - 1
    return before, (seconds - beats[before]) / (beats[before + 1] - beats[before])


def _triangle(phase: np.ndarray) -> np.ndarray:
    """Returns a triangle wave in [-1, 1] that turns at whole numbers."""
    return 1 - 2 * np.abs(np.mod(phase, 2.0) - 1)


def _bounce(rng, seconds, rate):
    """Free fall between contacts with a floor, wandering along it."""
    beats = _beats(rng, seconds, rate, 0.12)
    before, phase = _phase(seconds, beats)
    intervals = np.diff(beats)
    height = 1.9 * (intervals * rate) ** 2 / 1.2
    along = _triangle(rng.uniform(0, 2) + np.cumsum(rng.uniform(0.25, 0.4, size=len(beats))))
    x = along[before] + (along[before + 1] - along[before]) * phase
    y = -0.8 + height[before] * 4 * phase * (1 - phase)
    return np.stack([0.9 * x, y], axis=-1), beats[:-1], 0.9 * np.sqrt(height / 1.6)


def _ricochet(rng, seconds, rate):
    """Constant speed in straight lines inside a box."""
    half = np.array([rng.uniform(0.75, 1.0), rng.uniform(0.75, 1.0)])
    share = rng.uniform(0.35, 0.65)
    per_second = rate * np.array([share, 1 - share])
    start = rng.uniform(0, 2, size=2)
    phase = start + (seconds[:, None] - seconds[0]) * per_second
    speed = per_second * half
    walls = [
        seconds[0] + (np.arange(np.ceil(start[i]), phase[-1, i]) - start[i]) / per_second[i]
        for i in (0, 1)
    ]
    strength = [
        np.full(len(w), 0.5 + 0.5 * s / speed.max()) for w, s in zip(walls, speed, strict=True)
    ]
    order = np.argsort(np.concatenate(walls))
    return _triangle(phase) * half, np.concatenate(walls)[order], np.concatenate(strength)[order]


def _orbit(rng, seconds, rate):
    """Turns around a centre at constant angular speed, with two contacts per turn."""
    turns = rng.uniform(0, 1) + (seconds - seconds[0]) * rate / 2
    ratio = rng.uniform(0.75, 1.0)
    position = np.stack([np.cos(2 * np.pi * turns), ratio * np.sin(2 * np.pi * turns)], axis=-1)
    pegs = np.array([0.0, rng.uniform(0.36, 0.64)])
    crossings = (np.arange(np.floor(turns[0]), turns[-1] + 1)[:, None] + pegs).ravel()
    strength = np.tile(rng.uniform(0.7, 1.0, size=2), len(crossings) // 2)
    return 0.9 * position, seconds[0] + (crossings - turns[0]) * 2 / rate, strength


def _slide(rng, seconds, rate):
    """Rests, then slides to a new place and stops with a knock."""
    beats = _beats(rng, seconds, rate, 0.3)
    stops = [rng.uniform(-1, 1, size=2)]
    for _ in beats[1:]:
        choices = rng.uniform(-1, 1, size=(16, 2))
        away = np.hypot(*(choices - stops[-1]).T)
        stops.append(choices[np.argmin(np.abs(away - rng.uniform(0.9, 1.6)))])
    places = np.array(stops)
    before, phase = _phase(seconds, beats)
    rest = rng.uniform(0.45, 0.6)
    moved = np.clip((phase - rest) / (1 - rest), 0, 1) ** 1.5
    position = places[before] + (places[before + 1] - places[before]) * moved[:, None]
    length = np.hypot(*np.diff(places, axis=0, prepend=places[:1]).T)
    return position, beats, 0.45 + 0.35 * length


def _swing(rng, seconds, rate):
    """A harmonic swing along a line, touching both ends."""
    half_turns = rng.uniform(0, 1) + (seconds - seconds[0]) * rate
    s = np.cos(np.pi * half_turns)
    bow = rng.uniform(-0.25, 0.25)
    ends = np.arange(np.ceil(half_turns[0]), half_turns[-1])
    strength = np.where(ends % 2 == 0, *rng.uniform(0.65, 1.0, size=2))
    position = np.stack([s, bow * (1 - s**2)], axis=-1)
    return position, seconds[0] + (ends - half_turns[0]) / rate, strength


MOTIONS: dict[str, Callable] = {
    "bounce": _bounce,
    "ricochet": _ricochet,
    "orbit": _orbit,
    "slide": _slide,
    "swing": _swing,
}
