"""Profiles of a few steps, at a step and on a signal."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import jax
import pytest

from tests.training.small import arguments, descendants, start_processes


def profiled(workdir: Path, process: int) -> list[list[int]]:
    """Numbers of the steps in each profile of a process."""
    found = []
    for path in sorted((workdir / f"profile/process_{process}").rglob("*.xplane.pb")):
        steps = {
            dict(event.stats)["step_num"]
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes
            for line in plane.lines
            for event in line.events
            if event.name == "train"
        }
        found.append(sorted(int(step) for step in steps))
    return found


@pytest.mark.slow
def test_processes_write_profiles_at_a_step_and_on_a_signal(records, tmp_path):
    options = arguments(records, tmp_path, steps=24, execution__profile_step=3)
    options += ["--config.execution.workers=1"]
    processes = start_processes(options, devices=1)
    for line in processes[0].stdout:
        if line.startswith("step 8/"):
            # Also to data workers and to the copier of the log, as from `scancel --signal`.
            for process in (processes[1].pid, *descendants(processes[1].pid)):
                os.kill(process, signal.SIGUSR1)
            break
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert f"profile of steps 3 to 5: {tmp_path}/profile/process_1" in outputs[1]
    assert profiled(tmp_path, 0) == [[3, 4, 5]]
    at_step, on_signal = profiled(tmp_path, 1)
    assert at_step == [3, 4, 5]
    assert on_signal == list(range(on_signal[0], on_signal[0] + 3))
    assert on_signal[0] >= 8
