"""What all benchmarks share: fair timing, the machine they ran on, and one way to report.

A figure is a median of at least five. What is compared is measured alternately (A B A B ...), so
that a neighbour's load on the machine meets both alike, and every single measurement runs in a
fresh process of its own: no caches, heaps or thread pools are inherited from the other side.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from avcl_jax.errors import UserError, one_line
from avcl_jax.paths import local_path

REPEATS = 5
_ROOT = Path(__file__).resolve().parents[1]
_LIBRARIES = (
    *("numpy", "jax", "grain", "simplejpeg", "av", "opencv-python-headless", "librosa"),
    *("torch", "tensorflow", "libtpu"),
)


_Subject = TypeVar("_Subject")
_USER_ERROR = 64  # exit status of a child that ended in a user error


class SkipError(Exception):
    """A row cannot be measured here; the message says why and what to do."""


class ChildError(RuntimeError):
    """A measurement's process failed; the message holds the end of what it printed."""


@dataclasses.dataclass(frozen=True)
class Target:
    """What a row is held to.

    Attributes:
        sign: ">=" or "<=".
        value: the bound.
    """

    sign: str
    value: float

    def met(self, value: float) -> bool:
        """Whether `value` is on the right side of the bound."""
        return value >= self.value if self.sign == ">=" else value <= self.value

    def __str__(self) -> str:
        return f"{self.sign} {self.value:g}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        name: of the row.
        value: None where it was skipped.
        unit: of the value.
        target: None where the figure is only reported.
        detail: what it was computed from; "skipped" holds the reason of a missing value.
    """

    name: str
    value: float | None
    unit: str
    target: Target | None
    detail: Mapping[str, Any]

    def as_json(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """The row as it is written, with the machine it was measured on."""
        return {
            "name": self.name,
            "value": self.value,
            "unit": self.unit,
            "target": str(self.target) if self.target else "report",
            "machine": dict(about),
            "detail": dict(self.detail),
        }

    @property
    def verdict(self) -> str:
        """One word for the table."""
        if self.value is None:
            return "SKIPPED"
        if self.target is None:
            return ""
        return "met" if self.target.met(self.value) else "MISSED"


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def gpu_name() -> str:
    """Names of the GPUs that nvidia-smi lists; "none" without any."""
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "none"
    return ", ".join(listed.stdout.split("\n")).strip(", ")


def version(library: str) -> str | None:
    """Version of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """Describes where a figure was measured: processor, cores, GPU, Python, libraries."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": gpu_name(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "python": platform.python_version(),
        "libraries": {name: found for name in _LIBRARIES if (found := version(name))},
    }


def need(package: str) -> None:
    """Raises SkipError where a package that only a baseline needs is not installed."""
    if importlib.util.find_spec(package) is None:
        raise SkipError(f"{package} is not installed: pip install -r benchmarks/requirements.txt")


def run_child(
    target: str,
    arguments: Mapping[str, Any],
    *,
    cores: Sequence[int] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Any:
    """Calls a function in a fresh process.

    Args:
        target: "package.module:function"; it returns what JSON can hold.
        arguments: keyword arguments, of what JSON can hold.
        cores: processors the process and its children may use; None for all.
        environment: variables to set besides those of this process.

    Returns:
        What the function returned.

    Raises:
        ChildError: if it failed.
        UserError: if it ended in one, or in a system error of a file.
    """
    command = [sys.executable, "-m", "benchmarks.measure", target, json.dumps(arguments)]
    allowed = os.sched_getaffinity(0) if cores is None else set(cores)
    with subprocess.Popen(
        command,
        cwd=_ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {}), "BENCHMARK_START": repr(time.time())},
        preexec_fn=lambda: os.sched_setaffinity(0, allowed),
        start_new_session=True,
    ) as process:
        output, errors = process.communicate()
        # Endless pipelines leave worker processes behind, which would burden what comes next.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if process.returncode == _USER_ERROR:
        raise UserError(errors.splitlines()[-1])
    if process.returncode:
        raise ChildError(f"{target} failed with status {process.returncode}:\n{errors[-3000:]}")
    return json.loads(output.splitlines()[-1])


def seconds_since_start() -> float:
    """In a process of `run_child`: time since just before it was started."""
    return time.time() - float(os.environ["BENCHMARK_START"])


def peak_growth_bytes(run: Callable[[], object]) -> int:
    """By how much the largest resident memory during a call exceeds that before it."""
    Path("/proc/self/clear_refs").write_text("5")  # the largest is now the present one
    before = _peak_rss_bytes()
    run()
    return _peak_rss_bytes() - before


def _peak_rss_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no line VmHWM")


def interleave(
    measurements: Mapping[str, Callable[[], float]], *, repeats: int = REPEATS
) -> dict[str, list[float]]:
    """Takes every measurement `repeats` times, in turns; returns all values of each."""
    values: dict[str, list[float]] = {name: [] for name in measurements}
    for number in range(repeats):
        # The order turns too: whoever runs second may find a warmer machine.
        names = list(measurements)
        for name in names if number % 2 == 0 else names[::-1]:
            values[name].append(float(measurements[name]()))
    return values


def rate(batches: Iterator[Any], *, batch_size: int, warmup: int, count: int) -> float:
    """Samples per second of an endless iterator, after `warmup` batches."""
    for _ in range(warmup):
        next(batches)
    begin = time.perf_counter()
    for _ in range(count):
        next(batches)
    return count * batch_size / (time.perf_counter() - begin)


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median of `above` over median of `below`."""
    return statistics.median(above) / statistics.median(below)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median and all values, rounded, for a row's detail."""
    return {
        "median": float(f"{statistics.median(values):.4g}"),
        "all": [float(f"{value:.4g}") for value in values],
    }


def print_table(rows: Sequence[Row]) -> None:
    """Prints rows as a table, and why what was skipped was skipped."""
    print(f"{'row':<32}{'value':>12} {'unit':<14}{'interval':<18}{'target':<9}")
    for row in rows:
        value = "-" if row.value is None else f"{row.value:.4g}"
        target = str(row.target) if row.target else "report"
        interval = " to ".join(f"{bound:.3g}" for bound in row.detail.get("interval", ()))
        print(f"{row.name:<32}{value:>12} {row.unit:<14}{interval:<18}{target:<9}{row.verdict}")
        if row.value is None:
            print(f"    {row.detail['skipped']}")


def measure_row(
    name: str,
    unit: str,
    target: Target | None,
    measurement: Callable[[], tuple[float, Mapping[str, Any]]],
) -> Row:
    """Measures one row, or says why it cannot be measured here.

    Args:
        name: of the row.
        unit: of its value.
        target: what it is held to, if anything.
        measurement: returns value and detail; raises SkipError where it cannot.
    """
    print(f"measuring {name}", file=sys.stderr, flush=True)
    try:
        value, detail = measurement()
    except SkipError as reason:
        return Row(name, None, unit, target, {"skipped": str(reason)})
    return Row(name, value, unit, target, detail)


def measure_rows(
    table: Mapping[
        str, tuple[str, Target | None, Callable[[_Subject], tuple[float, Mapping[str, Any]]]]
    ],
    names: Sequence[str],
    subject: _Subject,
    path: Path,
) -> None:
    """Measures rows one after another, writes what there is after each, and prints the table.

    Args:
        table: of each row its unit, its target and what measures it on `subject`.
        names: of the rows to measure.
        subject: what all of them are given.
        path: where the rows are written.
    """
    rows = []
    for name in names:
        unit, target, measure = table[name]
        rows.append(measure_row(name, unit, target, functools.partial(measure, subject)))
        # After each row: a long run that is stopped keeps what it has.
        write_json(path, rows)
    print_table(rows)


def run_command(main: Callable[[list[str]], int], arguments: list[str] | None = None) -> NoReturn:
    """Runs the `main` of a benchmark and exits; an error that a user can fix is one line.

    Args:
        main: takes the arguments of the command, returns its exit status.
        arguments: those of the command line by default.
    """
    try:
        status = main(sys.argv[1:] if arguments is None else arguments)
    except (UserError, OSError, subprocess.CalledProcessError) as error:
        line = (
            f"{shlex.join(map(str, error.cmd))} ended with status {error.returncode}"
            if isinstance(error, subprocess.CalledProcessError)
            else one_line(error)
        )
        print(f"{main.__globals__['__spec__'].name}: error: {line}", file=sys.stderr)
        status = 1
    sys.exit(status)


def writable_path(text: str) -> Path:
    """Returns a path, whose directory is made, for argparse; checks that it can be written.

    Raises:
        argparse.ArgumentTypeError: if it cannot: rows would be lost after they are measured.
    """
    path = local_path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        path.open("a").close()
        if new:
            path.unlink()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{one_line(error)}: give another file") from error
    return path


def write_json(path: Path, rows: Sequence[Row]) -> None:
    """Writes rows, each with the machine it was measured on."""
    about = machine()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([row.as_json(about) for row in rows], indent=1) + "\n")


def _child(target: str, arguments: str) -> None:
    module, _, function = target.partition(":")
    try:
        result = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    except (UserError, OSError) as error:
        print(one_line(error), file=sys.stderr, flush=True)
        os._exit(_USER_ERROR)
    print(json.dumps(result), flush=True)
    # Endless pipelines have threads and processes that nobody waits for; some inherit the pipes,
    # which `run_child` reads until they are closed.
    for process in multiprocessing.active_children():
        process.kill()
    os._exit(0)


if __name__ == "__main__":
    _child(*sys.argv[1:])
