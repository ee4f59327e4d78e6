"""Preparation as a person runs it: results, resumption, and every way to be disturbed."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from etils import epath

from avcl_jax.data.records import RecordDataset, RecordError
from avcl_jax.data_prep import pool, publish
from avcl_jax.data_prep.__main__ import main
from tests.data.synthetic_media import write_clip
from tests.data_prep.conftest import files, listed, only_error, prepare

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("a.mp4", "-dash.mp4", "qu'o\"te.mp4", "line\nbreak.mp4", "é你 space.mp4")


@pytest.fixture
def folder(tmp_path: Path, clip: Path) -> Path:
    (tmp_path / "media").mkdir()
    for name in NAMES:
        shutil.copy(clip, tmp_path / "media" / name)
    return tmp_path / "media"


def rejected(out: Path) -> dict[str, str]:
    return {Path(line["path"]).name: line["reason"] for line in listed(out)}


def test_the_same_bytes_whatever_the_workers(folder, tmp_path, capsys):
    (folder / "notes.txt").write_text("ignored")
    assert prepare(folder, tmp_path / "one") == 0
    table = capsys.readouterr().out
    assert "train                5         0" in table
    assert "1 file ignored: not asked for" in table
    preparation = json.loads((tmp_path / "one" / "preparation.json").read_text())
    assert preparation["seconds"] > 0
    assert preparation["splits"]["train"]["records"] == 5
    assert len(list((tmp_path / "one").glob("*-of-00003"))) == 3
    assert prepare(folder, tmp_path / "two", "--workers", "2") == 0
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_splits_labels_and_rejected_files_of_one_manifest(folder, tmp_path, capsys):
    (folder / "bad.mp4").write_text("not a film")
    (folder / "m.csv").write_text(
        "path,split,id,source,start,end,label_motion\n"
        "a.mp4,train,x,film,,,roll\n"
        "bad.mp4,train,y,film,,,roll\n"
        "a.mp4,train,z,film,0.5,1.0,\n"
        "-dash.mp4,test,t,other,,,fall\n"
        "gone.mp4,test,g,,,,fall\n"
    )
    out = tmp_path / "out"
    assert prepare(folder / "m.csv", out) == 3
    assert "1 not_media" in capsys.readouterr().out
    assert rejected(out) == {"bad.mp4": "not_media", "gone.mp4": "not_found"}
    train, test = RecordDataset(out, "train"), RecordDataset(out, "test")
    assert list(train.record_ids) == ["x", "z"]
    assert train.labels["motion"].tolist() == [1, -1]
    assert train.source_numbers.tolist() == [0, 0]
    assert len(train[1].frames) == 5
    assert test.class_names == {"motion": ["fall", "roll"]}
    assert test.labels["motion"].tolist() == [0]
    # Again: nothing is done, and the status stays what it was.
    before = (out / "preparation.json").read_bytes()
    assert prepare(folder / "m.csv", out) == 3
    assert prepare(folder / "m.csv", out, "--allow-rejected") == 0
    assert "up to date" in capsys.readouterr().out
    assert (out / "preparation.json").read_bytes() == before


def test_another_split_joins_and_another_content_is_refused(folder, tmp_path, capsys):
    out, more = tmp_path / "out", tmp_path / "more"
    more.mkdir()
    shutil.copy(folder / "a.mp4", more / "b.mp4")
    (more / "bad.mp4").write_text("")
    assert prepare(more, out, "--split", "test") == 3
    assert prepare(folder, out) == 0
    assert len(RecordDataset(out, "test")) == 1
    assert len(RecordDataset(out, "train")) == 5
    assert rejected(out) == {"bad.mp4": "not_media"}
    kept = files(out)
    capsys.readouterr()
    assert prepare(folder, out, "--quality", "50") == 1
    assert "already holds the split 'train', prepared from other files, with" in only_error(capsys)
    (more / "m.csv").write_text("path,split,label_x\nb.mp4,third,1\n")
    assert prepare(more / "m.csv", out) == 1
    assert "with other labels" in only_error(capsys)
    assert files(out) == kept
    assert prepare(folder, out, "--quality", "50", "--overwrite", "--shard-size", "9") == 0
    replaced = files(out)
    assert (
        replaced["clips-test.tfrecord-00000-of-00001"] == kept["clips-test.tfrecord-00000-of-00001"]
    )
    assert not any("of-00003" in name for name in replaced)
    assert len(RecordDataset(out, "train")) == 5


def test_what_cannot_start(folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    assert prepare(tmp_path / "empty", out) == 1
    assert "no media files in" in only_error(capsys)
    (folder / "m.csv").write_text("path,id\na.mp4,i\n-dash.mp4,i\n")
    assert prepare(folder / "m.csv", out) == 1
    assert "duplicate id 'i'" in only_error(capsys)
    assert not out.exists()
    (tmp_path / "empty" / "x.mp4").write_text("")
    assert prepare(tmp_path / "empty", out) == 1
    assert "none of 1 clips could be prepared" in only_error(capsys)
    assert rejected(out) == {"x.mp4": "not_media"}
    assert not (out / "dataset_info.json").exists()
    (out / "dataset_info.json").write_text('{"version": "0.1.0", "splits": []}')
    assert prepare(folder, out) == 1
    assert "records from another version (0.1.0" in only_error(capsys)
    assert prepare(folder, out, "--overwrite") == 0
    lock = os.open(out, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    capsys.readouterr()
    assert prepare(folder, out) == 1
    assert "another preparation is writing" in only_error(capsys)
    os.close(lock)


@pytest.mark.parametrize(
    "option",
    [
        *("--quality=0", "--quality=101", "--quality=x", "--sample-rate=999", "--workers=0"),
        *("--min-seconds=nan", "--min-seconds=-1", "--max-seconds=inf", "--max-fps=0"),
        *("--require=sound", "--reject=loud", "--cut=x", "--beam-option=z", "--name="),
        *("--name=A b", "--name=../outside", "--name=/outside", "--name=.."),
    ],
)
def test_a_value_that_an_option_does_not_take_is_refused_by_name(option, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        prepare(tmp_path, tmp_path / "out", option)
    flag, _, value = option.partition("=")
    assert re.match(f"error: argument {flag}: .*'{value}'", only_error(capsys))


def test_neither_a_run_nor_the_media_are_overwritten(folder, tmp_path, capsys):
    (folder / "m.csv").write_text("path\na.mp4\n")
    before = sorted(folder.iterdir())
    for source in (folder, folder / "a.mp4", folder / "m.csv"):
        assert prepare(source, folder) == 1
        assert f"--out {folder} is the folder of the media" in only_error(capsys)
    examples = ["sequence-examples", f"val={folder}/*.tfrecord", f"--out={folder}"]
    assert main(examples) == 1
    assert "is the folder of the media" in only_error(capsys)
    assert sorted(folder.iterdir()) == before
    # Beside a table of media that are elsewhere.
    table = (folder / "m.csv").rename(tmp_path / "m.csv")
    assert prepare(table, tmp_path, f"--root={folder}", "--dry-run") == 0
    capsys.readouterr()
    for name in ("config.json", "checkpoints"):
        run = tmp_path / f"run with {name}"
        (run / name).mkdir(parents=True)
        assert prepare(folder, run) == 1
        assert f"--out {run} is the workdir of a run, with {name}: " in only_error(capsys)


@contextlib.contextmanager
def interrupted_moves(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, publication is interrupted after three files have got their names."""
    moves: list[Path] = []

    replace = type(epath.Path("/")).replace

    def counted(source: Path, target: Path) -> None:
        if source.parent.name == publish.INCOMPLETE and target.parent.name != publish.INCOMPLETE:
            if len(moves) == 3:
                raise KeyboardInterrupt
            moves.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(type(epath.Path("/")), "replace", counted)
        yield


def test_a_half_replaced_data_set_is_none(folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert prepare(folder, out) == 0
    again = ("--overwrite", "--quality", "30")
    with interrupted_moves(monkeypatch):
        assert prepare(folder, out, *again) == 130
    with pytest.raises(RecordError, match="not a finished data set"):
        RecordDataset(out, "train")
    assert prepare(folder, out, *again) == 0
    assert prepare(folder, tmp_path / "straight", "--quality", "30") == 0
    assert files(out) == files(tmp_path / "straight")


def test_it_goes_on_where_it_was_interrupted(folder, tmp_path, monkeypatch):
    assert prepare(folder, tmp_path / "straight") == 0
    out = tmp_path / "out"

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(publish, "publish", interrupt)
        assert prepare(folder, out) == 130
    incomplete = out / publish.INCOMPLETE
    kept = incomplete / "train-00000.tfrecord"
    inode = kept.stat().st_ino
    (incomplete / "train-00001.json").unlink()  # as if it had not been finished
    (incomplete / "train-00001.tfrecord").write_bytes(b"half")
    (incomplete / "train-00002.tfrecord.1.tmp").write_bytes(b"of a process that was killed")
    with interrupted_moves(monkeypatch):
        assert prepare(folder, out) == 130
    assert not list(incomplete.glob("*.tmp"))
    assert not (out / "dataset_info.json").exists()
    assert prepare(folder, out) == 0
    assert files(out) == files(tmp_path / "straight")
    assert (out / "clips-train.tfrecord-00000-of-00003").stat().st_ino == inode


def when_reached(fifo: Path, act: Callable[[], None]) -> threading.Thread:
    """Calls `act` once a worker has opened `fifo`, which it then reads for ever."""

    def wait() -> None:
        descriptor = os.open(fifo, os.O_WRONLY)  # returns when the worker opens the other end
        workers = [child.pid for child in multiprocessing.active_children()]
        act()
        # The worker must not see the end of the file before it has died. WNOWAIT leaves it to the
        # pool to reap, whose exit code would be lost otherwise.
        for pid in workers:
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        os.close(descriptor)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def signal_workers(number: int) -> Callable[[], None]:
    def act() -> None:
        for child in multiprocessing.active_children():
            os.kill(child.pid, number)

    return act


def test_a_killed_worker_ends_it_and_loses_nothing(folder, tmp_path, clip, capsys):
    assert prepare(folder, tmp_path / "straight") == 0
    hang = folder / "é你 space.mp4"
    modified = os.stat(hang).st_mtime_ns
    hang.unlink()
    os.mkfifo(hang)
    out = tmp_path / "out"
    capsys.readouterr()
    thread = when_reached(hang, signal_workers(signal.SIGKILL))
    assert prepare(folder, out) == 1
    thread.join()
    error = only_error(capsys)
    assert "a worker was killed by SIGKILL while preparing" in error
    assert "run the same command again" in error
    assert not list(out.rglob("*.tmp"))
    assert not (out / "dataset_info.json").exists()
    done = sorted(path.name for path in (out / publish.INCOMPLETE).glob("*.json"))
    assert done == ["train-00000.json", "train-00001.json"]
    hang.unlink()
    shutil.copy(clip, hang)
    os.utime(hang, ns=(modified, modified))
    assert prepare(folder, out) == 0
    assert files(out) == files(tmp_path / "straight")


@pytest.fixture
def hours(monkeypatch) -> threading.Event:
    """Event after which the pool's clock goes on by an hour per look, until it ends a worker."""
    passing, seconds, restart = threading.Event(), itertools.count(0, 3600), pool.Pool._restart

    def restart_in_time(*arguments: object) -> None:
        passing.clear()  # Otherwise the next clips would be late as well.
        restart(*arguments)

    clock = types.SimpleNamespace(monotonic=lambda: next(seconds) if passing.is_set() else 0)
    monkeypatch.setattr(pool, "time", clock)
    monkeypatch.setattr(pool.Pool, "_restart", restart_in_time)
    return passing


@pytest.mark.parametrize("reason", ["crashed", "timeout"])
def test_a_clip_that_crashes_or_hangs_is_rejected(folder, tmp_path, hours, reason):
    os.mkfifo(folder / "hang.mp4")
    act = signal_workers(signal.SIGSEGV) if reason == "crashed" else hours.set
    thread = when_reached(folder / "hang.mp4", act)
    assert prepare(folder, tmp_path / "out") == 3
    thread.join()
    assert rejected(tmp_path / "out") == {"hang.mp4": reason}
    assert len(RecordDataset(tmp_path / "out", "train")) == 5


def test_termination_is_an_interruption(folder, tmp_path, capsys):
    os.mkfifo(folder / "hang.mp4")
    thread = when_reached(folder / "hang.mp4", lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert prepare(folder, tmp_path / "out") == 130
    thread.join()
    assert "interrupted: finished shards are kept" in only_error(capsys)
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert not multiprocessing.active_children()


def test_a_disk_that_fills_up(folder: Path, tmp_path: Path) -> None:
    """A limit on file size stands for it: both are an OSError in the middle of a write."""
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "avcl_jax.data_prep", "prepare", str(folder), "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "error: cannot write" in done.stderr
    assert not list(out.rglob("*.tmp"))
    assert not (out / "dataset_info.json").exists()


def test_a_full_disk_says_so(tmp_path: Path) -> None:
    import errno

    from avcl_jax.data_prep.pool import describe_os_error

    message = describe_os_error(OSError(errno.ENOSPC, "No space left on device"), tmp_path)
    assert message.startswith("the disk is full: free some space")
    assert str(tmp_path) in message


@pytest.fixture(scope="module")
def twelve(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    write_clip(folder / "00.mp4", 150, fps=25, side=160)
    for number in range(1, 12):
        shutil.copy(folder / "00.mp4", folder / f"{number:02d}.mp4")
    (folder / "bad.mp4").write_text("no film")
    return folder


def start(folder: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-m",
        "avcl_jax.data_prep",
        "prepare",
        str(folder),
        "--out",
        str(out),
    ]
    return subprocess.Popen(
        [*command, "--shard-size=2", "--workers=2"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def whole(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.rglob("*") if p.name != "preparation.json"}


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_ends_as_if_undisturbed(twelve, tmp_path, kills):
    begin = time.monotonic()
    undisturbed = start(twelve, tmp_path / "straight")
    undisturbed.communicate()
    seconds = time.monotonic() - begin
    assert undisturbed.returncode == 3
    rng = random.Random(kills)
    out = tmp_path / "out"
    killed = 0
    while killed < kills:
        process, begin = start(twelve, out), time.monotonic()
        try:
            process.wait(timeout=seconds * rng.uniform(0.1, 1.0))
            # Finished before its moment came: the next one starts afresh, and has no more time.
            seconds = time.monotonic() - begin
            assert process.returncode == 3
            assert whole(out) == whole(tmp_path / "straight")
            shutil.rmtree(out)
        except subprocess.TimeoutExpired:
            # Sometimes with its workers, as when a machine goes down, sometimes without.
            kill = os.killpg if rng.random() < 0.5 else os.kill
            kill(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
        process.stdout.close()
    last = start(twelve, out)
    output, _ = last.communicate()
    assert last.returncode == 3, output.decode()
    assert whole(out) == whole(tmp_path / "straight")
    assert list(RecordDataset(out, "train").record_ids) == [f"{n:02d}.mp4" for n in range(12)]
