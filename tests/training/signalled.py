"""Runs `avcl_jax.main`, which signals itself as a step begins.

    python -m tests.training.signalled SIGTERM,SIGINT 0,1 5 --config=... --workdir=...

The signals, the numbers of the processes that send them to themselves, and the step, or "compiles".
From outside no step can be hit: a run is ahead of the lines that were read of it, and on a slow
machine it has ended before a signal arrives.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any
from unittest import mock

import jax
from absl import app

from avcl_jax import main, peers, processes
from tests.training.small import descendants

_doing = peers.doing


def run(names: str, numbers: str, moment: str, arguments: list[str]) -> None:
    """Runs main; a signal that it handles has been read before the step goes on.

    A second SIGTERM is that of `timeout`, however long this process takes to send it.
    """
    noted = threading.Event()

    def note(request: Any, name: str, value: Any) -> None:
        object.__setattr__(request, name, value)
        noted.set()

    def doing(what: str, step: int) -> None:
        _doing(what, step)
        now = what if what == "compiles" else str(step + 1) if what == peers.STEPS else ""
        if now != moment or str(jax.process_index()) not in numbers.split(","):
            return
        print(f"signalled: {names}", flush=True)
        for name in names.split(","):
            number = signal.Signals[name]
            if number in (signal.SIGKILL, signal.SIGSTOP):
                os.kill(os.getpid(), number)
            else:  # to the data workers and the copier of the log too, as from SLURM
                noted.clear()
                for process in (*descendants(os.getpid()), os.getpid()):
                    os.kill(process, number)
                noted.wait()

    with (
        mock.patch.object(peers, "doing", doing),
        mock.patch.object(processes.StopRequest, "__setattr__", note, create=True),
        mock.patch.object(processes, "_SAME_SIGNAL_SECONDS", float("inf")),
    ):
        app.run(main.main, ["main", *arguments], flags_parser=main.parse_flags)


if __name__ == "__main__":
    run(*sys.argv[1:4], sys.argv[4:])
