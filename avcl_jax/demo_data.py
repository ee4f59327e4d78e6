"""The embedded demo data, made when a config asks for them and they are not there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

import jax
from etils import epath

from avcl_jax.errors import UserError
from avcl_jax.paths import absolute_path

DATA_SET = "foley"


def check_demo(directory: epath.PathLike) -> None:
    """Refuses records that are not the demo's, as a run of the demo's preset is named after it.

    Raises:
        UserError: if `directory` contains records of another data set.
    """
    info = absolute_path(directory) / "dataset_info.json"
    name = json.loads(info.read_text())["name"] if info.exists() else DATA_SET
    if name != DATA_SET:
        raise UserError(
            f"{directory} contains records of {name!r}, not the demo's: pretrain on your own with "
            "--config=configs/pretrain.py:records"
        )


def make_demo(directory: epath.PathLike, options: Sequence[str] = ()) -> None:
    """Makes and prepares demo media, unless they are there.

    Args:
        directory: directory of the records; the media go next to it.
        options: options of `python -m data_prep demo` besides --out.

    Raises:
        UserError: if the folder has another name than records, preparing fails, or many processes
            would do it at once.
    """
    directory = absolute_path(directory)
    if (directory / "dataset_info.json").exists():
        return
    if directory.name != "records":
        raise UserError(
            f"{directory} does not exist: pretrain on your own records with "
            "--config=configs/pretrain.py:records, or give a directory named `records`, which the "
            "demo is then written to"
        )
    command = ["-m", "data_prep", "demo", "--out", str(directory.parent), *options]
    if jax.process_count() > 1:
        raise UserError(f"{directory} does not exist: run `python {' '.join(command)}` first")
    print(f"{directory} does not exist yet: running {' '.join(command)}", flush=True)
    done = subprocess.run([sys.executable, *command], check=False)
    if done.returncode:
        raise UserError(f"preparing the demo data failed with exit code {done.returncode}")
