"""Damaged and hostile files through the real pool: each is prepared, or rejected with a reason."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from avcl_jax.data.records import RecordDataset
from avcl_jax.data_prep.__main__ import main
from avcl_jax.data_prep.clip import REASONS
from tests.data.test_media import REAL, needs_real
from tests.data_prep.conftest import listed
from tests.data_prep.mutations import MUTATIONS
from tests.data_prep.test_containers import write


def write_mutated(folder: Path, sources: list[Path], number: int, seed: int) -> None:
    """Writes `number` files, each a mutation of one of the sources."""
    kinds = sorted(MUTATIONS)
    for n in range(number):
        kind, source = kinds[n % len(kinds)], sources[n // len(kinds) % len(sources)]
        mutated = MUTATIONS[kind](source.read_bytes(), np.random.default_rng([seed, n]))
        # A name that begins with a dash would be another test.
        (folder / f"{n:04d}_{kind}_{source.name}").write_bytes(mutated)


def check_all_accounted_for(
    folder: Path, out: Path, run: Callable[[list[str]], int] = main
) -> dict[str, str]:
    """Prepares a folder; returns the reason for each file that was rejected."""
    arguments = ["prepare", str(folder), f"--out={out}", "--short-side=32", "--workers=2"]
    status = run([*arguments, "--shard-size=16", "--timeout-seconds=120"])
    assert status in (0, 1, 3)
    lines = listed(out)
    reasons = {line["id"]: line["reason"] for line in lines}
    assert len(reasons) == len(lines)
    assert set(reasons.values()) <= set(REASONS)
    assert all("\n" not in line["message"] for line in lines)
    prepared: set[str] = set()
    if status != 1:
        dataset = RecordDataset(out, "train")
        prepared = set(dataset.record_ids)
        for number in range(len(dataset)):
            assert dataset[number].duration_seconds > 0
    assert not prepared & set(reasons)
    assert prepared | set(reasons) == set(os.listdir(folder))
    assert not list(out.rglob("*.tmp"))
    return reasons


def test_mutated_files_are_prepared_or_rejected(tmp_path: Path) -> None:
    folder, originals = tmp_path / "media", tmp_path / "originals"
    folder.mkdir()
    originals.mkdir()
    for name, video, audio in (("a.mp4", "h264", "aac"), ("b.webm", "vp9", "opus")):
        write(originals / name, video, audio, seconds=1.2)
    write(originals / "c.avi", "h264", "mp3", seconds=1.2)
    write_mutated(folder, sorted(originals.iterdir()), 21, seed=0)
    (folder / "good.mp4").write_bytes((originals / "a.mp4").read_bytes())
    reasons = check_all_accounted_for(folder, tmp_path / "out")
    assert "good.mp4" not in reasons
    assert len(reasons) >= 8


@needs_real
@pytest.mark.slow
def test_500_mutated_real_files_are_prepared_or_rejected(tmp_path: Path) -> None:
    folder = tmp_path / "media"
    folder.mkdir()
    write_mutated(folder, sorted(REAL.iterdir()), 500, seed=0)
    largest_worker: list[int] = []

    def run(arguments: list[str]) -> int:
        # In a process of its own, whose children are the workers alone.
        code = (
            "import resource, sys; from avcl_jax.data_prep.__main__ import main;"
            "status = main(sys.argv[1:]);"
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(status)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True, check=False
        )
        largest_worker.append(int(done.stdout.splitlines()[-1]))
        return done.returncode

    reasons = check_all_accounted_for(folder, tmp_path / "out", run)
    assert 300 < len(reasons) < 490
    assert not {"crashed", "timeout"} & set(reasons.values())
    assert 50_000 < largest_worker[0] < 1_500_000, "kilobytes"
