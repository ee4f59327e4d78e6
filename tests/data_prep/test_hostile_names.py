"""Names from outside are data: nothing is written outside the output directory because of them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from avcl_jax.data.records import RecordDataset
from avcl_jax.data_prep.__main__ import main
from tests.data_prep.conftest import listed

IDS = (
    "../outside",
    "../../outside",
    "/absolute/outside",
    "a\nb",
    "a\r\nb",
    "..",
    "-o",
    "$(touch outside)",
    "a" * 5000,
    "naïve \u2028 \U0001f3ac",
)


@pytest.fixture
def place(tmp_path: Path, clip: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory a few levels down, with media; all that is around it is looked at afterwards."""
    inner = tmp_path / "one" / "two" / "three"
    (inner / "media").mkdir(parents=True)
    shutil.copy(clip, inner / "media" / "clip.mp4")
    monkeypatch.chdir(inner)
    return inner


def everything(tmp_path: Path) -> set[str]:
    """All paths below, but for what is in the output directory."""
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    return {path for path in found if "three/out/" not in path}


def prepare(*arguments: str) -> int:
    return main(["prepare", *arguments, "--out=out", "--workers=1"])


def rows_with(names: tuple[str, ...], column: str) -> str:
    rows = [{"path": "media/clip.mp4", "id": str(n)} | {column: v} for n, v in enumerate(names)]
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("column", ["id", "source"])
@pytest.mark.parametrize("cut", [(), ("--cut=0.5",)])
def test_ids_and_sources_of_any_form(place, tmp_path, column, cut):
    (place / "table.jsonl").write_text(rows_with(IDS, column))
    (place / "out").mkdir()
    before = everything(tmp_path)
    assert prepare("table.jsonl", "--min-seconds=0.2", *cut) == 0
    assert everything(tmp_path) == before
    dataset = RecordDataset(place / "out", "train")
    if not cut and column == "id":
        assert list(dataset.record_ids) == list(IDS)
        assert [dataset[n].record_id for n in range(len(IDS))] == list(IDS)
    if column == "source":
        assert {dataset[n].source_id for n in range(len(dataset))} == set(IDS)
        assert len(set(dataset.source_numbers.tolist())) == len(IDS)
    assert main(["inspect", "out"]) == 0
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("split", "../outside", "split '../outside'"),
        ("split", "/outside", "split '/outside'"),
        ("split", "a\nb", r"split 'a\nb'"),
        ("label_../outside", "x", "label '../outside'"),
        ("label_/outside", "x", "label '/outside'"),
        ("label_a\nb", "x", r"label 'a\nb'"),
        ("label_kind", "a\nb", r"class 'a\nb' of label 'kind'"),
        ("label_kind", "a\u2028b", r"class 'a\u2028b' of label 'kind'"),
        ("label_kind", " ", "class ' ' of label 'kind'"),
    ],
)
def test_names_of_files_or_lines_are_refused(place, tmp_path, capsys, column, value, words):
    (place / "table.jsonl").write_text(rows_with((value,), column))
    before = everything(tmp_path)
    assert prepare("table.jsonl") == 1
    errors = capsys.readouterr().err
    assert words in errors
    assert errors.count("\n") == 1
    assert everything(tmp_path) == before
    assert not (place / "out").exists()


def test_names_of_files_and_links(place: Path, tmp_path: Path, clip: Path) -> None:
    media = place / "media"
    for name in ("new\nline.mp4", "-dash.mp4", "quote'\".mp4", "file:a.mp4", "%d.mp4"):
        shutil.copy(clip, media / name)
    shutil.copy(clip, os.fsencode(media) + b"/\xff.mp4")
    os.symlink(clip, media / "absolute.mp4")
    os.symlink("../../../../gone.mp4", media / "broken.mp4")
    os.symlink(media, media / "loop")
    (place / "out").mkdir()
    before = everything(tmp_path)
    contents = {path: path.read_bytes() for path in media.glob("*.mp4") if path.exists()}
    assert prepare("media") == 3
    assert everything(tmp_path) == before
    assert {path: path.read_bytes() for path in contents} == contents
    records = RecordDataset(place / "out", "train")
    ids = set(records.record_ids)
    assert {record.record_id for record in records} == ids
    assert {len(record.frames) for record in records} == {15}
    # AAC pads audio to whole packets of 1,024 samples.
    np.testing.assert_allclose(records.timelines["duration_seconds"], 1.5, atol=0.022)
    assert {"new\nline.mp4", "-dash.mp4", "quote'\".mp4", "file:a.mp4", "%d.mp4"} <= ids
    assert {"absolute.mp4", os.fsdecode(b"\xff.mp4")} <= ids
    (rejected,) = listed(place / "out")
    assert (rejected["id"], rejected["reason"]) == ("broken.mp4", "not_found")


def test_an_output_directory_that_is_a_link_or_cannot_be_written(place, tmp_path, capsys):
    (tmp_path / "elsewhere").mkdir()
    os.symlink(tmp_path / "elsewhere", place / "out")
    assert prepare("media") == 0  # as the user said
    assert (tmp_path / "elsewhere" / "dataset_info.json").exists()
    (place / "file").write_text("")
    for out in ("file", "file/below", "/proc/nowhere"):
        capsys.readouterr()
        assert main(["prepare", "media", f"--out={out}", "--workers=1"]) == 1
        errors = capsys.readouterr().err
        assert errors.startswith("error: ")
        assert errors.count("\n") == 1
        assert out.split("/")[-1] in errors
    assert (place / "file").read_text() == ""
