"""A config that trains in seconds, processes that run it through `avcl_jax.main`, their files."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from absl.testing import flagsaver

from avcl_jax import main
from avcl_jax.configs import pretrain
from avcl_jax.training import checkpoint

ROOT = Path(__file__).resolve().parents[2]

SIGNALLED = "tests.training.signalled"
PATIENCE = 600  # Seconds for what takes one minute at most on a machine that does nothing else.

# Overrides of configs/pretrain.py for tests: the same code, small numbers.
OVERRIDES = {
    "steps": 6,
    "global_batch_size": 8,
    "views.num_frames": 4,
    "views.clip_seconds": 0.5,
    "spectrogram.frames": 16,
    "spectrogram.mels": 16,
    "spectrogram.sample_rate_hz": 16_000,
    "crop.image_size": 16,
    "model.embedding_dim": 16,
    "model.projection_hidden": 24,
    "model.temporal_hidden": 16,
    "model.video.resnet.widths": (8, 12),
    "model.video.resnet.depths": (0, 1),
    "model.audio.resnet.widths": (8, 12),
    "model.audio.resnet.depths": (0, 1),
    "bank.size": 32,
    "bank.num_positives": 2,
    "bank.num_negatives": 4,
    "bank.positive_window": 0.125,
    "bank.negative_candidates": 16,
    "bank.warmup_steps": 1,
    "bank.health_labels": (),
    "optimizer.warmup_steps": 1,
    "execution.log_every": 1,
    "execution.checkpoint_every": 3,
}


def arguments(records: Path, workdir: Path, **overrides: object) -> list[str]:
    """Command-line arguments of a small run; `a__b=1` overrides `config.a.b`."""
    values = OVERRIDES | {name.replace("__", "."): value for name, value in overrides.items()}
    return [
        "--config=configs/pretrain.py",
        f"--workdir={workdir}",
        f"--config.data.directory={records}",
        f"--config.execution.compilation_cache={compilation_cache()}",
        *(f"--config.{name}={value}" for name, value in values.items()),
    ]


def small_config(records: Path, **overrides: object) -> ml_collections.ConfigDict:
    """The same small config as an object; `**{"a.b": 1}` overrides `config.a.b`."""
    config = pretrain.get_config()
    with config.unlocked():
        config.update_from_flattened_dict(OVERRIDES | {"data.directory": str(records)} | overrides)
    return config


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="avcl-jax-compiled-")


def compilation_cache() -> Path:
    """One directory for all processes of a session: most compile the same step."""
    return Path(_temporary().name)


def run_here(monkeypatch: Any, *arguments: str) -> None:
    """Runs main in this process."""
    command = ["main", *arguments]
    monkeypatch.setattr(sys, "argv", command)  # where ml_collections looks for overrides
    # ml_collections loads every config into one module, which a process has once.
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    with flagsaver.flagsaver():
        main.main(main.parse_flags(command))


def signals(moment: int | str, *names: str, processes: Sequence[int] = (0,)) -> list[str]:
    """Arguments of `SIGNALLED` before those of main: it signals itself as a step begins."""
    return [",".join(names), ",".join(map(str, processes)), str(moment)]


def start(
    arguments: list[str],
    *,
    devices: int = 1,
    module: str = "avcl_jax.main",
    before: Sequence[str] = (),
) -> subprocess.Popen[str]:
    """Starts `python -m avcl_jax.main` on virtual CPU devices, in a process group of its own.

    `before` are words before that command, such as those of `unshare`.
    """
    environment = os.environ | {
        # Optimising the step's machine code takes longer than running it a few times.
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} "
        "--xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu",
        "PYTHONUNBUFFERED": "1",
    }
    return subprocess.Popen(
        [*before, sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def run(
    arguments: list[str], *, devices: int = 1, code: int = 0, module: str = "avcl_jax.main"
) -> str:
    """Runs main to its end and returns what it printed; fails on another exit code."""
    process = start(arguments, devices=devices, module=module)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, output
    return output


_held: list[socket.socket] = []


def free_port() -> int:
    """Returns a port that only JAX's coordinator gets, which shares ports as gRPC does.

    A port that is free and not held becomes that of another connection before a process listens.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    held.bind(("127.0.0.1", 0))
    _held.append(held)
    return held.getsockname()[1]


def start_processes(
    arguments: list[str],
    *,
    devices: int,
    count: int = 2,
    second: Sequence[str] = (),
    module: str = "avcl_jax.main",
) -> list[subprocess.Popen[str]]:
    """Starts main in processes of so many devices that find each other.

    `second` are arguments of the second process alone.
    """
    own: list[list[str]] = [[] for _ in range(count)]
    if count > 1:
        arguments = [
            *arguments,
            f"--coordinator=127.0.0.1:{free_port()}",
            f"--num_processes={count}",
        ]
        own = [[f"--process_id={number}"] for number in range(count)]
        own[1] += second
    return [start([*arguments, *last], devices=devices, module=module) for last in own]


def run_processes(
    arguments: list[str], *, devices: int, module: str = "avcl_jax.main"
) -> list[str]:
    """Runs main in two processes of so many devices that find each other; returns their outputs."""
    processes = start_processes(arguments, devices=devices, module=module)
    outputs = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    return outputs


def descendants(pid: int) -> list[int]:
    """Processes that a process and its descendants have started."""
    children = [
        int(child)
        for listed in Path(f"/proc/{pid}/task").glob("*/children")
        for child in listed.read_text().split()
    ]
    return [process for child in children for process in (child, *descendants(child))]


def one_line(output: str) -> str:
    """The one error in what a run printed."""
    errors = [line for line in output.splitlines() if "error:" in line]
    assert len(errors) == 1, output
    assert "Traceback" not in output
    return errors[0]


def saved_state(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of the newest checkpoint, which is that of `step`, by its path."""
    state, newest = checkpoint.load_state(workdir)
    assert newest == step
    flat = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(key): np.asarray(leaf) for key, leaf in flat}


def saved_steps(workdir: Path) -> list[int]:
    """Steps of the checkpoints, in order; not of those that were being written."""
    names = [path.name for path in (workdir / "checkpoints").iterdir()]
    return sorted(map(int, filter(str.isdecimal, names)))


def losses(workdir: Path) -> dict[int, float]:
    """Loss by step."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row["loss"] for row in map(json.loads, lines)}


def assert_identical(left: Path, right: Path, step: int) -> None:
    """Same loss of every step, and the same bits in every array of a checkpoint."""
    expected, found = saved_state(left, step), saved_state(right, step)
    assert expected.keys() == found.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    assert losses(left) == losses(right)


RESUMES = "the same command ends bitwise as an undisturbed run"


class Seen:
    """A row of the table: what was done, what the processes did, and after how many seconds."""

    def __init__(self, table: list[tuple[str, str, float]]) -> None:
        self._table = table

    def act(self, what: str) -> None:
        """Begins to count, as something is done to a process."""
        self._what, self._began = what, time.monotonic()

    def ended(self) -> None:
        """Stops counting: all processes have ended."""
        self._seconds = time.monotonic() - self._began

    def told(self, outcome: str) -> None:
        """Adds the row, when everything that it says has been asserted."""
        self._table.append((self._what, outcome, self._seconds))


def stopped_at(output: str) -> int:
    """Step of the line that a stopped run ends with; a thread may say later what it was asked."""
    (line,) = (line for line in output.splitlines() if line.startswith("stopped at step "))
    assert line.endswith("; the same command resumes from here"), output
    return int(line.split()[3])
