"""A prepared data set small enough to train on in seconds: classes that are plain, and noise."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
import simplejpeg
from etils import epath

from avcl_jax import experiment
from avcl_jax.configs import evaluate as evaluate_config
from avcl_jax.configs import pretrain
from avcl_jax.data.record_writer import write_dataset_metadata
from avcl_jax.data.records import Record, RecordDataset, shard_name
from avcl_jax.data.selection import UsableRecords
from avcl_jax.training import program
from avcl_jax.training.checkpoint import Checkpoints, Progress
from tests.data.synthetic_records import write_shard

RATE, FPS, SIDE, SECONDS = 4000, 16, 16, 3.0
CLASS_NAMES = {"motion": ["across", "down"], "material": ["low", "high"]}
SPLITS = {"train": 24, "test": 16, "null_train": 10, "null_test": 10}


def small_record(split: str, index: int) -> Record:
    """A record with a moving bar and a tone; pure noise in the splits of noise."""
    rng = np.random.default_rng([sorted(SPLITS).index(split), index])
    noise = split.startswith("null")
    frames = rng.normal(110, 25, size=(round(FPS * SECONDS), SIDE, SIDE, 3))
    samples = np.arange(round(RATE * (SECONDS + 0.25)))
    waveform = rng.normal(0, 600, size=len(samples))
    motion, material = index % 2, index // 2 % 2
    if not noise:
        for number, frame in enumerate(frames):
            at = (number + index) % SIDE
            bar = frame[:, at] if motion == 0 else frame[at]
            bar[:] = 250
        pitch = (300, 1200)[material] * rng.uniform(0.9, 1.1)
        waveform += 6000 * np.sin(2 * np.pi * pitch * samples / RATE)
    labels = {"motion": -1, "material": -1} if noise else {"motion": motion, "material": material}
    name = f"{split}/{index}"
    return record_of(name, name, frames, waveform, labels, seconds=SECONDS + 0.25)


def record_of(name, source, frames, waveform, labels, *, seconds, rate_hz=RATE):
    """A record of frames [frames, side, side, 3] at `FPS`, and of samples."""
    pixels = np.clip(frames, 0, 255).astype(np.uint8)
    return Record(
        record_id=name,
        source_id=source,
        frames=[simplejpeg.encode_jpeg(np.ascontiguousarray(p), quality=95) for p in pixels],
        frame_seconds=np.arange(len(pixels)) / FPS,
        waveform=np.clip(waveform, -32768, 32767).astype(np.int16),
        sample_rate_hz=rate_hz if len(waveform) else 0,
        audio_start_seconds=0.0,
        duration_seconds=seconds,
        height=pixels.shape[1],
        width=pixels.shape[2],
        labels=labels,
    )


def _records(split: str) -> Iterator[Record]:
    return (small_record(split, index) for index in range(SPLITS[split]))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Programs that several tests of a module compile are kept until its end."""
    old = (
        jax.config.jax_compilation_cache_dir,
        jax.config.jax_persistent_cache_min_compile_time_secs,
    )
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield
    jax.config.update("jax_compilation_cache_dir", old[0])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", old[1])


@pytest.fixture(scope="session")
def small_records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a prepared data set with splits train, test, null_train and null_test.

    Audio lasts a quarter of a second longer than video.
    """
    splits = {split: _records(split) for split in SPLITS}
    return write_records(tmp_path_factory.mktemp("records"), "small", CLASS_NAMES, splits)


def small_config(records):
    """Pretraining on the small data set with networks of a few hundred weights."""
    c = pretrain.get_config("demo")
    c.unlock()
    c.data.directory = str(records)
    c.global_batch_size = 4
    c.steps = 8
    c.optimizer.warmup_steps = 2
    c.views.update({"num_frames": 4, "clip_seconds": 0.25, "speeds": (1, 2, 4)})
    c.crop.image_size = 16
    c.spectrogram.update({"sample_rate_hz": 4000, "frames": 10, "mels": 8, "max_hz": 2000.0})
    c.model.update({"embedding_dim": 8, "projection_hidden": 8, "temporal_hidden": 8})
    c.model.video.resnet.update({"widths": (8,), "depths": (0,)})
    c.model.audio.resnet.update({"widths": (8,), "depths": (0,), "patch": (2, 8)})
    return c


def small_evaluation():
    """The task `evaluate` in seconds, for the records and the run that it is given."""
    c = evaluate_config.get_config("demo")
    c.unlock()
    e = c.evaluation
    e.update(
        {
            "speeds": (1, 2),
            "clips": 1,
            "probe": {"folds": 2, "costs": (0.01, 1.0)},
            "pairs_per_video": 6,
        }
    )
    for modality in ("video", "audio"):
        e.supervised[modality].views = 2
        fit = {"batch_size": 8, "epochs": 3, "decay_epochs": 1}
        e.supervised[modality].fit.update(fit)
    e.null.update({"train_views": 1, "test_views": 1})
    e.null.fit.update({"batch_size": 16, "epochs": 2, "decay_epochs": 1})
    e.report.update({"queries": 1, "results": 2, "stills": 2})
    return c


@pytest.fixture(scope="session")
def small_run(small_records, tmp_path_factory):
    """An untrained run: its config, its directory, its state."""
    config = small_config(small_records)
    workdir = untrained_run(config, small_records, tmp_path_factory.mktemp("run"))
    _, init, _ = program.build(config)
    return config, workdir, init(jax.random.key(0))[0]


def untrained_run(config, records, directory):
    """Writes a checkpoint of step 0 with its config and one line of metrics."""
    workdir = epath.Path(directory)
    workdir.mkdir(exist_ok=True)
    (workdir / "config.json").write_text(experiment.to_json(config))
    metrics = {"step": 4, "split": "train", "va/loss": 2.0, "loss": 3.0, "peak_memory_gb": 99.0}
    (workdir / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
    _, init, _ = program.build(config)
    train = UsableRecords(RecordDataset(records, "train"), experiment.render_spec(config))
    with Checkpoints(workdir, keep=1) as manager:
        manager.save(init(jax.random.key(0))[0], Progress(0, 12.5, train.fingerprint, 1))
    return workdir


def sound_record(name, source, seed, pitch_hz, labels, seconds=1.0):
    """A record without video: a tone in noise."""
    rng = np.random.default_rng(seed)
    samples = np.arange(round(RATE * seconds))
    tone = np.sin(2 * np.pi * pitch_hz * rng.uniform(0.95, 1.05) * samples / RATE)
    waveform = 6000 * tone + rng.normal(0, 600, size=len(samples))
    frames = np.empty((0, 0, 0, 3))
    return record_of(name, source, frames, waveform, labels, seconds=seconds)


def write_records(directory, name, class_names, splits, multilabel=()):
    """Writes records by split as `data_prep` does, one shard per split."""
    shards = {
        split: [write_shard(directory / shard_name(name, split, 0, 1), iter(records))]
        for split, records in splits.items()
    }
    write_dataset_metadata(
        directory, name=name, class_names=class_names, splits=shards, multilabel=multilabel
    )
    return directory


FOLD_CLASSES = {"class": ["low", "middle", "high"], "fold": ["1", "2", "3", "4"]}


@pytest.fixture(scope="session")
def fold_records(tmp_path_factory):
    """Recordings of three classes in four folds, two clips of each, as ESC-50 is prepared."""
    records = [
        sound_record(
            f"{fold}-{label}-{take}",
            f"{fold}-{label}-{take // 2}",
            [fold, label, take],
            (250, 600, 1400)[label],
            {"class": label, "fold": fold},
            seconds=1.0 if take else 0.2,  # one is shorter than a clip
        )
        for fold in range(4)
        for label in range(3)
        for take in range(4)
    ]
    directory = tmp_path_factory.mktemp("folds")
    return write_records(directory, "folds", FOLD_CLASSES, {"all": records})
