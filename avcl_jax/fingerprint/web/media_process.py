"""A process that reads media which somebody sent: hostile or broken ones end it, not the server.

A decoder that hangs in C hears nobody and cannot be stopped inside its process, and one that
crashes takes its process along. The process waits for one call after the other, so that a call
costs no start; after an end, the next call starts another.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import resource
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, ParamSpec, TypeVar

from avcl_jax.data.media_error import MediaError

_P = ParamSpec("_P")
_T = TypeVar("_T")
# Address space: as of a worker that prepares media (data_prep/pool.py), of which 8K films take
# five. A picture 48 high and a thousand times as wide takes any amount.
_BYTES = 8 << 30


class MediaProcessError(Exception):
    """A call that did not come to its end; the message says why."""


def _serve(connection: Connection) -> None:
    """Runs in the process: does what it is sent until the server is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C is the server's to handle
    # The system's own way to end a process needs nothing of what may hang in it, and works also
    # when the server was killed meanwhile.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            limit_seconds, function, arguments, options = connection.recv()
            signal.setitimer(signal.ITIMER_REAL, limit_seconds)
            answer: tuple[bool, Any]
            try:
                answer = True, function(*arguments, **options)
            except MediaError as error:
                answer = False, error
            except MemoryError:
                answer = False, _too_large()
            signal.setitimer(signal.ITIMER_REAL, 0)
            try:
                connection.send(answer)
            except MemoryError:  # it is sent as one piece, made before any of it is written
                connection.send((False, _too_large()))


def _too_large() -> MediaError:
    return MediaError("too_large", f"more than {_BYTES >> 30} GB of memory are needed")


class MediaProcess:
    """Calls functions, one at a time, in a process with an end to its time and its memory."""

    def __init__(self, limit_seconds: float):
        """Starts nothing yet.

        Args:
            limit_seconds: that one call may take.
        """
        self._limit_seconds = limit_seconds
        # Nothing is inherited: a fork of a process with threads may hang in the child.
        self._context = multiprocessing.get_context("spawn")
        self._running: tuple[Any, Connection] | None = None
        self._closed = False

    def start(self) -> None:
        """Starts the process, unless it runs, so that the first call need not wait for it."""
        if self._running is not None and self._running[0].is_alive():
            return
        self._end()
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()  # so that its end closes the pipe
        self._running = process, ours
        if self._closed:
            process.kill()

    def call(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Returns what the function returns.

        Args:
            function: of a module, which the process imports; it may raise MediaError.
            args: of it.
            kwargs: of it.

        Raises:
            MediaError: as the function, and if it needs too much memory.
            MediaProcessError: if it was not done in time, or ended the process.
        """
        self.start()
        assert self._running is not None
        process, connection = self._running
        try:
            connection.send((self._limit_seconds, function, args, kwargs))
            good, value = connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            process.join()
            raise self._why(process.exitcode) from None
        if good:
            return value
        raise value

    def close(self) -> None:
        """Ends the process, whatever it is at, and starts no other; from any thread."""
        self._closed = True
        if self._running is not None:
            self._running[0].kill()

    def _end(self) -> None:
        if self._running is not None:
            process, connection = self._running
            process.join()
            connection.close()

    def _why(self, code: int) -> Exception:
        if code >= 0:
            return RuntimeError(f"the process that reads media ended with {code}")
        if -code == signal.SIGALRM:
            return MediaProcessError(
                f"reading it takes longer than {self._limit_seconds:g} s, the --max-decode-seconds"
            )
        return MediaProcessError(f"the decoder ended with {signal.Signals(-code).name}")
