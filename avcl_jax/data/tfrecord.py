"""TFRecord files: CRC-checked framing, and reading at a place or from the start."""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Iterator, Sequence

import crc32c
from etils import epath

from avcl_jax.errors import UserError
from avcl_jax.paths import is_remote

_HEADER = struct.Struct("<QI")  # payload length, masked CRC of the eight length bytes
_FOOTER = struct.Struct("<I")  # masked CRC of the payload
HEADER_BYTES = _HEADER.size
OVERHEAD_BYTES = _HEADER.size + _FOOTER.size


class RecordError(UserError):
    """A record file or directory that cannot be used, with what is wrong and what to do."""


def masked_crc(data: bytes | memoryview) -> int:
    """Returns TFRecord's masked CRC-32C of `data` (rotated by 15 bits, plus a constant)."""
    crc = crc32c.crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def frame_payload(payload: bytes) -> bytes:
    """Returns `payload` with TFRecord's header and footer around it."""
    length = struct.pack("<Q", len(payload))
    return b"".join(
        (length, _FOOTER.pack(masked_crc(length)), payload, _FOOTER.pack(masked_crc(payload)))
    )


def unframe_payload(framed: bytes, *, expected_crc: int | None, where: str) -> memoryview:
    """Checks one framed record and returns its payload.

    Args:
      framed: Header, payload and footer as read from the shard.
      expected_crc: Masked CRC of the payload that the index remembers; None to trust the file's.
      where: Name of the record for error messages.

    Returns:
      The payload, a view into `framed`.

    Raises:
      RecordError: If the record is truncated, damaged, or not the one the index describes.
    """
    if len(framed) < OVERHEAD_BYTES:
        raise RecordError(f"{where} is truncated: prepare this data set again")
    view = memoryview(framed)
    payload = view[_HEADER.size : -_FOOTER.size]
    parts = (view[: _HEADER.size], payload, view[-_FOOTER.size :])
    check_frame(*parts, expected_crc=expected_crc, where=where)
    return payload


def check_frame(
    header: bytes | memoryview,
    payload: bytes | memoryview,
    footer: bytes | memoryview,
    *,
    expected_crc: int | None,
    where: str,
) -> None:
    """Checks a record whose parts were read.

    Args:
      header: What is before the payload.
      payload: As many bytes as the index, or the header, says.
      footer: What is after it.
      expected_crc: Masked CRC of the payload that the index remembers; None to trust the footer.
      where: Name of the record for error messages.

    Raises:
      RecordError: If the record is truncated, damaged, or not the one the index describes.
    """
    if len(header) < _HEADER.size or len(footer) < _FOOTER.size:
        raise RecordError(f"{where} is truncated: prepare this data set again")
    length, length_crc = _HEADER.unpack(header)
    if masked_crc(header[:8]) != length_crc:
        raise RecordError(
            f"{where} is damaged or its index is stale (the CRC of its length does not match): "
            "delete the .index files beside the shards, and if this persists prepare again"
        )
    if length != len(payload):
        raise RecordError(f"{where}: stale index, delete the .index files beside the shards")
    (stored_crc,) = _FOOTER.unpack(footer)
    if masked_crc(payload) != stored_crc:
        raise RecordError(f"{where} is damaged (CRC does not match): prepare this data set again")
    if expected_crc is not None and stored_crc != expected_crc:
        raise RecordError(f"{where}: stale index, delete the .index files beside the shards")


def read_parts(path: epath.Path, offset: int, sizes: Sequence[int]) -> list[bytes]:
    """Reads parts that follow each other, from a local file or through etils (gs://, s3://).

    The file is opened for every call: that is thread-safe and picklable, needs no bound on open
    files with thousands of shards, and costs microseconds beside the decoding that follows.

    Args:
      path: The file.
      offset: Of the first part.
      sizes: Bytes of each part, which is an object of its own: megabytes are not copied again to
        get at them.

    Returns:
      The parts, shorter or empty where the file ends.
    """
    if is_remote(path):
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(sum(sizes))
        ends = list(itertools.accumulate(sizes))
        return [data[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    parts = []
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for size in sizes:
            parts.append(_pread(descriptor, offset, size))
            offset += size
    finally:
        os.close(descriptor)
    return parts


def _pread(descriptor: int, offset: int, size: int) -> bytes:
    parts = []
    while size > 0:
        part = os.pread(descriptor, size, offset)
        if not part:
            break
        parts.append(part)
        offset, size = offset + len(part), size - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def read_known(path: epath.Path, offset: int, *, length: int, crc: int, where: str) -> bytes:
    """Reads the payload of a record that the index describes.

    Args:
      path: TFRecord file.
      offset: Of the framed record.
      length: Bytes of the payload.
      crc: Its masked CRC.
      where: Name of the record for error messages.

    Raises:
      RecordError: If the record is truncated, damaged, or not the one the index describes.
    """
    header, payload, footer = read_parts(path, offset, (_HEADER.size, length, _FOOTER.size))
    check_frame(header, payload, footer, expected_crc=crc, where=where)
    return payload


def read_payload(path: epath.Path, offset: int, *, where: str) -> bytes:
    """Reads the record that begins at `offset`.

    Raises:
      RecordError: If it is truncated or damaged.
      OSError: If the file cannot be read.
    """
    (header,) = read_parts(path, offset, (_HEADER.size,))
    length = payload_length(header, where=where)
    # Before memory is reserved for it: a length may be wrong and have a CRC that fits.
    if length > epath.Path(path).stat().length:
        raise RecordError(f"{where} is truncated: prepare this data set again")
    payload, footer = read_parts(path, offset + _HEADER.size, (length, _FOOTER.size))
    check_frame(header, payload, footer, expected_crc=None, where=where)
    return payload


def payload_length(header: bytes, *, where: str) -> int:
    """Returns the length that the first bytes of a framed record state.

    Raises:
      RecordError: If they are truncated or damaged: nothing after them can be found then.
    """
    if len(header) < _HEADER.size:
        raise RecordError(f"{where} is truncated: prepare this data set again")
    length, length_crc = _HEADER.unpack(header)
    if masked_crc(header[:8]) != length_crc:
        raise RecordError(f"{where} is damaged (CRC does not match): prepare this data set again")
    return length


def scan(path: epath.Path) -> Iterator[tuple[int, memoryview, int]]:
    """Reads a whole shard in order.

    Args:
      path: TFRecord file.

    Yields:
      Byte offset of the framed record, payload, and its masked CRC.

    Raises:
      RecordError: If the file is truncated or damaged.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        offset = 0
        while header := file.read(_HEADER.size):
            where = f"{path}, record at byte {offset}"
            length = payload_length(header, where=where)
            # Looked at before anything of this size is allocated: it may be anything up to 2^64.
            if length > size - offset - OVERHEAD_BYTES:
                raise RecordError(f"{where} is truncated: prepare this data set again")
            rest = file.read(length + _FOOTER.size)
            payload = unframe_payload(header + rest, expected_crc=None, where=where)
            yield offset, payload, _FOOTER.unpack_from(rest, length)[0]
            offset += OVERHEAD_BYTES + length
