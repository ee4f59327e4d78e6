"""ESC-50 and ESC-10: 5 s of environmental audio, one class per clip, five official folds.

Nothing is downloaded. The collection comes from https://github.com/karolpiczak/ESC-50

FOLDER is that repository, or has its layout:

  meta/esc50.csv       filename, fold, target, category, esc10, src_file, take
  audio/               the clips, by their names in the list, .wav or with any other suffix of
                       media files (re-encoded)

--subset esc10 takes the 400 clips of the ten classes that make up ESC-10.

Every clip becomes one record of the split "all". Its labels are "class" (in the order of target;
those of ESC-10 are numbered 0 to 9, in the same order) and "fold" (1 to 5). source_id is the
Freesound recording src_file: several clips can be cut from one, always within one fold.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from etils import epath

from avcl_jax.data_prep.collections import listed_clips
from avcl_jax.data_prep.collections.lists import number_of, table_rows
from avcl_jax.data_prep.manifest import Manifest, PrepareError
from avcl_jax.paths import absolute_path

_COLUMNS = ("filename", "fold", "target", "category", "esc10", "src_file")
_CLASSES = {"esc50": 50, "esc10": 10}
_FOLDS = {name: number for number, name in enumerate("12345")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the folder of the collection, and its subset."""
    add = parser.add_argument
    add("folder", metavar="FOLDER", type=absolute_path, help="folder with audio/ and meta/")
    add("--subset", choices=tuple(_CLASSES), default="esc50", help="clips to take")


def read(args: argparse.Namespace) -> Manifest:
    """Reads the list and finds its clips; raises PrepareError for a wrong list."""
    path = args.folder / "meta" / "esc50.csv"
    rows = []
    for where, row in table_rows(path, required=_COLUMNS):
        if row["esc10"] not in ("True", "False"):
            raise PrepareError(f"{where}: esc10 is {row['esc10']!r}, expected True or False")
        if args.subset == "esc50" or row["esc10"] == "True":
            rows.append((where, row))
    names = _class_names(path, rows, args.subset)

    def clip(where: str, row: dict[str, str]) -> listed_clips.ListedClip:
        name = epath.Path(row["filename"]).stem
        fold = number_of(where, row["fold"], _FOLDS, "1 to 5")
        labels = {"class": names.index(row["category"]), "fold": fold}
        return listed_clips.ListedClip(
            where, name, row["src_file"], "all", labels, row["filename"], (name,)
        )

    class_names = {"class": names, "fold": tuple(_FOLDS)}
    return listed_clips.find_clips((clip(*row) for row in rows), args.folder / "audio", class_names)


def _class_names(
    path: epath.Path, rows: Sequence[tuple[str, dict[str, str]]], subset: str
) -> tuple[str, ...]:
    """Returns the categories in the order of their targets."""
    by_target: dict[int, str] = {}
    for where, row in rows:
        if not row["target"].isdecimal():
            raise PrepareError(f"{where}: target is {row['target']!r}, expected a number")
        before = by_target.setdefault(int(row["target"]), row["category"])
        if before != row["category"]:
            raise PrepareError(
                f"{where}: target {row['target']} is {row['category']!r}, and {before!r} before"
            )
    names = tuple(by_target[target] for target in sorted(by_target))
    if len(set(names)) != _CLASSES[subset]:
        hint = ": give --subset esc10" if len(names) == 10 else ""
        raise PrepareError(f"{path}: {len(names)} classes, {subset} has {_CLASSES[subset]}{hint}")
    return names
