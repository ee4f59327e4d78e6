"""The loop of pretraining and fine-tuning: step, log one step late, save, stop when asked."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
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
from avcl_jax.processes import Agreement, Stopped, StopRequest
from avcl_jax.training.checkpoint import Checkpoints, Progress, SaveError
from avcl_jax.training.metrics import (
    Metrics,
    MetricWriter,
    format_seconds,
    merge_metrics,
    peak_memory_gb,
)
from avcl_jax.training.state import TrainState

# Steps dispatched ahead of the device. More would only queue batches in memory.
STEPS_AHEAD = 2
# A process that is gone is noticed otherwise.
_A_DAY = 24 * 60 * 60


class NonFiniteError(UserError):
    """A loss, metric or gradient stopped being a number."""


@dataclasses.dataclass
class _Period:
    """Metrics and times gathered since the last log line."""

    first_step: int
    metrics: Metrics | None = None
    data_seconds: float = 0.0
    started: float = dataclasses.field(default_factory=time.perf_counter)


def _compiled_together(function: Any, *arguments: Any) -> Any:
    """Compiles a jitted function, and waits until every process has.

    Hosts compile at different speeds, or find the program in a cache; `processes.join` says why
    none may start early.
    """
    program = function.lower(*arguments).compile()
    everyone = set(range(jax.process_count()))
    ocp.multihost.sync_global_processes("compiled", processes=everyone, timeout=_A_DAY)
    return program


def run_steps(
    state: TrainState,
    train_step: Any,
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
    more_values: Callable[[], Mapping[str, float]] = dict,
) -> TrainState:
    """Trains from `progress.step` to `steps`, and saves while it trains.

    Args:
        state: donated.
        train_step: jitted function `(state, batch, *constants) -> (state, metrics)`; its metrics
            are averages, `loss` among them.
        batches: local rows, from the first step to be taken.
        rows: sharding of a batch.
        request: asks all processes to stop; they save first.
        steps: steps of the whole run; after the last a checkpoint is saved.
        log_every: steps between lines of metrics.
        checkpoint_every: steps between checkpoints.
        clips_per_step: clips of the global batch, for the speed that is logged.
        progress: progress of the run, saved with its fingerprint in every checkpoint.
        more_values: returns further values of a log line.

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
        values["data_wait_share"] = done.data_seconds / seconds
        values["train_seconds"] = before + ended - start
        values["peak_memory_gb"] = peak_memory_gb()
        values |= more_values()
        writer.write(last, values, seconds_left=(steps - last) * seconds / taken)
        if broken := sorted(name for name, value in values.items() if not math.isfinite(value)):
            attempt(checkpoints.finish, must=False)
            raise NonFiniteError(
                f"not finite between steps {done.first_step} and {last}: {', '.join(broken)}; "
                f"{checkpoints.kept()}. Lower optimizer.learning_rate or optimizer.clip_norm, or "
                "look at the data of these steps"
            )

    for step in range(first + 1, steps + 1):
        waiting = time.perf_counter()
        peers.doing(peers.READS, step - 1)
        batch = next(batches)
        period.data_seconds += time.perf_counter() - waiting
        on_device = to_device_batch(batch, rows)
        if step == first + 1:
            peers.doing("compiles", step - 1)
            train_step = _compiled_together(train_step, state, on_device, *constants)
        peers.doing(peers.STEPS, step - 1)
        state, metrics = train_step(state, on_device, *constants)
        in_flight.append(metrics["loss"].total)
        period.metrics = metrics if period.metrics is None else merge(period.metrics, metrics)
        if len(in_flight) > STEPS_AHEAD:
            jax.block_until_ready(in_flight.popleft())
        if pending is not None:  # Read one step late, while this step runs.
            report(*pending)
            pending = None
        attempt(functools.partial(checkpoints.finish, wait=False), must=False)
        last_step = step == steps
        stopping = agreement.stop(request.name is not None)
        saving = last_step or stopping or step % checkpoint_every == 0
        if step % log_every == 0 or saving:
            if saving:
                jax.block_until_ready(state)
            pending = (step, period, time.perf_counter())
            period = _Period(step + 1)
        if saving and pending is not None:
            # Nothing that is not finite may replace a good checkpoint.
            report(*pending)
            pending = None
        if saving:
            peers.doing("saves", step)
            reached = dataclasses.replace(progress, step=step, train_seconds=trained_seconds())
            ends = last_step or stopping
            attempt(checkpoints.finish, must=False)  # the one before
            attempt(functools.partial(checkpoints.save, state, reached), must=ends)
            if ends:
                checkpoints.finish()
        if stopping and not last_step:
            line = f"stopped at step {step} by {request.name or 'another process'} after saving"
            seconds = format_seconds(trained_seconds())
            writer.note(f"{line}, {seconds}; the same command resumes from here")
            raise Stopped
    peers.doing("has trained", step)
    writer.note(f"trained to step {step} in {format_seconds(trained_seconds())}")
    return state
