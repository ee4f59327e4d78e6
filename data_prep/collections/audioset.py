"""AudioSet: 10 s of YouTube videos, each with several of 527 sound classes.

Nothing is downloaded. The official lists come from https://research.google.com/audioset/download.html

  http://storage.googleapis.com/us_audioset/youtube_corpus/v1/csv/balanced_train_segments.csv
  http://storage.googleapis.com/us_audioset/youtube_corpus/v1/csv/unbalanced_train_segments.csv
  http://storage.googleapis.com/us_audioset/youtube_corpus/v1/csv/eval_segments.csv
  http://storage.googleapis.com/us_audioset/youtube_corpus/v1/csv/class_labels_indices.csv

--lists takes the segments (lines of YTID, start_seconds, end_seconds, "mid,mid"); --classes-from
takes class_labels_indices.csv (index,mid,display_name).

Files, sound or video, are found by name, in any folder below MEDIA and with any suffix of media
files. Used whole, as they are clips already:

  ID_000030_000040.mp4     six digits
  ID_30000_40000.flac      milliseconds: audiosetdl
  ID_30.0-40.0.ogg         audioset-download
  ID_30_40, ID_30.000_40.000, ID_30, ID_30.000    audioset-processing and others
  YID.wav                  PANNs (audioset_tagging_cnn)
  id_ID.m4a                Fast-Audioset-Download

and ID.mp4 is the whole video, cut from start to end, or a clip with --already-cut. Where sound and
video lie side by side under one name, the video is taken.

The split is the list's name: balanced_train, unbalanced_train or eval; --split gives all lists
another one, such as train. The label "class" has the display names of the ontology in the order of
class_labels_indices.csv, and a clip may have several. A class that this file does not name is an
error. source_id is the YouTube id. The temporally strong lists (TSV) are not read.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator

from etils import epath

from avcl_jax.paths import absolute_path
from data_prep.collections import youtube
from data_prep.collections.listed_clips import ListedClip, find_clips
from data_prep.collections.lists import csv_rows, interval, number_of, table_rows
from data_prep.collections.media_files import MediaFiles
from data_prep.manifest import Manifest, PrepareError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares where the files and the lists are."""
    youtube.add_arguments(parser, media="MEDIA", lists="official lists: ..._segments.csv")
    parser.add_argument(
        "--classes-from",
        metavar="CSV",
        type=absolute_path,
        required=True,
        help="class_labels_indices.csv: the classes, in their order",
    )
    parser.add_argument("--split", help="of all lists, instead of one by each list's name")


def read(args: argparse.Namespace) -> Manifest:
    """Reads the lists and finds their clips.

    Raises:
      PrepareError: If a list is wrong, or the folder cannot be searched.
    """
    numbers, names = _classes(args.classes_from)
    clips = (
        clip
        for path in args.lists
        for clip in _clips(
            path, args.split or _split(path), numbers, args.classes_from, args.already_cut
        )
    )
    return find_clips(
        clips, MediaFiles(args.folder), class_names={"class": names}, multilabel=("class",)
    )


def _classes(path: epath.Path) -> tuple[dict[str, int], tuple[str, ...]]:
    """Returns the number of each machine id, and the display names in their order."""
    numbers: dict[str, int] = {}
    names: dict[str, None] = {}
    for where, row in table_rows(path, required=("index", "mid", "display_name")):
        if row["index"] != str(len(numbers)):
            raise PrepareError(f"{where}: index {row['index']!r}, expected {len(numbers)}")
        if row["mid"] in numbers or row["display_name"] in names:
            raise PrepareError(f"{where}: {row['mid']} {row['display_name']!r} comes twice")
        numbers[row["mid"]] = len(numbers)
        names[row["display_name"]] = None
    if not numbers:
        raise PrepareError(f"{path} names no classes")
    return numbers, tuple(names)


def _split(path: epath.Path) -> str:
    named = re.match(r"balanced_train|unbalanced_train|eval", path.name)
    if named is None:
        raise PrepareError(
            f"{path}: no split follows from this name (balanced_train..., unbalanced_train..., "
            "eval...): give --split"
        )
    return named[0]


def _clips(
    path: epath.Path,
    split: str,
    numbers: dict[str, int],
    classes_from: epath.Path,
    already_cut: bool,
) -> Iterator[ListedClip]:
    for where, (video, first, last, mids) in csv_rows(path, columns=(4,)):
        start, end = interval(where, first, last)
        if not video:
            raise PrepareError(f"{where}: no YTID")
        classes = {number_of(where, mid, numbers, classes_from) for mid in mids.split(",")}
        names = youtube.clip_names(video, start, end)
        yield ListedClip(
            where=where,
            record_id=names[0],
            source_id=video,
            split=split,
            labels={"class": tuple(sorted(classes))},
            expected=f"{names[0]}.mp4",
            clip_names=(*names, f"Y{video}", f"id_{video}", *([video] if already_cut else [])),
            film_names=(video,),
            start_seconds=start,
            end_seconds=end,
        )
