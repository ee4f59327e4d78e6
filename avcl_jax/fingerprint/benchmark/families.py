"""The families of transformations and their fixed strengths: the benchmark's definition.

A strength changes a family's figures, and so the meaning of every table that was made before:
change one only together with `VERSION`.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping

import numpy as np

from avcl_jax.data.media import DecodedMedia
from avcl_jax.errors import UserError
from avcl_jax.fingerprint.benchmark import (
    audio,
    codec,
    cross_modal,
    geometry,
    overlay,
    photometry,
    timing,
)
from avcl_jax.fingerprint.benchmark.timeline import Transformed

# 2: speed_and_pitch.
VERSION = 2
STRENGTHS = ("weak", "medium", "strong")
# What is outside "all families": it shortens the query, and leaves the rest as it is.
TRUNCATION = "truncation"


@dataclasses.dataclass(frozen=True)
class Family:
    """One kind of transformation at three strengths.

    Attributes:
        name: of the family.
        group: what it belongs to in tables.
        changes: modalities it acts on, of "video" and "audio".
        strengths: strength to a function of clip and random generator (and another clip).
        needs_other: whether it takes footage of another clip.
    """

    name: str
    group: str
    changes: tuple[str, ...]
    strengths: Mapping[str, Callable[..., Transformed]]
    needs_other: bool = False

    @property
    def graded(self) -> bool:
        """Whether the strengths differ."""
        return len({id(function) for function in self.strengths.values()}) > 1


def _family(
    name: str,
    group: str,
    changes: tuple[str, ...],
    function: Callable[..., Transformed],
    *,
    needs_other: bool = False,
    **settings: tuple[object, object, object],
) -> Family:
    """A family whose settings are given for each strength, or which has none and one strength."""
    if settings:
        functions = [
            functools.partial(function, **dict(zip(settings, values, strict=True)))
            for values in zip(*settings.values(), strict=True)
        ]
    else:
        functions = [functools.partial(function)] * len(STRENGTHS)
    strengths = dict(zip(STRENGTHS, functions, strict=True))
    return Family(name, group, changes, strengths, needs_other)


_V, _A, _VA = ("video",), ("audio",), ("video", "audio")
_ALL = (
    _family("crop", "geometric", _V, geometry.crop, side=(0.9, 0.75, 0.6)),
    _family("scale", "geometric", _V, geometry.scale, factor=(0.7, 0.5, 0.3)),
    _family("flip", "geometric", _V, geometry.flip),
    _family("rotate", "geometric", _V, geometry.rotate, degrees=(4, 10, 20)),
    _family("pad", "geometric", _V, geometry.pad, side=(0.08, 0.17, 0.3)),
    _family("photometric", "photometric", _V, photometry.photometric, amount=(0.15, 0.35, 0.7)),
    _family("noise", "noise and blur", _V, photometry.noise, deviation=(10, 25, 50)),
    _family("blur", "noise and blur", _V, photometry.blur, deviation=(0.01, 0.02, 0.04)),
    _family("overlay", "overlay", _V, overlay.overlay, area=(0.04, 0.12, 0.25)),
    _family("caption", "overlay", _V, overlay.caption, height=(0.12, 0.2, 0.2), lines=(1, 1, 2)),
    _family("video_codec", "codec", _V, codec.video_codec, quality=(30, 36, 43)),
    _family("frame_rate", "temporal", _V, timing.frame_rate, every=(2, 3, 5)),
    _family("speed", "temporal", _VA, timing.speed, percent=(10, 25, 40)),
    _family(
        *("speed_and_pitch", "temporal", _VA, timing.speed_and_pitch),
        rates=((1.025, 25 / 24), (1.08,), (1.25,)),
    ),
    _family("trim", "temporal", _VA, timing.trim, kept=(0.8, 0.6, 0.4)),
    _family("splice", "temporal", _VA, timing.splice, foreign=(0.25, 0.5, 0.7), needs_other=True),
    _family("audio_noise", "audio", _A, audio.audio_noise, snr_db=(20, 10, 0)),
    _family(
        *("audio_filter", "audio", _A, audio.audio_filter),
        low_hz=(150, 300, 500),
        high_hz=(6000, 3400, 2000),
    ),
    _family("pitch", "audio", _A, audio.pitch, semitones=(0.5, 1, 2)),
    _family("tempo", "audio", _A, audio.tempo, percent=(5, 12, 25)),
    _family(
        *("audio_codec", "audio", _A, codec.audio_codec),
        codec=("aac", "libmp3lame", "libopus"),
        rate_hz=(16_000, 16_000, 8_000),
        kilobits=(32, 16, 6),
    ),
    _family(
        *("reverberation", "audio", _A, audio.reverberation),
        decay_seconds=(0.3, 0.8, 2.0),
        direct_db=(6, 0, -6),
    ),
    _family("audio_removed", "audio removed", _A, cross_modal.audio_removed),
    _family("audio_swapped", "audio swapped", _A, cross_modal.audio_swapped, needs_other=True),
    _family(TRUNCATION, TRUNCATION, _VA, timing.truncate, seconds=(5, 2, 1)),
)

FAMILIES: Mapping[str, Family] = {family.name: family for family in _ALL}


def applies(family: str, media: DecodedMedia) -> bool:
    """Whether a clip has what a family changes; otherwise its copy would be the clip itself."""
    present = {"video": media.has_video, "audio": media.has_audio}
    return any(present[modality] for modality in FAMILIES[family].changes)


def transform(
    media: DecodedMedia,
    family: str,
    strength: str,
    *,
    seed: int,
    clip: str,
    other: DecodedMedia | None,
) -> Transformed:
    """Returns a transformed copy of a clip: always the same for the same arguments.

    Args:
        media: the clip.
        family: one of `FAMILIES`.
        strength: one of `STRENGTHS`.
        seed: of the benchmark.
        clip: name of the clip, so that two clips meet different draws whatever their order.
        other: foreign footage, for the families that need it; None for the others.

    Raises:
        KeyError: if there is no such family or strength.
        UserError: if the clip has nothing that the family changes.
    """
    chosen = FAMILIES[family]
    if not applies(family, media):
        raise UserError(f"{clip} has no {' or '.join(chosen.changes)}, which {family} changes")
    change = chosen.strengths[strength]
    # Without the strength: a crop's place is the same at every strength, only its size is not.
    rng = np.random.default_rng([seed, zlib.crc32(family.encode()), zlib.crc32(clip.encode())])
    return change(media, rng, other) if chosen.needs_other else change(media, rng)
