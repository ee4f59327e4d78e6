"""TFRecord files: CRC-checked framing, and the index that makes them random access."""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import crc32c
from etils import epath

_HEADER = struct.Struct("<QI")  # payload length, masked CRC of the eight length bytes
_FOOTER = struct.Struct("<I")  # masked CRC of the payload
OVERHEAD_BYTES = _HEADER.size + _FOOTER.size
_INDEX_VERSION = 1
_PROBE_BYTES = 4096


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
            "delete the .index file beside the shard, and if this persists prepare again"
        )
    if length != len(framed) - OVERHEAD_BYTES:
        raise RecordError(f"{where}: stale index, delete the .index file beside the shard")
    payload = memoryview(framed)[_HEADER.size : _HEADER.size + length]
    (stored_crc,) = _FOOTER.unpack_from(framed, _HEADER.size + length)
    if masked_crc(payload) != stored_crc:
        raise RecordError(f"{where} is damaged (CRC does not match): prepare this data set again")
    if expected_crc is not None and stored_crc != expected_crc:
        raise RecordError(f"{where}: stale index, delete the .index file beside the shard")
    return payload


def read_bytes(path: epath.Path, offset: int, size: int) -> bytes:
    """Reads `size` bytes at `offset`, from a local file or through etils (gs://, s3://).

    The file is opened for every call: that is thread-safe and picklable, needs no bound on open
    files with thousands of shards, and costs microseconds beside the decoding that follows.
    """
    if isinstance(path, os.PathLike) and "://" not in os.fspath(path):
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
        offset = 0
        while header := file.read(_HEADER.size):
            where = f"{path}, record at byte {offset}"
            if len(header) < _HEADER.size:
                raise RecordError(f"{where} is truncated: prepare this data set again")
            length, length_crc = _HEADER.unpack(header)
            if masked_crc(header[:8]) != length_crc:
                raise RecordError(
                    f"{where} is damaged (CRC does not match): prepare this data set again"
                )
            rest = file.read(length + _FOOTER.size)
            payload = (
                unframe_payload(header + rest, expected_crc=None, where=where)
                if len(rest) == length + _FOOTER.size
                else None
            )
            if payload is None:
                raise RecordError(f"{where} is truncated: prepare this data set again")
            yield offset, payload, _FOOTER.unpack_from(rest, length)[0]
            offset += OVERHEAD_BYTES + length


def index_path(shard: epath.Path) -> epath.Path:
    """Returns where the index of `shard` lies."""
    return shard.parent / f"{shard.name}.index"


def shard_probe(shard: epath.Path, shard_bytes: int) -> int:
    """Returns a CRC of a few kilobytes at the shard's start, middle and end.

    Modification times change when a data set is copied, and reading everything takes minutes, so
    this and the size decide whether an index belongs to its shard; the CRC of every record, which
    the index also holds, catches at reading what this cannot see.
    """
    crc = 0
    for offset in (0, shard_bytes // 2, max(0, shard_bytes - _PROBE_BYTES)):
        crc = crc32c.crc32c(read_bytes(shard, offset, _PROBE_BYTES), crc)
    return crc


def write_index(shard: epath.Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Writes `columns`, one value for each record, beside `shard` (temporary file, then rename)."""
    body = json.dumps(columns, sort_keys=True)
    shard_bytes = shard.stat().length
    header = json.dumps(
        {
            "index_version": _INDEX_VERSION,
            "shard_bytes": shard_bytes,
            "shard_probe": shard_probe(shard, shard_bytes),
            "columns_crc": crc32c.crc32c(body.encode()),
        }
    )
    path = index_path(shard)
    temporary = path.parent / f"{path.name}.{os.getpid()}.tmp"
    try:
        temporary.write_text(f"{header}\n{body}\n")
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def read_index(shard: epath.Path) -> dict[str, list[Any]] | None:
    """Returns the columns beside `shard`, or None if they are missing, damaged or stale.

    Raises:
      RecordError: If the shard itself does not exist.
    """
    if not shard.exists():
        raise RecordError(f"{shard} is missing: prepare this data set again or copy all of it")
    path = index_path(shard)
    if not path.exists():
        return None
    try:
        header_line, body = path.read_text().splitlines()
        header = json.loads(header_line)
        shard_bytes = shard.stat().length
        fresh = (
            header["index_version"] == _INDEX_VERSION
            and header["shard_bytes"] == shard_bytes
            and header["columns_crc"] == crc32c.crc32c(body.encode())
            and header["shard_probe"] == shard_probe(shard, shard_bytes)
        )
        return json.loads(body) if fresh else None
    except (ValueError, KeyError, TypeError):  # not an index at all: treated as missing
        return None
