"""Errors of users are one line in every command, bugs keep their traceback."""

from __future__ import annotations

import argparse
import ast
import asyncio
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys

import fsspec
import gcsfs
import jax
import pytest

from avcl_jax.command_line import UNREAD, ends_unread
from avcl_jax.errors import is_out_of_memory, one_line, printable
from benchmarks import object_store
from tests import raising
from tests.training import small

# Modules whose checks of shapes and values only a bug can fail: their ValueErrors stay ValueErrors.
CHECKS_OF_THE_CALLER = {
    "avcl_jax/data/images.py",
    "avcl_jax/data/record_format.py",
    "avcl_jax/evaluation/statistics.py",
    "avcl_jax/evaluation/temporal.py",
    "avcl_jax/models/convolution.py",
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
    "store": "the object store failed: try again, 503; run again",
    "store, proxy": "the object store failed: ProxyError; run again",
    "store, refusal": "the object store failed: Forbidden: bucket/run no access; run again",
    "store, timeout": "the object store failed: FSTimeoutError; run again",
}
# tests/data_prep/test_prepare.py and tests/embed/test_command.py have the words.
WORDED_BY_THE_COMMAND = {
    *(("data_prep prepare", error) for error in ONE_LINE if error.startswith(("no ", "full"))),
    ("data_prep prepare", "memory"),
    ("avcl-embed", "full disk"),
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
        assert "rror: " in text or text.startswith(("avcl-embed: ", "avcl-fingerprint: ")), text
        if (command, error) not in WORDED_BY_THE_COMMAND:
            assert message in text
    for error, message in BUGS.items():
        status, text = outputs[command][error]
        assert status == 70, (error, text)
        assert "Traceback" in text, text
        assert text.strip().splitlines()[-1].startswith(message), text


def test_every_entry_point_states_errors_in_one_line(monkeypatch, capsys):
    scripts = importlib.metadata.entry_points(group="console_scripts")
    modules = {script.module for script in scripts if script.module.startswith("avcl_jax.")}
    for path in (small.ROOT / "avcl_jax").rglob("*.py"):
        if path.name != "__main__.py" and 'if __name__ == "__main__"' in path.read_text():
            modules.add(".".join(path.relative_to(small.ROOT).with_suffix("").parts))
    # The first has flags of absl, and is below; a run starts the other one.
    modules -= {"avcl_jax.main", "avcl_jax.process_log"}
    assert len(modules) == 4
    fail = raising.ERRORS["store"]
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda *_: fail())
    for module in sorted(modules):
        assert importlib.import_module(module).main([]) in (1, 2), module
        error = capsys.readouterr().err
        assert error.endswith("the object store failed: try again, 503; run again\n"), module


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("main", ["--config=configs/export.py", "--workdir=gs://bucket/run"]),
        ("embed.command", [".", "--out=features.npz", "--encoder=gs://bucket/run"]),
        ("fingerprint.command", ["index", ".", "--index=films", "--encoder=gs://bucket/run"]),
        ("evaluation.compare", ["gs://bucket/run", "gs://bucket/run"]),
        ("data_prep.__main__", ["inspect", "gs://bucket/run"]),
    ],
)
def test_a_command_prints_one_line_while_a_store_fails(
    monkeypatch, tmp_path, capfd, module, arguments
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "film.wav").touch()
    sleep = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda seconds: sleep(0))
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
    gcsfs.GCSFileSystem.clear_instance_cache()
    with object_store.running() as store:
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        for name in ("config.json", "results.json", "dataset_info.json", "checkpoints/3/state"):
            store.put(f"bucket/run/{name}", b"{}")
        store.failing.update(store.content)
        if module == "main":
            with pytest.raises(SystemExit):
                small.run_here(monkeypatch, *arguments)
        else:
            assert importlib.import_module(f"avcl_jax.{module}").main(arguments) in (1, 2)
    error = capfd.readouterr().err
    assert error.endswith("the object store failed: try again, 503; run again\n")
    assert len(error.splitlines()) == 1


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
