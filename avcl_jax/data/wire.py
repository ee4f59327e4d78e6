"""Parts of a serialized protobuf message, found without copying the message.

A record is megabytes of frames of which a view shows a few. The protobuf library copies all of
them, twice, into memory that is new each time, which cost as much as a third of their decoding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class WireError(ValueError):
    """Bytes that are no protobuf message."""


def _varint(data: memoryview, begin: int, end: int) -> tuple[int, int]:
    """Returns the number that begins at `begin`, and where it ends."""
    value = shift = 0
    for position in range(begin, min(end, begin + 10)):
        byte = data[position]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position + 1
        shift += 7
    raise WireError(f"no number at byte {begin}")


def fields(data: memoryview, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yields number, begin and end of each length-delimited field of a message; skips others.

    Args:
      data: uint8 [bytes] that hold the message, from `begin` to `end`.
      begin: Of the message.
      end: Of the message.

    Raises:
      WireError: If a field reaches beyond the message or has no known type.
    """
    position = begin
    while position < end:
        # Nearly all tags and many lengths are one or two bytes; the loop above is for the others.
        tag = data[position]
        position += 1
        if tag >= 0x80:
            tag, position = _varint(data, position - 1, end)
        kind = tag & 7
        if kind == _BYTES:
            if position < end and data[position] < 0x80:
                length, position = data[position], position + 1
            elif position + 1 < end and data[position + 1] < 0x80:
                length = (data[position] & 0x7F) | data[position + 1] << 7
                position += 2
            else:
                length, position = _varint(data, position, end)
            if length > end - position:
                raise WireError(f"a field of {length} bytes at byte {position} of {end}")
            yield tag >> 3, position, position + length
            position += length
        elif kind == _VARINT:
            _, position = _varint(data, position, end)
        elif kind in (_FIXED64, _FIXED32):
            position += 8 if kind == _FIXED64 else 4
            if position > end:
                raise WireError(f"a field reaches to byte {position} of {end}")
        else:
            raise WireError(f"a field of type {kind} at byte {position}")


class Slices(Sequence[bytes]):
    """Parts of some bytes; each is copied when it is asked for."""

    def __init__(self, data: memoryview, places: Sequence[tuple[int, int]]):
        """Takes the bytes, and where each part begins and ends."""
        self._data = data
        self._places = places

    def __len__(self) -> int:
        """Number of parts."""
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> Slices: ...

    def __getitem__(self, index: int | slice) -> bytes | Slices:
        """One part, or some of them."""
        if isinstance(index, slice):
            return Slices(self._data, self._places[index])
        begin, end = self._places[index]
        return bytes(self._data[begin:end])

    def __eq__(self, other: object) -> bool:
        """Whether it has the same parts as another sequence."""
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # mutable sequences of the data model say so
