"""Clips that a collection's lists name: the files in a folder, and the clips that are missing.

Kinetics, VGG-Sound and AudioSet list clips of YouTube videos; UCF101 and HMDB51 list videos with
one class and three official splits. Collections have up to two million files: asking the file
system for each name that a list implies takes hours on network storage, one listing of the folders
takes minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from avcl_jax.data.media_files import AUDIO_SUFFIXES, MEDIA_SUFFIXES, walk
from avcl_jax.data.record_format import UNKNOWN_LABEL, ClassNumbers
from avcl_jax.data_prep.manifest import Entry, Manifest, Missing, PrepareError
from avcl_jax.paths import absolute_path

SPLITS = ("split1", "split2", "split3")


def _media_files(folder: epath.Path, key: Callable[[str], str]) -> tuple[dict[str, str], int]:
    """Returns paths of media files, by key of their names without suffix, and number of all files.

    Of files with one name, those with video come first, then the first in the order of paths.
    """

    def preference(path: str) -> tuple[bool, bytes]:
        return os.path.splitext(path)[1].lower() in AUDIO_SUFFIXES, os.fsencode(path)

    paths: dict[str, str] = {}
    count = 0
    for directory, files in walk(folder):
        count += len(files)
        for name in files:
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in MEDIA_SUFFIXES:
                path = os.path.join(directory, name)
                paths[key(stem)] = min(path, paths.get(key(stem), path), key=preference)
    return paths, count


@dataclasses.dataclass(frozen=True)
class ListedClip:
    """One clip that a list names; see `Entry`."""

    where: str  # file and line of the list
    record_id: str
    source_id: str
    split: str
    labels: Mapping[str, ClassNumbers]
    expected: str  # usual name of its file
    clip_names: Sequence[str]  # names without suffix of files that are this clip
    video_names: Sequence[str] = ()  # of files that have to be cut from start to end
    start_seconds: float = 0.0
    end_seconds: float | None = None


def find_clips(
    clips: Iterable[ListedClip],
    folder: epath.Path,
    class_names: Mapping[str, Sequence[str]],
    *,
    multilabel: Iterable[str] = (),
    ignore_case: bool = False,
) -> Manifest:
    """Returns the clips that have files, in the order of the lists, and those that do not.

    Raises PrepareError if a clip is listed twice, or nothing is listed.
    """
    entries: list[Entry] = []
    missing: list[Missing] = []
    listed, whole, used = set(), set(), set()
    key = str.casefold if ignore_case else str
    paths, count = _media_files(folder, key)

    def find(names: Sequence[str]) -> str | None:
        return next((paths[key(name)] for name in names if key(name) in paths), None)

    for clip in clips:
        if clip.record_id in listed:
            raise PrepareError(
                f"{clip.where}: the clip {clip.record_id!r} is listed a second time: leave one out"
            )
        listed.add(clip.record_id)
        start, end = 0.0, None
        path = find(clip.clip_names)
        if path in whole:
            raise PrepareError(
                f"{clip.where}: {path} would be this clip and an earlier one: name the files "
                f"by start and end, such as {clip.expected}"
            )
        if path is not None:
            whole.add(path)
        else:
            path = find(clip.video_names)
            start, end = clip.start_seconds, clip.end_seconds
        if path is None:
            missing.append(Missing(clip.record_id, clip.split, clip.expected))
        else:
            used.add(path)
            ids = (clip.record_id, clip.source_id)
            entries.append(Entry(path, clip.split, *ids, start, end, clip.labels))
    if not listed:
        raise PrepareError("the lists name no clips")
    names = {label: tuple(names) for label, names in class_names.items()}
    several, ignored = frozenset(multilabel), count - len(used)
    return Manifest(tuple(entries), names, several, tuple(missing), ignored)


def add_youtube_arguments(
    parser: argparse.ArgumentParser, *, media: str, lists: str, classes: str, required: bool = False
) -> None:
    """Declares the folder `media`, and lists of clips and of classes with their help."""
    add = parser.add_argument
    add("folder", metavar=media, type=absolute_path, help="folder, searched recursively")
    path: dict[str, Any] = {"metavar": "CSV", "type": absolute_path}
    add("--lists", **path, nargs="+", required=True, help=lists)
    already_cut = "a file named by the id alone, ID.mp4, is the clip and not the whole video"
    add("--already-cut", action="store_true", help=already_cut)
    add("--classes-from", **path, required=required, help=classes)


def youtube_clip(
    where: str,
    video: str,
    interval: tuple[float, float],
    split: str,
    labels: Mapping[str, ClassNumbers],
    *,
    already_cut: bool,
    record_id: str = "",
    more_names: tuple[str, ...] = (),
) -> ListedClip:
    """Returns the clip of an interval of a video, in seconds, with all names of its files.

    A record without id is called by the usual name of the file.
    """
    names = clip_names(video, *interval)
    record_id = record_id or names[0]
    names = (*names, *more_names, *([video] if already_cut else []))
    described = (where, record_id, video, split, labels, f"{record_id}.mp4")
    return ListedClip(*described, names, (video,), *interval)


def clip_names(video: str, start: float, end: float) -> tuple[str, ...]:
    """Returns the names that common downloaders give to a clip of a video, without suffix.

    Looked up whole, never taken apart: ids contain underscores, hyphens and digits themselves.
    """
    plain_start, plain_end = f"{start:.10g}", f"{end:.10g}"
    return (
        f"{video}_{six_digits(start)}_{six_digits(end)}",  # ActivityNet's crawler, CVDF
        f"{video}_{round(start * 1000)}_{round(end * 1000)}",  # audiosetdl: milliseconds
        f"{video}_{plain_start}_{plain_end}",
        f"{video}_{start:.1f}_{end:.1f}",
        f"{video}_{start:.1f}-{end:.1f}",  # audioset-download
        f"{video}_{start:.3f}_{end:.3f}",  # as AudioSet's lists write the times
        f"{video}_{six_digits(start)}",  # VGG-Sound's test.csv
        f"{video}_{plain_start}",
        f"{video}_{start:.3f}",  # audioset-processing
    )


def six_digits(seconds: float) -> str:
    """Formats a time for file names: 000417, or 000417.500 where there is a fraction."""
    return f"{int(seconds):06d}" if seconds == int(seconds) else f"{seconds:010.3f}"


def add_official_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the folders of the videos and the lists."""
    add, lists = parser.add_argument, "folder of the official lists"
    add("folder", metavar="VIDEOS", type=absolute_path, help="folder, searched recursively")
    add("--lists", metavar="DIR", type=absolute_path, required=True, help=lists)


def find_videos(
    rows: Iterable[tuple[str, str, str, str, int, int]],
    folder: epath.Path,
    classes: Sequence[str],
    parts: Sequence[str],
    *,
    ignore_case: bool = False,
) -> Manifest:
    """Returns one clip per video, of the split "all", with its class and its part of each split.

    Rows have the place in the lists, split, video, source, number of the class, number of the part;
    parts are, for instance, train and test.
    """
    clips: dict[str, ListedClip] = {}
    labels: dict[str, dict[str, int]] = {}
    for where, split, video, source, number, part in rows:
        unknown = dict.fromkeys(SPLITS, UNKNOWN_LABEL)
        of_video = labels.setdefault(video, {"class": number} | unknown)
        if of_video[split] != UNKNOWN_LABEL or of_video["class"] != number:
            raise PrepareError(f"{where}: {video!r} comes twice in {split}, or is of two classes")
        of_video[split] = part
        clip = ListedClip(where, video, source, "all", of_video, f"{video}.avi", (video,))
        clips.setdefault(video, clip)
    class_names = {"class": classes} | dict.fromkeys(SPLITS, parts)
    return find_clips(clips.values(), folder, class_names, ignore_case=ignore_case)
