"""Alarms of the log when the embeddings' spread falls, and metrics of a full disk."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from etils import epath
from tensorboardX.proto.event_pb2 import Event

from avcl_jax.training import metrics
from avcl_jax.training.metrics import MetricWriter

# Spread of the audio and of the video embeddings as the demo logged them when the bank came in and
# all embeddings moved together.
RUN_AWAY = {
    "audio": (0.981, 0.987, 0.989, 0.989, 0.815, 0.726, 0.717, 0.725, 0.729),
    "video": (0.699, 0.705, 0.734, 0.750, 0.671, 0.595, 0.594, 0.601, 0.606),
}


def _alarms(tmp_path, capsys, *, warmup_steps=0, starts=(0,), **spreads):
    """Feeds spreads by modality, one log period of 50 steps each, and returns the alarm lines."""
    for first, last in zip(starts, (*starts[1:], None), strict=True):
        writer = MetricWriter(
            tmp_path, steps=2000, first_step=50 * first, warmup_steps=warmup_steps
        )
        for number, values in list(enumerate(zip(*spreads.values(), strict=True), start=1))[
            first:last
        ]:
            row = {f"health/{m}_embedding_std": v for m, v in zip(spreads, values, strict=True)}
            speed = {"steps_per_second": 1.0, "clips_per_second": 1.0, "data_wait_share": 0.0}
            writer.write(50 * number, row | speed, seconds_left=1.0)
        writer.close()
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("ALARM")]


def test_embeddings_that_run_away_are_reported_once_per_modality(tmp_path, capsys):
    audio, video = sorted(_alarms(tmp_path, capsys, **RUN_AWAY))
    assert audio.startswith(
        "ALARM at step 300: the spread of the audio embeddings (health/audio_embedding_std) fell "
        "from 0.99 at step 200 to 0.73"
    )
    assert "the video embeddings (health/video_embedding_std) fell from 0.75 at step 200" in video
    assert "negative_similarity" in audio
    assert "bank" in audio


@pytest.mark.parametrize(
    ("spread", "steps"),
    [
        ((0.9, 0.9, 0.6, 0.6, 0.6), [150]),  # a third in one period
        ((0.9, 0.8, 0.4, 0.2, 0.1, 0.05, 0.02), [150]),  # one fall over many periods
        ((0.9, 0.5, 0.5, 0.9, 0.9, 0.5, 0.5), [100, 300]),  # two falls
        ((0.9, 0.5, 0.5, 0.5, 0.3, 0.3), [100, 250]),
        ((0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5), []),  # slowly
        ((0.5, 0.6, 0.5, 0.6, 0.9, 0.8), []),  # noise
        ((0.9, "nan", 0.8), []),
        ((0.9, 0.5, "nan"), [100]),
        ((0.0, 0.0, 0.0), []),
    ],
)
def test_only_a_sudden_fall_is_an_alarm_and_only_once(tmp_path, capsys, spread, steps):
    lines = _alarms(tmp_path, capsys, audio=[float(value) for value in spread])
    assert [int(line.split()[3].rstrip(":")) for line in lines] == steps


@pytest.mark.parametrize("warmup_steps", [100, 40, 1])
def test_a_fall_during_warm_up_is_not_an_alarm(tmp_path, capsys, warmup_steps):
    # The beginning of a healthy demo. The mean over a log period that begins in the warm-up, here
    # of 50 steps, is not a spread to fall from.
    spread = (0.570, 0.348, 0.336, 0.345, 0.371, 0.436)
    assert _alarms(tmp_path, capsys, warmup_steps=warmup_steps, video=spread) == []


def test_a_fall_right_after_warm_up_is_an_alarm(tmp_path, capsys):
    (line,) = _alarms(tmp_path, capsys, warmup_steps=100, audio=(0.5, 0.5, 0.9, 0.6, 0.6))
    assert line.startswith("ALARM at step 200")


@pytest.mark.parametrize("resumed", [5, 6])
def test_a_resumed_run_compares_with_the_lines_before(tmp_path, capsys, resumed):
    lines = _alarms(tmp_path, capsys, starts=(0, resumed), audio=RUN_AWAY["audio"])
    assert [line.split(":")[0] for line in lines] == ["ALARM at step 300"]
    rows = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [row["step"] for row in rows] == list(range(50, 500, 50))


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

    def write_bytes(path: epath.Path, content: bytes) -> None:
        raise full

    for step in range(1, 5):
        with monkeypatch.context() as patch:
            if step in (2, 3):
                patch.setattr(metrics, "write_bytes", write_bytes)
            values = {"loss": float(step), "steps_per_second": 1.0}
            values |= {"clips_per_second": 1.0, "data_wait_share": 0.0}
            writer.write(step, values, seconds_left=0.0)
    writer.close()
    said = [line for line in capsys.readouterr().out.splitlines() if "until there is room" in line]
    problem = f"{full.filename}: No space left on device; free some space"
    assert said == [f"{problem}: metrics are kept until there is room"]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    losses = {step: values["loss"] for step, values in scalars(tmp_path / "events").items()}
    assert losses == {1: 1.0, 4: 4.0}
