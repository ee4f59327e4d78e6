"""Runs that are stopped, killed, damaged, continued elsewhere: by real processes of avcl_jax.main.

docs/reliability.md has a table of these tests, which `make reliability` runs and writes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

from avcl_jax.processes import STOPPED
from avcl_jax.training import checkpoint
from tests.data.synthetic_records import make_record, write_records
from tests.training.small import (
    arguments,
    free_port,
    losses,
    one_line,
    run,
    run_processes,
    saved_state,
    saved_steps,
    start,
    start_processes,
)


class Seen:
    """A row of the table: what was done, what the processes did, and after how many seconds."""

    def __init__(self, table: list[tuple[str, str, float]]) -> None:
        self._table = table

    def act(self, what: str) -> None:
        """Begins to count, as something is done to a process."""
        self._what, self._began = what, time.monotonic()

    def ended(self) -> None:
        """Stops counting: all processes have ended."""
        self._seconds = time.monotonic() - self._began

    def told(self, outcome: str) -> None:
        """Adds the row, when everything that it says has been asserted."""
        self._table.append((self._what, outcome, self._seconds))


@pytest.fixture(scope="module")
def table() -> Iterator[list[tuple[str, str, float]]]:
    """Rows; written into the page that AVCL_JAX_TABLE names, between two comments."""
    rows: list[tuple[str, str, float]] = []
    yield rows
    if page := os.environ.get("AVCL_JAX_TABLE"):
        before, begin, rest = Path(page).read_text().partition("<!-- begin table -->\n")
        _, end, after = rest.partition("<!-- end table -->\n")
        assert begin, f"{page} has no place for the table"
        assert end, f"{page} has no end of the table"
        lines = [f"| {what} | {outcome} | {seconds:.1f} |\n" for what, outcome, seconds in rows]
        head = "| done | all processes | seconds |\n|---|---|---|\n"
        Path(page).write_text("".join([before, begin, head, *lines, end, after]))


@pytest.fixture
def seen(table) -> Seen:
    return Seen(table)


RESUMES = "the same command ends bitwise as an undisturbed run"


def test_a_run_killed_by_a_signal_and_resumed_with_two_workers_is_bitwise_the_same(
    records, whole_run, tmp_path, seen
):
    workdir = tmp_path / "stopped"
    seen.act("SIGTERM to one process and its children, in its first step of 6")
    step = stopped_run(arguments(records, workdir))
    seen.ended()
    assert 1 <= step < 6
    run(arguments(records, workdir, execution__workers=2))
    assert_identical(whole_run, workdir, 6)
    seen.told(f"saves step {step}, exit 75; {RESUMES}, with 2 data workers instead of 0")


FILES = ["truncated", "deleted", "changed", "not committed", "checksums"]


def spoil(checkpoint: Path, how: str) -> None:
    """Damages one file of a checkpoint, the largest unless `how` names another."""
    path = max(checkpoint.rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:10])
    elif how == "deleted":
        path.unlink()
    elif how == "changed":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif how == "not committed":
        (checkpoint / "checksums.json").unlink()
        (checkpoint / "commit_success.txt").unlink()
    else:
        (checkpoint / "checksums.json").write_text("{")


@pytest.mark.parametrize("how", FILES)
def test_a_damaged_checkpoint_is_moved_and_the_one_before_is_the_newest(
    whole_run, tmp_path, capsys, how
):
    shutil.copytree(whole_run, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp").mkdir()  # of a save that was killed
    spoil(tmp_path / "checkpoints" / "6", how)
    if how != "not committed":
        with pytest.raises(checkpoint.CheckpointError, match=r"checkpoint 6 in .* is damaged"):
            checkpoint.load_variables(tmp_path)
    with checkpoint.Checkpoints(epath.Path(tmp_path), keep=2) as checkpoints:
        assert checkpoints.latest_step() == 3
    assert capsys.readouterr().out.startswith("checkpoint 6 is damaged (")
    (aside,) = (tmp_path / "damaged_checkpoints").iterdir()
    assert aside.name.startswith("6-")
    assert (aside / "state").is_dir()
    assert checkpoint.load_variables(tmp_path)[1] == 3


def test_if_every_checkpoint_is_damaged_nothing_is_moved(whole_run, tmp_path):
    shutil.copytree(whole_run, tmp_path, dirs_exist_ok=True)
    for step in saved_steps(tmp_path):
        spoil(tmp_path / "checkpoints" / str(step), "truncated")
    with pytest.raises(checkpoint.CheckpointError, match=r"every checkpoint in .* is damaged") as e:
        checkpoint.Checkpoints(epath.Path(tmp_path), keep=2)
    assert re.findall(r"(\d): state/\S+ has 10 bytes instead of", str(e.value)) == ["6", "3"]
    assert saved_steps(tmp_path) == [3, 6]


@pytest.mark.slow
def test_a_run_whose_newest_checkpoint_is_damaged_resumes_from_the_one_before(
    records, whole_run, tmp_path, seen
):
    shutil.copytree(whole_run, tmp_path, dirs_exist_ok=True)
    spoil(tmp_path / "checkpoints" / "6", "changed")
    seen.act("one bit of the newest checkpoint, 6, is changed; then the same command")
    assert "steps 3 to 6" in run(arguments(records, tmp_path))
    seen.ended()
    assert_identical(whole_run, tmp_path, 6)
    seen.told(f"one line, the checkpoint is moved aside, trains from step 3; {RESUMES}")


@pytest.mark.slow
def test_any_number_of_workers_resumes_in_the_middle_of_an_epoch(records, tmp_path):
    whole, workdir = tmp_path / "whole", tmp_path / "stopped"
    run(arguments(records, whole, steps=20))
    steps = [
        stopped_run(arguments(records, workdir, steps=20, execution__workers=workers))
        for workers in (0, 2)
    ]
    assert 1 <= steps[0] < steps[1] < 20
    run(arguments(records, workdir, steps=20, execution__workers=1))
    assert_identical(whole, workdir, 20)


@pytest.mark.slow
def test_no_worker_outlives_a_killed_run(records, tmp_path, seen):
    options = arguments(records, tmp_path / "killed", steps=4000, execution__workers=2)
    process = start(options, own_group=True)
    for line in process.stdout:
        if line.startswith("step 5/"):
            seen.act("SIGKILL to one process with 2 data workers, at step 5")
            process.kill()
            break
    process.wait()
    deadline = time.monotonic() + 20
    try:
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)  # Raises when no process of the run is left.
            time.sleep(0.2)
    except ProcessLookupError:
        seen.ended()
        seen.told("the data workers end too")
        return
    os.killpg(process.pid, signal.SIGKILL)
    pytest.fail("worker processes are left 20 s after their training process was killed")


def stopped_run(options: list[str]) -> int:
    """Starts a run and sends SIGTERM at its first step; returns the step that was saved.

    The signal goes to all processes of the run, as from `timeout` or SLURM; worker processes that
    it ended left the training process waiting for ever.
    """
    process, printed = start(options, own_group=True), []
    for line in process.stdout:
        if line.startswith("step ") and not any(text.startswith("step ") for text in printed):
            os.killpg(process.pid, signal.SIGTERM)
        printed.append(line)
    assert process.wait() == STOPPED, printed
    *lines, stopped = printed[1:]
    asked = "avcl_jax: SIGTERM: saves after this step; a second signal ends at once\n"
    assert asked in lines
    assert all(line.startswith("step ") for line in lines if line != asked), printed
    return stopped_at(stopped)


def stopped_at(line: str) -> int:
    """Step of the line that a stopped run ends with."""
    assert line.startswith("stopped at step "), line
    assert line.endswith("; the same command resumes from here\n"), line
    return int(line.split()[3])


@pytest.mark.slow
def test_a_signal_to_any_of_two_processes_stops_both_after_the_same_step(records, tmp_path, table):
    whole, workdir = tmp_path / "whole", tmp_path / "stopped"
    long = {"steps": 40, "execution__checkpoint_every": 1000}
    run_processes(arguments(records, whole, **long), devices=1)
    reached = [0]
    # While it compiles, while it saves, and near the end.
    for number, name, when, every in (
        (1, signal.SIGTERM, "demo: 24 videos", 1000),
        (0, signal.SIGINT, "step {}/", 1),
        (1, signal.SIGTERM, "step 34/", 1000),
    ):
        seen, when = Seen(table), when.format(reached[-1] + 3)
        options = arguments(records, workdir, **long | {"execution__checkpoint_every": every})
        processes = start_processes(options, devices=1)
        try:
            for line in processes[0].stdout:
                if line.startswith(when):
                    moment = "while it compiles" if when.startswith("demo") else f"at {when}40"
                    saving = ", saving every step" if every == 1 else ""
                    seen.act(f"{name.name} to process {number} of 2, {moment}{saving}")
                    processes[number].send_signal(name)
                if line.startswith("stopped"):
                    reached.append(stopped_at(line))
                    break
            rest = [process.communicate(timeout=120)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        seen.ended()
        assert [process.returncode for process in processes] == [STOPPED, STOPPED], rest
        assert saved_steps(workdir)[-1] == reached[-1]
        # Two steps were under way, and their votes are read one step later.
        if when.startswith("step"):
            assert int(when[5:-1]) <= reached[-1] <= int(when[5:-1]) + 5
        seen.told(f"both save step {reached[-1]}, exit 75")
    run_processes(options, devices=1)
    assert_identical(whole, workdir, 40)


@pytest.mark.slow
def test_a_process_may_compile_half_a_minute_longer_than_the_other(records, tmp_path, seen):
    options = arguments(
        records, tmp_path / "run", steps=2, execution__compilation_cache=tmp_path / "empty"
    )
    processes = start_processes(options, devices=2)
    try:
        for line in processes[0].stdout:
            if line.startswith("demo: 24 videos"):  # and now it compiles the step
                seen.act("process 1 of 2 is paused for 50 s while it compiles")
                processes[1].send_signal(signal.SIGSTOP)
                break
        with pytest.raises(subprocess.TimeoutExpired):
            processes[0].communicate(timeout=50)
        processes[1].send_signal(signal.SIGCONT)
        outputs = [process.communicate(timeout=120)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], outputs
        seen.ended()
        seen.told("process 0 waits, both train to the end, exit 0")
    finally:
        for process in processes:
            process.kill()


_SILENT = r"process 1 has been silent for 8 s, after step \d+; see its log \(its threads now: "
_GONE = "process 0, the coordinator, is gone or has given up this process: see their logs"
_NO_ANSWER = "process 0, the coordinator, has not answered for 8 s, after step "


@pytest.fixture(scope="module")
def two_processes(records, tmp_path_factory) -> Path:
    """A run of 12 steps on two processes."""
    workdir = tmp_path_factory.mktemp("runs") / "two"
    run_processes(arguments(records, workdir, steps=12), devices=1)
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "number", "message"),
    [
        (signal.SIGKILL, 0, f"{_GONE}|{_NO_ANSWER}"),
        (signal.SIGKILL, 1, _SILENT),
        (signal.SIGSTOP, 0, _NO_ANSWER),
        (signal.SIGSTOP, 1, _SILENT),
    ],
)
def test_a_process_that_is_gone_ends_the_other_and_the_same_command_resumes(
    records, two_processes, tmp_path, seen, name, number, message
):
    options = [*arguments(records, tmp_path / "run", steps=12), "--peer_timeout=8"]
    processes = start_processes(options, devices=1)
    try:
        for line in processes[0].stdout:
            if line.startswith("step 5/"):
                seen.act(f"{name.name} to process {number} of 2, at step 5/12")
                processes[number].send_signal(name)
                break
        other = processes[1 - number]
        output, _ = other.communicate(timeout=60)
        seen.ended()
        assert other.returncode in (1, -signal.SIGABRT), output
        assert re.search(message, one_line(output))
    finally:
        for process in processes:
            process.kill()
    logs = tmp_path / "run" / "logs"
    assert "step 4/12" in (logs / "process_0.txt").read_text()
    assert (logs / "process_1.txt").read_text().startswith("--- process 1 of 2, ")
    run_processes(options, devices=1)
    assert_identical(two_processes, tmp_path / "run", 12)
    code = other.returncode if other.returncode > 0 else 128 - other.returncode
    seen.told(f"the other ends by one line, exit {code} (`--peer_timeout=8`); {RESUMES}")


def descendants(pid: int) -> list[int]:
    """Processes that a process and its descendants have started."""
    children = [
        int(child)
        for listed in Path(f"/proc/{pid}/task").glob("*/children")
        for child in listed.read_text().split()
    ]
    return [process for child in children for process in (child, *descendants(child))]


@pytest.mark.slow
def test_a_data_worker_that_hangs_is_told_and_ends_a_run_of_two(records, tmp_path, seen):
    options = arguments(
        records, tmp_path / "run", steps=400, execution__workers=1, execution__log_every=1
    )
    processes = start_processes([*options, "--peer_timeout=8"], devices=1)
    try:
        for line in processes[0].stdout:
            if line.startswith("step 5/"):
                stopped = descendants(processes[1].pid)
                seen.act("SIGSTOP to the data workers of process 1 of 2, at step 5/400")
                for child in stopped:
                    os.kill(child, signal.SIGSTOP)
                break
        codes = [process.wait(timeout=90) for process in processes]
        seen.ended()
    finally:
        for child in stopped:
            os.kill(child, signal.SIGCONT)
        for process in processes:
            process.kill()
    outputs = [process.communicate()[0] for process in processes]
    assert codes == [1, 1], outputs
    for output in outputs:
        assert re.search(r"process 1 has read no batch for \d+ s, after step ", one_line(output))
    seen.told("both end by one line that names process 1, exit 1 (`--peer_timeout=8`)")


def test_other_versions_resume_a_run_and_are_named(whole_run, tmp_path, capsys):
    config = (whole_run / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    versions = json.loads((whole_run / "versions.json").read_text())
    (tmp_path / "versions.json").write_text(json.dumps(versions | {"jax": "0.1", "avcl_jax": "a"}))
    checkpoint.check_config(epath.Path(tmp_path), config)
    now = versions["avcl_jax"], versions["jax"]
    changes = f"avcl_jax: 'a' -> '{now[0]}'; jax: '0.1' -> '{now[1]}'"
    assert capsys.readouterr().out == f"{tmp_path} was begun with other versions: {changes}\n"
    assert json.loads((tmp_path / "versions.json").read_text()) == versions
    checkpoint.check_config(epath.Path(tmp_path), config)
    assert not capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (1, 2), (2, 0)])
def test_killed_at_random_moments_a_run_ends_as_if_undisturbed(
    records, tmp_path, seen, processes, workers
):
    """AVCL_JAX_KILLS=20 makes a long test of it."""
    kills = int(os.environ.get("AVCL_JAX_KILLS", "3"))
    last = 12 * kills
    options = {"steps": last, "execution__checkpoint_every": 2, "execution__workers": workers}

    def begin(name: str) -> list[subprocess.Popen[str]]:
        flags = arguments(records, tmp_path / name, **options)
        if processes == 1:
            return [start(flags, own_group=True)]
        return start_processes(flags, devices=1)

    def end(started: list[subprocess.Popen[str]]) -> None:
        outputs = [process.communicate(timeout=600)[0] for process in started]
        assert not any(process.returncode for process in started), outputs

    end(begin("whole"))  # compiles
    began = time.monotonic()
    for line in (started := begin("again"))[0].stdout:
        if line.startswith("step 1/"):
            seconds = time.monotonic() - began
    end(started)
    rng = random.Random(processes + workers)
    reached, repeated = [], []
    whom = "both processes" if processes > 1 else "one process"
    seen.act(
        f"SIGKILL {kills} times at random moments to {whom}, {workers} data workers, a checkpoint "
        f"every 2 of {last} steps"
    )
    for _ in range(kills):
        started = begin("killed")
        if (steps := rng.randint(0, 8)) == 0:  # before its first step
            with contextlib.suppress(subprocess.TimeoutExpired):
                started[0].wait(timeout=rng.uniform(0.1, seconds))
        else:  # in one of the next steps, or as it is saved
            for line in started[0].stdout:
                steps -= line.startswith("step ")
                if not steps:
                    break
            with contextlib.suppress(subprocess.TimeoutExpired):
                started[0].wait(timeout=rng.uniform(0.0, 0.1))
        for process in rng.sample(started, processes):
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=rng.uniform(0.0, 0.5))
        for process in started:
            process.communicate()
        directory = tmp_path / "killed" / "checkpoints"
        names = [path.name for path in directory.iterdir()] if directory.exists() else []
        reached.append(max(map(int, filter(str.isdecimal, names)), default=0))
        if (tmp_path / "killed" / "metrics.jsonl").exists():
            logged = max(losses(tmp_path / "killed"), default=0)
            repeated.append(max(logged - reached[-1], 0))
    end(begin("killed"))
    seen.ended()
    assert reached == sorted(reached)
    assert reached[-1] < last, "the run was at its end before the last kill"
    assert_identical(tmp_path / "whole", tmp_path / "killed", last)
    mean = f"{np.mean(repeated):.1f} steps to repeat on average; " if repeated else ""
    seen.told(f"checkpoints {', '.join(map(str, reached))} were the newest, {mean}{RESUMES}")


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of 6 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.mark.slow
def test_training_continues_while_the_disk_is_full(records, small_disk, seen):
    workdir, ballast = small_disk / "run", small_disk / "ballast"
    process = start(arguments(records, workdir, steps=60, execution__checkpoint_every=10))
    printed = []
    for line in process.stdout:
        printed.append(line)
        complete = (workdir / "checkpoints" / "10" / "checksums.json").exists()
        if complete and not ballast.exists() and not any("not saved" in line for line in printed):
            seen.act("the disk is full after checkpoint 10 of 60, for one process")
            # Room for metrics and not for a checkpoint.
            ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - 300_000))
        if "is not saved" in line:
            ballast.unlink(missing_ok=True)
    assert process.wait() == 0, "".join(printed[-30:])
    seen.ended()
    line = next(line for line in printed if "is not saved" in line)
    # The disk may fill up before a checkpoint is begun, or while orbax or we write to it.
    found = re.match(
        r"step (\d+) is not saved, checkpoint (\d+) is kept: .*(has room for 0\.\d MB of a "
        r"checkpoint|No space left on device).*; training continues\n",
        line,
    )
    assert found, line
    unsaved, kept = int(found[1]), int(found[2])
    assert unsaved - kept == 10
    assert saved_steps(workdir) == [50, 60]
    seen.told(f"one line, checkpoint {kept} is kept, trains on; the next checkpoint is saved")


def test_a_disk_that_fills_up_while_a_checkpoint_is_written(small_disk, monkeypatch):
    monkeypatch.setattr(checkpoint, "_check_room", lambda directory, state: None)
    ballast = small_disk / "ballast"
    state = {"a": jax.random.normal(jax.random.key(0), (200_000,))}
    with checkpoint.Checkpoints(epath.Path(small_disk), keep=2) as checkpoints:
        checkpoints.save(state, checkpoint.Progress(1, 0.0, "", 1))
        checkpoints.finish()
        ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - 300_000))
        message = "step 2 is not saved, checkpoint 1 is kept: .*No space left"
        checkpoints.save(state, checkpoint.Progress(2, 0.0, "", 1))
        with pytest.raises(checkpoint.SaveError, match=message):
            checkpoints.finish()
        assert saved_steps(small_disk) == [1]
        ballast.unlink()
        checkpoints.save(state, checkpoint.Progress(3, 0.0, "", 1))
    assert saved_steps(small_disk) == [1, 3]
    assert not list((small_disk / "checkpoints").glob("2*"))
    assert checkpoint.damage(epath.Path(small_disk) / "checkpoints" / "3") is None


def test_a_failed_write_without_a_name_is_an_unsaved_checkpoint(tmp_path, monkeypatch):
    def fail(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_bytes", fail)
    state = {"a": jax.numpy.zeros(3)}
    with checkpoint.Checkpoints(epath.Path(tmp_path), keep=2) as checkpoints:
        checkpoints.save(state, checkpoint.Progress(1, 0.0, "", 1))
        line = f"step 1 is not saved, no checkpoint was written: {tmp_path}/checkpoints: No space "
        with pytest.raises(checkpoint.SaveError, match=line):
            checkpoints.finish()


def test_training_continues_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    continued, seen = threading.Event(), []
    monkeypatch.setattr(
        checkpoint, "_check_room", lambda directory, state: seen.append(continued.wait(60))
    )
    with checkpoint.Checkpoints(epath.Path(tmp_path), keep=2) as checkpoints:
        checkpoints.save({"a": jax.numpy.zeros(3)}, checkpoint.Progress(1, 0.0, "", 1))
        continued.set()
    assert seen == [True]
    assert saved_steps(tmp_path) == [1]


@pytest.mark.parametrize(
    "like", [{"a": jax.numpy.zeros(4)}, {"a": jax.numpy.zeros(3), "b": jax.numpy.zeros(1)}, {}]
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path, like):
    with checkpoint.Checkpoints(epath.Path(tmp_path), keep=2) as checkpoints:
        checkpoints.save({"a": jax.numpy.zeros(3)}, checkpoint.Progress(1, 0.0, "", 1))
        checkpoints.finish()
        with pytest.raises(checkpoint.CheckpointError, match="does not fit this model") as error:
            checkpoints.restore(1, like)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_second_signal_ends_a_run_at_once_and_leaves_its_checkpoint(records, tmp_path, seen):
    workdir = tmp_path / "run"
    options = arguments(records, workdir, steps=4000, execution__checkpoint_every=2)
    process = start(options)
    for line in process.stdout:
        if line.startswith("step 5/"):
            seen.act("SIGTERM and SIGINT to one process, in one step, a checkpoint every 2 steps")
            process.send_signal(signal.SIGSTOP)  # so that both arrive in one step
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGCONT)
            break
    rest = process.communicate(timeout=60)[0]
    seen.ended()
    assert process.returncode in (128 + signal.SIGTERM, 128 + signal.SIGINT), rest
    assert "ends without saving" in rest
    step = saved_steps(workdir)[-1]
    assert step in (2, 4, 6)
    assert saved_state(workdir, step)
    seen.told(f"ends without saving, exit {process.returncode}; checkpoint {step} is good")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--coordinator=127.0.0.1:1"], "cannot join others (Number of processes must be defined"),
        (["--distributed"], "cannot join others (coordinator_address should be defined"),
    ],
)
def test_processes_that_cannot_be_found_are_one_clear_error(records, tmp_path, flags, message):
    line = one_line(run([*arguments(records, tmp_path / "run"), *flags], code=1))
    assert message in line
    assert "give --coordinator=HOST:PORT, --num_processes and --process_id" in line


@pytest.mark.parametrize("number", [0, 1])
def test_a_process_waits_so_long_for_the_others_and_then_says_so(records, tmp_path, seen, number):
    seen.act(f"process {1 - number} of 2 is never started")
    flags = [f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2"]
    flags += [f"--process_id={number}", "--join_timeout=3"]
    line = one_line(run([*arguments(records, tmp_path / "run"), *flags], code=1))
    seen.ended()
    assert f"process {number} of 2 waited 3 s at 127.0.0.1:" in line
    seen.told("the other ends by one line, exit 1 (`--join_timeout=3`)")


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("--config.seed=3", "config.seed is 0 in process 0 and 3 in process 1. Start all by"),
        pytest.param(
            "--config.data.directory={other}",
            r"the data set is made-train\S+ in process 0 and made-train\S+ in process 1",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_processes_that_differ_are_refused(records, tmp_path, seen, second, message):
    made = [make_record(n, seconds=5.0, side=24) for n in range(1, 25)]
    other = write_records(tmp_path / "other", made)
    options = arguments(records, tmp_path / "run")
    seen.act(f"process 1 of 2 is started with another `{second.partition('=')[0]}`")
    second = [second.format(other=other)]
    for process in start_processes(options, devices=1, second=second):
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 1
        assert re.search(f"processes of one run differ: {message}", one_line(output))
    seen.ended()
    assert not (tmp_path / "run").exists()
    seen.told("both name the difference in one line, exit 1, no workdir")


def assert_identical(left: Path, right: Path, step: int) -> None:
    """Same loss of every step, and the same bits in every array of a checkpoint."""
    expected, found = saved_state(left, step), saved_state(right, step)
    assert expected.keys() == found.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    assert losses(left) == losses(right)


def assert_agree(left: Path, right: Path, step: int) -> None:
    """Same loss and parameters to 1e-5, same bank as a set."""
    first, second = losses(left), losses(right)
    assert first.keys() == second.keys()
    np.testing.assert_allclose(list(second.values()), list(first.values()), atol=1e-5)
    one, many = saved_state(left, step), saved_state(right, step)
    assert one.keys() == many.keys()
    for name in one:
        if "params" in name or "batch_stats" in name:
            np.testing.assert_allclose(many[name], one[name], atol=1e-5, err_msg=name)
    numbers = "['bank']['rows']['numbers']['columns']"  # the insertion number first
    order = [np.argsort(state[numbers][:, 0]) for state in (one, many)]
    for name in one:
        if name.startswith("['bank']") and one[name].ndim:
            np.testing.assert_allclose(
                many[name][order[1]], one[name][order[0]], atol=1e-4, err_msg=name
            )


# The second-moment division of AdamW turns rounding of 1e-9 in a tiny gradient into a step of the
# full learning rate, so devices are compared under SGD, where rounding stays rounding.
_COMPARED = {
    "steps": 3,
    "execution__checkpoint_every": 3,
    "optimizer__name": "sgd",
    "bank__size": 16,
}


@pytest.fixture(scope="module")
def one_device(records, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "one"
    run(arguments(records, workdir, **_COMPARED))
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "fsdp"), [(8, 1), (4, 2)])
def test_many_devices_agree_with_one_after_three_steps(
    records, one_device, tmp_path, devices, fsdp
):
    options = arguments(records, tmp_path / "many", execution__fsdp=fsdp, **_COMPARED)
    assert f"{devices} cpu device(s)" in run(options, devices=devices)
    assert_agree(one_device, tmp_path / "many", 3)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["avcl_jax.main", "tests.training.interleaved"])
def test_two_processes_of_four_devices_agree_with_one(records, one_device, tmp_path, module):
    workdir = tmp_path / "two"
    options = arguments(records, workdir, **_COMPARED)
    outputs = run_processes(options, devices=4, module=module)
    assert "2 process(es)" in outputs[0]
    assert_agree(one_device, workdir, 3)


@pytest.mark.slow
def test_a_run_goes_on_with_other_devices_and_processes_and_shows_every_video_once_an_epoch(
    records, tmp_path, table
):
    """The bank has the rows of one epoch: after the last step of one, each video twice."""
    settings = _COMPARED | {"steps": 24, "bank__size": 48, "execution__checkpoint_every": 1000}
    run(arguments(records, tmp_path / "one", **settings))
    workdir, before = tmp_path / "run", "nothing"
    for processes, devices, more in (
        (1, 8, {}),
        (1, 4, {"execution__fsdp": 2}),
        (2, 4, {}),
        (1, 2, {}),
    ):
        seen, options = Seen(table), arguments(records, workdir, **settings | more)
        started = (
            start_processes(options, devices=devices)
            if processes > 1
            else [start(options, devices=devices)]
        )
        now = f"{processes} x {devices} devices{', fsdp 2' if more else ''}"
        seen.act(f"{now} after {before}, then SIGTERM")
        printed = []
        for line in started[0].stdout:
            if line.startswith("step ") and not printed:
                started[0].send_signal(signal.SIGTERM)
                printed.append(line)
        codes = [process.wait() for process in started]
        seen.ended()
        assert codes == [STOPPED] * processes, (now, line)
        seen.told(f"trains on, saves step {stopped_at(line)}, exit 75")
        before = now
    run(arguments(records, workdir, **settings))
    one, many = losses(tmp_path / "one"), losses(workdir)
    assert one.keys() == many.keys()
    # Rounding, which grows from step to step.
    np.testing.assert_allclose(list(many.values()), list(one.values()), rtol=1e-3)
    state = saved_state(workdir, 24)
    rows = state["['bank']['rows']['numbers']['columns']"]
    assert sorted(rows[:, 0]) == list(range(24 * 16 - 48, 24 * 16))
    ids, counts = np.unique(rows[:, 1], return_counts=True)
    assert (len(ids), set(counts)) == (24, {2})


@pytest.mark.slow
def test_a_decoder_that_hangs_ends_a_run_of_two(records, tmp_path, seen):
    options = arguments(records, tmp_path / "run", steps=400)
    processes = start_processes(
        [*options, "--peer_timeout=8"], devices=1, module="tests.training.hanging"
    )
    seen.act("decoding a frame does not return, in process 1 of 2")
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    seen.ended()
    assert [process.returncode for process in processes] == [1, 1], outputs
    for output in outputs:
        line = one_line(output)
        assert re.search(r"process 1 has read no batch for \d+ s, after step [1-9]", line)
    assert "in decode\n" in (tmp_path / "run" / "logs" / "stacks_1.txt").read_text()
    seen.told(
        "both end by one line that names process 1, exit 1 (`--peer_timeout=8`); its stacks show "
        "the decoder"
    )


@pytest.mark.slow
def test_a_decoder_that_hangs_is_told_by_a_run_of_one(records, tmp_path, seen):
    options = [*arguments(records, tmp_path / "run", steps=400), "--peer_timeout=2"]
    process = start(options, module="tests.training.hanging")
    seen.act("decoding a frame does not return, in one process")
    for line in process.stdout:
        if line.startswith("avcl_jax: process 0 has read no batch for"):
            break
    else:
        pytest.fail(f"ended with {process.wait()}: {line}")
    seen.ended()
    for _ in range(2):
        process.terminate()
        time.sleep(0.5)
    assert process.wait(timeout=20) == 128 + signal.SIGTERM
    assert "in decode\n" in (tmp_path / "run" / "logs" / "stacks_0.txt").read_text()
    seen.told(
        "it says so and writes its stacks, which show the decoder (`--peer_timeout=2`), and goes "
        "on waiting; the second SIGTERM ends it, exit 143"
    )


@pytest.fixture
def little_shared_memory() -> Iterator[list[str]]:
    """Words before a command that give it a /dev/shm of its own, of 1 MB."""
    mount = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$0" "$@"'
    words = ["unshare", "--mount", "sh", "-c", mount]
    if subprocess.run([*words, "true"], capture_output=True).returncode:
        pytest.skip("only root may mount a small /dev/shm")
    return words


@pytest.mark.slow
def test_shared_memory_that_fills_up_does_not_disturb_a_run(
    records, whole_run, tmp_path, little_shared_memory, seen
):
    options = arguments(records, tmp_path / "run", execution__workers=2)
    process = start(options, before=little_shared_memory)
    free, printed = None, []
    for line in process.stdout:
        printed.append(line)
        if line.startswith("step 1/"):
            seen.act("/dev/shm is filled by another program at step 1/6, 2 data workers")
            shared = Path(f"/proc/{process.pid}/root/dev/shm")
            free = shutil.disk_usage(shared).free
            with (shared / "ballast").open("wb") as ballast:
                os.posix_fallocate(ballast.fileno(), 0, free)
            assert shutil.disk_usage(shared).free == 0
    assert process.wait() == 0, printed
    assert free
    seen.ended()
    assert_identical(whole_run, tmp_path / "run", 6)
    seen.told("trains on, its memory is taken before the first step; bitwise as an undisturbed run")


@pytest.mark.slow
def test_too_little_shared_memory_is_refused_before_the_first_step(
    records, tmp_path, little_shared_memory, seen
):
    options = arguments(records, tmp_path / "run", execution__workers=2, crop__image_size=64)
    process = start(options, before=little_shared_memory)
    seen.act("/dev/shm has room for fewer than 4 batches, 2 data workers")
    output, _ = process.communicate(timeout=120)
    seen.ended()
    assert process.returncode == 1, output
    line = one_line(output)
    assert re.search(r"workers=2 need 3 MB of shared memory, .* /dev/shm has 1 MB free", line)
    assert not (tmp_path / "run").exists()
    seen.told("refused by one line with both sizes, exit 1, no workdir")
