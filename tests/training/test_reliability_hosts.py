"""Runs of several processes or devices that are stopped, killed, continued elsewhere.

By real processes of avcl_jax.main, as test_reliability.py; in a file of their own, so that both run
side by side.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from avcl_jax.processes import STOPPED
from tests.data.synthetic_records import make_record, write_records
from tests.training.small import (
    PATIENCE,
    RESUMES,
    ROOT,
    SIGNALLED,
    Seen,
    arguments,
    assert_identical,
    descendants,
    free_port,
    losses,
    one_line,
    run,
    run_processes,
    saved_state,
    saved_steps,
    signals,
    start_processes,
    stopped_at,
)

STEPS = 16


@pytest.fixture(scope="module")
def two_processes(records, tmp_path_factory) -> Path:
    """A run of 16 steps on two processes."""
    workdir = tmp_path_factory.mktemp("runs") / "two"
    run_processes(arguments(records, workdir, steps=STEPS), devices=1)
    return workdir


def test_a_log_that_cannot_be_written_stops_no_printing_and_is_written_later(tmp_path):
    """Evaluation removes its workdir again for a moment, in which a log was to be begun."""
    logs = tmp_path / "logs"
    logs.write_text("a file where a folder has to be")
    program = (
        "import sys; from pathlib import Path; from avcl_jax.process_log import ProcessLog\n"
        "log = ProcessLog(Path(sys.argv[1]), title='begin')\n"
        "for word in ('one', 'two', 'three'): print(word, flush=True); sys.stdin.readline()\n"
        "log.close()"
    )
    command = [sys.executable, "-c", program, str(logs / "process_0.txt")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT) as process:
        for word in ("one", "two"):  # the second after the first could not be written
            assert process.stdout.readline() == f"{word}\n"
            if word == "two":
                logs.unlink()
            process.stdin.write("\n")
            process.stdin.flush()
        output, _ = process.communicate("\n", timeout=PATIENCE)
    assert (process.returncode, output) == (0, "three\n")
    assert (logs / "process_0.txt").read_text() == "begin\none\ntwo\nthree\n"


@pytest.mark.slow
def test_a_signal_to_any_of_two_processes_stops_both_after_the_same_step(
    records, two_processes, tmp_path, table
):
    """Two steps are under way, and their votes are read when they have ended."""
    workdir = tmp_path / "stopped"
    anywhere = random.Random(0).randint(9, 10)
    for names, numbers, when, saved, every in (
        (["SIGTERM"], [1], "compiles", 3, 1000),
        (["SIGINT"], [0], 6, 8, 1),
        (["SIGTERM"], [0, 1], anywhere, anywhere + 2, 1000),
        (["SIGTERM", "SIGTERM"], [0, 1], 13, 15, 1000),
        (["SIGTERM"], [1], STEPS, STEPS, 1000),
    ):
        seen = Seen(table)
        whom = "both processes at once" if len(numbers) > 1 else f"process {numbers[0]} of 2"
        moment = "while it compiles" if when == "compiles" else f"in step {when} of {STEPS}"
        saving = ", saving every step" if every == 1 else ""
        seen.act(f"{names[0]}{' twice' * (len(names) > 1)} to {whom}, {moment}{saving}")
        options = arguments(records, workdir, steps=STEPS, execution__checkpoint_every=every)
        flags = [*signals(when, *names, processes=numbers), *options]
        processes = start_processes(flags, devices=1, module=SIGNALLED)
        outputs = [process.communicate(timeout=PATIENCE)[0] for process in processes]
        seen.ended()
        code = 0 if saved == STEPS else STOPPED
        assert [process.returncode for process in processes] == [code, code], outputs
        for number in numbers:
            assert f"avcl_jax: {names[0]}: saves after this step" in outputs[number]
        assert saved_steps(workdir)[-1] == saved
        if code:
            assert stopped_at(outputs[0]) == saved
        seen.told(f"both save step {saved}, exit {code}")
    assert_identical(two_processes, workdir, STEPS)


@pytest.mark.slow
def test_a_process_may_compile_half_a_minute_longer_than_the_other(
    records, two_processes, tmp_path, seen
):
    """For longer than the 30 seconds in which collectives of CPUs must connect."""
    options = arguments(records, tmp_path / "run", steps=STEPS)
    flags = [*signals("compiles", "SIGSTOP", processes=[1]), *options]
    processes = start_processes(flags, devices=1, module=SIGNALLED)
    try:
        for line in processes[1].stdout:
            if line.startswith("signalled"):
                seen.act("process 1 of 2 is paused for 35 s while it compiles")
                break
        with pytest.raises(subprocess.TimeoutExpired):
            processes[0].communicate(timeout=35)
        processes[1].send_signal(signal.SIGCONT)
        outputs = [process.communicate(timeout=PATIENCE)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], outputs
        seen.ended()
    finally:
        for process in processes:
            process.kill()
    assert_identical(two_processes, tmp_path / "run", STEPS)
    seen.told("process 0 waits, both train to the end, exit 0")


_SILENT = r"process 1 has been silent for 8 s, after step \d+; see its log \(its threads now: "
_GONE = "process 0, the coordinator, is gone or has given up this process: see their logs"
_NO_ANSWER = "process 0, the coordinator, has not answered for 8 s, after step "


@pytest.mark.slow
def test_a_process_that_is_gone_ends_the_other_and_the_same_command_resumes(
    records, two_processes, tmp_path, table
):
    options = [*arguments(records, tmp_path / "run", steps=STEPS), "--peer_timeout=8"]
    for name, number, step, message in (
        ("SIGKILL", 0, 5, f"{_GONE}|{_NO_ANSWER}"),
        ("SIGKILL", 1, 8, _SILENT),
        ("SIGSTOP", 0, 11, _NO_ANSWER),
        ("SIGSTOP", 1, 14, _SILENT),
    ):
        seen = Seen(table)
        flags = [*signals(step, name, processes=[number]), *options]
        processes = start_processes(flags, devices=1, module=SIGNALLED)
        try:
            for line in processes[number].stdout:
                if line.startswith("signalled"):
                    seen.act(f"{name} to process {number} of 2, in step {step} of {STEPS}")
                    break
            other = processes[1 - number]
            output, _ = other.communicate(timeout=PATIENCE)
            seen.ended()
        finally:
            for process in processes:
                process.kill()
        assert other.returncode in (1, -signal.SIGABRT), output
        assert re.search(message, one_line(output))
        code = other.returncode if other.returncode > 0 else 128 - other.returncode
        seen.told(f"the other ends by one line, exit {code} (`--peer_timeout=8`); {RESUMES}")
    logs = tmp_path / "run" / "logs"
    assert "step 3/16" in (logs / "process_0.txt").read_text()
    assert (logs / "process_1.txt").read_text().startswith("--- process 1 of 2, ")
    run_processes(options, devices=1)
    assert_identical(two_processes, tmp_path / "run", STEPS)


@pytest.mark.slow
def test_a_data_worker_that_hangs_is_told_and_ends_a_run_of_two(records, tmp_path, seen):
    options = arguments(
        records, tmp_path / "run", steps=10**6, execution__workers=1, execution__log_every=1
    )
    processes = start_processes([*options, "--peer_timeout=8"], devices=1)
    try:
        for line in processes[0].stdout:
            if line.startswith("step 5/"):
                stopped = descendants(processes[1].pid)
                seen.act("SIGSTOP to the data workers of process 1 of 2, at step 5")
                for child in stopped:
                    os.kill(child, signal.SIGSTOP)
                break
        codes = [process.wait(timeout=PATIENCE) for process in processes]
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


@pytest.mark.slow
def test_a_decoder_that_hangs_ends_a_run_of_two(records, tmp_path, seen):
    options = arguments(records, tmp_path / "run", steps=400)
    processes = start_processes(
        [*options, "--peer_timeout=8"], devices=1, module="tests.training.hanging"
    )
    seen.act("decoding a frame does not return, in process 1 of 2")
    try:
        outputs = [process.communicate(timeout=PATIENCE)[0] for process in processes]
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
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 1
        assert re.search(f"processes of one run differ: {message}", one_line(output))
    seen.ended()
    assert not (tmp_path / "run").exists()
    seen.told("both name the difference in one line, exit 1, no workdir")


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
    last = 12
    settings = _COMPARED | {"steps": last, "bank__size": 48, "execution__checkpoint_every": 1000}
    run(arguments(records, tmp_path / "one", **settings))
    workdir, before = tmp_path / "run", "nothing"
    for processes, devices, step, more in (
        (1, 8, 2, {}),
        (1, 4, 5, {"execution__fsdp": 2}),
        (2, 4, 6, {}),
        (1, 2, 10, {}),
    ):
        seen, options = Seen(table), arguments(records, workdir, **settings | more)
        now = f"{processes} x {devices} devices{', fsdp 2' if more else ''}"
        seen.act(f"{now} after {before}, then SIGTERM in step {step}")
        flags = [*signals(step, "SIGTERM"), *options]
        started = start_processes(flags, devices=devices, count=processes, module=SIGNALLED)
        outputs = [process.communicate(timeout=PATIENCE)[0] for process in started]
        seen.ended()
        assert [process.returncode for process in started] == [STOPPED] * processes, outputs
        saved = stopped_at(outputs[0])
        assert saved == (step if processes == 1 else step + 2)
        seen.told(f"trains on, saves step {saved}, exit 75")
        before = now
    run(arguments(records, workdir, **settings))
    one, many = losses(tmp_path / "one"), losses(workdir)
    assert one.keys() == many.keys()
    # Rounding, which grows from step to step.
    np.testing.assert_allclose(list(many.values()), list(one.values()), rtol=1e-3)
    state = saved_state(workdir, last)
    rows = state["['bank']['rows']['numbers']['columns']"]
    assert sorted(rows[:, 0]) == list(range(last * 16 - 48, last * 16))
    ids, counts = np.unique(rows[:, 1], return_counts=True)
    assert (len(ids), set(counts)) == (24, {2})
