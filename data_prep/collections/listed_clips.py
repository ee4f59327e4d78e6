"""From what a collection's lists name to the manifest of what is there and what is missing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from avcl_jax.data.record_format import ClassNumbers
from data_prep.collections.media_files import MediaFiles
from data_prep.manifest import Entry, Manifest, Missing, PrepareError, check_manifest


@dataclasses.dataclass(frozen=True)
class ListedClip:
    """One clip that a list names.

    Attributes:
      where: File and line of the list.
      record_id: Unique within the collection.
      source_id: What the clip was cut from.
      split: Split the record goes to.
      labels: As in `Entry`.
      expected: The usual name of its file.
      clip_names: What a file may be called, without suffix, that is this clip.
      film_names: What a file may be called that has to be cut first.
      start_seconds: Where the clip starts in such a file.
      end_seconds: Where it ends there.
    """

    where: str
    record_id: str
    source_id: str
    split: str
    labels: Mapping[str, ClassNumbers]
    expected: str
    clip_names: Sequence[str]
    film_names: Sequence[str] = ()
    start_seconds: float = 0.0
    end_seconds: float | None = None


def find_clips(
    clips: Iterable[ListedClip],
    files: MediaFiles,
    *,
    class_names: Mapping[str, Sequence[str]],
    multilabel: Iterable[str] = (),
) -> Manifest:
    """Returns the clips that are there, in the order of the lists, and those that are not.

    Raises:
      PrepareError: If a clip is listed twice, or nothing is listed.
    """
    entries: list[Entry] = []
    missing: list[Missing] = []
    listed, whole, used = set(), set(), set()
    for clip in clips:
        if clip.record_id in listed:
            raise PrepareError(
                f"{clip.where}: the clip {clip.record_id!r} is listed a second time: leave one out"
            )
        listed.add(clip.record_id)
        start, end = 0.0, None
        path = files.find(clip.clip_names)
        if path is not None:
            if path in whole:
                raise PrepareError(
                    f"{clip.where}: {path} would be this clip and an earlier one: name the files "
                    f"by start and end, such as {clip.expected}"
                )
            whole.add(path)
        else:
            path = files.find(clip.film_names)
            start, end = clip.start_seconds, clip.end_seconds
        if path is None:
            missing.append(Missing(clip.record_id, clip.split, clip.expected))
            continue
        used.add(path)
        entries.append(
            Entry(path, clip.split, clip.record_id, clip.source_id, start, end, clip.labels)
        )
    if not listed:
        raise PrepareError("the lists name no clips")
    return check_manifest(
        Manifest(
            tuple(entries),
            {label: tuple(names) for label, names in class_names.items()},
            frozenset(multilabel),
            tuple(missing),
            ignored=files.count - len(used),
        )
    )
