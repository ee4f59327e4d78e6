"""Clips of the fingerprinting protocol: references, and queries made from them and from others."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from avcl_jax.data.media import DecodedMedia, MediaError, decode_media, decode_record
from avcl_jax.data.records import RecordDataset
from avcl_jax.errors import UserError
from avcl_jax.fingerprint.benchmark.families import FAMILIES, applies, transform
from avcl_jax.fingerprint.benchmark.timeline import Transformed, excerpt, without_sound
from avcl_jax.fingerprint.segments import not_empty

# Decoded files that are kept: their segments are needed as references, and for each family.
_BYTES_IN_MEMORY = 2**30
_LEAST_SIDE = 16  # pixels


@dataclasses.dataclass(frozen=True)
class SourceClip:
    """A clip that is decoded when it is needed.

    Attributes:
        name: unique in the protocol.
        video: what it was cut from: what the bootstrap resamples.
        load: decodes it.
    """

    name: str
    video: str
    load: Callable[[], DecodedMedia]


@dataclasses.dataclass(frozen=True)
class ClipSets:
    """Clips by their role; no video is in two of them.

    Attributes:
        references: what is looked for: indexed, and transformed into queries.
        fillers: indexed, and never looked for.
        distractors: transformed into queries, and not indexed.
        others: foreign footage of splices and exchanged sound, not indexed.
        background: neither indexed nor asked: what scores are normalised with.
    """

    references: Sequence[SourceClip]
    fillers: Sequence[SourceClip]
    distractors: Sequence[SourceClip]
    others: Sequence[SourceClip]
    background: Sequence[SourceClip]

    def check(self) -> None:
        """Raises UserError if a role is empty that must not be, or two roles share a video."""
        seen: dict[str, str] = {}
        for field in dataclasses.fields(self):
            clips: Sequence[SourceClip] = getattr(self, field.name)
            if not clips and field.name != "fillers":
                raise UserError(f"no clips for the {field.name} of the fingerprinting protocol")
            for video in {clip.video for clip in clips}:
                if video in seen:
                    raise UserError(f"{video} is among the {seen[video]} and the {field.name}")
                seen[video] = field.name


@dataclasses.dataclass(frozen=True)
class Query:
    """A transformed clip and the truth about it.

    Attributes:
        unit: name, unique.
        clip: it was made from.
        family: of transformations.
        strength: of the transformation.
        findable: whether its source is indexed.
        transformed: clip and time maps.
    """

    unit: str
    clip: SourceClip
    family: str
    strength: str
    findable: bool
    transformed: Transformed

    def is_offset(self, offset_seconds: float, tolerance_seconds: float) -> bool:
        """Whether an offset is right for the pictures or for the sound."""
        return any(
            times.has_offset(offset_seconds, tolerance_seconds)
            for times in (self.transformed.picture_time, self.transformed.sound_time)
        )


def not_empty_clips(
    clips: Sequence[SourceClip], unused: dict[str, str]
) -> Iterator[tuple[str, DecodedMedia]]:
    """Yields clips with something to compare, by name.

    Args:
        clips: to decode.
        unused: takes the names of the others, and why.
    """
    for clip in clips:
        media = clip.load()
        if not_empty(media):
            yield clip.name, media
        else:
            unused[clip.name] = "silent and of one colour: there is nothing to compare"


def clips_of_records(records: RecordDataset, count: int, first: int) -> list[SourceClip]:
    """Returns clips of a prepared data set, in its order.

    Args:
        records: the data set.
        count: how many.
        first: number of the first record.

    Raises:
        UserError: if it has fewer.
    """
    last = first + count
    if last > len(records):
        raise UserError(
            f"{len(records)} records are prepared ({records.fingerprint}), the protocol needs "
            f"{last}: ask for fewer references or distractors"
        )

    def load(index: int) -> DecodedMedia:
        return decode_record(records[index])

    return [
        SourceClip(
            records.record_ids[i],
            # The index of the records has only numbers of sources; reading names is slow.
            f"{records.split}/{records.source_numbers[i]:07d}",
            functools.partial(load, i),
        )
        for i in range(first, last)
    ]


def segments_of_files(
    paths: Sequence[Path],
    *,
    segment_seconds: float,
    short_side: int,
    max_fps: float,
    sample_rate_hz: int,
) -> tuple[list[SourceClip], dict[str, str]]:
    """Cuts media files into segments, one after the other.

    Args:
        paths: of the files.
        segment_seconds: length of each; what is left at the end is not used.
        short_side: of the pictures.
        max_fps: of the pictures.
        sample_rate_hz: of the sound.

    Returns:
        Segments, and why each file that gives none does not.
    """
    segments: list[SourceClip] = []
    unused: dict[str, str] = {}
    decode = functools.partial(
        decode_media, short_side=short_side, max_fps=max_fps, sample_rate_hz=sample_rate_hz
    )

    kept: dict[Path, DecodedMedia] = {}  # the least recently used first

    # Whole: decoding that begins in the middle of a file refuses some that are not damaged.
    def whole(path: Path) -> DecodedMedia:
        kept[path] = media = kept.pop(path) if path in kept else decode(path)
        while len(kept) > 1 and sum(map(_num_bytes, kept.values())) > _BYTES_IN_MEMORY:
            del kept[next(iter(kept))]
        return media

    def load(path: Path, begin: float) -> DecodedMedia:
        part = excerpt(whole(path), begin, begin + segment_seconds)
        return part if "audio" in not_empty(part) else without_sound(part)

    for path in paths:
        try:
            media = whole(path)
        except MediaError as error:
            unused[path.name] = str(error)
            continue
        count = int(media.duration_seconds / segment_seconds + 1e-3)
        if media.has_video and min(media.frames.shape[1:3]) < _LEAST_SIDE:
            unused[path.name] = f"pictures of {media.frames.shape[2]}x{media.frames.shape[1]}"
            continue
        if not count:
            unused[path.name] = f"{media.duration_seconds:.1f} s are shorter than a segment"
        for number in range(count):
            begin = number * segment_seconds
            name = f"{path.name}@{begin:g}s"
            segments.append(SourceClip(name, path.name, functools.partial(load, path, begin)))
    return segments, unused


def _num_bytes(media: DecodedMedia) -> int:
    return media.frames.nbytes + media.waveform.nbytes


def make_queries(
    clips: ClipSets, counts: Mapping[str, int], families: Sequence[str], *, seed: int
) -> Iterator[Query]:
    """Yields transformed references, and as many transformed distractors.

    Every family takes its clips anew, so that all references are asked for although each family
    asks for some; distractors are repeated where there are fewer.

    Args:
        clips: by role.
        counts: strength to number of references each family asks for, at most.
        families: names.
        seed: of the choice and of the transformations.
    """
    for family in families:
        rng = np.random.default_rng([seed, zlib.crc32(family.encode())])
        most = max(counts.values())
        usable = list(itertools.islice(_with(family, clips.references, rng), most))
        foreign = list(itertools.islice(_with(family, clips.distractors, rng), most))
        if usable and not foreign:
            raise UserError(f"no distractor has what {family} changes")
        strengths = counts if FAMILIES[family].graded else {"medium": counts["medium"]}
        for strength, count in strengths.items():
            for number, clip in enumerate(usable[:count]):
                pair = ((clip, True), (foreign[number % len(foreign)], False))
                for chosen, findable in pair:
                    # A distractor that comes again is transformed anew.
                    name = chosen.name if findable else f"{chosen.name}#{number}"
                    yield Query(
                        unit=f"{family}/{strength}/{name}",
                        clip=chosen,
                        family=family,
                        strength=strength,
                        findable=findable,
                        transformed=transform(
                            chosen.load(),
                            family,
                            strength,
                            seed=seed,
                            clip=name,
                            other=_other(family, clips.others, number),
                        ),
                    )


def _with(
    family: str, clips: Sequence[SourceClip], rng: np.random.Generator
) -> Iterator[SourceClip]:
    """Yields, in random order, the clips that have what a family changes."""
    return (
        clip
        for clip in (clips[i] for i in rng.permutation(len(clips)))
        if applies(family, clip.load())
    )


def _other(family: str, others: Sequence[SourceClip], number: int) -> DecodedMedia | None:
    """Returns foreign footage for the families that need it."""
    if not FAMILIES[family].needs_other:
        return None
    return others[(zlib.crc32(family.encode()) + number) % len(others)].load()


def sounds_of_files(
    paths: Sequence[Path], counts: Mapping[str, int], *, sample_rate_hz: int
) -> dict[str, list[SourceClip]]:
    """Returns sounds of an ESC folder (FOLD-SOURCE-TAKE-TARGET.ogg) by role.

    Takes of one recording stay in one role.

    Args:
        paths: of the files.
        counts: role to number of recordings, each with its first take.
        sample_rate_hz: to decode to.

    Raises:
        UserError: if there are fewer recordings.
    """
    first_takes: dict[str, Path] = {}
    for path in paths:
        first_takes.setdefault("-".join(path.stem.split("-")[:2]), path)
    needed = sum(counts.values())
    if needed > len(first_takes):
        raise UserError(f"{needed} sounds are needed, there are {len(first_takes)} recordings")
    # Neighbours in the folder's order are of one fold: every role takes from all folds.
    order = np.random.default_rng(0).permutation(sorted(first_takes)).tolist()
    load = functools.partial(
        decode_media, short_side=None, max_fps=None, sample_rate_hz=sample_rate_hz
    )
    names = iter(order)
    return {
        role: [
            SourceClip(first_takes[name].name, name, functools.partial(load, first_takes[name]))
            for name in itertools.islice(names, count)
        ]
        for role, count in counts.items()
    }
