"""ArrayRecord files, which TFDS opens without TensorFlow.

Riegeli, the format beneath, keeps a hash of every chunk and header, so that damage raises when it
is read; only the zeros that pad a file to 64 KiB may flip unnoticed, and mean nothing.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
from collections.abc import Iterator
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath

from avcl_jax.data.tfrecord import RecordError
from avcl_jax.paths import is_remote

# One record a chunk, so that reading one decodes one; JPEG frames do not compress further.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_BUFFER_BYTES = 1 << 16
_OPEN_READERS = 256  # opening one costs as much as reading a record
_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.ENOENT, errno.EROFS)


class Writer:
    """Writes payloads to a local ArrayRecord file."""

    def __init__(self, path: epath.PathLike):
        """Opens the file.

        Raises:
          OSError: If it cannot be written.
        """
        self._path = os.fspath(path)
        with _system_errors(self._path):
            self._writer = ArrayRecordWriter(self._path, _WRITER_OPTIONS)
            if not self._writer.ok():
                self._writer.close()  # says what is wrong

    def write(self, payload: bytes) -> None:
        """Appends one; what goes wrong with the disk shows at `close`."""
        self._writer.write(payload)

    def close(self) -> None:
        """Completes the file and puts it on the disk.

        Raises:
          OSError: If it cannot be written.
        """
        with _system_errors(self._path):
            self._writer.close()
        descriptor = os.open(self._path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def abandon(self) -> None:
        """Closes the file, whatever is in it."""
        if self._writer.is_open():
            with contextlib.suppress(RuntimeError):  # a full disk is no news here
                self._writer.close()


@contextlib.contextmanager
def _system_errors(path: str) -> Iterator[None]:
    """Turns the library's RuntimeError into the OSError that it reports as text."""
    try:
        yield
    except RuntimeError as error:
        found = (code for code in _WRITE_ERRORS if os.strerror(code) in str(error))
        code = next(found, errno.EIO)
        raise OSError(code, os.strerror(code), path) from error


@functools.lru_cache(maxsize=_OPEN_READERS)
def _opened(path: str, state: tuple[int, int, int]) -> Any:
    del state  # a file that was replaced is another file
    reader = ArrayRecordReader(path, _READER_OPTIONS, file_reader_buffer_size=_BUFFER_BYTES)
    if not reader.ok():
        reader.num_records()
        reader.close()  # raises what is wrong
    return reader


def _reader(path: epath.PathLike) -> Any:
    """Returns an open reader, shared by threads.

    Raises:
      RecordError: If there is no such file, or it is no ArrayRecord file.
    """
    if is_remote(path):
        raise RecordError(f"{path}: ArrayRecord files are read from local disks only, copy it")
    try:
        status = os.stat(path)
        return _opened(os.fspath(path), (status.st_ino, status.st_size, status.st_mtime_ns))
    except FileNotFoundError:
        raise RecordError(
            f"{path} is missing: prepare this data set again or copy all of it"
        ) from None
    except RuntimeError as error:
        raise RecordError(
            f"{path} is truncated, damaged or no ArrayRecord file ({_short(error)}): prepare this "
            "data set again"
        ) from error


def _short(error: RuntimeError) -> str:
    return str(error).partition(";")[0]


def count(path: epath.PathLike) -> int:
    """Returns the number of records.

    Raises:
      RecordError: If there is no such file, or it is no ArrayRecord file.
    """
    return int(_reader(path).num_records())


def read(path: epath.PathLike, number: int, *, where: str) -> bytes:
    """Returns the payload of record `number`.

    Args:
      path: Local file.
      number: Of the record, from 0.
      where: Name of the record for error messages.

    Raises:
      RecordError: If the file is no ArrayRecord file, has fewer records, or is damaged there.
    """
    reader = _reader(path)
    if not 0 <= number < reader.num_records():
        raise RecordError(f"{where}: {path} holds {reader.num_records()} records only")
    try:
        return bytes(reader.read([number])[0])
    except RuntimeError as error:
        raise RecordError(
            f"{where} is damaged ({_short(error)}): prepare this data set again"
        ) from error


def scan(path: epath.PathLike) -> Iterator[tuple[int, bytes]]:
    """Yields number and payload of all records, in order.

    Raises:
      RecordError: If the file is truncated or damaged.
    """
    for number in range(count(path)):
        yield number, read(path, number, where=f"{path}, record {number}")
