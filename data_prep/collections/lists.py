"""Reading of lists: every row with where it stands, so that what is wrong in it can be found."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Collection, Iterable, Iterator
from typing import Any, TextIO

from etils import epath

from data_prep.manifest import PrepareError


def lines(path: epath.Path) -> Iterator[tuple[str, str]]:
    """Yields where a line stands, and the line; not the empty ones.

    Raises:
      PrepareError: If there is no such file.
    """
    with open_list(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}, line {number}", line.strip()


def csv_rows(path: epath.Path, *, columns: Collection[int]) -> Iterator[tuple[str, list[str]]]:
    """Yields where a row stands, and its cells; not the comments, which start with "#".

    Args:
      path: A CSV without header.
      columns: How many a row may have.

    Raises:
      PrepareError: If there is no such file, or it is not such a CSV.
    """
    # AudioSet's lists have spaces after the commas.
    for number, row in _rows(path, skip_spaces=True):
        if row[0].startswith("#"):
            continue
        if len(row) not in columns:
            allowed = " or ".join(map(str, columns))
            raise PrepareError(f"{path}, line {number}: {len(row)} columns, expected {allowed}")
        yield f"{path}, line {number}", row


def table_rows(
    path: epath.Path, *, required: Iterable[str] = ()
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields where a row stands, and its cells by column; an empty one is "".

    Args:
      path: A CSV whose first line names the columns.
      required: Columns that it must have.

    Raises:
      PrepareError: If there is no such file, or it is not such a CSV.
    """
    rows = _rows(path)
    _, names = next(rows, (1, []))
    lacking = [name for name in required if name not in names]
    if lacking:
        raise PrepareError(
            f"{path}, line 1: no column {lacking[0]!r}; the first line must name the columns "
            f"{', '.join(required)}"
        )
    for number, row in rows:
        if len(row) != len(names):
            raise PrepareError(f"{path}, line {number}: not {len(names)} columns")
        yield f"{path}, line {number}", dict(zip(names, row, strict=True))


def _rows(path: epath.Path, *, skip_spaces: bool = False) -> Iterator[tuple[int, list[str]]]:
    """Yields the line on which a row begins, and its cells; not the empty rows."""
    end = 0
    with open_list(path) as file:
        reader = csv.reader(file, strict=True, skipinitialspace=skip_spaces)
        try:
            for row in reader:
                # A quote that is never closed runs to the end: what helps is where it begins.
                begin, end = end + 1, reader.line_num
                if row:
                    yield begin, row
        except csv.Error as error:
            raise PrepareError(f"{path}, line {end + 1}: {error}") from error


def open_list(path: epath.Path) -> TextIO:
    """Opens a text whose names may not be UTF-8; csv wants the ends of lines as they are.

    Raises:
      PrepareError: If there is no such file.
    """
    if not path.exists() or path.is_dir():
        raise PrepareError(f"the list {path} does not exist; --help says where it comes from")
    file: Any = path.open("rb")
    return io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")


def seconds(where: str, name: str, value: Any) -> float:
    """Returns a cell as seconds, 0 or more.

    Raises:
      PrepareError: If it is not a finite number or below 0.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or number < 0:
        raise PrepareError(f"{where}: {name} is {value!r}, expected seconds, 0 or more")
    return number


def interval(where: str, start: str, end: str) -> tuple[float, float]:
    """Returns two cells as start and end in seconds; raises PrepareError if they are none."""
    first, last = seconds(where, "start", start), seconds(where, "end", end)
    if last <= first:
        raise PrepareError(f"{where}: end {end} is not after start {start}")
    return first, last


def number_of(where: str, name: str, numbers: dict[str, int], known_from: object) -> int:
    """Returns a class's number.

    Args:
      where: Where the name stands.
      name: The class.
      numbers: Those of all classes.
      known_from: What names all classes, for the message.

    Raises:
      PrepareError: If the class is unknown.
    """
    if name not in numbers:
        raise PrepareError(f"{where}: unknown class {name!r}: {known_from} does not name it")
    return numbers[name]


def in_order(names: Iterable[str]) -> dict[str, int]:
    """Returns the numbers of classes whose order is alphabetical (of code points)."""
    return {name: number for number, name in enumerate(sorted(set(names)))}
