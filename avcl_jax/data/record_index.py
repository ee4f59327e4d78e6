"""Index of a split: its records' lengths, CRCs, times and labels, so that access is random.

One Arrow file per split, `NAME-SPLIT.index`, with one row per record. A million records take tens
of megabytes and about a second to load (benchmarks/input_pipeline.py), where one JSON file for each
of ten thousand shards took minutes.
"""

from __future__ import annotations

import functools
import mmap
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import crc32c
import numpy as np
import pyarrow as pa
from etils import epath

from avcl_jax.data import record_files
from avcl_jax.data.record_files import RecordError
from avcl_jax.data.record_format import (
    LABEL_PREFIX,
    Record,
    header_length,
    parse_record,
    peak,
    to_bytes,
)
from avcl_jax.paths import write_bytes

# Lengths and times of a record: zeros for a missing modality, the longest and shortest time between
# two frames, the largest magnitude of a sample.
TIMELINE: Mapping[str, tuple[pa.DataType, Callable[[Record], float]]] = {
    "num_frames": (pa.int32(), lambda record: len(record.frames)),
    "first_frame_seconds": (pa.float64(), lambda r: r.frame_seconds[0] if r.has_video else 0.0),
    "last_frame_seconds": (pa.float64(), lambda r: r.frame_seconds[-1] if r.has_video else 0.0),
    "max_frame_gap_seconds": (pa.float64(), lambda r: np.diff(r.frame_seconds).max(initial=0.0)),
    "min_frame_gap_seconds": (
        pa.float64(),
        lambda r: np.diff(r.frame_seconds).min() if len(r.frame_seconds) > 1 else 0.0,
    ),
    "num_samples": (pa.int32(), lambda record: len(record.waveform)),
    "audio_peak": (pa.int32(), lambda record: peak(record.waveform)),
    "sample_rate_hz": (pa.int32(), lambda record: record.sample_rate_hz),
    "audio_start_seconds": (pa.float64(), lambda record: record.audio_start_seconds),
    "duration_seconds": (pa.float64(), lambda record: record.duration_seconds),
}
# Columns of the index of a split that those of its shards lack.
OF_SPLITS = ("shard", "source_number")


def schema(several: Mapping[str, bool], *more: str) -> pa.Schema:
    """Returns the columns of an index, and `more` of numbers.

    `several` tells which labels allow several classes per record: they are lists.
    """
    number = pa.int32()
    lengths = {"length": pa.int64(), "header_length": pa.int32(), "header_crc": pa.uint32()}
    times = {name: dtype for name, (dtype, _) in TIMELINE.items()}
    labels = {
        LABEL_PREFIX + label: pa.list_(number) if several[label] else number
        for label in sorted(several)
    }
    names = {"record_id": pa.binary(), "source_id": pa.binary()}
    return pa.schema(names | lengths | times | labels | dict.fromkeys(more, number))


def index_row(record: Record, payload: bytes, header: int) -> dict[str, Any]:
    """Returns the entry of a record that is stored as `payload`: a value for each column.

    `header` is the length of the header, whose CRCs of the parts its own CRC covers.
    """
    return {
        "record_id": to_bytes(record.record_id),
        "source_id": to_bytes(record.source_id),
        "length": len(payload),
        "header_length": header,
        "header_crc": record_files.masked_crc(payload[:header]),
        **{name: value(record) for name, (_, value) in TIMELINE.items()},
        **{LABEL_PREFIX + label: numbers for label, numbers in record.labels.items()},
    }


def index_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Returns the rows of one shard as a table."""
    several = {
        name.removeprefix(LABEL_PREFIX): isinstance(value, tuple)
        for name, value in (rows[0] if rows else {}).items()
        if name.startswith(LABEL_PREFIX)
    }
    return pa.Table.from_pylist(rows, schema(several))


def merge(shards: Iterable[pa.Table]) -> pa.Table:
    """Returns the table of a split from those of its shards, in order.

    Adds the number of each record's shard, and the same `source_number` for records of one source.
    """
    shards = list(shards)
    table = pa.concat_tables(shards).combine_chunks()
    numbers = np.repeat(np.arange(len(shards), dtype=np.int32), [len(shard) for shard in shards])
    sources = table["source_id"].combine_chunks().dictionary_encode().indices
    for name, column in zip(OF_SPLITS, (pa.array(numbers), sources), strict=True):
        table = table.append_column(name, column)
    return table


def shard_table(table: pa.Table, number: int) -> pa.Table:
    """Returns the table of shard `number` from that of its split: undoes `merge`."""
    first, last = np.searchsorted(table["shard"], [number, number + 1])
    return table.slice(first, last - first).drop_columns(list(OF_SPLITS))


def save_table(path: epath.PathLike, table: pa.Table) -> None:
    """Writes a table to one file, all at once."""
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=9))
    with pa.ipc.new_file(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    content = sink.getvalue().to_pybytes()
    write_bytes(epath.Path(path), content + crc32c.crc32c(content).to_bytes(4, "little"))


def load_table(path: epath.PathLike) -> pa.Table | None:
    """Reads what `save_table` wrote; returns None if the file is missing, damaged or another."""
    try:
        data = memoryview(epath.Path(path).read_bytes())
    except FileNotFoundError:
        return None
    if len(data) < 5 or crc32c.crc32c(data[:-4]) != int.from_bytes(data[-4:], "little"):
        return None
    try:
        table = pa.ipc.open_file(pa.py_buffer(data[:-4])).read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError):
        return None
    if any(column.null_count for column in table.columns):
        return None
    table = _in_file(table)
    pa.default_memory_pool().release_unused()
    return table


def _in_file(table: pa.Table) -> pa.Table:
    """Moves a table from memory into a file without a name; the system keeps the pages in use.

    Where no temporary file can be written, the table stays in memory, and a line says so.
    """
    try:
        with tempfile.TemporaryFile() as file:
            with pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
            file.flush()
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        _say_in_memory(error.strerror or str(error))
        return table
    return pa.ipc.open_file(pa.py_buffer(content)).read_all()


@functools.cache
def _say_in_memory(problem: str) -> None:
    print(
        f"no temporary file for the index ({problem}): every process keeps it in memory; free some "
        "space in /tmp, or set TMPDIR to a directory with room",
        file=sys.stderr,
        flush=True,
    )


def index_path(directory: epath.PathLike, name: str, split: str) -> epath.Path:
    """Returns the path of the index of a split."""
    return epath.Path(directory) / f"{name}-{split}.index"


def scan_shard(
    shard: epath.Path,
    file_format: str,
    class_names: Mapping[str, Sequence[str]],
    multilabel: Collection[str],
) -> pa.Table:
    """Makes the table of a shard from its records, reading all of it.

    Raises:
        RecordError: if the shard is missing, damaged or not a shard of ours.
    """
    rows: list[dict[str, Any]] = []
    for place, payload in record_files.scan(shard, file_format):
        if isinstance(payload, RecordError):
            raise payload
        where = f"{shard}, record {len(rows)} at {place}"
        record = parse_record(payload, class_names, multilabel, where=where)
        rows.append(index_row(record, payload, header_length(record, payload)))
    return index_table(rows)
