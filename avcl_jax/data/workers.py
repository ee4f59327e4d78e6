"""Batches that worker processes or threads fill, in memory that is used again.

A batch of video is tens of megabytes. New memory for each costs a page fault per 4 kB, a fifth of a
worker's time where this was measured (docs/data/pipeline_speed.md). So the training process owns
the memory of a few batches, in a file without a name that its workers map, and they fill it a few
rows at a time. A thread of the training process drives each worker; without workers, it fills.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import math
import mmap
import multiprocessing
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.pool import ExceptionWithTraceback  # type: ignore[attr-defined]
from pathlib import Path
from typing import Any

import numpy as np

from avcl_jax.errors import UserError

# Name -> shape and dtype; rows first.
Shapes = Mapping[str, tuple[tuple[int, ...], Any]]
# Linux keeps shared memory in this file system, which containers limit, by default to 64 MB.
_FILES = Path("/dev/shm")
_ROWS_PER_UNIT = 16
_AHEAD = 2  # batches being filled, or ready
# And those of the two steps in flight. There are more only if whoever reads them keeps more.
_BATCHES = _AHEAD + 2
_ALIGNMENT = 64  # JAX takes over such memory on CPUs


def filled_batches(
    shapes: Shapes,
    request: Callable[[int, slice], Any],
    fill: Callable[[Any, Mapping[str, np.ndarray]], None],
    *,
    first: int,
    workers: int,
    threads: int,
) -> Generator[dict[str, np.ndarray]]:
    """Yields endless batches; memory of one is used again when nothing refers to its arrays.

    Args:
        request: returns what a worker needs to fill rows of a batch, from its number and a slice.
        fill: writes all of these rows, given the request; is sent to worker processes.
        first: number of the first batch.
        workers: worker processes; 0 fills in threads.
        threads: threads without workers.

    Raises:
        UserError: if a worker is gone.
        OSError: if the shared memory is full.
        Exception: what `fill` raises, of the first of these rows.
    """
    rows, count = next(iter(shapes.values()))[0][0], workers or threads
    size = min(_ROWS_PER_UNIT, math.ceil(rows / count))
    parts = [slice(row, min(row + size, rows)) for row in range(0, rows, size)]
    numbers = itertools.count(first)
    filling: deque[tuple[dict[str, np.ndarray], list[Future[None]]]] = deque()
    with contextlib.ExitStack() as stack:
        memory = _Memory(shapes)
        run: Callable[..., None] = functools.partial(_fill, memory, fill)
        if workers:
            memory.file = stack.enter_context(tempfile.TemporaryFile(dir=_FILES)).fileno()
            # Before the first step, so that whatever fills it later does not end a run.
            memory.allocate(0, _BATCHES)
            run = stack.enter_context(_Workers(workers, run, memory.file))
        pool = ThreadPoolExecutor(count)
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        atexit.register(stack.close)  # later, modules are gone
        stack.callback(atexit.unregister, stack.close)

        def work(block: int, number: int, part: slice) -> None:
            run(block, part, request(number, part))

        def begin() -> None:
            while len(filling) < _AHEAD and (lent := memory.lend(grow=not filling)):
                (block, arrays), number = lent, next(numbers)
                filling.append((arrays, [pool.submit(work, block, number, p) for p in parts]))

        def finish() -> dict[str, np.ndarray]:
            begin()
            arrays, futures = filling.popleft()
            for future in futures:
                future.result()
            begin()
            return arrays

        while True:
            yield finish()  # and keeps no reference to it


def check_room(shapes: Shapes, *, workers: int) -> None:
    """Refuses worker processes whose batches exceed the shared memory of this machine.

    Raises:
        UserError: with the settings to change.
    """
    if not workers:
        return
    if not _FILES.is_dir():
        raise UserError(f"workers={workers} need {_FILES}, which this system lacks: set workers=0")
    needed = _BATCHES * _Memory(shapes).size
    system = os.statvfs(_FILES)
    free = system.f_bavail * system.f_frsize
    if needed > free:
        gigabytes = math.ceil(1.1 * needed / 1e9)
        raise UserError(
            f"workers={workers} need {needed / 1e6:,.0f} MB of shared memory, for {_BATCHES} "
            f"batches, and {_FILES} has {free / 1e6:,.0f} MB free: start the container with "
            f"--shm-size={gigabytes}g (docker), or set workers=0 to render in threads"
        )


class _Memory:
    """Blocks of memory, of one batch each.

    Attributes:
        file: descriptor of a file that processes share; -1 is memory of this process.
        size: bytes of a block.
    """

    def __init__(self, shapes: Shapes):
        """Takes no memory yet."""
        self.file, self.size, self._arrays = -1, 0, {}
        for name, (shape, dtype) in shapes.items():
            self._arrays[name] = shape, dtype, self.size
            self.size += math.prod(shape) * np.dtype(dtype).itemsize
            self.size += -self.size % _ALIGNMENT
        self.size += -self.size % mmap.ALLOCATIONGRANULARITY
        self._blocks: dict[int, mmap.mmap] = {}
        self._free: list[int] = []

    def lend(self, *, grow: bool) -> tuple[int, dict[str, np.ndarray]] | None:
        """Returns a block and its arrays; it is free again when nothing refers to them.

        There are no more than `_BATCHES` blocks unless the memory may `grow`.
        """
        if self._free:
            block = self._free.pop()
        elif (block := len(self._blocks)) >= _BATCHES and not grow:
            return None
        elif self.file >= 0 and block >= _BATCHES:
            self.allocate(block, 1)
        arrays = self.arrays(block)
        whole = next(iter(arrays.values())).base
        weakref.finalize(whole, self._free.append, block).atexit = False
        return block, arrays

    def allocate(self, block: int, count: int) -> None:
        """Allocates shared blocks: Linux would do so page by page, and kill a writer without one.

        Raises:
            OSError: if there is no room.
        """
        needed = count * self.size
        try:
            os.posix_fallocate(self.file, block * self.size, needed)
        except OSError as error:
            system = os.statvfs(_FILES)
            raise OSError(
                error.errno,
                f"worker processes need {needed / 1e6:,.1f} MB in {_FILES} for batches, and "
                f"{system.f_bavail * system.f_frsize / 1e6:,.1f} MB are free ({error.strerror}): "
                "give the container more (docker run --shm-size), or set workers=0",
            ) from error

    def arrays(self, block: int) -> dict[str, np.ndarray]:
        """Returns the arrays of a block, all of the same base."""
        if block not in self._blocks:
            offset = block * self.size if self.file >= 0 else 0
            self._blocks[block] = mmap.mmap(self.file, self.size, offset=offset)
        # The arrays keep this one, which keeps the memory; they would not by themselves.
        whole = np.frombuffer(self._blocks[block], np.uint8)
        return {
            name: np.ndarray(shape, dtype, whole, begin)
            for name, (shape, dtype, begin) in self._arrays.items()
        }


def _fill(
    memory: _Memory, fill: Callable[..., None], block: int, part: slice, request: Any
) -> None:
    fill(request, {name: array[part] for name, array in memory.arrays(block).items()})


class _Workers:
    """Processes that call a function, one for each thread that calls this.

    They end when this is closed, or when this process ends, however it does.
    """

    def __init__(self, count: int, run: Callable[..., None], file: int):
        """Starts them; `file` is a descriptor that they inherit."""
        pairs = [multiprocessing.Pipe() for _ in range(count)]
        ends = [theirs.fileno() for _, theirs in pairs]
        # Ctrl-C, `timeout` and SLURM signal all processes of a run, which needs its workers until
        # it has saved. Blocked signals stay blocked in processes that are started now.
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        try:
            # Not `multiprocessing`: it imports the main module, and with it JAX, in each worker,
            # and leaves names in /dev/shm when all of its processes are killed.
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"from {__name__} import serve; serve()"],
                stdin=subprocess.PIPE,
                pass_fds=[*ends, file],
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        assert self._process.stdin is not None
        self._stdin = self._process.stdin
        pickle.dump((run, ends), self._stdin)
        self._stdin.flush()
        self._idle: queue.SimpleQueue[Connection] = queue.SimpleQueue()
        for ours, theirs in pairs:
            theirs.close()  # so that the death of a worker closes the connection
            self._idle.put(ours)

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._stdin.close()
        self._process.kill()
        self._process.wait()

    def __call__(self, *arguments: Any) -> None:
        """Calls the function in an idle worker."""
        connection = self._idle.get()
        try:
            connection.send(arguments)
            error = connection.recv()
        except (EOFError, ConnectionError):
            raise UserError(
                "a worker process that renders records is gone, killed perhaps because memory ran "
                "out: set fewer execution.workers; the same command resumes"
            ) from None
        finally:
            self._idle.put(connection)
        if error is not None:
            raise error


def serve() -> None:
    """Runs in a process of its own, which forks the workers: they share what it has imported."""
    run, ends = pickle.load(sys.stdin.buffer)
    for end in ends:
        if os.fork() == 0:
            for other in set(ends) - {end}:
                os.close(other)
            _work(Connection(end), run)
    for end in ends:
        os.close(end)
    for _ in ends:
        os.wait()


def _work(connection: Connection, run: Callable[..., None]) -> None:
    """Does what it is asked to until nobody asks, and ends the process."""
    threading.Thread(target=_end_with_training, daemon=True).start()
    try:
        while True:
            arguments, answer = connection.recv(), None
            try:
                run(*arguments)
            except Exception as error:  # for the training process to raise
                answer = ExceptionWithTraceback(error, error.__traceback__)
            connection.send(answer)
    except (EOFError, ConnectionError):
        pass
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _end_with_training() -> None:
    os.read(0, 1)  # Nobody writes there; the system closes it with the training process.
    os._exit(1)
