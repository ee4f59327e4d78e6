"""Five materials: curves of pitch and loudness after a contact.

    bar     steady partials
    gong    every partial a close pair, so that it beats
    drop    partials that glide up
    drum    partials that glide down
    rattle  a train of irregular micro-impacts instead of one

Each video draws the rates of its own object. `audio.py` renders this micro-structure to be heard,
and `video.py` draws it in the ring that spreads from a contact: as wide as the pitch is low, as
bright as the tone is loud. So a contact binds the two, and nothing still gives the material away.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# Pitch [samples] in octaves, and amplitude [samples], at given seconds [samples] after a contact.
Curve = Callable[[np.ndarray], np.ndarray]

GLIDE_OCTAVES_PER_SECOND = (1.4, 2.2)
GLIDE_SECONDS = 0.45
BEATS_HZ = (4.5, 7.0)
BEAT_FLOOR = 0.05
MICRO_IMPACT_GAP_SECONDS = (0.08, 0.14)
MICRO_IMPACT_DECAY_SECONDS = (0.016, 0.026)


def draw_response(
    rng: np.random.Generator, material: str, decay_seconds: float
) -> tuple[Curve, Curve]:
    """Draws octaves and amplitude of an object over the seconds after every contact.

    The octaves' mean, weighted by the decaying energy, is zero: a glide does not show in the mean
    spectrum. The decay, of time constant `decay_seconds`, is common to all materials.
    """
    return MATERIALS[material](rng, decay_seconds)


def _bar(rng: np.random.Generator, decay_seconds: float) -> tuple[Curve, Curve]:
    del rng, decay_seconds
    return np.zeros_like, np.ones_like


def _gong(rng: np.random.Generator, decay_seconds: float) -> tuple[Curve, Curve]:
    del decay_seconds
    beats_hz, phase = rng.uniform(*BEATS_HZ), rng.uniform(-0.15, 0.15)

    def amplitude(seconds: np.ndarray) -> np.ndarray:
        power = np.cos(np.pi * (beats_hz * seconds + phase)) ** 2
        return np.sqrt(BEAT_FLOOR**2 + (1 - BEAT_FLOOR**2) * power)

    return np.zeros_like, amplitude


def _glide(sign: int) -> Callable[[np.random.Generator, float], tuple[Curve, Curve]]:
    def draw(rng: np.random.Generator, decay_seconds: float) -> tuple[Curve, Curve]:
        per_second = rng.uniform(*GLIDE_OCTAVES_PER_SECOND)
        # Mean of min(t, T) under the density 2/d exp(-2t/d).
        mean = decay_seconds / 2 * (1 - np.exp(-2 * GLIDE_SECONDS / decay_seconds))

        def octaves(seconds: np.ndarray) -> np.ndarray:
            return sign * per_second * (np.minimum(seconds, GLIDE_SECONDS) - mean)

        return octaves, np.ones_like

    return draw


def _rattle(rng: np.random.Generator, decay_seconds: float) -> tuple[Curve, Curve]:
    del decay_seconds
    gaps = rng.uniform(*MICRO_IMPACT_GAP_SECONDS, size=20)
    times = np.concatenate([[0.0], np.cumsum(gaps)])
    decay = rng.uniform(*MICRO_IMPACT_DECAY_SECONDS)

    def amplitude(seconds: np.ndarray) -> np.ndarray:
        last = times[np.maximum(np.searchsorted(times, seconds, side="right") - 1, 0)]
        return np.exp(-(seconds - last) / decay)

    return np.zeros_like, amplitude


MATERIALS: dict[str, Callable[[np.random.Generator, float], tuple[Curve, Curve]]] = {
    "bar": _bar,
    "gong": _gong,
    "drop": _glide(1),
    "drum": _glide(-1),
    "rattle": _rattle,
}
