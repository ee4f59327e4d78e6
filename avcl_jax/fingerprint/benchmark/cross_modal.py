"""What happens to the sound as a whole: it is removed, or replaced by another clip's."""

from __future__ import annotations

import dataclasses

import numpy as np

from avcl_jax.data.media import DecodedMedia
from avcl_jax.fingerprint.benchmark.timeline import TimeMap, Transformed, without_sound
from avcl_jax.fingerprint.benchmark.timing import as_footage_of


def audio_removed(media: DecodedMedia, rng: np.random.Generator) -> Transformed:
    """Removes the sound."""
    return Transformed(
        without_sound(media), TimeMap.identity(media.duration_seconds), TimeMap.foreign()
    )


def audio_swapped(
    media: DecodedMedia, rng: np.random.Generator, other: DecodedMedia
) -> Transformed:
    """Replaces the sound by that of another clip.

    Args:
        media: the clip.
        rng: not used.
        other: the clip whose sound is heard; repeated if it is too short.
    """
    foreign = as_footage_of(other, media)
    dubbed = dataclasses.replace(media, waveform=foreign.waveform, audio_start_seconds=0.0)
    return Transformed(dubbed, TimeMap.identity(media.duration_seconds), TimeMap.foreign())
