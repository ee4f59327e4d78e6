"""Files of serialized records, TFRecord or ArrayRecord, whose content is checked when read.

A record's *place* is its byte offset in a TFRecord file and its number in an ArrayRecord file,
which TFDS opens without TensorFlow. TFRecord frames each record with CRCs. Riegeli, the format
beneath ArrayRecord, keeps a hash of every chunk and header, so that damage raises when it is read;
only the zeros that pad a file to 64 KiB may flip unnoticed, and mean nothing.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO, Protocol

import crc32c
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath

from avcl_jax.errors import UserError
from avcl_jax.paths import is_remote

TFRECORD, ARRAY_RECORD = "tfrecord", "array_record"
# As TFDS names them, in dataset_info.json and in the names of shards.
FILE_FORMATS = (TFRECORD, ARRAY_RECORD)

_HEADER = struct.Struct("<QI")  # payload length, masked CRC of the eight length bytes
_FOOTER = struct.Struct("<I")  # masked CRC of the payload
HEADER_BYTES = _HEADER.size
OVERHEAD_BYTES = _HEADER.size + _FOOTER.size

# One record per chunk, so that reading one decodes one; JPEG frames do not compress further.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_BUFFER_BYTES = 1 << 16
_OPEN_READERS = 256  # opening one costs as much as reading a record
_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.ENOENT, errno.EROFS)

_STALE = "stale index, delete the .index files beside the shards"


class RecordError(UserError):
    """A record file or directory that cannot be used, with the problem and the fix."""


def masked_crc(data: bytes | memoryview) -> int:
    """Returns TFRecord's masked CRC-32C of `data` (rotated by 15 bits, plus a constant)."""
    crc = crc32c.crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


class Sink(Protocol):
    """File of payloads that is being written."""

    def write(self, payload: bytes) -> None:
        """Appends a payload; raises OSError if it cannot be written, at the latest in `close`."""

    def close(self) -> None:
        """Completes the file and puts it on the disk; raises OSError if it cannot be written."""

    def abandon(self) -> None:
        """Closes the file, whatever is in it."""


def create(path: epath.Path, file_format: str) -> Sink:
    """Creates a file of one of `FILE_FORMATS`.

    Raises OSError if it cannot be written, RecordError for an ArrayRecord file in an object store.
    """
    if file_format != ARRAY_RECORD:
        return _TFRecordSink(path)
    if is_remote(path):
        raise RecordError(f"{path}: ArrayRecord files are written to local disks only")
    return _ArrayRecordSink(path)


class _TFRecordSink:
    def __init__(self, path: epath.Path):
        self._file = path.open("wb")

    def write(self, payload: bytes) -> None:
        self._file.write(frame_payload(payload))

    def close(self) -> None:
        self._file.flush()
        with contextlib.suppress(AttributeError, OSError):  # object stores have no descriptor
            os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        with contextlib.suppress(OSError):  # closing flushes, which fails again on a full disk
            self._file.close()


class _ArrayRecordSink:
    def __init__(self, path: epath.Path):
        self._path = os.fspath(path)
        with _system_errors(self._path):
            self._writer = ArrayRecordWriter(self._path, _WRITER_OPTIONS)
            if not self._writer.ok():
                self._writer.close()  # raises the problem

    def write(self, payload: bytes) -> None:
        self._writer.write(payload)

    def close(self) -> None:
        with _system_errors(self._path):
            self._writer.close()
        with open(self._path, "rb") as file:
            os.fsync(file.fileno())

    def abandon(self) -> None:
        if self._writer.is_open():
            with contextlib.suppress(RuntimeError):  # a full disk is already known here
                self._writer.close()


@contextlib.contextmanager
def _system_errors(path: str) -> Iterator[None]:
    """Turns the library's RuntimeError into the OSError that it reports as text."""
    try:
        yield
    except RuntimeError as error:
        codes = (code for code in _WRITE_ERRORS if os.strerror(code) in str(error))
        code = next(codes, errno.EIO)
        raise OSError(code, os.strerror(code), path) from error


def read(
    path: epath.Path,
    file_format: str,
    place: int,
    *,
    where: str,
    length: int | None = None,
    crc: int | None = None,
) -> bytes | memoryview:
    """Reads the payload at `place`.

    The file is opened for every call (TFRecord): that is thread-safe and picklable, needs no bound
    on open files with thousands of shards, and costs microseconds beside the decoding that follows.

    Args:
        path: file of one of `FILE_FORMATS`.
        file_format: its format.
        place: place of the record.
        where: name of the record for error messages.
        length: bytes of the payload by the index; None without an index.
        crc: masked CRC of the payload by the index; None without an index.

    Raises:
        RecordError: if the record is truncated, damaged, or not the one that the index describes.
        OSError: if the file cannot be read.
    """
    if file_format == ARRAY_RECORD:
        payload = _read_array_record(path, place, where)
        if length is not None and (len(payload), masked_crc(payload)) != (length, crc):
            raise RecordError(f"{where}: {_STALE}")
        return payload
    with path.open("rb") as file:
        file.seek(place)
        room = path.stat().length - place if length is None else None
        return _read_tfrecord(file, where, room=room, length=length, crc=crc)


def scan(path: epath.Path, file_format: str) -> Iterator[tuple[int, bytes | memoryview]]:
    """Yields place and payload of all records of a file, in order.

    Raises:
        RecordError: if the file is truncated or damaged.
    """
    if file_format == ARRAY_RECORD:
        for number in range(count_array_records(path)):
            yield number, _read_array_record(path, number, f"{path}, record {number}")
        return
    size, offset = path.stat().length, 0
    with path.open("rb") as file:
        while offset < size:
            where = f"{path}, record at byte {offset}"
            payload = _read_tfrecord(file, where, room=size - offset)
            yield offset, payload
            offset += OVERHEAD_BYTES + len(payload)


def frame_payload(payload: bytes) -> bytes:
    """Returns `payload` with TFRecord's header and footer around it."""
    length = struct.pack("<Q", len(payload))
    return b"".join(
        (length, _FOOTER.pack(masked_crc(length)), payload, _FOOTER.pack(masked_crc(payload)))
    )


def unframe_payload(framed: bytes, *, expected_crc: int | None, where: str) -> memoryview:
    """Checks one framed TFRecord and returns its payload, a view into `framed`.

    Args:
        expected_crc: masked CRC of the payload by the index; None to trust the footer.
        where: name of the record for error messages.

    Raises:
        RecordError: if the record is truncated, damaged, or not the one the index describes.
    """
    view = memoryview(framed)
    parts = view[:HEADER_BYTES], view[HEADER_BYTES : -_FOOTER.size], view[-_FOOTER.size :]
    if len(framed) < OVERHEAD_BYTES:
        raise RecordError(f"{where} is truncated: prepare this data set again")
    _check_frame(*parts, expected_crc=expected_crc, where=where)
    return parts[1]


def _check_frame(
    header: bytes | memoryview,
    payload: bytes | memoryview,
    footer: bytes | memoryview,
    *,
    expected_crc: int | None,
    where: str,
) -> None:
    length = payload_length(header, where=where, indexed=expected_crc is not None)
    if len(footer) < _FOOTER.size:
        raise RecordError(f"{where} is truncated: prepare this data set again")
    (crc,) = _FOOTER.unpack(footer)
    if length == len(payload) and masked_crc(payload) != crc:
        raise RecordError(f"{where} is damaged (CRC does not match): prepare this data set again")
    if length != len(payload) or (expected_crc is not None and crc != expected_crc):
        raise RecordError(f"{where}: {_STALE}")


def payload_length(header: bytes | memoryview, *, where: str, indexed: bool = False) -> int:
    """Returns the length that the header of a framed record states.

    If `indexed`, an index, which may be stale, says that a record begins here.

    Raises:
        RecordError: if it is truncated or damaged: nothing after it can be found then.
    """
    if len(header) < HEADER_BYTES:
        raise RecordError(f"{where} is truncated: prepare this data set again")
    length, length_crc = _HEADER.unpack(header)
    if masked_crc(header[:8]) != length_crc:
        raise RecordError(
            f"{where} is damaged or its index is stale (the CRC of its length does not match): "
            "delete the .index files beside the shards, and if this persists prepare again"
            if indexed
            else f"{where} is damaged (CRC does not match): prepare this data set again"
        )
    return int(length)


def _read_tfrecord(
    file: BinaryIO,
    where: str,
    *,
    room: int | None,
    length: int | None = None,
    crc: int | None = None,
) -> bytes:
    """Reads the record that begins here, `length` bytes by the index, at most `room` without one.

    In parts: megabytes of payload are not copied again to get at them.
    """
    header = file.read(HEADER_BYTES)
    if length is None:
        length = payload_length(header, where=where)
        # Before memory is reserved for it: a length may be wrong and have a CRC that fits.
        if room is None or length > room - OVERHEAD_BYTES:
            raise RecordError(f"{where} is truncated: prepare this data set again")
    payload, footer = file.read(length), file.read(_FOOTER.size)
    _check_frame(header, payload, footer, expected_crc=crc, where=where)
    return payload


def count_array_records(path: epath.PathLike) -> int:
    """Returns the number of records of an ArrayRecord file.

    Raises:
        RecordError: if there is no such file, or it is not an ArrayRecord file.
    """
    return int(_reader(path).num_records())


def _read_array_record(path: epath.PathLike, number: int, where: str) -> bytes:
    reader = _reader(path)
    if not 0 <= number < reader.num_records():
        raise RecordError(f"{where}: {path} has {reader.num_records()} records only")
    try:
        return bytes(reader.read([number])[0])
    except RuntimeError as error:
        raise RecordError(
            f"{where} is damaged ({_short(error)}): prepare this data set again"
        ) from error


def _reader(path: epath.PathLike) -> Any:
    """Returns an open ArrayRecord reader, shared by threads."""
    if is_remote(path):
        raise RecordError(f"{path}: ArrayRecord files are read from local disks only, copy it")
    try:
        status = os.stat(path)
        return _open_reader(os.fspath(path), (status.st_ino, status.st_size, status.st_mtime_ns))
    except FileNotFoundError:
        raise RecordError(
            f"{path} is missing: prepare this data set again or copy all of it"
        ) from None
    except RuntimeError as error:
        raise RecordError(
            f"{path} is truncated, damaged or not an ArrayRecord file ({_short(error)}): prepare "
            "this data set again"
        ) from error


@functools.lru_cache(maxsize=_OPEN_READERS)
def _open_reader(path: str, state: tuple[int, int, int]) -> Any:
    del state  # a file that was replaced is another file
    reader = ArrayRecordReader(path, _READER_OPTIONS, file_reader_buffer_size=_BUFFER_BYTES)
    if not reader.ok():
        reader.num_records()
        reader.close()  # raises the problem
    return reader


def _short(error: RuntimeError) -> str:
    return str(error).partition(";")[0]
