"""A prepared data set small enough to train on in seconds: classes that are plain, and noise."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from avcl_jax.data.record_metadata import write_dataset_metadata
from avcl_jax.data.records import Record, shard_name, write_shard

RATE, FPS, SIDE, SECONDS = 4000, 16, 16, 3.0
CLASS_NAMES = {"motion": ["across", "down"], "material": ["low", "high"]}
SPLITS = {"train": 24, "test": 16, "null_train": 10, "null_test": 10}


def _record(split: str, index: int) -> Record:
    rng = np.random.default_rng([sorted(SPLITS).index(split), index])
    noise = split.startswith("null")
    frames = rng.normal(110, 25, size=(round(FPS * SECONDS), SIDE, SIDE, 3))
    times = np.arange(len(frames)) / FPS
    samples = np.arange(round(RATE * SECONDS))
    waveform = rng.normal(0, 600, size=len(samples))
    motion, material = index % 2, index // 2 % 2
    if not noise:
        for number, frame in enumerate(frames):
            at = (number + index) % SIDE
            bar = frame[:, at] if motion == 0 else frame[at]
            bar[:] = 250
        pitch = (300, 1200)[material] * rng.uniform(0.9, 1.1)
        waveform += 6000 * np.sin(2 * np.pi * pitch * samples / RATE)
    pixels = np.clip(frames, 0, 255).astype(np.uint8)
    return Record(
        record_id=f"{split}/{index}",
        source_id=f"{split}/{index}",
        frames=[simplejpeg.encode_jpeg(np.ascontiguousarray(p), quality=95) for p in pixels],
        frame_seconds=times,
        waveform=np.clip(waveform, -32768, 32767).astype(np.int16),
        sample_rate_hz=RATE,
        audio_start_seconds=0.0,
        duration_seconds=SECONDS,
        height=SIDE,
        width=SIDE,
        labels={"motion": -1, "material": -1}
        if noise
        else {"motion": motion, "material": material},
    )


def _records(split: str) -> Iterator[Record]:
    return (_record(split, index) for index in range(SPLITS[split]))


@pytest.fixture(scope="session")
def small_records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a prepared data set with splits train, test, null_train and null_test."""
    directory = tmp_path_factory.mktemp("records")
    shards = {
        split: [write_shard(directory / shard_name("small", split, 0, 1), _records(split))]
        for split in SPLITS
    }
    write_dataset_metadata(directory, name="small", class_names=CLASS_NAMES, splits=shards)
    return directory
