"""Files of serialized records, TFRecord or ArrayRecord, whose content is checked when read.

A record's *place* is its byte offset in a TFRecord file and its number in an ArrayRecord file,
which TFDS opens without TensorFlow. TFRecord frames each record with CRCs. Riegeli, the format
beneath ArrayRecord, keeps a hash of every chunk and header, so that damage raises when it is read;
only the zeros that pad a file to 64 KiB may flip unnoticed, and mean nothing. A payload whose parts
have known CRCs can be read in parts.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import struct
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import crc32c
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath

from avcl_jax.errors import UserError
from avcl_jax.paths import is_remote, replacing

TFRECORD, ARRAY_RECORD = "tfrecord", "array_record"
# As TFDS names them, in dataset_info.json and in the names of shards.
FILE_FORMATS = (TFRECORD, ARRAY_RECORD)

_HEADER = struct.Struct("<QI")  # payload length, masked CRC of the eight length bytes
_FOOTER = struct.Struct("<I")  # masked CRC of the payload
OVERHEAD_BYTES = _HEADER.size + _FOOTER.size

# One record per chunk, so that reading one decodes one; JPEG frames do not compress further.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_BUFFER_BYTES = 1 << 16
_OPEN_READERS = 256  # opening one costs as much as reading a record
_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.ENOENT, errno.EROFS)

_AGAIN = "prepare this data set again"


class RecordError(UserError):
    """A record file or directory that cannot be used, with the problem and the fix."""


# Reads part of a payload, given its first byte, its size and its masked CRC.
ReadPart = Callable[[int, int, int], bytes]


def masked_crc(data: bytes | memoryview) -> int:
    """Returns TFRecord's masked CRC-32C of `data` (rotated by 15 bits, plus a constant)."""
    crc = crc32c.crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


@contextlib.contextmanager
def create(path: epath.Path, file_format: str) -> Iterator[Callable[[bytes], object]]:
    """Opens a block that writes a record file; yields the function that appends a payload.

    The file gets its name when the block ends, and is removed after an error.

    Raises:
        OSError: if it cannot be written.
        RecordError: if it is an ArrayRecord file in an object store.
    """
    if file_format == ARRAY_RECORD and is_remote(path):
        raise RecordError(f"{path}: ArrayRecord files are written to local disks only")
    with replacing(path) as temporary:
        if file_format == ARRAY_RECORD:
            with _array_record_writer(os.fspath(temporary)) as writer:
                yield writer.write
        else:
            with temporary.open("wb") as file:
                yield lambda payload: file.write(frame_payload(payload))
        if not is_remote(path):
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())


@contextlib.contextmanager
def _array_record_writer(path: str) -> Iterator[Any]:
    with _system_errors(path):
        writer = ArrayRecordWriter(path, _WRITER_OPTIONS)
        if not writer.ok():
            writer.close()  # raises the problem
    try:
        yield writer
    except BaseException:
        with contextlib.suppress(RuntimeError):  # a full disk is already known here
            writer.close()
        raise
    with _system_errors(path):
        writer.close()


@contextlib.contextmanager
def _system_errors(path: str) -> Iterator[None]:
    """Turns the library's RuntimeError into the OSError that it reports as text."""
    try:
        yield
    except RuntimeError as error:
        codes = (code for code in _WRITE_ERRORS if os.strerror(code) in str(error))
        code = next(codes, errno.EIO)
        raise OSError(code, os.strerror(code), path) from error


def read(path: epath.Path, file_format: str, place: int, *, where: str) -> bytes:
    """Reads the payload at `place`; `where` names the record in error messages.

    Raises:
        RecordError: if the record is truncated or damaged.
        OSError: if the file cannot be read.
    """
    if file_format == ARRAY_RECORD:
        return _read_array_record(path, place, where)
    with path.open("rb") as file:
        file.seek(place)
        return _read_tfrecord(file, where, size_of(path) - place)


@contextlib.contextmanager
def open_payload(
    path: epath.Path, file_format: str, place: int, length: int, *, where: str, whole: bool
) -> Iterator[ReadPart]:
    """Opens the payload of `length` at `place`; yields the function that reads and checks parts.

    Local TFRecord files are read where a part lies. From an object store the payload is read by one
    request: parts would need many, and each takes longer than the rest of the payload.

    The file is opened for every call: that is thread-safe and picklable, needs no bound on open
    files with thousands of shards, and costs microseconds beside the decoding that follows.

    Args:
        whole: all parts will be read.

    Raises:
        RecordError: if an ArrayRecord file is damaged; by the function, if a part is.
        OSError: if the file cannot be read.
    """
    begin = place + _HEADER.size

    def part(data: bytes, size: int, crc: int) -> bytes:
        if len(data) < size:
            raise RecordError(f"{where} is truncated: {_AGAIN}")
        if masked_crc(data) != crc:
            raise RecordError(f"{where} is damaged (CRC does not match): {_AGAIN}")
        return data

    if file_format == TFRECORD and not is_remote(path):
        with open(path, "rb", buffering=0) as file:
            if not whole:
                number = file.fileno()
                yield lambda at, size, crc: part(os.pread(number, size, begin + at), size, crc)
                return
            payload = os.pread(file.fileno(), length, begin)
    elif file_format == TFRECORD:
        import fsspec

        files, name = fsspec.core.url_to_fs(os.fspath(path))
        payload = files.cat_file(name, start=begin, end=begin + length)
    else:
        payload = _read_array_record(path, place, where)
    yield lambda at, size, crc: part(payload[at : at + size], size, crc)


def scan(path: epath.Path, file_format: str) -> Iterator[tuple[int, bytes | RecordError]]:
    """Yields place and payload of all records of a file, in order.

    A damaged record yields its error instead. After damage to a length in a TFRecord file nothing
    more can be found.

    Raises:
        RecordError: if a TFRecord file is missing.
    """
    if file_format == ARRAY_RECORD:
        try:
            count = _reader(path).num_records()
        except RecordError as error:
            yield 0, error
            return
        for number in range(count):
            try:
                yield number, _read_array_record(path, number, f"{path}, record {number}")
            except RecordError as error:
                yield number, error
        return
    size = size_of(path)
    with path.open("rb") as file:
        while (offset := file.tell()) < size:
            try:
                where = f"{path}, record at byte {offset}"
                yield offset, _read_tfrecord(file, where, size - offset)
            except RecordError as error:
                yield offset, error
                if file.tell() == offset + _HEADER.size:
                    return


def size_of(path: epath.Path) -> int:
    """Returns the bytes of a file; raises RecordError if it is missing."""
    try:
        return int(path.stat().length) if is_remote(path) else os.stat(path).st_size
    except FileNotFoundError:
        raise RecordError(f"{path} is missing: {_AGAIN} or copy all of it") from None


def frame_payload(payload: bytes) -> bytes:
    """Returns `payload` with TFRecord's header and footer around it."""
    length = struct.pack("<Q", len(payload))
    footer = _FOOTER.pack(masked_crc(payload))
    return b"".join((length, _FOOTER.pack(masked_crc(length)), payload, footer))


def _read_tfrecord(file: BinaryIO, where: str, room: int) -> bytes:
    """Reads the record at the position of a TFRecord file; `room` is the rest of the file in bytes.

    Damage to the length of the payload leaves the position behind the header.
    """
    header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise RecordError(f"{where} is truncated: {_AGAIN}")
    length, length_crc = _HEADER.unpack(header)
    if masked_crc(header[:8]) != length_crc:
        raise RecordError(f"{where} is damaged (CRC does not match): {_AGAIN}")
    # Before memory is reserved for it: a length may be wrong and have a CRC that fits.
    if length > room - OVERHEAD_BYTES:
        raise RecordError(f"{where} is truncated: {_AGAIN}")
    payload, footer = file.read(length), file.read(_FOOTER.size)
    if len(footer) < _FOOTER.size:
        raise RecordError(f"{where} is truncated: {_AGAIN}")
    (crc,) = _FOOTER.unpack(footer)
    if masked_crc(payload) != crc:
        raise RecordError(f"{where} is damaged (CRC does not match): {_AGAIN}")
    return payload


def _read_array_record(path: epath.Path, number: int, where: str) -> bytes:
    reader = _reader(path)
    if not 0 <= number < reader.num_records():
        raise RecordError(f"{where}: {path} has {reader.num_records()} records only")
    try:
        return bytes(reader.read([number])[0])
    except RuntimeError as error:
        raise RecordError(f"{where} is damaged ({_short(error)}): {_AGAIN}") from error


def _reader(path: epath.PathLike) -> Any:
    """Returns an open ArrayRecord reader, shared by threads."""
    if is_remote(path):
        raise RecordError(f"{path}: ArrayRecord files are read from local disks only, copy it")
    try:
        status = os.stat(path)
        return _open_reader(os.fspath(path), (status.st_ino, status.st_size, status.st_mtime_ns))
    except FileNotFoundError:
        raise RecordError(f"{path} is missing: {_AGAIN} or copy all of it") from None
    except RuntimeError as error:
        problem = f"is truncated, damaged or not an ArrayRecord file ({_short(error)})"
        raise RecordError(f"{path} {problem}: {_AGAIN}") from error


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
