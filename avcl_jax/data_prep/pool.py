"""Workers that prepare parts: local processes that may crash or hang, or Apache Beam."""

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

from avcl_jax.data.record_files import RecordError
from avcl_jax.data_prep.manifest import PrepareError
from avcl_jax.data_prep.shards import Part, prepare_part, remove_temporary
from avcl_jax.errors import is_of_store, one_line

# Signals that end a decoder with a bug. Any other signal comes from outside: SIGKILL for instance
# when memory runs out, and then the file is not to blame.
_CRASHES = frozenset(
    {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSYS}
)
# Address space of a worker: Python and FFmpeg take one gigabyte of it, 8K videos four more. A
# damaged index of half a megabyte was seen to make FFmpeg take 0.9 GB.
_WORKER_BYTES = 8 << 30
# Nothing is inherited: a fork of a process with threads may hang in the child.
_CONTEXT = multiprocessing.get_context("spawn")
_KEPT = "finished shards are kept: run the same command again to resume"


def describe_os_error(error: OSError, directory: epath.PathLike) -> str:
    """Returns one line for a person whose results cannot be written to `directory`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        what = "the disk is full: free some space"
    else:
        # Without a name it is the file being written.
        ours = str(error.filename or directory).startswith(str(directory))
        what = f"cannot {'write' if ours else 'read'}: {error.strerror or error}"
    return f"{what} ({error.filename or directory}); {_KEPT}"


@dataclasses.dataclass
class _Worker:
    process: Any
    connection: Connection
    part: Part
    current: int = -1  # number of the entry being prepared
    since: float = 0.0  # when it began

    def end(self) -> None:
        """Asks, waits, then kills: a decoder that hangs in C never sees the request."""
        with contextlib.suppress(OSError):
            self.connection.close()
        self.process.terminate()
        self.process.join(2.0)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        remove_temporary(self.part.directory, self.process.pid)


def _work(connection: Connection) -> None:
    """Runs in the worker: prepares one part after another until told None, or the parent ends."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)  # an exception, so that temporary files go

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, stop)
    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (_WORKER_BYTES, most))
    try:
        while (part := connection.recv()) is not None:
            connection.send(_attempt(part, connection))
    except (BrokenPipeError, ConnectionResetError, EOFError):
        pass  # the parent is gone
    finally:
        # It ends anyway: interrupted meanwhile, Python would print a traceback of its last steps.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _attempt(part: Part, connection: Connection) -> tuple[str, Any]:
    """Prepares a part; returns "finished" and its clips, or "failed" and the reason."""
    try:
        prepare_part(part, lambda number: connection.send(("begin", number)))
    except (BrokenPipeError, ConnectionResetError):
        raise
    except OSError as error:
        return "failed", describe_os_error(error, part.directory)
    except RecordError as error:
        return "failed", f"{error}, or use --overwrite"
    except MemoryError:
        return "failed", f"out of memory: use fewer --workers; {_KEPT}"
    except Exception as error:
        if not is_of_store(error):
            raise
        return "failed", one_line(error)
    return "finished", len(part.entries)


@dataclasses.dataclass
class Pool:
    """Prepares parts in worker processes.

    A clip whose decoder crashes or hangs is rejected and its part started again without it. A
    worker that is killed from outside, or that cannot write, ends the whole preparation.
    """

    workers: int  # processes
    timeout_seconds: float  # for one clip
    progress: Callable[[int], object]  # takes finished clips, below 0 those to be done again
    _workers: list[_Worker] = dataclasses.field(default_factory=list)

    def run(self, parts: Sequence[Part]) -> None:
        """Prepares all parts; raises PrepareError if a worker is killed or cannot write."""
        waiting = deque(parts)
        try:
            for _ in range(min(self.workers, len(waiting))):
                self._start(waiting.popleft())
            while self._workers:
                connections = [worker.connection for worker in self._workers]
                ready = wait(connections, timeout=min(1.0, self.timeout_seconds))
                for worker in [w for w in self._workers if w.connection in ready]:
                    self._receive(worker, waiting)
                late = time.monotonic() - self.timeout_seconds
                for worker in [w for w in self._workers if w.current >= 0 and w.since < late]:
                    if worker.connection.poll():  # it has gone on, which this process reads late
                        continue
                    message = f"not finished after {self.timeout_seconds:g} s"
                    self._restart(worker, "timeout", message)
        finally:
            for worker in self._workers:
                worker.process.terminate()
            for worker in self._workers:
                worker.end()
            self._workers.clear()

    def _start(self, part: Part) -> None:
        ours, theirs = _CONTEXT.Pipe()
        process = _CONTEXT.Process(target=_work, args=(theirs,), daemon=True)
        process.start()
        theirs.close()  # so that the worker's death closes the pipe
        ours.send(part)
        self._workers.append(_Worker(process, ours, part))

    def _receive(self, worker: _Worker, waiting: deque[Part]) -> None:
        try:
            kind, value = worker.connection.recv()
        except (EOFError, ConnectionResetError):
            self._died(worker)
            return
        if kind == "failed":
            raise PrepareError(value)
        self.progress(value - max(worker.current, 0))
        worker.current, worker.since = value if kind == "begin" else -1, time.monotonic()
        if kind == "finished":
            worker.connection.send(waiting[0] if waiting else None)
            if waiting:
                worker.part = waiting.popleft()
            else:
                worker.process.join()
                worker.connection.close()
                self._workers.remove(worker)

    def _died(self, worker: _Worker) -> None:
        worker.process.join()
        code = worker.process.exitcode
        if worker.current >= 0 and -code in _CRASHES:
            message = f"the decoder ended with {signal.Signals(-code).name}"
            self._restart(worker, "crashed", message)
            return
        what = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        if worker.current >= 0:
            what += f" while preparing {worker.part.entries[worker.current].path!r}"
        hint = "if memory ran out, use fewer --workers; " if code == -signal.SIGKILL else ""
        raise PrepareError(f"a worker {what}; {hint}{_KEPT}")

    def _restart(self, worker: _Worker, reason: str, message: str) -> None:
        """Ends a worker and starts its part again, without the clip that it was at."""
        self._workers.remove(worker)
        worker.end()
        self.progress(-worker.current)  # they are counted again
        skip = {**worker.part.skip, worker.current: (reason, message)}
        self._start(dataclasses.replace(worker.part, skip=skip))


def run_on_beam(
    parts: Sequence[Part], runner: str, options: Sequence[str], *, timeout_seconds: float
) -> None:
    """Prepares all parts on Apache Beam, in a directory that all workers see.

    Each part is one element of the pipeline, and runs in a `Pool` of one process: a clip whose
    decoder crashes or hangs is rejected as on one machine, and the shards are the same bytes.

    Raises PrepareError if Beam is not installed, does not know the runner, or the pipeline fails.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise PrepareError(
            f"--runner={runner} needs Apache Beam: pip install 'avcl-jax[beam]'"
        ) from error
    flags = [f"--runner={runner}", *(f"--{option}" for option in options)]
    try:
        with beam.Pipeline(options=PipelineOptions(flags)) as pipeline:
            elements: Any = pipeline | "Parts" >> beam.Create(list(parts))
            # Else a runner may fuse all parts onto the worker that lists them.
            spread = elements | "Spread" >> beam.Reshuffle()
            spread | "Prepare" >> beam.Map(_prepare_on_beam, timeout_seconds)
    except Exception as error:  # runners raise what they like
        # They wrap errors into pages of text.
        last = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise PrepareError(f"the Beam pipeline failed: {last}") from error


def _prepare_on_beam(part: Part, timeout_seconds: float) -> int:
    """Runs on a worker of the runner; returns the number of clips."""
    Pool(workers=1, timeout_seconds=timeout_seconds, progress=lambda count: None).run([part])
    return len(part.entries)
