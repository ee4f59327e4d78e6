"""Memory that workers fill again and again: never while somebody reads it, never for ever."""

from __future__ import annotations

import gc
import multiprocessing
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

from avcl_jax.data import shared_memory
from avcl_jax.data.shared_memory import Blocks, Receive, SharedArray

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def blocks() -> Iterator[Blocks]:
    made = Blocks()
    yield made
    shared_memory._unlink(made._blocks)


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
    sent, array = shared_memory.empty((100,), "int32")
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
            shared_memory._Block(sent.block)
        assert array is None or (array == 1).all()


class Number(grain.transforms.Map):
    def map(self, element: int) -> dict[str, SharedArray]:
        sent, array = shared_memory.empty((1000,), "int32")
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
    # Two read ahead, two in the queue, a few in hands between; not one for each of the 200.
    assert 1 <= len(receive._blocks) <= 10


def test_a_process_that_ends_with_arrays_in_use_says_nothing() -> None:
    program = """
        from avcl_jax.data.shared_memory import Blocks, Receive
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
