"""Profiles of a few steps, at a step and on a signal."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest

from tests.training.small import PATIENCE, SIGNALLED, arguments, signals, start_processes


def profiled(workdir: Path, process: int) -> list[list[int]]:
    """Numbers of the steps in each profile of a process, in order."""
    found = []
    for path in (workdir / f"profile/process_{process}").rglob("*.xplane.pb"):
        steps = {
            dict(event.stats)["step_num"]
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes
            for line in plane.lines
            for event in line.events
            if event.name == "train"
        }
        found.append(sorted(int(step) for step in steps))
    return sorted(found)


@pytest.mark.slow
def test_processes_write_profiles_at_a_step_and_on_a_signal(records, tmp_path):
    options = arguments(records, tmp_path, steps=16, execution__profile_step=3)
    options += ["--config.execution.workers=1"]
    # Also to data workers and to the copier of the log, as from `scancel --signal`.
    flags = [*signals(10, "SIGUSR1", processes=[1]), *options]
    processes = start_processes(flags, devices=1, module=SIGNALLED)
    outputs = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert f"profile of steps 3 to 5: {tmp_path}/profile/process_1" in outputs[1]
    assert profiled(tmp_path, 0) == [[3, 4, 5]]
    assert profiled(tmp_path, 1) == [[3, 4, 5], [11, 12, 13]]
