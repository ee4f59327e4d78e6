"""How long the demo takes from its command to its first step, compiled before and not.

    python -m data_prep demo --out data/foley
    python -m benchmarks.startup --json startup.json

Every start is a run of `avcl_jax.main` of its own, in a new directory; it is stopped when it tells
of its first step.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from avcl_jax.paths import local_path
from benchmarks.measure import (
    REPEATS,
    Row,
    Target,
    print_table,
    run_command,
    spread,
    writable_path,
    write_json,
)

_ROOT = Path(__file__).resolve().parents[1]


def seconds_to_first_step(records: Path, cache: Path) -> float:
    """Seconds from the command of the demo to the line of its first step.

    Args:
        records: prepared data set.
        cache: compilation cache, empty or of an earlier start.

    Raises:
        RuntimeError: if it ends before, with what it printed.
    """
    # Ours, not one that the machine has: it would be warm before the first start.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION")}
    with tempfile.TemporaryDirectory() as workdir:
        begin = time.perf_counter()
        with subprocess.Popen(
            [
                sys.executable,
                *("-m", "avcl_jax.main", "--config=configs/pretrain.py"),
                f"--workdir={workdir}/run",
                f"--config.data.directory={records}",
                f"--config.execution.compilation_cache={cache}",
                "--config.execution.log_every=1",
            ],
            cwd=_ROOT,
            env=environment | {"PYTHONUNBUFFERED": "1"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as process:
            assert process.stdout is not None
            printed = []
            for line in process.stdout:
                if line.startswith("step 1/"):
                    seconds = time.perf_counter() - begin
                    process.kill()
                    return seconds
                printed.append(line)
    raise RuntimeError(f"the demo ended before its first step:\n{''.join(printed[-20:])}")


def startup_row(records: Path, *, repeats: int) -> Row:
    """Measures `startup_seconds_cached`, the median over starts after the first one."""
    with tempfile.TemporaryDirectory() as directory:
        cache = Path(directory)
        cold = seconds_to_first_step(records, cache)
        warm = [seconds_to_first_step(records, cache) for _ in range(repeats)]
        entries = [path.stat().st_size for path in cache.iterdir() if path.name.endswith("-cache")]
    detail = {
        "first_start_seconds": round(cold, 2),
        "seconds": spread(warm),
        "cache_entries": len(entries),
        "cache_megabytes": round(sum(entries) / 1e6, 2),
    }
    return Row("startup_seconds_cached", statistics.median(warm), "s", Target("<=", 15), detail)


def main(arguments: list[str]) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.startup", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", type=writable_path, required=True, help="where to write the row")
    parser.add_argument("--demo", type=local_path, default="data/foley/records")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="starts after the first one")
    args = parser.parse_args(arguments)
    if not (args.demo / "dataset_info.json").exists():
        parser.error(f"{args.demo} does not exist: python -m data_prep demo --out data/foley")
    rows = [startup_row(args.demo, repeats=args.repeats)]
    write_json(args.json, rows)
    print_table(rows)
    print(rows[0].detail)
    return 0


if __name__ == "__main__":
    run_command(main)
