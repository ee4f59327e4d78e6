"""What is known of a split without reading its records: the index that makes them random access.

One file for each split, `NAME-SPLIT.index`: arrays of one value a record, compressed by numpy. A
million records take tens of megabytes and about a second to load (benchmarks/input_pipeline.py),
where one JSON file for each of ten thousand shards took minutes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import struct
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import crc32c
import numpy as np
from etils import epath

from avcl_jax.data import record_files
from avcl_jax.data.record_format import (
    LABEL_PREFIX,
    Record,
    RecordTimeline,
    check_labels,
    parse_record,
    to_bytes,
    to_text,
)
from avcl_jax.data.silence import peak
from avcl_jax.data.tfrecord import RecordError

_VERSION = 3
# How zipfile and numpy refuse a file whose CRC is right and which is none of ours.
_NO_INDEX = (
    *(ValueError, TypeError, KeyError, EOFError, OSError, RuntimeError, MemoryError),
    *(zipfile.BadZipFile, zlib.error, struct.error),
)
_TIMELINE_TYPES = dict.fromkeys(
    ("num_frames", "num_samples", "audio_peak", "sample_rate_hz"), np.int32
)


class StringColumn(Sequence[str]):
    """Many short strings in two arrays: Python objects would take five times the memory."""

    def __init__(self, text: np.ndarray, ends: np.ndarray):
        """Takes uint8 [bytes], all strings one after another, and int64 [len], where each ends."""
        self.text = text
        self.ends = ends

    @classmethod
    def of(cls, strings: Sequence[str]) -> StringColumn:
        """Packs strings, which may hold undecodable bytes of file names (surrogates)."""
        encoded = [to_bytes(string) for string in strings]
        ends = np.cumsum([len(data) for data in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), ends)

    def __len__(self) -> int:
        """Number of strings."""
        return len(self.ends)

    def __getitem__(self, index: Any) -> Any:
        """One string, or a list of those of a slice."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        begin = int(self.ends[index - 1]) if index else 0
        return to_text(self.text[begin : int(self.ends[index])].tobytes())


@dataclasses.dataclass(frozen=True)
class IndexRow:
    """What the index keeps of one record.

    Attributes:
      record_id: Its name.
      source_id: What it was cut from.
      length: Bytes of its payload.
      crc: Masked CRC of its payload.
      timeline: Lengths and times.
      labels: Class numbers.
    """

    record_id: str
    source_id: str
    length: int
    crc: int
    timeline: RecordTimeline
    labels: Mapping[str, int | tuple[int, ...]]


def index_row(record: Record, length: int, crc: int) -> IndexRow:
    """Returns the row of a record whose payload has `length` bytes and the masked CRC `crc`."""
    gaps = np.diff(record.frame_seconds)
    timeline = RecordTimeline(
        num_frames=len(record.frames),
        first_frame_seconds=float(record.frame_seconds[0]) if record.has_video else 0.0,
        last_frame_seconds=float(record.frame_seconds[-1]) if record.has_video else 0.0,
        max_frame_gap_seconds=float(gaps.max(initial=0.0)),
        min_frame_gap_seconds=float(gaps.min()) if len(gaps) else 0.0,
        num_samples=len(record.waveform),
        audio_peak=peak(record.waveform),
        sample_rate_hz=record.sample_rate_hz,
        audio_start_seconds=record.audio_start_seconds,
        duration_seconds=record.duration_seconds,
    )
    return IndexRow(record.record_id, record.source_id, length, crc, timeline, dict(record.labels))


def _label_columns(rows: Sequence[IndexRow]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields a column for each label; of several labels a clip their counts and their values."""
    for label in rows[0].labels if rows else ():
        values = [row.labels[label] for row in rows]
        several = [value for value in values if isinstance(value, tuple)]
        if several:
            yield f"counts_{label}", np.array([len(numbers) for numbers in several], np.int32)
            flat = [number for numbers in several for number in numbers]
            yield f"values_{label}", np.array(flat, np.int32)
        else:
            yield LABEL_PREFIX + label, np.array(values, np.int32)


def columns_of(rows: Sequence[IndexRow]) -> dict[str, np.ndarray]:
    """Returns the rows of one shard as arrays."""
    columns: dict[str, np.ndarray] = {
        "length": np.array([row.length for row in rows], np.int64),
        "crc": np.array([row.crc for row in rows], np.uint32),
    }
    for name in RecordTimeline._fields:
        dtype = _TIMELINE_TYPES.get(name, np.float64)
        columns[name] = np.array([getattr(row.timeline, name) for row in rows], dtype)
    for name in ("record_id", "source_id"):
        strings = StringColumn.of([getattr(row, name) for row in rows])
        columns[name] = strings.text
        columns[f"{name}_length"] = np.diff(strings.ends, prepend=0).astype(np.int32)
    columns.update(_label_columns(rows))
    return columns


def merge(shards: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Returns the columns of a split from those of its shards, in order.

    Adds `shard_length`, records in each shard, and `source_number`, the same number for records of
    one source.
    """
    columns = {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]}
    columns["shard_length"] = np.array([len(shard["length"]) for shard in shards], np.int64)
    ends = np.cumsum(columns["source_id_length"], dtype=np.int64)
    numbers: dict[bytes, int] = {}
    text, begin, found = columns["source_id"].tobytes(), 0, []
    for end in ends.tolist():
        found.append(numbers.setdefault(text[begin:end], len(numbers)))
        begin = end
    columns["source_number"] = np.array(found, np.int32)
    return columns


def shard_columns(columns: Mapping[str, np.ndarray], number: int) -> dict[str, np.ndarray]:
    """Returns the columns of shard `number` from those of its split: undoes `merge`."""
    ends = np.cumsum(columns["shard_length"])
    records = slice(int(ends[number] - columns["shard_length"][number]), int(ends[number]))
    chosen = {}
    for name, values in columns.items():
        counts = columns.get(f"{name}_length")  # of strings
        if name.startswith("values_"):
            counts = columns[f"counts_{name.removeprefix('values_')}"]
        if name in ("shard_length", "source_number"):
            continue
        if counts is None:
            chosen[name] = values[records]
        else:
            first = int(counts[: records.start].sum())
            chosen[name] = values[first : first + int(counts[records].sum())]
    return chosen


def save_columns(path: epath.PathLike, columns: Mapping[str, np.ndarray]) -> None:
    """Writes columns to one file, all at once: a temporary file, then a rename."""
    path = epath.Path(path)
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {"version": np.int32(_VERSION), **columns}
    np.savez_compressed(buffer, **arrays)
    buffer.write(crc32c.crc32c(buffer.getvalue()).to_bytes(4, "little"))
    temporary = path.parent / f"{path.name}.{os.getpid()}.tmp"
    try:
        temporary.write_bytes(buffer.getvalue())
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def load_columns(path: epath.PathLike, *, without: Sequence[str] = ()) -> dict[str, Any] | None:
    """Reads what `save_columns` wrote.

    Args:
      path: The file.
      without: Columns that are not needed.

    Returns:
      The columns; None if the file is missing, damaged or of another version.
    """
    path = epath.Path(path)
    if not path.exists():
        return None
    data = path.read_bytes()
    if len(data) < 5 or crc32c.crc32c(data[:-4]) != int.from_bytes(data[-4:], "little"):
        return None
    try:
        with np.load(io.BytesIO(data[:-4]), allow_pickle=False) as stored:
            if int(stored["version"]) != _VERSION:
                return None
            left_out = ("version", *without)
            return {name: stored[name] for name in stored.files if name not in left_out}
    except _NO_INDEX:
        return None


def index_path(directory: epath.PathLike, name: str, split: str) -> epath.Path:
    """Returns where the index of a split lies."""
    return epath.Path(directory) / f"{name}-{split}.index"


def scan_shard(
    shard: epath.Path,
    file_format: str,
    class_names: Mapping[str, Sequence[str]],
    multilabel: Collection[str],
) -> dict[str, np.ndarray]:
    """Makes the columns of a shard from its records, reading all of it.

    Raises:
      RecordError: If the shard is missing, damaged or no shard of ours.
    """
    if not shard.exists():
        raise RecordError(f"{shard} is missing: prepare this data set again or copy all of it")
    rows: list[IndexRow] = []
    for place, payload, crc in record_files.scan(shard, file_format):
        where = f"{shard}, record {len(rows)} at {place}"
        record = parse_record(payload, where=where, multilabel=multilabel)
        check_labels(record, class_names, where=where)
        rows.append(index_row(record, len(payload), crc))
    return columns_of(rows)
