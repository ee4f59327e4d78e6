"""The examples of record files in order, and the options that all kinds of examples share."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from etils import epath

from avcl_jax.data import array_records, tfrecord
from avcl_jax.data.record_files import ARRAY_RECORD, TFRECORD
from avcl_jax.data.record_format import UNKNOWN_LABEL, ClassNumbers
from avcl_jax.data.tfrecord import RecordError
from data_prep.manifest import Entry, Manifest, Missing, PrepareError

_GZIP = b"\x1f\x8b"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what examples do not say of themselves."""
    add = parser.add_argument
    add("--fps", type=float, help="frames a second, where the examples do not say when each is")
    add("--sample-rate-of-source", type=int, help="in Hz, where the examples do not say it")
    add(
        "--full-scale",
        type=float,
        help="value of the loudest sample (1 for floats, 32768 for integers)",
    )
    add("--id-feature", help="feature that names the record (the shard's name and a number)")
    add("--source-feature", help="feature that names what the clip was cut from")


def check_arguments(args: argparse.Namespace) -> None:
    """Raises PrepareError if one makes no sense."""
    checks = (
        (args.fps is None or args.fps > 0, "--fps must be above 0"),
        (
            args.sample_rate_of_source is None or args.sample_rate_of_source > 0,
            "--sample-rate-of-source must be above 0",
        ),
        (args.full_scale is None or args.full_scale > 0, "--full-scale must be above 0"),
    )
    for good, message in checks:
        if not good:
            raise PrepareError(message)


def examples(path: epath.Path, file_format: str) -> Iterator[tuple[int, bytes | memoryview | None]]:
    """Yields the place and the payload of each example; no payload where the file is damaged.

    What is damaged is listed so that preparation rejects it with its reason. After damage to a
    length in a TFRecord file nothing more can be found.

    Raises:
      PrepareError: If the file is compressed as a whole.
    """
    read = _array_record if file_format == ARRAY_RECORD else _tfrecord
    return read(path)


def _array_record(path: epath.Path) -> Iterator[tuple[int, bytes | None]]:
    try:
        count = array_records.count(path)
    except RecordError:
        yield 0, None
        return
    for number in range(count):
        try:
            yield number, array_records.read(path, number, where=str(path))
        except RecordError:
            yield number, None


def _tfrecord(path: epath.Path) -> Iterator[tuple[int, memoryview | None]]:
    size = path.stat().length
    offset, where = 0, str(path)
    with path.open("rb") as file:
        while header := file.read(tfrecord.HEADER_BYTES):
            if offset == 0 and header.startswith(_GZIP):
                raise PrepareError(f"{path} is compressed: decompress it first (gzip -d)")
            try:
                length = tfrecord.payload_length(header, where=where)
            except RecordError:
                yield offset, None
                return
            end = offset + length + tfrecord.OVERHEAD_BYTES
            if end > size:
                yield offset, None
                return
            framed = header + file.read(end - offset - len(header))
            try:
                yield offset, tfrecord.unframe_payload(framed, expected_crc=None, where=where)
            except RecordError:
                yield offset, None
            offset = end


def format_of(path: epath.Path) -> str:
    """Returns the format that a file's name tells."""
    return ARRAY_RECORD if re.search(r"array_?record", path.name, re.IGNORECASE) else TFRECORD


class Classes:
    """Numbers and names of the classes of one label, found example by example."""

    def __init__(self, label: str, names: Sequence[str] | None):
        """Takes the names if they are known beforehand."""
        self._label = label
        self._fixed = None if names is None else tuple(names)
        self._found: dict[int, str] = {}
        self._texts: set[str] = set()
        self._highest = -1
        self._seen: list[tuple[Sequence[int], Sequence[str]]] = []
        self.several = False

    def add(self, numbers: Sequence[int], texts: Sequence[str]) -> None:
        """Takes the class numbers, or names, or both, of the next example.

        Raises:
          PrepareError: If a number stands for two names.
        """
        self._seen.append((tuple(numbers), () if numbers else tuple(texts)))
        self._texts.update(() if numbers else texts)
        self._highest = max(self._highest, *numbers, -1)
        self.several |= max(len(numbers), len(texts)) > 1
        if len(numbers) != len(texts):
            return
        for number, text in zip(numbers, texts, strict=True):
            if self._found.setdefault(number, text) != text:
                raise PrepareError(
                    f"class {number} of {self._label} is {self._found[number]!r} in one example "
                    f"and {text!r} in another: give --classes, or one of these sets alone"
                )

    def names(self) -> tuple[str, ...]:
        """Returns the names in the order of their numbers.

        Raises:
          PrepareError: If an example has a class that is not among the names.
        """
        if self._fixed is not None:
            names = self._fixed
        elif self._highest >= 0:
            names = tuple(self._found.get(n, str(n)) for n in range(self._highest + 1))
            if self._texts - set(names):
                names = (*names, *sorted(self._texts - set(names)))
        else:
            names = tuple(sorted(self._texts))
        unknown = sorted(self._texts - set(names))
        if unknown or self._highest >= len(names):
            what = repr(unknown[0]) if unknown else str(self._highest)
            raise PrepareError(f"class {what} of {self._label} is not among the names given")
        if len(set(names)) < len(names) or any("\n" in name or "\r" in name for name in names):
            raise PrepareError(f"{self._label}: two classes of one name, or a line break in one")
        return names

    def numbers(self) -> Iterator[ClassNumbers]:
        """Yields the class numbers of each example, in the order in which they were added."""
        number_of = {name: number for number, name in enumerate(self.names())}
        for numbers, texts in self._seen:
            found = [*numbers, *(number_of[text] for text in texts)]
            if self.several:
                yield tuple(sorted({number for number in found if number >= 0}))
            else:
                yield found[0] if found else UNKNOWN_LABEL


def class_columns(
    classes: Mapping[str, Classes],
) -> tuple[dict[str, tuple[str, ...]], frozenset[str], Iterable[dict[str, ClassNumbers]]]:
    """Returns names, the labels of which a clip may have several, and each example's labels.

    Labels without classes are left out; nested features lose their slashes, which TFDS would nest.
    """
    used = {label.replace("/", "_"): found for label, found in classes.items() if found.names()}
    columns = {label: found.numbers() for label, found in used.items()}
    rows = (
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    )
    several = frozenset(label for label, found in used.items() if found.several)
    return {label: found.names() for label, found in used.items()}, several, rows


def manifest(
    found: Sequence[Entry], missing: Sequence[Missing], classes: Mapping[str, Classes]
) -> Manifest:
    """Returns the clips with their labels, whose numbers are known only now."""
    names, several, rows = class_columns(classes)
    if names:
        found = [
            dataclasses.replace(entry, labels=labels)
            for entry, labels in zip(found, rows, strict=True)
        ]
    return Manifest(tuple(found), names, several, tuple(missing))
