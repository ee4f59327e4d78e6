"""`avcl-data demo`: renders the demo's media and prepares them like any others.

It runs `foley` and then `prepare` with the settings that `configs/pretrain.py` expects. Finished
files are kept, so that running it again takes seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

from avcl_jax.data_prep import prepare
from avcl_jax.data_prep.collections import folder_or_table
from avcl_jax.data_prep.foley import command as foley

# The null controls need enough noise that 5 points are more than 3 standard errors.
_NULL_VIDEOS = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    workers = os.cpu_count() or 1
    foley.add_arguments(parser, out="data/foley", null=_NULL_VIDEOS, workers=workers)


def run(args: argparse.Namespace) -> int:
    """Runs both commands; returns the exit status."""
    begin = time.monotonic()
    manifest = foley.write_requested(args, args.out / "media")
    media_seconds = time.monotonic() - begin
    status = prepare_rendered(manifest, args.out / "records", name="foley", workers=args.workers)
    times = args.out / "seconds.json"
    if status == 0 and not times.exists():  # a later run only finds the files
        seconds = {"media": media_seconds, "records": time.monotonic() - begin - media_seconds}
        times.write_text(json.dumps(seconds) + "\n")
    return status


def prepare_rendered(table: Path, records: Path, *, name: str, workers: int) -> int:
    """Prepares the rendered videos of a table as the demo's; returns the exit status."""
    parser = argparse.ArgumentParser()
    folder_or_table.add_arguments(parser)
    prepare.add_arguments(parser)
    options = [f"--out={records}", f"--name={name}", "--short-side=64", f"--workers={workers}"]
    return prepare.run(parser.parse_args([str(table), *options]), folder_or_table.read)
