"""Preparation killed by SIGKILL at random moments and started again."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from avcl_jax.data.records import RecordDataset
from tests.data.synthetic_media import write_clip

ROOT = Path(__file__).resolve().parents[2]
_CLIPS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    write_clip(folder / "00.mp4", 150, fps=25, side=160)
    for number in range(1, _CLIPS):
        shutil.copy(folder / "00.mp4", folder / f"{number:02d}.mp4")
    (folder / "bad.mp4").write_text("no film")
    return folder


def start(folder: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "data_prep", "prepare", str(folder), "--out", str(out)]
    return subprocess.Popen(
        [*command, "--shard-size=2", "--workers=2"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def files(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.rglob("*") if p.name != "preparation.json"}


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_ends_as_if_undisturbed(folder, tmp_path, kills):
    begin = time.monotonic()
    undisturbed = start(folder, tmp_path / "straight")
    undisturbed.communicate()
    seconds = time.monotonic() - begin
    assert undisturbed.returncode == 3
    rng = random.Random(kills)
    out = tmp_path / "out"
    killed = 0
    while killed < kills:
        process = start(folder, out)
        try:
            process.wait(timeout=seconds * rng.uniform(0.1, 1.0))
            # Finished before its moment came: the next one starts afresh.
            assert process.returncode == 3
            assert files(out) == files(tmp_path / "straight")
            shutil.rmtree(out)
        except subprocess.TimeoutExpired:
            # Sometimes with its workers, as when a machine goes down, sometimes without.
            kill = os.killpg if rng.random() < 0.5 else os.kill
            kill(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
        process.stdout.close()
    last = start(folder, out)
    output, _ = last.communicate()
    assert last.returncode == 3, output.decode()
    assert files(out) == files(tmp_path / "straight")
    assert list(RecordDataset(out, "train").record_ids) == [f"{n:02d}.mp4" for n in range(_CLIPS)]
