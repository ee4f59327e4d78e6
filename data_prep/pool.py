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
from typing import Any

from etils import epath

from avcl_jax.data.tfrecord import RecordError
from data_prep.manifest import Entry, PrepareError
from data_prep.shards import Job, prepare_part

# A decoder that meets a bug ends with one of these. Any other signal comes from outside: SIGKILL
# for instance when memory runs out, and then the file is not to blame.
_CRASHES = frozenset(
    {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSYS}
)
# Address space of a worker, of which Python and FFmpeg take one gigabyte and 8K films four more. A
# damaged index of half a megabyte was seen to make FFmpeg take 0.9 GB.
_WORKER_BYTES = 8 << 30
_KEPT = "finished shards are kept: run the same command again to go on"


def describe_os_error(error: OSError, directory: epath.PathLike) -> str:
    """Returns one line for a person whose results cannot be written to `directory`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        what = "the disk is full: free some space"
    else:
        # Without a name it is what was being written.
        ours = str(error.filename or directory).startswith(str(directory))
        what = f"cannot {'write' if ours else 'read'}: {error.strerror or error}"
    return f"{what} ({error.filename or directory}); {_KEPT}"


@dataclasses.dataclass
class _Task:
    job: Job
    skip: dict[int, tuple[str, str]]


@dataclasses.dataclass
class _Worker:
    process: Any
    connection: Connection
    task: _Task | None
    current: int  # number of the entry being prepared
    since: float  # when it began


def _work(connection: Connection) -> None:
    """Runs in the worker: does one job after another until told None, or the parent is gone."""
    try:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError, EOFError):
            _serve(connection)
    finally:
        # It ends anyway: told to meanwhile, Python would print where in its last steps it was.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _serve(connection: Connection) -> None:
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
                task.job, skip=task.skip, begin=lambda number: connection.send(("begin", number))
            )
        except (BrokenPipeError, ConnectionResetError):
            raise
        except OSError as error:
            connection.send(("failed", describe_os_error(error, task.job.directory)))
            return
        except RecordError as error:
            connection.send(("failed", f"{error}, or use --overwrite"))
            return
        except MemoryError:
            connection.send(("failed", f"out of memory: use fewer --workers; {_KEPT}"))
            return
        connection.send(("finished", len(task.job.part.entries)))


class Pool:
    """Prepares parts in worker processes.

    A clip whose decoder crashes or hangs is rejected and its part started again without it. A
    worker that is killed from outside, or that cannot write, ends the whole preparation.
    """

    def __init__(
        self, *, workers: int, timeout_seconds: float, progress: Callable[[Entry, int], None]
    ):
        """Starts nothing yet.

        Args:
          workers: Processes, at least 1.
          timeout_seconds: For one clip.
          progress: Called with each clip that was just finished and 1; with -1 if it has to be
            done again.
        """
        self._timeout_seconds = timeout_seconds
        self._progress = progress
        self._num_workers = workers
        self._workers: list[_Worker] = []
        # Nothing is inherited: a fork of a process with threads may hang in the child.
        self._context = multiprocessing.get_context("spawn")

    def run(self, jobs: Sequence[Job]) -> None:
        """Does all jobs.

        Raises:
          PrepareError: If a worker is killed or cannot write.
        """
        tasks = deque(_Task(job, {}) for job in jobs)
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
        process = self._context.Process(target=_work, args=(theirs,), daemon=True)
        process.start()
        theirs.close()  # so that the worker's death closes the pipe
        ours.send(task)
        self._workers.append(_Worker(process, ours, task, -1, time.monotonic()))

    def _finished(self, worker: _Worker, last: int) -> None:
        """Counts the clips from the one that was begun last up to `last`."""
        assert worker.task is not None
        for number in range(max(worker.current, 0), last):
            self._progress(worker.task.job.part.entries[number], 1)

    def _receive(self, worker: _Worker, tasks: deque[_Task]) -> None:
        try:
            kind, value = worker.connection.recv()
        except (EOFError, ConnectionResetError):
            self._died(worker)
            return
        if kind == "failed":
            raise PrepareError(value)
        self._finished(worker, value)
        if kind == "begin":
            worker.current, worker.since = value, time.monotonic()
            return
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
            doing = f" while preparing {worker.task.job.part.entries[worker.current].path!r}"
        hint = ""
        if code == -signal.SIGKILL:
            hint = "if memory ran out, use fewer --workers; "
        raise PrepareError(f"a worker {what}{doing}; {hint}{_KEPT}")

    def _restart(self, worker: _Worker, reason: str, message: str) -> None:
        """Ends a worker and starts its part again, without the clip that it was at."""
        task = worker.task
        assert task is not None
        task.skip[worker.current] = (reason, message)
        for entry in task.job.part.entries[: worker.current]:  # they are counted again
            self._progress(entry, -1)
        self._workers.remove(worker)
        _end(worker)
        _remove_temporary(worker)
        self._start(task)

    def _stop(self) -> None:
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            _end(worker)
            _remove_temporary(worker)
        self._workers.clear()


def _remove_temporary(worker: _Worker) -> None:
    if worker.task is not None:
        for path in list(worker.task.job.directory.glob(f"*.{worker.process.pid}.tmp")):
            path.unlink(missing_ok=True)


def _end(worker: _Worker) -> None:
    """Asks, waits, then kills: a decoder that hangs in C never sees the request."""
    with contextlib.suppress(OSError):
        worker.connection.close()
    worker.process.terminate()
    worker.process.join(2.0)
    if worker.process.is_alive():
        worker.process.kill()
        worker.process.join()
