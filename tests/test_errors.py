"""Errors of users are one line in every command, bugs keep their traceback."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys

import jax
import pytest
from gcsfs.retry import HttpError

from avcl_jax.command_line import UNREAD, ends_unread
from avcl_jax.errors import is_out_of_memory, one_line, printable
from tests import raising
from tests.training import small

# Modules whose checks of shapes and values only a bug can fail: their ValueErrors stay ValueErrors.
CHECKS_OF_THE_CALLER = {
    "avcl_jax/data/images.py",
    "avcl_jax/data/record_format.py",
    "avcl_jax/evaluation/statistics.py",
    "avcl_jax/evaluation/temporal.py",
    "avcl_jax/objectives/contrastive.py",
}
ONE_LINE = {
    "user": "loss.temperature -1: must be positive",
    "record": "shard.tfrecord is damaged: prepare it again",
    "media": "truncated: clip.mp4 ends early",
    "prepare": "videos.csv has no column path",
    "fingerprint": "films.index is not an index",
    "not finite": "loss is not finite between steps 1 and 2",
    "no file": "/nonexistent/file: No such file or directory",
    "no file, from an object store": "gs://bucket/run",
    "no permission": "/root/run: Permission denied",
    "full disk": "No space left on device (ENOSPC)",
    "memory": "out of memory (Unable to allocate 1.00 EiB",
    "no locks": "No locks available (ENOLCK)",
}
BUGS = {
    "shapes": "ValueError: operands could not be broadcast",
    "not in list": "ValueError: ",
    "closed file": "OSError: ",
    "text alone": "OSError: unexpected end",
    "key": "KeyError: 'encoder'",
}


@pytest.fixture(scope="module")
def outputs() -> dict[str, dict[str, tuple[int, str]]]:
    return json.loads(small.run([], module="tests.raising").splitlines()[-1])


@pytest.mark.parametrize("command", raising.COMMANDS)
def test_user_errors_are_one_line_and_bugs_keep_their_traceback(outputs, command):
    assert outputs[command].keys() == ONE_LINE.keys() | BUGS.keys()
    for error, message in ONE_LINE.items():
        status, text = outputs[command][error]
        assert status in (1, 2), (error, text)
        assert len(text.strip().splitlines()) == 1, text
        assert "rror: " in text or text.startswith("avcl-fingerprint: "), text
        # Preparation words errors of the system itself: tests/data_prep/test_prepare.py.
        if command != "data_prep prepare" or error in ("user", "record", "media", "prepare"):
            assert message in text
    for error, message in BUGS.items():
        status, text = outputs[command][error]
        assert status == 70, (error, text)
        assert "Traceback" in text, text
        assert text.strip().splitlines()[-1].startswith(message), text


def test_an_error_of_a_store_says_so():
    error = HttpError({"message": "try\nagain", "code": 503})
    assert one_line(error) == "the object store failed: try again, 503; run again"


def test_names_are_one_line_that_a_terminal_can_show():
    assert printable("µ – a\nb\t\x1b[31m\u202e\udce9") == "µ – a\\nb\\t\\x1b[31m\\u202e\\udce9"
    assert one_line(FileNotFoundError(2, "gone", "a\nb")) == "a\\nb: gone"


def test_memory_of_a_device_is_told_too():
    text = "INTERNAL: Error dispatching computation: Out of memory allocating 655360000000 bytes."
    for problem in (text, "RESOURCE_EXHAUSTED: Attempting to reserve 9.31G\nmore"):
        error = jax.errors.JaxRuntimeError(problem)
        assert is_out_of_memory(error)
        assert one_line(error).startswith(f"out of memory ({problem.splitlines()[0]}): choose a")
    assert not is_out_of_memory(jax.errors.JaxRuntimeError("INTERNAL: a bug"))
    assert not is_out_of_memory(RuntimeError(text))


def test_a_deliberate_error_is_a_user_error_or_stands_in_the_list():
    found = set()
    for path in sorted((small.ROOT / "avcl_jax").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                name = getattr(node.exc.func, "id", "")
                found |= {str(path.relative_to(small.ROOT))} if name == "ValueError" else set()
    assert found == CHECKS_OF_THE_CALLER, "raise avcl_jax.errors.UserError, or add to the list"


@pytest.fixture
def unread():
    """Open file whose reader has gone, as of `| head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as file:
        yield file


@pytest.mark.parametrize(
    "module", ["data_prep.__main__", "embed.command", "fingerprint.command", "evaluation.compare"]
)
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_command_ends_quietly_where_nobody_reads_its_output(
    unread, monkeypatch, capfd, module, stream
):
    main = importlib.import_module(f"avcl_jax.{module}").main
    monkeypatch.setattr(sys, stream, unread)
    with pytest.raises(SystemExit) as ended:
        main(["--help"] if stream == "stdout" else ["--mistake"])
    assert ended.value.code == UNREAD == 141
    assert capfd.readouterr() == ("", "")
    assert getattr(sys, stream) is unread


def test_a_config_is_printed_to_whoever_reads_the_first_line(unread):
    command = [sys.executable, "-m", "avcl_jax.main", "--config=configs/pretrain.py"]
    done = subprocess.run(
        [*command, "--print_config"], cwd=small.ROOT, stdout=unread, stderr=-1, check=False
    )
    assert (done.returncode, done.stderr) == (UNREAD, b"")


def test_another_broken_pipe_stays_an_error(unread):
    unread.write("to a worker")
    with pytest.raises(BrokenPipeError), ends_unread():
        unread.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), unread.fileno())
