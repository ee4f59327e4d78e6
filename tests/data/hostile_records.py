"""`python -m tests.data.hostile_records NUMBER SEED`: so many mutated records through the reader.

A process of its own, with hardly more memory than it has at the start: what allocates by a number
in the file instead of by the file's size ends it. Prints counts as JSON.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import resource
import struct
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from etils import epath
from tensorflow_datasets.proto.tf_feature_generated_pb2 import BytesList

from avcl_jax.data import record_files
from avcl_jax.data.record_files import RecordError
from avcl_jax.data.record_format import (
    Record,
    message_class,
    parse_record,
    serialize_parts,
    serialize_record,
)
from avcl_jax.data.record_index import scan_shard
from tests.data.synthetic_records import make_record
from tests.data_prep.mutations import flip_bits, splice, truncate

MEGABYTES = 48
_ABSURD_VARINTS = (
    bytes.fromhex("ffffffffffffffffff01"),  # 2^64 - 1
    bytes.fromhex("ffffffffffffffff7f"),  # 2^63 - 1
    bytes.fromhex("ffffffff07"),  # 2^31 - 1
    bytes.fromhex("8080808010"),  # 2^32
    bytes.fromhex("ffffffffffffffffffffffff"),  # longer than any varint
)
_ABSURD_LENGTHS = (1 << 63, (1 << 64) - 1, (1 << 64) - 16, 1 << 40, 1 << 32, 0)
_NUMBERS = (np.nan, np.inf, -np.inf, -1.0, 0.0, 1e308, 1e-320)
_INTEGERS = (-(1 << 63), (1 << 63) - 1, -2, -1, 1 << 31, 1 << 40)


def _absurd_number(data: bytes, rng: np.random.Generator) -> bytes:
    at = int(rng.integers(0, len(data)))
    at = at if rng.random() < 0.5 else at % min(200, len(data))
    varint = _ABSURD_VARINTS[int(rng.integers(len(_ABSURD_VARINTS)))]
    return data[:at] + varint + data[at + len(varint) * int(rng.random() < 0.5) :]


def _field(content: bytes) -> bytes:
    """Field 1 of a message, delimited by its length."""
    return BytesList(value=[content]).SerializeToString()


def _example(features: Mapping[str, Sequence[bytes] | Sequence[int]]) -> bytes:
    """A tf.train.Example of any content: our own writer refuses what is wrong."""
    example = message_class("Example")()
    for name, values in features.items():
        feature = example.features.feature[name]
        is_bytes = all(isinstance(value, bytes) for value in values)
        (feature.bytes_list if is_bytes else feature.int64_list).value.extend(values)
    return example.SerializeToString()


def _nested(data: bytes, rng: np.random.Generator) -> bytes:
    """Messages in messages, groups in groups, or noise, beside or instead of the record."""
    kind = rng.integers(4)
    if kind == 0:
        garbage = rng.bytes(int(rng.integers(1, 300)))
    elif kind == 1:
        garbage = b"\x0b" * int(rng.integers(1, 5000))  # groups that begin and never end
    elif kind == 2:
        garbage = b""
        for _ in range(int(rng.integers(1, 400))):
            garbage = _field(garbage)
    else:
        garbage = _example({"label_motion": [0] * int(rng.integers(1, 20_000))})
    return data + garbage if rng.random() < 0.5 else garbage + data * int(rng.random() < 0.5)


def _contradiction(record: Record, rng: np.random.Generator) -> bytes:
    """A well-formed example whose content is no record."""
    number = np.float64(rng.choice(_NUMBERS)).tobytes()
    big = int(rng.choice(_INTEGERS))
    seconds = record.frame_seconds.tobytes()
    at = 8 * int(rng.integers(len(record.frames) + 1))
    stored = message_class("Example").FromString(serialize_record(record)).features.feature
    features = {
        name: list(feature.bytes_list.value) or list(feature.int64_list.value)
        for name, feature in stored.items()
    }
    changes: list[dict[str, Sequence[bytes] | Sequence[int]]] = [
        {},
        {"frame_seconds": [seconds[:at] + number + seconds[at + 8 :]]},
        {"frame_seconds": [record.frame_seconds[::-1].tobytes()]},
        {"frame_seconds": [seconds[8:]]},
        {"frame_seconds": [seconds[3:]]},
        {"frame_seconds": []},
        {"video": list(record.frames[1:])},
        {"video": [0, 1, 2]},
        {"audio": [record.waveform.tobytes()[1:]]},
        {"audio": [b""], "video": [], "frame_seconds": [b""]},
        {"audio_start_seconds": [number]},
        {"audio_start_seconds": [b"seven b"]},
        {"duration_seconds": [number]},
        {"duration_seconds": [b""]},
        {"sample_rate_hz": [big]},
        {"sample_rate_hz": [b"16000"]},
        {"height": [big]},
        {"width": [big]},
        {"label_motion": [big]},
        {"label_motion": []},
    ]
    changed = features | changes[int(rng.integers(len(changes)))]
    if rng.random() < 0.2:
        del changed[str(rng.choice(sorted(changed)))]
    return _example(changed)


def mutate_payload(record: Record, payload: bytes, rng: np.random.Generator) -> bytes:
    """A mutation of a record's content."""
    kind = int(rng.integers(6))
    if kind == 5:
        return _contradiction(record, rng)
    return (flip_bits, truncate, splice, _absurd_number, _nested)[kind](payload, rng)


def mutate_frame(framed: bytes, rng: np.random.Generator) -> bytes:
    """A mutation of the frame around it: lengths with a true CRC, flips and cuts."""
    kind = rng.integers(3)
    if kind == 0:
        length = struct.pack("<Q", _ABSURD_LENGTHS[int(rng.integers(len(_ABSURD_LENGTHS)))])
        return length + struct.pack("<I", record_files.masked_crc(length)) + framed[12:]
    return (flip_bits, truncate)[int(kind) - 1](framed, rng)


def read(framed: bytes, path: Path) -> str:
    """Reads a shard of one record both ways; returns "record", or what the error said."""
    outcomes = []
    path.write_bytes(framed)
    try:
        scan_shard(epath.Path(path), "tfrecord", {}, ())
        outcomes.append("record")
    except RecordError as error:
        outcomes.append("contradicts" if "contradicts" in str(error) else "refused")
    try:
        payload = record_files.read(epath.Path(path), "tfrecord", 0, where="x")
        record = parse_record(payload, {}, (), where="x")
        serialize_record(record)  # which checks it
        outcomes.append("record")
    except RecordError as error:
        outcomes.append("contradicts" if "contradicts" in str(error) else "refused")
    # An empty file is a shard without records, but no record.
    assert outcomes[0] == outcomes[1] or not framed, outcomes
    return outcomes[1]


def read_header(header: bytes, payload: bytes) -> str:
    """Reads a record by its mutated header; returns as `read` does."""

    def part(begin: int, size: int, crc: int) -> bytes:
        data = payload[begin : begin + size]
        if record_files.masked_crc(data) != crc:
            raise RecordError("damaged")
        return data

    try:
        record = parse_record(header, {}, (), where="x", rest=part)
        serialize_record(dataclasses.replace(record, frames=list(record.frames)))
    except RecordError as error:
        return "contradicts" if "contradicts" in str(error) else "refused"
    return "record"


def main(number: int, seed: int) -> None:
    """Mutates, reads and counts."""
    records = [
        make_record(0, seconds=0.5, side=16),
        make_record(1, seconds=0.3, has_audio=False, side=16),
        make_record(2, seconds=0.2, has_video=False),
    ]
    payloads = [serialize_record(record) for record in records]
    counts: collections.Counter[str] = collections.Counter()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (MEGABYTES << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard"
        for n in range(number):
            rng = np.random.default_rng([seed, n])
            which = n // 3 % len(records)
            if n % 3:
                payload = mutate_payload(records[which], payloads[which], rng)
                kind, framed = "content", record_files.frame_payload(payload)
                header, rest = serialize_parts(records[which])
                mutate = (flip_bits, truncate, splice, _absurd_number, _nested)[n % 5]
                counts[f"header {read_header(mutate(header, rng), header + rest)}"] += 1
            else:
                framed = mutate_frame(record_files.frame_payload(payloads[which]), rng)
                kind = "frame"
            counts[f"{kind} {read(framed, path)}"] += 1
    print(json.dumps(counts))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
