"""History of a run in WORKDIR/history.jsonl: its starts, changed settings and skipped batches."""

from __future__ import annotations

import datetime
import json
from typing import Any

import jax
from etils import epath

from avcl_jax.paths import write_bytes


class History:
    """Events of a run in their order, each a dict with the step and the time.

    Every process has them; process 0 writes. A run has none before its first checkpoint: its next
    start is its first.
    """

    def __init__(self, workdir: epath.Path, *, resumes: bool):
        """Reads the events of earlier starts, or none if the run does not resume."""
        self._path = workdir / "history.jsonl"
        lines = self._path.read_text().splitlines() if resumes and self._path.exists() else []
        self._events: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def add(self, step: int, **event: Any) -> None:
        """Appends an event after a step: `start`, `init_from`, `changed` or `skipped_batches`."""
        time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._events.append({"step": step, "time": time} | event)
        if jax.process_index() == 0:
            # Whole, because object stores cannot append.
            text = "".join(f"{json.dumps(line)}\n" for line in self._events)
            write_bytes(self._path, text.encode())

    def of(self, kind: str) -> list[Any]:
        """Returns the values of all events of a kind."""
        return [event[kind] for event in self._events if kind in event]

    @property
    def skipped(self) -> frozenset[int]:
        """Numbers, from 1, of the batches that the run leaves out."""
        ranges = self.of("skipped_batches")
        return frozenset(n for first, last in ranges for n in range(first, last + 1))

    def batches_read(self, step: int) -> int:
        """Returns the position in the data after a step: batches drawn so far, and those skipped.

        Batches that were skipped later do not count, so a run may also resume from a checkpoint
        that is older than a skip.
        """
        read = step
        for number in sorted(self.skipped):
            read += number <= read
        return read
