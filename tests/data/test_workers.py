"""Memory that workers fill again and again: never while somebody reads it, never for ever."""

from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import grain
import jax
import numpy as np
import pytest
from absl import flags

from avcl_jax.data import workers
from avcl_jax.data.workers import Blocks, Receive, SharedArray
from tests.data.synthetic_records import make_record, write_records
from tests.training.small import arguments

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def blocks() -> Iterator[Blocks]:
    made = Blocks()
    yield made
    workers._unlink(made._blocks)


def fill(blocks: Blocks, value: int, size: int = 1000) -> SharedArray:
    sent, array = blocks.empty((size,), "int32")
    array[...] = value
    return sent


def test_a_block_is_used_again_when_its_array_is_gone(blocks: Blocks) -> None:
    receive = Receive()
    for value in range(20):
        batch = receive({"x": fill(blocks, value), "y": value})
        assert batch["y"] == value
        assert (batch["x"] == value).all()
        del batch
    assert len(blocks) == 1


@pytest.mark.parametrize("keep", [lambda x: x, lambda x: x[5:], lambda x: x.reshape(10, -1).T])
def test_an_array_that_somebody_holds_is_left_alone(blocks: Blocks, keep) -> None:
    receive = Receive()
    held = [keep(receive({"x": fill(blocks, value)})["x"]) for value in range(5)]
    assert len(blocks) == 5
    for value, array in enumerate(held):
        assert (array == value).all()
    del held[3], array
    fill(blocks, 99)
    assert len(blocks) == 5
    assert [int(array.max()) for array in held] == [0, 1, 2, 4]


def test_what_jax_took_over_is_left_alone(blocks: Blocks) -> None:
    receive = Receive()
    # On a CPU, JAX takes over aligned memory of the host without copying.
    held = [jax.device_put(receive({"x": fill(blocks, value)})["x"]) for value in range(4)]
    for value, array in enumerate(held):
        np.testing.assert_array_equal(array, np.full(1000, value))
    assert receive({"x": fill(blocks, 7)})["x"].ctypes.data % 64 == 0


def test_larger_arrays_get_larger_blocks(blocks: Blocks) -> None:
    receive = Receive()
    for size in (10, 100_000, 10):
        assert receive({"x": fill(blocks, 3, size)})["x"].shape == (size,)
    assert len(blocks) == 2


def test_arrays_outlive_whoever_received_and_sent_them() -> None:
    made, receive = Blocks(), Receive()
    array = receive({"x": fill(made, 5)})["x"]
    del made, receive
    gc.collect()
    assert (array == 5).all()


def send(connection: Connection) -> None:
    sent, array = workers.empty_batch((100,), "int32", shared=True)
    array[...] = 1
    connection.send(sent)
    connection.recv()


def test_nothing_stays_behind_whether_it_was_received_or_not() -> None:
    context = multiprocessing.get_context("spawn")
    for received in (False, True):
        ours, theirs = context.Pipe()
        process = context.Process(target=send, args=(theirs,))
        process.start()
        sent = ours.recv()
        array = Receive()({"x": sent})["x"] if received else None
        ours.send(None)
        process.join()
        assert process.exitcode == 0
        with pytest.raises(FileNotFoundError):
            workers._Block(sent.block)
        assert array is None or (array == 1).all()


class Number(grain.transforms.Map):
    def map(self, element: int) -> dict[str, SharedArray]:
        sent, array = workers.empty_batch((1000,), "int32", shared=True)
        array[...] = element
        return {"x": sent}


def test_workers_of_grain_use_few_blocks() -> None:
    flags.FLAGS.mark_as_parsed()
    dataset = grain.MapDataset.range(200).map(Number()).to_iter_dataset(grain.ReadOptions(1, 2))
    options = grain.MultiprocessingOptions(num_workers=1, per_worker_buffer_size=2)
    receive = Receive()
    for value, batch in enumerate(dataset.mp_prefetch(options).map(receive)):
        assert (batch["x"] == value).all()
    assert value == 199
    assert 1 <= len(receive._blocks) <= workers.most_blocks(1, 2)


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


def test_full_shared_memory_is_an_error_and_not_a_signal() -> None:
    program = """
        from avcl_jax.data.workers import Blocks
        blocks, held = Blocks(), []
        try:
            for number in range(5):
                held.append(blocks.empty((4 << 20,), "uint8"))
                held[-1][1][...] = 1
        except OSError as error:
            print(number, len(blocks), error)
    """
    result = with_little_shared_memory(["-c", textwrap.dedent(program)])
    assert result.stdout.startswith("3 3 [Errno 28] no 4.2 MB left in /dev/shm"), result
    assert "--shm-size" in result.stdout
    assert result.stderr == ""
    assert result.returncode == 0


def test_batches_that_do_not_fit_are_refused_before_a_worker_starts(tmp_path) -> None:
    made = [make_record(number, seconds=5.0, side=24) for number in range(8)]
    records = write_records(tmp_path / "records", made)
    options = arguments(records, tmp_path / "run", execution__workers=2, crop__image_size=112)
    result = with_little_shared_memory(["-m", "avcl_jax.main", *options])
    (line,) = (result.stdout + result.stderr).splitlines()
    # 8 videos x 2 views x 4 frames x 112 x 112 x 3, and 8 x 2 spectrograms.
    megabytes = 8 * 2 * (4 * 112 * 112 * 3 + 16 * 16 * 4) * (2 * 14 + 4) / 1e6
    assert f"workers=2 with prefetch=4 need {megabytes:.0f} MB" in line
    assert "/dev/shm has 17 MB free" in line
    assert "--shm-size=1g" in line
    assert "workers=0" in line
    assert result.returncode == 1
    assert not (tmp_path / "run").exists()


def test_a_process_that_ends_with_arrays_in_use_says_nothing() -> None:
    program = """
        from avcl_jax.data.workers import Blocks, Receive
        blocks, receive = Blocks(), Receive()
        held = [receive({"x": blocks.empty((1000,), "int32")[0]})["x"] for _ in range(3)]
        unsent = blocks.empty((1000,), "int32")
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout + result.stderr == ""
