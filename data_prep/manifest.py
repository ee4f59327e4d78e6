"""What is to be prepared: a folder of media files, or a manifest that lists them."""

from __future__ import annotations

import csv
import dataclasses
import difflib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from avcl_jax.data.record_format import LABEL_PREFIX, UNKNOWN_LABEL

COLUMNS = ("path", "split", "id", "source", "start", "end")
MANIFEST_SUFFIXES = (".csv", ".jsonl")
MEDIA_SUFFIXES = (
    *(".3gp", ".asf", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg"),
    *(".mpg", ".mts", ".mxf", ".ogv", ".ts", ".vob", ".webm", ".wmv"),
    *(".aac", ".aif", ".aiff", ".flac", ".m4a", ".mka", ".mp3", ".oga", ".ogg", ".opus", ".wav"),
    *(".weba", ".wma"),
)


class PrepareError(Exception):
    """Preparation cannot start or go on; the message says what, which, and what to do."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One clip to prepare.

    Attributes:
      path: Media file.
      split: Split the record goes to.
      record_id: Unique within the data set.
      source_id: What the clip is cut from.
      start_seconds: Where it starts in the file.
      end_seconds: Where it ends; None for the file's end.
      labels: Class number by label; -1 is unknown.
    """

    path: str
    split: str
    record_id: str
    source_id: str
    start_seconds: float
    end_seconds: float | None
    labels: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """All clips, in the order of their records.

    Attributes:
      entries: At least one.
      class_names: Names of the classes, for each label.
      ignored: Files in the folder that are no media by their names.
    """

    entries: tuple[Entry, ...]
    class_names: Mapping[str, tuple[str, ...]]
    ignored: int = 0


def read_input(path: Path, *, split: str, root: Path | None) -> Manifest:
    """Reads a folder, one media file, or a manifest (.csv, .jsonl).

    Args:
      path: The input.
      split: For entries that name none.
      root: What a manifest's relative paths are relative to; None for the manifest's folder.

    Raises:
      PrepareError: If there is nothing to prepare, or a manifest is wrong.
    """
    if path.is_dir():
        manifest = _read_folder(path, split)
    elif not path.exists():
        raise PrepareError(f"{path} does not exist: give a folder of media files or a manifest")
    elif path.suffix.lower() in MANIFEST_SUFFIXES:
        manifest = _read_manifest(path, split, root or path.parent)
    else:
        manifest = Manifest((_entry({"path": path.name}, path.parent, split, {}),), {})
    _check_unique(manifest.entries)
    for entry in manifest.entries:
        if not re.fullmatch(r"[A-Za-z0-9_]+", entry.split):
            raise PrepareError(
                f"split {entry.split!r} of {entry.record_id!r}: use letters, digits, underscores"
            )
    return manifest


def _read_folder(folder: Path, split: str) -> Manifest:
    found, ignored, seen = [], 0, set()
    for directory, subdirectories, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(directory)
        if real in seen:  # a link to a parent
            subdirectories.clear()
            continue
        seen.add(real)
        subdirectories[:] = sorted(name for name in subdirectories if not name.startswith("."))
        for name in files:
            if name.startswith("."):
                continue
            if Path(name).suffix.lower() in MEDIA_SUFFIXES:
                found.append(os.path.relpath(os.path.join(directory, name), folder))
            else:
                ignored += 1
    if not found:
        raise PrepareError(
            f"no media files in {folder} ({ignored} other files): it looks for names ending in "
            f"{' '.join(sorted(MEDIA_SUFFIXES))}; list files of other names in a manifest"
        )
    found.sort(key=os.fsencode)
    entries = tuple(_entry({"path": name}, folder, split, {}) for name in found)
    return Manifest(entries, {}, ignored)


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields where a row stands, and its non-empty cells."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        if path.suffix.lower() == ".csv":
            reader = csv.DictReader(file, strict=True)
            try:
                for row in reader:
                    where = f"{path}, line {reader.line_num}"
                    if None in row or None in row.values():
                        raise PrepareError(f"{where}: not {len(reader.fieldnames or ())} columns")
                    # A column that is empty in this row is still a column.
                    yield where, dict(row)
            except csv.Error as error:
                raise PrepareError(f"{path}, line {reader.line_num}: {error}") from error
            return
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise PrepareError(f"{where}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise PrepareError(f"{where}: expected an object with a path")
            yield where, {key: "" if value is None else value for key, value in row.items()}


def _check_columns(where: str, columns: Mapping[str, Any]) -> None:
    for column in columns:
        if column in COLUMNS or (column.startswith(LABEL_PREFIX) and column != LABEL_PREFIX):
            continue
        near = difflib.get_close_matches(column, COLUMNS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise PrepareError(
            f"{where}: unknown column {column!r}; {hint}known are {', '.join(COLUMNS)} and "
            f"{LABEL_PREFIX}NAME"
        )
    if not columns.get("path"):
        raise PrepareError(f"{where}: no path")


def _number(where: str, name: str, value: Any) -> float | None:
    if value == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or number < 0:
        raise PrepareError(f"{where}: {name} is {value!r}, expected seconds, 0 or more")
    return number


def _read_manifest(path: Path, split: str, root: Path) -> Manifest:
    rows = []
    for where, row in _rows(path):
        _check_columns(where, row)
        row["start"] = _number(where, "start", row.get("start", "")) or 0.0
        row["end"] = _number(where, "end", row.get("end", ""))
        if row["end"] is not None and row["end"] <= row["start"]:
            raise PrepareError(f"{where}: end {row['end']} is not after start {row['start']}")
        rows.append(row)
    if not rows:
        raise PrepareError(f"{path} lists no media files")
    columns = sorted({key for row in rows for key in row if key.startswith(LABEL_PREFIX)})
    class_names = {}
    for column in columns:
        names = {str(row[column]) for row in rows if row.get(column, "") != ""}
        if not names:
            raise PrepareError(f"{path}: column {column!r} has no value in any row: leave it out")
        if any("\n" in name or "\r" in name for name in names):
            raise PrepareError(f"{path}: a value of {column!r} contains a line break")
        # Numbers in the order of numbers, so that class 10 does not come before class 2.
        numeric = all(re.fullmatch(r"\d+", name) for name in names)
        class_names[column.removeprefix(LABEL_PREFIX)] = tuple(
            sorted(names, key=(lambda name: (int(name), name)) if numeric else None)
        )
    numbers = {
        label: {name: number for number, name in enumerate(names)}
        for label, names in class_names.items()
    }
    return Manifest(tuple(_entry(row, root, split, numbers) for row in rows), class_names)


def _entry(
    row: Mapping[str, Any], root: Path, split: str, numbers: Mapping[str, Mapping[str, int]]
) -> Entry:
    path = str(row["path"])
    start, end = row.get("start", 0.0), row.get("end")
    default_id = path
    if start or end is not None:
        default_id += f"#{start:g}-{'' if end is None else format(end, 'g')}"
    return Entry(
        path=os.path.join(os.path.abspath(root), path),
        split=str(row.get("split") or split),
        record_id=str(row.get("id") or default_id),
        source_id=str(row.get("source") or path),
        start_seconds=start,
        end_seconds=end,
        labels={
            label: classes.get(str(row.get(LABEL_PREFIX + label, "")), UNKNOWN_LABEL)
            for label, classes in numbers.items()
        },
    )


def _check_unique(entries: tuple[Entry, ...]) -> None:
    first: dict[str, Entry] = {}
    for entry in entries:
        other = first.setdefault(entry.record_id, entry)
        if other is not entry:
            raise PrepareError(
                f"duplicate id {entry.record_id!r}: {other.path!r} and {entry.path!r}; give each "
                "row of the manifest its own id"
            )
