"""Files as damaged disks, broken downloads and hostile people leave them, all seeded."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

_ABSURD = (b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x80\x00\x00\x00", b"\x00\x00\x00\x00")


def flip_bits(data: bytes, rng: np.random.Generator) -> bytes:
    """1 to 300 single bits anywhere."""
    mutated = np.frombuffer(data, np.uint8).copy()
    places = rng.integers(0, len(data), int(np.exp(rng.uniform(0, np.log(300)))))
    np.bitwise_xor.at(mutated, places, (1 << rng.integers(0, 8, len(places))).astype(np.uint8))
    return mutated.tobytes()


def flip_bits_of_header(data: bytes, rng: np.random.Generator) -> bytes:
    """The same in the first or the last 2,000 bytes, where the structure is."""
    size = min(2000, len(data))
    if rng.random() < 0.5:
        return flip_bits(data[:size], rng) + data[size:]
    return data[:-size] + flip_bits(data[-size:], rng)


def truncate(data: bytes, rng: np.random.Generator) -> bytes:
    """Anything from nothing to all but one byte."""
    return data[: int(rng.integers(0, len(data)))]


def overwrite_block(data: bytes, rng: np.random.Generator) -> bytes:
    """Noise or zeros over a stretch of up to 64 kB."""
    begin = int(rng.integers(0, len(data)))
    size = min(len(data) - begin, int(np.exp(rng.uniform(0, np.log(65536)))))
    block = rng.bytes(size) if rng.random() < 0.5 else bytes(size)
    return data[:begin] + block + data[begin + size :]


def shuffle_chunks(data: bytes, rng: np.random.Generator) -> bytes:
    """Pieces of one size in another order; the first piece stays half of the time."""
    size = max(1, int(np.exp(rng.uniform(np.log(64), np.log(max(65, len(data) // 2))))))
    chunks = [data[at : at + size] for at in range(0, len(data), size)]
    kept = int(rng.random() < 0.5)
    order = kept + rng.permutation(len(chunks) - kept)
    return b"".join([*chunks[:kept], *(chunks[number] for number in order)])


def absurd_sizes(data: bytes, rng: np.random.Generator) -> bytes:
    """Numbers at the limits of 32 and 64 bits, up to 8 times, in the first or last 4,000 bytes."""
    mutated = bytearray(data)
    for _ in range(int(rng.integers(1, 9))):
        at = int(rng.integers(0, min(4000, len(data) - 8)))
        if rng.random() < 0.3:
            at = len(data) - 8 - at
        value = _ABSURD[int(rng.integers(len(_ABSURD)))] * (1 + int(rng.random() < 0.3))
        if rng.random() < 0.5:
            value = value[::-1]
        mutated[at : at + len(value)] = value
    return bytes(mutated)


def splice(data: bytes, rng: np.random.Generator) -> bytes:
    """A piece of the file once more somewhere else, or one left out."""
    begin, end = sorted(int(n) for n in rng.integers(0, len(data), 2))
    if rng.random() < 0.5:
        return data[:begin] + data[end:]
    at = int(rng.integers(0, len(data)))
    return data[:at] + data[begin:end] + data[at:]


MUTATIONS: dict[str, Callable[[bytes, np.random.Generator], bytes]] = {
    function.__name__: function
    for function in (
        flip_bits,
        flip_bits_of_header,
        truncate,
        overwrite_block,
        shuffle_chunks,
        absurd_sizes,
        splice,
    )
}
