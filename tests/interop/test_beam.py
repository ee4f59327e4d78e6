"""Apache Beam's DirectRunner does the same work (needs requirements-interop.txt)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from avcl_jax.data_prep.__main__ import main
from tests.data.synthetic_media import write_clip

pytestmark = pytest.mark.interop
pytest.importorskip("apache_beam", reason="Apache Beam is not installed (requirements-interop.txt)")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "media"
    folder.mkdir()
    write_clip(folder / "a.mp4", 15)
    for name in ("b.mp4", "c.mp4"):
        shutil.copy(folder / "a.mp4", folder / name)
    (folder / "bad.mp4").write_text("no film")
    return folder


def prepare(folder: Path, out: Path, *more: str) -> int:
    return main(["prepare", str(folder), f"--out={out}", "--shard-size=2", *more])


def files(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.rglob("*") if p.name != "preparation.json"}


def test_the_same_bytes_as_on_one_machine(folder: Path, tmp_path: Path) -> None:
    assert prepare(folder, tmp_path / "local") == 3
    assert prepare(folder, tmp_path / "beam", "--runner=DirectRunner") == 3
    assert files(tmp_path / "beam") == files(tmp_path / "local")
    assert len(files(tmp_path / "beam")) > 5


def test_a_decoder_that_hangs_is_rejected_there_too(folder: Path, tmp_path: Path) -> None:
    os.mkfifo(folder / "hang.mp4")
    out = tmp_path / "beam"
    assert prepare(folder, out, "--runner=DirectRunner", "--timeout-seconds=10") == 3
    assert '"timeout"' in (out / "rejected.jsonl").read_text()


def test_an_unknown_runner_or_a_failing_one_is_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(folder, tmp_path / "beam", "--runner=Nobody") == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: the Beam pipeline failed: Unexpected pipeline runner: Nobody" in error
