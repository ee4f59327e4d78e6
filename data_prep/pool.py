"""Worker processes that prepare parts, and what happens when one dies or hangs."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import multiprocessing
import resource
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from data_prep.clip import ClipOptions
from data_prep.manifest import PrepareError
from data_prep.shards import Part, prepare_part

# A decoder that meets a bug ends with one of these. Any other signal comes from outside: SIGKILL
# for instance when memory runs out, and then the file is not to blame.
_CRASHES = frozenset(
    {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSYS}
)
# Address space of a worker, of which Python and FFmpeg take one gigabyte and 8K films four more. A
# damaged index of half a megabyte was seen to make FFmpeg take 0.9 GB.
_WORKER_BYTES = 8 << 30
_KEPT = "finished shards are kept: run the same command again to go on"


def describe_os_error(error: OSError, directory: Path) -> str:
    """Returns one line for a person whose results cannot be written to `directory`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        what = "the disk is full: free some space"
    else:
        what = f"cannot write: {error.strerror or error}"
    return f"{what} ({error.filename or directory}); {_KEPT}"


@dataclasses.dataclass
class _Task:
    part: Part
    fingerprint: str
    skip: dict[int, tuple[str, str]]


@dataclasses.dataclass
class _Worker:
    process: Any
    connection: Connection
    task: _Task | None
    current: int  # number of the entry being prepared
    since: float  # when it began


def _work(connection: Connection, options: ClipOptions, directory: Path) -> None:
    """Runs in the worker: prepares one part after another until told None."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)  # an exception, so that temporary files go

    signal.signal(signal.SIGTERM, stop)
    resource.setrlimit(
        resource.RLIMIT_AS, (_WORKER_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1])
    )
    while (task := connection.recv()) is not None:
        try:
            prepare_part(
                task.part,
                options=options,
                directory=directory,
                part_fingerprint=task.fingerprint,
                skip=task.skip,
                begin=lambda number: connection.send(("begin", number)),
            )
        except BrokenPipeError:  # the parent is gone
            return
        except OSError as error:
            connection.send(("failed", describe_os_error(error, directory)))
            return
        except MemoryError:
            connection.send(("failed", f"out of memory: use fewer --workers; {_KEPT}"))
            return
        connection.send(("finished", len(task.part.entries)))


class Pool:
    """Prepares parts in worker processes.

    A clip whose decoder crashes or hangs is rejected and its part started again without it. A
    worker that is killed from outside, or that cannot write, ends the whole preparation.
    """

    def __init__(
        self,
        *,
        workers: int,
        options: ClipOptions,
        directory: Path,
        timeout_seconds: float,
        progress: Callable[[int], None],
    ):
        """Starts nothing yet.

        Args:
          workers: Processes, at least 1.
          options: For all clips.
          directory: Where parts go.
          timeout_seconds: For one clip.
          progress: Called with the number of clips that were just finished.
        """
        self._options = options
        self._directory = directory
        self._timeout_seconds = timeout_seconds
        self._progress = progress
        self._num_workers = workers
        self._workers: list[_Worker] = []
        # Nothing is inherited: a fork of a process with threads may hang in the child.
        self._context = multiprocessing.get_context("spawn")

    def run(self, parts: Sequence[tuple[Part, str]]) -> None:
        """Prepares all parts, given with their fingerprints.

        Raises:
          PrepareError: If a worker is killed or cannot write.
        """
        tasks = deque(_Task(part, fingerprint, {}) for part, fingerprint in parts)
        try:
            for _ in range(min(self._num_workers, len(tasks))):
                self._start(tasks.popleft())
            while self._workers:
                ready = wait(
                    [w.connection for w in self._workers], timeout=min(1.0, self._timeout_seconds)
                )
                for worker in [w for w in self._workers if w.connection in ready]:
                    self._receive(worker, tasks)
                for worker in list(self._workers):
                    self._check_time(worker)
        finally:
            self._stop()

    def _start(self, task: _Task) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_work, args=(theirs, self._options, self._directory), daemon=True
        )
        process.start()
        theirs.close()  # so that the worker's death closes the pipe
        ours.send(task)
        self._workers.append(_Worker(process, ours, task, -1, time.monotonic()))

    def _receive(self, worker: _Worker, tasks: deque[_Task]) -> None:
        try:
            kind, value = worker.connection.recv()
        except (EOFError, ConnectionResetError):
            self._died(worker)
            return
        if kind == "failed":
            raise PrepareError(value)
        if kind == "begin":
            if worker.current >= 0:
                self._progress(1)
            worker.current, worker.since = value, time.monotonic()
            return
        self._progress(1)
        worker.current, worker.since = -1, time.monotonic()
        worker.task = tasks.popleft() if tasks else None
        worker.connection.send(worker.task)
        if worker.task is None:
            worker.process.join()
            worker.connection.close()
            self._workers.remove(worker)

    def _check_time(self, worker: _Worker) -> None:
        if worker.current >= 0 and time.monotonic() - worker.since > self._timeout_seconds:
            self._restart(worker, "timeout", f"not finished after {self._timeout_seconds:g} s")

    def _died(self, worker: _Worker) -> None:
        worker.process.join()
        code = worker.process.exitcode
        if worker.current >= 0 and -code in _CRASHES:
            name = signal.Signals(-code).name
            self._restart(worker, "crashed", f"the decoder ended with {name}")
            return
        what = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        doing = ""
        if worker.task is not None and worker.current >= 0:
            doing = f" while preparing {worker.task.part.entries[worker.current].path!r}"
        hint = ""
        if code == -signal.SIGKILL:
            hint = "if memory ran out, use fewer --workers; "
        raise PrepareError(f"a worker {what}{doing}; {hint}{_KEPT}")

    def _restart(self, worker: _Worker, reason: str, message: str) -> None:
        """Ends a worker and starts its part again, without the clip that it was at."""
        task = worker.task
        assert task is not None
        task.skip[worker.current] = (reason, message)
        self._progress(-worker.current)  # they are counted again
        self._workers.remove(worker)
        _end(worker)
        self._remove_temporary(worker)
        self._start(task)

    def _remove_temporary(self, worker: _Worker) -> None:
        for path in self._directory.glob(f"*.{worker.process.pid}.tmp"):
            path.unlink(missing_ok=True)

    def _stop(self) -> None:
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            _end(worker)
            self._remove_temporary(worker)
        self._workers.clear()


def _end(worker: _Worker) -> None:
    """Asks, waits, then kills: a decoder that hangs in C never sees the request."""
    with contextlib.suppress(OSError):
        worker.connection.close()
    worker.process.terminate()
    worker.process.join(2.0)
    if worker.process.is_alive():
        worker.process.kill()
        worker.process.join()
