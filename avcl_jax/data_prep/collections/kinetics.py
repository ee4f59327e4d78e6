"""Kinetics-400, -600 and -700: one action class per clip of a YouTube video.

Nothing is downloaded. Source of the official lists (CSV: label, youtube_id, time_start, time_end,
split and sometimes is_cc):

  https://github.com/cvdfoundation/kinetics-dataset  (400, 600, 700-2020: lists and videos)
  https://storage.googleapis.com/deepmind-media/Datasets/kinetics400.tar.gz
  https://storage.googleapis.com/deepmind-media/Datasets/kinetics600.tar.gz
  https://storage.googleapis.com/deepmind-media/Datasets/kinetics700_2020.tar.gz

Videos are found by name, in any folder below VIDEOS and with any suffix of media files:

  SPLIT/CLASS/ID_000417_000427.mp4   a clip (ActivityNet's crawler, CVDF): used whole
  ID_417_427.mp4, ID_000417.mp4      likewise
  ID.mp4                             the whole video: cut from time_start to time_end,
                                     or used whole with --already-cut

The label "class" has all classes of the given lists in alphabetical order. A list without a class
gives other numbers: prepare train and val in one call, or give --classes-from the train list. (The
official val lists of 400 and 600 have every class.) Clips without label, as of the test split, get
the class -1, unknown. The column split gives train, val or test. source_id is the YouTube id.
"""

from __future__ import annotations

import argparse
import functools

from avcl_jax.data.record_format import UNKNOWN_LABEL
from avcl_jax.data_prep.collections import listed_clips
from avcl_jax.data_prep.collections.lists import in_order, interval, number_of, table_rows
from avcl_jax.data_prep.manifest import Manifest, PrepareError

_COLUMNS = ("youtube_id", "time_start", "time_end", "split")
_SPLITS = {"validate": "val", "validation": "val"}


add_arguments = functools.partial(
    listed_clips.add_youtube_arguments,
    media="VIDEOS",
    lists="official lists, such as train.csv val.csv test.csv",
    classes="take the classes from this list instead, so that splits prepared apart agree",
)


def read(args: argparse.Namespace) -> Manifest:
    """Reads the lists and finds their clips; raises PrepareError for a wrong list."""
    rows = [row for path in args.lists for row in table_rows(path, required=_COLUMNS)]
    class_list = args.classes_from
    known = rows if class_list is None else table_rows(class_list, required=("label",))
    numbers = in_order(row["label"] for _, row in known if row.get("label"))

    def clip(where: str, row: dict[str, str]) -> listed_clips.ListedClip:
        times = interval(where, row["time_start"], row["time_end"])
        if not row["youtube_id"]:
            raise PrepareError(f"{where}: no youtube_id")
        label = row.get("label")
        number = number_of(where, label, numbers, class_list) if label else UNKNOWN_LABEL
        split = _SPLITS.get(row["split"], row["split"])
        labels = {"class": number} if numbers else {}
        return listed_clips.youtube_clip(
            where, row["youtube_id"], times, split, labels, already_cut=args.already_cut
        )

    class_names = {"class": tuple(numbers)} if numbers else {}
    return listed_clips.find_clips((clip(*row) for row in rows), args.folder, class_names)
