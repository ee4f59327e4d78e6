"""Alarms of the log: collapse, stale bank, spikes of the loss, waiting for data."""

from __future__ import annotations

import json

import pytest

from avcl_jax.training.metrics import MetricWriter

# Spread of the audio and of the video embeddings as the demo logged them when the bank came in and
# all embeddings moved together.
RUN_AWAY = {
    "audio": (0.981, 0.987, 0.989, 0.989, 0.815, 0.726, 0.717, 0.725, 0.729),
    "video": (0.699, 0.705, 0.734, 0.750, 0.671, 0.595, 0.594, 0.601, 0.606),
}


HOUR = 3600.0


def _write(tmp_path, rows, *, warmup_steps=0, first=0, seconds=HOUR, hosts=()):
    """Writes log lines, one for every 50 steps and so many seconds.

    Args:
        rows: values of each line, beside usual ones.
        first: lines before this start.
        hosts: fraction of the time that each process waits for data.
    """
    writer = MetricWriter(tmp_path, steps=2000, first_step=50 * first, warmup_steps=warmup_steps)
    usual = {"loss": 5.0, "steps_per_second": 1.0, "clips_per_second": 1.0, "data_wait_share": 0.0}
    shares = [{"host": f"node{n}", "data_wait_share": share} for n, share in enumerate(hosts)]
    for number, row in enumerate(rows, start=first + 1):
        values = usual | {"train_seconds": number * seconds} | row
        writer.write(50 * number, values, seconds_left=1.0, hosts=shares)
    writer.close()


def _sounded(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("ALARM")]


def _alarms(tmp_path, capsys, *, warmup_steps=0, starts=(0,), **spreads):
    """Feeds spreads by modality, and returns the alarm lines."""
    names = [f"health/{modality}_embedding_std" for modality in spreads]
    rows = [dict(zip(names, values, strict=True)) for values in zip(*spreads.values(), strict=True)]
    for first, last in zip(starts, (*starts[1:], None), strict=True):
        _write(tmp_path, rows[first:last], first=first, warmup_steps=warmup_steps)
    return _sounded(capsys)


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
        ((0.9, 0.8, 0.4, 0.3, 0.2, 0.15, 0.11), [150]),  # one fall over many periods
        ((0.14, 0.13, 0.12, 0.11, 0.098, 0.098), [250, 300]),  # to a single point, slowly
        ((0.9, 0.5, 0.5, 0.9, 0.9, 0.5, 0.5), [100, 300]),  # two falls
        ((0.9, 0.5, 0.5, 0.5, 0.3, 0.3), [100, 250]),
        ((0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5), []),  # slowly
        ((0.5, 0.6, 0.5, 0.6, 0.9, 0.8), []),  # noise
        ((0.9, "nan", 0.8), []),
        ((0.9, 0.5, "nan"), [100]),
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


def test_an_alarm_sounds_once_an_hour_also_over_restarts(tmp_path, capsys):
    rows = [{"health/video_embedding_std": 0.05}] * 12
    _write(tmp_path, rows[:6], seconds=HOUR / 4)
    _write(tmp_path, rows[6:], first=6, seconds=HOUR / 4)
    assert [line.split(":")[0] for line in _sounded(capsys)] == [
        f"ALARM at step {step}" for step in (50, 250, 450)
    ]


def test_a_bank_whose_negatives_are_less_alike_than_those_of_the_batch_is_stale(tmp_path, capsys):
    # The demo's, whose bank leaves out the nearest rows.
    fresh = {"va/negative_similarity": 0.02, "va/bank_negative_similarity": -0.02}
    fresh |= {"vv/negative_similarity": 0.24, "vv/bank_negative_similarity": 0.21}
    moved = fresh | {"vv/negative_similarity": 0.60}
    unused = {"vv/negative_similarity": 0.60}
    _write(tmp_path, [fresh, fresh, *[unused] * 5, *[moved] * 4, fresh, *[moved] * 5])
    (line,) = _sounded(capsys)
    assert line.startswith("ALARM at step 850: the feature bank is stale: its negatives are less")
    assert "(vv/bank_negative_similarity 0.21) than those of the batch (0.60)" in line


# Loss of the demo around step 900, from which the bank makes the task harder.
BANK_COMES_IN = (7.32, 7.11, 6.90, 6.76, 6.55, 6.41, 6.22, 6.71, 6.55, 6.49, 6.32, 6.21, 6.09)


@pytest.mark.parametrize(
    ("losses", "steps"),
    [
        (BANK_COMES_IN, []),
        ((*BANK_COMES_IN, 12.4), [700]),
        ((*BANK_COMES_IN, float("nan"), 6.1), []),
        ([0.05, 0.02, 0.06, 0.03, 0.04, 0.02, 0.05, 0.03, 0.05, 0.02, 0.08], []),  # noise
        ([5.0] * 9 + [9.0], []),  # too few lines to compare with
        ([5.0] * 10 + [6.2], []),
        ([5.0] * 10 + [6.3], [550]),
    ],
)
def test_a_loss_far_above_that_of_the_lines_before_is_a_spike(tmp_path, capsys, losses, steps):
    _write(tmp_path, [{"loss": loss} for loss in losses])
    lines = _sounded(capsys)
    assert [int(line.split()[3].rstrip(":")) for line in lines] == steps
    assert all("the loss rose to" in line for line in lines)


def test_waiting_for_data_is_an_alarm_once_it_has_lasted(tmp_path, capsys):
    _write(tmp_path, [{"data_wait_share": 0.03}] * 3 + [{"data_wait_share": 0.4}] * 9, seconds=10)
    (line,) = _sounded(capsys)
    assert line.startswith("ALARM at step 350: training has waited for data 28 % of the last 60 s:")
    _write(tmp_path, [{"data_wait_share": 0.9}] * 40, seconds=0.5)  # a test, not a run
    assert not _sounded(capsys)


@pytest.mark.parametrize(
    ("hosts", "slowest"),
    [((0.01, 0.15, 0.02), 1), ((0.01, 0.08, 0.02), None), ((0.15, 0.14, 0.12), None)],
)
def test_a_host_that_waits_longer_than_the_others_is_named(tmp_path, capsys, hosts, slowest):
    _write(tmp_path, [{}] * 7, seconds=20, hosts=hosts)
    lines = _sounded(capsys)
    if slowest is None:
        assert not lines
        return
    (line,) = lines
    assert "process 1 on node1 is the slowest, the others wait 2 %" in line
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert [host["data_wait_share"] for host in row["hosts"]] == list(hosts)
