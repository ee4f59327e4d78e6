"""Files of payloads in either format: written all or nothing, scanned, read at a place.

A record's *place* is its byte offset in a TFRecord file and its number in an ArrayRecord file.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Protocol

from etils import epath

from avcl_jax.data import array_records, tfrecord
from avcl_jax.data.tfrecord import RecordError
from avcl_jax.paths import is_remote

TFRECORD, ARRAY_RECORD = "tfrecord", "array_record"
# As TFDS names them, in dataset_info.json and in the names of shards.
FILE_FORMATS = (TFRECORD, ARRAY_RECORD)


class _Sink(Protocol):
    def write(self, payload: bytes) -> object: ...
    def close(self) -> None: ...
    def abandon(self) -> None: ...


class _TFRecordSink:
    def __init__(self, path: epath.Path):
        self._file = path.open("wb")

    def write(self, payload: bytes) -> None:
        self._file.write(tfrecord.frame_payload(payload))

    def close(self) -> None:
        self._file.flush()
        with contextlib.suppress(AttributeError, OSError):  # object stores have no descriptor
            os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        with contextlib.suppress(OSError):  # closing flushes, which fails again on a full disk
            self._file.close()


class FileWriter:
    """Writes one file; nothing appears under its name before `finish`."""

    def __init__(self, path: epath.PathLike, file_format: str):
        """Opens a temporary file beside `path`.

        Raises:
          OSError: If it cannot be written.
          RecordError: For an ArrayRecord file in an object store.
        """
        self._path = epath.Path(path)
        self._temporary = self._path.parent / f"{self._path.name}.{os.getpid()}.tmp"
        if file_format == ARRAY_RECORD and is_remote(path):
            raise RecordError(f"{path}: ArrayRecord files are written to local disks only")
        self._sink: _Sink = (
            array_records.Writer(self._temporary)
            if file_format == ARRAY_RECORD
            else _TFRecordSink(self._temporary)
        )

    def write(self, payload: bytes) -> int:
        """Appends a payload; returns its masked CRC.

        Raises:
          OSError: If it cannot be written, for instance because the disk is full.
        """
        self._sink.write(payload)
        return tfrecord.masked_crc(payload)

    def finish(self) -> None:
        """Gives the file its name.

        Raises:
          OSError: If it cannot be written.
        """
        self._sink.close()
        self._temporary.replace(self._path)

    def abandon(self) -> None:
        """Removes what was written."""
        self._sink.abandon()
        self._temporary.unlink(missing_ok=True)


def scan(path: epath.Path, file_format: str) -> Iterator[tuple[int, bytes | memoryview, int]]:
    """Reads a whole file in order.

    Yields:
      Place of the record, payload, and its masked CRC.

    Raises:
      RecordError: If the file is truncated or damaged.
    """
    if file_format == TFRECORD:
        yield from tfrecord.scan(path)
        return
    for number, payload in array_records.scan(path):
        yield number, payload, tfrecord.masked_crc(payload)


def read(path: epath.Path, file_format: str, place: int, *, where: str) -> bytes | memoryview:
    """Reads one payload whose length nobody knows yet.

    Args:
      path: The file.
      file_format: One of `FILE_FORMATS`.
      place: Of the record.
      where: Its name for error messages.

    Raises:
      RecordError: If it is truncated or damaged.
      OSError: If the file cannot be read.
    """
    if file_format == ARRAY_RECORD:
        return array_records.read(path, place, where=where)
    return tfrecord.read_payload(path, place, where=where)


def read_known(
    path: epath.Path, file_format: str, place: int, *, length: int, crc: int, where: str
) -> bytes | memoryview:
    """Reads one payload that the index describes.

    Args:
      path: The file.
      file_format: One of `FILE_FORMATS`.
      place: Of the record.
      length: Bytes of its payload.
      crc: Its masked CRC.
      where: Its name for error messages.

    Raises:
      RecordError: If it is truncated, damaged, or not the one that the index describes.
    """
    if file_format == ARRAY_RECORD:
        payload = array_records.read(path, place, where=where)
        if len(payload) != length or tfrecord.masked_crc(payload) != crc:
            raise RecordError(f"{where}: stale index, delete the .index files beside the shards")
        return payload
    return tfrecord.read_known(path, place, length=length, crc=crc, where=where)
