"""Prepared data sets: TFRecord shards of records, written and read without TensorFlow.

A prepared directory is what TensorFlow Datasets writes (`features.json`, `dataset_info.json`,
`NAME-SPLIT.tfrecord-00000-of-00010`), so TensorFlow users open it with
`tfds.builder_from_directory(directory).as_dataset(split=...)`. Metadata are written by
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

from avcl_jax.data import tfrecord
from avcl_jax.data.record_format import (
    FEATURE_KINDS,
    FORMAT_VERSION,
    LABEL_PREFIX,
    UNKNOWN_LABEL,
    Record,
    RecordTimeline,
    parse_record,
    serialize_record,
)
from avcl_jax.data.tfrecord import RecordError

__all__ = [
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


def _summary(record: Record, offset: int, length: int, crc: int) -> dict[str, Any]:
    gaps = np.diff(record.frame_seconds)
    timeline = RecordTimeline(
        num_frames=len(record.frames),
        first_frame_seconds=float(record.frame_seconds[0]) if record.has_video else 0.0,
        last_frame_seconds=float(record.frame_seconds[-1]) if record.has_video else 0.0,
        max_frame_gap_seconds=float(gaps.max(initial=0.0)),
        min_frame_gap_seconds=float(gaps.min()) if len(gaps) else 0.0,
        num_samples=len(record.waveform),
        sample_rate_hz=record.sample_rate_hz,
        audio_start_seconds=record.audio_start_seconds,
        duration_seconds=record.duration_seconds,
    )
    return {
        "offset": offset,
        "length": length,
        "crc": crc,
        "record_id": record.record_id,
        "source_id": record.source_id,
        **timeline._asdict(),
        **{LABEL_PREFIX + name: number for name, number in record.labels.items()},
    }


def _columns(summaries: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in summaries] for name in summaries[0]} if summaries else {}


class RecordWriter:
    """Writes one shard and its index; nothing appears under its name before it is complete.

    Use as a context manager: leaving it normally finishes the shard, leaving it by an exception
    removes what was written.
    """

    def __init__(self, path: epath.PathLike):
        """Opens a temporary file beside `path`."""
        self._path = epath.Path(path)
        self._temporary = self._path.parent / f"{self._path.name}.{os.getpid()}.tmp"
        self._summaries: list[dict[str, Any]] = []
        self._offset = 0
        self._file = self._temporary.open("wb")

    def write(self, record: Record) -> None:
        """Appends one record.

        Raises:
          ValueError: If the record contradicts itself.
          OSError: If it cannot be written, for instance because the disk is full.
        """
        payload = serialize_record(record)
        framed = tfrecord.frame_payload(payload)
        self._file.write(framed)
        crc = int.from_bytes(framed[-4:], "little")
        self._summaries.append(_summary(record, self._offset, len(payload), crc))
        self._offset += len(framed)

    def finish(self) -> ShardInfo:
        """Gives the shard its name, writes its index, and says what is in it."""
        self._file.flush()
        with contextlib.suppress(AttributeError, OSError):  # object stores have no descriptor
            os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.replace(self._path)
        tfrecord.write_index(self._path, _columns(self._summaries))
        return ShardInfo(len(self._summaries), sum(row["length"] for row in self._summaries))

    def abandon(self) -> None:
        """Removes what was written."""
        with contextlib.suppress(OSError):  # closing flushes, which fails again on a full disk
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            self.finish()
        else:
            self.abandon()


def write_shard(path: epath.PathLike, records: Iterable[Record]) -> ShardInfo:
    """Writes `records` to one TFRecord file with its index, all or nothing.

    Args:
      path: `DIRECTORY/NAME-SPLIT.tfrecord-00000-of-00001`.
      records: In the order in which they will be numbered.

    Returns:
      Numbers of records and bytes, for the data set's metadata.

    Raises:
      ValueError: If a record contradicts itself.
      OSError: If the file cannot be written.
    """
    writer = RecordWriter(path)
    try:
        for record in records:
            writer.write(record)
        return writer.finish()
    except BaseException:
        writer.abandon()
        raise


def shard_name(name: str, split: str, number: int, count: int) -> str:
    """Returns the file name TFDS gives to shard `number` of `count`."""
    return f"{name}-{split}.tfrecord-{number:05d}-of-{count:05d}"


def _read_json(path: epath.Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise RecordError(
            f"{path.parent} is not a finished data set ({path.name} is missing): "
            "run `python -m data_prep prepare`, again if it was interrupted"
        ) from None
    except ValueError as error:
        raise RecordError(f"{path} is damaged ({error}): prepare this data set again") from None


def _check_features(features: Mapping[str, Any], directory: epath.Path) -> list[str]:
    """Compares features.json with what this code reads; returns the names of the labels."""
    found = features.get("featuresDict", {}).get("features", {})
    for name, (kind, dtype, encoding) in FEATURE_KINDS.items():
        if name not in found:
            raise RecordError(
                f"{directory} has no feature {name!r}, it has {sorted(found)}: "
                "not a data set of `python -m data_prep prepare`"
            )
        tensor = found[name].get("tensor", {})
        actual = (
            found[name].get("pythonClassName", "").rpartition(".")[2],
            tensor.get("dtype"),
            tensor.get("encoding"),
        )
        if actual != (kind, dtype, encoding):
            raise RecordError(
                f"{directory}: feature {name!r} is {actual}, expected {(kind, dtype, encoding)}: "
                "not a data set of `python -m data_prep prepare`"
            )
    return sorted(
        name.removeprefix(LABEL_PREFIX) for name in found if name.startswith(LABEL_PREFIX)
    )


class RecordDataset:
    """Random access to one split of a prepared directory (a grain `RandomAccessDataSource`).

    Opening reads the metadata and the small index beside each shard, never the shards, unless an
    index is missing or stale: then it is rebuilt, and kept in memory where the directory cannot
    be written. Instances are picklable and may be read from many threads.

    Attributes:
      class_names: Names of the classes, for each label.
      source_numbers: int32 [len], the same number for records of one source.
      fingerprint: Changes when any record, or their order, does.
    """

    def __init__(self, directory: epath.PathLike, split: str):
        """Opens `split` of `directory`, a local path or gs://.

        Raises:
          RecordError: If it is not a finished data set of this version, lacks the split, or a
            shard is missing or does not match the metadata.
        """
        self._directory = epath.Path(directory)
        info = _read_json(self._directory / "dataset_info.json")
        features = _read_json(self._directory / "features.json")
        labels = _check_features(features, self._directory)
        version = info.get("version")
        if version != FORMAT_VERSION:
            raise RecordError(
                f"{self._directory} holds records of version {version}, this code reads "
                f"{FORMAT_VERSION}: prepare the media again with this release"
            )
        splits = {entry["name"]: entry for entry in info["splits"]}
        if split not in splits:
            raise RecordError(f"{self._directory} has no split {split!r}, it has {sorted(splits)}")
        self.split = split
        self.class_names: dict[str, list[str]] = {}
        for label in labels:
            path = self._directory / f"{LABEL_PREFIX}{label}.labels.txt"
            if not path.exists():
                raise RecordError(f"{path} is missing: prepare this data set again")
            self.class_names[label] = path.read_text().splitlines()
        lengths = [int(length) for length in splits[split]["shardLengths"]]
        self._shards = [
            self._directory / shard_name(info["name"], split, number, len(lengths))
            for number in range(len(lengths))
        ]
        columns: dict[str, list[Any]] = {}
        for shard, length in zip(self._shards, lengths, strict=True):
            shard_columns = _load_columns(shard)
            found = len(shard_columns.get("offset", ()))
            if found != length:
                raise RecordError(
                    f"{shard} holds {found} records where dataset_info.json says {length}: "
                    "prepare this data set again"
                )
            for name, values in shard_columns.items():
                columns.setdefault(name, []).extend(values)
        if not columns:
            raise RecordError(f"{self._directory}: split {split!r} has no records")
        self._shard_of = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        self._offsets = np.array(columns["offset"], np.int64)
        self._lengths = np.array(columns["length"], np.int64)
        self._crcs = np.array(columns["crc"], np.uint32)
        self.record_ids: list[str] = columns["record_id"]
        self.source_ids: list[str] = columns["source_id"]
        self.labels = {label: np.array(columns[LABEL_PREFIX + label], np.int32) for label in labels}
        # Arrays: lists of numbers would take ten times the memory for a million records.
        self._timelines = {name: np.array(columns[name]) for name in RecordTimeline._fields}
        numbers: dict[str, int] = {}
        self.source_numbers = np.array(
            [numbers.setdefault(source, len(numbers)) for source in self.source_ids], np.int32
        )
        digest = crc32c.crc32c(self._lengths.tobytes(), crc32c.crc32c(self._crcs.tobytes()))
        self.fingerprint = f"{info['name']}-{split}-{FORMAT_VERSION}-{len(self)}-{digest:08x}"

    def __len__(self) -> int:
        """Returns the number of records."""
        return len(self._offsets)

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
        shard = self._shards[self._shard_of[index]]
        where = f"{shard}, record {self.record_ids[index]!r}"
        framed = tfrecord.read_bytes(
            shard, int(self._offsets[index]), int(self._lengths[index]) + tfrecord.OVERHEAD_BYTES
        )
        if len(framed) < self._lengths[index] + tfrecord.OVERHEAD_BYTES:
            raise RecordError(f"{where} is truncated: prepare this data set again")
        payload = tfrecord.unframe_payload(framed, expected_crc=int(self._crcs[index]), where=where)
        return parse_record(payload, where=where)

    def timeline(self, index: int) -> RecordTimeline:
        """Returns lengths and times of one record without reading it."""
        return RecordTimeline(
            **{name: column[index].item() for name, column in self._timelines.items()}
        )


def _load_columns(shard: epath.Path) -> dict[str, list[Any]]:
    """Returns the index of `shard`, rebuilt from the shard where it is missing or stale."""
    columns = tfrecord.read_index(shard)
    if columns is not None:
        return columns
    logging.info("rebuilding the index of %s", shard)
    summaries = [
        _summary(parse_record(payload, where=f"{shard}, byte {offset}"), offset, len(payload), crc)
        for offset, payload, crc in tfrecord.scan(shard)
    ]
    columns = _columns(summaries)
    with contextlib.suppress(OSError):  # a read-only directory: the index stays in memory
        tfrecord.write_index(shard, columns)
    return columns
