"""Preparation of records against bare FFmpeg and libjpeg on the same videos; sizes of both."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import simplejpeg
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter

from avcl_jax.data.records import RecordDataset
from benchmarks import rendering
from benchmarks.baselines.pyav_dataloader import timeline
from benchmarks.footage import list_videos


def _hours(folder: str) -> float:
    return sum(timeline(path).end_seconds for path in list_videos(folder)) / 3600


def _core_seconds(call: Callable[[], object]) -> float:
    """Processor time of a call with the processes that it starts and waits for."""
    begin = sum(os.times()[:4])
    call()
    return sum(os.times()[:4]) - begin


def hours_prepared(*, folder: str) -> float:
    """Hours of video that the command prepares per core-hour with one worker.

    The time of --dry-run, which starts Python and reads the manifest, is subtracted. The start of
    the worker process is not.
    """

    def prepare(out: Path, *options: str) -> None:
        command = [sys.executable, "-m", "avcl_jax.data_prep", "prepare", f"{folder}/manifest.csv"]
        subprocess.run(
            [*command, f"--out={out}", "--workers=1", *options],
            check=True,
            stdout=subprocess.DEVNULL,
        )

    with tempfile.TemporaryDirectory() as scratch:
        start = _core_seconds(lambda: prepare(Path(scratch) / "nothing", "--dry-run"))
        seconds = _core_seconds(lambda: prepare(Path(scratch) / "records"))
        return 3600 * _hours(folder) / (seconds - start)


def hours_decoded_and_encoded(*, folder: str, planes: bool = False) -> float:
    """Hours of video that a bare loop decodes, scales and encodes to JPEG per core-hour.

    Size and quality of the frames are those of the records, and audio is resampled to 16 kHz, in
    one pass through each file; nothing is checked, kept or written.

    Args:
        planes: scale and encode YUV planes, without RGB between them. The matrix stays that of
            the file, which must be BT.601.
    """
    seconds = _core_seconds(lambda: _decode_and_encode(list_videos(folder), planes=planes))
    return 3600 * _hours(folder) / seconds


def _decode_and_encode(paths: Sequence[Path], *, planes: bool) -> None:
    hz = rendering.LOG_MEL.sample_rate_hz
    for path in paths:
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
                encode(frame, size, reformatter, planes=planes)


def encode(
    frame: av.VideoFrame, size: tuple[int, int], reformatter: VideoReformatter, *, planes: bool
) -> bytes:
    """Scales a frame to width and height, and encodes it to JPEG."""
    scaled = reformatter.reformat(
        frame,
        *size,
        format="yuvj420p" if planes else "rgb24",
        interpolation=Interpolation.AREA,
        dst_color_range=ColorRange.JPEG if planes else None,
        threads=1,
    )
    if planes:
        return simplejpeg.encode_jpeg_yuv_planes(*map(_pixels, scaled.planes), quality=90)
    image = scaled.to_ndarray()
    return simplejpeg.encode_jpeg(image, quality=90, colorspace="RGB", colorsubsampling="420")


def _pixels(plane: Any) -> np.ndarray:
    """Copies a plane without the padding of its lines, uint8 [height, width]."""
    lines = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
    return np.ascontiguousarray(lines[: plane.height, : plane.width])


def sizes(*, folder: str, directory: str) -> dict[str, float]:
    """Bytes per hour of video, as records and as the source videos."""
    records = RecordDataset(directory, "train")
    shards = sum(path.stat().st_size for path in Path(directory).glob("*.tfrecord-*"))
    files = sum(path.stat().st_size for path in list_videos(folder))
    of_records = 3600 * shards / float(records.timelines["duration_seconds"].sum())
    of_sources = files / _hours(folder)
    return {"records": of_records, "sources": of_sources, "times_larger": of_records / of_sources}
