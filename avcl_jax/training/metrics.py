"""Metrics of training: the files and lines they are written to.

Files are JSON lines and TensorBoard event files, written without TensorFlow.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from avcl_jax.errors import FULL_DISK, one_line
from avcl_jax.objectives.temporal import TASKS
from avcl_jax.objectives.views import MODALITIES
from avcl_jax.paths import write_bytes
from avcl_jax.training.alarms import Alarms
from avcl_jax.training.writers import Write

# Time between writes over that of the last write, which grows with a run in an object store.
_WAIT_RATIO = 20

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


def memory_gb() -> dict[str, float]:
    """Returns memory in GB (10⁹ bytes), as far as the system tells.

    `peak_memory_gb`: largest resident size of this process; `available_memory_gb`: memory of its
    host that is not used; `device_memory_gb`: largest use of a device of this process so far.
    """
    values = {"peak_memory_gb": peak_memory_gb()}
    if (path := Path("/proc/meminfo")).exists():
        lines = dict(line.split(":") for line in path.read_text().splitlines())
        values["available_memory_gb"] = int(lines["MemAvailable"].split()[0]) * 1024 / 1e9
    used = [stats["peak_bytes_in_use"] for d in jax.local_devices() if (stats := d.memory_stats())]
    if used:
        values["device_memory_gb"] = max(used) / 1e9
    return values


def _of_processes(hosts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Values of several processes by names of their own, for TensorBoard."""
    return {
        f"{name}/process_{number}": value
        for number, host in enumerate(hosts)
        for name, value in host.items()
        if name != "host"
    }


class MetricWriter:
    """Writes from the first process only; elsewhere every call does nothing."""

    def __init__(
        self,
        workdir: epath.Path,
        *,
        steps: int,
        first_step: int,
        warmup_steps: int = 0,
        also: Write | None = None,
    ):
        """Opens metrics.jsonl and events, and drops lines after `first_step`, where a run resumes.

        Args:
            steps: steps of the whole run.
            warmup_steps: log periods that begin earlier are left out of alarms.
            also: called with step and values as they are written.
        """
        self._also = also
        self._steps = steps
        self._alarms = Alarms(warmup_steps=warmup_steps)
        self._active = jax.process_index() == 0
        self._full = False
        self._written, self._write_seconds = 0.0, 0.0
        self._events: EventsWriter | None = None
        if not self._active:
            return
        self._path = workdir / "metrics.jsonl"
        self._lines = []
        if self._path.exists():
            for line in self._path.read_text().splitlines():
                # The last line may be torn by the crash from which this start recovers.
                if line.endswith("}") and (row := json.loads(line))["step"] <= first_step:
                    self._lines.append(line)
                    self._alarms.add(row)
            self._flush()
        (workdir / "events").mkdir(parents=True, exist_ok=True)
        self._first_step = first_step

    def flush(self) -> None:
        """Writes what was kept in memory; keeps it where the disk is full."""
        if not self._active:
            return
        try:
            self._flush()
        except OSError as error:
            self._keep(error)

    def _flush(self) -> None:
        # Object stores cannot append, so both files are written whole there, and metrics.jsonl
        # everywhere, because a full disk would leave half a line in it.
        start = time.perf_counter()
        write_bytes(self._path, "".join(f"{line}\n" for line in self._lines).encode())
        if self._events is not None:
            self._events.flush()
        self._full = False
        self._written = time.perf_counter()
        self._write_seconds = self._written - start

    def _keep(self, error: OSError) -> None:
        """Keeps metrics in memory, if the disk is full."""
        if error.errno not in FULL_DISK:
            raise error
        if not self._full:
            print(f"{one_line(error)}: metrics are kept until there is room", flush=True)
        self._full = True
        self._close_events()  # half an event: the next begins another file

    def write(
        self,
        step: int,
        values: Mapping[str, float],
        *,
        seconds_left: float,
        hosts: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Writes the averages of a log period that ended with `step`.

        Args:
            values: values of the run, those of process 0 where processes differ.
            seconds_left: estimate for the rest of the run.
            hosts: values of each process, and the name of its `host`, if there are several.
        """
        if not self._active:
            return
        row: dict[str, Any] = {"step": step, "split": "train"} | {
            name: value if math.isfinite(value) else str(value) for name, value in values.items()
        }
        if hosts:
            row["hosts"] = hosts
        self._lines.append(json.dumps(row))
        scalars = {**values, **_of_processes(hosts)}
        try:
            self._write_event(step, scalars)
        except OSError as error:
            self._keep(error)
        if time.perf_counter() - self._written >= _WAIT_RATIO * self._write_seconds:
            self.flush()
        if self._also is not None:
            self._also(step, scalars)
        print(
            f"step {step}/{self._steps}  {_progress(values)}  |  "
            f"{values['steps_per_second']:.2f} steps/s "
            f"{values['clips_per_second']:.0f} clips/s  data wait "
            f"{100 * values['data_wait_share']:.0f} %  ETA {format_seconds(seconds_left)}",
            flush=True,
        )
        for line in self._alarms.add(row):
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
            try:
                self._flush()
            finally:
                self._close_events()
