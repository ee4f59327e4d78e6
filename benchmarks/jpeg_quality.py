"""What JPEG quality costs and is worth: `python -m benchmarks.jpeg_quality --json F`.

The demo's films as records of several qualities; on each, linear probes of the encoders that the
demo pretrained (on records of the default quality), trained and tested on records of that quality.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from avcl_jax.data.records import RecordDataset
from avcl_jax.paths import local_path
from benchmarks import footage
from benchmarks.measure import Row, print_table, run_command, writable_path, write_json

QUALITIES = (20, 40, 60, 75, 90)


def measure(media: Path, run: Path, quality: int) -> dict[str, Any]:
    """Prepares the films at a quality and evaluates the run on them.

    Returns:
        `probes`, test accuracy by name, and `kilobytes_a_frame`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        records = Path(scratch) / "records"
        footage.prepare(media / "manifest.csv", records, name="foley", quality=quality)
        workdir = Path(scratch) / "run"
        shutil.copytree(run, workdir)
        command = [sys.executable, "-m", "avcl_jax.main", "--config=configs/evaluate.py:demo"]
        options = {
            "data.directory": records,
            "evaluation.supervised.enabled": False,
            "evaluation.null.train_split": "",
        }
        subprocess.run(
            [*command, f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in options.items())],
            check=True,
            stdout=sys.stderr,
        )
        probes = json.loads((workdir / "results.json").read_text())["probe"]
        test = RecordDataset(records, "test")
        sizes = [len(frame) for index in range(0, len(test), 10) for frame in test[index].frames]
    return {
        "probes": {name: found["pretrained"] for name, found in probes.items()},
        "kilobytes_a_frame": sum(sizes) / len(sizes) / 1e3,
    }


def main(arguments: list[str]) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.jpeg_quality", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", type=writable_path, required=True, help="where to write the rows")
    parser.add_argument("--media", type=local_path, default="data/foley/media", help="of the demo")
    parser.add_argument("--run", type=local_path, default="runs/demo", help="of `make demo`")
    args = parser.parse_args(arguments)
    for path in (args.media / "manifest.csv", args.run / "config.json"):
        if not path.exists():
            parser.error(f"{path} is not there: run `make demo`, or say --media and --run")
    rows = []
    for quality in QUALITIES:
        found = measure(args.media, args.run, quality)
        rows.append(
            Row(f"kilobytes_a_frame_{quality}", found["kilobytes_a_frame"], "kB", None, found)
        )
        for name, accuracy in found["probes"].items():
            rows.append(Row(f"{name}_{quality}", accuracy, "accuracy", None, {}))
        write_json(args.json, rows)
    print_table(rows)
    return 0


if __name__ == "__main__":
    run_command(main)
