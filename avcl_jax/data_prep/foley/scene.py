"""Scene of one foley video: its object, its motion and its contacts.

A scene is drawn from (seed, split, index) alone, so a file is the same whichever process makes it.
Everything that audio and video share is drawn here: contact times, contact strengths, the object's
size, its decaying energy and its response to a contact. The rest is drawn by `audio.py` and
`video.py` from the scene's own seeds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from avcl_jax.data_prep.foley import material as materials
from avcl_jax.data_prep.foley import motion

VIDEO_FPS = 16
SAMPLE_RATE_HZ = 16_000
SIZE = 64
SPLITS = ("train", "test", "null_train", "null_test")
MOTIONS = tuple(motion.MOTIONS)
MATERIALS = tuple(materials.MATERIALS)

# The scene runs before the file starts, so that a file opens in the middle of movement and audio.
LEAD_IN_SECONDS = 1.5

DECAY_SECONDS = (0.22, 0.36)
RADIUS_PX = (3.8, 9.6)

# Pitch times radius: a body half as large is an octave higher.
HZ_TIMES_PIXELS = 4_000.0


@dataclass(frozen=True)
class Scene:
    """One video before it is rendered; times are in seconds of the file, places in pixels."""

    motion: str
    material: str
    num_frames: int  # at `VIDEO_FPS`
    radius_px: float  # radius of the object at energy 1
    decay_seconds: float  # time constant of a contact's tone; its mark glows in proportion
    octaves: materials.Curve  # pitch over the seconds after a contact, relative to `pitch_hz`
    amplitude: materials.Curve  # loudness over the seconds after a contact, apart from the decay
    energy_start: float  # energy at time 0, in (0, 1]
    energy_seconds: float  # time constant of the energy's decay
    path_seconds: np.ndarray  # float64 [K] times of `path`, from before 0 to past the end
    path: np.ndarray  # float64 [K, 2] place of the object's centre (x, y)
    contact_seconds: np.ndarray  # float64 [C] increasing, some of them before 0
    contact_strength: np.ndarray  # float64 [C] impact speed, relative, about 0.5 to 1
    contact_place: np.ndarray  # float64 [C, 2] place of the object at each contact
    video_seed: np.random.SeedSequence  # of all that only the video has
    audio_seed: np.random.SeedSequence  # of all that only the audio has

    @property
    def duration_seconds(self) -> float:
        """Length of the file."""
        return self.num_frames / VIDEO_FPS

    def energy(self, seconds: np.ndarray) -> np.ndarray:
        """Returns the energy left at some times; it drives size, pitch, loudness and trail."""
        return self.energy_start * np.exp(-np.asarray(seconds) / self.energy_seconds)

    def radius(self, seconds: np.ndarray) -> np.ndarray:
        """Returns the radius in pixels at some times: the object shrinks as it loses energy."""
        return self.radius_px * self.energy(seconds) ** 0.3

    def pitch_hz(self, seconds: np.ndarray) -> np.ndarray:
        """Returns the fundamental of a contact at some times, inverse to the radius."""
        return HZ_TIMES_PIXELS / self.radius(seconds)

    def place(self, seconds: np.ndarray) -> np.ndarray:
        """Returns the place [..., 2] of the object's centre, by interpolation of the path."""
        axes = [np.interp(seconds, self.path_seconds, self.path[:, axis]) for axis in (0, 1)]
        return np.stack(axes, axis=-1)

    def speed(self) -> np.ndarray:
        """Returns the speed [K] along the path in pixels per second."""
        step = self.path_seconds[1] - self.path_seconds[0]
        return np.hypot(*np.gradient(self.path, step, axis=0).T)


def classes_of(seed: int, split: str, index: int) -> tuple[str, str]:
    """Returns motion and material of a video of one of `SPLITS`.

    Every block of all pairs has each pair once: any prefix of a split is balanced to within one
    block.
    """
    pairs = len(MOTIONS) * len(MATERIALS)
    block, place = divmod(index, pairs)
    shuffled = np.random.default_rng([seed, SPLITS.index(split), block, 1]).permutation(pairs)
    which_motion, which_material = divmod(int(shuffled[place]), len(MATERIALS))
    return MOTIONS[which_motion], MATERIALS[which_material]


def draw_scene(seed: int, split: str, index: int) -> Scene:
    """Draws the scene of one video of one of `SPLITS`, a function of the three arguments only."""
    motion_name, material = classes_of(seed, split, index)
    motion_seed, video_seed, audio_seed = np.random.SeedSequence(
        [seed, SPLITS.index(split), index]
    ).spawn(3)
    rng = np.random.default_rng(motion_seed)
    num_frames = int(rng.integers(8 * VIDEO_FPS, 10 * VIDEO_FPS + 1))
    energy_start = rng.uniform(0.85, 1.0)
    energy_seconds = rng.uniform(4.0, 7.0)
    end = num_frames / VIDEO_FPS
    track = motion.simulate(
        rng,
        motion_name,
        start_seconds=-LEAD_IN_SECONDS,
        end_seconds=end + 0.25,
        energy_seconds=energy_seconds,
    )
    place = draw_camera(rng)
    radius_px = float(np.exp(rng.uniform(*np.log(RADIUS_PX))))
    decay_seconds = float(np.exp(rng.uniform(*np.log(DECAY_SECONDS))))
    octaves, amplitude = materials.draw_response(rng, material, decay_seconds)
    return Scene(
        motion=motion_name,
        material=material,
        num_frames=num_frames,
        radius_px=radius_px,
        decay_seconds=decay_seconds,
        octaves=octaves,
        amplitude=amplitude,
        energy_start=energy_start,
        energy_seconds=energy_seconds,
        path_seconds=track.seconds,
        path=place(track.position),
        contact_seconds=track.contact_seconds,
        contact_strength=track.contact_strength,
        contact_place=place(track.contact_position),
        video_seed=video_seed,
        audio_seed=audio_seed,
    )


def draw_camera(rng: np.random.Generator):
    """Draws rotation, mirroring, scale and place of a video: positions alone carry no label."""
    angle = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    rotation[:, 0] *= rng.choice([-1.0, 1.0])
    scale = rng.uniform(11.0, 15.5)
    centre = SIZE / 2 + rng.uniform(-8.0, 8.0, size=2)

    def place(unit: np.ndarray) -> np.ndarray:
        return unit @ rotation.T * scale + centre

    return place
