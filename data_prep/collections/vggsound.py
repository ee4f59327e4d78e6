"""VGG-Sound: 10 s of YouTube videos in which one of 309 sounding things is heard and seen.

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

The label "class" has all classes of the given lists in alphabetical order, which is the order of
the authors' code (sorted(classes) in datasets/dataloader.py and eval.py) and of their networks. A
list that lacks a class gives other numbers: then give --classes-from stat.csv. source_id is the
YouTube id.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator

from etils import epath

from avcl_jax.paths import absolute_path
from data_prep.collections import youtube
from data_prep.collections.listed_clips import ListedClip, find_clips
from data_prep.collections.lists import csv_rows, in_order, number_of, seconds
from data_prep.collections.media_files import MediaFiles
from data_prep.manifest import Manifest, PrepareError

_CLIP_SECONDS = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares where the videos and the lists are."""
    youtube.add_arguments(
        parser, media="VIDEOS", lists="official lists: vggsound.csv, or train.csv and test.csv"
    )
    parser.add_argument(
        "--classes-from",
        metavar="CSV",
        type=absolute_path,
        help="take the classes from the first column of this list, such as stat.csv, instead",
    )


def read(args: argparse.Namespace) -> Manifest:
    """Reads the lists and finds their clips.

    Raises:
      PrepareError: If a list is wrong, or the folder cannot be searched.
    """
    rows = [row for path in args.lists for row in _rows(path)]
    if args.classes_from is None:
        numbers = in_order(label for _, _, _, label, _ in rows)
    else:
        numbers = in_order(row[0] for _, row in csv_rows(args.classes_from, columns=(1, 3)))
    clips = _clips(rows, numbers, args.classes_from, args.already_cut)
    return find_clips(clips, MediaFiles(args.folder), class_names={"class": tuple(numbers)})


def _rows(path: epath.Path) -> Iterator[tuple[str, str, float, str, str]]:
    """Yields where a row stands, YouTube id, start, label and split."""
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


def _clips(
    rows: list[tuple[str, str, float, str, str]],
    numbers: dict[str, int],
    classes_from: epath.Path | None,
    already_cut: bool,
) -> Iterator[ListedClip]:
    for where, video, start, label, split in rows:
        name = f"{video}_{youtube.six_digits(start)}"
        names = youtube.clip_names(video, start, start + _CLIP_SECONDS)
        yield ListedClip(
            where=where,
            record_id=name,
            source_id=video,
            split=split,
            labels={"class": number_of(where, label, numbers, classes_from)},
            expected=f"{name}.mp4",
            clip_names=(*names, video) if already_cut else names,
            film_names=(video,),
            start_seconds=start,
            end_seconds=start + _CLIP_SECONDS,
        )
