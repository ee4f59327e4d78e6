"""Runs of one process that are stopped, killed, damaged: by real processes of avcl_jax.main.

docs/reliability.md has a table of these tests and of those in test_reliability_hosts.py, which
`make reliability` runs and writes.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

from avcl_jax.export.runs import open_encoders
from avcl_jax.processes import STOPPED
from avcl_jax.training import checkpoint
from benchmarks import object_store
from tests.training.small import (
    PATIENCE,
    RESUMES,
    SIGNALLED,
    arguments,
    assert_identical,
    compilation_cache,
    one_line,
    run,
    run_here,
    run_processes,
    saved_state,
    saved_steps,
    signals,
    start,
    start_processes,
    stopped_at,
)

ASKED = "avcl_jax: SIGTERM: saves after this step; a second signal ends at once"


def stop(options: list[str], step: int) -> None:
    """Runs until SIGTERM in a step, and checks that this step is saved.

    The signal goes to all processes of the run, as from `timeout` or SLURM; worker processes that
    it ended left the training process waiting for ever.
    """
    output = run([*signals(step, "SIGTERM"), *options], module=SIGNALLED, code=STOPPED)
    assert stopped_at(output) == step
    rest = [line for line in output.splitlines()[1:] if not line.startswith(("step ", "stopped "))]
    assert rest == ["signalled: SIGTERM", ASKED]


def test_a_run_killed_by_a_signal_and_resumed_with_two_workers_is_bitwise_the_same(
    records, whole_run, tmp_path, seen
):
    workdir = tmp_path / "stopped"
    seen.act("SIGTERM to one process and its children, in step 2 of 6")
    stop(arguments(records, workdir), 2)
    seen.ended()
    run(arguments(records, workdir, execution__workers=2))
    assert_identical(whole_run, workdir, 6)
    seen.told(f"saves step 2, exit 75; {RESUMES}, with 2 data workers instead of 0")


@pytest.mark.slow
def test_any_number_of_workers_resumes_in_the_middle_of_an_epoch(records, whole_run, tmp_path):
    """An epoch has 3 steps."""
    workdir = tmp_path / "stopped"
    for step, workers in ((1, 1), (2, 0), (4, 2), (5, 1)):
        stop(arguments(records, workdir, execution__workers=workers), step)
    run(arguments(records, workdir))
    assert_identical(whole_run, workdir, 6)


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
    (aside,) = tmp_path.glob("damaged_checkpoint_*")
    assert aside.name.startswith("damaged_checkpoint_6_")
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
def test_no_worker_outlives_a_killed_run(records, tmp_path, seen):
    options = arguments(records, tmp_path / "killed", execution__workers=2)
    process = start([*signals(5, "SIGKILL"), *options], module=SIGNALLED)
    seen.act("SIGKILL to one process with 2 data workers, at step 5")
    assert process.wait(timeout=PATIENCE) == -signal.SIGKILL
    try:
        process.communicate(timeout=PATIENCE)  # Returns when no process has the pipe any more.
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail("worker processes are left 300 s after their training process was killed")
    seen.ended()
    seen.told("the data workers end too")


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
@pytest.mark.parametrize(
    ("processes", "workers", "views"),
    [
        # Steps that take longer than writing a checkpoint, as in real training, and shorter ones.
        (1, 0, {"crop__image_size": 64, "views__num_frames": 16}),
        (1, 2, {}),
        (2, 0, {}),
    ],
    ids=["1-0-slow", "1-2", "2-0"],
)
def test_killed_at_random_moments_a_run_ends_as_if_undisturbed(
    records, tmp_path, seen, processes, workers, views
):
    """AVCL_JAX_KILLS=20 makes a long test of it."""
    kills = int(os.environ.get("AVCL_JAX_KILLS", "3"))
    every, last = 4, 12 * kills
    options = {"steps": last, "execution__checkpoint_every": every, "execution__workers": workers}
    options |= views

    def begin(name: str, kill_at: int) -> list[subprocess.Popen[str]]:
        """Starts processes of which the first is killed at a step, unless it was before."""
        flags = arguments(records, tmp_path / name, **options)
        flags = [*signals(kill_at, "SIGKILL"), *flags]
        return start_processes(flags, devices=1, count=processes, module=SIGNALLED)

    def end(name: str) -> None:
        started = begin(name, last + 1)
        outputs = [process.communicate(timeout=PATIENCE)[0] for process in started]
        assert not any(process.returncode for process in started), outputs

    end("whole")
    lines = map(json.loads, (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines())
    step_seconds = np.median([1 / line["steps_per_second"] for line in lines])
    rng = random.Random(processes + workers)
    newest, reached, lost, seconds = 0, [], [], 0.0
    whom = "both processes" if processes > 1 else "one process"
    seen.act(
        f"SIGKILL {kills} times at random moments to {whom}, {workers} data workers, a checkpoint "
        f"every {every} of {last} steps of {step_seconds:.2f} s"
    )
    for number in range(kills):
        # Some before the first step; others in one of the next steps, or as it is saved. The first
        # one leaves a checkpoint: step 11 waits for it.
        steps, taken, began = rng.randint(0 if number else 10, 16), 0, time.monotonic()
        started = begin("killed", newest + 20)
        if steps == 0:
            with contextlib.suppress(subprocess.TimeoutExpired):
                started[0].wait(timeout=rng.uniform(0.1, seconds))
        else:
            for line in started[0].stdout:
                if line.startswith("step "):
                    seconds = seconds or time.monotonic() - began
                    taken = int(line.split()[1].split("/")[0])
                if taken == newest + steps:
                    break
            with contextlib.suppress(subprocess.TimeoutExpired):
                started[0].wait(timeout=rng.uniform(0.0, 0.1))
        for process in rng.sample(started, processes):
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=rng.uniform(0.0, 0.5))
        rest, *_ = [process.communicate()[0] for process in started]
        taken = max([taken, *map(int, re.findall(r"^step (\d+)/", rest, re.MULTILINE))])
        newest = max(saved_steps(tmp_path / "killed"), default=0)
        reached.append(newest)
        if taken:  # and the next one was under way
            lost.append(taken + 1 - newest)
    end("killed")
    seen.ended()
    assert every <= reached[0]
    assert reached == sorted(reached)
    # A checkpoint begins in the step after its own, and waits for the one before.
    assert max(lost) <= 2 * every + 1
    assert_identical(tmp_path / "whole", tmp_path / "killed", last)
    seen.told(
        f"checkpoints {', '.join(map(str, reached))} were the newest; `lost_steps_per_kill` "
        f"{np.mean(lost):.1f}, target at most {every / 2 + 1:g}; {RESUMES}"
    )


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
def test_training_continues_while_the_disk_is_full(records, small_disk, monkeypatch, capsys, seen):
    workdir, ballast = small_disk / "run", small_disk / "ballast"
    check_room, begun = checkpoint._check_room, itertools.count(1)

    def fill(*arguments) -> None:
        """As a checkpoint begins, the one before is complete, or it was given up."""
        number = next(begun)
        if number == 2:
            seen.act("the disk is full after checkpoint 10 of 40, for one process")
            # Room for metrics and not for a checkpoint.
            ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - 300_000))
        if number == 3:
            ballast.unlink()
        check_room(*arguments)

    monkeypatch.setattr(checkpoint, "_check_room", fill)
    run_here(monkeypatch, *arguments(records, workdir, steps=40, execution__checkpoint_every=10))
    seen.ended()
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "not saved" in line)
    assert re.fullmatch(
        r"step 20 is not saved, checkpoint 10 is kept: .* has room for 0\.\d MB of a checkpoint "
        r"of .*; training continues",
        line,
    )
    assert saved_steps(workdir) == [30, 40]
    seen.told("one line, checkpoint 10 is kept, trains on; the next checkpoint is saved")


def test_a_disk_that_fills_up_while_a_checkpoint_is_written(small_disk, monkeypatch):
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)
    monkeypatch.setattr(checkpoint, "_check_room", lambda directory, state: None)
    ballast = small_disk / "ballast"
    # Several, which are being written when the first fails.
    sizes = 200_000, *[5_000] * 60
    state = {str(n): jax.random.normal(jax.random.key(n), (s,)) for n, s in enumerate(sizes)}
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
    assert not printed
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
        checkpoint, "_check_room", lambda directory, state: seen.append(continued.wait(PATIENCE))
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
def test_ctrl_c_after_a_signal_ends_a_run_at_once_and_leaves_its_checkpoint(
    records, tmp_path, seen
):
    workdir = tmp_path / "run"
    options = arguments(records, workdir, execution__checkpoint_every=2)
    seen.act("SIGTERM and then SIGINT to one process, in step 6, a checkpoint every 2 steps")
    flags = [*signals(6, "SIGTERM", "SIGINT"), *options]
    output = run(flags, module=SIGNALLED, code=128 + signal.SIGINT)
    seen.ended()
    assert "avcl_jax: SIGINT: second signal, ends without saving" in output
    step = saved_steps(workdir)[-1]
    assert step in (2, 4)  # which may not have been complete
    assert saved_state(workdir, step)
    seen.told(f"ends without saving, exit 130; checkpoint {step} is good")


TWO_SIGTERMS = """
import os, signal, sys, threading, types
from avcl_jax import processes

seconds = map(float, sys.argv[1:])
processes.time = types.SimpleNamespace(monotonic=lambda: next(seconds))
with processes.stop_request() as request:
    os.kill(os.getpid(), signal.SIGTERM)
    while request.name is None:
        threading.Event().wait(0.01)
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGUSR1)
    while not request.profile:
        threading.Event().wait(0.01)
"""


@pytest.mark.parametrize(("seconds", "code"), [(1.9, 0), (2.1, 128 + signal.SIGTERM)])
def test_a_second_sigterm_ends_a_run_at_once_unless_it_is_the_same(seconds, code):
    command = [sys.executable, "-c", TWO_SIGTERMS, "10.0", f"{10 + seconds}", "99.0"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == code, ended.stderr
    second = "avcl_jax: SIGTERM: second signal, ends without saving"
    assert ended.stderr.splitlines() == [ASKED, *([second] if code else [])]


@pytest.mark.slow
def test_a_sigterm_that_comes_twice_does_not_keep_a_run_from_saving(
    records, whole_run, tmp_path, seen
):
    workdir = tmp_path / "run"
    seen.act("SIGTERM twice to one process, in step 4 of 6, as `timeout` sends it")
    flags = [*signals(4, "SIGTERM", "SIGTERM"), *arguments(records, workdir)]
    output = run(flags, module=SIGNALLED, code=STOPPED)
    seen.ended()
    assert ASKED in output
    assert stopped_at(output) == 4
    run(arguments(records, workdir))
    assert_identical(whole_run, workdir, 6)
    seen.told(f"saves step 4, exit 75; {RESUMES}")


@pytest.mark.slow
def test_a_decoder_that_hangs_is_told_by_a_run_of_one(records, tmp_path, seen):
    options = [*arguments(records, tmp_path / "run", steps=400), "--peer_timeout=8"]
    process = start(options, module="tests.training.hanging")
    seen.act("decoding a frame does not return, in one process")
    try:
        for said, then in (
            ("avcl_jax: process 0 has read no batch for", signal.SIGTERM),
            (ASKED, signal.SIGINT),
        ):
            assert any(line.startswith(said) for line in process.stdout), said
            seen.ended()
            process.send_signal(then)
        assert process.wait(timeout=PATIENCE) == 128 + signal.SIGINT
    finally:
        process.kill()
    assert "in decode\n" in (tmp_path / "run" / "logs" / "stacks_0.txt").read_text()
    seen.told(
        "it says so and writes its stacks, which show the decoder (`--peer_timeout=8`), and goes "
        "on waiting; SIGINT after SIGTERM ends it, exit 130"
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
    flags = [*signals(2, "SIGSTOP"), *options]
    process = start(flags, module=SIGNALLED, before=little_shared_memory)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    seen.act("/dev/shm is filled by another program in step 2 of 6, 2 data workers")
    shared = Path(f"/proc/{process.pid}/root/dev/shm")
    free = shutil.disk_usage(shared).free
    with (shared / "ballast").open("wb") as ballast:
        os.posix_fallocate(ballast.fileno(), 0, free)
    assert shutil.disk_usage(shared).free == 0 < free
    process.send_signal(signal.SIGCONT)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
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
    output, _ = process.communicate(timeout=PATIENCE)
    seen.ended()
    assert process.returncode == 1, output
    line = one_line(output)
    assert re.search(r"workers=2 need 3 MB of shared memory, .* /dev/shm has 1 MB free", line)
    assert not (tmp_path / "run").exists()
    seen.told("refused by one line with both sizes, exit 1, no workdir")


@pytest.mark.slow
def test_a_run_in_an_object_store_that_is_killed_while_it_saves(
    records, tmp_path, monkeypatch, seen
):
    workdir, local = epath.Path("gs://bucket/a run"), epath.Path(tmp_path / "run")
    options = {"steps": 12, "execution__compilation_cache": "gs://bucket/compiled"}
    begun, killed = threading.Event(), threading.Event()
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    with object_store.running() as store:
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        put = store.put

        def watched(name: str, content: bytes) -> None:
            put(name, content)
            if name == "bucket/a run/checkpoints/6/_CHECKPOINT_METADATA":
                begun.set()
                killed.wait(PATIENCE)  # The answer, without which the run does not go on.

        monkeypatch.setattr(store, "put", watched)
        run(arguments(records, local, **options))
        process = start(arguments(records, workdir, **options))
        assert begun.wait(timeout=PATIENCE), process.communicate()
        seen.act("SIGKILL to one process with its workdir in gs://, while it saves step 6 of 12")
        process.kill()
        process.wait()
        killed.set()
        assert not (workdir / "checkpoints" / "6" / "commit_success.txt").exists()
        store.busy = True
        printed = run(arguments(records, workdir, **options))
        store.busy = False
        seen.ended()
        moved = f"checkpoint 6 is damaged (it is not complete): moved to {workdir}/damaged_"
        assert moved in printed
        assert "steps 3 to 12" in printed
        found, expected = (
            [json.loads(line)["loss"] for line in (d / "metrics.jsonl").read_text().splitlines()]
            for d in (workdir, local)
        )
        assert found == expected
        variables = map(checkpoint.load_variables, (workdir, local))
        jax.tree.map(np.testing.assert_array_equal, *variables)
        compiled = [name for name in store.content if name.startswith("bucket/compiled/")]
        assert any("jit_train_step" in name for name in compiled), compiled
    seen.told(f"while every twentieth request to the store fails, one line, and {RESUMES}")


@pytest.mark.slow
def test_a_run_in_an_object_store_is_evaluated_and_exported_there(
    records, tmp_path, monkeypatch, seen
):
    workdir, local = epath.Path("gs://bucket/a run"), epath.Path(tmp_path / "run")
    options = {
        "evaluation__test_split": "train",
        "evaluation__probes": "(('motion','video'),)",
        "evaluation__probe__costs": (0.1,),
        "evaluation__probe__folds": 2,
        "evaluation__clips": 1,
        "data__allow_trained_on": True,
        "bootstrap__resamples": 20,
        "execution__part_records": 8,
    }

    def command(config: str, directory: epath.Path, **settings: object) -> list[str]:
        return [
            f"--config=configs/{config}.py",
            f"--workdir={directory}",
            f"--config.execution.compilation_cache={compilation_cache()}",
            *(f"--config.{name.replace('__', '.')}={value}" for name, value in settings.items()),
        ]

    with object_store.running() as store:
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        put, written = store.put, []
        monkeypatch.setattr(store, "put", lambda *o: written.append(o[0]) or put(*o))
        run(arguments(records, workdir, steps=2, bank__warmup_steps=1))
        # By the store itself: a client in this process would not see what others write later.
        for name, content in store.content.items():
            if name.startswith("bucket/a run/"):
                copy = local / name.removeprefix("bucket/a run/")
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(content)
        run(command("evaluate", local, **options))
        seen.act("evaluation by two processes of a run in gs://")
        written.clear()
        store.busy = True
        run_processes(command("evaluate", workdir, **options), devices=1)
        seen.ended()
        parts = sorted(name for name in written if "/features/" in name)
        assert len(parts) == 3 * 3  # of temporal tasks, training and test features
        assert len(set(written)) == len(written)
        expected = json.loads((local / "results.json").read_text())
        found = json.loads(store.content.pop(results := "bucket/a run/results.json"))
        assert found["metrics"] == expected["metrics"]
        assert b"</html>" in store.content["bucket/a run/report.html"]
        del store.content[parts[0]]
        written.clear()
        run(command("evaluate", workdir, **options))
        assert [name for name in written if "/features/" in name] == parts[:1]
        assert json.loads(store.content[results])["metrics"] == expected["metrics"]
        assert "already holds these results" in run(command("evaluate", workdir, **options))
        run(command("export", workdir))
        store.busy = False
        assert open_encoders(workdir / "export").fingerprint == found["encoder"]["fingerprint"]
    seen.told(
        "while every twentieth request to the store fails, the metrics of an evaluation on a disk; "
        "each file is written by one process; with a part and the results gone, computes that part"
    )
