"""Worker processes that render batches, and the shared memory in which large arrays travel.

A batch of video is tens of megabytes. Fresh shared memory per batch, as grain offers, costs a page
fault per 4 kB: a fifth of a worker's time where this was measured (docs/data/pipeline_speed.md).
Here a worker keeps its blocks and uses them again. The consumer releases a block, by its first
byte, when the last array on it is gone.
"""

from __future__ import annotations

import contextlib
import functools
import math
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Mapping
from multiprocessing import shared_memory, util
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np

from avcl_jax.errors import UserError

# The first byte tells whether a block is taken; arrays begin where JAX wants them to.
_HEADER_BYTES = 64
_FREE, _TAKEN = 0, 1
# Linux keeps shared memory in this file system, which containers limit, by default to 64 MB.
_FILES = Path("/dev/shm")
# Batches that the training process refers to: those of steps in flight and the one being sent.
_IN_TRAINING = 4
_SMALL_BYTES = 1 << 16


def in_workers(dataset: grain.IterDataset, *, workers: int, prefetch: int) -> grain.IterDataset:
    """Returns a dataset whose elements are made by `workers` processes, each `prefetch` ahead.

    Elements are dicts of arrays; large ones may be a `SharedArray`.
    """
    # Masks and labels travel through the queue: shared memory of their own would cost each of them
    # a page, two system calls and a name that a killed run leaves behind.
    small = grain.experimental.DatasetOptions(min_shm_size=_SMALL_BYTES)
    return (
        grain.experimental.WithOptionsIterDataset(dataset, small)
        .mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch),
            worker_init_fn=_follow_training,
        )
        .map(Receive())
    )


def _follow_training(worker: int, workers: int) -> None:
    """Makes a worker process end when the training process ends, and for no other reason.

    Ctrl-C, `timeout` and SLURM signal all processes of a run. If the signal ended a worker while it
    sends a batch, the training process would wait for the rest for ever. If the training process
    was killed, a worker would wait for ever too, and keep its shared memory.
    """
    del worker, workers
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    def end() -> None:
        training = multiprocessing.parent_process()
        assert training is not None
        training.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def most_blocks(workers: int, prefetch: int) -> int:
    """Returns the largest number of batches that are in shared memory at once.

    Per worker: batches read ahead in the worker, in its queue and behind the queue, and one more
    at each end of the queue.
    """
    return workers * (3 * prefetch + 2) + _IN_TRAINING


def check_room(batch_bytes: int, *, workers: int, prefetch: int) -> None:
    """Refuses worker processes whose batches of this size exceed the shared memory of this machine.

    Raises:
        UserError: with the settings to change.
    """
    if not workers or not _FILES.is_dir():
        return
    needed = batch_bytes * most_blocks(workers, prefetch)
    system = os.statvfs(_FILES)
    free = system.f_bavail * system.f_frsize
    if needed > free:
        gigabytes = math.ceil(1.1 * needed / 1e9)
        raise UserError(
            f"workers={workers} with prefetch={prefetch} need {needed / 1e6:,.0f} MB of shared "
            f"memory, and {_FILES} has {free / 1e6:,.0f} MB free: start the container with "
            f"--shm-size={gigabytes}g (docker), or set workers=0 to render in threads, or a "
            "smaller prefetch"
        )


class SharedArray(NamedTuple):
    """Array as it travels between processes: name of its block, shape and dtype."""

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
        """One-dimensional array: of views of it, numpy keeps alive just this one."""
        # np.ndarray(buffer=) would not keep the memory mapped, and reading it crash.
        return np.frombuffer(self.content, dtype, math.prod(shape), _HEADER_BYTES)

    def allocate(self) -> None:
        """Allocates the memory: Linux would do so page by page, and kill a writer who gets none."""
        if not _FILES.is_dir():
            return
        try:
            with (_FILES / self.name).open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, self.size)
        except OSError as error:
            self.close()
            self.unlink()
            raise OSError(
                error.errno,
                f"no {self.size / 1e6:,.1f} MB left in {_FILES} for a batch of a worker process "
                f"({error.strerror}): give the container more (docker run --shm-size), or set "
                "workers=0",
            ) from error


class Blocks:
    """Blocks of this process; as many as are ever in use at once."""

    def __init__(self) -> None:
        self._blocks: list[_Block] = []
        self._lock = threading.Lock()
        # Blocks that were sent but not received have a name that somebody must remove.
        util.Finalize(self, _unlink, args=(self._blocks,), exitpriority=10)

    def __len__(self) -> int:
        return len(self._blocks)

    def empty(self, shape: tuple[int, ...], dtype: str) -> tuple[SharedArray, np.ndarray]:
        """Returns what to send, and the array to fill."""
        needed = _HEADER_BYTES + math.prod(shape) * np.dtype(dtype).itemsize
        with self._lock:
            free = (b for b in self._blocks if b.content[0] == _FREE and b.size >= needed)
            block = next(free, None)
            if block is None:
                block = _Block(create=True, size=needed)
                block.allocate()
                self._blocks.append(block)
            block.content[0] = _TAKEN
        return SharedArray(block.name, shape, dtype), block.array(shape, dtype).reshape(shape)


def _unlink(blocks: list[_Block]) -> None:
    for block in blocks:
        block.unlink()


# Those of this process, made when they are first needed.
_own_blocks = functools.cache(Blocks)


def empty_batch(
    shape: tuple[int, ...], dtype: Any, *, shared: bool
) -> tuple[SharedArray | np.ndarray, np.ndarray]:
    """Returns what to send, and the array to fill: in shared memory, or the same array twice."""
    if not shared:
        array = np.empty(shape, dtype)
        return array, array
    return _own_blocks().empty(shape, np.dtype(dtype).name)


class Receive:
    """Makes arrays of what workers send; they are the workers' memory, not copies of it."""

    def __init__(self) -> None:
        self._blocks: dict[str, _Block] = {}

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the batch with an array for every `SharedArray`.

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
