"""Common parts of all benchmarks: timing, child processes, the machine, and the report.

A value is the median of at least five measurements. Alternatives are measured in turns (A B A B
...), so that other programs on the machine slow them down alike, and each measurement runs in a
fresh process, so that neither side inherits caches, heaps or thread pools from the other.
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
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

from avcl_jax.command_line import ends_unread
from avcl_jax.errors import UserError, one_line
from avcl_jax.paths import local_path

_ROOT = Path(__file__).resolve().parents[1]
_LIBRARIES = (
    *("numpy", "jax", "grain", "simplejpeg", "av", "opencv-python-headless", "librosa"),
    *("torch", "tensorflow", "libtpu"),
)
_USER_ERROR = 64  # exit status of a child process that ended in a user error


class SkipError(Exception):
    """A row cannot be measured here; the message gives the reason and the fix."""


class ChildError(RuntimeError):
    """The process of a measurement failed; the message ends with its output."""


class Target(NamedTuple):
    """Bound of a value; the sign is ">=" or "<="."""

    sign: str
    value: float

    def met(self, value: float) -> bool:
        """Compares a value with the bound."""
        return value >= self.value if self.sign == ">=" else value <= self.value

    def __str__(self) -> str:
        return f"{self.sign} {self.value:g}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One measured value.

    Attributes:
        value: None if the measurement was skipped.
        target: None if the value is only reported.
        detail: values behind it; "skipped" is the reason for a missing value, "interval" has two
            bounds.
    """

    name: str
    value: float | None
    unit: str
    target: Target | None = None
    detail: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """One word for the table."""
        if self.value is None:
            return "SKIPPED"
        if self.target is None:
            return ""
        return "met" if self.target.met(self.value) else "MISSED"


# A value and the detail of its row.
Measured = tuple[float, dict[str, Any]]
_Name = TypeVar("_Name")
_Subject = TypeVar("_Subject")
# Row name -> unit, target, and a function that measures a subject.
RowTable = Mapping[str, tuple[str, Target | None, Callable[[_Subject], Measured]]]


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
    return ", ".join(listed.stdout.splitlines()) or "none"


def version(library: str) -> str | None:
    """Version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """Processor, cores, GPU, memory, Python and libraries of this machine."""
    cpu = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": cpu[0] if cpu else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": gpu_name(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "python": platform.python_version(),
        "libraries": {name: found for name in _LIBRARIES if (found := version(name))},
    }


def need(package: str) -> None:
    """Raises SkipError if a package that only a baseline needs is not installed."""
    if importlib.util.find_spec(package) is None:
        raise SkipError(f"{package} is not installed: pip install -r benchmarks/requirements.txt")


def run_child(
    target: str,
    arguments: Mapping[str, Any],
    *,
    cores: Sequence[int] | None = None,
    environment: Mapping[str, str] | None = None,
    limit_s: float | None = None,
) -> Any:
    """Calls a function in a fresh process and returns its result.

    Args:
        target: "package.module:function" with a JSON-serialisable result.
        arguments: JSON-serialisable keyword arguments.
        cores: processors available to the process and its children; None for all.
        environment: additional environment variables.
        limit_s: seconds after which the process is ended; None for no limit.

    Raises:
        ChildError: if the function failed, or took longer than its limit.
        UserError: if it raised one, or a system error of a file.
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
        try:
            output, errors = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired as error:
            raise ChildError(f"{target} took longer than {limit_s:.0f} s") from error
        finally:
            # Endless pipelines leave worker processes behind, which would slow the next
            # measurement.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode == _USER_ERROR:
        raise UserError(errors.splitlines()[-1])
    if process.returncode:
        raise ChildError(f"{target} failed with status {process.returncode}:\n{errors[-3000:]}")
    return json.loads(output.splitlines()[-1])


def seconds_since_start() -> float:
    """Seconds since just before `run_child` started this process."""
    return time.time() - float(os.environ["BENCHMARK_START"])


def peak_bytes(process: int | str = "self") -> int:
    """Peak resident memory of a process."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/{process}/status has no line VmHWM")


def peak_growth_bytes(call: Callable[[], object]) -> int:
    """Peak resident memory during a call minus the resident memory before it."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present value
    before = peak_bytes()
    call()
    return peak_bytes() - before


def seconds_of(call: Callable[[], object]) -> float:
    """Wall-clock seconds of a call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def seconds_of_each(call: Callable[[], object], count: int, *, warmup: int = 1) -> list[float]:
    """Wall-clock seconds of each of `count` calls, after `warmup` calls."""
    return [seconds_of(call) for _ in range(warmup + count)][warmup:]


def interleave(
    measurements: Mapping[_Name, Callable[[], float]], *, repeats: int
) -> dict[_Name, list[float]]:
    """Repeats all measurements in turns and returns the values of each."""
    values: dict[_Name, list[float]] = {name: [] for name in measurements}
    for number in range(repeats):
        # The order alternates too, because the second side may find a warmer machine.
        names = list(measurements)
        for name in names if number % 2 == 0 else names[::-1]:
            values[name].append(float(measurements[name]()))
    return values


def seconds_in_turns(
    calls: Mapping[str, Callable[[], object]], *, repeats: int
) -> dict[str, list[float]]:
    """Wall-clock seconds of calls that are repeated in turns in this process."""
    timed = {name: functools.partial(seconds_of, call) for name, call in calls.items()}
    return interleave(timed, repeats=repeats)


def rate(batches: Iterator[Any], *, batch_size: int, warmup: int, count: int) -> float:
    """Samples per second of an endless iterator, after `warmup` batches."""
    for _ in range(warmup):
        next(batches)
    begin = time.perf_counter()
    for _ in range(count):
        next(batches)
    return count * batch_size / (time.perf_counter() - begin)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median and all values with four digits, for the detail of a row."""
    return {
        "median": float(f"{statistics.median(values):.4g}"),
        "all": [float(f"{value:.4g}") for value in values],
    }


def ratio(
    values: Mapping[str, Sequence[float]], above: str, below: str, *, quantity: str
) -> Measured:
    """Ratio of two medians, and the spread of all values as QUANTITY_NAME."""
    detail = {f"{quantity}_{name}": spread(each) for name, each in values.items()}
    return statistics.median(values[above]) / statistics.median(values[below]), detail


def report(path: Path, rows: Sequence[Row]) -> None:
    """Writes rows to a JSON file and prints them as a table."""
    write_json(path, rows)
    print(f"{'row':<32}{'value':>12} {'unit':<14}{'interval':<18}{'target':<9}")
    for row in rows:
        value = "-" if row.value is None else f"{row.value:.4g}"
        target = str(row.target or "report")
        interval = " to ".join(f"{bound:.3g}" for bound in row.detail.get("interval", ()))
        print(f"{row.name:<32}{value:>12} {row.unit:<14}{interval:<18}{target:<9}{row.verdict}")
        if row.value is None:
            print(f"    {row.detail['skipped']}")


def write_json(path: Path, rows: Sequence[Row]) -> None:
    """Writes rows, each with the machine it was measured on."""
    about = machine()
    written = [
        {**vars(row), "target": str(row.target or "report"), "machine": about} for row in rows
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(written, indent=1) + "\n")


def measure_rows(
    table: RowTable[_Subject], names: Sequence[str], subject: _Subject, path: Path
) -> None:
    """Measures the named rows of a table on a subject and reports them."""
    rows: list[Row] = []
    for name in names:
        unit, target, measurement = table[name]
        print(f"measuring {name}", file=sys.stderr, flush=True)
        try:
            value, detail = measurement(subject)
            rows.append(Row(name, value, unit, target, detail))
        except SkipError as reason:
            rows.append(Row(name, None, unit, target, {"skipped": str(reason)}))
        write_json(path, rows)  # after each row, so that an interrupted run keeps its rows
    report(path, rows)


def command_parser(
    name: str,
    doc: str | None,
    *,
    rows: RowTable[Any] | None = None,
    repeats: bool = False,
    json: bool = True,
) -> argparse.ArgumentParser:
    """Parser of `python -m benchmarks.NAME` with --json, and on request --rows and --repeats."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=(doc or "").partition("\n")[0]
    )
    if json:
        parser.add_argument("--json", type=_writable_path, required=True, help="output file")
    if rows:
        text = f"some of {', '.join(rows)}"
        parser.add_argument(
            "--rows", nargs="+", choices=rows, default=list(rows), metavar="NAME", help=text
        )
    if repeats:
        parser.add_argument(
            "--repeats", type=int, default=5, help="repeats of each measurement (%(default)s)"
        )
    return parser


def parse_with_overrides(
    parser: argparse.ArgumentParser, words: list[str]
) -> tuple[argparse.Namespace, list[str]]:
    """Parses a command line and returns --config.NAME=VALUE apart."""
    args, options = parser.parse_known_args(words)
    if unknown := [option for option in options if not re.match(r"--config\.[\w.]+=", option)]:
        parser.error(f"unknown arguments {' '.join(unknown)}: overrides are --config.KEY=VALUE")
    return args, options


@ends_unread()
def run_command(main: Callable[[list[str]], None], arguments: list[str] | None = None) -> NoReturn:
    """Runs the `main` of a benchmark and exits; user errors are printed as one line.

    Args:
        arguments: words of the command line; those of this process by default.
    """
    try:
        main(sys.argv[1:] if arguments is None else arguments)
    except (UserError, OSError, subprocess.CalledProcessError) as error:
        line = (
            f"{shlex.join(map(str, error.cmd))} ended with status {error.returncode}"
            if isinstance(error, subprocess.CalledProcessError)
            else one_line(error)
        )
        print(f"{main.__globals__['__spec__'].name}: error: {line}", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)


def _writable_path(text: str) -> Path:
    """Makes the directory of an output file and checks that the file can be written.

    Raises:
        argparse.ArgumentTypeError: if not, because rows would be lost after they are measured.
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


def _child(target: str, arguments: str) -> None:
    module, _, function = target.partition(":")
    try:
        result = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    except (UserError, OSError) as error:
        print(one_line(error), file=sys.stderr, flush=True)
        os._exit(_USER_ERROR)
    print(json.dumps(result), flush=True)
    # Threads and processes of endless pipelines are not waited for, but some inherit the pipes,
    # which `run_child` reads until they are closed.
    for process in multiprocessing.active_children():
        process.kill()
    os._exit(0)


if __name__ == "__main__":
    _child(*sys.argv[1:])
