"""HMDB51: 6,766 clips of films with 51 actions, and three official splits.

Nothing is downloaded. Clips and lists come from
https://serre-lab.clps.brown.edu/resource/hmdb-a-large-human-motion-database/

  hmdb51_org.rar              the clips
  test_train_splits.rar       the lists: CLASS_test_split1.txt to 3 for each of 51 classes, with
                              lines of NAME.avi and 0 (unused), 1 (train) or 2 (test)

--lists takes the folder of the second.

Clips are found by name, in any folder below VIDEOS and with any suffix of media files; names are
compared as they are, with their brackets, #, &, ; and !:

  CLASS/NAME.avi              as distributed
  NAME.mp4                    flat, converted

Every clip becomes one record of the split "all". Its labels are "class" (alphabetical) and
"split1", "split2", "split3" (unused, train, test), so that one data set serves the three protocols:
1,530 clips of a split are unused, and belong to neither side.

source_id is the name up to the action: NAME is FILM_ACTION_BODY_CAMERA_PEOPLE_VIEW_QUALITY_NUMBER,
and FILM_ACTION is what the official splits never divide (none of 2,023 in any of the three). FILM
alone would be too coarse: 271 films show several actions, and the splits do divide those.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator

from etils import epath

from avcl_jax.data_prep.collections import listed_clips
from avcl_jax.data_prep.collections.lists import in_order, lines
from avcl_jax.data_prep.manifest import Manifest, PrepareError

_CLASSES = 51
_PARTS = ("unused", "train", "test")
# Visible body, camera motion, people, viewpoint, quality, number.
_DETAILS = re.compile(r"(.+)_[fhlu]_[cn]m_np\d+_(?:ba|fr|le|ri)_(?:bad|goo|med)_\d+")

add_arguments = listed_clips.add_official_arguments


def read(args: argparse.Namespace) -> Manifest:
    """Reads the lists and finds their videos; raises PrepareError for a wrong list."""
    suffix = "_test_split1.txt"
    names = [path.name.removesuffix(suffix) for path in args.lists.glob(f"*{suffix}")]
    if len(names) != _CLASSES:
        raise PrepareError(
            f"{args.lists} has {len(names)} lists CLASS{suffix}, expected {_CLASSES}"
        )
    numbers = in_order(names)
    rows = (
        (where, split, video, _source(where, video), number, part)
        for action, number in numbers.items()
        for split_number, split in enumerate(listed_clips.SPLITS, start=1)
        for where, video, part in _videos(args.lists / f"{action}_test_split{split_number}.txt")
    )
    return listed_clips.find_videos(rows, args.folder, tuple(numbers), _PARTS)


def _videos(path: epath.Path) -> Iterator[tuple[str, str, int]]:
    """Yields place in the list, video and part of the split."""
    for where, line in lines(path):
        parts = re.fullmatch(r"(\S+)\.avi ([012])", line)
        if parts is None:
            raise PrepareError(f"{where}: {line!r} is not of the form NAME.avi and 0, 1 or 2")
        yield where, parts[1], int(parts[2])


def _source(where: str, video: str) -> str:
    parts = _DETAILS.fullmatch(video)
    if parts is None:
        raise PrepareError(
            f"{where}: {video!r} is not a name of HMDB51, FILM_ACTION_f_cm_np1_fr_med_0"
        )
    return parts[1]
