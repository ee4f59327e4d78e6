"""Between log lines the loop neither compiles, nor reads from the device, nor keeps old states."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re

import jax
import numpy as np
import pytest

from avcl_jax.compilation_cache import keep_compiled
from tests.data.synthetic_records import make_record, write_records
from tests.training import small

LOG_EVERY = 2


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """Directory and output of a run of two epochs in six steps, a log line after every second.

    Half of the records have no audio, one of them a silent track.
    """
    directory = tmp_path_factory.mktemp("loop")
    made = [make_record(n, seconds=5.0, side=24, has_audio=n % 2 == 0) for n in range(24)]
    silent = np.zeros_like(made[0].waveform)
    made[1] = dataclasses.replace(made[0], record_id="silent", waveform=silent)
    arguments = small.arguments(
        write_records(directory / "records", made),
        directory / "run",
        execution__log_every=LOG_EVERY,
        execution__checkpoint_every=6,
    )
    output = small.run([str(directory / "notes.json"), *arguments], module="tests.training.watched")
    assert "step 6/6" in output
    return directory, output


@pytest.fixture(scope="module")
def notes(watched):
    """Notes of `tests.training.watched` at each step."""
    found = json.loads((watched[0] / "notes.json").read_text())
    assert len(found) == 6
    return found


def test_steps_compile_once_donate_the_state_and_read_the_device_one_step_late(notes):
    compiled = [note["compiled"] for note in notes]
    assert compiled[0] < compiled[1]  # the step; then merging two steps' metrics
    assert compiled[2:] == compiled[2:3] * 4
    assert not any(notes[0]["deleted"])
    assert all(notes[1]["deleted"])
    # Metrics of steps 2 and 4 are read while steps 3 and 5 run.
    reads = [after["read"] - before["read"] for before, after in itertools.pairwise(notes)]
    assert [read > 0 for read in reads] == [False, False, True, False, True]


def test_compiled_programs_are_kept(notes):
    kept = [path.name for path in small.compilation_cache().iterdir()]
    assert any(name.startswith("jit_train_step") for name in kept)


def test_the_environments_cache_goes_before_that_of_the_config(monkeypatch):
    updates = {}
    monkeypatch.setattr(jax.config, "update", updates.__setitem__)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    keep_compiled("")
    assert not updates
    keep_compiled("~/cache")
    assert updates["jax_compilation_cache_dir"].endswith("/cache")
    assert not updates["jax_compilation_cache_dir"].startswith("~")
    updates.clear()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    keep_compiled("~/cache")
    assert not updates


def test_the_log_says_how_much_lacks_audio(watched):
    directory, output = watched
    assert "24 videos (12 without audio) from" in output
    lines = [line for line in output.splitlines() if line.startswith("step ")]
    assert len(lines) == 3
    assert len(re.findall(r"\d+ % of views without audio", output)) == 3
    assert "without video" not in output
    metrics = [json.loads(line) for line in (directory / "run/metrics.jsonl").open()]
    assert sum(row["data/without_audio"] for row in metrics) == pytest.approx(3 * 0.5)
    assert all(row["data/without_video"] == 0 for row in metrics)
