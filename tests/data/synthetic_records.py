"""Small prepared data sets of records made in memory, for tests of what reads them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import simplejpeg

from avcl_jax.data.record_format import serialize_record
from avcl_jax.data.record_writer import RecordWriter, write_dataset_metadata
from avcl_jax.data.records import Record, shard_name

SAMPLE_RATE_HZ = 16_000


def make_record(
    number: int,
    *,
    seconds: float,
    fps: float = 16.0,
    side: int = 64,
    has_audio: bool = True,
    has_video: bool = True,
    source: str | None = None,
) -> Record:
    """A moving bright square over noise, with a tone whose pitch belongs to the number."""
    rng = np.random.default_rng(number)
    times = np.arange(round(seconds * fps)) / fps if has_video else np.empty(0)
    picture = rng.integers(0, 80, (side, side, 3), dtype=np.uint8)
    frames = []
    for time in times:
        # Grain in every frame: patches that stand exactly still would sit at the kink of a ReLU,
        # where rounding decides a gradient, and devices could not be compared.
        frame = picture + rng.integers(0, 40, picture.shape, dtype=np.uint8)
        column = int((side - 12) * (0.5 + 0.5 * np.sin(2 * np.pi * time / (2 + number % 3))))
        frame[20:32, column : column + 12] = 255
        frames.append(simplejpeg.encode_jpeg(frame, quality=90))
    samples = np.arange(round(seconds * SAMPLE_RATE_HZ) if has_audio else 0) / SAMPLE_RATE_HZ
    tone = 6000 * np.sin(2 * np.pi * (300 + 90 * number) * samples) * (1 - samples / (seconds + 1))
    return Record(
        record_id=f"record {number}",
        source_id=source or f"source {number}",
        frames=frames,
        frame_seconds=times,
        waveform=(tone + rng.normal(0, 200, len(samples))).astype(np.int16),
        sample_rate_hz=SAMPLE_RATE_HZ * has_audio,
        audio_start_seconds=0.0,
        duration_seconds=seconds,
        height=side * has_video,
        width=side * has_video,
        labels={"motion": number % 5, "material": number // 5 % 5},
    )


def write_shard(
    path: Path, records: Iterable[Record], file_format: str = "tfrecord"
) -> tuple[int, int]:
    """Writes a shard; returns the number of its records and the bytes of their payloads."""
    lengths = []
    with RecordWriter(path, file_format) as writer:
        for record in records:
            writer.write(record)
            lengths.append(len(serialize_record(record)))
    return len(lengths), sum(lengths)


def write_records(
    directory: Path, records: list[Record], split: str = "train", shards: int = 2
) -> Path:
    """Writes `records` as a prepared data set; returns its directory."""
    directory.mkdir(parents=True, exist_ok=True)
    parts = [records[number::shards] for number in range(shards)]
    infos = [
        write_shard(directory / shard_name("made", split, number, shards), part)
        for number, part in enumerate(parts)
    ]
    names = {label: list("abcde") for label in records[0].labels}
    write_dataset_metadata(directory, name="made", class_names=names, splits={split: infos})
    return directory
