"""VGG-Sound: 10 s of YouTube videos in which one of 309 sources is heard and seen.

Nothing is downloaded. The official lists come from

  https://www.robots.ox.ac.uk/~vgg/data/vggsound/   (vggsound.csv)
  https://github.com/hche11/VGGSound/tree/master/data   (also test.csv, train.csv, stat.csv)

--lists takes vggsound.csv, which has no header and four columns: YouTube id, start in seconds,
label, train or test; and test.csv or train.csv, which have two, ID_START.mp4 and label, and whose
name says the split.

Videos are found by name, in any folder below VIDEOS and with any suffix of media files:

  ID_000300.mp4            a clip, as test.csv names it: used whole
  ID_000300_000310.mp4     likewise, and ID_300_310, ID_300
  ID_300000_310000.mp4     likewise: audiosetdl, which VGG-Sound recommends, in milliseconds
  ID.mp4                   the whole video: cut from start to start + 10 s,
                           or used whole with --already-cut

The label "class" has all classes of the given lists in alphabetical order, as the authors' code and
networks have. A list that lacks a class gives other numbers: then give --classes-from stat.csv.
source_id is the YouTube id.
"""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Iterator

from etils import epath

from avcl_jax.data_prep.collections import listed_clips
from avcl_jax.data_prep.collections.lists import csv_rows, in_order, number_of, seconds
from avcl_jax.data_prep.manifest import Manifest, PrepareError

_CLIP_SECONDS = 10


add_arguments = functools.partial(
    listed_clips.add_youtube_arguments,
    media="VIDEOS",
    lists="official lists: vggsound.csv, or train.csv and test.csv",
    classes="take the classes from the first column of this list, such as stat.csv, instead",
)


def read(args: argparse.Namespace) -> Manifest:
    """Reads the lists and finds their clips; raises PrepareError for a wrong list."""
    rows = [row for path in args.lists for row in _rows(path)]
    class_list = args.classes_from
    if class_list is None:
        numbers = in_order(label for _, _, _, label, _ in rows)
    else:
        numbers = in_order(row[0] for _, row in csv_rows(class_list, columns=(1, 3)))
    clips = (
        listed_clips.youtube_clip(
            where,
            video,
            (start, start + _CLIP_SECONDS),
            split,
            {"class": number_of(where, label, numbers, class_list)},
            already_cut=args.already_cut,
            record_id=f"{video}_{listed_clips.six_digits(start)}",
        )
        for where, video, start, label, split in rows
    )
    return listed_clips.find_clips(clips, args.folder, {"class": tuple(numbers)})


def _rows(path: epath.Path) -> Iterator[tuple[str, str, float, str, str]]:
    """Yields place in the list, YouTube id, start, label and split of each row."""
    for where, row in csv_rows(path, columns=(4, 2)):
        if len(row) == 4:
            video, start, label, split = row
        else:
            named = re.fullmatch(r"(.+)_(\d{6})\.mp4", row[0])
            if named is None:
                raise PrepareError(f"{where}: {row[0]!r} is not of the form ID_START.mp4")
            video, start, label, split = named[1], named[2], row[1], path.stem
        if split not in ("train", "test"):
            hint = "" if len(row) == 4 else ": a list of two columns is train.csv or test.csv"
            raise PrepareError(f"{where}: split {split!r}, expected train or test{hint}")
        if not video or not label:
            raise PrepareError(f"{where}: no {'label' if video else 'YouTube id'}")
        yield where, video, seconds(where, "start", start), label, split
