"""Index of a split: its records' lengths, CRCs, times and labels, so that access is random.

One file per split, `NAME-SPLIT.index`: arrays of one value per record, compressed by numpy. A
million records take tens of megabytes and about a second to load (benchmarks/input_pipeline.py),
where one JSON file for each of ten thousand shards took minutes.
"""

from __future__ import annotations

import io
import itertools
import struct
import zipfile
import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import crc32c
import numpy as np
from etils import epath

from avcl_jax.data import record_files
from avcl_jax.data.record_files import RecordError
from avcl_jax.data.record_format import (
    LABEL_PREFIX,
    TIMELINE,
    Record,
    parse_record,
    peak,
    to_bytes,
    to_text,
)
from avcl_jax.paths import write_bytes

_VERSION = 3
# Errors of zipfile and numpy for a file of ours in name only, although its CRC is right.
_NO_INDEX = (
    *(ValueError, TypeError, KeyError, EOFError, OSError, RuntimeError, MemoryError),
    *(zipfile.BadZipFile, zlib.error, struct.error),
)


class StringColumn(Sequence[str]):
    """Many short strings in two arrays: Python objects would take five times the memory."""

    def __init__(self, text: np.ndarray, lengths: np.ndarray):
        """Takes uint8 [bytes], all strings one after another, and the bytes of each, [len]."""
        self._text, self._ends = text, np.cumsum(lengths, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        """Returns one string, or a list of those of a slice."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        begin = int(self._ends[index - 1]) if index else 0
        return to_text(self._text[begin : int(self._ends[index])].tobytes())


def index_row(record: Record, payload: bytes) -> dict[str, Any]:
    """Returns the entry of a record that is stored as `payload`: a value for each column."""
    seconds, gaps = record.frame_seconds, np.diff(record.frame_seconds)
    return {
        "record_id": record.record_id,
        "source_id": record.source_id,
        "labels": record.labels,
        "length": len(payload),
        "crc": record_files.masked_crc(payload),
        "num_frames": len(record.frames),
        "first_frame_seconds": seconds[0] if record.has_video else 0.0,
        "last_frame_seconds": seconds[-1] if record.has_video else 0.0,
        "max_frame_gap_seconds": gaps.max(initial=0.0),
        "min_frame_gap_seconds": gaps.min() if len(gaps) else 0.0,
        "num_samples": len(record.waveform),
        "audio_peak": peak(record.waveform),
        "sample_rate_hz": record.sample_rate_hz,
        "audio_start_seconds": record.audio_start_seconds,
        "duration_seconds": record.duration_seconds,
    }


def columns_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Returns the rows of one shard as arrays.

    A string has a column of text and one of lengths, a label with several classes per record one
    of counts and one of values.
    """
    dtypes = {"length": np.int64, "crc": np.uint32, **TIMELINE}
    columns: dict[str, Any] = {
        name: np.array([row[name] for row in rows], dtype) for name, dtype in dtypes.items()
    }
    for name in ("record_id", "source_id"):
        encoded = [to_bytes(row[name]) for row in rows]
        columns[name] = np.frombuffer(b"".join(encoded), np.uint8)
        columns[f"{name}_length"] = np.array([len(data) for data in encoded], np.int32)
    for label in rows[0]["labels"] if rows else ():
        values = [row["labels"][label] for row in rows]
        if isinstance(values[0], tuple):
            columns[f"counts_{label}"] = np.array([len(numbers) for numbers in values], np.int32)
            columns[f"values_{label}"] = np.array(list(itertools.chain(*values)), np.int32)
        else:
            columns[LABEL_PREFIX + label] = np.array(values, np.int32)
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
    write_bytes(epath.Path(path), buffer.getvalue())


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
    rows: list[dict[str, Any]] = []
    for place, payload in record_files.scan(shard, file_format):
        if isinstance(payload, RecordError):
            raise payload
        where = f"{shard}, record {len(rows)} at {place}"
        record = parse_record(payload, class_names, multilabel, where=where)
        rows.append(index_row(record, payload))
    return columns_of(rows)
