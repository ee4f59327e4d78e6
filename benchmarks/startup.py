"""Time from the demo's command to its first step, with and without compiled functions in the cache.

    avcl-data demo --out data/foley
    python -m benchmarks.startup --json startup.json

Each start runs `avcl_jax.main` in a new directory and is stopped after its first step.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from avcl_jax.paths import local_path
from benchmarks import measure
from benchmarks.measure import Row, Target

_ROOT = Path(__file__).resolve().parents[1]


def seconds_to_first_step(records: Path, cache: Path) -> float:
    """Seconds from the command of the demo to the line of its first step.

    Args:
        records: prepared data set.
        cache: compilation cache, empty or filled by an earlier start.

    Raises:
        RuntimeError: if the run ends before, with its last lines.
    """
    # Without a cache of the machine, which would be warm before the first start.
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
            lines = []
            for line in process.stdout:
                if line.startswith("step 1/"):
                    seconds = time.perf_counter() - begin
                    process.kill()
                    return seconds
                lines.append(line)
    raise RuntimeError(f"the demo ended before its first step:\n{''.join(lines[-20:])}")


def main(arguments: list[str]) -> None:
    """Runs the command."""
    parser = measure.command_parser("startup", __doc__, repeats=True)
    parser.add_argument(
        "--demo", type=local_path, default="data/foley/records", help="records of the demo"
    )
    args = parser.parse_args(arguments)
    if not (args.demo / "dataset_info.json").exists():
        parser.error(f"{args.demo} does not exist: avcl-data demo --out data/foley")
    with tempfile.TemporaryDirectory() as directory:
        cache = Path(directory)
        first, *warm = [seconds_to_first_step(args.demo, cache) for _ in range(1 + args.repeats)]
        entries = [path.stat().st_size for path in cache.iterdir() if path.name.endswith("-cache")]
    detail = {
        "first_start_seconds": round(first, 2),
        "seconds": measure.spread(warm),
        "cache_entries": len(entries),
        "cache_megabytes": round(sum(entries) / 1e6, 2),
    }
    target = Target("<=", 15)
    measure.report(
        args.json, [Row("startup_seconds_cached", statistics.median(warm), "s", target, detail)]
    )
    print(detail)


if __name__ == "__main__":
    measure.run_command(main)
