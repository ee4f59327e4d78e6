"""Metrics of training: averages over a log period, and the files and lines they are written to.

Files are JSON lines and TensorBoard event files, written without TensorFlow.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from clu import metrics as clu_metrics
from etils import epath
from jaxtyping import Array
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from avcl_jax.errors import FULL_DISK, one_line
from avcl_jax.objectives.temporal import TASKS
from avcl_jax.objectives.views import MODALITIES
from avcl_jax.paths import write_bytes

Metrics = dict[str, clu_metrics.Average]

# A fall of the spread by this fraction within this number of log periods is an alarm. Embeddings
# that ran away together when a bank was switched on lost 18 % in one period of 50 steps and 27 % in
# two; those of healthy runs lose 2 % at most after the warm-up of the learning rate.
_FALL, _COMPARED = 0.2, 2

# Metrics of the progress line by group; metrics.jsonl has all.
_SHOWN = {
    "": {"loss": "loss", "accuracy": "accuracy", "vv/loss": "vv", "va/loss": "va", "aa/loss": "aa"},
    **{
        f"{kind} ": {
            f"{name}/accuracy": "".join(modality[0] for modality in task.reads)
            for name, task in TASKS.items()
            if task.kind == kind
        }
        for kind in dict.fromkeys(task.kind for task in TASKS.values())
    },
    "std ": {"health/video_embedding_std": "v", "health/audio_embedding_std": "a"},
}


def average(value: Array, count: Array | float = 1.0) -> clu_metrics.Average:
    """A mean with weight `count` for merging with those of other steps."""
    count = jnp.asarray(count, jnp.float32)
    value = jnp.where(count > 0, value.astype(jnp.float32), 0.0)
    return clu_metrics.Average(total=value * count, count=count)


def merge_metrics(first: Metrics, second: Metrics) -> Metrics:
    """Merges the averages of two steps or periods."""
    return {name: first[name].merge(second[name]) for name in second}


def _progress(values: Mapping[str, float]) -> str:
    """Formats the metrics of the progress line, without those that a run does not have."""
    lacking = [
        f"{100 * values[name]:.0f} % of views without {modality}"
        for modality in MODALITIES
        if values.get(name := f"data/without_{modality}", 0.0) > 0
    ]
    groups = (
        (title, [f"{label} {values[name]:.2f}" for name, label in shown.items() if name in values])
        for title, shown in _SHOWN.items()
    )
    return "  ".join(
        [" ".join(title + " ".join(found) for title, found in groups if found), *lacking]
    )


def _alarms(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yields an alarm for each modality whose embeddings' spread has fallen by the last row.

    Args:
        rows: parsed lines of metrics.jsonl.
    """

    def fallen(spread: Sequence[tuple[float, int]]) -> bool:
        return spread[-1][0] < (1 - _FALL) * max(spread)[0]

    for modality in MODALITIES:
        name = f"health/{modality}_embedding_std"
        spread = [(row[name], row["step"]) for row in rows if isinstance(row.get(name), float)]
        if len(spread) < 2 or spread[-1][1] != rows[-1]["step"]:
            continue
        recent = spread[-_COMPARED - 1 :]
        if not fallen(recent) or fallen(spread[-_COMPARED - 2 : -1]):  # Reported one line before.
            continue
        (old, old_step), (new, step) = max(recent), recent[-1]
        yield (
            f"ALARM at step {step}: the spread of the {modality} embeddings ({name}) fell from "
            f"{old:.2f} at step {old_step} to {new:.2f}. If */negative_similarity in metrics.jsonl "
            "rises too, all embeddings move together: if the feature bank has just been switched "
            "on, check its settings (bank.size=0 trains without it), otherwise lower "
            "optimizer.learning_rate"
        )


def format_seconds(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def peak_memory_gb() -> float:
    """Returns the largest resident size of this process so far, in GB (10⁹ bytes)."""
    # In kilobytes on Linux, in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class MetricWriter:
    """Writes from the first process only; elsewhere every call does nothing."""

    def __init__(self, workdir: epath.Path, *, steps: int, first_step: int, warmup_steps: int = 0):
        """Opens metrics.jsonl and events, and drops lines after `first_step`, where a run resumes.

        Args:
            steps: steps of the whole run.
            warmup_steps: log periods that begin earlier are left out of alarms: the spread of
                random encoders falls while the learning rate rises.
        """
        self._steps = steps
        self._warmup_steps = warmup_steps
        self._active = jax.process_index() == 0
        self._full = False
        self._events: EventsWriter | None = None
        if not self._active:
            return
        self._path = workdir / "metrics.jsonl"
        self._lines = []
        if self._path.exists():
            for line in self._path.read_text().splitlines():
                # The last line may be torn by the crash from which this start recovers.
                if line.endswith("}") and json.loads(line)["step"] <= first_step:
                    self._lines.append(line)
            self._flush()
        (workdir / "events").mkdir(parents=True, exist_ok=True)
        self._first_step = first_step

    def _flush(self) -> None:
        # Object stores cannot append, so the file (one line per log period) is written whole.
        write_bytes(self._path, "".join(f"{line}\n" for line in self._lines).encode())

    def write(self, step: int, values: Mapping[str, float], *, seconds_left: float) -> None:
        """Writes the averages of a log period that ended with `step`."""
        if not self._active:
            return
        row = {"step": step, "split": "train"} | {
            name: value if math.isfinite(value) else str(value) for name, value in values.items()
        }
        self._lines.append(json.dumps(row))
        try:
            self._flush()
            self._write_event(step, values)
            self._full = False
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise
            if not self._full:
                print(f"{one_line(error)}: metrics are kept until there is room", flush=True)
            self._full = True
            self._close_events()  # half an event: the next begins another file
        print(
            f"step {step}/{self._steps}  {_progress(values)}  |  "
            f"{values['steps_per_second']:.2f} steps/s "
            f"{values['clips_per_second']:.0f} clips/s  data wait "
            f"{100 * values['data_wait_share']:.0f} %  ETA {format_seconds(seconds_left)}",
            flush=True,
        )
        rows = [{"step": 0}, *map(json.loads, self._lines[-_COMPARED - 3 :])]
        pairs = itertools.pairwise(rows)
        for line in _alarms([row for old, row in pairs if old["step"] >= self._warmup_steps]):
            print(line, flush=True)

    def _write_event(self, step: int, values: Mapping[str, float]) -> None:
        """Writes for TensorBoard, in this thread: that of tensorboardX's SummaryWriter ends when a
        disk is full, and its queue then blocks the caller for ever."""
        if self._events is None:
            prefix = self._path.parent / "events" / "events"
            self._events = EventsWriter(os.fspath(prefix), filename_suffix=f".{step}")
            # TensorBoard hides what an earlier start wrote for these steps.
            start = SessionLog(status=SessionLog.START)
            self._events.write_event(Event(step=self._first_step + 1, session_log=start))
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        summary = Summary(value=scalars)
        self._events.write_event(Event(wall_time=time.time(), step=step, summary=summary))
        self._events.flush()

    def _close_events(self) -> None:
        events, self._events = self._events, None
        if events is not None:
            with contextlib.suppress(OSError):
                events.close()

    def note(self, text: str) -> None:
        """Prints a line."""
        if self._active:
            print(text, flush=True)

    def close(self) -> None:
        """Closes the files."""
        if self._active:
            if self._full:
                self._flush()
            self._close_events()
