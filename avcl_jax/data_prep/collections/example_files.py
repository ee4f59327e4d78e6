"""Examples of record files in order, their options and their classes."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from etils import epath

from avcl_jax.data import record_files
from avcl_jax.data.media import MediaError
from avcl_jax.data.record_files import ARRAY_RECORD, RecordError
from avcl_jax.data.record_format import UNKNOWN_LABEL, ClassNumbers
from avcl_jax.data_prep.manifest import (
    COUNT,
    POSITIVE,
    Entry,
    ExamplePlace,
    Manifest,
    Missing,
    PrepareError,
)
from avcl_jax.paths import is_remote

# Numbers, and names, of the classes of an example.
ExampleClasses = tuple[Sequence[int], Sequence[str]]
NONE = "none"  # of a feature that is not wanted
_GZIP = b"\x1f\x8b"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares properties that examples do not state themselves."""
    add = parser.add_argument
    add("--fps", type=POSITIVE, help="frames per second, where the examples have no times")
    add("--sample-rate-of-source", type=COUNT, help="in Hz, where the examples do not state it")
    full_scale = "value of the loudest sample (1 for floats, 32768 for integers)"
    add("--full-scale", type=POSITIVE, help=full_scale)
    add("--id-feature", help="feature that names the record (the shard's name and a number)")
    add("--source-feature", help="feature that names the recording that the clip was cut from")


class Listing:
    """Entries of the examples of record files, with labels whose numbers are known only at the end.

    Attributes:
      entries: Also those of damaged examples: preparation rejects them with a reason.
      missing: Examples whose files are not there.
      classes: By label, numbers and names of the classes of each example.
    """

    def __init__(self, layout: Any, class_names: Mapping[str, Sequence[str] | None]):
        """Takes the features to read, and the names of the classes of each label, if known."""
        self._layout = layout
        self._class_names = class_names
        self.entries: list[Entry] = []
        self.missing: list[Missing] = []
        self.classes: dict[str, list[ExampleClasses]] = {label: [] for label in class_names}

    def add_file(
        self,
        path: epath.Path,
        name: str,
        split: str,
        file_format: str,
        describe: Callable[[Any], tuple[str, str]],
    ) -> int:
        """Adds the examples of a record file; returns their number.

        Examples without id are named by `name` and their number. `describe` returns id and source
        of a parsed example, "" for none; a damaged example is None. After damage to a length in a
        TFRecord file nothing more can be found.

        Raises PrepareError if the file is remote or compressed as a whole, or `describe` raises.
        """
        if file_format == ARRAY_RECORD and is_remote(path):
            raise PrepareError(f"{path}: copy ArrayRecord files to a local disk first")
        with path.open("rb") as file:
            if file.read(len(_GZIP)) == _GZIP:
                raise PrepareError(f"{path} is compressed: decompress it first (gzip -d)")
        first = len(self.entries)
        for number, (place, payload) in enumerate(record_files.scan(path, file_format)):
            try:
                example = None if isinstance(payload, RecordError) else self._layout.parse(payload)
            except MediaError:
                example = None
            try:
                record_id, source_id = describe(example)
            except MediaError as error:
                raise PrepareError(f"{path}, example {number}: {error.message}") from error
            record_id = record_id or f"{name}#{number}"
            ids = (split, record_id, source_id or record_id)
            place_of = ExamplePlace(file_format, place, self._layout)
            self.entries.append(Entry(os.fspath(path), *ids, 0.0, None, {}, place_of))
        return len(self.entries) - first

    def manifest(self, several: Collection[str] = ()) -> Manifest:
        """Returns the clips with their labels; those of `several` may have many classes per clip.

        Labels without classes are left out; nested features lose their slashes, which TFDS would
        nest.
        """
        class_names: dict[str, tuple[str, ...]] = {}
        multilabel = set()
        labels: list[dict[str, ClassNumbers]] = [{} for _ in self.entries]
        for label, classes in self.classes.items():
            names = _names(label, classes, self._class_names[label])
            if not names:
                continue
            name = label.replace("/", "_")
            class_names[name] = names
            if label in several or any(max(map(len, both)) > 1 for both in classes):
                multilabel.add(name)
            number_of = {text: number for number, text in enumerate(names)}
            for of_example, (numbers, texts) in zip(labels, classes, strict=True):
                found = [*numbers] or [number_of[text] for text in texts]
                unknown = UNKNOWN_LABEL if not found else found[0]
                of_example[name] = tuple(sorted({*found})) if name in multilabel else unknown
        entries = (
            dataclasses.replace(entry, labels=of_example)
            for entry, of_example in zip(self.entries, labels, strict=True)
        )
        return Manifest(tuple(entries), class_names, frozenset(multilabel), tuple(self.missing))


def _names(
    label: str, classes: Sequence[ExampleClasses], fixed: Sequence[str] | None
) -> tuple[str, ...]:
    """Returns the names of all classes in the order of their numbers; may raise PrepareError."""
    by_number: dict[int, str] = {}
    for numbers, texts in classes:
        for number, text in zip(numbers, texts, strict=False) if len(numbers) == len(texts) else ():
            if by_number.setdefault(number, text) != text:
                raise PrepareError(
                    f"class {number} of {label} is {by_number[number]!r} in one example and "
                    f"{text!r} in another: give --classes, or one of these sets alone"
                )
    highest = max((number for numbers, _ in classes for number in numbers), default=-1)
    texts_alone = {text for numbers, texts in classes if not numbers for text in texts}
    names = tuple(fixed or ())
    if fixed is None:
        names = tuple(by_number.get(number, str(number)) for number in range(highest + 1))
        names = (*names, *sorted(texts_alone - set(names)))
    unknown = sorted(texts_alone - set(names))
    if unknown or highest >= len(names):
        what = repr(unknown[0]) if unknown else highest
        raise PrepareError(f"class {what} of {label} is not among the names given")
    if len(set(names)) < len(names) or any("\n" in name or "\r" in name for name in names):
        raise PrepareError(f"{label}: two classes of one name, or a line break in one")
    return names
