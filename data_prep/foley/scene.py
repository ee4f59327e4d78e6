"""What happens in one foley video: its object, how it moves, when it touches something.

A scene is drawn from (seed, split, index) alone, so a file is the same whichever process makes it.
Everything that sound and picture share lives here: contact times, contact strengths, the object's
size, its decaying energy and its response to a contact. What only one of them shows is drawn by
`sound.py` and `picture.py` from the scene's own seeds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_prep.foley import material as materials
from data_prep.foley import motion

VIDEO_FPS = 16
SAMPLE_RATE_HZ = 16_000
SIZE = 64
SPLITS = ("train", "test", "null_train", "null_test")
MOTIONS = tuple(motion.MOTIONS)
MATERIALS = tuple(materials.MATERIALS)

# The scene runs before the file starts, so that a file opens in the middle of movement and sound.
LEAD_IN_SECONDS = 1.5

DECAY_SECONDS = (0.22, 0.36)
RADIUS_PX = (3.8, 9.6)

# Pitch times radius: a body half as large sounds an octave higher.
HZ_TIMES_PIXELS = 4_000.0


@dataclass(frozen=True)
class Scene:
    """One video before it is rendered; times are in seconds of the file, places in pixels.

    Attributes:
        split: One of `SPLITS`.
        index: Number of the video within its split.
        motion: Name from `MOTIONS`.
        material: Name from `MATERIALS`.
        num_frames: Frames of the file at `VIDEO_FPS`.
        radius_px: Radius of the object at energy 1.
        decay_seconds: Time constant of a contact's sound; its mark glows in proportion.
        octaves: Pitch of a contact's sound over the seconds after it, relative to `pitch_hz`.
        amplitude: Loudness of a contact's sound over the seconds after it, apart from the decay.
        energy_start: Energy at time 0, in (0, 1].
        energy_seconds: Time constant of the energy's decay.
        path_seconds: float64 [K] times of `path`, from before 0 to past the end.
        path: float64 [K, 2] place of the object's centre (x, y).
        contact_seconds: float64 [C] increasing contact times, some of them before 0.
        contact_strength: float64 [C] impact speed, relative, about 0.5 to 1.
        contact_place: float64 [C, 2] where the object is at each contact.
        picture_seed: Seed of what only the picture shows.
        sound_seed: Seed of what only the sound has.
    """

    split: str
    index: int
    motion: str
    material: str
    num_frames: int
    radius_px: float
    decay_seconds: float
    octaves: materials.Curve
    amplitude: materials.Curve
    energy_start: float
    energy_seconds: float
    path_seconds: np.ndarray
    path: np.ndarray
    contact_seconds: np.ndarray
    contact_strength: np.ndarray
    contact_place: np.ndarray
    picture_seed: np.random.SeedSequence
    sound_seed: np.random.SeedSequence

    @property
    def duration_seconds(self) -> float:
        """Length of the file."""
        return self.num_frames / VIDEO_FPS

    def energy(self, seconds: np.ndarray) -> np.ndarray:
        """Energy left at the given times; it drives size, pitch, loudness and trail."""
        return self.energy_start * np.exp(-np.asarray(seconds) / self.energy_seconds)

    def radius(self, seconds: np.ndarray) -> np.ndarray:
        """Radius in pixels at the given times: the object shrinks as it loses energy."""
        return self.radius_px * self.energy(seconds) ** 0.3

    def pitch_hz(self, seconds: np.ndarray) -> np.ndarray:
        """Fundamental of a contact at the given times, inverse to the radius."""
        return HZ_TIMES_PIXELS / self.radius(seconds)

    def place(self, seconds: np.ndarray) -> np.ndarray:
        """Place [..., 2] of the object's centre in pixels, by interpolation of the path."""
        return np.stack(
            [np.interp(seconds, self.path_seconds, self.path[:, axis]) for axis in (0, 1)], axis=-1
        )

    def speed(self) -> np.ndarray:
        """Speed [K] along the path in pixels per second."""
        step = self.path_seconds[1] - self.path_seconds[0]
        return np.hypot(*np.gradient(self.path, step, axis=0).T)


def classes_of(seed: int, split: str, index: int) -> tuple[str, str]:
    """Motion and material of a video: every block of all pairs holds each pair once.

    Args:
        seed: Seed of the collection.
        split: One of `SPLITS`.
        index: Number of the video within its split.

    Returns:
        (motion, material); any prefix of a split is balanced to within one block.
    """
    pairs = len(MOTIONS) * len(MATERIALS)
    block, place = divmod(index, pairs)
    shuffled = np.random.default_rng([seed, SPLITS.index(split), block, 1]).permutation(pairs)
    which_motion, which_material = divmod(int(shuffled[place]), len(MATERIALS))
    return MOTIONS[which_motion], MATERIALS[which_material]


def draw_scene(seed: int, split: str, index: int) -> Scene:
    """Draw the scene of one video.

    Args:
        seed: Seed of the collection.
        split: One of `SPLITS`.
        index: Number of the video within its split.

    Returns:
        The scene, a function of the three arguments only.
    """
    motion_name, material = classes_of(seed, split, index)
    motion_seed, picture_seed, sound_seed = np.random.SeedSequence(
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
    place = _draw_camera(rng)
    radius_px = float(np.exp(rng.uniform(*np.log(RADIUS_PX))))
    decay_seconds = float(np.exp(rng.uniform(*np.log(DECAY_SECONDS))))
    octaves, amplitude = materials.draw_response(rng, material, decay_seconds)
    return Scene(
        split=split,
        index=index,
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
        picture_seed=picture_seed,
        sound_seed=sound_seed,
    )


def _draw_camera(rng: np.random.Generator):
    """Random rotation, mirroring, scale and place, one per video: positions alone tell nothing."""
    angle = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    rotation[:, 0] *= rng.choice([-1.0, 1.0])
    scale = rng.uniform(11.0, 15.5)
    centre = SIZE / 2 + rng.uniform(-8.0, 8.0, size=2)

    def place(unit: np.ndarray) -> np.ndarray:
        return unit @ rotation.T * scale + centre

    return place
