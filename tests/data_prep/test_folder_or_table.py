"""Manifests: what is read, and one clear line for what is wrong."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from avcl_jax.data_prep.manifest import PrepareError
from tests.data_prep.collection_files import read, write


def test_a_csv_manifest_with_labels_splits_and_intervals(tmp_path: Path) -> None:
    path = write(
        tmp_path / "m.csv",
        "path,split,id,source,start,end,label_motion,label_class\n"
        'a b.mp4,train,one,film,1.5,3,"fall, hard",10\n'
        "a b.mp4,test,,,4,,roll,2\n"
        "/abs/c.mp4,,three,,,,,10\n",
    )
    manifest = read("folder_or_table", path, "--split=valid")
    one, two, three = manifest.entries
    assert manifest.class_names == {"motion": ("fall, hard", "roll"), "class": ("2", "10")}
    assert one.path == str(tmp_path / "a b.mp4")
    assert (one.split, one.record_id, one.source_id) == ("train", "one", "film")
    assert (one.start_seconds, one.end_seconds) == (1.5, 3.0)
    assert one.labels == {"motion": 0, "class": 1}
    # Clips of one file are one source, and get ids of their own.
    assert (two.split, two.record_id, two.source_id) == ("test", "a b.mp4#4-", "a b.mp4")
    assert (two.end_seconds, two.labels["motion"]) == (None, 1)
    assert (three.path, three.split) == ("/abs/c.mp4", "valid")
    assert three.labels == {"motion": -1, "class": 1}


def test_jsonl_says_the_same_as_csv(tmp_path: Path) -> None:
    table = write(tmp_path / "m.csv", "path,id,start,label_x\na.mp4,i,2,b\nc.mp4,j,,a\n")
    lines = write(
        tmp_path / "m.jsonl",
        '{"path": "a.mp4", "id": "i", "start": 2, "label_x": "b"}\n\n'
        '{"path": "c.mp4", "id": "j", "start": null, "label_x": "a"}\n',
    )
    assert read("folder_or_table", table) == read("folder_or_table", lines)


def test_a_root_of_its_own(tmp_path: Path) -> None:
    path = write(tmp_path / "m.csv", "path\na.mp4\n")
    (entry,) = read("folder_or_table", path, "--root=/films").entries
    assert entry.path == "/films/a.mp4"


def test_a_folder_is_searched_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("z.MP4", "b/a.webm", "-dash.mov", "notes.txt", ".c.mp4", ".hidden/d.mp4"):
        write(tmp_path / name, "")
    os.symlink(tmp_path, tmp_path / "b" / "loop")
    raw = os.fsdecode(b"\xff.wav")
    write(tmp_path / raw, "")
    manifest = read("folder_or_table", tmp_path)
    assert [entry.record_id for entry in manifest.entries] == [
        "-dash.mov",
        "b/a.webm",
        "z.MP4",
        raw,
    ]
    assert manifest.ignored == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label_x,id\na.mp4,1,i\nb.mp4,2,i\n", "duplicate id 'i': .*a.mp4' and .*b.mp4'"),
        ("path,splitt\na.mp4,train\n", "line 2: unknown column 'splitt'; did you mean 'split'"),
        ("path,id\na.mp4\n", "line 2: not 2 columns"),
        ("path;label_x\na.mp4;1\n", "column 'path;label_x' looks like several: save"),
        ("path\tlabel_x\na.mp4\t1\n", "column 'path.tlabel_x' looks like several: save"),
        ("\0p\0a\0t\0h\na.mp4\n", "save the table as comma-separated UTF-8"),
        ("Path\na.mp4\n", "unknown column 'Path'; did you mean 'path'"),
        ("path,id\na.mp4,i,j\n", "line 2: not 2 columns"),
        ("path,start\na.mp4,soon\n", "line 2: start is 'soon', expected seconds"),
        ("path,start\na.mp4,-1\n", "start is '-1'"),
        ("path,end\na.mp4,nan\n", "end is 'nan'"),
        ("path,start,end\na.mp4,3,3\n", "end 3.0 is not after start 3.0"),
        ("path,id\n,i\n", "line 2: no path"),
        ("id\ni\n", "line 2: no path"),
        ("path,label_x\na.mp4,\n", "column 'label_x' has no value"),
        ("path,split\na.mp4,my split\n", "split 'my split' of 'a.mp4'"),
        ("path\n", "lists no media files"),
        ("", "lists no media files"),
        ("{", "jsonl, line 1: not JSON"),
        ("\n[1]\n", "jsonl, line 2: expected an object"),
    ],
)
def test_what_is_wrong_in_a_table(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / ("m.jsonl" if "jsonl" in message else "m.csv")
    with pytest.raises(PrepareError, match=message):
        read("folder_or_table", write(path, text))


def test_nothing_to_prepare(tmp_path: Path) -> None:
    write(tmp_path / "notes.txt", "")
    with pytest.raises(PrepareError, match=r"no media files in .* \(1 other files\)"):
        read("folder_or_table", tmp_path)
    with pytest.raises(PrepareError, match="absent does not exist"):
        read("folder_or_table", tmp_path / "absent")


def test_tables_as_windows_writes_them(tmp_path: Path) -> None:
    (tmp_path / "My Videos").mkdir()
    for name in ("My Videos/A One.MP4", r"back\slash.mp4"):
        (tmp_path / name).touch()
    table = tmp_path / "Clips.CSV"
    rows = [" path , label_x", r"My Videos\A One.MP4,a", r"back\slash.mp4,b", r"no\c.mp4,b", ""]
    table.write_text("\r\n".join(rows), encoding="utf-8-sig", newline="")
    manifest = read("folder_or_table", table)
    assert [entry.path for entry in manifest.entries] == [
        str(tmp_path / name) for name in ("My Videos/A One.MP4", r"back\slash.mp4", r"no\c.mp4")
    ]
    assert [entry.record_id for entry in manifest.entries] == [
        "My Videos/A One.MP4",
        r"back\slash.mp4",
        r"no\c.mp4",
    ]
    assert manifest.class_names == {"x": ("a", "b")}


@pytest.mark.parametrize("suffix", ["tsv", "txt", "xlsx", "JSON"])
def test_tables_of_other_kinds_are_not_taken_for_media(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"clips.{suffix}"
    path.write_text("path\na.mp4\n")
    with pytest.raises(PrepareError, match=r"neither media nor a supported table: save it as .csv"):
        read("folder_or_table", path)
