"""Runs that change course: other settings, another run's state, batches that are left out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from avcl_jax import experiment
from avcl_jax.data.pipeline import train_batches
from avcl_jax.data.records import RecordDataset
from avcl_jax.data.selection import UsableRecords
from avcl_jax.objectives import feature_bank
from avcl_jax.processes import STOPPED
from avcl_jax.training import checkpoint
from avcl_jax.training.checkpoint import CheckpointError, check_config
from avcl_jax.training.history import History
from tests.data.synthetic_records import make_record, write_records
from tests.training.small import (
    SIGNALLED,
    arguments,
    assert_identical,
    one_line,
    run,
    run_processes,
    saved_state,
    saved_steps,
    signals,
    small_config,
)

BAD = 7


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    """Records, one with digital silence between its tones, which is −∞ without a floor."""
    made = [make_record(number, seconds=5.0, side=24) for number in range(24)]
    waveform = made[BAD].waveform.copy()
    waveform[np.arange(len(waveform)) // 1600 % 2 == 1] = 0
    made[BAD] = dataclasses.replace(made[BAD], waveform=waveform)
    return write_records(tmp_path_factory.mktemp("course") / "records", made)


def events(workdir: Path, kind: str) -> list:
    lines = map(json.loads, (workdir / "history.jsonl").read_text().splitlines())
    return [(line["step"], line[kind]) for line in lines if kind in line]


def rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_step_is_at_the_position_of_its_batch_among_those_that_are_not_skipped(tmp_path):
    history = History(epath.Path(tmp_path), resumes=False)
    rng = np.random.default_rng(0)
    for _ in range(10):
        kept = [number for number in range(1, 400) if number not in history.skipped]
        assert [history.batches_read(step) for step in range(1, 100)] == kept[:99]
        first = int(rng.integers(1, 80))
        # As a run does: batches of steps, of which those that are skipped already have none.
        period = [history.batches_read(first), history.batches_read(first + 3)]
        history.add(first - 1, skipped_batches=period)
    assert len(history.skipped) >= 40
    assert History(epath.Path(tmp_path), resumes=True).skipped == history.skipped
    assert not History(epath.Path(tmp_path), resumes=False).skipped


def test_settings_change_only_when_told_to_and_only_those_that_may(tmp_path):
    config = small_config(tmp_path)
    workdir, recorded = epath.Path(tmp_path), []
    options = {"record_changes": recorded.extend}
    check_config(workdir, experiment.to_json(config), **options)
    with config.unlocked():
        config.optimizer.learning_rate, config.steps = 1e-4, 12
    changed = experiment.to_json(config)
    with pytest.raises(CheckpointError, match=r"by --config.execution.accept_changes=True,") as e:
        check_config(workdir, changed, **options)
    assert "optimizer.learning_rate: 0.003 -> 0.0001" in str(e.value)
    with pytest.raises(CheckpointError, match="another config: choose another") as e:
        check_config(workdir, changed)
    assert "accept_changes" not in str(e.value)
    config.global_batch_size = 16
    with pytest.raises(CheckpointError, match="global_batch_size cannot change; ") as e:
        check_config(workdir, experiment.to_json(config), accept_changes=True, **options)
    assert "undo global_batch_size: 8 -> 16" in str(e.value)
    assert "learning_rate" not in str(e.value)
    assert not recorded
    check_config(workdir, changed, accept_changes=True, **options)
    assert "steps: 6 -> 12" in recorded
    recorded.clear()
    check_config(workdir, changed, **options)
    assert not recorded


def test_a_run_of_a_version_without_init_from_resumes(tmp_path):
    config = small_config(tmp_path)
    old = {k: v for k, v in config.to_dict().items() if not k.startswith("init_")}
    new = experiment.to_json(config)
    assert experiment.decisive_differences(json.dumps(old), new) == []
    config.init_from = "runs/old"
    (line,) = experiment.decisive_differences(new, experiment.to_json(config))
    assert line == "init_from: '' -> 'runs/old'"


def test_labels_of_a_bank_are_kept_by_name_and_unknown_where_new():
    bank = feature_bank.create(4, 2, jnp.float32, labels=2)
    columns = bank.rows.numbers.columns.at[:, -2:].set(jnp.array([[0, 5], [1, 6], [2, 7], [3, 8]]))
    bank = bank.replace(rows=bank.rows.replace(numbers=type(bank.rows.numbers)(columns)))
    changed = feature_bank.relabel(bank, before=("a", "b"), after=("b", "c", "a"))
    np.testing.assert_array_equal(
        changed.rows.numbers.label, [[5, -1, 0], [6, -1, 1], [7, -1, 2], [8, -1, 3]]
    )
    none = feature_bank.relabel(bank, before=("a", "b"), after=())
    np.testing.assert_array_equal(none.rows.numbers.label, -np.ones((4, 1)))


DIVERGES = {"optimizer__name": "sgd", "optimizer__learning_rate": 1e17, "optimizer__clip_norm": 0.0}


@pytest.mark.slow
def test_a_run_that_diverged_resumes_with_another_learning_rate_and_more_steps(records, tmp_path):
    workdir = tmp_path / "run"
    options = DIVERGES | {"execution__checkpoint_every": 1, "steps": 8}
    line = one_line(run(arguments(records, workdir, **options), code=1))
    assert "--config.execution.accept_changes=True resumes with other settings" in line
    # The newest is ruined already: its parameters are finite, and huge.
    kept, ruined = saved_steps(workdir)
    (workdir / "checkpoints" / str(ruined)).rename(tmp_path / "ruined")
    options |= {"optimizer__learning_rate": 1e-6, "optimizer__clip_norm": 5.0, "steps": 10}
    options |= {"bank__health_labels": "('motion','material')"}
    line = one_line(run(arguments(records, workdir, **options), code=1))
    assert "optimizer.learning_rate: 1e+17 -> 1e-06" in line
    accepted = [*arguments(records, workdir, **options), "--config.execution.accept_changes=True"]
    output = run(accepted)
    assert f"resumes at step {kept} with bank.health_labels: " in output
    assert "step 10/10" in output
    ((step, changed),) = events(workdir, "changed")
    assert step == kept
    assert {line.split(":")[0] for line in changed} == {
        *("bank.health_labels", "optimizer.clip_norm", "optimizer.learning_rate", "steps"),
    }
    assert rows(workdir)[-1]["restarts"] == len(events(workdir, "start")) - 1 == 1
    assert "bank/base_rate/motion" in rows(workdir)[-1]
    # And without the flag, now that the settings are those of the run.
    assert "is already trained to step 10" in run(arguments(records, workdir, **options))


SKIPS = {"spectrogram__floor": 0.0, "execution__on_nan": "skip", "steps": 6}


def batches_with(records: Path, index: int, count: int) -> list[int]:
    """Numbers of the batches, from 1, that contain a record."""
    config = small_config(records)
    spec, dataset = experiment.render_spec(config), RecordDataset(records, "train")
    source = UsableRecords(dataset, spec)
    batches = train_batches(
        source, spec, seed=config.seed, global_batch_size=8, rows=range(8), first_step=0
    )
    place = [dataset[n].record_id for n in range(len(dataset))].index(f"record {index}")
    return [
        number
        for number, batch in zip(range(1, count + 1), batches, strict=False)
        if place in batch["record_index"]
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_batches_that_are_not_finite_are_skipped_and_a_resumed_run_skips_the_same(
    records, tmp_path
):
    whole = tmp_path / "whole"
    output = run(arguments(records, whole, execution__workers=2, **SKIPS))
    assert "step 6/6" in output
    skipped = events(whole, "skipped_batches")
    numbers = [first for _, (first, last) in skipped if first == last]
    assert len(numbers) == len(skipped) >= 2
    assert numbers == batches_with(records, BAD, numbers[-1])
    assert f"skips batches {numbers[0]} to {numbers[0]} (1 of at most 10 times)" in output
    for value in saved_state(whole, 6).values():
        assert np.isfinite(value).all()
    workdir = tmp_path / "stopped"
    flags = [*signals(5, "SIGTERM"), *arguments(records, workdir, **SKIPS)]
    assert "(2 of at most 10 times)" in run(flags, module=SIGNALLED, code=STOPPED)
    run(arguments(records, workdir, **SKIPS))
    assert_identical(whole, workdir, 6)
    assert [event for _, event in events(workdir, "skipped_batches")] == [
        event for _, event in skipped
    ]
    two = tmp_path / "two"
    run_processes(arguments(records, two, **SKIPS), devices=1)
    assert [event for _, event in events(two, "skipped_batches")] == [e for _, e in skipped]


@pytest.mark.slow
def test_a_run_skips_batches_ten_times_and_then_stops(records, tmp_path):
    options = DIVERGES | {"execution__on_nan": "skip", "steps": 8}
    workdir = tmp_path / "run"
    line = one_line(run(arguments(records, workdir, **options), code=1))
    assert "Batches were skipped 10 times" in line
    assert len(events(workdir, "skipped_batches")) == 10
    line = one_line(run(arguments(records, workdir, **options), code=1))
    assert "Batches were skipped 10 times" in line


@pytest.mark.slow
def test_a_run_begins_with_the_state_of_another(records, tmp_path):
    old, new, workdir = tmp_path / "old", tmp_path / "new", tmp_path / "whole"
    run(arguments(records, old, execution__checkpoint_every=6))
    options = {"init_from": old, "optimizer__learning_rate": 0.0, "steps": 2}
    output = run(arguments(records, new, **options))
    assert f"begins with params, batch_stats of {old} at step 6" in output
    before, after = saved_state(old, 6), saved_state(new, 2)
    for name in before:
        if name.startswith("['params']"):
            np.testing.assert_array_equal(after[name], before[name], err_msg=name)
    assert after["['bank']['inserted']"] == 2 * 16
    options |= {"init_optimizer": True, "init_bank": True}
    run(arguments(records, workdir, **options), devices=2)
    after = saved_state(workdir, 2)
    assert after["['bank']['inserted']"] == before["['bank']['inserted']"] + 2 * 16
    assert after["['step']"] == 2
    counts = {int(value) for name, value in after.items() if name.endswith("['count']")}
    assert counts == {2, 8}  # of the schedule, and of the moments
    ((step, origin),) = events(workdir, "init_from")
    assert (step, origin["step"], origin["workdir"]) == (0, 6, str(old))
    # The other run is not needed any more.
    (old / "checkpoints").rename(tmp_path / "moved")
    assert "is already trained to step 2" in run(arguments(records, workdir, **options))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"init_from": "{empty}"}, "has no checkpoints: give the workdir of a pretraining"),
        ({"init_bank": True}, "init_optimizer and init_bank need init_from"),
        ({"init_from": "{old}", "model.embedding_dim": 24}, "params in {old} does not fit this"),
        (
            {"init_from": "{old}", "init_optimizer": True, "optimizer.name": "sgd"},
            "opt_state in {old} does not fit this config",
        ),
        ({"init_from": "{old}", "init_bank": True, "bank.size": 64}, "bank in {old} does not fit"),
        (
            {"init_from": "{old}", "init_bank": True, "views.speeds": (1, 2)},
            "belongs to another run: views.speeds (1, 2, 4, 8), here (1, 2)",
        ),
        ({"execution.on_nan": "ignore"}, "execution.on_nan 'ignore' must be 'stop' or 'skip'"),
    ],
)
def test_a_state_that_does_not_fit_is_one_clear_error(small_run, tmp_path, overrides, message):
    directory, old = small_run
    places = {"old": old, "empty": tmp_path}
    given = {k: v.format(**places) if isinstance(v, str) else v for k, v in overrides.items()}
    options = {name.replace(".", "__"): value for name, value in given.items()}
    line = one_line(run(arguments(directory, tmp_path / "new", **options), code=1))
    assert message.format(**places) in line


@pytest.fixture(scope="module")
def small_run(records, tmp_path_factory) -> tuple[Path, Path]:
    old = tmp_path_factory.mktemp("course") / "old"
    run(arguments(records, old, steps=2))
    return records, old


@pytest.mark.slow
def test_a_resumed_run_still_counts_the_records_that_it_could_not_read(tmp_path):
    made = [make_record(number, seconds=5.0, side=24) for number in range(24)]
    for number in (2, 5):
        frames = [b"no JPEG at all"] * len(made[number].frames)
        made[number] = dataclasses.replace(made[number], frames=frames)
    directory = write_records(tmp_path / "records", made)
    options = {"execution__max_bad_records": 2}
    workdir = tmp_path / "run"
    run(arguments(directory, workdir, steps=6, **options))
    progress = checkpoint.read_progress(workdir, 6)
    assert len(progress.unreadable) == 2
    more = arguments(directory, workdir, steps=9, execution__accept_changes=True, **options)
    output = run(more)
    assert "is left out" not in output
    assert rows(workdir)[-1]["unreadable_records"] == 2
    # As an older version wrote it.
    path = workdir / "checkpoints" / "9" / "progress" / "metadata"
    old = {k: v for k, v in json.loads(path.read_text()).items() if k in ("step", "devices")}
    old |= {"train_seconds": 1.0, "data_fingerprint": progress.data_fingerprint}
    path.write_text(json.dumps(old))
    assert list(checkpoint.read_progress(workdir, 9).unreadable) == []
