"""Whole runs through `avcl_jax.main` in real processes: resuming, devices, hosts, mistakes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

from avcl_jax.data.records import RecordError
from avcl_jax.processes import STOPPED
from avcl_jax.training import checkpoint
from avcl_jax.training.loop import pretrain
from tests.data.synthetic_records import make_record, write_records
from tests.training.small import (
    arguments,
    free_port,
    run,
    run_processes,
    small_config,
    start,
    start_processes,
)


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    made = [make_record(number, seconds=5.0, side=24) for number in range(24)]
    return write_records(tmp_path_factory.mktemp("runs") / "records", made)


def saved_state(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of the newest checkpoint, which is that of `step`, by its path."""
    state, newest = checkpoint._load_state(workdir)
    assert newest == step
    flat = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(key): np.asarray(leaf) for key, leaf in flat}


def saved_steps(workdir: Path) -> list[int]:
    """Steps of the checkpoints, in order."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def losses(workdir: Path) -> dict[int, float]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row["loss"] for row in map(json.loads, lines)}


@pytest.fixture(scope="module")
def whole_run(records, tmp_path_factory) -> Path:
    """A finished run, in a workdir where one with another seed had ended before a checkpoint."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps({"seed": 5}))
    output = run(arguments(records, workdir))
    assert "step 6/6" in output
    return workdir


def test_a_run_leaves_metrics_events_config_and_parameters(whole_run):
    rows = [json.loads(line) for line in (whole_run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert json.loads((whole_run / "config.json").read_text())["seed"] == 0
    for name in (
        *("vv/loss", "va/loss", "aa/loss", "speed_video/accuracy", "order_va/accuracy"),
        *("va/positive_similarity", "va/negative_similarity", "va/bank_negative_similarity"),
        *("va/bank_age_rows", "va/bank_positive_share/speed", "bank/base_rate/direction"),
        *("health/video_embedding_std", "health/gradient_norm", "learning_rate"),
        "data_wait_share",
    ):
        assert np.isfinite(rows[-1][name]), name
    assert list((whole_run / "events").glob("events.out.tfevents.*"))
    assert "video_encoder" in (whole_run / "parameters.txt").read_text()


def test_a_run_killed_by_a_signal_and_resumed_with_two_workers_is_bitwise_the_same(
    records, whole_run, tmp_path
):
    workdir = tmp_path / "stopped"
    assert 1 <= stopped_run(arguments(records, workdir)) < 6
    run(arguments(records, workdir, execution__workers=2))
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
    with checkpoint.open_checkpoints(epath.Path(tmp_path), keep=2) as checkpoints:
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
        checkpoint.open_checkpoints(epath.Path(tmp_path), keep=2)
    assert re.findall(r"(\d): state/\S+ has 10 bytes instead of", str(e.value)) == ["6", "3"]
    assert saved_steps(tmp_path) == [3, 6]


@pytest.mark.slow
def test_a_run_whose_newest_checkpoint_is_damaged_resumes_from_the_one_before(
    records, whole_run, tmp_path
):
    shutil.copytree(whole_run, tmp_path, dirs_exist_ok=True)
    spoil(tmp_path / "checkpoints" / "6", "changed")
    assert "steps 3 to 6" in run(arguments(records, tmp_path))
    assert_identical(whole_run, tmp_path, 6)


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
def test_no_worker_outlives_a_killed_run(records, tmp_path):
    options = arguments(records, tmp_path / "killed", steps=4000, execution__workers=2)
    process = start(options, own_group=True)
    for line in process.stdout:
        if line.startswith("step 5/"):
            process.kill()
            break
    process.wait()
    deadline = time.monotonic() + 20
    try:
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)  # Raises when no process of the run is left.
            time.sleep(0.2)
    except ProcessLookupError:
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
def test_a_signal_to_any_of_two_processes_stops_both_after_the_same_step(records, tmp_path):
    whole, workdir = tmp_path / "whole", tmp_path / "stopped"
    long = {"steps": 40, "execution__checkpoint_every": 1000}
    run_processes(arguments(records, whole, **long), devices=2)
    options = arguments(records, workdir, **long)
    reached = [0]
    for number, name in ((1, signal.SIGTERM), (0, signal.SIGINT)):
        processes = start_processes(options, devices=2)
        try:
            for line in processes[0].stdout:
                if line.startswith(f"step {reached[-1] + 3}/"):
                    processes[number].send_signal(name)
                if line.startswith("stopped"):
                    reached.append(stopped_at(line))
                    break
            rest = [process.communicate(timeout=120)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert [process.returncode for process in processes] == [STOPPED, STOPPED], rest
        # Two steps were under way, and their votes are read one step later.
        assert reached[-2] + 3 <= reached[-1] <= reached[-2] + 8
        assert saved_steps(workdir)[-1] == reached[-1]
    run_processes(options, devices=2)
    assert_identical(whole, workdir, 40)


@pytest.mark.slow
def test_a_process_may_compile_half_a_minute_longer_than_the_other(records, tmp_path):
    options = arguments(
        records, tmp_path / "run", steps=2, execution__compilation_cache=tmp_path / "empty"
    )
    processes = start_processes(options, devices=2)
    try:
        for line in processes[0].stdout:
            if line.startswith("demo: 24 videos"):  # and now it compiles the step
                processes[1].send_signal(signal.SIGSTOP)
                break
        with pytest.raises(subprocess.TimeoutExpired):
            processes[0].communicate(timeout=50)
        processes[1].send_signal(signal.SIGCONT)
        outputs = [process.communicate(timeout=120)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], outputs
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
    records, two_processes, tmp_path, name, number, message
):
    options = [*arguments(records, tmp_path / "run", steps=12), "--peer_timeout=8"]
    processes = start_processes(options, devices=1)
    try:
        for line in processes[0].stdout:
            if line.startswith("step 5/"):
                processes[number].send_signal(name)
                break
        other = processes[1 - number]
        output, _ = other.communicate(timeout=60)
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


def descendants(pid: int) -> list[int]:
    """Processes that a process and its descendants have started."""
    children = [
        int(child)
        for listed in Path(f"/proc/{pid}/task").glob("*/children")
        for child in listed.read_text().split()
    ]
    return [process for child in children for process in (child, *descendants(child))]


@pytest.mark.slow
def test_a_data_worker_that_hangs_is_told_and_ends_a_run_of_two(records, tmp_path):
    options = arguments(
        records, tmp_path / "run", steps=400, execution__workers=1, execution__log_every=1
    )
    processes = start_processes([*options, "--peer_timeout=8"], devices=1)
    try:
        for line in processes[0].stdout:
            if line.startswith("step 5/"):
                stopped = descendants(processes[1].pid)
                for child in stopped:
                    os.kill(child, signal.SIGSTOP)
                break
        codes = [process.wait(timeout=90) for process in processes]
    finally:
        for child in stopped:
            os.kill(child, signal.SIGCONT)
        for process in processes:
            process.kill()
    outputs = [process.communicate()[0] for process in processes]
    assert codes == [1, 1], outputs
    for output in outputs:
        assert re.search(r"process 1 has read no batch for \d+ s, after step ", one_line(output))


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
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_at_random_moments_a_run_ends_as_if_undisturbed(records, tmp_path, workers):
    """AVCL_JAX_KILLS=20 makes a long test of it."""
    options = {"steps": 60, "execution__checkpoint_every": 2, "execution__workers": workers}
    whole, workdir = tmp_path / "whole", tmp_path / "killed"
    run(arguments(records, whole, **options))  # compiles
    began = time.monotonic()
    run(arguments(records, tmp_path / "again", **options))
    seconds = time.monotonic() - began
    rng = random.Random(workers)
    kills = int(os.environ.get("AVCL_JAX_KILLS", "3"))
    for _ in range(kills):
        process = start(arguments(records, workdir, **options), own_group=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=rng.uniform(0.1, seconds))
        process.kill()
        process.communicate()
    run(arguments(records, workdir, **options))
    assert_identical(whole, workdir, 60)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of 4 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    yield path
    subprocess.run(["umount", str(path)], check=True)


@pytest.mark.slow
def test_training_continues_while_the_disk_is_full(records, small_disk):
    workdir, ballast = small_disk / "run", small_disk / "ballast"
    process = start(arguments(records, workdir, steps=60, execution__checkpoint_every=10))
    printed = []
    for line in process.stdout:
        printed.append(line)
        if line.startswith("step 11/"):
            # Room for metrics and not for a checkpoint.
            ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - 300_000))
        if "is not saved" in line:
            ballast.unlink()
    assert process.wait() == 0, printed
    (line,) = [line for line in printed if "is not saved" in line]
    assert line.startswith("step 20 is not saved, checkpoint 10 is kept: ")
    room = (
        r": \S+ has room for 0\.\d MB of a checkpoint of 1\.\d MB: free some space; training cont"
    )
    assert re.search(room, line)
    assert saved_steps(workdir) == [50, 60]


@pytest.mark.slow
def test_a_second_signal_ends_a_run_at_once_and_leaves_its_checkpoint(records, tmp_path):
    workdir = tmp_path / "run"
    options = arguments(records, workdir, steps=4000, execution__checkpoint_every=2)
    process = start(options)
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(signal.SIGSTOP)  # so that both arrive in one step
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGCONT)
            break
    rest = process.communicate(timeout=60)[0]
    assert process.returncode in (128 + signal.SIGTERM, 128 + signal.SIGINT), rest
    assert "ends without saving" in rest
    assert (step := saved_steps(workdir)[-1]) in (2, 4)
    assert saved_state(workdir, step)


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
def test_a_process_waits_so_long_for_the_others_and_then_says_so(records, tmp_path, number):
    flags = [f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2"]
    flags += [f"--process_id={number}", "--join_timeout=3"]
    line = one_line(run([*arguments(records, tmp_path / "run"), *flags], code=1))
    assert f"process {number} of 2 waited 3 s at 127.0.0.1:" in line


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
def test_processes_that_differ_are_refused(records, tmp_path, second, message):
    made = [make_record(n, seconds=5.0, side=24) for n in range(1, 25)]
    other = write_records(tmp_path / "other", made)
    options = arguments(records, tmp_path / "run")
    second = [second.format(other=other)]
    for process in start_processes(options, devices=1, second=second):
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 1
        assert re.search(f"processes of one run differ: {message}", one_line(output))
    assert not (tmp_path / "run").exists()


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


def one_line(output: str) -> str:
    errors = [line for line in output.splitlines() if "error:" in line]
    assert len(errors) == 1, output
    assert "Traceback" not in output
    return errors[0]


def test_a_checkpoint_of_another_config_or_of_other_data_is_refused(records, whole_run, tmp_path):
    output = run(arguments(records, whole_run, loss__temperature=0.2, seed=3), code=1)
    line = one_line(output)
    assert "loss.temperature: 0.1 -> 0.2" in line
    assert "seed: 0 -> 3" in line
    assert json.loads((whole_run / "config.json").read_text())["seed"] == 0
    made = [make_record(n, seconds=5.0, side=24) for n in range(1, 25)]
    other = write_records(tmp_path / "other", made)
    line = one_line(run(arguments(other, whole_run), code=1))
    assert "was trained on records made-train" in line


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_checkpoint(records, tmp_path):
    workdir = tmp_path / "nan"
    options = {"optimizer__name": "sgd", "optimizer__learning_rate": 1e17}
    options |= {"optimizer__clip_norm": 0.0, "steps": 8}
    options |= {"execution__log_every": 2, "execution__checkpoint_every": 1}
    line = one_line(run(arguments(records, workdir, **options), code=1))
    assert "not finite between steps" in line
    assert "loss" in line
    kept = sorted(int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*"))
    assert kept
    assert f"checkpoint {kept[-1]} is kept" in line
    for name, values in saved_state(workdir, kept[-1]).items():
        assert np.isfinite(values).all(), name


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"bank.size": 24}, "must be a multiple of the 16 rows"),
        ({"bank.negative_candidates": 40}, "negative_candidates 40 must be at most bank.size 32"),
        ({"bank.positive_window": 0.5}, "bank.size 32 must be at least 4 times the 16 rows that"),
        ({"model.dtype": "float99"}, "model.dtype 'float99' must be 'float32' or 'bfloat16'"),
        ({"bank.dtype": "int8"}, "bank.dtype 'int8' must be 'float32' or 'bfloat16'"),
        ({"global_batch_size": 32, "bank.size": 64}, "size=16, the largest that fits bank_size 64"),
        (
            {"global_batch_size": 37, "bank.size": 74},
            "global_batch_size=24 and bank_size=96, or",
        ),
        (
            {"global_batch_size": 50, "bank.size": 100, "micro_batches": 25},
            "24 usable records: prepare at least 25 videos, the smallest batch",
        ),
        ({"global_batch_size": 32, "bank.size": 0}, "records: set global_batch_size=24, or prep"),
        ({"global_batch_size": 1}, "use at least 2"),
        ({"model.video.name": "vit"}, "unknown video encoder 'vit'"),
        ({"data.directory": "/nonexistent"}, "/nonexistent"),
        ({"data.split": "validation"}, "no split 'validation', it has"),
        ({"optimizer.name": "adam"}, "unknown optimizer 'adam': use 'adamw' or 'sgd'"),
        ({"optimizer.ema_decay": 1.0}, "optimizer.ema_decay 1.0 must be at least 0 and below 1"),
        ({"optimizer.warmup_steps": 6}, "must be at least 0 and below steps 6"),
        ({"execution.fsdp": 3}, "does not divide the 1 devices"),
        ({"execution.max_bad_records": -1}, "execution.max_bad_records -1 must be at least 0"),
        ({"modalities": "both"}, "modalities 'both' must be"),
        ({"spectrogram.where": "gpu"}, "'gpu' must be 'host' or 'device'"),
        ({"spectrogram.frames": 17}, "choose frames or clip_seconds"),
        ({"crop.min_area": 1.5}, "min_area 1.5 must be above 0 and at most 1"),
    ],
)
def test_mistakes_in_the_config_are_one_clear_error(records, tmp_path, overrides, message):
    workdir = tmp_path / "mistake"
    config = small_config(records, **overrides)
    with pytest.raises((ValueError, RecordError), match=re.escape(message)) as caught:
        pretrain(config, workdir)
    assert "\n" not in str(caught.value)
    assert not (workdir / "checkpoints").exists()


@pytest.mark.slow
def test_the_batch_that_is_named_for_three_videos_trains_on_them(tmp_path):
    directory = tmp_path / "three"
    write_records(directory, [make_record(n, seconds=8.0, side=64) for n in range(3)])
    workdir = tmp_path / "run"
    command = ["--config=configs/pretrain.py:records", f"--config.data.directory={directory}"]
    line = one_line(run([*command, f"--workdir={workdir}"], code=1))
    named = re.search(
        r"3 usable records: set global_batch_size=(2), the largest that fits bank_size (256)", line
    )
    assert named, line
    batch, bank = named.groups()
    output = run(arguments(directory, workdir, global_batch_size=batch, bank__size=bank, steps=2))
    assert "demo: 3 videos" in output
    assert "bank 256 rows (never used: it starts after step 64), steps 0 to 2" in output
    assert "trained to step 2" in output


@pytest.mark.parametrize(
    ("kind", "overrides", "message"),
    [
        ("missing", {}, "does not exist: give the --out of `avcl-data prepare`"),
        ("file", {}, "is a file, not a directory: give the --out"),
        ("empty", {}, "is not a finished data set (dataset_info.json is missing): give the --out"),
        ("no_audio", {}, "has audio on which a view fits: set --config.modalities=video"),
        ("no_video", {}, "has video on which a view fits: set --config.modalities=audio"),
        ("no_audio", {"modalities": "audio"}, "has audio that is not silent: set modalities to wh"),
        ("silent", {"modalities": "audio"}, "has audio that is not silent: set modalities to wha"),
        ("no_video", {"modalities": "video"}, "has video: set modalities to what the records have"),
        ("good", {"views.clip_seconds": 60.0}, "for a view of 60 s (clip_seconds=60 at speed"),
        ("good", {"views.speeds": (32, 64)}, "for a view of 16 s (clip_seconds=0.5 at speed"),
        ("good", {"views.num_frames": 400}, "has video on which a view fits"),
        ("good", {"bank.health_labels": ("colour",)}, "bank.health_labels 'colour' is not a label"),
        ("speed", {"bank.health_labels": ("speed",)}, "bank.health_labels 'speed' would share its"),
    ],
)
def test_data_that_cannot_be_trained_on_is_one_clear_error(tmp_path, kind, overrides, message):
    directory = tmp_path / kind
    if kind == "empty":
        directory.mkdir()
    elif kind == "file":
        directory.write_text("not a directory")
    elif kind != "missing":
        has = {"has_audio": kind != "no_audio", "has_video": kind != "no_video"}
        made = [make_record(n, seconds=5.0, side=24, **has) for n in range(8)]
        if kind == "speed":
            made = [dataclasses.replace(r, labels={"speed": n % 5}) for n, r in enumerate(made)]
        if kind == "silent":
            made = [dataclasses.replace(r, waveform=np.zeros_like(r.waveform)) for r in made]
        write_records(directory, made)
    workdir = tmp_path / "run"
    with pytest.raises((ValueError, RecordError), match=re.escape(message)) as caught:
        pretrain(small_config(directory, **overrides), workdir)
    assert "\n" not in str(caught.value)
    assert not workdir.exists()
