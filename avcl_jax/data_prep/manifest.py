"""The clips of a collection to prepare, their labels, and the clips that are missing."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from avcl_jax.data.record_format import ClassNumbers
from avcl_jax.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9_]+")


class PrepareError(UserError, argparse.ArgumentTypeError):
    """Preparation cannot start or continue; the message has the value and the fix."""


def option(
    parse: Callable[[str], Any], fits: Callable[[Any], object], form: str
) -> Callable[[str], Any]:
    """Returns the type of an option: parses its text, and refuses values that do not fit."""

    def value_of(text: str) -> Any:
        try:
            value = parse(text)
        except ValueError:
            value = None
        if value is None or not fits(value):
            raise PrepareError(f"{text!r} is not {form}")
        return value

    return value_of


COUNT = option(int, lambda count: count >= 1, "a whole number of at least 1")
NATURAL = option(int, lambda number: number >= 0, "a whole number of at least 0")
POSITIVE = option(float, lambda number: 0 < number < math.inf, "a finite number above 0")


@dataclasses.dataclass(frozen=True)
class ExamplePlace:
    """One example of a record file."""

    file_format: str
    place: int  # byte offset (TFRecord) or number (ArrayRecord)
    layout: Any  # `parse` and `read` of the collection read its example


@dataclasses.dataclass(frozen=True)
class Entry:
    """One clip to prepare."""

    path: str  # media file, or the record file that contains `example`
    split: str
    record_id: str  # unique within the data set
    source_id: str  # recording that the clip is cut from
    start_seconds: float
    end_seconds: float | None  # None: the end of the file
    labels: Mapping[str, ClassNumbers]  # -1 is unknown; a tuple where a clip may have several
    example: ExamplePlace | None = None


@dataclasses.dataclass(frozen=True)
class Missing:
    """One listed clip without a file."""

    record_id: str
    split: str
    expected: str  # usual name of the file


@dataclasses.dataclass(frozen=True)
class Manifest:
    """All clips, in the order of their records.

    Raises PrepareError if two entries have one id, the name of a split or a label cannot be part of
    a file name, or the name of a class cannot be a line of a file.
    """

    entries: tuple[Entry, ...]
    class_names: Mapping[str, tuple[str, ...]]
    multilabel: frozenset[str] = frozenset()  # labels that may have several classes per clip
    missing: tuple[Missing, ...] = ()
    ignored: int = 0  # files in the folder that no list names

    def __post_init__(self) -> None:
        for label, names in self.class_names.items():
            if not _NAME.fullmatch(label):
                raise PrepareError(f"label {label!r}: use letters, digits, underscores in its name")
            for name in names:
                if [name] != name.splitlines() or not name.strip():
                    raise PrepareError(
                        f"class {name!r} of label {label!r}: its name must be one line"
                    )
        first: dict[str, Entry] = {}
        for entry in self.entries:
            if not _NAME.fullmatch(entry.split):
                raise PrepareError(
                    f"split {entry.split!r} of {entry.record_id!r}: use letters, digits, "
                    "underscores"
                )
            other = first.setdefault(entry.record_id, entry)
            if other is not entry:
                raise PrepareError(
                    f"duplicate id {entry.record_id!r}: {other.path!r} and {entry.path!r}; give "
                    "each row of the manifest its own id"
                )


def by_split(items: Iterable[Any]) -> dict[str, list[Any]]:
    """Returns the entries, or what else has a `split`, of each split, in their order."""
    splits: dict[str, list[Any]] = {}
    for item in items:
        splits.setdefault(item.split, []).append(item)
    return splits
