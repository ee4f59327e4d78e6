"""Videos for recordings: an object that moves and glows with the recording.

Its size and the brightness of its trail follow the loudness, its place the spectral centroid, and
every onset leaves a mark. So video and audio share their course in time, and no class. Half of the
videos have a moving camera.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from scipy import signal

from avcl_jax.data_prep.foley.audio import room_and_equaliser
from avcl_jax.data_prep.foley.motion import PATH_RATE_HZ, sway
from avcl_jax.data_prep.foley.scene import (
    DECAY_SECONDS,
    RADIUS_PX,
    SAMPLE_RATE_HZ,
    SIZE,
    VIDEO_FPS,
    Scene,
    draw_camera,
)
from avcl_jax.data_prep.foley.video import render_video

HOP = SAMPLE_RATE_HZ // 64  # samples from one measurement of the recording to the next
QUIET_DECIBELS = 45.0  # below the loudest moment, at which the object is smallest
LEAST_ENERGY = 0.05
ONSET_DECIBELS = 6.0
ONSET_GAP_SECONDS = 0.15
OCTAVES_OF_PLACE = 1.5  # of the centroid, on either side of its median

# Of renewed versions of a recording.
LENGTHS = (0.8, 1.4)
GAIN_DECIBELS = (-6.0, 6.0)


@dataclass(frozen=True)
class HeardScene(Scene):
    """A scene whose energy is the loudness of a recording."""

    measured: np.ndarray  # float64 [M] energy, `SAMPLE_RATE_HZ` / `HOP` per second from 0

    def energy(self, seconds: np.ndarray) -> np.ndarray:
        """Returns the loudness at some times, from `LEAST_ENERGY` to 1."""
        places = np.asarray(seconds) * SAMPLE_RATE_HZ / HOP
        return np.interp(places, np.arange(len(self.measured)), self.measured)


def renewed(rng: np.random.Generator, waveform: np.ndarray) -> np.ndarray:
    """Draws another version of a recording: length and pitch, equaliser, room and gain.

    Args:
        waveform: float32 [samples] at `SAMPLE_RATE_HZ`.
    """
    length = int(len(waveform) * np.exp(rng.uniform(*np.log(LENGTHS))))
    resampled = signal.resample(waveform, length).astype(np.float32)
    silence = np.zeros_like(resampled)
    gain = 10 ** (rng.uniform(*GAIN_DECIBELS) / 20)
    return np.tanh(gain * room_and_equaliser(rng, resampled, silence)).astype(np.float32)


def render_heard(rng: np.random.Generator, waveform: np.ndarray) -> np.ndarray:
    """Renders uint8 [frames, 64, 64, 3] RGB for float32 [samples] at `SAMPLE_RATE_HZ`."""
    frames = render_video(_scene(rng, waveform))
    return _moving_camera(rng, frames) if rng.uniform() < 0.5 else frames


def _scene(rng: np.random.Generator, waveform: np.ndarray) -> HeardScene:
    num_frames = len(waveform) * VIDEO_FPS // SAMPLE_RATE_HZ
    decibels, centroid = _measure(waveform)
    energy = np.clip(1 + decibels / QUIET_DECIBELS, LEAST_ENERGY, 1)
    smooth = signal.windows.hann(7)
    padded = np.pad(energy, 3, mode="edge")
    energy = np.convolve(padded, smooth / smooth.sum(), mode="valid")
    steps = np.arange(-PATH_RATE_HZ, len(waveform) * PATH_RATE_HZ // SAMPLE_RATE_HZ)
    seconds = steps / PATH_RATE_HZ
    times = np.arange(len(energy)) * HOP / SAMPLE_RATE_HZ
    height = np.interp(seconds, times, centroid)
    # Louder is faster: forwards and backwards differ only as the recording does.
    pace = rng.uniform(0.2, 0.5) + rng.uniform(0.5, 1.2) * np.interp(seconds, times, energy)
    across = 0.8 * np.sin(rng.uniform(0, 2 * np.pi) + 2 * np.pi * np.cumsum(pace) / PATH_RATE_HZ)
    unit = np.stack([across, height], axis=-1) + sway(rng, seconds, (0.1, 0.4), (0.06, 0.16))
    path = draw_camera(rng)(unit)
    onsets, strengths = _onsets(decibels)
    places = [np.interp(onsets, seconds, path[:, axis]) for axis in (0, 1)]
    video_seed, audio_seed = np.random.SeedSequence(int(rng.integers(2**63))).spawn(2)
    return HeardScene(
        motion="",
        material="",
        num_frames=num_frames,
        radius_px=float(np.exp(rng.uniform(*np.log(RADIUS_PX)))),
        decay_seconds=float(np.exp(rng.uniform(*np.log(DECAY_SECONDS)))),
        octaves=np.zeros_like,
        amplitude=np.ones_like,
        energy_start=1.0,
        energy_seconds=np.inf,
        path_seconds=seconds,
        path=path,
        contact_seconds=onsets,
        contact_strength=strengths,
        contact_place=np.stack(places, axis=-1),
        video_seed=video_seed,
        audio_seed=audio_seed,
        measured=energy,
    )


def _measure(waveform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns loudness [M] in decibels below its maximum, and place of the centroid [M] in ±1."""
    _, _, spectrum = signal.stft(waveform, SAMPLE_RATE_HZ, nperseg=4 * HOP, noverlap=3 * HOP)
    power = np.abs(spectrum) ** 2
    total = power.sum(axis=0)
    decibels = 10 * np.log10(np.maximum(total / max(total.max(), 1e-12), 1e-10))
    octaves = np.log2(np.arange(1, len(power) + 1))
    centroid = octaves @ power / np.maximum(total, 1e-12)
    audible = decibels > -QUIET_DECIBELS
    middle = np.median(centroid[audible]) if audible.any() else 0.0
    centroid = np.where(audible, centroid, middle) - middle
    smooth = signal.windows.hann(11)
    centroid = np.convolve(np.pad(centroid, 5, mode="edge"), smooth / smooth.sum(), mode="valid")
    return decibels, np.clip(centroid / OCTAVES_OF_PLACE, -1, 1)


def _onsets(decibels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns times and strengths of sudden rises of the loudness."""
    level = np.maximum(decibels, -QUIET_DECIBELS)
    rise = level[2:] - level[:-2]
    peaks, _ = signal.find_peaks(
        rise, height=ONSET_DECIBELS, distance=int(ONSET_GAP_SECONDS * SAMPLE_RATE_HZ / HOP)
    )
    loud = 1 + level[np.minimum(peaks + 2, len(level) - 1)] / QUIET_DECIBELS
    return (peaks + 1) * HOP / SAMPLE_RATE_HZ, np.clip(loud, 0.3, 1.0)


def _moving_camera(rng: np.random.Generator, frames: np.ndarray) -> np.ndarray:
    """Returns the frames through a camera that pans, zooms and turns, alike when reversed."""
    seconds = np.arange(len(frames)) / VIDEO_FPS
    offsets = sway(rng, seconds, (2.0, 8.0), (0.05, 0.3))
    turns, zooms = sway(rng, seconds, (0.3, 1.0), (0.05, 0.3)).T
    middle = (SIZE - 1) / 2
    moved = np.empty_like(frames)
    for number, (frame, offset) in enumerate(zip(frames, offsets, strict=True)):
        scale = 1.25 * 2 ** (0.25 * zooms[number])
        matrix = cv2.getRotationMatrix2D((middle, middle), 10 * turns[number], scale)
        matrix[:, 2] += offset
        moved[number] = cv2.warpAffine(
            frame, matrix, (SIZE, SIZE), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101
        )
    return moved
