"""Metrics of training while the disk is full."""

from __future__ import annotations

import errno
import json
from pathlib import Path

from etils import epath
from tensorboardX.proto.event_pb2 import Event

from avcl_jax.training import metrics
from avcl_jax.training.metrics import MetricWriter

VALUES = dict.fromkeys(("loss", "steps_per_second", "clips_per_second", "train_seconds"), 1.0)
VALUES["data_wait_share"] = 0.0


def scalars(directory: Path) -> dict[int, dict[str, float]]:
    """Values by step that TensorBoard would read."""
    found = {}
    for path in sorted(directory.glob("*.out.tfevents.*")):
        content = path.read_bytes()
        while content:
            size = int.from_bytes(content[:8], "little")
            event = Event.FromString(content[12 : 12 + size])
            if event.summary.value:
                found[event.step] = {value.tag: value.simple_value for value in event.summary.value}
            content = content[16 + size :]
    return found


def test_metrics_of_a_full_disk_are_written_when_there_is_room(tmp_path, monkeypatch, capsys):
    writer = MetricWriter(epath.Path(tmp_path), steps=4, first_step=0)
    full = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "metrics.jsonl"))

    def fail(*_: object) -> None:
        raise full

    for step in range(1, 5):
        with monkeypatch.context() as patch:
            if step == 2:
                patch.setattr(metrics, "write_bytes", fail)
            if step == 3:
                patch.setattr(metrics.EventsWriter, "flush", fail)
            writer.write(
                step,
                {**VALUES, "loss": float(step), "train_seconds": float(step)},
                seconds_left=0.0,
            )
            writer.flush()
    writer.close()
    said = [line for line in capsys.readouterr().out.splitlines() if "until there is room" in line]
    problem = f"{full.filename}: No space left on device; free some space"
    assert said == [f"{problem}: metrics are kept until there is room"]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    losses = {step: values["loss"] for step, values in scalars(tmp_path / "events").items()}
    assert losses.items() >= {1: 1.0, 4: 4.0}.items()
    # Half an event may end a file, and nothing is read after it.
    assert len(list((tmp_path / "events").iterdir())) == 3


def test_writing_takes_a_small_part_of_the_time_also_in_a_slow_store(tmp_path, monkeypatch):
    seconds, written = 0.0, []

    def write_slowly(path: Path, content: bytes) -> None:
        nonlocal seconds
        seconds += 3.0
        written.append(content.count(b"\n"))

    monkeypatch.setattr(metrics.time, "perf_counter", lambda: seconds)
    monkeypatch.setattr(metrics, "write_bytes", write_slowly)
    writer = MetricWriter(epath.Path(tmp_path), steps=100, first_step=0)
    for step in range(1, 101):
        seconds += 1.0
        writer.write(step, VALUES, seconds_left=0.0)
    assert written == [1, 61]
    writer.close()
    assert written == [1, 61, 100]
