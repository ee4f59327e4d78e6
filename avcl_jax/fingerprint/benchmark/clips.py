"""Clips of the fingerprinting protocol: references, and queries made from them and from others."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from avcl_jax.data.media import DecodedMedia, MediaError, decode_media, decode_record
from avcl_jax.data.records import RecordDataset
from avcl_jax.errors import UserError
from avcl_jax.fingerprint.benchmark.families import FAMILIES, modalities_of, transform
from avcl_jax.fingerprint.benchmark.timeline import Transformed, excerpt, without_audio
from avcl_jax.fingerprint.segments import not_empty

# Decoded files in memory: their segments are needed as references, and for each family.
_BYTES = 2**30
_LEAST_SIDE = 16  # pixels


@dataclasses.dataclass(frozen=True)
class SourceClip:
    """A clip of a video, decoded when it is needed; its name is unique in the protocol."""

    name: str
    video: str
    load: Callable[[], DecodedMedia]


@dataclasses.dataclass(frozen=True)
class ClipSets:
    """Clips by their role; no video is in two of them."""

    references: Sequence[SourceClip]  # indexed, and transformed into queries
    fillers: Sequence[SourceClip]  # indexed only
    distractors: Sequence[SourceClip]  # transformed into queries only
    others: Sequence[SourceClip]  # foreign footage of splices and exchanged audio
    background: Sequence[SourceClip]  # to normalise scores with

    def __post_init__(self) -> None:
        """Raises UserError if a role is empty that must not be, or two roles share a video."""
        roles: dict[str, str] = {}
        for field in dataclasses.fields(self):
            clips: Sequence[SourceClip] = getattr(self, field.name)
            if not clips and field.name != "fillers":
                raise UserError(f"no clips for the {field.name} of the fingerprinting protocol")
            for video in {clip.video for clip in clips}:
                if video in roles:
                    raise UserError(f"{video} is among the {roles[video]} and the {field.name}")
                roles[video] = field.name


@dataclasses.dataclass(frozen=True)
class Query:
    """A transformed clip of a unique name; `findable` if the original is indexed."""

    unit: str
    clip: SourceClip
    family: str
    strength: str
    findable: bool
    transformed: Transformed


def make_queries(
    clips: ClipSets, counts: Mapping[str, int], families: Sequence[str], *, seed: int
) -> Iterator[Query]:
    """Yields transformed references, and as many transformed distractors.

    Every family draws clips of its own, so that together they use all references although each uses
    at most `counts` by strength. Distractors are repeated where there are fewer.

    Raises:
        UserError: if no distractor has a modality that a family changes.
    """
    pools = (clips.references, clips.distractors)
    modalities = {clip.name: modalities_of(clip.load()) for pool in pools for clip in pool}
    for family in families:
        changes = FAMILIES[family].changes
        rng = np.random.default_rng([seed, zlib.crc32(family.encode())])
        drawn = ([pool[n] for n in rng.permutation(len(pool))] for pool in pools)
        references, distractors = (
            [clip for clip in pool if changes & modalities[clip.name]] for pool in drawn
        )
        if references and not distractors:
            raise UserError(f"no distractor has what {family} changes")
        strengths = counts if FAMILIES[family].settings else {"medium": counts["medium"]}
        for strength, count in strengths.items():
            for number, reference in enumerate(references[:count]):
                distractor = distractors[number % len(distractors)]
                other = None
                if FAMILIES[family].needs_other:
                    place = zlib.crc32(family.encode()) + number
                    other = clips.others[place % len(clips.others)].load()
                # A repeated distractor has another name, by which it is transformed otherwise.
                for clip, name in (
                    (reference, reference.name),
                    (distractor, f"{distractor.name}#{number}"),
                ):
                    transformed = transform(
                        clip.load(), family, strength, seed=seed, clip=name, other=other
                    )
                    unit = f"{family}/{strength}/{name}"
                    yield Query(unit, clip, family, strength, clip is reference, transformed)


def not_empty_clips(
    clips: Sequence[SourceClip], unused: dict[str, str]
) -> Iterator[tuple[str, DecodedMedia]]:
    """Yields name and media of each clip with something to compare; adds the others to `unused`."""
    for clip in clips:
        media = clip.load()
        if not_empty(media):
            yield clip.name, media
        else:
            unused[clip.name] = "silent and of one colour: there is nothing to compare"


def clips_of_records(records: RecordDataset) -> list[SourceClip]:
    """Returns the clips of a prepared data set, without reading them."""

    def load(index: int) -> DecodedMedia:
        return decode_record(records[index])

    # The index of the records has only numbers of sources; reading names is slow.
    videos = (f"{records.split}/{number:07d}" for number in records.source_numbers)
    return [
        SourceClip(name, video, functools.partial(load, n))
        for n, (name, video) in enumerate(zip(records.record_ids, videos, strict=True))
    ]


def recordings_of_files(paths: Sequence[Path], *, sample_rate_hz: int) -> list[SourceClip]:
    """Returns the first take of each recording of an ESC folder (FOLD-SOURCE-TAKE-TARGET.ogg)."""
    takes: dict[str, Path] = {}
    for path in paths:
        takes.setdefault("-".join(path.stem.split("-")[:2]), path)
    # Neighbours in the folder's order are of one fold: every role draws from all folds.
    names = np.random.default_rng(0).permutation(sorted(takes)).tolist()
    load = functools.partial(
        decode_media, short_side=None, max_fps=None, sample_rate_hz=sample_rate_hz
    )
    return [SourceClip(takes[n].name, n, functools.partial(load, takes[n])) for n in names]


def by_role(
    clips: Sequence[SourceClip], counts: Mapping[str, int], what: str
) -> dict[str, list[SourceClip]]:
    """Deals clips out in their order, as many as `counts`; UserError if there are fewer."""
    needed = sum(counts.values())
    if needed > len(clips):
        raise UserError(
            f"the protocol needs {needed} {what}, only {len(clips)} can be found: ask for fewer "
            "references or distractors"
        )
    rest = iter(clips)
    return {role: list(itertools.islice(rest, count)) for role, count in counts.items()}


def segments_of_files(
    paths: Sequence[Path], *, segment_seconds: float, **decoding: Any
) -> tuple[list[SourceClip], dict[str, str]]:
    """Cuts files into segments, one after the other, decoded by arguments of `decode_media`.

    Returns segments, and the reason of each file without one; a shorter rest is not used.
    """
    segments: list[SourceClip] = []
    unused: dict[str, str] = {}
    cache: dict[Path, DecodedMedia] = {}  # the least recently used first

    # Whole: decoding that begins in the middle of a file refuses some that are not damaged.
    def decode(path: Path) -> DecodedMedia:
        media = cache.pop(path) if path in cache else decode_media(path, **decoding)
        cache[path] = media
        kept = cache.values()
        while len(cache) > 1 and sum(m.frames.nbytes + m.waveform.nbytes for m in kept) > _BYTES:
            del cache[next(iter(cache))]
        return media

    def load(path: Path, begin: float) -> DecodedMedia:
        part = excerpt(decode(path), begin, begin + segment_seconds)
        return part if "audio" in not_empty(part) else without_audio(part)

    for path in paths:
        try:
            media = decode(path)
        except MediaError as error:
            unused[path.name] = str(error)
            continue
        count = int(media.duration_seconds / segment_seconds + 1e-3)
        if media.has_video and min(media.frames.shape[1:3]) < _LEAST_SIDE:
            unused[path.name] = f"frames of {media.frames.shape[2]}x{media.frames.shape[1]}"
            continue
        if not count:
            unused[path.name] = f"{media.duration_seconds:.1f} s are shorter than a segment"
        for begin in (number * segment_seconds for number in range(count)):
            name = f"{path.name}@{begin:g}s"
            segments.append(SourceClip(name, path.name, functools.partial(load, path, begin)))
    return segments, unused
