"""Prepared data sets: shards of records, read without TensorFlow.

A prepared directory is what TensorFlow Datasets writes (`features.json`, `dataset_info.json`,
`NAME-SPLIT.tfrecord-00000-of-00010`), so TensorFlow users open it with
`tfds.builder_from_directory(directory).as_dataset(split=...)`. Shards may be ArrayRecord files
instead, which `as_data_source(split=...)` opens without TensorFlow. `record_writer` writes both.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import crc32c
import numpy as np
import pyarrow as pa
from etils import epath

from avcl_jax.data import record_files
from avcl_jax.data.record_files import FILE_FORMATS, OVERHEAD_BYTES, TFRECORD, RecordError
from avcl_jax.data.record_format import (
    FORMAT_VERSION,
    LABEL_PREFIX,
    UNKNOWN_LABEL,
    Record,
    lacking,
    parse_record,
    to_text,
)
from avcl_jax.data.record_index import (
    OF_SPLITS,
    TIMELINE,
    index_path,
    load_table,
    merge,
    save_table,
    scan_shard,
    schema,
)
from avcl_jax.paths import absolute_path, is_remote


def shard_name(name: str, split: str, number: int, count: int, file_format: str = TFRECORD) -> str:
    """Returns the file name that TFDS gives to shard `number` of `count`."""
    return f"{name}-{split}.{file_format}-{number:05d}-of-{count:05d}"


def _read_text(path: epath.Path) -> str:
    try:
        return path.read_text()
    except (FileNotFoundError, NotADirectoryError):
        directory = path.parent
        problem = f"is not a finished data set ({path.name} is missing)"
        if not directory.is_dir():
            problem = "is a file, not a directory" if directory.exists() else "does not exist"
        raise RecordError(
            f"{directory} {problem}: give the --out of `avcl-data prepare`, and run that "
            "again if it was interrupted"
        ) from None


def _read_json(path: epath.Path) -> Any:
    try:
        return json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise RecordError(f"{path} is damaged ({error}): prepare this data set again") from None


def _read_labels(directory: epath.Path) -> dict[str, bool]:
    """Reads features.json; returns for each label whether a record may have several classes."""
    features = _read_json(directory / "features.json").get("featuresDict", {}).get("features", {})
    if missing := lacking(features):
        raise RecordError(
            f"{directory} has no feature {', '.join(missing)}: not a data set of `avcl-data`"
        )
    return {
        name.removeprefix(LABEL_PREFIX): feature["pythonClassName"].endswith(".Sequence")
        for name, feature in sorted(features.items())
        if name.startswith(LABEL_PREFIX)
    }


def split_names(directory: epath.PathLike) -> list[str]:
    """Returns the splits of a prepared directory.

    Raises:
        RecordError: if it is not a finished data set.
    """
    info = _read_json(absolute_path(directory) / "dataset_info.json")
    return [entry["name"] for entry in info["splits"]]


class Place(NamedTuple):
    """All that is needed to read a record without the index."""

    shard: str
    place: int  # its byte offset in the shard, or its number
    length: int
    header_length: int
    header_crc: int
    name: str


@dataclasses.dataclass(frozen=True)
class RecordReader:
    """Reads records of a split by their places; worker processes have it instead of the index."""

    file_format: str
    class_names: Mapping[str, Sequence[str]]
    multilabel: frozenset[str]

    def read(self, place: Place) -> Record:
        """Reads one record, or raises RecordError as `RecordDataset` does."""
        with self.open(place, whole=True) as record:
            return dataclasses.replace(record, frames=list(record.frames))

    @contextlib.contextmanager
    def open(self, place: Place, *, whole: bool = False) -> Iterator[Record]:
        """Opens one record, whose frames are read when they are used, inside the block.

        A RecordError of the block names the shard. `whole`: all frames will be used.

        Raises:
            RecordError: if the header or the audio is damaged; later, if a frame is.
        """
        path, where = epath.Path(place.shard), f"record {place.name!r}"
        payload = record_files.open_payload(
            path, self.file_format, place.place, place.length, where=where, whole=whole
        )
        with _naming(place.shard), payload as read:
            try:
                header = read(0, place.header_length, place.header_crc)
            except RecordError as error:
                stale = "or its index is stale: delete the .index files beside the shards"
                raise RecordError(f"{error}, {stale}") from error
            rest = read if place.header_length < place.length else None
            yield parse_record(header, self.class_names, self.multilabel, where=where, rest=rest)


@contextlib.contextmanager
def _naming(shard: str) -> Iterator[None]:
    """Adds the shard of a record to errors inside the block."""
    try:
        yield
    except RecordError as error:
        raise RecordError(f"{shard}, {error}") from error


class RecordDataset:
    """Random access to one split of a prepared directory (a grain `RandomAccessDataSource`).

    Opening reads the metadata and the index of the split, never the shards, unless the index is
    missing or stale: then it is rebuilt, and kept in memory where the directory cannot be written.
    Instances are picklable (a copy opens the directory again) and may be read from many threads.

    Attributes:
        class_names: names of the classes, for each label.
        multilabel: labels that allow several classes per record.
        record_ids: names of the records.
        labels: int32 [len] class numbers, -1 unknown, for each label that is not in `multilabel`.
        timelines: [len] of each field of `TIMELINE`.
        source_numbers: int32 [len], the same number for records of one source.
        fingerprint: text that changes when any record, or their order, does.
        file_format: format of the shards, one of `FILE_FORMATS`.
    """

    def __init__(self, directory: epath.PathLike, split: str):
        """Opens `split` of `directory`, a local path or gs://.

        Raises:
            RecordError: if it is not a finished data set of this version, lacks the split, or a
                shard is missing or does not match the metadata.
        """
        if not os.fspath(directory):
            raise RecordError(
                "the directory of records is empty: set data.directory to a prepared data set"
            )
        self._directory, self.split = absolute_path(directory), split
        info = _read_json(self._directory / "dataset_info.json")
        labels = _read_labels(self._directory)
        if (version := info.get("version")) != FORMAT_VERSION:
            raise RecordError(
                f"{self._directory} has records of version {version}, this code reads "
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
        self.class_names: dict[str, list[str]] = {
            label: _read_text(self._directory / f"{LABEL_PREFIX}{label}.labels.txt").splitlines()
            for label in labels
        }
        self.multilabel = frozenset(label for label, several in labels.items() if several)
        lengths = [int(length) for length in splits[split]["shardLengths"]]
        self._shards = [
            self._directory
            / shard_name(info["name"], split, number, len(lengths), self.file_format)
            for number in range(len(lengths))
        ]
        if not sum(lengths):
            raise RecordError(f"{self._directory}: split {split!r} has no records")
        table = self._load_index(index_path(self._directory, info["name"], split), lengths, labels)
        table = table.combine_chunks()
        columns = {name: table[name].chunk(0) for name in table.column_names}
        self._lengths = columns["length"].to_numpy()
        self._headers = tuple(columns[f"header_{n}"].to_numpy() for n in ("length", "crc"))
        self._shard_numbers = columns["shard"].to_numpy()
        # Place of each record in its shard: its byte offset, or its number.
        is_tfrecord = self.file_format == TFRECORD
        begins = _begins(self._lengths) if is_tfrecord else np.arange(sum(lengths) + 1)
        first_of_shard = np.searchsorted(self._shard_numbers, self._shard_numbers)
        self._places = begins[:-1] - begins[first_of_shard]
        self.record_ids = _Names(columns["record_id"])
        self.labels = {
            label: columns[LABEL_PREFIX + label].to_numpy()
            for label, several in labels.items()
            if not several
        }
        self._several = {label: columns[LABEL_PREFIX + label] for label in self.multilabel}
        self.timelines = {name: columns[name].to_numpy() for name in TIMELINE}
        self.source_numbers = columns["source_number"].to_numpy()
        _, crcs = self._headers
        digest = crc32c.crc32c(self._lengths.tobytes(), crc32c.crc32c(crcs.tobytes()))
        self.fingerprint = f"{info['name']}-{split}-{FORMAT_VERSION}-{len(self)}-{digest:08x}"

    def _load_index(
        self, path: epath.Path, lengths: Sequence[int], labels: Mapping[str, bool]
    ) -> pa.Table:
        """Returns the index, made from the shards where it is missing or does not fit them."""
        table = load_table(path)
        if table is None or not self._fits(table, lengths, labels):
            logging.warning("making the index %s by reading all shards of this split", path)
            shards = []
            for shard, length in zip(self._shards, lengths, strict=True):
                names = self.class_names, self.multilabel
                shards.append(scan_shard(shard, self.file_format, *names))
                if (count := len(shards[-1])) != length:
                    raise RecordError(
                        f"{shard} has {count} records where dataset_info.json says {length}: "
                        "prepare this data set again"
                    )
            table = merge(shards)
            with contextlib.suppress(OSError):  # a read-only directory: the index stays in memory
                save_table(path, table)
        return table.drop_columns(["source_id"])  # a million names that nothing needs

    def _fits(self, table: pa.Table, lengths: Sequence[int], labels: Mapping[str, bool]) -> bool:
        """Tests whether an index belongs to the shards, as far as their sizes tell.

        The sizes of files in an object store take a request each and are not looked at, and those
        of ArrayRecord files tell nothing; the CRC of every header, which the index also contains,
        catches at reading what this cannot see.
        """
        shards = np.repeat(np.arange(len(lengths)), lengths)
        if table.schema != schema(labels, *OF_SPLITS) or not np.array_equal(table["shard"], shards):
            return False
        sizes, headers = table["length"].to_numpy(), table["header_length"].to_numpy()
        if headers.min() < 0 or (sizes < headers).any():
            return False
        if is_remote(self._directory):
            return True
        expected = np.diff(_begins(sizes)[np.cumsum([0, *lengths])])
        actual = [record_files.size_of(shard) for shard in self._shards]  # raises without one
        return self.file_format != TFRECORD or actual == expected.tolist()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the place, not the index: workers would receive it through a pipe."""
        return RecordDataset, (self._directory, self.split)

    def __len__(self) -> int:
        return len(self._places)

    def __str__(self) -> str:
        return f"split {self.split!r} of {self._directory}"

    def __repr__(self) -> str:
        """Returns a constant description: grain puts it into its checkpoints."""
        return f"RecordDataset({self.fingerprint})"

    def __getitem__(self, index: int) -> Record:
        """Reads one record; frames stay JPEG.

        Raises RecordError if its bytes are damaged, truncated or not those that the index
        describes.
        """
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return self.reader.read(self.place_of(index))

    @property
    def reader(self) -> RecordReader:
        """Reader of the records, which needs their places."""
        return RecordReader(self.file_format, self.class_names, self.multilabel)

    def place_of(self, index: int) -> Place:
        """Returns where a record is stored."""
        return Place(
            shard=str(self.shard_of(index)),
            place=int(self._places[index]),
            length=int(self._lengths[index]),
            header_length=int(self._headers[0][index]),
            header_crc=int(self._headers[1][index]),
            name=self.record_ids[index],
        )

    def shard_of(self, index: int) -> epath.Path:
        """Returns the shard that contains a record."""
        return self._shards[self._shard_numbers[index]]

    @property
    def num_bytes(self) -> int:
        """Bytes of all payloads."""
        return int(self._lengths.sum())

    def class_numbers(self, label: str) -> tuple[np.ndarray, int]:
        """Returns the known classes of all records, several of one perhaps, and the number of
        records without; raises KeyError if there is no such label.
        """
        if label in self.multilabel:
            several = self._several[label]
            return several.flatten().to_numpy(), int(
                (several.value_lengths().to_numpy() == 0).sum()
            )
        known = self.labels[label] != UNKNOWN_LABEL
        return self.labels[label][known], int((~known).sum())

    def class_matrix(self, label: str, positions: Sequence[int]) -> np.ndarray:
        """Returns bool [positions, classes], which classes of a label in `multilabel` records have;
        raises KeyError for another label.
        """
        several = self._several[label].take(pa.array(positions))
        matrix = np.zeros((len(positions), len(self.class_names[label])), bool)
        matrix[several.value_parent_indices().to_numpy(), several.flatten().to_numpy()] = True
        return matrix


class _Names(Sequence[str]):
    """Names in one Arrow array: Python strings would take five times the memory."""

    def __init__(self, column: pa.BinaryArray):
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, index: Any) -> Any:
        """Returns one name, or a list of those of a slice."""
        found = self._column[index]
        if isinstance(index, slice):
            return [to_text(name) for name in found.to_pylist()]
        return to_text(found.as_py())


def _begins(lengths: np.ndarray) -> np.ndarray:
    """Returns where each record would begin, and the last end, were all shards one TFRecord."""
    return np.concatenate([[0], np.cumsum(lengths + OVERHEAD_BYTES)])
