"""Large arrays from worker processes, in memory that is used again and again.

A batch of pictures is tens of megabytes. Fresh shared memory for each, which is what grain offers,
costs a page fault for every 4 kB: a fifth of a worker's time where this was measured
(docs/data/pipeline_speed.md). Here a worker keeps its blocks. The consumer says that it is done
with one in the block's first byte, when the last array on it is gone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import threading
import weakref
from collections.abc import Mapping
from multiprocessing import shared_memory, util
from pathlib import Path
from typing import Any

import numpy as np

from avcl_jax.errors import UserError

# The first byte says whether a block is taken; arrays begin where JAX wants them to.
_HEADER_BYTES = 64
_FREE, _TAKEN = 0, 1
# Linux keeps shared memory in this file system, which containers limit, by default to 64 MB.
_FILES = Path("/dev/shm")
# Batches that the training process refers to: those of steps in flight and the one being sent.
_IN_TRAINING = 4


@dataclasses.dataclass(frozen=True)
class SharedArray:
    """An array as it travels between processes.

    Attributes:
        block: name of the memory it lies in.
        shape: of the array.
        dtype: of the array.
    """

    block: str
    shape: tuple[int, ...]
    dtype: str


class _Block(shared_memory.SharedMemory):
    """Shared memory that may be dropped while arrays on it live: the last one unmaps it."""

    def close(self) -> None:
        with contextlib.suppress(BufferError):
            super().close()

    def unlink(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            super().unlink()

    @property
    def content(self) -> memoryview:
        """All of it, the header first."""
        assert self.buf is not None
        return self.buf

    def array(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """One-dimensional: of views of it, numpy keeps alive just this array."""
        # np.ndarray(buffer=) would not keep the memory mapped, and reading it crash.
        return np.frombuffer(self.content, dtype, math.prod(shape), _HEADER_BYTES)


def most_blocks(workers: int, prefetch: int) -> int:
    """Returns the largest number of batches that are in shared memory at once.

    For each worker: batches read ahead in the worker, in its queue and behind the queue, and one
    more at each end of the queue.
    """
    return workers * (3 * prefetch + 2) + _IN_TRAINING


def check_room(batch_bytes: int, *, workers: int, prefetch: int) -> None:
    """Refuses worker processes whose batches do not fit into the shared memory of this machine.

    Args:
        batch_bytes: size of a batch of this host.
        workers: number of worker processes.
        prefetch: batches that each worker reads ahead.

    Raises:
        UserError: if they do not fit, with settings to change.
    """
    if not workers or not _FILES.is_dir():
        return
    needed = batch_bytes * most_blocks(workers, prefetch)
    system = os.statvfs(_FILES)
    free = system.f_bavail * system.f_frsize
    if needed > free:
        gigabytes = math.ceil(1.1 * needed / 1e9)
        raise UserError(
            f"data.workers={workers} with data.prefetch={prefetch} needs {needed / 1e6:,.0f} MB of "
            f"shared memory, and {_FILES} has {free / 1e6:,.0f} MB free: start the container with "
            f"--shm-size={gigabytes}g (docker), or set data.workers=0 to render in threads, or a "
            "smaller data.prefetch"
        )


def _allocate(block: _Block) -> None:
    """Allocates the memory of a new block.

    Otherwise Linux would allocate each page at its first write, and kill the writer by SIGBUS if
    none was left.

    Raises:
        OSError: if there is not enough memory.
    """
    if not _FILES.is_dir():
        return
    try:
        with (_FILES / block.name).open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, block.size)
    except OSError as error:
        block.close()
        block.unlink()
        raise OSError(
            error.errno,
            f"no {block.size / 1e6:,.1f} MB left in {_FILES} for a batch of a worker process "
            f"({error.strerror}): give the container more (docker run --shm-size), or set "
            "data.workers=0",
        ) from error


class Blocks:
    """The blocks of this process; there are as many as are ever in use at once."""

    def __init__(self) -> None:
        """Has none yet."""
        self._blocks: list[_Block] = []
        self._lock = threading.Lock()
        # Blocks that were sent but not received have a name that somebody must remove.
        util.Finalize(self, _unlink, args=(self._blocks,), exitpriority=10)

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self._blocks)

    def empty(self, shape: tuple[int, ...], dtype: str) -> tuple[SharedArray, np.ndarray]:
        """Returns an array to be filled, and what to send of it."""
        needed = _HEADER_BYTES + math.prod(shape) * np.dtype(dtype).itemsize
        with self._lock:
            free = (b for b in self._blocks if b.content[0] == _FREE and b.size >= needed)
            block = next(free, None)
            if block is None:
                block = _Block(create=True, size=needed)
                _allocate(block)
                self._blocks.append(block)
            block.content[0] = _TAKEN
        return SharedArray(block.name, shape, dtype), block.array(shape, dtype).reshape(shape)


def _unlink(blocks: list[_Block]) -> None:
    for block in blocks:
        block.unlink()


_OF_THIS_PROCESS: list[Blocks] = []


def empty(shape: tuple[int, ...], dtype: str) -> tuple[SharedArray, np.ndarray]:
    """`Blocks.empty` of this worker process."""
    if not _OF_THIS_PROCESS:
        _OF_THIS_PROCESS.append(Blocks())
    return _OF_THIS_PROCESS[0].empty(shape, dtype)


def empty_batch(
    shape: tuple[int, ...], dtype: Any, *, shared: bool
) -> tuple[SharedArray | np.ndarray, np.ndarray]:
    """Returns what is sent, and the array to fill: one of shared memory, or twice the same."""
    if shared:
        return empty(shape, np.dtype(dtype).name)
    array = np.empty(shape, dtype)
    return array, array


class Receive:
    """Makes arrays of what workers send; they are the workers' memory, not copies of it."""

    def __init__(self) -> None:
        """Knows no block yet."""
        self._blocks: dict[str, _Block] = {}

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the batch with arrays for every `SharedArray`.

        The memory goes back to the worker when nothing refers to the array any more.
        """
        return {
            name: self._open(value) if isinstance(value, SharedArray) else value
            for name, value in batch.items()
        }

    def _open(self, sent: SharedArray) -> np.ndarray:
        block = self._blocks.get(sent.block)
        if block is None:
            block = self._blocks[sent.block] = _Block(sent.block)
            block.unlink()  # Nobody else will ask for it, and now nothing can leave it behind.
        array = block.array(sent.shape, sent.dtype)
        # Its own view: that of the block is released when this object goes.
        weakref.finalize(array, block.content[:1].__setitem__, 0, _FREE).atexit = False
        return array.reshape(sent.shape)
