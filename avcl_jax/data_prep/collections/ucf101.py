"""UCF101: 13,320 videos of 101 actions, and three official splits into training and test.

Nothing is downloaded. Videos and lists come from https://www.crcv.ucf.edu/data/UCF101.php

  https://www.crcv.ucf.edu/data/UCF101/UCF101.rar
  https://www.crcv.ucf.edu/data/UCF101/UCF101TrainTestSplits-RecognitionTask.zip

--lists takes the folder of the second: classInd.txt, trainlist01.txt to trainlist03.txt and
testlist01.txt to testlist03.txt.

Videos are found by name, in any folder below VIDEOS, with any suffix of media files, in upper or
lower case (the lists say v_HandStandPushups_g01_c01, the files v_HandstandPushups_g01_c01):

  CLASS/v_CLASS_g01_c01.avi    as distributed
  v_CLASS_g01_c01.mp4          flat, converted

Every video becomes one record of the split "all". Its labels are "class" (in the order of
classInd.txt) and "split1", "split2", "split3" (train, test), so that one data set serves the three
protocols. source_id is the group, v_CLASS_g01: its clips are cut from one video, and no official
split separates them.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator

from etils import epath

from avcl_jax.data_prep.collections import listed_clips
from avcl_jax.data_prep.collections.lists import lines, number_of
from avcl_jax.data_prep.manifest import Manifest, PrepareError

_CLASSES = 101
_PARTS = ("train", "test")

add_arguments = listed_clips.add_official_arguments


def read(args: argparse.Namespace) -> Manifest:
    """Reads the lists and finds their videos; raises PrepareError for a wrong list."""
    class_list = args.lists / "classInd.txt"
    numbers = _classes(class_list)
    rows = (
        (where, split, video, video.rpartition("_")[0], number, part_number)
        for split_number, split in enumerate(listed_clips.SPLITS, start=1)
        for part_number, part in enumerate(_PARTS)
        for where, video, number in _videos(
            args.lists / f"{part}list{split_number:02d}.txt", part, numbers, class_list
        )
    )
    return listed_clips.find_videos(rows, args.folder, tuple(numbers), _PARTS, ignore_case=True)


def _classes(path: epath.Path) -> dict[str, int]:
    numbers: dict[str, int] = {}
    for where, line in lines(path):
        if line.split() != [str(len(numbers) + 1), line.split()[-1]]:
            raise PrepareError(f"{where}: {line!r}, expected {len(numbers) + 1} and a class")
        numbers[line.split()[-1]] = len(numbers)
    if len(numbers) != _CLASSES:
        raise PrepareError(f"{path}: {len(numbers)} different classes, expected {_CLASSES}")
    return numbers


def _videos(
    path: epath.Path, part: str, numbers: dict[str, int], class_list: epath.Path
) -> Iterator[tuple[str, str, int]]:
    """Yields place in the list, video and class."""
    for where, line in lines(path):
        # Training lists repeat the class as a number from 1, test lists do not.
        pattern = r"(\w+)/(v_\w+_g\d+_c\d+)\.avi" + (r" (\d+)" if part == "train" else "")
        parts = re.fullmatch(pattern, line)
        if parts is None:
            form = "CLASS/v_CLASS_g01_c01.avi" + (" NUMBER" if part == "train" else "")
            raise PrepareError(f"{where}: {line!r} is not of the form {form}")
        number = number_of(where, parts[1], numbers, class_list)
        if part == "train" and int(parts[3]) != number + 1:
            raise PrepareError(f"{where}: {parts[1]} is class {number + 1}, not {parts[3]}")
        yield where, parts[2], number
