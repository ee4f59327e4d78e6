"""What is to be prepared: the clips of a collection, their labels, and what it lacks."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from avcl_jax.data.record_format import ClassNumbers
from avcl_jax.errors import UserError
from data_prep.example_layout import ExamplePlace


class PrepareError(UserError):
    """Preparation cannot start or go on; the message says what, which, and what to do."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One clip to prepare.

    Attributes:
      path: Media file, or the record file that holds `example`.
      split: Split the record goes to.
      record_id: Unique within the data set.
      source_id: What the clip is cut from.
      start_seconds: Where it starts in the file.
      end_seconds: Where it ends; None for the file's end.
      labels: Class number by label, -1 is unknown; all class numbers, perhaps none, for a label
        of which a clip may have several.
      example: Where in a record file the clip is; None for a media file.
    """

    path: str
    split: str
    record_id: str
    source_id: str
    start_seconds: float
    end_seconds: float | None
    labels: Mapping[str, ClassNumbers]
    example: ExamplePlace | None = None


@dataclasses.dataclass(frozen=True)
class Missing:
    """One clip that a collection's lists name and that is not there.

    Attributes:
      record_id: As the record would have been called.
      split: Split it would have gone to.
      expected: The usual name of its file.
    """

    record_id: str
    split: str
    expected: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """All clips, in the order of their records.

    Attributes:
      entries: At least one.
      class_names: Names of the classes, for each label.
      multilabel: Labels of which a clip may have several.
      missing: Clips that the lists name but the folder lacks, such as videos taken down.
      ignored: Files in the folder that nothing asked for.
    """

    entries: tuple[Entry, ...]
    class_names: Mapping[str, tuple[str, ...]]
    multilabel: frozenset[str] = frozenset()
    missing: tuple[Missing, ...] = ()
    ignored: int = 0


def check_manifest(manifest: Manifest) -> Manifest:
    """Returns the manifest.

    Raises:
      PrepareError: If two entries have one id, the name of a split or a label cannot be part of a
        file name, or the name of a class cannot be a line of a file.
    """
    for label, names in manifest.class_names.items():
        if not re.fullmatch(r"[A-Za-z0-9_]+", label):
            raise PrepareError(f"label {label!r}: use letters, digits, underscores in its name")
        for name in names:
            if [name] != name.splitlines() or not name.strip():
                raise PrepareError(f"class {name!r} of label {label!r}: its name must be one line")
    first: dict[str, Entry] = {}
    for entry in manifest.entries:
        if not re.fullmatch(r"[A-Za-z0-9_]+", entry.split):
            raise PrepareError(
                f"split {entry.split!r} of {entry.record_id!r}: use letters, digits, underscores"
            )
        other = first.setdefault(entry.record_id, entry)
        if other is not entry:
            raise PrepareError(
                f"duplicate id {entry.record_id!r}: {other.path!r} and {entry.path!r}; give each "
                "row of the manifest its own id"
            )
    return manifest
