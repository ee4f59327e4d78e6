"""Running the same command again: what changed is prepared, what did not is kept."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import wave
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from avcl_jax.data.records import RecordDataset
from avcl_jax.data_prep import publish, shards
from avcl_jax.data_prep.__main__ import main
from avcl_jax.data_prep.clip import REASONS
from avcl_jax.data_prep.publish import read_earlier
from avcl_jax.data_prep.shards import plan_parts, prepare_part
from avcl_jax.data_prep.source_files import content_of_equal_sizes, find_duplicates, states_of
from tests.data.synthetic_media import write_clip
from tests.data_prep.collection_files import read
from tests.data_prep.conftest import files, prepare

NAMES = ("a.mp4", "b.mp4", "c.mp4", "d.mp4", "e.mp4")
OPTIONS = shards.ClipOptions(128, None, 90, 16000, 0.0, 600.0, 16, (), "tfrecord")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six clips of different content; the last two for later."""
    folder = tmp_path_factory.mktemp("clips")
    for number in range(7):
        write_clip(folder / f"{number}.mp4", 8 + number)
    return folder


@pytest.fixture
def folder(tmp_path: Path, clips: Path) -> Path:
    (tmp_path / "media").mkdir()
    for number, name in enumerate(NAMES):
        shutil.copy(clips / f"{number}.mp4", tmp_path / "media" / name)
    return tmp_path / "media"


def inodes(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in out.glob("*.tfrecord-*")}


def shard(number: int) -> str:
    return f"clips-train.tfrecord-{number:05d}-of-00003"


def test_the_content_and_size_of_each_source_are_written_down(folder: Path, tmp_path: Path) -> None:
    import hashlib

    assert prepare(folder, tmp_path / "out") == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "sources.jsonl").open()]
    assert [line["id"] for line in lines] == list(NAMES)
    for line, name in zip(lines, NAMES, strict=True):
        content = (folder / name).read_bytes()
        assert line["sha256"] == hashlib.sha256(content).hexdigest()
        assert line["bytes"] == len(content)
        assert line["clips"] == [[name, "prepared", ""]]


def test_a_changed_file_is_prepared_again_and_the_others_are_kept(folder, clips, tmp_path, capsys):
    out = tmp_path / "out"
    assert prepare(folder, out) == 0
    before = inodes(out)
    shutil.copy(clips / "5.mp4", folder / "c.mp4")
    assert prepare(folder, out) == 0
    assert "4 unchanged, 1 changed, 0 new, 0 gone" in capsys.readouterr().out
    after = inodes(out)
    assert after[shard(0)] == before[shard(0)]
    assert after[shard(1)] != before[shard(1)]
    assert after[shard(2)] == before[shard(2)]
    assert prepare(folder, tmp_path / "straight") == 0
    assert files(out) == files(tmp_path / "straight")


def test_an_interrupted_update_resumes(folder, clips, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert prepare(folder, out) == 0
    before = inodes(out)
    shutil.copy(clips / "5.mp4", folder / "c.mp4")

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(publish, "publish", interrupt)
        assert prepare(folder, out) == 130
    inode = (out / publish.INCOMPLETE / "train-00001.tfrecord").stat().st_ino
    assert prepare(folder, out) == 0
    assert inodes(out) == before | {shard(1): inode}
    assert prepare(folder, tmp_path / "straight") == 0
    assert files(out) == files(tmp_path / "straight")


def test_a_touched_or_copied_file_is_unchanged(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert prepare(folder, out) == 0
    os.utime(folder / "a.mp4", ns=(1, 1))
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    capsys.readouterr()
    assert prepare(folder, out) == 0
    assert prepare(moved, out) == 0
    assert capsys.readouterr().out.count("up to date") == 2


def test_notes_are_counted_kept_and_rejected(folder, clips, tmp_path, capsys):
    out = tmp_path / "out"
    with wave.open(str(folder / "bb.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(np.arange(16000).astype("<i2").clip(0, 33).tobytes())

    def check() -> None:
        lines = [json.loads(line) for line in (out / "sources.jsonl").open()]
        # Some of the clips end before their first flash, and are still.
        notes = [note for line in lines for note in line["notes"] if note[1] == "silent"]
        assert notes == [["bb.wav", "silent", "the loudest of 16000 samples is 33"]]
        assert main(["inspect", str(out)]) == 0
        assert "note       1 silent: no audio sample is" in capsys.readouterr().out

    assert prepare(folder, out) == 0
    assert "1 prepared, but silent: no audio sample is" in capsys.readouterr().out
    check()
    shutil.copy(clips / "5.mp4", folder / "b.mp4")  # its shard is written again
    assert prepare(folder, out) == 0
    check()
    shutil.copy(clips / "6.mp4", folder / "e.mp4")  # its shard stays
    assert prepare(folder, out) == 0
    assert "1 prepared, but silent" in capsys.readouterr().out
    check()
    assert prepare(folder, out, "--reject=silent") == 1  # other options
    assert "use another --out, or --overwrite" in capsys.readouterr().err
    assert prepare(folder, out, "--reject=silent", "--overwrite") == 3
    assert f"1 silent: {REASONS['silent']}" in capsys.readouterr().out
    assert list(RecordDataset(out, "train").record_ids) == list(NAMES)


def test_files_that_come_and_go(folder, clips, tmp_path, capsys):
    out = tmp_path / "out"
    (folder / "bad.mp4").write_text("no film")
    assert prepare(folder, out) == 3
    shutil.copy(clips / "5.mp4", folder / "bb.mp4")
    (folder / "a.mp4").unlink()
    (folder / "d.mp4").rename(folder / "f.mp4")
    capsys.readouterr()
    assert prepare(folder, out) == 3
    assert "4 unchanged, 0 changed, 2 new, 2 gone" in capsys.readouterr().out
    assert prepare(folder, tmp_path / "straight") == 3
    assert files(out) == files(tmp_path / "straight")


@pytest.mark.parametrize("reason", ["unreadable", "timeout", "crashed", "damaged"])
def test_what_may_pass_the_next_time_is_tried_again(folder, tmp_path, reason):
    out = tmp_path / "out"
    (folder / "bad.mp4").write_text("no film")
    assert prepare(folder, out) == 3
    sources = out / "sources.jsonl"
    sources.write_text(sources.read_text().replace('"not_media"', f'"{reason}"'))
    before = inodes(out)
    assert prepare(folder, out) == 3
    outcomes = [clip[1] for line in sources.open() for clip in json.loads(line)["clips"]]
    again = reason != "damaged"
    assert outcomes == ["prepared"] * 2 + ["not_media" if again else reason] + ["prepared"] * 3
    # Other shards are kept.
    assert len(before.items() & inodes(out).items()) == (2 if again else 3)


def test_other_labels_need_no_decoding(folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    table = folder / "m.csv"
    table.write_text("path,label_x,source\na.mp4,dog,s\nb.mp4,cat,s\nc.mp4,,t\n")
    assert prepare(table, out) == 0
    table.write_text("path,label_x,source\nb.mp4,ant,s\na.mp4,dog,u\nc.mp4,cat,t\n")
    entries = read("folder_or_table", table).entries
    states = states_of(entry.path for entry in entries)
    known, changes = read_earlier(epath.Path(out)).compare(entries, OPTIONS, states)
    assert len(known) == changes["unchanged"] == 3
    assert changes["rearranged"]

    def refuse(*_: object) -> None:
        raise AssertionError("a clip was decoded")

    monkeypatch.setattr(shards, "prepare_clip", refuse)
    again = epath.Path(out) / "again"
    again.mkdir()
    for part in plan_parts(entries, 2, OPTIONS, again, states, known):
        prepare_part(part, begin=lambda number: None)
    monkeypatch.undo()
    shutil.rmtree(again)
    assert prepare(table, out) == 0
    dataset = RecordDataset(out, "train")
    assert list(dataset.record_ids) == ["b.mp4", "a.mp4", "c.mp4"]
    assert dataset.class_names == {"x": ["ant", "cat", "dog"]}
    assert dataset.labels["x"].tolist() == [0, 2, 1]
    assert dataset.source_numbers.tolist() == [0, 1, 2]
    assert prepare(table, tmp_path / "straight") == 0
    assert files(out) == files(tmp_path / "straight")


def test_duplicates_are_reported_or_left_out(folder, tmp_path, capsys):
    shutil.copy(folder / "a.mp4", folder / "copy of a.mp4")
    out = tmp_path / "out"
    assert prepare(folder, out) == 0
    assert "1 exact duplicates of other clips are there" in capsys.readouterr().out
    (line,) = map(json.loads, (out / "duplicates.jsonl").open())
    assert (line["id"], line["duplicate_of"]) == ("copy of a.mp4", "a.mp4")
    assert len(RecordDataset(out, "train")) == 6
    assert prepare(folder, out, "--deduplicate") == 0
    assert "were left out" in capsys.readouterr().out
    assert list(RecordDataset(out, "train").record_ids) == list(NAMES)


def test_the_same_file_is_a_duplicate_only_over_the_same_interval(folder: Path) -> None:
    (entry, *_) = read("folder_or_table", folder).entries
    again = dataclasses.replace(entry, record_id="again", split="test")
    later = dataclasses.replace(entry, record_id="later", start_seconds=0.5)
    entries = [entry, later, again]
    states = states_of(entry.path for entry in entries)
    found = find_duplicates(entries, content_of_equal_sizes(states))
    assert list(found) == [2]
    assert (found[2]["duplicate_of"], found[2]["split"]) == (entry.record_id, "test")


def test_limit_and_dry_run(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert prepare(folder, out, "--dry-run", "--limit", "3") == 0
    assert "train               3        0" in capsys.readouterr().out
    assert not out.exists()
    assert prepare(folder, out, "--limit", "3") == 0
    assert list(RecordDataset(out, "train").record_ids) == list(NAMES[:3])
    assert prepare(folder, out) == 0
    assert "3 unchanged, 0 changed, 2 new" in capsys.readouterr().out
    assert len(RecordDataset(out, "train")) == 5


def test_an_interrupted_part_leaves_nothing(folder, tmp_path, monkeypatch):
    entries = read("folder_or_table", folder).entries
    states = states_of(entry.path for entry in entries)
    (part,) = plan_parts(entries, 9, OPTIONS, epath.Path(tmp_path / "parts"), states, {})
    (tmp_path / "parts").mkdir()
    prepare_clip, calls = shards.prepare_clip, []

    def interrupt(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return prepare_clip(*arguments)

    monkeypatch.setattr(shards, "prepare_clip", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare_part(part, begin=lambda number: None)
    assert list((tmp_path / "parts").iterdir()) == []
