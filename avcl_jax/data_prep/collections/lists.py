"""Reading of lists: every row with file and line, so that an error in it can be found."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Collection, Iterable, Iterator
from typing import Any, TextIO

from etils import epath

from avcl_jax.data_prep.manifest import PrepareError


def open_list(path: epath.Path) -> TextIO:
    """Opens a text that may not be UTF-8, keeping its line ends; raises PrepareError without."""
    if not path.exists() or path.is_dir():
        raise PrepareError(f"the list {path} does not exist; --help says where it comes from")
    file: Any = path.open("rb")
    return io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")


def lines(path: epath.Path) -> Iterator[tuple[str, str]]:
    """Yields place and text of the lines that are not empty; may raise PrepareError."""
    with open_list(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}, line {number}", line.strip()


def csv_rows(path: epath.Path, *, columns: Collection[int]) -> Iterator[tuple[str, list[str]]]:
    """Yields place and cells of the rows of a CSV without header, but for comments ("#...").

    Raises PrepareError for a row with another number of columns than one of `columns`.
    """
    # AudioSet's lists have spaces after the commas.
    for where, row in _rows(path, skip_spaces=True):
        if row[0].startswith("#"):
            continue
        if len(row) not in columns:
            allowed = " or ".join(map(str, columns))
            raise PrepareError(f"{where}: {len(row)} columns, expected {allowed}")
        yield where, row


def table_rows(
    path: epath.Path, *, required: Iterable[str] = ()
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields place of the rows of a CSV with header, and their cells by column, "" if empty.

    Raises PrepareError if one of the columns `required` is missing.
    """
    rows = _rows(path)
    _, names = next(rows, ("", []))
    lacking = [name for name in required if name not in names]
    if lacking:
        raise PrepareError(
            f"{path}, line 1: no column {lacking[0]!r}; the first line must name the columns "
            f"{', '.join(required)}"
        )
    for where, row in rows:
        if len(row) != len(names):
            raise PrepareError(f"{where}: not {len(names)} columns")
        yield where, dict(zip(names, row, strict=True))


def _rows(path: epath.Path, *, skip_spaces: bool = False) -> Iterator[tuple[str, list[str]]]:
    end = 0
    with open_list(path) as file:
        reader = csv.reader(file, strict=True, skipinitialspace=skip_spaces)
        try:
            for row in reader:
                # A quote that is never closed runs to the end: what helps is where it begins.
                begin, end = end + 1, reader.line_num
                if row:
                    yield f"{path}, line {begin}", row
        except csv.Error as error:
            raise PrepareError(f"{path}, line {end + 1}: {error}") from error


def seconds(where: str, name: str, value: Any) -> float:
    """Returns a cell as seconds; raises PrepareError if it is not a finite number of 0 or more."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or number < 0:
        raise PrepareError(f"{where}: {name} is {value!r}, expected seconds, 0 or more")
    return number


def interval(where: str, start: str, end: str) -> tuple[float, float]:
    """Returns two cells as start and end in seconds; may raise PrepareError."""
    first, last = seconds(where, "start", start), seconds(where, "end", end)
    if last <= first:
        raise PrepareError(f"{where}: end {end} is not after start {start}")
    return first, last


def number_of(where: str, name: str, numbers: dict[str, int], known_from: object) -> int:
    """Returns the number of a class; raises PrepareError if the list `known_from` lacks it."""
    if name not in numbers:
        raise PrepareError(f"{where}: unknown class {name!r}: {known_from} does not name it")
    return numbers[name]


def in_order(names: Iterable[str]) -> dict[str, int]:
    """Returns the numbers of classes whose order is alphabetical (of code points)."""
    return {name: number for number, name in enumerate(sorted(set(names)))}
