"""The processes of a run watch each other: if one is gone or hangs, all end and name it.

A collective waits for a process that is gone: for ever, or until it fails with a message that does
not name it. So a thread of each process writes a beat (its step, and what it does) into the
key-value store of JAX's coordinator, which is process 0, and reads the beats of the others.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import os
import socket
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import jax
from etils import epath

from avcl_jax.paths import is_remote
from avcl_jax.process_log import ProcessLog

# What a process does, as its beats tell it. These two must end within the timeout; compiling,
# saving and evaluating take as long as they take.
READS, STEPS = "has read no batch", "has ended no step"
_ENDED = "has ended"
_KEY = "avcl_jax/beats/"
_BEATS_PER_TIMEOUT = 24  # one in 5 seconds by default


@dataclasses.dataclass
class _Beat:
    """State of a process, as the others know it."""

    count: int = 0
    step: int = 0
    doing: str = ""
    failure: str = ""

    @property
    def over(self) -> bool:
        return bool(self.failure) or self.doing == _ENDED


class _Watch:
    """Threads that beat, and end this process when another is gone or a step does not end."""

    def __init__(self, workdir: epath.Path, client: Any, *, timeout_seconds: float):
        self._logs, self._client, self._timeout = workdir / "logs", client, timeout_seconds
        self._interval = timeout_seconds / _BEATS_PER_TIMEOUT
        self._number, count = 0, 1
        if client is not None:  # otherwise JAX starts later, after the config was checked
            self._number, count = jax.process_index(), jax.process_count()
        self.own = _Beat()
        self.idle_seconds = 0.0  # since `own` last changed
        self._others = {number: _Beat() for number in range(count) if number != self._number}
        # Since the beat of a process changed; that of this one when a beat reached the coordinator.
        self._silent_seconds = dict.fromkeys(range(count), 0.0)
        self._log = None
        if client is not None and not is_remote(workdir):  # files in a store cannot grow
            name = f"process_{self._number}.txt"
            title = f"--- process {self._number} of {count}, {socket.gethostname()}, {time.ctime()}"
            self._log = ProcessLog(Path(self._logs / name), title=title)
        self._told, self._left = threading.Event(), threading.Event()
        tasks = [self._run] if client is None else [self._run, self._beat]
        self._threads = [threading.Thread(target=task, daemon=True) for task in tasks]
        for thread in self._threads:
            thread.start()

    def leave(self) -> None:
        """Waits until the others have ended too, and stops to watch."""
        self.own.doing = _ENDED
        if self._client is not None:
            self._told.wait(4 * self._interval)
            self._await_others(float("inf"))
        self._left.set()
        for thread in self._threads:
            thread.join()

    def fail(self, line: str, bug: BaseException | None = None) -> None:
        """Prints the traceback of a bug, tells the others why this process fails, and ends it.

        Returns if it is alone.
        """
        self.own.failure = line
        if self._client is None:
            self._left.set()
            return
        if bug is not None:
            traceback.print_exception(bug)
        self._told.wait(4 * self._interval)
        if self._number == 0:
            # JAX aborts the others when the coordinator is gone: they have to read this, and end.
            self._await_others(4 * self._interval)
            time.sleep(self._interval)
        if self._log:
            self._log.close()
        os._exit(1)

    def await_verdict(self) -> None:
        """Waits until the thread has found which process is gone, and ends this one.

        Returns after the timeout if all are there, or at once if this process is alone.
        """
        end = time.monotonic() + self._timeout + 4 * self._interval
        while self._client is not None and (time.monotonic() < end or self.own.failure):
            time.sleep(self._interval)

    def _await_others(self, seconds: float) -> None:
        """Waits so long at most until all others have failed or ended."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not all(beat.over for beat in self._others.values()):
            time.sleep(self._interval / 4)

    def _beat(self) -> None:
        """Writes beats, and reads those of the others; waits if the coordinator does not answer."""
        while not self._left.wait(self._interval / 4):
            self.own.count += 1
            beat = dataclasses.replace(self.own)
            text = json.dumps(dataclasses.asdict(beat))
            try:
                self._client.key_value_set(f"{_KEY}{self._number}", text, allow_overwrite=True)
                found = dict(self._client.key_value_dir_get(_KEY))
            except jax.errors.JaxRuntimeError:
                return  # and after the timeout the coordinator is gone
            self._silent_seconds[self._number] = 0.0
            if beat.over:
                self._told.set()
            for number, before in self._others.items():
                beat = _Beat(**json.loads(found.get(f"{_KEY}{number}", "{}")))
                if beat.count != before.count:
                    self._others[number], self._silent_seconds[number] = beat, 0.0

    def _run(self) -> None:
        before, written = time.monotonic(), False
        while not self._left.wait(self._interval):
            # A process that was paused has waited for nobody.
            passed = min(time.monotonic() - before, 2 * self._interval)
            before = time.monotonic()
            self.idle_seconds += passed
            for number in self._silent_seconds:
                self._silent_seconds[number] += passed
            problem = self._problem_of_others() or self._own_problem()
            if problem and not written and not self.own.over:
                self._end(problem)
            written = bool(problem)

    def _problem_of_others(self) -> str | None:
        """Returns which other process is gone, in one line."""
        for number, beat in self._others.items():
            if beat.failure:
                # This process may be about to say the same of itself.
                self._left.wait(self._interval)
                return f"process {number} failed after step {beat.step}: {beat.failure}"
        if self._client is not None and self._silent_seconds[self._number] > self._timeout:
            return (
                f"process 0, the coordinator, has not answered for {self._timeout:g} s, after step "
                f"{self._others[0].step if self._number else self.own.step}; see its log"
            )
        for number, beat in self._others.items():
            if self._silent_seconds[number] > self._timeout and not beat.over:
                return (
                    f"process {number} has been silent for {self._timeout:g} s, after step "
                    f"{beat.step}; see its log"
                )
        return None

    def _own_problem(self) -> str | None:
        """Returns that this process hangs, and which one is the cause as far as known."""
        # Later than the silence of another, which explains more.
        seconds = self._timeout + 4 * self._interval
        if self.own.doing not in (READS, STEPS) or self.idle_seconds < seconds:
            return None
        beats = {**self._others, self._number: self.own}
        causes = [n for n, beat in sorted(beats.items()) if beat.doing == READS] or sorted(beats)
        return "; ".join(
            f"process {n} {beats[n].doing} for {seconds:.0f} s, after step {beats[n].step}"
            for n in causes
        )

    def _end(self, problem: str) -> None:
        """Writes all stacks and prints the problem; ends the process unless it is alone."""
        where = ""
        if self._logs.parent.exists():
            path = self._logs / f"stacks_{self._number}.txt"
            path.parent.mkdir(exist_ok=True)
            with tempfile.TemporaryFile("w+") as file:
                faulthandler.dump_traceback(file, all_threads=True)
                file.seek(0)
                path.write_text(file.read())
            where = f" (its threads now: {path})"
        word = "" if self._client is None else "error: "
        try:
            print(f"avcl_jax: {word}{problem}{where}", file=sys.stderr, flush=True)
        finally:  # also where nobody reads it any more
            if self._client is not None:
                self.fail(problem)


_watch: _Watch | None = None  # of this process, during a command


def start(workdir: epath.Path, client: Any, *, timeout_seconds: float) -> None:
    """Starts to watch the processes of this run; one that is alone watches its own steps.

    Args:
        workdir: its `logs` get what each process prints, and stacks_N.txt before one ends itself.
        client: connection to JAX's coordinator, or None if this process is alone.
        timeout_seconds: time without a beat of another process, or a batch or step of this one.
    """
    global _watch
    _watch = _Watch(workdir, client, timeout_seconds=timeout_seconds)


def doing(what: str, step: int) -> None:
    """Notes what this process does now, after which step."""
    if _watch is not None:
        _watch.own.doing, _watch.own.step, _watch.idle_seconds = what, step, 0.0


def leave() -> None:
    """Waits until all processes have come here, and stops watching."""
    global _watch
    if _watch is not None:
        _watch.leave()
    _watch = None


def fail(error: BaseException, line: str, *, bug: bool = False) -> None:
    """Ends this process if it has others, and tells them why in one line; returns if it is alone.

    The traceback of a bug is printed before. Where a collective failed because a process is gone,
    that one is named instead.
    """
    global _watch
    if _watch is not None:
        # JAX makes other exceptions of some codes of the runtime.
        if isinstance(error, jax.errors.JaxRuntimeError) or str(error).startswith("UNKNOWN: "):
            _watch.await_verdict()
        _watch.fail(line, bug=error if bug else None)
    _watch = None
