"""Kinetics-400, -600 and -700: one action class per clip of a YouTube video.

Nothing is downloaded. The official lists (CSV with the columns label, youtube_id, time_start,
time_end, split and sometimes is_cc) come from

  https://github.com/cvdfoundation/kinetics-dataset  (400, 600, 700-2020: lists and videos)
  https://storage.googleapis.com/deepmind-media/Datasets/kinetics400.tar.gz
  https://storage.googleapis.com/deepmind-media/Datasets/kinetics600.tar.gz
  https://storage.googleapis.com/deepmind-media/Datasets/kinetics700_2020.tar.gz

Videos are found by name, in any folder below VIDEOS and with any suffix of media files:

  SPLIT/CLASS/ID_000417_000427.mp4   a clip (ActivityNet's crawler, CVDF): used whole
  ID_417_427.mp4, ID_000417.mp4      likewise
  ID.mp4                             the whole video: cut from time_start to time_end,
                                     or used whole with --already-cut

The label "class" has all classes of the given lists, in alphabetical order as published. A list
that lacks a class therefore gives other numbers: prepare train and val in one call, or give
--classes-from the train list. (The official val lists of 400 and 600 have every class.) Lists that
hold the labels back, as of the test split, give the class -1, unknown. Splits are the column
split: train, val, test; validate and validation become val. source_id is the YouTube id.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from etils import epath

from avcl_jax.data.record_format import UNKNOWN_LABEL
from avcl_jax.paths import absolute_path
from data_prep.collections import youtube
from data_prep.collections.listed_clips import ListedClip, find_clips
from data_prep.collections.lists import in_order, interval, number_of, table_rows
from data_prep.collections.media_files import MediaFiles
from data_prep.manifest import Manifest, PrepareError

_COLUMNS = ("youtube_id", "time_start", "time_end", "split")
_SPLITS = {"validate": "val", "validation": "val"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares where the videos and the lists are."""
    youtube.add_arguments(
        parser, media="VIDEOS", lists="official lists, such as train.csv val.csv test.csv"
    )
    parser.add_argument(
        "--classes-from",
        metavar="CSV",
        type=absolute_path,
        help="take the classes from this list instead, so that splits prepared apart agree",
    )


def read(args: argparse.Namespace) -> Manifest:
    """Reads the lists and finds their clips.

    Raises:
      PrepareError: If a list is wrong, or the folder cannot be searched.
    """
    rows = [row for path in args.lists for row in table_rows(path, required=_COLUMNS)]
    known = (
        rows
        if args.classes_from is None
        else list(table_rows(args.classes_from, required=("label",)))
    )
    numbers = in_order(row["label"] for _, row in known if row.get("label"))
    clips = _clips(rows, numbers, args.classes_from, args.already_cut)
    return find_clips(
        clips, MediaFiles(args.folder), class_names={"class": tuple(numbers)} if numbers else {}
    )


def _clips(
    rows: list[tuple[str, dict[str, str]]],
    numbers: dict[str, int],
    classes_from: epath.Path | None,
    already_cut: bool,
) -> Iterator[ListedClip]:
    for where, row in rows:
        start, end = interval(where, row["time_start"], row["time_end"])
        video = row["youtube_id"]
        if not video:
            raise PrepareError(f"{where}: no youtube_id")
        label = row.get("label")
        names = youtube.clip_names(video, start, end)
        number = number_of(where, label, numbers, classes_from) if label else UNKNOWN_LABEL
        yield ListedClip(
            where=where,
            record_id=names[0],
            source_id=video,
            split=_SPLITS.get(row["split"], row["split"]),
            labels={"class": number} if numbers else {},
            expected=f"{names[0]}.mp4",
            clip_names=(*names, video) if already_cut else names,
            film_names=(video,),
            start_seconds=start,
            end_seconds=end,
        )
