"""Time of `avcl-embed` compared with decoding and encoding apart.

    python -m benchmarks.embed --json embed.json

Sixteen videos of 20 s, cut from real ones. Compilation is not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from avcl_jax import weights
from avcl_jax.paths import local_path
from benchmarks import footage, measure
from benchmarks.measure import Measured, RowTable, Target

_VIDEOS: dict[str, Any] = {"per_source": 2, "seconds": 20.0, "short_side": 360}
_SMALL: dict[str, Any] = {"per_source": 1, "seconds": 1.0, "short_side": 64}
_BATCH = 16


def seconds_of(part: str, encoder: str, files: list[str], threads: int) -> float:
    """Wall-clock seconds of one part of the work, or of all of it.

    Args:
        part: "embedded", "decoded" or "encoded".
        threads: files decoded at a time.
    """
    return _PARTS[part](encoder, files, threads)


def _embedded(encoder: str, files: list[str], threads: int) -> float:
    from avcl_jax.embed.vectors import Parts, compute, write

    with _job(encoder, files, threads) as (job, directory):
        parts = Parts(directory, job.key)

        def run() -> None:
            parts.open()
            compute(job, parts)
            write(directory / "features.parquet", parts, job, per_file=False)

        seconds = measure.seconds_of(run)
        assert not parts.failed, parts.failed
        return seconds


def _decoded(encoder: str, files: list[str], threads: int) -> float:
    from avcl_jax.data.media import decode_media
    from avcl_jax.export.runs import open_encoders

    preprocess: dict[str, Any] = {
        m: e.preprocess for m, e in open_encoders(encoder).encoders.items()
    }
    decode = functools.partial(
        decode_media,
        short_side=preprocess["video"].image_size,
        max_fps=None,
        sample_rate_hz=preprocess["audio"].log_mel.sample_rate_hz,
    )

    def run() -> None:
        with ThreadPoolExecutor(threads) as pool:
            for media in pool.map(decode, files):
                del media

    return measure.seconds_of(run)


def _encoded(encoder: str, files: list[str], threads: int) -> float:
    import jax

    from avcl_jax.export.runs import open_encoders

    with _job(encoder, files, threads) as (job, _):
        clips: dict[str, list[np.ndarray]] = {modality: [] for modality in job.lengths}
        for _, cut in job.cutter.cut(job.items, (0, 0), ()):
            for modality, values in cut.clips.items():
                clips[modality] += list(values.values)
    calls = []
    for modality, one in open_encoders(encoder).encoders.items():
        values = clips[modality]
        values += [values[-1]] * (-len(values) % _BATCH)
        batches = np.stack(values).reshape(-1, _BATCH, *one.input_shape)
        apply = functools.partial(jax.jit(one.apply), jax.device_put(one.params))
        apply(batches[0]).block_until_ready()
        calls.append((apply, batches))

    def run() -> None:
        for apply, batches in calls:
            for batch in batches:
                np.asarray(apply(batch))

    return measure.seconds_of(run)


@contextlib.contextmanager
def _job(encoder: str, files: list[str], threads: int) -> Iterator[tuple[Any, Path]]:
    """Yields a compiled job, and a folder for its parts."""
    from avcl_jax.embed.cutting import Cutter
    from avcl_jax.embed.items import list_items
    from avcl_jax.embed.vectors import Job
    from avcl_jax.export.runs import open_encoders

    source = open_encoders(encoder)
    cutter = Cutter(source.encoders, speed=1, hop=None, threads=threads)
    job = Job(list_items(files, None), source, cutter, speed=1, batch_size=_BATCH)
    for modality, one in source.encoders.items():
        job.encode(modality, [np.zeros(one.input_shape, one.preprocess.clip_dtype)])
    with tempfile.TemporaryDirectory() as directory:
        yield job, Path(directory)


_PARTS = {"embedded": _embedded, "decoded": _decoded, "encoded": _encoded}


def _over_parts(args: argparse.Namespace) -> Measured:
    """Seconds of the whole over the sum of its parts."""
    videos = footage.make_videos(
        args.media,
        args.workdir / ("small" if args.small else "videos"),
        keyframe_seconds=10.0,
        **_SMALL if args.small else _VIDEOS,
    )
    threads = measure.machine()["cores"]
    given = {"encoder": args.encoder, "files": [str(video) for video in videos], "threads": threads}

    def measured(part: str) -> float:
        return measure.run_child("benchmarks.embed:seconds_of", {"part": part, **given})

    parts = {part: functools.partial(measured, part) for part in _PARTS}
    seconds = measure.interleave(parts, repeats=args.repeats)
    median = {part: statistics.median(values) for part, values in seconds.items()}
    detail = {f"seconds_{part}": measure.spread(values) for part, values in seconds.items()}
    value = median["embedded"] / (median["decoded"] + median["encoded"])
    return value, {"files": len(videos), "threads": threads, **detail}


_ROWS: RowTable[argparse.Namespace] = {
    "embed_over_parts": ("ratio", Target("<=", 1.15), _over_parts)
}


def main(arguments: list[str]) -> None:
    """Runs the command."""
    parser = measure.command_parser("embed", __doc__, repeats=True)
    add = parser.add_argument
    add("--encoder", default=weights.DEFAULT, help="video and audio encoder (%(default)s)")
    add("--media", type=local_path, default="../shared/data/media", help="folder of real videos")
    add("--workdir", type=local_path, default="runs/embed", help="folder of videos made of them")
    add("--small", action="store_true", help="smoke test without a usable value")
    args = parser.parse_args(arguments)
    measure.measure_rows(_ROWS, list(_ROWS), args, args.json)


if __name__ == "__main__":
    measure.run_command(main)
