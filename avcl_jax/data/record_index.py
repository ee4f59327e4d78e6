"""Index of a split: its records' lengths, CRCs, times and labels, so that access is random.

One file per split, `NAME-SPLIT.index`: arrays of one value per record, compressed by numpy. A
million records take tens of megabytes and about a second to load (benchmarks/input_pipeline.py),
where one JSON file for each of ten thousand shards took minutes.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import crc32c
import numpy as np
from etils import epath

from avcl_jax.data import record_files
from avcl_jax.data.record_files import RecordError
from avcl_jax.data.record_format import (
    LABEL_PREFIX,
    TIMELINE,
    ClassNumbers,
    Record,
    check_labels,
    parse_record,
    peak,
    to_bytes,
    to_text,
)
from avcl_jax.paths import replacing

_VERSION = 3
# Errors of zipfile and numpy for a file of ours in name only, although its CRC is right.
_NO_INDEX = (
    *(ValueError, TypeError, KeyError, EOFError, OSError, RuntimeError, MemoryError),
    *(zipfile.BadZipFile, zlib.error, struct.error),
)


class StringColumn(Sequence[str]):
    """Many short strings in two arrays: Python objects would take five times the memory.

    `text` uint8 [bytes] are all strings one after another, `ends` int64 [len] the end of each.
    """

    def __init__(self, text: np.ndarray, ends: np.ndarray):
        """Takes both arrays; see the class."""
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, strings: Sequence[str]) -> StringColumn:
        """Packs strings, which may contain undecodable bytes of file names (surrogates)."""
        encoded = [to_bytes(string) for string in strings]
        ends = np.cumsum([len(data) for data in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), ends)

    def __len__(self) -> int:
        """Number of strings."""
        return len(self.ends)

    def __getitem__(self, index: Any) -> Any:
        """Returns one string, or a list of those of a slice."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        begin = int(self.ends[index - 1]) if index else 0
        return to_text(self.text[begin : int(self.ends[index])].tobytes())


class IndexRow(NamedTuple):
    """Entry of one record: `length` and masked `crc` of its payload, `timeline` as `TIMELINE`."""

    record_id: str
    source_id: str
    length: int
    crc: int
    timeline: tuple[float, ...]
    labels: Mapping[str, ClassNumbers]


def index_row(record: Record, payload: bytes | memoryview) -> IndexRow:
    """Returns the entry of a record that is stored as `payload`."""
    seconds = record.frame_seconds
    gaps = np.diff(seconds)
    timeline = (
        len(record.frames),
        float(seconds[0]) if record.has_video else 0.0,
        float(seconds[-1]) if record.has_video else 0.0,
        float(gaps.max(initial=0.0)),
        float(gaps.min()) if len(gaps) else 0.0,
        len(record.waveform),
        peak(record.waveform),
        record.sample_rate_hz,
        record.audio_start_seconds,
        record.duration_seconds,
    )
    crc = record_files.masked_crc(payload)
    return IndexRow(record.record_id, record.source_id, len(payload), crc, timeline, record.labels)


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
    for number, (name, dtype) in enumerate(TIMELINE.items()):
        columns[name] = np.array([row.timeline[number] for row in rows], dtype)
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
    text, begin, sources = columns["source_id"].tobytes(), 0, []
    for end in ends.tolist():
        sources.append(numbers.setdefault(text[begin:end], len(numbers)))
        begin = end
    columns["source_number"] = np.array(sources, np.int32)
    return columns


def shard_columns(columns: Mapping[str, np.ndarray], number: int) -> dict[str, np.ndarray]:
    """Returns the columns of shard `number` from those of its split: undoes `merge`."""
    ends = np.cumsum(columns["shard_length"])
    records = slice(int(ends[number] - columns["shard_length"][number]), int(ends[number]))
    shard = {}
    for name, values in columns.items():
        if name in ("shard_length", "source_number"):
            continue
        counts = columns.get(f"{name}_length")  # of strings
        if name.startswith("values_"):
            counts = columns[f"counts_{name.removeprefix('values_')}"]
        if counts is None:
            shard[name] = values[records]
        else:
            first = int(counts[: records.start].sum())
            shard[name] = values[first : first + int(counts[records].sum())]
    return shard


def save_columns(path: epath.PathLike, columns: Mapping[str, np.ndarray]) -> None:
    """Writes columns to one file, all at once."""
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {"version": np.int32(_VERSION), **columns}
    np.savez_compressed(buffer, **arrays)
    buffer.write(crc32c.crc32c(buffer.getvalue()).to_bytes(4, "little"))
    with replacing(epath.Path(path)) as temporary:
        temporary.write_bytes(buffer.getvalue())


def load_columns(path: epath.PathLike, *, without: Sequence[str] = ()) -> dict[str, Any] | None:
    """Reads what `save_columns` wrote, except the columns `without`.

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
    """Returns the path of the index of a split."""
    return epath.Path(directory) / f"{name}-{split}.index"


def scan_shard(
    shard: epath.Path,
    file_format: str,
    class_names: Mapping[str, Sequence[str]],
    multilabel: Collection[str],
) -> dict[str, np.ndarray]:
    """Makes the columns of a shard from its records, reading all of it.

    Raises:
        RecordError: if the shard is missing, damaged or not a shard of ours.
    """
    rows: list[IndexRow] = []
    for place, payload in record_files.scan(shard, file_format):
        if isinstance(payload, RecordError):
            raise payload
        where = f"{shard}, record {len(rows)} at {place}"
        record = parse_record(payload, where=where, multilabel=multilabel)
        check_labels(record, class_names, where=where)
        rows.append(index_row(record, payload))
    return columns_of(rows)
