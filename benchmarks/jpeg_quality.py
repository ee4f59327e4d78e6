"""Cost and benefit of JPEG quality: `python -m benchmarks.jpeg_quality --json F`.

The demo's videos as records of several qualities, and on each of them linear probes of the demo's
encoders, which were pretrained on records of the default quality.
"""

from __future__ import annotations

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
from benchmarks.measure import Row, command_parser, report, run_command, write_json

QUALITIES = (20, 40, 60, 75, 90)


def evaluate(media: Path, run: Path, quality: int) -> dict[str, Any]:
    """Prepares the videos at a quality and evaluates the run on them.

    Returns:
        `probes`, test accuracy by name, and `kilobytes_per_frame`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        records, workdir = Path(scratch) / "records", Path(scratch) / "run"
        footage.prepare(media / "manifest.csv", records, name="foley", quality=quality)
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
        "probes": {name: scores["pretrained"] for name, scores in probes.items()},
        "kilobytes_per_frame": sum(sizes) / len(sizes) / 1e3,
    }


def main(arguments: list[str]) -> None:
    """Runs the command."""
    parser = command_parser("jpeg_quality", __doc__)
    parser.add_argument(
        "--media", type=local_path, default="data/foley/media", help="videos of the demo"
    )
    parser.add_argument("--run", type=local_path, default="runs/demo", help="run of `make demo`")
    args = parser.parse_args(arguments)
    for path in (args.media / "manifest.csv", args.run / "config.json"):
        if not path.exists():
            parser.error(f"{path} does not exist: run `make demo`, or give --media and --run")
    rows: list[Row] = []
    for quality in QUALITIES:
        results = evaluate(args.media, args.run, quality)
        size = results["kilobytes_per_frame"]
        rows.append(Row(f"kilobytes_per_frame_{quality}", size, "kB", detail=results))
        rows += [
            Row(f"{name}_{quality}", accuracy, "accuracy")
            for name, accuracy in results["probes"].items()
        ]
        write_json(args.json, rows)
    report(args.json, rows)


if __name__ == "__main__":
    run_command(main)
