"""The loop that every training runs: take a batch, step, log one step late, save, stop on a signal.

It does not depend on the model. Pretraining (`training.loop`) and fine-tuning
(`evaluation.finetune`) build state, step and batches, and hand them over.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from avcl_jax.data.pipeline import to_device_batch
from avcl_jax.errors import UserError
from avcl_jax.training.checkpoint import Checkpoints, Progress
from avcl_jax.training.metrics import (
    Metrics,
    MetricWriter,
    format_seconds,
    merge_metrics,
    peak_memory_gb,
)
from avcl_jax.training.state import TrainState

# Steps dispatched ahead of the device. More would only queue batches in memory.
_STEPS_AHEAD = 2


class NonFiniteError(UserError):
    """A loss, metric or gradient stopped being a number."""


@dataclasses.dataclass(frozen=True)
class Pace:
    """Length of a training, and how often it logs and saves.

    Attributes:
        steps: steps of the whole run.
        log_every: steps between lines of metrics.
        checkpoint_every: steps between checkpoints; the last step is always kept.
        clips_per_step: clips of the global batch, for the speed that is logged.
    """

    steps: int
    log_every: int
    checkpoint_every: int
    clips_per_step: int


@dataclasses.dataclass
class _Period:
    """Metrics and times gathered since the last log line."""

    first_step: int
    metrics: Metrics | None = None
    data_seconds: float = 0.0
    started: float = dataclasses.field(default_factory=time.perf_counter)

    def add(self, metrics: Metrics, merge: Callable[..., Metrics]) -> None:
        self.metrics = metrics if self.metrics is None else merge(self.metrics, metrics)


def _check_finite(values: dict[str, float], first: int, last: int, saved: int | None) -> None:
    broken = sorted(name for name, value in values.items() if not math.isfinite(value))
    if broken:
        kept = f"checkpoint {saved} is kept" if saved is not None else "no checkpoint was written"
        raise NonFiniteError(
            f"not finite between steps {first} and {last}: {', '.join(broken)}; {kept}. Lower "
            "optimizer.learning_rate or optimizer.clip_norm, or look at the data of these steps"
        )


class _StopSignal:
    """Notes SIGTERM and SIGINT, so that the loop can save before it ends."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> _StopSignal:
        def note(number: int, _: Any) -> None:
            if self.received is not None:  # The second one means now.
                raise KeyboardInterrupt
            self.received = signal.Signals(number).name

        for number in (signal.SIGTERM, signal.SIGINT):
            self._old[number] = signal.signal(number, note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


def run_steps(
    state: TrainState,
    train_step: Callable[[TrainState, Mapping[str, Any]], tuple[TrainState, Metrics]],
    batches: Iterator[dict[str, np.ndarray]],
    *,
    rows: Any,
    pace: Pace,
    progress: Progress,
    checkpoints: Checkpoints,
    writer: MetricWriter,
    also: Callable[[], Mapping[str, float]],
) -> tuple[TrainState, bool]:
    """Trains from `progress.step` to `pace.steps`, or until a signal, and saves.

    Args:
        state: donated.
        train_step: jitted; its metrics are averages that hold `loss`.
        batches: local rows, from the first step to be taken.
        rows: sharding of a batch.
        pace: how long.
        progress: progress of the run, with the fingerprint for its checkpoints.
        checkpoints: checkpoints of the run.
        writer: writer of metrics.
        also: further values of a log line.

    Returns:
        The state, and whether the run is complete; False if a signal stopped it after saving.

    Raises:
        NonFiniteError: within one log period of the first value that is not finite.
    """
    first, before = progress.step, progress.train_seconds
    merge = jax.jit(merge_metrics)
    start = time.perf_counter()
    in_flight: collections.deque[Any] = collections.deque()
    period = _Period(first + 1)
    pending: tuple[int, _Period, float] | None = None

    def report(last: int, done: _Period, ended: float) -> None:
        """Reads the metrics of a finished period, which waits for the device."""
        assert done.metrics is not None
        values = {
            name: float(metric.compute())
            for name, metric in jax.device_get(done.metrics).items()
            if metric.count > 0
        }
        seconds = max(ended - done.started, 1e-9)
        steps = last - done.first_step + 1
        values["steps_per_second"] = steps / seconds
        values["clips_per_second"] = pace.clips_per_step * steps / seconds
        values["data_wait_share"] = done.data_seconds / seconds
        values["train_seconds"] = before + ended - start
        values["peak_memory_gb"] = peak_memory_gb()
        values |= also()
        left = (pace.steps - last) * seconds / steps
        writer.write(last, values, seconds_left=left)
        _check_finite(values, done.first_step, last, checkpoints.latest_step())

    with _StopSignal() as stop:
        for step in range(first + 1, pace.steps + 1):
            waiting = time.perf_counter()
            batch = next(batches)
            period.data_seconds += time.perf_counter() - waiting
            state, metrics = train_step(state, to_device_batch(batch, rows))
            period.add(metrics, merge)
            in_flight.append(metrics["loss"].total)
            if len(in_flight) > _STEPS_AHEAD:
                jax.block_until_ready(in_flight.popleft())
            if pending is not None:  # Read one step late, while this step runs.
                report(*pending)
                pending = None
            last_step = step == pace.steps
            stopping = checkpoints.reached_preemption(step) or (
                stop.received is not None and jax.process_count() == 1
            )
            saving = last_step or stopping or step % pace.checkpoint_every == 0
            if step % pace.log_every == 0 or saving:
                if saving:
                    jax.block_until_ready(state)
                pending = (step, period, time.perf_counter())
                period = _Period(step + 1)
            if saving and pending is not None:
                # Nothing that is not finite may replace a good checkpoint.
                report(*pending)
                pending = None
            if saving:
                seconds = before + time.perf_counter() - start
                checkpoints.save(
                    state, dataclasses.replace(progress, step=step, train_seconds=seconds)
                )
            if stopping and not last_step:
                writer.note(
                    f"stopped at step {step} by {stop.received or 'preemption'} after saving; "
                    "the same command resumes from here"
                )
                break
    writer.note(f"trained to step {step} in {format_seconds(before + time.perf_counter() - start)}")
    return state, step == pace.steps
