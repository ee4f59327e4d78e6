"""AudioSet: 10 s of YouTube videos, each with several of 527 audio classes.

Nothing is downloaded. The official lists come from https://research.google.com/audioset/download.html

  http://storage.googleapis.com/us_audioset/youtube_corpus/v1/csv/balanced_train_segments.csv
  http://storage.googleapis.com/us_audioset/youtube_corpus/v1/csv/unbalanced_train_segments.csv
  http://storage.googleapis.com/us_audioset/youtube_corpus/v1/csv/eval_segments.csv
  http://storage.googleapis.com/us_audioset/youtube_corpus/v1/csv/class_labels_indices.csv

--lists takes the segments (lines of YTID, start_seconds, end_seconds, "mid,mid"); --classes-from
takes class_labels_indices.csv (index,mid,display_name).

Files, audio or video, are found by name, in any folder below MEDIA and with any suffix of media
files. Used whole, as they are clips already:

  ID_000030_000040.mp4     six digits
  ID_30000_40000.flac      milliseconds: audiosetdl
  ID_30.0-40.0.ogg         audioset-download
  ID_30_40, ID_30.000_40.000, ID_30, ID_30.000    audioset-processing and others
  YID.wav                  PANNs (audioset_tagging_cnn)
  id_ID.m4a                Fast-Audioset-Download

and ID.mp4 is the whole video, cut from start to end, or a clip with --already-cut. Where audio and
video have one name, the video is taken.

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

from avcl_jax.data_prep.collections import listed_clips
from avcl_jax.data_prep.collections.lists import csv_rows, interval, number_of, table_rows
from avcl_jax.data_prep.manifest import Manifest, PrepareError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the folder of the files and the lists."""
    listed_clips.add_youtube_arguments(
        parser,
        media="MEDIA",
        lists="official lists: ..._segments.csv",
        classes="class_labels_indices.csv: the classes, in their order",
        required=True,
    )
    parser.add_argument("--split", help="split of all lists, instead of one by each list's name")


def read(args: argparse.Namespace) -> Manifest:
    """Reads the lists and finds their clips; raises PrepareError for a wrong list."""
    numbers, names = _classes(args.classes_from)

    def clips() -> Iterator[listed_clips.ListedClip]:
        for path in args.lists:
            split = args.split or _split(path)
            for where, (video, first, last, mids) in csv_rows(path, columns=(4,)):
                times = interval(where, first, last)
                if not video:
                    raise PrepareError(f"{where}: no YTID")
                classes = {
                    number_of(where, mid, numbers, args.classes_from) for mid in mids.split(",")
                }
                yield listed_clips.youtube_clip(
                    where,
                    video,
                    times,
                    split,
                    {"class": tuple(sorted(classes))},
                    already_cut=args.already_cut,
                    more_names=(f"Y{video}", f"id_{video}"),
                )

    return listed_clips.find_clips(clips(), args.folder, {"class": names}, multilabel=("class",))


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
