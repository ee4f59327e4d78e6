"""A process that decodes media of strangers, with an end to its time and its memory.

A decoder that hangs in C hears no signal handler of Python, and one that crashes takes its process
along: this one, not the server.
"""

from __future__ import annotations

import asyncio
import functools
import multiprocessing
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from avcl_jax.data.media import REASONS, MediaError
from avcl_jax.errors import UserError

_P = ParamSpec("_P")
_T = TypeVar("_T")
# Address space: as for a worker that prepares media (data_prep/pool.py). 8K films take 5 GB, and a
# frame 48 pixels high and a thousand times as wide takes any amount.
_BYTES = 8 << 30


class DecoderError(UserError):
    """A file that could not be decoded; the message gives the reason."""


class Decoder:
    """Calls functions in one process, one after the other, and replaces it when it ended."""

    def __init__(self, limit_seconds: float, directory: Path):
        """Starts the process, which deletes the temporary directory if the server is killed.

        Args:
            limit_seconds: seconds that one call may take.
        """
        self._limit_seconds = limit_seconds
        self._directory = directory
        self._turn = asyncio.Lock()
        self._closed = False
        self._start()

    async def run(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Calls a function of a module, which the process imports.

        Raises:
            DecoderError: if it raises a MediaError, or took too much time or memory, or crashed.
        """
        call = functools.partial(_limited, self._limit_seconds, function, args, kwargs)
        # Also after the caller has gone, the process is busy until the call has ended.
        task = asyncio.ensure_future(self._run(call))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # not logged
        return await asyncio.shield(task)

    def close(self) -> None:
        """Ends the processes of all decoders, also during a call."""
        self._closed = True
        self._executor.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.kill()

    def _start(self) -> None:
        # Spawned: a fork of a process with threads may hang in the child.
        context = multiprocessing.get_context("spawn")
        self._executor = ProcessPoolExecutor(1, context, _prepare, (self._directory,))
        # Ctrl+C, which all processes of a terminal get, is the server's to handle.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
        self._executor.submit(os.getpid)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    async def _run(self, call: Callable[[], _T]) -> _T:
        async with self._turn:
            # Before the call begins: one that is ended after the limit has lasted no less.
            began = time.monotonic()
            try:
                future = self._executor.submit(call)
            except BrokenProcessPool:  # it ended between two calls
                self._start()
                began = time.monotonic()
                future = self._executor.submit(call)
            try:
                return await asyncio.wrap_future(future)
            except MediaError as error:
                raise DecoderError(f"{REASONS[error.reason]} ({error.message})") from error
            except MemoryError as error:
                raise DecoderError(f"it needs more than {_BYTES >> 30} GB of memory") from error
            except BrokenProcessPool as error:
                if not self._closed:
                    self._start()
                if time.monotonic() - began < self._limit_seconds:
                    raise DecoderError("it made the decoder crash") from error
                raise DecoderError(
                    f"reading it takes longer than {self._limit_seconds:g} s, the "
                    "--max-decode-seconds"
                ) from error


def _prepare(directory: Path) -> None:
    """Runs in the process before any call."""
    # The system's own way to end a process works also where a decoder hangs in C.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    threading.Thread(target=_end_with_server, args=(directory,), daemon=True).start()


def _end_with_server(directory: Path) -> None:
    server = multiprocessing.parent_process()
    assert server is not None
    server.join()
    shutil.rmtree(directory, ignore_errors=True)  # a killed server has not
    os._exit(0)


def _limited(seconds: float, function: Callable[..., _T], args: Any, kwargs: Any) -> _T:
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return function(*args, **kwargs)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
