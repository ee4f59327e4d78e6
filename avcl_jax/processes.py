"""Processes of a run: joining the others, and stopping together.

A run that a signal stops saves, and exits with `STOPPED`: the same command resumes it.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from avcl_jax.errors import UserError, one_line

# EX_TEMPFAIL of sysexits.h: nothing is wrong, try again.
STOPPED = 75
_BLOCK = 1024
_SAME_SIGNAL_SECONDS = 2.0


def join(
    coordinator: str | None,
    count: int | None,
    number: int | None,
    *,
    timeout_seconds: int,
    heartbeat_seconds: float,
) -> Any:
    """Joins the other processes of the run, and says every minute that it waits for them.

    Args:
        coordinator: HOST:PORT of process 0; it, `count` and `number` are found on TPU pods and
            SLURM if they are None.
        timeout_seconds: time until every process must have joined.
        heartbeat_seconds: time after which JAX aborts because a process is gone.

    Returns:
        The client of JAX's coordinator.

    Raises:
        UserError: if the processes cannot be found from the arguments.
        SystemExit: with code 1 after one line, if a process has not joined in time.
    """
    joined = threading.Event()
    place = f"process {number} of {count}" if count is not None else "this process"
    where = coordinator or "the coordinator of the cluster"

    def watch() -> None:
        waited = 0
        while not joined.wait(min(60, timeout_seconds - waited)):
            waited += 60
            line = f"{place} has waited {waited} s at {where} for the others"
            if waited >= timeout_seconds:
                # JAX would abort with frames of C++ after the same time.
                line = f"avcl_jax: error: {place} waited {timeout_seconds} s at {where}, and not "
                line += "all processes have joined: start every one, or see their logs"
                print(line, file=sys.stderr, flush=True)
                os._exit(1)
            print(line, flush=True)

    # Stopping is ours: by any signal, in any process.
    jax.config.update("jax_enable_preemption_service", False)
    threading.Thread(target=watch, daemon=True).start()
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            number,
            initialization_timeout=timeout_seconds + 60,
            heartbeat_timeout_seconds=round(heartbeat_seconds),
        )
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(
            f"this process cannot join others ({one_line(error)}): give --coordinator=HOST:PORT, "
            "--num_processes and --process_id, or --distributed alone on a TPU pod or in SLURM"
        ) from error
    finally:
        joined.set()
    # Collectives of CPUs connect when they first run, and then wait only 30 seconds for a process
    # that is late: those that all helpers of JAX share connect now.
    multihost_utils.sync_global_devices("joined")
    from orbax.checkpoint import multihost  # here, because it takes half a second to import

    return multihost.get_jax_distributed_client()


def gather(value: Any) -> list[Any]:
    """Returns the JSON value of every process, by its number; every process calls it."""
    if jax.process_count() == 1:
        return [value]
    text = json.dumps(value).encode()
    size = int(multihost_utils.process_allgather(np.array(len(text))).max())
    size = -(-size // _BLOCK) * _BLOCK  # each size is a program to compile
    padded = np.frombuffer(text.ljust(size), np.uint8)
    rows = multihost_utils.process_allgather(padded).reshape(-1, size)
    return [json.loads(row.tobytes()) for row in rows]


def check_same(facts: Mapping[str, object]) -> None:
    """Compares facts with those of the other processes; every process calls it.

    Raises:
        UserError: naming what differs from process 0 and how; raised in every process.
    """
    first, *others = gather({name: str(value) for name, value in facts.items()})
    lines = [
        f"{name} is {first.get(name)} in process 0 and {other.get(name)} in process {number}"
        for number, other in enumerate(others, 1)
        for name in sorted(first.keys() | other.keys())
        if first.get(name) != other.get(name)
    ]
    if lines:
        raise UserError(
            f"processes of one run differ: {'; '.join(lines)}. Start all by the same command from "
            "the same code"
        )


class Stopped(Exception):
    """A run that saved because a process was asked to stop; the same command resumes it."""


class StopRequest:
    """Signals that asked this process to stop, or for a profile.

    Attributes:
        name: "SIGTERM" or "SIGINT"; None before.
        profile: SIGUSR1 asked for a profile that has not begun.
    """

    name: str | None = None
    profile: bool = False


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Yields a request that SIGTERM or SIGINT fills; a second signal ends the process at once.

    A SIGTERM within two seconds of the first is the same one: `timeout` signals a process and then
    its group. SIGUSR1 asks for a profile.

    Signals are read by a thread, because the main thread may wait in a step for processes that no
    longer exist, where it runs no handler. Only the main thread may enter.
    """
    request = StopRequest()
    read, write = socket.socketpair()
    write.setblocking(False)

    def watch() -> None:
        since = 0.0
        for number in iter(lambda: read.recv(1), b""):
            name = signal.Signals(number[0])
            if name == signal.SIGUSR1:
                request.profile = True
            if name not in (signal.SIGTERM, signal.SIGINT):
                continue
            now, first = time.monotonic(), request.name is None
            request.name = request.name or name.name
            if not first and name == signal.SIGTERM and now - since < _SAME_SIGNAL_SECONDS:
                continue
            since = now
            does = "saves after this step; a second signal ends at once"
            does = does if first else "second signal, ends without saving"
            print(f"avcl_jax: {name.name}: {does}", file=sys.stderr, flush=True)
            if not first:
                os._exit(128 + name)

    def nothing(*_: object) -> None:
        """Keeps the default action away; the thread acts."""

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    old = {number: signal.signal(number, nothing) for number in numbers}
    old_fd = signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield request
    finally:
        signal.set_wakeup_fd(old_fd)
        for number, handler in old.items():
            signal.signal(number, handler)
        write.close()  # which ends the thread
        thread.join()
        read.close()


class Agreement:
    """Decision of all processes of a run to stop after the same step.

    One process decides at once. Several vote in every step, and read the votes of `delay` steps
    before, which have arrived: so all read the same, and none waits for it.
    """

    def __init__(self, rows: NamedSharding, *, delay: int):
        """Agrees over the mesh of `rows`, the sharding of a batch."""
        self._rows, self._delay = rows, delay
        self._votes: collections.deque[jax.Array] = collections.deque()
        self._any = jax.jit(jnp.any, out_shardings=NamedSharding(rows.mesh, PartitionSpec()))

    def stop(self, wanted: bool) -> bool:
        """Returns whether to stop after this step; called once per step by every process."""
        if jax.process_count() == 1:
            return wanted
        votes = np.full(jax.local_device_count(), wanted)
        self._votes.append(self._any(jax.make_array_from_process_local_data(self._rows, votes)))
        return len(self._votes) > self._delay and bool(self._votes.popleft())
