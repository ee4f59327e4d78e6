"""How fast preparation and the input pipeline are: `python -m benchmarks.input_pipeline --json F`.

Every row is described in docs/data/pipeline_speed.md. What is compared does the same work
(benchmarks/rendering.py) on the same films (benchmarks/footage.py), measured in turns in fresh
processes. A row that cannot be measured here is listed as skipped, with the reason.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from avcl_jax.paths import local_path
from benchmarks import footage
from benchmarks.measure import (
    SkipError,
    Target,
    interleave,
    measure_rows,
    median_ratio,
    need,
    run_child,
    run_command,
    spread,
    writable_path,
)

_MILLION = 1_000_000
# Distinct clips are few; with many links to them the order is shuffled as of a large data set.
_LINKED = 1024


class Setup(NamedTuple):
    """What the rows are measured on.

    Attributes:
        root: folder of the benchmarks' data.
        demo: records of the demo.
        setting: worker processes and threads of the pipeline; None to try.
        batches: of one measurement of the pipeline.
        repeats: of every measurement.
    """

    root: Path
    demo: Path
    setting: tuple[int, int] | None
    batches: int
    repeats: int

    def films(self) -> Path:
        """The folder of films."""
        return footage.make_footage(self.root)[0]

    def records(self) -> Path:
        """Records of the films, one each."""
        return footage.make_footage(self.root)[1]

    def linked(self) -> Path:
        """The same records many times."""
        out = self.root / f"linked_{_LINKED}"
        return footage.link_records(self.records(), out, count=_LINKED)

    def pipeline(self, *, cores: list[int] | None = None) -> Callable[[], float]:
        """A measurement of the pipeline at the best setting."""
        workers, threads = self.best_setting(len(cores) if cores else _cores())
        return self._pipeline(workers, threads, cores)

    def _pipeline(self, workers: int, threads: int, cores: list[int] | None) -> Callable[[], float]:
        arguments = {
            "directory": str(self.linked()),
            "workers": workers,
            "threads": threads,
            "count": self.batches,
        }
        return lambda: run_child("benchmarks.rendering:pipeline_rate", arguments, cores=cores)

    def best_setting(self, cores: int) -> tuple[int, int]:
        """Worker processes and threads that are fastest on so many cores."""
        if self.setting is not None:
            return self.setting
        if cores not in _best:
            tried = {(0, 1), (0, cores), (0, cores + 1), (cores, 1), (cores, 2)}
            some = sorted(os.sched_getaffinity(0))[:cores]
            rates = interleave(
                {
                    f"{workers},{threads}": self._pipeline(workers, threads, some)
                    for workers, threads in sorted(tried)
                },
                repeats=3,
            )
            medians = {name: statistics.median(values) for name, values in rates.items()}
            print(f"(workers,threads) on {cores} cores: {medians}", file=sys.stderr)
            workers, threads = max(medians, key=lambda name: medians[name]).split(",")
            _best[cores] = int(workers), int(threads)
        return _best[cores]


_best: dict[int, tuple[int, int]] = {}


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _compare(
    setup: Setup, above: Callable[[], float], below: Callable[[], float], **detail: Any
) -> tuple[float, dict[str, Any]]:
    values = interleave({"above": above, "below": below}, repeats=setup.repeats)
    figures = {f"samples_per_second_{name}": spread(values[name]) for name in values}
    return median_ratio(values["above"], values["below"]), {**figures, **detail}


def _over_decode_bound(setup: Setup) -> tuple[float, dict[str, Any]]:
    compared = run_child(
        "benchmarks.decoders:compare",
        {"directory": str(setup.linked()), "samples": 32, "repeats": setup.repeats},
        cores=sorted(os.sched_getaffinity(0))[:1],
    )
    parts = run_child(
        "benchmarks.rendering:parts",
        {"directory": str(setup.linked()), "repeats": setup.repeats},
        cores=sorted(os.sched_getaffinity(0))[:1],
    )
    times = {
        name: found["microseconds"] for name, found in compared.items() if found.get("same_pixels")
    }
    fastest = min(times, key=lambda name: times[name])
    arguments = {"directory": str(setup.linked()), "samples": 512, "decoder": fastest}
    return _compare(
        setup,
        setup.pipeline(),
        lambda: run_child("benchmarks.decoders:decode_rate", arguments),
        setting=setup.best_setting(_cores()),
        decoders=compared,
        fastest=fastest,
        milliseconds_of_parts=parts,
    )


def _over_pyav(setup: Setup) -> tuple[float, dict[str, Any]]:
    need("torch")
    arguments = {"folder": str(setup.films()), "count": 4}
    target = "benchmarks.baselines.pyav_dataloader:samples_per_second"
    return _compare(
        setup,
        setup.pipeline(),
        lambda: run_child(target, arguments),
        setting=setup.best_setting(_cores()),
    )


def _over_dmvr(setup: Setup) -> tuple[float, dict[str, Any]]:
    need("tensorflow")
    module = "benchmarks.baselines.dmvr_tfdata"
    folder = str(setup.root / "sequence_examples")
    run_child(
        f"{module}:write_sequence_examples",
        {"directory": str(setup.records()), "out": folder, "shards": 4},
    )

    def baseline(fused_crop: bool) -> Callable[[], float]:
        arguments = {"folder": folder, "count": setup.batches, "fused_crop": fused_crop}
        return lambda: run_child(f"{module}:samples_per_second", arguments)

    values = interleave(
        {"above": setup.pipeline(), "below": baseline(False), "fused": baseline(True)},
        repeats=setup.repeats,
    )
    return median_ratio(values["above"], values["below"]), {
        "samples_per_second_above": spread(values["above"]),
        "samples_per_second_below": spread(values["below"]),
        # Not DMVR's: TensorFlow can decode the cropped part of a JPEG alone.
        "samples_per_second_decode_and_crop_jpeg": spread(values["fused"]),
        "setting": setup.best_setting(_cores()),
    }


def _logmel(setup: Setup) -> tuple[float, dict[str, Any]]:
    core = sorted(os.sched_getaffinity(0))[:1]
    found = run_child("benchmarks.log_mel:compare", {"repeats": setup.repeats}, cores=core)
    return found.pop("speedup"), found


def _prep(setup: Setup) -> tuple[float, dict[str, Any]]:
    core = sorted(os.sched_getaffinity(0))[:1]
    films = str(setup.films())

    def measure(function: str) -> Callable[[], float]:
        target = f"benchmarks.preparation:{function}"
        return lambda: run_child(target, {"folder": films}, cores=core)

    values = interleave(
        {"prepare": measure("hours_prepared"), "bound": measure("hours_decoded_and_encoded")},
        repeats=setup.repeats,
    )
    return median_ratio(values["prepare"], values["bound"]), {
        f"hours_per_core_hour_{name}": spread(values[name]) for name in values
    }


def _rss(setup: Setup) -> tuple[float, dict[str, Any]]:
    directory = footage.link_records(setup.records(), setup.root / "million", count=_MILLION)
    settings = {"processes": (_cores(), 1), "threads": (0, _cores())}
    found = {
        name: run_child(
            "benchmarks.memory:peak_gigabytes",
            {"directory": str(directory), "workers": workers, "threads": threads, "count": 20},
        )
        for name, (workers, threads) in settings.items()
    }
    return max(result["total"] for result in found.values()), found


def _index(setup: Setup, figure: str) -> tuple[float, dict[str, Any]]:
    directory = footage.link_records(
        setup.records(), setup.root / "million_index", count=_MILLION, real_checksums=False
    )
    found = [
        run_child("benchmarks.memory:open_index", {"directory": str(directory)})
        for _ in range(setup.repeats)
    ]
    values = [result[figure] for result in found]
    return statistics.median(values), {figure: spread(values), "records": found[0]["records"]}


def _first_batch(setup: Setup) -> tuple[float, dict[str, Any]]:
    if not (setup.demo / "dataset_info.json").exists():
        raise SkipError(
            f"no demo data in {setup.demo}: python -m data_prep demo --out data/foley, or --demo"
        )
    arguments = {"directory": str(setup.demo)}
    run_child("benchmarks.memory:first_batch", arguments)  # makes the index if it is not there
    found = [run_child("benchmarks.memory:first_batch", arguments) for _ in range(setup.repeats)]
    phases = {phase: spread([result[phase] for result in found]) for phase in found[0]}
    return statistics.median([result["first_batch"] for result in found]), {"seconds_until": phases}


def _scaling(setup: Setup) -> tuple[float, dict[str, Any]]:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SkipError("this machine has one core")
    return _compare(
        setup,
        setup.pipeline(cores=cores[:2]),
        setup.pipeline(cores=cores[:1]),
        setting_of_two=setup.best_setting(2),
        setting_of_one=setup.best_setting(1),
    )


def _bytes_per_hour(setup: Setup) -> tuple[float, dict[str, Any]]:
    found = run_child(
        "benchmarks.preparation:sizes",
        {"folder": str(setup.films()), "directory": str(setup.records())},
    )
    return found["records"], found


_ROWS: dict[str, tuple[str, Target | None, Callable[[Setup], tuple[float, dict[str, Any]]]]] = {
    "pipeline_over_decode_bound": ("ratio", Target(">=", 0.6), _over_decode_bound),
    "pipeline_over_pyav_dataloader": ("ratio", Target(">=", 10), _over_pyav),
    "pipeline_over_dmvr": ("ratio", Target(">=", 1.2), _over_dmvr),
    "logmel_speedup_over_librosa": ("ratio", Target(">=", 4), _logmel),
    "prep_over_ffmpeg_bound": ("ratio", Target(">=", 0.7), _prep),
    "pipeline_rss_gb": ("GB", Target("<=", 2), _rss),
    "index_1m_load_seconds": ("s", Target("<=", 2), lambda s: _index(s, "seconds")),
    "index_1m_mb": ("MB", Target("<=", 50), lambda s: _index(s, "megabytes")),
    "first_batch_seconds": ("s", Target("<=", 5), _first_batch),
    "scaling_1_to_2_cores": ("ratio", Target(">=", 1.8), _scaling),
    "bytes_per_hour_of_video": ("bytes", None, _bytes_per_hour),
}


def _setting(text: str) -> tuple[int, int]:
    workers, threads = text.split(",")
    return int(workers), int(threads)


def main(arguments: list[str]) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.input_pipeline", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", type=writable_path, required=True, help="where to write the rows")
    parser.add_argument("--rows", nargs="+", choices=_ROWS, default=list(_ROWS), metavar="NAME")
    parser.add_argument("--data", type=local_path, default="data/benchmark", help="made if absent")
    parser.add_argument("--demo", type=local_path, default="data/foley/records")
    parser.add_argument(
        "--setting", type=_setting, metavar="WORKERS,THREADS", help="of the pipeline (best of some)"
    )
    parser.add_argument("--batches", type=int, default=32, help="of one measurement")
    parser.add_argument("--repeats", type=int, default=5, help="of every measurement")
    args = parser.parse_args(arguments)
    if args.repeats < 5:
        print("note: fewer than 5 repeats: good for trying, not for publishing", file=sys.stderr)
    setup = Setup(args.data, args.demo, args.setting, args.batches, args.repeats)
    measure_rows(_ROWS, args.rows, setup, args.json)
    return 0


if __name__ == "__main__":
    run_command(main)
