"""The families of transformations and their fixed strengths: the benchmark's definition.

A strength changes a family's metrics, and so the meaning of every table that was made before:
change one only together with `VERSION`.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import numpy as np

from avcl_jax.data.media import DecodedMedia
from avcl_jax.errors import UserError
from avcl_jax.fingerprint.benchmark import audio, timeline, video
from avcl_jax.fingerprint.benchmark.timeline import Transformed

# Version of the protocol. 2: speed_and_pitch. 3: R@5 and µAP take ties at their cut in the worst
# order too.
VERSION = 3
STRENGTHS = ("weak", "medium", "strong")
# Not in the mean over families: it shortens the query, and leaves the rest as it is.
TRUNCATION = "truncation"


@dataclasses.dataclass(frozen=True)
class Family:
    """One kind of transformation at three strengths."""

    changes: Set[str]  # modalities
    # Of a clip, a random generator, another clip if it needs one, and settings.
    function: Callable[..., Transformed]
    # Name -> values at the three strengths; empty if they do not differ.
    settings: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    needs_other: bool = False


_V, _A = frozenset({"video"}), frozenset({"audio"})
_VA = _V | _A
FAMILIES: Mapping[str, Family] = {
    "crop": Family(_V, video.crop, {"side": (0.9, 0.75, 0.6)}),
    "scale": Family(_V, video.scale, {"factor": (0.7, 0.5, 0.3)}),
    "flip": Family(_V, video.flip),
    "rotate": Family(_V, video.rotate, {"degrees": (4, 10, 20)}),
    "pad": Family(_V, video.pad, {"side": (0.08, 0.17, 0.3)}),
    "photometric": Family(_V, video.photometric, {"amount": (0.15, 0.35, 0.7)}),
    "noise": Family(_V, video.noise, {"deviation": (10, 25, 50)}),
    "blur": Family(_V, video.blur, {"deviation": (0.01, 0.02, 0.04)}),
    "overlay": Family(_V, video.overlay, {"area": (0.04, 0.12, 0.25)}),
    "caption": Family(_V, video.caption, {"height": (0.12, 0.2, 0.2), "lines": (1, 1, 2)}),
    "video_codec": Family(_V, video.video_codec, {"quality": (30, 36, 43)}),
    "frame_rate": Family(_V, video.frame_rate, {"every": (2, 3, 5)}),
    "speed": Family(_VA, timeline.speed, {"percent": (10, 25, 40)}),
    "speed_and_pitch": Family(
        _VA, timeline.speed_and_pitch, {"rates": ((1.025, 25 / 24), (1.08,), (1.25,))}
    ),
    "trim": Family(_VA, timeline.trim, {"kept": (0.8, 0.6, 0.4)}),
    "splice": Family(_VA, timeline.splice, {"foreign": (0.25, 0.5, 0.7)}, needs_other=True),
    "audio_noise": Family(_A, audio.audio_noise, {"snr_db": (20, 10, 0)}),
    "audio_filter": Family(
        _A, audio.audio_filter, {"low_hz": (150, 300, 500), "high_hz": (6000, 3400, 2000)}
    ),
    "pitch": Family(_A, audio.pitch, {"semitones": (0.5, 1, 2)}),
    "tempo": Family(_A, audio.tempo, {"percent": (5, 12, 25)}),
    "audio_codec": Family(
        _A,
        audio.audio_codec,
        {
            "codec": ("aac", "libmp3lame", "libopus"),
            "rate_hz": (16_000, 16_000, 8_000),
            "kilobits": (32, 16, 6),
        },
    ),
    "reverberation": Family(
        _A, audio.reverberation, {"decay_seconds": (0.3, 0.8, 2.0), "direct_db": (6, 0, -6)}
    ),
    "audio_removed": Family(_A, audio.audio_removed),
    "audio_swapped": Family(_A, audio.audio_swapped, needs_other=True),
    TRUNCATION: Family(_VA, timeline.truncate, {"seconds": (5, 2, 1)}),
}


def modalities_of(media: DecodedMedia) -> Set[str]:
    """Returns the modalities that a clip has."""
    return (_V if media.has_video else set()) | (_A if media.has_audio else set())


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
        clip: name of the clip, so that draws do not depend on the order of clips.
        other: foreign footage, for the families that need it.

    Raises:
        UserError: if the clip has no modality that the family changes; its copy would be itself.
    """
    chosen = FAMILIES[family]
    if not chosen.changes & modalities_of(media):
        raise UserError(
            f"{clip} has no {' or '.join(sorted(chosen.changes))}, which {family} changes"
        )
    place = STRENGTHS.index(strength)
    settings = {name: values[place] for name, values in chosen.settings.items()}
    # Without the strength: a crop's place is the same at every strength, only its size is not.
    rng = np.random.default_rng([seed, zlib.crc32(family.encode()), zlib.crc32(clip.encode())])
    return chosen.function(media, rng, *((other,) if chosen.needs_other else ()), **settings)
