"""Prepared data sets: shards of records, written and read without TensorFlow.

A prepared directory is what TensorFlow Datasets writes (`features.json`, `dataset_info.json`,
`NAME-SPLIT.tfrecord-00000-of-00010`), so TensorFlow users open it with
`tfds.builder_from_directory(directory).as_dataset(split=...)`. Shards may be ArrayRecord files
instead, which `as_data_source(split=...)` opens without TensorFlow. Metadata are written by
`avcl_jax.data.record_metadata`; this module writes shards and reads everything.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import crc32c
import numpy as np
from etils import epath

from avcl_jax.data import record_files, tfrecord
from avcl_jax.data.record_files import FILE_FORMATS, TFRECORD, FileWriter
from avcl_jax.data.record_format import (
    FEATURE_KINDS,
    FORMAT_VERSION,
    LABEL_PREFIX,
    UNKNOWN_LABEL,
    Record,
    RecordTimeline,
    check_labels,
    parse_record,
    serialize_record,
)
from avcl_jax.data.record_index import (
    IndexRow,
    StringColumn,
    columns_of,
    index_path,
    index_row,
    load_columns,
    merge,
    save_columns,
    scan_shard,
)
from avcl_jax.data.tfrecord import RecordError
from avcl_jax.paths import absolute_path, is_remote

__all__ = [
    "FILE_FORMATS",
    "FORMAT_VERSION",
    "UNKNOWN_LABEL",
    "Record",
    "RecordDataset",
    "RecordError",
    "RecordTimeline",
    "RecordWriter",
    "ShardInfo",
    "shard_name",
    "write_shard",
]


class ShardInfo(NamedTuple):
    """What dataset_info.json says of a shard: records, and bytes of their payloads."""

    num_records: int
    num_bytes: int


class RecordWriter:
    """Writes one shard; nothing appears under its name before it is complete.

    Use as a context manager: leaving it normally finishes the shard, leaving it by an exception
    removes what was written.
    """

    def __init__(self, path: epath.PathLike, file_format: str = TFRECORD):
        """Opens a temporary file beside `path`, of one of `FILE_FORMATS`."""
        self._rows: list[IndexRow] = []
        self._file = FileWriter(path, file_format)

    def write(self, record: Record) -> None:
        """Appends one record.

        Raises:
          ValueError: If the record contradicts itself.
          OSError: If it cannot be written, for instance because the disk is full.
        """
        payload = serialize_record(record)
        crc = self._file.write(payload)
        self._rows.append(index_row(record, len(payload), crc))

    def finish(self) -> ShardInfo:
        """Gives the shard its name and says what is in it."""
        self._file.finish()
        return ShardInfo(len(self._rows), sum(row.length for row in self._rows))

    def columns(self) -> dict[str, np.ndarray]:
        """Returns what the index keeps of the records written so far."""
        return columns_of(self._rows)

    def abandon(self) -> None:
        """Removes what was written."""
        self._file.abandon()

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            self.finish()
        else:
            self.abandon()


def write_shard(
    path: epath.PathLike, records: Iterable[Record], file_format: str = TFRECORD
) -> ShardInfo:
    """Writes `records` to one file, all or nothing.

    Args:
      path: `DIRECTORY/` and what `shard_name` returns.
      records: In the order in which they will be numbered.
      file_format: One of `FILE_FORMATS`.

    Returns:
      Numbers of records and bytes, for the data set's metadata.

    Raises:
      ValueError: If a record contradicts itself.
      OSError: If the file cannot be written.
    """
    writer = RecordWriter(path, file_format)
    try:
        for record in records:
            writer.write(record)
        return writer.finish()
    except BaseException:
        writer.abandon()
        raise


def shard_name(name: str, split: str, number: int, count: int, file_format: str = TFRECORD) -> str:
    """Returns the file name TFDS gives to shard `number` of `count`."""
    return f"{name}-{split}.{file_format}-{number:05d}-of-{count:05d}"


def _read_json(path: epath.Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        directory = path.parent
        problem = f"is not a finished data set ({path.name} is missing)"
        if not directory.is_dir():
            problem = "is a file, not a directory" if directory.exists() else "does not exist"
        raise RecordError(
            f"{directory} {problem}: give the --out of `python -m data_prep prepare`, and run that "
            "again if it was interrupted"
        ) from None
    except ValueError as error:
        raise RecordError(f"{path} is damaged ({error}): prepare this data set again") from None


def _check_features(features: Mapping[str, Any], directory: epath.Path) -> dict[str, bool]:
    """Compares features.json with what this code reads.

    Returns:
      For the name of each label, whether a clip may have several.
    """
    found = features.get("featuresDict", {}).get("features", {})

    def kind_of(name: str) -> str:
        return found[name].get("pythonClassName", "").rpartition(".")[2]

    for name, (kind, dtype, encoding) in FEATURE_KINDS.items():
        if name not in found:
            raise RecordError(
                f"{directory} has no feature {name!r}, it has {', '.join(sorted(found))}: "
                "not a data set of `python -m data_prep`"
            )
        tensor = found[name].get("tensor", {})
        actual = (kind_of(name), tensor.get("dtype"), tensor.get("encoding"))
        if actual != (kind, dtype, encoding):
            raise RecordError(
                f"{directory}: feature {name!r} is {actual}, expected {(kind, dtype, encoding)}: "
                "not a data set of `python -m data_prep`"
            )
    return {
        name.removeprefix(LABEL_PREFIX): kind_of(name) == "Sequence"
        for name in sorted(found)
        if name.startswith(LABEL_PREFIX)
    }


def split_names(directory: epath.PathLike) -> list[str]:
    """Returns the splits of a prepared directory.

    Raises:
      RecordError: If it is no finished data set.
    """
    info = _read_json(absolute_path(directory) / "dataset_info.json")
    return [entry["name"] for entry in info["splits"]]


def _begins(lengths: np.ndarray) -> np.ndarray:
    """Returns where each record would begin, and the last end, were all shards one TFRecord."""
    return np.concatenate([[0], np.cumsum(lengths + tfrecord.OVERHEAD_BYTES)])


class RecordDataset:
    """Random access to one split of a prepared directory (a grain `RandomAccessDataSource`).

    Opening reads the metadata and the index of the split, never the shards, unless the index is
    missing or stale: then it is rebuilt, and kept in memory where the directory cannot be written.
    Instances are picklable (a copy opens the directory again) and may be read from many threads.

    Attributes:
      class_names: Names of the classes, for each label.
      multilabel: Labels of which a record may have several.
      record_ids: Names of the records.
      labels: int32 [len] class numbers, -1 unknown, for each label that is not in `multilabel`.
      timelines: [len] of each field of `RecordTimeline`.
      source_numbers: int32 [len], the same number for records of one source.
      fingerprint: Changes when any record, or their order, does.
      file_format: Of the shards, one of `FILE_FORMATS`.
    """

    def __init__(self, directory: epath.PathLike, split: str):
        """Opens `split` of `directory`, a local path or gs://.

        Raises:
          RecordError: If it is not a finished data set of this version, lacks the split, or a
            shard is missing or does not match the metadata.
        """
        if not os.fspath(directory):
            raise RecordError("no directory of records is given: set --config.data.directory")
        self._directory = absolute_path(directory)
        info = _read_json(self._directory / "dataset_info.json")
        features = _read_json(self._directory / "features.json")
        labels = _check_features(features, self._directory)
        version = info.get("version")
        if version != FORMAT_VERSION:
            raise RecordError(
                f"{self._directory} holds records of version {version}, this code reads "
                f"{FORMAT_VERSION}: prepare the media again with this release"
            )
        self.file_format = info.get("fileFormat", TFRECORD)
        if self.file_format not in FILE_FORMATS:
            raise RecordError(
                f"{self._directory} has shards of format {self.file_format!r}, this code reads "
                f"{' and '.join(FILE_FORMATS)}"
            )
        splits = {entry["name"]: entry for entry in info["splits"]}
        if split not in splits:
            raise RecordError(
                f"{self._directory} has no split {split!r}, it has {', '.join(sorted(splits))}"
            )
        self.split = split
        self.class_names: dict[str, list[str]] = {}
        for label in labels:
            path = self._directory / f"{LABEL_PREFIX}{label}.labels.txt"
            if not path.exists():
                raise RecordError(f"{path} is missing: prepare this data set again")
            self.class_names[label] = path.read_text().splitlines()
        self.multilabel = frozenset(label for label, several in labels.items() if several)
        lengths = [int(length) for length in splits[split]["shardLengths"]]
        self._shards = [
            self._directory
            / shard_name(info["name"], split, number, len(lengths), self.file_format)
            for number in range(len(lengths))
        ]
        if not sum(lengths):
            raise RecordError(f"{self._directory}: split {split!r} has no records")
        columns = self._load_index(index_path(self._directory, info["name"], split), lengths)
        self._lengths, self._crcs = columns["length"], columns["crc"]
        self._first = np.concatenate([[0], np.cumsum(lengths)])
        # Of each record in its shard: its byte offset, or its number.
        if self.file_format == TFRECORD:
            begins = _begins(self._lengths)
            self._places = begins[:-1] - np.repeat(begins[self._first[:-1]], lengths)
        else:
            self._places = np.arange(sum(lengths)) - np.repeat(self._first[:-1], lengths)
        self.record_ids = StringColumn(
            columns["record_id"], np.cumsum(columns["record_id_length"], dtype=np.int64)
        )
        self.labels = {
            label: columns[LABEL_PREFIX + label] for label, several in labels.items() if not several
        }
        self._several = {
            label: (columns[f"counts_{label}"], columns[f"values_{label}"])
            for label in self.multilabel
        }
        self.timelines = {name: columns[name] for name in RecordTimeline._fields}
        self.source_numbers = columns["source_number"]
        digest = crc32c.crc32c(self._lengths.tobytes(), crc32c.crc32c(self._crcs.tobytes()))
        self.fingerprint = f"{info['name']}-{split}-{FORMAT_VERSION}-{len(self)}-{digest:08x}"

    def _load_index(self, path: epath.Path, lengths: Sequence[int]) -> dict[str, np.ndarray]:
        """Returns the index, made from the shards where it is missing or does not fit them."""
        columns = load_columns(path, without=("source_id", "source_id_length"))
        if columns is not None and self._fits(columns, lengths):
            return columns
        logging.warning("making the index %s by reading all shards of this split", path)
        shards = []
        for shard, length in zip(self._shards, lengths, strict=True):
            shards.append(scan_shard(shard, self.file_format, self.class_names, self.multilabel))
            found = len(shards[-1]["length"])
            if found != length:
                raise RecordError(
                    f"{shard} holds {found} records where dataset_info.json says {length}: "
                    "prepare this data set again"
                )
        columns = merge(shards)
        with contextlib.suppress(OSError):  # a read-only directory: the index stays in memory
            save_columns(path, columns)
        return columns

    def _fits(self, columns: Mapping[str, np.ndarray], lengths: Sequence[int]) -> bool:
        """Whether an index belongs to the shards, as far as their sizes tell.

        The sizes of files in an object store take a request each and are not looked at, and those
        of ArrayRecord files tell nothing; the CRC of every record, which the index also holds,
        catches at reading what this cannot see.
        """
        single = {LABEL_PREFIX + label for label in set(self.class_names) - self.multilabel}
        one_a_record = {*RecordTimeline._fields, "length", "crc", "source_number", *single}
        if not one_a_record | {"shard_length", "record_id", "record_id_length"} <= set(columns):
            return False
        if {columns[name].shape for name in one_a_record} != {(sum(lengths),)}:
            return False
        if columns["shard_length"].tolist() != list(lengths) or columns["length"].min() < 0:
            return False
        if is_remote(self._directory):
            return True
        expected = np.diff(_begins(columns["length"])[np.cumsum([0, *lengths])])
        for shard, size in zip(self._shards, expected.tolist(), strict=True):
            try:
                if os.stat(shard).st_size != size and self.file_format == TFRECORD:
                    return False
            except FileNotFoundError:
                raise RecordError(
                    f"{shard} is missing: prepare this data set again or copy all of it"
                ) from None
        return True

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the place, not the index: workers would receive it through a pipe."""
        return RecordDataset, (self._directory, self.split)

    def __len__(self) -> int:
        """Returns the number of records."""
        return len(self._places)

    def __str__(self) -> str:
        """Returns the split and the directory, for messages."""
        return f"split {self.split!r} of {self._directory}"

    def __repr__(self) -> str:
        """Returns a constant description: grain puts it into its checkpoints."""
        return f"RecordDataset({self.fingerprint})"

    def __getitem__(self, index: int) -> Record:
        """Reads one record; frames stay JPEG.

        Raises:
          IndexError: If `index` is out of range.
          RecordError: If its bytes are damaged, truncated or not what the index describes.
        """
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        shard = self.shard_of(index)
        where = f"{shard}, record {self.record_ids[index]!r}"
        payload = record_files.read_known(
            shard,
            self.file_format,
            int(self._places[index]),
            length=int(self._lengths[index]),
            crc=int(self._crcs[index]),
            where=where,
        )
        record = parse_record(payload, where=where, multilabel=self.multilabel)
        check_labels(record, self.class_names, where=where)
        return record

    def shard_of(self, index: int) -> epath.Path:
        """Returns the shard in which a record lies."""
        return self._shards[int(np.searchsorted(self._first, index, side="right")) - 1]

    @property
    def num_bytes(self) -> int:
        """Bytes of all payloads."""
        return int(self._lengths.sum())

    def class_numbers(self, label: str) -> tuple[np.ndarray, int]:
        """Returns the known classes of all records, several of one perhaps, and records without.

        Raises:
          KeyError: If there is no such label.
        """
        if label in self.multilabel:
            counts, values = self._several[label]
            return values, int((counts == 0).sum())
        known = self.labels[label] != UNKNOWN_LABEL
        return self.labels[label][known], int((~known).sum())

    def class_matrix(self, label: str, positions: Sequence[int]) -> np.ndarray:
        """Returns bool [positions, classes], which classes each of the records has.

        Raises:
          KeyError: If there is no such label of which a record may have several.
        """
        counts, values = self._several[label]
        ends = np.cumsum(counts)
        matrix = np.zeros((len(positions), len(self.class_names[label])), bool)
        for row, position in enumerate(positions):
            matrix[row, values[ends[position] - counts[position] : ends[position]]] = True
        return matrix

    def timeline(self, index: int) -> RecordTimeline:
        """Returns lengths and times of one record without reading it."""
        return RecordTimeline(
            **{name: column[index].item() for name, column in self.timelines.items()}
        )
