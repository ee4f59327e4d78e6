"""A folder of media files, or a table that lists them (CSV, JSON lines, Parquet)."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import pyarrow
import pyarrow.parquet
from etils import epath

from avcl_jax.data.record_format import LABEL_PREFIX, UNKNOWN_LABEL, ClassNumbers
from avcl_jax.paths import absolute_path, is_remote
from data_prep.collections.lists import open_list, seconds, table_rows
from data_prep.collections.media_files import MEDIA_SUFFIXES, walk
from data_prep.manifest import Entry, Manifest, PrepareError, check_manifest

COLUMNS = ("path", "split", "id", "source", "start", "end")
TABLE_SUFFIXES = (".csv", ".jsonl", ".parquet")
# Common tables and lists that are neither supported nor media.
_OTHER_TABLES = (".json", ".ods", ".tsv", ".txt", ".xls", ".xlsx")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares where the clips are."""
    parser.add_argument(
        "input",
        type=absolute_path,
        help="a folder, searched recursively; or a table: .csv, .jsonl or .parquet with path and "
        "optionally split, id, source, start, end (seconds), label_NAME",
    )
    parser.add_argument("--split", default="train", help="for clips whose table names none")
    parser.add_argument(
        "--root", type=absolute_path, help="of a table's relative paths (its own folder)"
    )


def read(args: argparse.Namespace) -> Manifest:
    """Reads what the command line names."""
    return read_input(args.input, split=args.split, root=args.root)


def read_input(path: epath.Path, *, split: str, root: epath.Path | None) -> Manifest:
    """Reads a folder, one media file, or a table (.csv, .jsonl, .parquet).

    Args:
      path: The input.
      split: For entries that name none.
      root: What a table's relative paths are relative to; None for the table's folder.

    Raises:
      PrepareError: If there is nothing to prepare, or a table is wrong.
    """
    if path.is_dir():
        manifest = _read_folder(path, split)
    elif not path.exists():
        raise PrepareError(f"{path} does not exist: give a folder of media files or a table")
    elif path.suffix.lower() in TABLE_SUFFIXES:
        manifest = _read_table(path, split, root or path.parent)
    elif path.suffix.lower() in _OTHER_TABLES:
        raise PrepareError(
            f"{path} is neither media nor a supported table: save it as "
            f"{', '.join(TABLE_SUFFIXES)} (CSV: comma-separated UTF-8)"
        )
    else:
        manifest = Manifest((_entry({"path": path.name}, path.parent, split, {}, {}),), {})
    return check_manifest(manifest)


def _read_folder(folder: epath.Path, split: str) -> Manifest:
    found, ignored = [], 0
    for directory, files in walk(folder):
        for name in files:
            if epath.Path(name).suffix.lower() in MEDIA_SUFFIXES:
                found.append(os.path.relpath(os.path.join(directory, name), folder))
            else:
                ignored += 1
    if not found:
        raise PrepareError(
            f"no media files in {folder} ({ignored} other files): it looks for names ending in "
            f"{' '.join(sorted(MEDIA_SUFFIXES))}; list files of other names in a table"
        )
    found.sort(key=os.fsencode)
    entries = tuple(_entry({"path": name}, folder, split, {}, {}) for name in found)
    return Manifest(entries, {}, ignored=ignored)


def _rows(path: epath.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields where a row stands, and its cells; an empty one is ""."""
    if path.suffix.lower() == ".csv":
        return table_rows(path)
    return _parquet_rows(path) if path.suffix.lower() == ".parquet" else _jsonl_rows(path)


def _jsonl_rows(path: epath.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with open_list(path) as file:
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


def _parquet_rows(path: epath.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with path.open("rb") as file:
            rows = pyarrow.parquet.read_table(file).to_pylist()
    except pyarrow.ArrowException as error:
        raise PrepareError(f"{path} is no Parquet file: {error}") from error
    for number, row in enumerate(rows, start=1):
        yield (
            f"{path}, row {number}",
            {key: "" if value is None else value for key, value in row.items()},
        )


def _check_columns(where: str, columns: Mapping[str, Any]) -> None:
    for column in columns:
        if column in COLUMNS or (column.startswith(LABEL_PREFIX) and column != LABEL_PREFIX):
            continue
        if ";" in column or "\t" in column or "\0" in column:
            raise PrepareError(
                f"{where}: column {column!r} looks like several: save the table as comma-separated "
                "UTF-8"
            )
        near = difflib.get_close_matches(column, COLUMNS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise PrepareError(
            f"{where}: unknown column {column!r}; {hint}known are {', '.join(COLUMNS)} and "
            f"{LABEL_PREFIX}NAME"
        )
    if not columns.get("path"):
        raise PrepareError(f"{where}: no path")


def _class_names(column: str, values: list[Any], path: epath.Path) -> tuple[str, ...]:
    """Returns the classes of a column in their order."""
    names = {
        str(name)
        for value in values
        for name in (value if isinstance(value, list) else [value])
        if name != ""
    }
    if not names:
        raise PrepareError(f"{path}: column {column!r} has no value in any row: leave it out")
    # Numbers in the order of numbers, so that class 10 does not come before class 2.
    numeric = all(re.fullmatch(r"\d+", name) for name in names)
    return tuple(sorted(names, key=(lambda name: (int(name), name)) if numeric else None))


def _read_table(path: epath.Path, split: str, root: epath.Path) -> Manifest:
    rows = []
    for where, cells in _rows(path):
        row = {column.strip(): value for column, value in cells.items()}
        _check_columns(where, row)
        start, end = row.get("start", ""), row.get("end", "")
        row["start"] = 0.0 if start == "" else seconds(where, "start", start)
        row["end"] = None if end == "" else seconds(where, "end", end)
        if row["end"] is not None and row["end"] <= row["start"]:
            raise PrepareError(f"{where}: end {row['end']} is not after start {row['start']}")
        rows.append(row)
    if not rows:
        raise PrepareError(f"{path} lists no media files")
    class_names: dict[str, tuple[str, ...]] = {}
    several = set()
    for column in sorted({key for row in rows for key in row if key.startswith(LABEL_PREFIX)}):
        label = column.removeprefix(LABEL_PREFIX)
        values = [row.get(column, "") for row in rows]
        class_names[label] = _class_names(column, values, path)
        if any(isinstance(value, list) for value in values):
            several.add(label)
    numbers = {
        label: {name: number for number, name in enumerate(names)}
        for label, names in class_names.items()
    }
    return Manifest(
        tuple(_entry(row, root, split, numbers, several) for row in rows),
        class_names,
        frozenset(several),
    )


def _from_windows(path: str, root: epath.Path) -> str:
    """Returns a path from Windows with slashes, if that file exists.

    Elsewhere a backslash may be part of a name; such a file is preferred.
    """
    slashes = path.replace("\\", "/")
    if not (root / path).exists() and (root / slashes).exists():
        return slashes
    return path


def _entry(
    row: Mapping[str, Any],
    root: epath.Path,
    split: str,
    numbers: Mapping[str, Mapping[str, int]],
    several: Collection[str],
) -> Entry:
    path = str(row["path"])
    if "\\" in path and not is_remote(path):
        path = _from_windows(path, root)
    absolute = os.fspath(absolute_path(root))
    start, end = row.get("start", 0.0), row.get("end")
    default_id = path
    if start or end is not None:
        default_id += f"#{start:g}-{'' if end is None else format(end, 'g')}"
    labels: dict[str, ClassNumbers] = {}
    for label, classes in numbers.items():
        value = row.get(LABEL_PREFIX + label, "")
        if label in several:
            values = value if isinstance(value, list) else [value]
            labels[label] = tuple(sorted({classes[str(name)] for name in values if name != ""}))
        else:
            labels[label] = classes.get(str(value), UNKNOWN_LABEL)
    return Entry(
        path=path if is_remote(path) else os.path.join(absolute, path),
        split=str(row.get("split") or split),
        record_id=str(row.get("id") or default_id),
        source_id=str(row.get("source") or path),
        start_seconds=start,
        end_seconds=end,
        labels=labels,
    )
