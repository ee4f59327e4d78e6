"""Size without a cluster: `python -m benchmarks.scale --json F`.

docs/data/pipeline_speed.md describes the rows. Records are synthetic: shards that are hard links to
one, with an index in which every record has its own name.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import gc
import io
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import wave
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg

from avcl_jax.data.pipeline import RandomViews, train_batches
from avcl_jax.data.record_format import Record
from avcl_jax.data.record_index import index_path, merge, save_table
from avcl_jax.data.record_writer import RecordWriter, write_dataset_metadata
from avcl_jax.data.records import shard_name
from avcl_jax.data.workers import filled_batches
from avcl_jax.paths import local_path
from avcl_jax.processes import STOPPED
from avcl_jax.training.run_steps import STEPS_AHEAD
from benchmarks import measure, object_store
from benchmarks.footage import NAME, link_records, make_footage
from benchmarks.measure import Measured, RowTable, Target
from benchmarks.rendering import BATCH_SIZE, SPEC, open_records, shown_bytes

_SHAPES = {"x": ((512, 2048), "uint8")}  # 1 MB
_FPS, _SECONDS, _SIDE = 20, 3, 128
_WORKERS = 32
# Of the demo's model with --small: compiling it takes longer than everything else.
_SMALL = {
    "global_batch_size": 8,
    "bank.size": 0,
    "views.num_frames": 4,
    "crop.image_size": 16,
    **{f"model.{name}.resnet.widths": (8,) for name in ("video", "audio")},
    **{f"model.{name}.resnet.depths": (0,) for name in ("video", "audio")},
}


def _child(function: str, **arguments: Any) -> Any:
    return measure.run_child(f"benchmarks.scale:{function}", arguments)


def _records(args: argparse.Namespace, shards: int) -> str:
    """Makes a data set of some shards, unless it exists, and returns its directory."""
    per_shard = 100 if args.small else 1000
    one = args.data / f"scale_{per_shard}"
    if not (one / "dataset_info.json").exists():
        _write_shard(one, per_shard)
    if shards == 1:
        return str(one)
    out = args.data / f"scale_{shards}x{per_shard}"
    return str(link_records(one, out, count=shards * per_shard))


def _write_shard(directory: Path, count: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    times = np.arange(_SECONDS * _FPS) / _FPS
    videos = []
    for _ in range(20):
        coarse = rng.integers(0, 256, (len(times), 8, 8, 3), np.uint8)
        frames = [cv2.resize(frame, (_SIDE, _SIDE)) for frame in coarse]
        videos.append([simplejpeg.encode_jpeg(frame, quality=90) for frame in frames])
    path = directory / shard_name(NAME, "train", 0, 1)
    with RecordWriter(path) as writer:
        for number in range(count):
            writer.write(
                Record(
                    record_id=f"record {number}",
                    source_id=f"source {number}",
                    frames=videos[number % len(videos)],
                    frame_seconds=times,
                    waveform=rng.integers(-9000, 9000, 16_000 * _SECONDS).astype(np.int16),
                    sample_rate_hz=16_000,
                    audio_start_seconds=0.0,
                    duration_seconds=float(_SECONDS),
                    height=_SIDE,
                    width=_SIDE,
                    labels={"take": number % 10},
                )
            )
    save_table(index_path(directory, NAME, "train"), merge([writer.table()]))
    names, info = {"take": [f"take {n}" for n in range(10)]}, (count, path.stat().st_size)
    write_dataset_metadata(directory, name=NAME, class_names=names, splits={"train": [info]})


def _batches_in_memory(args: argparse.Namespace) -> Measured:
    """Shared memory of 32 workers, in batches: the most for readers that hold 1 and 2 batches."""
    count = 50 if args.small else 400
    found = {
        f"holds_{held}": _child("batches_in_memory", held=held, workers=_WORKERS, count=count)
        for held in (1, STEPS_AHEAD)
    }
    return max(found.values()), found


def batches_in_memory(*, held: int, workers: int, count: int) -> float:
    """Returns shared memory, in batches, while workers fill and a reader holds batches."""
    batches = filled_batches(
        _SHAPES,
        lambda number, part: (number, part.start),
        _fill_late,
        first=0,
        workers=workers,
        threads=1,
    )
    last: collections.deque[Any] = collections.deque(maxlen=held)
    most = 0
    for _ in range(count):
        last.append(next(batches))
        most = max(most, _shared_bytes())
    (shape, _) = _SHAPES["x"]
    return most / float(np.prod(shape))


def _fill_late(request: tuple[int, int], out: Mapping[str, np.ndarray]) -> None:
    """Takes between 0 and 10 ms, so that workers overtake each other."""
    time.sleep(np.random.default_rng(request).uniform(0, 0.01))
    out["x"][...] = 1


def _shared_bytes() -> int:
    """Returns the bytes of the file of this process in /dev/shm, which has no name."""
    blocks = 0
    for entry in os.scandir("/proc/self/fd"):
        if os.readlink(entry.path).startswith("/dev/shm/"):
            blocks = max(blocks, os.stat(entry.path).st_blocks)
    return 512 * blocks


def _index_memory(args: argparse.Namespace, workers: int) -> Measured:
    """Memory with an index of 2 million records minus that with one shard's, of all processes.

    Without pages of the index, which is a file: the system drops them when memory is short.
    """
    shards = 20 if args.small else 2000
    found = {
        f"megabytes_of_{count}_shards": _child(
            "megabytes", directory=_records(args, count), workers=workers
        )
        for count in (shards, 1)
    }
    many, one = found.values()
    return many - one, found


def megabytes(*, directory: str, workers: int) -> float:
    """Returns memory of a process with an open data set and its workers, MB of 1e6 bytes."""
    source = open_records(directory)
    if workers:
        batches = train_batches(
            source, SPEC, seed=0, global_batch_size=2 * workers, workers=workers
        )
        for _ in range(4):
            next(batches)
    gc.collect()
    return _kept_megabytes(os.getpid())


def _kept_megabytes(process: int) -> float:
    """Returns memory of a process and those it started that is not a file's: never dropped."""
    import psutil

    kilobytes = 0
    root = psutil.Process(process)
    for each in (root, *root.children(recursive=True)):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # one that has ended
            lines = Path(f"/proc/{each.pid}/smaps_rollup").read_text().splitlines()
            sizes = {line.split()[0]: int(line.split()[1]) for line in lines[1:]}
            kilobytes += sizes["Pss_Anon:"] + sizes["Pss_Shmem:"]
    return kilobytes * 1024 / 1e6


def _start(args: argparse.Namespace) -> Measured:
    """Seconds from starting Python to the first batch, new and resumed: the longer median."""
    directory = _records(args, 20 if args.small else 2000)
    records = 20 * 100 if args.small else 2_000_000
    sides = {"new": 0, "resumed": int(6.5 * records / BATCH_SIZE)}
    calls = {
        name: functools.partial(_child, "first_batch", directory=directory, first_step=step)
        for name, step in sides.items()
    }
    values = measure.interleave(calls, repeats=1 if args.small else args.repeats)
    detail = {name: measure.spread(seconds) for name, seconds in values.items()}
    return max(map(statistics.median, values.values())), detail


def first_batch(*, directory: str, first_step: int) -> float:
    """Returns seconds from the start of this process to a batch; the index is not in the cache."""
    index = os.open(index_path(directory, NAME, "train"), os.O_RDONLY)
    os.posix_fadvise(index, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(index)
    batches = train_batches(
        open_records(directory),
        SPEC,
        seed=0,
        global_batch_size=BATCH_SIZE,
        first_step=first_step,
        workers=len(os.sched_getaffinity(0)),
    )
    next(batches)
    return measure.seconds_since_start()


def _hosts(args: argparse.Namespace) -> Measured:
    """Samples per second of n hosts, each run alone, over n times those of one: the least of n."""
    directory, counts = _records(args, 20), (2,) if args.small else (2, 4, 8)
    batches = 2 if args.small else 20
    child = functools.partial(_child, "host_rate", directory=directory, count=batches)
    ratios: dict[int, float] = {}
    detail: dict[str, Any] = {}
    for hosts in counts:
        sides: dict[str, Any] = {"below": functools.partial(child, hosts=1, host=0)}
        sides |= {str(n): functools.partial(child, hosts=hosts, host=n) for n in range(hosts)}
        rates = measure.interleave(sides, repeats=1 if args.small else args.repeats)
        first = statistics.median(rates.pop("below"))
        each = [statistics.median(values) for values in rates.values()]
        ratios[hosts] = sum(each) / (hosts * first)
        detail[f"samples_per_second_of_{hosts}"] = {"first": first, "hosts": each}
    return min(ratios.values()), detail | {"ratios": ratios}


def host_rate(*, directory: str, hosts: int, host: int, count: int) -> float:
    """Returns samples per second of one of `hosts`, which renders its rows of the batch."""
    rows = range(host * BATCH_SIZE, (host + 1) * BATCH_SIZE)
    batches = train_batches(
        open_records(directory),
        SPEC,
        seed=0,
        global_batch_size=hosts * BATCH_SIZE,
        rows=rows,
        workers=len(os.sched_getaffinity(0)),
    )
    return measure.rate(batches, batch_size=BATCH_SIZE, warmup=4, count=count)


def _reads(args: argparse.Namespace, value: str) -> Measured:
    """Requests, and bytes over those that two views show, from a store and from a disk."""
    directory = _records(args, 1) if args.small else str(make_footage(args.data)[1])
    found = _counted_reads(directory, 4 if args.small else 64)
    return found[value], found


@functools.cache  # three rows of one measurement, which counts and takes no time
def _counted_reads(directory: str, count: int) -> dict[str, float]:
    counted: dict[str, float] = _child("reads", directory=directory, count=count)
    return counted


def reads(*, directory: str, count: int) -> dict[str, float]:
    """Counts requests and bytes that rendering of `count` records takes."""
    local, disk, pread = open_records(directory), 0, os.pread
    positions = np.random.default_rng(0).permutation(len(local))[:count]
    shown = sum(shown_bytes(local, n, np.random.default_rng(n)) for n in positions)

    def counting(file: int, size: int, begin: int) -> bytes:
        nonlocal disk
        disk += size
        return pread(file, size, begin)

    with object_store.running() as store:
        os.environ |= store.environment
        for path in Path(directory).iterdir():
            store.put(f"bucket/{path.name}", path.read_bytes())
        remote = open_records("gs://bucket")
        store.requests.clear()
        store.sent_bytes, os.pread = 0, counting
        for source in (local, remote):
            views = RandomViews(source, SPEC, skip_unreadable=False)
            out = {name: np.zeros(*array) for name, array in views.shapes(count).items()}
            rngs = list(map(np.random.default_rng, positions))
            views.render(views.requests(positions), rngs, out)
        return {
            "requests_per_record": len(store.requests) / count,
            "store_bytes_per_shown_byte": store.sent_bytes / shown,
            "disk_bytes_per_shown_byte": disk / shown,
            "shown_bytes_per_record": shown / count,
        }


def _save_stall(args: argparse.Namespace) -> Measured:
    """Seconds of the slowest of the three steps after a checkpoint over those of later ones."""
    every, steps = (5, 15) if args.small else (10, 120)
    seconds = _step_seconds(args, steps=steps, checkpoint_every=every)
    saves = range(every, steps - every + 1, every)
    # A line of metrics is written one step late, so the step after a save is two lines later.
    after = {n: [seconds[step + n] for step in saves] for n in (1, 2, 3)}
    others = [seconds[step + n] for step in saves for n in range(4, every + 1)]
    detail = {f"line {n} after a save": measure.spread(values) for n, values in after.items()}
    slowest = max(map(statistics.median, after.values()))
    return slowest / statistics.median(others), {**detail, "others": measure.spread(others)}


def _processes(args: argparse.Namespace) -> Measured:
    """Seconds of a step on 2 processes of 4 CPU devices over those on one process of 8."""
    steps = 6 if args.small else 24
    runs = {
        name: functools.partial(
            lambda processes: statistics.median(
                list(_step_seconds(args, steps=steps, processes=processes).values())[4:-1]
            ),
            processes,
        )
        for name, processes in (("one", 1), ("two", 2))
    }
    values = measure.interleave(runs, repeats=1 if args.small else 3)
    detail = {name: measure.spread(seconds) for name, seconds in values.items()}
    return statistics.median(values["two"]) / statistics.median(values["one"]), detail


def _step_seconds(
    args: argparse.Namespace, *, steps: int, checkpoint_every: int = 10**6, processes: int = 0
) -> dict[int, float]:
    """Trains the demo's model, and returns the seconds of each step.

    Args:
        processes: processes with 8 virtual CPU devices in all; 0 for one with one device.
    """
    settings: dict[str, object] = {
        "data.directory": _records(args, 1),
        "bank.health_labels": (),
        "steps": steps,
        "optimizer.warmup_steps": 1,
        "execution.log_every": 1,
        "execution.checkpoint_every": checkpoint_every,
    }
    with tempfile.TemporaryDirectory() as workdir:
        command = _main("pretrain", workdir, settings | (_SMALL if args.small else {}))
        environment = dict(os.environ)
        if processes:
            devices = f"--xla_force_host_platform_device_count={8 // processes}"
            environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {devices}"
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            command += [f"--coordinator=127.0.0.1:{port}", f"--num_processes={processes}"]
        started = [
            subprocess.Popen(
                [*command, f"--process_id={number}"] if processes > 1 else command, env=environment
            )
            for number in range(max(processes, 1))
        ]
        if any([process.wait() for process in started]):
            raise measure.ChildError(f"{' '.join(command)} failed")
        lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: 1 / row["steps_per_second"] for row in map(json.loads, lines)}


def _main(config: str, workdir: str, settings: Mapping[str, object]) -> list[str]:
    """Returns the command that runs a config with settings."""
    command = [sys.executable, "-m", "avcl_jax.main", f"--config=configs/{config}.py"]
    command += [f"--config.{name}={value}" for name, value in settings.items()]
    return [*command, f"--workdir={workdir}"]


def _soak(args: argparse.Namespace) -> Measured:
    """Growth of the memory of a training that saves, and is evaluated beside it six times.

    The memory is that of the training and its data workers; evaluation is another command.
    """
    settings: dict[str, object] = {
        "data.directory": _records(args, 1) if args.small else args.demo,
        "steps": 10**7,
        "bank.warmup_steps": 100,
        "bank.health_labels": (),
        "execution.workers": 2,
        "execution.checkpoint_every": 100,
        "execution.keep_checkpoints": 20,  # while an evaluation reads one
    } | (_SMALL if args.small else {})
    evaluated: dict[str, object] = {"bootstrap.resamples": 100}
    if args.small:
        evaluated |= {"evaluation.test_split": "train", "data.allow_trained_on": True}
        evaluated |= {"evaluation.clips": 1}
    seconds, megabytes, evaluations = [], [], 0
    with tempfile.TemporaryDirectory() as workdir, contextlib.ExitStack() as started:
        training = subprocess.Popen(_main("pretrain", workdir, settings))
        started.callback(training.kill)
        evaluation, began = None, time.monotonic()
        while (passed := time.monotonic() - began) < 60 * args.minutes or not evaluations:
            if evaluation is not None and evaluation.poll() is not None:
                if evaluation.returncode:
                    raise measure.ChildError("the evaluation failed")
                evaluation, evaluations = None, evaluations + 1
            due = passed > 60 * args.minutes * (evaluations + 1) / 7
            if due and evaluation is None and any(Path(workdir).glob("checkpoints/*/commit*")):
                evaluation = subprocess.Popen(_main("evaluate", workdir, evaluated))
                started.callback(evaluation.kill)
            if training.poll() is not None:
                raise measure.ChildError("the training ended")
            seconds.append(passed)
            megabytes.append(_kept_megabytes(training.pid))
            time.sleep(min(1.0, args.minutes))
        training.send_signal(signal.SIGTERM)
        if training.wait() != STOPPED:
            raise measure.ChildError("the training did not stop after saving")
        *_, last = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    growth, curve = growth_per_hour(seconds, megabytes)
    detail = {
        "minutes": args.minutes,
        "evaluations": evaluations,
        "steps": json.loads(last)["step"],
    }
    return growth, detail | {"megabytes": curve}


def growth_per_hour(
    seconds: Sequence[float], megabytes: Sequence[float]
) -> tuple[float, list[float]]:
    """Returns the growth of memory in % per hour after the first sixth of the time.

    It is the slope of a line through the medians of 50 equal parts, over the line's first value.
    The medians of all 60 parts are returned too.
    """
    parts = [np.array_split(np.asarray(values), 60) for values in (seconds, megabytes)]
    times, medians = ([float(np.median(part)) for part in each if len(part)] for each in parts)
    first = len(times) // 6
    slope, offset = np.polyfit(times[first:], medians[first:], 1)
    return 100 * 3600 * slope / (offset + slope * times[first]), [round(m, 1) for m in medians]


def _checkpoint_speed(args: argparse.Namespace, function: str) -> Measured:
    """Seconds to save or restore a state over those to write or read a file of its bytes."""
    args.data.mkdir(parents=True, exist_ok=True)
    megabytes, directory = 8 if args.small else 500, str(args.data)
    calls = {
        name: functools.partial(
            _child, function, directory=directory, megabytes=megabytes, plain=plain
        )
        for name, plain in (("checkpoint", False), ("plain", True))
    }
    values = measure.interleave(calls, repeats=1 if args.small else args.repeats)
    detail = {name: measure.spread(seconds) for name, seconds in values.items()}
    ratio = statistics.median(values["checkpoint"]) / statistics.median(values["plain"])
    return ratio, {"megabytes": megabytes, **detail}


def seconds_to_save(*, directory: str, megabytes: int, plain: bool) -> float:
    """Returns seconds until a checkpoint or a plain file is on the disk."""
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        return _save(Path(folder), _state(megabytes), plain=plain)


def seconds_to_restore(*, directory: str, megabytes: int, plain: bool) -> float:
    """Returns seconds to read it from the disk, a checkpoint with its checksums."""
    import jax
    from etils import epath

    from avcl_jax.training.checkpoint import Checkpoints

    with tempfile.TemporaryDirectory(dir=directory) as folder:
        state = _state(megabytes)
        _save(Path(folder), state, plain=plain)
        began = time.perf_counter()
        if plain:
            (Path(folder) / "plain").read_bytes()
        else:
            with Checkpoints(epath.Path(folder), keep=1) as checkpoints:
                jax.block_until_ready(checkpoints.restore(1, state))
        return time.perf_counter() - began


def _state(megabytes: int) -> Any:
    import jax

    return {str(n): jax.random.normal(jax.random.key(n), (250_000,)) for n in range(megabytes)}


def _save(folder: Path, state: Any, *, plain: bool) -> float:
    """Saves, and returns the seconds until everything is on the disk and not in its cache."""
    from etils import epath

    from avcl_jax.training.checkpoint import Checkpoints, Progress

    content = b"".join(np.asarray(array).tobytes() for array in state.values())
    with Checkpoints(epath.Path(folder), keep=1) as checkpoints:
        began = time.perf_counter()
        if plain:
            (folder / "plain").write_bytes(content)
        else:
            checkpoints.save(state, Progress(1, 0.0, "", 1))
            checkpoints.finish()
        _to_disk(folder)
        return time.perf_counter() - began


def _to_disk(folder: Path) -> None:
    """Writes all files of a folder to the disk, and removes them from the system's cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


def _prepare_requests(args: argparse.Namespace) -> Measured:
    """Requests to a store per file, of a preparation from it into it or of the same again."""
    count = 128 if args.small else 1024
    detail: dict[str, Any] = {"files": count}
    with object_store.running() as store:
        for number in range(count):
            store.put(f"bucket/media/{number:04d}.wav", _recording(number))
        command = [sys.executable, "-m", "avcl_jax.data_prep", "prepare", "gs://bucket/media"]
        for name in ("new", "again"):
            store.requests.clear()
            subprocess.run(
                [*command, "--out=gs://bucket/records"],
                env=os.environ | store.environment,
                check=True,
            )
            media = [r for r in store.requests if r.name.startswith("bucket/media")]
            downloads = collections.Counter(r.name for r in media if r.kind == "download")
            detail[name] = {
                "requests_per_file": len(store.requests) / count,
                "downloads_per_file": max(downloads.values(), default=0),
                "of_media": collections.Counter(request.kind for request in media),
                "of_records": collections.Counter(
                    r.kind for r in store.requests if not r.name.startswith("bucket/media")
                ),
            }
    return max(detail[name]["requests_per_file"] for name in ("new", "again")), detail


def _recording(number: int) -> bytes:
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        samples = np.random.default_rng(number).integers(-9000, 9000, 16000)
        file.writeframes(samples.astype("<i2").tobytes())
    return content.getvalue()


_ROWS: RowTable[argparse.Namespace] = {
    "shm_batches_in_flight": ("batches", Target("<=", 4), _batches_in_memory),
    "index_2m_process_mb": ("MB", Target("<=", 120), lambda args: _index_memory(args, 0)),
    "index_2m_host_mb": ("MB", Target("<=", 1000), lambda args: _index_memory(args, _WORKERS)),
    "epoch_2m_start_seconds": ("s", Target("<=", 10), _start),
    "input_hosts_scaling": ("ratio", Target(">=", 0.95), _hosts),
    "prepare_requests_per_file": ("requests", Target("<=", 2), _prepare_requests),
    "requests_per_record": (
        *("requests", Target("<=", 1)),
        functools.partial(_reads, value="requests_per_record"),
    ),
    "bytes_read_per_shown_byte": (
        *("ratio", Target("<=", 2.0)),
        functools.partial(_reads, value="store_bytes_per_shown_byte"),
    ),
    "disk_bytes_per_shown_byte": (
        *("ratio", Target("<=", 2.0)),
        functools.partial(_reads, value="disk_bytes_per_shown_byte"),
    ),
    "save_stall_ratio": ("ratio", Target("<=", 1.2), _save_stall),
    "steps_overhead_2x4": ("ratio", Target("<=", 1.15), _processes),
    "checkpoint_seconds_per_gb": (
        *("ratio", Target("<=", 2.0)),
        functools.partial(_checkpoint_speed, function="seconds_to_save"),
    ),
    "restore_seconds_per_gb": (
        *("ratio", Target("<=", 2.0)),
        functools.partial(_checkpoint_speed, function="seconds_to_restore"),
    ),
    "soak_growth": ("% per hour", Target("<=", 1.0), _soak),
}


def main(arguments: list[str]) -> None:
    """Runs the command."""
    parser = measure.command_parser("scale", __doc__, rows=_ROWS, repeats=True)
    parser.add_argument(
        "--data", type=local_path, default="data/benchmark", help="benchmark data, made if absent"
    )
    parser.add_argument(
        "--demo",
        type=local_path,
        default="data/foley/records",
        help="records of `avcl-data demo`, for soak_growth (%(default)s)",
    )
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="duration of soak_growth (%(default)g)"
    )
    parser.add_argument("--small", action="store_true", help="smoke test without a usable value")
    # That takes an hour, and is measured when it is named.
    parser.set_defaults(rows=[name for name in _ROWS if name != "soak_growth"])
    args = parser.parse_args(arguments)
    measure.measure_rows(_ROWS, args.rows, args, args.json)


if __name__ == "__main__":
    measure.run_command(main)
