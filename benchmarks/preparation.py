"""Preparation against what FFmpeg and libjpeg alone take for the same films; sizes of both."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
import simplejpeg
from av.video.reformatter import Interpolation, VideoReformatter

from avcl_jax.data.records import RecordDataset
from benchmarks import rendering
from benchmarks.baselines.pyav_dataloader import films, timeline

_QUALITY = 90


def _hours(folder: str) -> float:
    return sum(timeline(path).end_seconds for path in films(Path(folder))) / 3600


def hours_prepared(*, folder: str) -> float:
    """Hours of video that the command prepares in an hour with one worker.

    What the command takes for --dry-run, that is starting Python and reading the manifest, is
    taken off. Starting its worker process is not.
    """

    def seconds(out: Path, *options: str) -> float:
        command = [sys.executable, "-m", "data_prep", "prepare", f"{folder}/manifest.csv"]
        begin = time.perf_counter()
        subprocess.run(
            [*command, f"--out={out}", "--workers=1", *options],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return time.perf_counter() - begin

    with tempfile.TemporaryDirectory() as scratch:
        start = seconds(Path(scratch) / "nothing", "--dry-run")
        return 3600 * _hours(folder) / (seconds(Path(scratch) / "records") - start)


def hours_decoded_and_encoded(*, folder: str) -> float:
    """Hours of video that a bare loop decodes, scales and encodes to JPEG in an hour.

    The same pictures at the same size and quality, and the sound resampled to 16 kHz, in one pass
    through each file; nothing is checked, kept or written.
    """
    hz = rendering.LOG_MEL.sample_rate_hz
    begin = time.perf_counter()
    for path in films(Path(folder)):
        with av.open(str(path)) as container:
            video, audio = container.streams.video[0], container.streams.audio[0]
            video.codec_context.thread_count = 1
            scale = rendering.SHORT_SIDE / min(video.width, video.height)
            size = round(video.width * scale), round(video.height * scale)
            reformatter = VideoReformatter()
            resampler = av.AudioResampler(format="s16", layout="mono", rate=hz)
            for frame in container.decode(video, audio):
                if isinstance(frame, av.AudioFrame):
                    for part in resampler.resample(frame):
                        part.to_ndarray()
                    continue
                assert isinstance(frame, av.VideoFrame)
                image = reformatter.reformat(
                    frame, *size, format="rgb24", interpolation=Interpolation.AREA, threads=1
                ).to_ndarray()
                simplejpeg.encode_jpeg(
                    image, quality=_QUALITY, colorspace="RGB", colorsubsampling="420"
                )
    return 3600 * _hours(folder) / (time.perf_counter() - begin)


def sizes(*, folder: str, directory: str) -> dict[str, float]:
    """Bytes an hour of video takes as records and as the films they were made of."""
    hours = _hours(folder)
    records = RecordDataset(directory, "train")
    shards = sum(path.stat().st_size for path in Path(directory).glob("*.tfrecord-*"))
    sources = sum(path.stat().st_size for path in films(Path(folder)))
    kept = float(records.timelines["duration_seconds"].sum()) / 3600
    return {
        "records": shards / kept,
        "sources": sources / hours,
        "times_larger": shards / kept / (sources / hours),
    }
