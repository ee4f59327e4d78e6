"""`avcl-data small`: the records on which the shipped encoders `small` were trained.

Videos rendered like the demo's, and videos rendered for the recordings of ESC-10, each in several
versions. Finished files are kept, so that running it again takes seconds.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from avcl_jax.data.media import decode_audio
from avcl_jax.data_prep.collections import esc50
from avcl_jax.data_prep.demo import prepare_rendered
from avcl_jax.data_prep.foley import command as foley
from avcl_jax.data_prep.foley.heard import render_heard, renewed
from avcl_jax.data_prep.foley.scene import SAMPLE_RATE_HZ
from avcl_jax.data_prep.manifest import COUNT, NATURAL, Entry
from avcl_jax.errors import UserError
from avcl_jax.paths import absolute_path, local_path, write_bytes

# Licensed for samples in other works (CC Sampling+), all others as CC BY or CC0.
_LEFT_OUT = ("1-40730-A-1", "2-96460-A-1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    add = parser.add_argument
    add("folder", metavar="FOLDER", type=absolute_path, help="ESC-50: folder with audio/ and meta/")
    add("--out", type=local_path, default="data/small", help="folder for media and records")
    add("--rendered", type=NATURAL, default=800, help="videos rendered like the demo's")
    add("--versions", type=COUNT, default=2, help="videos per recording; the first keeps its audio")
    add("--seed", type=NATURAL, default=21, help="seed of every file")
    add("--workers", type=COUNT, default=os.cpu_count() or 1, help="processes")


def run(args: argparse.Namespace) -> int:
    """Renders the videos and prepares their records; returns the exit status.

    Raises UserError if a recording is missing or cannot be decoded.
    """
    listed = esc50.read(argparse.Namespace(folder=args.folder, subset="esc10"))
    if listed.missing:
        raise UserError(
            f"small: {args.folder}/audio lacks {len(listed.missing)} of the recordings of ESC-10, "
            f"first {listed.missing[0].expected}: give a complete copy of ESC-50"
        )
    recordings = [entry for entry in listed.entries if entry.record_id not in _LEFT_OUT]
    media = args.out / "media"
    counts = {"train": args.rendered}
    foley.write_collection(media / "foley", counts, seed=args.seed, workers=args.workers)
    tasks = [
        _Task(
            media / "heard" / f"{entry.record_id}_{version}.mp4", entry, number, version, args.seed
        )
        for number, entry in enumerate(recordings)
        for version in range(args.versions)
    ]
    _render([task for task in tasks if not task.path.exists()], args.workers)
    rows = [
        (f"foley/train/train_{n:05d}.mp4", name := f"foley_{n:05d}", name)
        for n in range(args.rendered)
    ]
    rows += [
        (f"heard/{task.path.name}", f"heard_{task.path.stem}", f"heard_{task.recording.source_id}")
        for task in tasks
    ]
    table = io.StringIO()
    csv.writer(table).writerows([("path", "id", "source"), *rows])
    write_bytes(media / "manifest.csv", table.getvalue().encode())
    records = args.out / "records"
    return prepare_rendered(media / "manifest.csv", records, name="small", workers=args.workers)


@dataclasses.dataclass(frozen=True)
class _Task:
    """One version of a recording, whose video is to be rendered."""

    path: Path
    recording: Entry
    number: int
    version: int  # 0 is the recording as it is
    seed: int

    def run(self) -> None:
        rng = np.random.default_rng([self.seed, self.number, self.version])
        audio = decode_audio(self.recording.path, sample_rate_hz=SAMPLE_RATE_HZ)
        if audio is None:
            raise UserError(f"small: {self.recording.path} has no audio")
        waveform = audio.waveform.astype(np.float32) / 2**15
        if self.version:
            waveform = renewed(rng, waveform)
        foley.write_video(self.path, render_heard(rng, waveform), waveform)


def _render(tasks: Sequence[_Task], workers: int) -> None:
    for task in tasks[:1]:
        task.path.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, initializer=cv2.setNumThreads, initargs=(1,)) as pool:
        done = pool.imap_unordered(_Task.run, tasks, chunksize=4)
        for _ in tqdm(done, total=len(tasks), unit="video", desc="heard", mininterval=5):
            pass
