"""The loop of pretraining and fine-tuning: step, log one step late, save, stop when asked."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding

from avcl_jax import peers
from avcl_jax.data.pipeline import to_device_batch
from avcl_jax.errors import UserError
from avcl_jax.processes import Agreement, Stopped, StopRequest, gather
from avcl_jax.training.averages import Metrics, merge_metrics
from avcl_jax.training.checkpoint import Checkpoints, Progress, SaveError
from avcl_jax.training.metrics import MetricWriter, format_seconds, memory_gb
from avcl_jax.training.profiler import Profiler
from avcl_jax.training.state import TrainState

# Steps dispatched ahead of the device. More would only queue batches in memory.
STEPS_AHEAD = 2
# A process that is gone is noticed otherwise.
_A_DAY = 24 * 60 * 60


class NonFiniteError(UserError):
    """A loss, metric or gradient stopped being a number.

    Attributes:
        steps: first and last step of the log period.
    """

    def __init__(self, line: str, steps: tuple[int, int]):
        """Describes the error in one line."""
        super().__init__(line)
        self.steps = steps


@dataclasses.dataclass
class _Period:
    """Metrics and times gathered since the last log line."""

    first_step: int
    metrics: Metrics | None = None
    data_seconds: float = 0.0
    step_seconds: list[float] = dataclasses.field(default_factory=list)
    started: float = dataclasses.field(default_factory=time.perf_counter)


class CompiledTogether:
    """Jitted function that no process calls before all have compiled it.

    Hosts compile at different speeds, or find the program in a cache; `processes.join` says why
    none may start early.
    """

    def __init__(self, function: Any):
        """Compiles nothing yet."""
        self._function, self._program = function, None

    def program(self, *arguments: Any) -> Any:
        """Returns the program for arguments of these shapes, compiled by the first call."""
        if self._program is None:
            self._program = self._function.lower(*arguments).compile()
            everyone = set(range(jax.process_count()))
            ocp.multihost.sync_global_processes("compiled", processes=everyone, timeout=_A_DAY)
        return self._program


def run_steps(
    state: TrainState,
    train_step: CompiledTogether,
    batches: Iterator[dict[str, np.ndarray]],
    *constants: jax.Array,
    rows: NamedSharding,
    request: StopRequest,
    steps: int,
    log_every: int,
    checkpoint_every: int,
    clips_per_step: int,
    progress: Progress,
    checkpoints: Checkpoints,
    writer: MetricWriter,
    profiler: Profiler,
    more_values: Callable[[], Mapping[str, float]] = dict,
    more_progress: Callable[[], Mapping[str, Any]] = dict,
) -> TrainState:
    """Trains from `progress.step` to `steps`, and saves while it trains.

    Args:
        state: donated.
        train_step: function `(state, batch, *constants) -> (state, metrics)`; its metrics are
            averages, `loss` among them.
        batches: local rows, from the first step to be taken.
        rows: sharding of a batch.
        request: asks all processes to stop; they save first.
        steps: steps of the whole run; after the last a checkpoint is saved.
        log_every: steps between lines of metrics.
        checkpoint_every: steps between checkpoints.
        clips_per_step: clips of the global batch, for the speed that is logged.
        progress: progress of the run, saved with its fingerprint in every checkpoint.
        profiler: told before and after each step.
        more_values: returns further values of a log line.
        more_progress: returns further fields of the progress that a checkpoint contains.

    Returns:
        The state after the last step.

    Raises:
        NonFiniteError: within one log period of the first value that is not finite.
        SaveError: if the last checkpoint cannot be written, or one of several processes.
        Stopped: after saving, if a process was asked to stop before the last step.
    """
    first, before = progress.step, progress.train_seconds
    merge = jax.jit(merge_metrics)
    start = time.perf_counter()
    in_flight: collections.deque[Any] = collections.deque()
    period = _Period(first + 1)
    pending: tuple[int, _Period, float] | None = None
    unsaved: tuple[TrainState, Progress] | None = None
    agreement = Agreement(rows, delay=STEPS_AHEAD)

    def trained_seconds() -> float:
        return before + time.perf_counter() - start

    def attempt(saving: Callable[[], None], *, must: bool) -> None:
        """Saves or waits; without a checkpoint training continues, unless it must have one."""
        try:
            saving()
        except SaveError as error:
            # Of several processes one alone may have failed.
            if must or jax.process_count() > 1:
                raise
            writer.note(f"{error}; training continues")

    def save(copied: TrainState, reached: Progress, *, must: bool) -> None:
        """Begins a checkpoint, once the metrics of its step are known to be finite."""
        peers.doing("saves", reached.step)
        writer.flush()  # no metrics of steps before a checkpoint may be lost
        attempt(checkpoints.finish, must=False)  # the one before
        attempt(functools.partial(checkpoints.save, copied, reached), must=must)

    def report(last: int, done: _Period, ended: float) -> None:
        """Reads the metrics of a finished period, which waits for the device."""
        assert done.metrics is not None
        values = {
            name: float(metric.compute())
            for name, metric in jax.device_get(done.metrics).items()
            if metric.count > 0
        }
        seconds = max(ended - done.started, 1e-9)
        taken = last - done.first_step + 1
        values["steps_per_second"] = taken / seconds
        values["clips_per_second"] = clips_per_step * taken / seconds
        own = {"data_wait_share": done.data_seconds / seconds}
        for percent in (50, 95):
            own[f"step_seconds_p{percent}"] = float(np.percentile(done.step_seconds, percent))
        own |= memory_gb()
        values |= {**own, "train_seconds": before + ended - start, **more_values()}
        hosts: list[dict[str, Any]] = []
        if jax.process_count() > 1:
            hosts = gather({"host": socket.gethostname()} | own)
        left = (steps - last) * seconds / taken
        writer.write(last, values, seconds_left=left, hosts=hosts)
        if broken := sorted(name for name, value in values.items() if not math.isfinite(value)):
            attempt(checkpoints.finish, must=False)
            broken.sort(key=lambda name: name != "loss")
            others = f" and {len(broken) - 3} others" if len(broken) > 3 else ""
            raise NonFiniteError(
                f"not finite between steps {done.first_step} and {last}: "
                f"{', '.join(broken[:3])}{others}; "
                f"{checkpoints.kept()}. Lower optimizer.learning_rate or optimizer.clip_norm, or "
                "look at the data of these steps",
                (done.first_step, last),
            )

    for step in range(first + 1, steps + 1):
        profiler.before(step)
        waiting = time.perf_counter()
        peers.doing(peers.READS, step - 1)
        batch = next(batches)
        period.data_seconds += time.perf_counter() - waiting
        on_device = to_device_batch(batch, rows)
        if step == first + 1:
            peers.doing("compiles", step - 1)
            program = train_step.program(state, on_device, *constants)
        peers.doing(peers.STEPS, step - 1)
        state, metrics = program(state, on_device, *constants)
        in_flight.append(metrics["loss"].total)
        period.metrics = metrics if period.metrics is None else merge(period.metrics, metrics)
        if len(in_flight) > STEPS_AHEAD:
            jax.block_until_ready(in_flight.popleft())
        profiler.after(in_flight[-1])
        period.step_seconds.append(time.perf_counter() - waiting)
        if pending is not None:  # Read one step late, while this step runs.
            report(*pending)
            pending = None
        if unsaved is not None:
            save(*unsaved, must=False)
            unsaved = None
        attempt(functools.partial(checkpoints.finish, wait=False), must=False)
        last_step = step == steps
        stopping = agreement.stop(request.name is not None)
        saving = last_step or stopping or step % checkpoint_every == 0
        if step % log_every == 0 or saving:
            pending = (step, period, time.perf_counter())
            period = _Period(step + 1)
        if saving:
            # The next step runs while this is copied, and waits for no one.
            where = jax.tree.map(lambda leaf: leaf.sharding, state)
            copied = jax.device_put(state, where, may_alias=False)
            reached = dataclasses.replace(
                progress, step=step, train_seconds=trained_seconds(), **more_progress()
            )
            unsaved = copied, reached
        if (last_step or stopping) and pending and unsaved:
            jax.block_until_ready(state)
            report(*pending[:2], time.perf_counter())
            save(*unsaved, must=True)
            checkpoints.finish()
        if stopping and not last_step:
            line = f"stopped at step {step} by {request.name or 'another process'} after saving"
            seconds = format_seconds(trained_seconds())
            writer.note(f"{line}, {seconds}; the same command resumes from here")
            raise Stopped
    peers.doing("has trained", step)
    writer.note(f"trained to step {step} in {format_seconds(trained_seconds())}")
    return state
