"""Batches that threads and workers fill: what is read is left alone, nothing stays behind."""

from __future__ import annotations

import collections
import gc
import itertools
import os
import select
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from avcl_jax.data.record_files import RecordError
from avcl_jax.data.workers import filled_batches
from avcl_jax.errors import UserError
from tests.data.synthetic_records import make_record, write_records

ROOT = Path(__file__).resolve().parents[2]
SHAPES = {"flag": ((40,), "bool"), "x": ((40, 1000), "int32")}


def fill(request: tuple[int, int], out: dict[str, np.ndarray]) -> None:
    number, first = request
    if number == 3 and first >= 16:
        raise RecordError(f"row {first} of batch {number}")
    out["flag"][...] = number % 2
    out["x"][...] = number + 1000 * (first + np.arange(len(out["x"])))[:, None]


def fill_with_process(request: Any, out: dict[str, np.ndarray]) -> None:
    """Writes the process, and whether it has JAX as well as the pipeline."""
    import avcl_jax.data.clips  # noqa: F401

    out["x"][...], out["flag"][...] = os.getpid(), "jax" in sys.modules


def fill_once(request: tuple[int, int], out: dict[str, np.ndarray]) -> None:
    """Writes the process into batch 0, and never ends another."""
    if request[0]:
        threading.Event().wait()
    out["x"][...] = os.getpid()


def batches(
    workers: int, *, first: int = 10, fill: Callable[..., None] = fill
) -> Iterator[dict[str, np.ndarray]]:
    def request(number: int, part: slice) -> tuple[int, int]:
        return number, part.start

    return filled_batches(SHAPES, request, fill, first=first, workers=workers, threads=3)


def is_batch(batch: dict[str, np.ndarray], number: int) -> bool:
    rows = number + 1000 * np.arange(40)[:, None]
    return bool((batch["flag"] == number % 2).all() and (batch["x"] == rows).all())


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("held", [1, 2])
def test_four_batches_are_enough_for_whoever_holds_two(workers: int, held: int) -> None:
    last, addresses = collections.deque(maxlen=held), set()
    filled = batches(workers)
    for number in range(10, 40):
        last.append(next(filled))
        assert is_batch(last[-1], number)
        assert is_batch(last[0], number - len(last) + 1)
        addresses.add(last[-1]["x"].ctypes.data)
    assert len(addresses) <= 4


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("keep", [lambda x: x, lambda x: x[5:], lambda x: x.reshape(10, -1).T])
def test_an_array_that_somebody_holds_is_left_alone(workers: int, keep) -> None:
    filled = batches(workers)
    held = {number: keep(next(filled)["x"]) for number in range(10, 17)}
    assert len({array.ctypes.data for array in held.values()}) == 7
    del held[12], held[13]
    for number in range(17, 30):
        assert is_batch(next(filled), number)
    for number, array in held.items():
        rows = number + 1000 * np.arange(40).repeat(1000).reshape(40, 1000)
        np.testing.assert_array_equal(array, keep(rows))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_jax_took_over_is_left_alone(workers: int) -> None:
    import jax

    filled = batches(workers)
    # On a CPU, JAX takes over aligned memory of the host without copying.
    held = [jax.device_put(next(filled)) for _ in range(5)]
    for _ in range(15):
        batch = next(filled)
        assert batch["x"].ctypes.data % 64 == 0
    for number, batch in enumerate(held, 10):
        assert is_batch(jax.device_get(batch), number)


@pytest.mark.parametrize("workers", [0, 2])
def test_arrays_outlive_whoever_filled_them(workers: int) -> None:
    filled = batches(workers)
    batch = next(filled)
    del filled
    gc.collect()
    assert is_batch(batch, 10)


@pytest.mark.parametrize("workers", [0, 3])
def test_the_first_row_that_fails_is_raised(workers: int) -> None:
    filled = batches(workers, first=1)
    assert is_batch(next(filled), 1)
    assert is_batch(next(filled), 2)
    with pytest.raises(RecordError, match=r"row (16|28) of batch 3") as caught:
        next(filled)
    if workers:
        assert 'raise RecordError(f"row' in str(caught.value.__cause__)


def ends(process: int) -> bool:
    """Waits up to a minute for the end of a process."""
    try:
        descriptor = os.pidfd_open(process)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], 60.0)[0])
    finally:
        os.close(descriptor)


def test_workers_work_without_jax_and_end_with_the_iterator() -> None:
    filled = batches(3, fill=fill_with_process)
    seen = [next(filled) for _ in range(9)]
    assert not any(batch["flag"].any() for batch in seen)
    processes = np.unique([batch["x"] for batch in seen])
    assert 1 <= len(processes) <= 3
    assert os.getpid() not in processes
    filled.close()
    assert all(map(ends, processes.tolist()))


def test_signals_to_all_processes_leave_the_workers_alone_and_a_dead_one_is_told() -> None:
    filled = batches(1, fill=fill_with_process)
    (process,) = np.unique(next(filled)["x"]).tolist()
    for name in (signal.SIGTERM, signal.SIGINT):
        os.kill(process, name)
    for _ in range(5):
        assert (next(filled)["x"] == process).all()
    os.kill(process, signal.SIGKILL)
    with pytest.raises(UserError, match=r"worker process .* is gone, .* execution\.workers"):
        list(itertools.islice(filled, 4))


# Each of these has a /dev/shm of its own, of 16 MB; only root may mount one.
SMALL_SHARED_MEMORY = "mount -t tmpfs -o size=16m tmpfs /dev/shm"


def with_little_shared_memory(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs a command of Python where /dev/shm has 16 MB; skips the test where that is forbidden."""
    unshare = ["unshare", "--mount", "sh", "-c"]
    if (
        shutil.which("unshare") is None
        or subprocess.run(
            [*unshare, SMALL_SHARED_MEMORY], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("mounting a small /dev/shm needs root")
    return subprocess.run(
        [*unshare, f'{SMALL_SHARED_MEMORY} && exec "$0" "$@"', sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )


# Iterates over batches of 2.1 MB in worker processes.
PROGRAM = """
import os, signal, subprocess, sys
from avcl_jax.data.workers import filled_batches
from tests.data.test_workers import fill_once, fill_with_process
shapes = {"x": ((1 << 9, 1 << 10), "int32"), "flag": ((1 << 9,), "bool")}
def filled_by(fill):
    options = {"first": 0, "workers": 2, "threads": 1}
    return filled_batches(shapes, lambda number, _: (number, 0), fill, **options)
"""


def test_full_shared_memory_is_an_error_and_not_a_signal() -> None:
    program = """

        def fill_shared_memory():
            with open("/dev/shm/other", "ab", buffering=0) as other:
                try:
                    while True:
                        other.write(bytes(1 << 12))
                except OSError:
                    pass

        # All that is needed is taken before the first batch.
        filled = filled_by(fill_with_process)
        next(filled)
        fill_shared_memory()
        for _ in range(20):
            held = next(filled)
        held = [held]
        try:
            while True:  # who keeps more needs more
                held.append(next(filled))
        except OSError as error:
            print(len(held), error)
        del filled, held
        fill_shared_memory()
        try:
            next(filled_by(fill_with_process))
        except OSError as error:
            print(error)
    """
    result = with_little_shared_memory(["-c", PROGRAM + textwrap.dedent(program)])
    first, second = result.stdout.splitlines()
    need = "[Errno 28] worker processes need {} MB in /dev/shm for batches, and "
    assert first.startswith(f"3 {need.format('2.1')}"), result
    assert second.startswith(need.format("8.4")), result
    assert "MB are free (No space left on device): give the container" in second
    assert "--shm-size" in first
    assert result.stderr == ""
    assert result.returncode == 0


@pytest.mark.parametrize(
    ("fill", "end"),
    [
        ("fill_once", "os.kill(os.getpid(), signal.SIGKILL)"),
        ("fill_once", "os._exit(1)"),
        ("fill_with_process", ""),
    ],
)
def test_however_a_process_ends_its_workers_do_and_leave_nothing(fill: str, end: str) -> None:
    program = f"""
filled = filled_by({fill})
batch = next(filled)
print(batch["x"].max(), flush=True)
{end}
"""
    outer = f"""
        run = subprocess.run([sys.executable, "-c", {PROGRAM + program!r}], stdout=-1, timeout=300)
        from tests.data.test_workers import ends
        print(ends(int(run.stdout)), os.listdir("/dev/shm"))
    """
    result = with_little_shared_memory(["-c", PROGRAM + textwrap.dedent(outer)])
    assert (result.stdout, result.stderr) == ("True []\n", "")


def test_batches_that_do_not_fit_are_refused_before_a_worker_starts(tmp_path) -> None:
    from tests.training.small import arguments  # Not above, as it imports JAX.

    made = [make_record(number, seconds=5.0, side=24) for number in range(8)]
    records = write_records(tmp_path / "records", made)
    options = arguments(records, tmp_path / "run", execution__workers=2, crop__image_size=224)
    result = with_little_shared_memory(["-m", "avcl_jax.main", *options])
    (line,) = (result.stdout + result.stderr).splitlines()
    # 4 batches of 8 videos x 2 views x 4 frames x 224 x 224 x 3, and 8 x 2 spectrograms.
    megabytes = 4 * 8 * 2 * (4 * 224 * 224 * 3 + 16 * 16 * 4) / 1e6
    assert f"workers=2 need {megabytes:.0f} MB of shared memory, for 4 batches" in line
    assert "/dev/shm has 17 MB free" in line
    assert "--shm-size=1g" in line
    assert "workers=0" in line
    assert result.returncode == 1
    assert not (tmp_path / "run").exists()
