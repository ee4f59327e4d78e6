"""Speed of preparation and of the input pipeline: `python -m benchmarks.input_pipeline --json F`.

docs/data/pipeline_speed.md describes the rows. All sides of a comparison do the same work
(benchmarks/rendering.py) on the same videos (benchmarks/footage.py), in turns and in fresh
processes. A row that cannot be measured on this machine is listed as skipped, with the reason.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from avcl_jax.paths import local_path
from benchmarks import footage, measure
from benchmarks.measure import Measured, RowTable, SkipError, Target

_MILLION = 1_000_000
_Values = dict[str, list[float]]  # measurements by side
# There are few distinct videos; many links to them are shuffled like a large data set.
_LINKED = 1024


def _child(module: str, function: str, *, cores: list[int] | None = None, **arguments: Any) -> Any:
    return measure.run_child(f"benchmarks.{module}:{function}", arguments, cores=cores)


class _Subject:
    """Data and settings that the rows share."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.cores = sorted(os.sched_getaffinity(0))
        self.best_setting = functools.cache(self._best_setting)

    def videos(self) -> str:
        """Folder of videos."""
        return str(footage.make_footage(self.args.data)[0])

    def records(self) -> Path:
        """Records of the videos, one each."""
        return footage.make_footage(self.args.data)[1]

    def linked(self) -> str:
        """The same records many times."""
        out = self.args.data / f"linked_{_LINKED}"
        return str(footage.link_records(self.records(), out, count=_LINKED))

    def pipeline_rate(self, cores: int, setting: tuple[int, int]) -> float:
        """Samples per second of the pipeline on some cores, by worker processes and threads."""
        workers, threads = setting
        return _child(
            "rendering",
            "pipeline_rate",
            cores=self.cores[:cores],
            directory=self.linked(),
            workers=workers,
            threads=threads,
            count=self.args.batches,
        )

    def pipeline(self, cores: int | None = None) -> Callable[[], float]:
        """Measurement of the pipeline at its best setting, on all cores by default."""
        cores = cores or len(self.cores)
        return functools.partial(self.pipeline_rate, cores, self.best_setting(cores))

    def _best_setting(self, cores: int) -> tuple[int, int]:
        """Fastest worker processes and threads on some cores, of --setting or of some tried."""
        if self.args.setting is not None:
            return self.args.setting
        settings = {(0, 1), (0, cores), (0, cores + 1), (cores, 1), (cores, 2)}
        sides = {
            setting: functools.partial(self.pipeline_rate, cores, setting)
            for setting in sorted(settings)
        }
        rates = measure.interleave(sides, repeats=3)
        medians = {setting: statistics.median(values) for setting, values in rates.items()}
        print(f"(workers, threads) on {cores} cores: {medians}", file=sys.stderr)
        return max(medians, key=medians.__getitem__)

    def compare(self, **sides: Callable[[], float]) -> Measured:
        """Ratio of the rates `above` and `below`, and the spread of all sides."""
        values = measure.interleave(sides, repeats=self.args.repeats)
        return measure.ratio(values, "above", "below", quantity="samples_per_second")


def _over_decode_bound(subject: _Subject) -> Measured:
    directory, repeats, core = subject.linked(), subject.args.repeats, subject.cores[:1]
    decoders = _child(
        "decoders", "compare", cores=core, directory=directory, samples=32, repeats=repeats
    )
    parts = _child("rendering", "parts", cores=core, directory=directory, repeats=repeats)
    same = [name for name, decoder in decoders.items() if decoder.get("same_pixels")]
    fastest = min(same, key=lambda name: decoders[name]["microseconds"])
    value, detail = subject.compare(
        above=subject.pipeline(),
        below=lambda: _child(
            "decoders", "decode_rate", directory=directory, samples=512, decoder=fastest
        ),
    )
    return value, detail | {
        "setting": subject.best_setting(len(subject.cores)),
        "decoders": decoders,
        "fastest": fastest,
        "milliseconds_of_parts": parts,
    }


def _over_pyav(subject: _Subject) -> Measured:
    measure.need("torch")
    folder = subject.videos()
    value, detail = subject.compare(
        above=subject.pipeline(),
        below=lambda: _child(
            "baselines.pyav_dataloader", "samples_per_second", folder=folder, count=4
        ),
    )
    return value, detail | {"setting": subject.best_setting(len(subject.cores))}


def _over_dmvr(subject: _Subject) -> Measured:
    measure.need("tensorflow")
    module = "baselines.dmvr_tfdata"
    folder = str(subject.args.data / "sequence_examples")
    records = str(subject.records())
    _child(module, "write_sequence_examples", directory=records, out=folder, shards=4)
    value, detail = subject.compare(
        above=subject.pipeline(),
        below=lambda: _child(
            module, "samples_per_second", folder=folder, count=subject.args.batches
        ),
    )
    return value, detail | {"setting": subject.best_setting(len(subject.cores))}


def _log_mel(subject: _Subject) -> Measured:
    core = subject.cores[:1]
    result = _child("rendering", "compare_log_mel", cores=core, repeats=subject.args.repeats)
    return result.pop("speedup"), result


def _preparation_sides(subject: _Subject, **sides: tuple[str, dict[str, bool]]) -> _Values:
    """Hours of video per core-hour of some functions of benchmarks/preparation.py."""
    folder, core = subject.videos(), subject.cores[:1]
    calls = {
        name: functools.partial(
            _child, "preparation", function, cores=core, folder=folder, **arguments
        )
        for name, (function, arguments) in sides.items()
    }
    return measure.interleave(calls, repeats=subject.args.repeats)


def _preparation(subject: _Subject) -> Measured:
    values = _preparation_sides(
        subject, prepare=("hours_prepared", {}), bound=("hours_decoded_and_encoded", {})
    )
    return measure.ratio(values, "prepare", "bound", quantity="hours_per_core_hour")


def _prepared_hours(subject: _Subject) -> Measured:
    values = _preparation_sides(
        subject,
        prepare=("hours_prepared", {}),
        bare_rgb=("hours_decoded_and_encoded", {}),
        bare_planes=("hours_decoded_and_encoded", {"planes": True}),
    )
    gain, detail = measure.ratio(values, "bare_planes", "bare_rgb", quantity="hours_per_core_hour")
    return statistics.median(values["prepare"]), detail | {"planes_over_rgb": gain}


def _peak_memory(subject: _Subject) -> Measured:
    directory = footage.link_records(
        subject.records(), subject.args.data / "million", count=_MILLION
    )
    cores = len(subject.cores)
    results = {
        name: _child(
            "memory",
            "peak_gigabytes",
            directory=str(directory),
            workers=workers,
            threads=threads,
            count=20,
        )
        for name, workers, threads in (("processes", cores, 1), ("threads", 0, cores))
    }
    return max(result["total"] for result in results.values()), results


def _index(quantity: str, subject: _Subject) -> Measured:
    out = subject.args.data / "million_index"
    directory = footage.link_records(subject.records(), out, count=_MILLION, real_checksums=False)
    results = [
        _child("memory", "open_index", directory=str(directory))
        for _ in range(subject.args.repeats)
    ]
    values = [result[quantity] for result in results]
    return statistics.median(values), {
        quantity: measure.spread(values),
        "records": results[0]["records"],
    }


def _first_batch(subject: _Subject) -> Measured:
    demo = subject.args.demo
    if not (demo / "dataset_info.json").exists():
        raise SkipError(f"no demo data in {demo}: avcl-data demo --out data/foley, or --demo")
    results = [
        _child("memory", "first_batch", directory=str(demo))
        for _ in range(1 + subject.args.repeats)
    ][1:]  # the first makes the index if there is none
    stages = {stage: [result[stage] for result in results] for stage in results[0]}
    detail = {"seconds_until": {stage: measure.spread(values) for stage, values in stages.items()}}
    return statistics.median(stages["first_batch"]), detail


def _scaling(subject: _Subject) -> Measured:
    if len(subject.cores) < 2:
        raise SkipError("this machine has one core")
    value, detail = subject.compare(above=subject.pipeline(2), below=subject.pipeline(1))
    return value, detail | {
        "setting_of_two": subject.best_setting(2),
        "setting_of_one": subject.best_setting(1),
    }


def _bytes_per_hour(subject: _Subject) -> Measured:
    result = _child(
        "preparation", "sizes", folder=subject.videos(), directory=str(subject.records())
    )
    return result["records"], result


_ROWS: RowTable[_Subject] = {
    "pipeline_over_decode_bound": ("ratio", Target(">=", 0.6), _over_decode_bound),
    "pipeline_over_pyav_dataloader": ("ratio", Target(">=", 10), _over_pyav),
    "pipeline_over_dmvr": ("ratio", Target(">=", 1.2), _over_dmvr),
    "logmel_speedup_over_librosa": ("ratio", Target(">=", 4), _log_mel),
    "prep_over_ffmpeg_bound": ("ratio", Target(">=", 0.7), _preparation),
    "prepare_hours_per_core": ("hours", None, _prepared_hours),
    "pipeline_rss_gb": ("GB", Target("<=", 2), _peak_memory),
    "index_1m_load_seconds": ("s", Target("<=", 2), functools.partial(_index, "seconds")),
    "index_1m_mb": ("MB", Target("<=", 50), functools.partial(_index, "megabytes")),
    "first_batch_seconds": ("s", Target("<=", 5), _first_batch),
    "scaling_1_to_2_cores": ("ratio", Target(">=", 1.8), _scaling),
    "bytes_per_hour_of_video": ("bytes", None, _bytes_per_hour),
}


def _setting(text: str) -> tuple[int, int]:
    workers, threads = text.split(",")
    return int(workers), int(threads)


def main(arguments: list[str]) -> None:
    """Runs the command."""
    parser = measure.command_parser("input_pipeline", __doc__, rows=_ROWS, repeats=True)
    parser.add_argument(
        "--data", type=local_path, default="data/benchmark", help="benchmark data, made if absent"
    )
    parser.add_argument(
        "--demo", type=local_path, default="data/foley/records", help="records of the demo"
    )
    parser.add_argument(
        "--setting",
        type=_setting,
        metavar="WORKERS,THREADS",
        help="setting of the pipeline (default: the fastest of some)",
    )
    parser.add_argument("--batches", type=int, default=32, help="batches per measurement")
    args = parser.parse_args(arguments)
    measure.measure_rows(_ROWS, args.rows, _Subject(args), args.json)


if __name__ == "__main__":
    measure.run_command(main)
