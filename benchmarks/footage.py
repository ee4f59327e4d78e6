"""Data of a realistic size for the benchmarks, made once from the shared real media and kept.

64 clips of 10 s, H.264 and AAC in MP4 like a downloaded Kinetics whose short side is 256, cut and
looped from eight real videos; the records that `python -m data_prep` makes of them with its
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
from avcl_jax.data.records import shard_name
from benchmarks.measure import SkipError

CLIPS, CLIP_SECONDS, SOURCE_SIDE, AUDIO_HZ = 64, 10.0, 256, 44_100
NAME = "footage"
# Real pictures with motion, from cartoon to hand-held; file and pictures per second.
_VIDEOS = (
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


def shared_media() -> Path:
    """The folder of real videos.

    Raises:
        SkipError: if it is not there.
    """
    folder = Path(__file__).resolve().parents[2] / "shared" / "data" / "media"
    if not folder.exists():
        raise SkipError(f"no real media in {folder}")
    return folder


def _write_clip(
    path: Path, frames: list[np.ndarray], sound: np.ndarray, fps: int, keyframe_seconds: float
) -> None:
    """Writes one clip as H.264 and AAC with FFmpeg's default settings but for the key frames."""
    with av.open(str(path), "w") as container:
        height, width = frames[0].shape[:2]
        video = container.add_stream("libx264", rate=Fraction(fps))
        video.width, video.height, video.pix_fmt = width // 2 * 2, height // 2 * 2, "yuv420p"
        video.options = {"g": str(round(keyframe_seconds * fps))}
        audio = container.add_stream("aac", rate=AUDIO_HZ, layout="mono")
        for image in frames:
            cut = np.ascontiguousarray(image[: video.height, : video.width])
            container.mux(video.encode(av.VideoFrame.from_ndarray(cut, format="rgb24")))
        container.mux(video.encode())
        for begin in range(0, len(sound), 1024):
            part = sound[None, begin : begin + 1024]
            frame = av.AudioFrame.from_ndarray(part, format="s16", layout="mono")
            frame.sample_rate, frame.pts = AUDIO_HZ, begin
            container.mux(audio.encode(frame))
        container.mux(audio.encode())


def _make_clips(
    source: Path,
    folder: Path,
    *,
    keyframe_seconds: float,
    per_video: int,
    seconds: float,
    short_side: int,
) -> None:
    """Writes all clips and the manifest that lists them."""
    folder.mkdir(parents=True)
    rows = []
    for name, fps in _VIDEOS:
        frames = [
            frame.image
            for frame in media.decode_frames(
                source / name, short_side=short_side, max_fps=None, end_seconds=30.0
            )
        ]
        decoded = media.decode_audio(source / name, sample_rate_hz=AUDIO_HZ, end_seconds=30.0)
        assert decoded is not None, f"{name} has no sound"
        for number in range(per_video):
            first = len(frames) * number // per_video
            chosen = [
                frames[(first + k) % len(frames)][:, :: -1 if number % 2 else 1]
                for k in range(round(seconds * fps))
            ]
            begin = round(first / fps * AUDIO_HZ)
            samples = (begin + np.arange(round(seconds * AUDIO_HZ))) % len(decoded.waveform)
            path = folder / f"{Path(name).stem}_{number}.mp4"
            _write_clip(path, chosen, decoded.waveform[samples], fps, keyframe_seconds)
            rows.append((path.name, path.stem, number))
    # Videos alternate, so that every shard holds some of each.
    rows.sort(key=lambda row: row[2])
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "id", "label_take"))
        writer.writerows(rows)


def make_footage(root: Path, *, keyframe_seconds: float = 2.0) -> tuple[Path, Path]:
    """Makes the clips and their records, unless they are there.

    Args:
        root: folder of all benchmark data.
        keyframe_seconds: between key frames of the clips. FFmpeg's default is 250 pictures, which
            is worse for what decodes the films while training.

    Returns:
        Folder of the films with `manifest.csv`, and directory of the records.
    """
    folder = root / f"clips_{keyframe_seconds:g}s"
    records = root / f"records_{keyframe_seconds:g}s"
    if not (folder / "manifest.csv").exists():
        shutil.rmtree(folder, ignore_errors=True)
        _make_clips(
            shared_media(),
            folder,
            keyframe_seconds=keyframe_seconds,
            per_video=CLIPS // len(_VIDEOS),
            seconds=CLIP_SECONDS,
            short_side=SOURCE_SIDE,
        )
    prepare(folder / "manifest.csv", records, name=NAME)
    return folder, records


def make_films(
    source: Path, folder: Path, *, per_video: int, seconds: float, short_side: int
) -> list[Path]:
    """Makes films of the size that people keep and share, unless they are there.

    Args:
        source: folder of the real videos.
        folder: of the films.
        per_video: films cut and looped from each of the eight videos.
        seconds: length of each.
        short_side: of the pictures, at most: those of some videos are smaller.
    """
    if not (folder / "manifest.csv").exists():
        shutil.rmtree(folder, ignore_errors=True)
        # FFmpeg's default distance of key frames: films are watched from the beginning.
        _make_clips(
            source,
            folder,
            keyframe_seconds=10.0,
            per_video=per_video,
            seconds=seconds,
            short_side=short_side,
        )
    return sorted(folder.glob("*.mp4"))


def prepare(source: Path, out: Path, *, name: str, quality: int = 90) -> Path:
    """Prepares records by the command, as a user does, unless they are there."""
    if not (out / "dataset_info.json").exists():
        command = [sys.executable, "-m", "data_prep", "prepare", str(source), f"--out={out}"]
        options = [f"--name={name}", f"--quality={quality}"]
        subprocess.run([*command, *options, "--allow-rejected"], check=True, stdout=sys.stderr)
    return out


def link_records(records: Path, out: Path, *, count: int, real_checksums: bool = True) -> Path:
    """Makes a data set of at least `count` records out of hard links to few shards.

    Every record gets an id and a source of its own, random like YouTube's: an index of a few
    repeated names would compress as no real one does.

    Args:
        records: prepared directory, split "train".
        out: where to; nothing is done if it is finished.
        count: records wanted.
        real_checksums: records can be read. False gives random checksums, lengths and times: an
            index as large as that of so many different records, which only opens.

    Returns:
        `out`.
    """
    if (out / "dataset_info.json").exists():
        return out
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    shards = sorted(records.glob(f"{NAME}-train.tfrecord-*"))
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
    # Shards must keep their sizes: what one record of a shard gains, another loses.
    change = rng.integers(-100_000, 100_000, rows).reshape(-1, 2)
    change[:, 1] = -change[:, 0]
    assert shard % 2 == 0, "pairs of records must not cross the border of a shard"
    seconds = rng.uniform(9.0, 10.1, rows).round(6)
    fps = rng.choice([24000 / 1001, 24, 25, 30000 / 1001, 30], rows)
    frames = np.floor(seconds * fps).astype(np.int32)
    gap = (1 / fps).round(9)
    return {
        "length": lengths + change.reshape(-1),
        "crc": rng.integers(0, 2**32, rows, np.uint32),
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
