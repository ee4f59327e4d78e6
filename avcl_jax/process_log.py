"""Copies what a process prints to its terminal and into its log.

A process of its own, because the C++ of JAX prints too, also while it aborts: where the coordinator
is gone, the terminal gets one line for some 80 lines of stack frames, which the log keeps. Imports
the standard library only.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
from pathlib import Path

_ABORTS = b"Terminating process because the JAX distributed service detected fatal errors"
_IN_SHORT = (
    b"avcl_jax: error: process 0, the coordinator, is gone or has given up this process: see their "
    b"logs\n"
)
_ONLY_LOGGED = (b"coordination_service", b"[Gloo] Rank")


class ProcessLog:
    """Standard output and error of this process, copied into a file by another process."""

    def __init__(self, path: Path, *, title: str):
        """Starts to copy.

        Args:
            path: file to append to, in WORKDIR/logs; written as soon as WORKDIR is there.
            title: first line of this start.
        """
        pipes = os.pipe(), os.pipe()
        readers = [str(reader) for reader, _ in pipes]
        # A signal to all processes of a terminal or job is not for it. Blocked signals stay blocked
        # in a process that is started now: it would die of one that comes as it starts.
        signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        try:
            self._copier = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, str(path), title, *readers],
                pass_fds=[reader for reader, _ in pipes],
                start_new_session=True,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        sys.stdout.flush()
        for descriptor, (reader, writer) in enumerate(pipes, 1):
            os.dup2(writer, descriptor)
            os.close(reader)
            os.close(writer)

    def close(self) -> None:
        """Waits at most 10 seconds until everything is copied; nothing can be printed after it."""
        sys.stdout.flush()
        sys.stderr.flush()
        os.close(1)
        os.close(2)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._copier.wait(10)


def _copy(path: Path, title: str, readers: list[int]) -> None:
    selector = selectors.DefaultSelector()
    for target, reader in enumerate(readers, 1):
        selector.register(reader, selectors.EVENT_READ, target)
    unread: set[int] = set()
    rest, aborts, log = {reader: b"" for reader in readers}, False, title.encode() + b"\n"
    while selector.get_map():
        for key, _ in selector.select(1.0 if log else None):
            if not (block := os.read(key.fd, 1 << 16)):
                selector.unregister(key.fd)
                block = b"\n" if rest[key.fd] else b""
            *lines, rest[key.fd] = (rest[key.fd] + block).split(b"\n")
            for line in lines:
                log += line + b"\n"
                if key.data == 2 and (aborts or _ABORTS in line):
                    shown = b"" if aborts else _IN_SHORT
                    aborts = True
                else:
                    shown = b"" if any(word in line for word in _ONLY_LOGGED) else line + b"\n"
                shown = b"" if key.fd in unread else shown
                try:
                    while shown:
                        shown = shown[os.write(key.data, shown) :]
                except BrokenPipeError:  # nobody reads: the process ends when it next prints
                    unread.add(key.fd)
        for reader in unread & selector.get_map().keys():
            selector.unregister(reader)
            os.close(reader)
        # A full disk, or WORKDIR has just been removed by a run that was refused: tried again, for
        # without this process the other one could not print.
        with contextlib.suppress(OSError):
            if log and path.parent.parent.is_dir():
                path.parent.mkdir(exist_ok=True)
                with path.open("ab", buffering=0) as file:
                    log = log[file.write(log) :]


if __name__ == "__main__":
    _copy(Path(sys.argv[1]), sys.argv[2], [int(reader) for reader in sys.argv[3:]])
