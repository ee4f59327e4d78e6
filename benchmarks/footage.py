"""Benchmark data of a realistic size, made once from the shared real videos and kept.

64 videos of 10 s, H.264 and AAC in MP4 like a downloaded Kinetics with a short side of 256, cut and
looped from eight real videos; the records that `avcl-data` makes of them with its
defaults; and data sets of many records whose shards are hard links to those few.
"""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa

from avcl_jax.data import media
from avcl_jax.data.record_index import index_path, load_table, merge, save_table, shard_table
from avcl_jax.data.record_writer import write_dataset_metadata
from avcl_jax.data.records import RecordDataset, shard_name
from benchmarks.measure import SkipError

NAME = "footage"
_AUDIO_HZ = 44_100
_SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "media"
# Real videos with motion, from cartoon to hand-held; file and frames per second.
_SOURCES = (
    ("big_buck_bunny_0_30.webm", 25),
    ("bigbuckbunny.mp4", 25),
    ("chaplin.mp4", 25),
    ("cockatoo.mp4", 25),
    ("flipping_a_pancake.mkv", 30),
    ("nasa_13013.mp4", 25),
    ("small_input_1.mp4", 30),
    ("video_with_failing_audio.mp4", 25),
)
_YOUTUBE = np.frombuffer(
    b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_", np.uint8
)


def _write_video(
    path: Path, frames: list[np.ndarray], waveform: np.ndarray, fps: int, keyframe_seconds: float
) -> None:
    """Writes H.264 and AAC with FFmpeg's default settings except for the key frames."""
    with av.open(str(path), "w") as container:
        height, width = frames[0].shape[:2]
        video = container.add_stream("libx264", rate=Fraction(fps))
        video.width, video.height, video.pix_fmt = width // 2 * 2, height // 2 * 2, "yuv420p"
        video.options = {"g": str(round(keyframe_seconds * fps))}
        audio = container.add_stream("aac", rate=_AUDIO_HZ, layout="mono")
        for image in frames:
            even = np.ascontiguousarray(image[: video.height, : video.width])
            container.mux(video.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
        container.mux(video.encode())
        for begin in range(0, len(waveform), 1024):
            part = waveform[None, begin : begin + 1024]
            frame = av.AudioFrame.from_ndarray(part, format="s16", layout="mono")
            frame.sample_rate, frame.pts = _AUDIO_HZ, begin
            container.mux(audio.encode(frame))
        container.mux(audio.encode())


def make_videos(
    source: Path,
    folder: Path,
    *,
    keyframe_seconds: float,
    per_source: int,
    seconds: float,
    short_side: int,
) -> list[Path]:
    """Makes videos and the manifest that lists them, unless they exist.

    Args:
        source: folder of the eight real videos.
        folder: output folder.
        keyframe_seconds: distance of key frames.
        per_source: number of videos cut and looped from each real video.
        seconds: length of each.
        short_side: largest short side of the frames in pixels; those of some sources are smaller.

    Raises:
        SkipError: if the real videos do not exist.
    """
    if (folder / "manifest.csv").exists():
        return list_videos(folder)
    if not source.exists():
        raise SkipError(f"{source} with the real videos does not exist")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rows = []
    for name, fps in _SOURCES:
        decoded = media.decode_frames(
            source / name, short_side=short_side, max_fps=None, end_seconds=30.0
        )
        frames = [frame.image for frame in decoded]
        audio = media.decode_audio(source / name, sample_rate_hz=_AUDIO_HZ, end_seconds=30.0)
        assert audio is not None, f"{name} has no audio"
        for number in range(per_source):
            first = len(frames) * number // per_source
            looped = [
                frames[(first + k) % len(frames)][:, :: -1 if number % 2 else 1]
                for k in range(round(seconds * fps))
            ]
            begin = round(first / fps * _AUDIO_HZ)
            samples = (begin + np.arange(round(seconds * _AUDIO_HZ))) % len(audio.waveform)
            path = folder / f"{Path(name).stem}_{number}.mp4"
            _write_video(path, looped, audio.waveform[samples], fps, keyframe_seconds)
            rows.append((path.name, path.stem, number))
    # Sources alternate, so that every shard contains some of each.
    rows.sort(key=lambda row: row[2])
    with (folder / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "id", "label_take"), *rows])
    return list_videos(folder)


def list_videos(folder: str | Path) -> list[Path]:
    """Videos in the manifest of a folder."""
    with (Path(folder) / "manifest.csv").open(newline="") as file:
        return [Path(folder) / row["path"] for row in csv.DictReader(file)]


def make_footage(root: Path) -> tuple[Path, Path]:
    """Makes the videos and their records, unless they exist.

    Args:
        root: folder of all benchmark data.

    Returns:
        Folder of the videos with `manifest.csv`, and directory of the records.
    """
    folder, records = root / "clips_2s", root / "records_2s"
    # FFmpeg's default distance of key frames, 250 frames, would slow the baselines that decode
    # the videos during training.
    make_videos(_SHARED, folder, keyframe_seconds=2.0, per_source=8, seconds=10.0, short_side=256)
    prepare(folder / "manifest.csv", records, name=NAME)
    return folder, records


def prepare(source: Path, out: Path, *, name: str, quality: int = 90) -> None:
    """Prepares records with the command that a user runs, unless they exist."""
    if not (out / "dataset_info.json").exists():
        command = [
            sys.executable,
            "-m",
            "avcl_jax.data_prep",
            "prepare",
            str(source),
            f"--out={out}",
        ]
        options = [f"--name={name}", f"--quality={quality}"]
        subprocess.run([*command, *options, "--allow-rejected"], check=True, stdout=sys.stderr)


def link_records(records: Path, out: Path, *, count: int, real_checksums: bool = True) -> Path:
    """Makes a data set of at least `count` records from hard links to few shards, and returns it.

    Each record gets its own id and source, random like those of YouTube, because an index of a few
    repeated names would compress better than a real one.

    Args:
        records: prepared directory with a split "train".
        out: directory of the data set; it is kept if it is complete.
        count: minimum number of records.
        real_checksums: keep checksums, lengths and times, so that records can be read. Otherwise
            they are random, and the index is as large as that of different records.
    """
    if (out / "dataset_info.json").exists():
        return out
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    shards = sorted(records.glob(f"{NAME}-train.tfrecord-*"))
    RecordDataset(records, "train")  # makes the index again where an earlier release made it
    stored = load_table(index_path(records, NAME, "train"))
    assert stored is not None, f"{records} has no index"
    originals = [shard_table(stored, number) for number in range(len(shards))]
    copies = -(-count // len(stored))
    total = copies * len(shards)
    infos = []
    for number in range(total):
        original = number % len(shards)
        # A file system allows some 65,000 links to a file.
        os.link(shards[original], out / shard_name(NAME, "train", number, total))
        infos.append((len(originals[original]), shards[original].stat().st_size))
    table = merge(originals * copies)
    rng = np.random.default_rng(0)
    columns = _random_names(rng, len(table))
    sources = pa.array(columns["source_id"]).dictionary_encode()
    columns["source_number"] = sources.indices.to_numpy()
    if not real_checksums:
        lengths = table["length"].to_numpy()
        columns |= _random_columns(rng, lengths, len(originals[0]))
    for name, values in columns.items():
        place, kind = table.column_names.index(name), table.schema.field(name).type
        table = table.set_column(place, name, pa.array(values, kind))
    save_table(index_path(out, NAME, "train"), table)
    names = {"take": (records / "label_take.labels.txt").read_text().splitlines()}
    write_dataset_metadata(out, name=NAME, class_names=names, splits={"train": infos})
    return out


def _random_names(rng: np.random.Generator, rows: int) -> dict[str, Any]:
    """Columns of ids such as "a1B2c3D4e5F_000012_000022", and of their sources."""
    video = [row.tobytes() for row in _YOUTUBE[rng.integers(0, 64, (rows, 11))]]
    seconds = rng.integers(0, 600, rows)
    times = [f"_{start:06d}_{start + 10:06d}".encode() for start in seconds]
    return {"record_id": list(map(bytes.__add__, video, times)), "source_id": video}


def _random_columns(rng: np.random.Generator, lengths: np.ndarray, shard: int) -> dict[str, Any]:
    """Columns that differ from record to record, as those of different clips do."""
    rows = len(lengths)
    # Shards must keep their sizes: if one record of a pair grows, the other shrinks.
    change = rng.integers(-100_000, 100_000, rows).reshape(-1, 2)
    change[:, 1] = -change[:, 0]
    assert shard % 2 == 0, "pairs of records must not cross the border of a shard"
    seconds = rng.uniform(9.0, 10.1, rows).round(6)
    fps = rng.choice([24000 / 1001, 24, 25, 30000 / 1001, 30], rows)
    frames = np.floor(seconds * fps).astype(np.int32)
    gap = (1 / fps).round(9)
    return {
        "length": lengths + change.reshape(-1),
        "header_length": 200 + 32 * frames,
        "header_crc": rng.integers(0, 2**32, rows, np.uint32),
        "num_frames": frames,
        "last_frame_seconds": ((frames - 1) / fps).round(9),
        "max_frame_gap_seconds": gap,
        "min_frame_gap_seconds": gap,
        "num_samples": np.round(seconds * 16_000).astype(np.int32),
        "audio_peak": np.full(rows, 1000, np.int32),
        "audio_start_seconds": rng.choice([0.0, 0.021333333, 0.023219955], rows),
        "duration_seconds": seconds,
        "label_take": rng.integers(0, 600, rows, np.int32),
    }
