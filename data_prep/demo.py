"""`python -m data_prep demo`: the demo's media and their records, by the same road as any others.

It runs `foley` and then `prepare` with the settings that `configs/pretrain.py` expects. What is
finished is kept, so that running it again costs seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from avcl_jax.errors import UserError, one_line
from avcl_jax.paths import local_path
from data_prep import arguments, prepare
from data_prep.collections import folder_or_table
from data_prep.foley import command as foley

# The null controls need enough noise that 5 points are more than 3 standard errors.
_NULL_VIDEOS = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument("--out", type=local_path, default="data/foley", help="for media/, records/")
    parser.add_argument("--train", type=int, default=600, help="training videos")
    parser.add_argument("--test", type=int, default=200, help="test videos")
    parser.add_argument("--null", type=int, default=_NULL_VIDEOS, help="noise videos, twice")
    parser.add_argument("--seed", type=int, default=0, help="of every file")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")


def run(args: argparse.Namespace) -> int:
    """Runs both commands; returns the exit status."""
    media, records = args.out / "media", args.out / "records"
    begin = time.monotonic()
    counts = {
        "train": args.train,
        "test": args.test,
        "null_train": args.null,
        "null_test": args.null,
    }
    try:
        manifest = foley.write_collection(media, counts, seed=args.seed, workers=args.workers)
    except (UserError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    media_seconds = time.monotonic() - begin
    status = prepare_rendered(manifest, records, name="foley", workers=args.workers)
    times = args.out / "seconds.json"
    if status == 0 and not times.exists():  # The first time made them; later ones only looked.
        seconds = {"media": media_seconds, "records": time.monotonic() - begin - media_seconds}
        times.write_text(json.dumps(seconds) + "\n")
    return status


def prepare_rendered(table: Path, records: Path, *, name: str, workers: int) -> int:
    """Prepares rendered videos with the settings of the demo; returns the exit status.

    Args:
        table: lists the media.
        records: folder to write.
        name: of the data set.
        workers: processes.
    """
    parser = argparse.ArgumentParser()
    folder_or_table.add_arguments(parser)
    arguments.add_arguments(parser)
    options = [f"--out={records}", f"--name={name}", "--short-side=64", f"--workers={workers}"]
    return prepare.run(parser.parse_args([str(table), *options]), folder_or_table.read)
