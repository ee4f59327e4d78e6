"""TFRecord files: CRC-checked framing, and reading at a place or from the start."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import crc32c
from etils import epath

_HEADER = struct.Struct("<QI")  # payload length, masked CRC of the eight length bytes
_FOOTER = struct.Struct("<I")  # masked CRC of the payload
HEADER_BYTES = _HEADER.size
OVERHEAD_BYTES = _HEADER.size + _FOOTER.size


class RecordError(ValueError):
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
    length, length_crc = _HEADER.unpack_from(framed)
    if masked_crc(framed[:8]) != length_crc:
        raise RecordError(
            f"{where} is damaged or its index is stale (the CRC of its length does not match): "
            "delete the .index files beside the shards, and if this persists prepare again"
        )
    if length != len(framed) - OVERHEAD_BYTES:
        raise RecordError(f"{where}: stale index, delete the .index files beside the shards")
    payload = memoryview(framed)[_HEADER.size : _HEADER.size + length]
    (stored_crc,) = _FOOTER.unpack_from(framed, _HEADER.size + length)
    if masked_crc(payload) != stored_crc:
        raise RecordError(f"{where} is damaged (CRC does not match): prepare this data set again")
    if expected_crc is not None and stored_crc != expected_crc:
        raise RecordError(f"{where}: stale index, delete the .index files beside the shards")
    return payload


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path lies in an object store (gs://, s3://)."""
    return "://" in os.fspath(path)


def read_bytes(path: epath.Path, offset: int, size: int) -> bytes:
    """Reads `size` bytes at `offset`, from a local file or through etils (gs://, s3://).

    The file is opened for every call: that is thread-safe and picklable, needs no bound on open
    files with thousands of shards, and costs microseconds beside the decoding that follows.
    """
    if not is_remote(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            parts = []
            while size > 0:
                part = os.pread(descriptor, size, offset)
                if not part:
                    break
                parts.append(part)
                offset, size = offset + len(part), size - len(part)
        finally:
            os.close(descriptor)
        return parts[0] if len(parts) == 1 else b"".join(parts)
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def read_payload(path: epath.Path, offset: int, *, where: str) -> memoryview:
    """Reads the record that begins at `offset`.

    Raises:
      RecordError: If it is truncated or damaged.
      OSError: If the file cannot be read.
    """
    header = read_bytes(path, offset, _HEADER.size)
    length = payload_length(header, where=where)
    # Before memory is reserved for it: a length may be wrong and have a CRC that fits.
    if length > epath.Path(path).stat().length:
        raise RecordError(f"{where} is truncated: prepare this data set again")
    framed = header + read_bytes(path, offset + _HEADER.size, length + _FOOTER.size)
    if len(framed) < length + OVERHEAD_BYTES:
        raise RecordError(f"{where} is truncated: prepare this data set again")
    return unframe_payload(framed, expected_crc=None, where=where)


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
