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

from avcl_jax.data.media_files import MEDIA_SUFFIXES, walk
from avcl_jax.data.record_format import LABEL_PREFIX, UNKNOWN_LABEL, ClassNumbers
from avcl_jax.data_prep.collections.lists import in_order, open_list, seconds, table_rows
from avcl_jax.data_prep.manifest import Entry, Manifest, PrepareError
from avcl_jax.paths import absolute_path, is_remote

COLUMNS = ("path", "split", "id", "source", "start", "end")
# Common tables and lists that are neither supported nor media.
_OTHER_TABLES = (".json", ".ods", ".tsv", ".txt", ".xls", ".xlsx")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the folder or table, and what the table may leave out."""
    add = parser.add_argument
    columns = "path and optionally split, id, source, start, end (seconds), label_NAME"
    table = f"a table (.csv, .jsonl or .parquet) with {columns}"
    root = "folder of a table's relative paths (the table's own folder)"
    add("input", type=absolute_path, help=f"a folder, searched recursively; or {table}")
    add("--split", default="train", help="split of clips whose table names none")
    add("--root", type=absolute_path, help=root)


def read(args: argparse.Namespace) -> Manifest:
    """Reads a folder, one media file, or a table.

    Raises PrepareError if there is nothing to prepare, or a table is wrong.
    """
    return read_path(args.input, args.split, args.root)


def read_path(path: epath.Path, split: str, root: epath.Path | None) -> Manifest:
    """Reads what `read` does: `root` and `split` are those of a table that names none."""
    suffix = path.suffix.lower()
    if path.is_dir():
        return _read_folder(path, split)
    if not path.exists():
        raise PrepareError(f"{path} does not exist: give a folder of media files or a table")
    if suffix in _TABLES:
        return _read_table(path, split, root or path.parent)
    if suffix in _OTHER_TABLES:
        raise PrepareError(
            f"{path} is neither media nor a supported table: save it as {', '.join(_TABLES)} "
            "(CSV: comma-separated UTF-8)"
        )
    return Manifest((_entry({"path": path.name}, path.parent, split, {}, {}),), {})


def _read_folder(folder: epath.Path, split: str) -> Manifest:
    files = [
        os.path.relpath(os.path.join(directory, name), folder)
        for directory, names in walk(folder)
        for name in names
    ]
    media = [name for name in files if epath.Path(name).suffix.lower() in MEDIA_SUFFIXES]
    if not media:
        raise PrepareError(
            f"no media files in {folder} ({len(files)} other files): it looks for names ending in "
            f"{' '.join(sorted(MEDIA_SUFFIXES))}; list files of other names in a table"
        )
    media.sort(key=os.fsencode)
    entries = tuple(_entry({"path": name}, folder, split, {}, {}) for name in media)
    return Manifest(entries, {}, ignored=len(files) - len(media))


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
            yield where, row


def _parquet_rows(path: epath.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with path.open("rb") as file:
            rows = pyarrow.parquet.read_table(file).to_pylist()
    except pyarrow.ArrowException as error:
        raise PrepareError(f"{path} is not a Parquet file: {error}") from error
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", row


# Each yields the place of a row, and its cells by column; an empty one is "" or None.
_TABLES = {".csv": table_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}


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
        names = f"{', '.join(COLUMNS)} and {LABEL_PREFIX}NAME"
        raise PrepareError(f"{where}: unknown column {column!r}; {hint}known are {names}")
    if not columns.get("path"):
        raise PrepareError(f"{where}: no path")


def _cell_names(value: Any) -> list[str]:
    """Returns the class names of a cell: none, one, or several of a list."""
    return [str(name) for name in (value if isinstance(value, list) else [value]) if name != ""]


def _class_numbers(column: str, values: list[Any], path: epath.Path) -> dict[str, int]:
    """Returns the numbers of the classes of a column."""
    names = {name for value in values for name in _cell_names(value)}
    if not names:
        raise PrepareError(f"{path}: column {column!r} has no value in any row: leave it out")
    # Numbers in the order of numbers, so that class 10 does not come before class 2.
    if all(re.fullmatch(r"\d+", name) for name in names):
        ordered = sorted(names, key=lambda name: (int(name), name))
        return {name: number for number, name in enumerate(ordered)}
    return in_order(names)


def _read_table(path: epath.Path, split: str, root: epath.Path) -> Manifest:
    rows = []
    for where, cells in _TABLES[path.suffix.lower()](path):
        row = {name.strip(): "" if value is None else value for name, value in cells.items()}
        _check_columns(where, row)
        start, end = row.get("start", ""), row.get("end", "")
        row["start"] = 0.0 if start == "" else seconds(where, "start", start)
        row["end"] = None if end == "" else seconds(where, "end", end)
        if row["end"] is not None and row["end"] <= row["start"]:
            raise PrepareError(f"{where}: end {row['end']} is not after start {row['start']}")
        rows.append(row)
    if not rows:
        raise PrepareError(f"{path} lists no media files")
    numbers: dict[str, dict[str, int]] = {}
    several = set()
    for column in sorted({key for row in rows for key in row if key.startswith(LABEL_PREFIX)}):
        label = column.removeprefix(LABEL_PREFIX)
        values = [row.get(column, "") for row in rows]
        numbers[label] = _class_numbers(column, values, path)
        if any(isinstance(value, list) for value in values):
            several.add(label)
    entries = tuple(_entry(row, root, split, numbers, several) for row in rows)
    class_names = {label: tuple(classes) for label, classes in numbers.items()}
    return Manifest(entries, class_names, frozenset(several))


def _entry(
    row: Mapping[str, Any],
    root: epath.Path,
    split: str,
    numbers: Mapping[str, Mapping[str, int]],
    several: Collection[str],
) -> Entry:
    path = str(row["path"])
    if "\\" in path and not is_remote(path):
        # A path from Windows, unless a file has this name: elsewhere it may contain backslashes.
        slashes = path.replace("\\", "/")
        if not (root / path).exists() and (root / slashes).exists():
            path = slashes
    start, end = row.get("start", 0.0), row.get("end")
    default_id = path
    if start or end is not None:
        default_id += f"#{start:g}-{'' if end is None else format(end, 'g')}"
    labels: dict[str, ClassNumbers] = {}
    for label, classes in numbers.items():
        value = row.get(LABEL_PREFIX + label, "")
        if label in several:
            labels[label] = tuple(sorted({classes[name] for name in _cell_names(value)}))
        else:
            labels[label] = classes.get(str(value), UNKNOWN_LABEL)
    return Entry(
        path=path if is_remote(path) else os.path.join(os.fspath(absolute_path(root)), path),
        split=str(row.get("split") or split),
        record_id=str(row.get("id") or default_id),
        source_id=str(row.get("source") or path),
        start_seconds=start,
        end_seconds=end,
        labels=labels,
    )
