"""A clip to prepare, the command that prepares it, and the files that it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from avcl_jax.data_prep import publish
from avcl_jax.data_prep.__main__ import main
from tests.data.synthetic_media import write_clip


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1.5 s of video and audio."""
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", 15)


def prepare(source: Path, out: Path, *more: str) -> int:
    return main(["prepare", str(source), f"--out={out}", "--shard-size=2", "--workers=1", *more])


def listed(out: Path, name: str = "rejected") -> list[dict[str, Any]]:
    """Lines of rejected.jsonl, or of another list."""
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]


def only_error(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a failing command prints."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def files(out: Path) -> dict[str, bytes]:
    """All files but those that contain times, and no leftovers."""
    assert not list(out.rglob("*.tmp"))
    assert not (out / publish.INCOMPLETE).exists()
    times = ("preparation.json", "sources.jsonl")
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name not in times}
