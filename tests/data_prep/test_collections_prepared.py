"""Collections through their commands, to records: labels, folds, and where clips were cut."""

from __future__ import annotations

import importlib
import json
import shutil
import wave
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from avcl_jax.configs import cross_modal, evaluate, pretrain
from avcl_jax.data import media
from avcl_jax.data.records import RecordDataset
from avcl_jax.data.selection import Selection
from avcl_jax.data_prep.__main__ import main
from tests.data.synthetic_media import write_clip
from tests.data_prep.collection_files import SHARED, read, write

needs_data = pytest.mark.skipif(not SHARED.exists(), reason=f"no real data in {SHARED}")


def prepare(*arguments: object) -> int:
    return main([*map(str, arguments), "--workers=1", "--short-side=48"])


@needs_data
def test_esc10(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = SHARED / "esc10", tmp_path / "out"
    options = ("--subset=esc10", "--limit=6", "--sample-rate=1000")
    assert prepare("esc50", folder, *options, f"--out={out}") == 0
    # Records, rejected, without audio, without video.
    assert ["all", "6", "0", "0", "6"] in [
        line.split()[:5] for line in capsys.readouterr().out.splitlines()
    ]
    records = RecordDataset(out, "all")
    listed = read("esc50", folder, "--subset=esc10").entries[:6]
    assert [records[i].record_id for i in range(len(records))] == [e.record_id for e in listed]
    assert [records[i].labels for i in range(len(records))] == [e.labels for e in listed]
    assert records.class_names["class"][:2] == ["dog", "rooster"]
    assert records.class_names["fold"] == list("12345")
    for i in range(len(records)):
        assert not records[i].frames
        assert records[i].duration_seconds == pytest.approx(5, abs=0.05)
    # The data set is called as the collection.
    assert list(out.glob("esc50-all.tfrecord-*"))


@needs_data
def test_a_folder_like_those_of_kinetics_downloaders(tmp_path, capsys):
    videos, out = tmp_path / "videos", tmp_path / "out"
    pancake, bunny = "abcdefghijk", "-_234567890"
    cut = videos / "val" / "flipping pancake" / f"{pancake}_000012_000022.mkv"
    cut.parent.mkdir(parents=True)
    shutil.copy(SHARED / "media" / "flipping_a_pancake.mkv", cut)
    shutil.copy(SHARED / "media" / "big_buck_bunny_0_30.webm", videos / f"{bunny}.webm")
    lists = write(
        tmp_path / "lists" / "validate.csv",
        "label,youtube_id,time_start,time_end,split,is_cc\n"
        f"catching butterfly,{bunny},5,8,validate,1\n"
        f"flipping pancake,{pancake},12,22,validate,0\n"
        "flipping pancake,gone5678901,0,10,validate,0\n",
    )
    assert prepare("kinetics", videos, "--lists", lists, f"--out={out}") == 0
    assert f"1 of 3 listed clips are not there: {out}/missing.jsonl" in capsys.readouterr().out
    records = RecordDataset(out, "val")
    assert records.class_names == {"class": ["catching butterfly", "flipping pancake"]}
    film, whole = records[0], records[1]
    assert len(records) == 2
    assert (film.record_id, film.source_id) == (f"{bunny}_000005_000008", bunny)
    assert (whole.record_id, whole.source_id) == (f"{pancake}_000012_000022", pancake)
    assert (film.labels, whole.labels) == ({"class": 0}, {"class": 1})
    # 5 s to 8 s of the film, and the whole of what is cut already.
    assert film.duration_seconds == pytest.approx(3, abs=0.05)
    assert whole.duration_seconds == pytest.approx(10.4, abs=0.1)
    assert len(film.waveform) / film.sample_rate_hz == pytest.approx(3, abs=0.05)
    frames = list(
        media.decode_frames(
            videos / f"{bunny}.webm",
            short_side=48,
            max_fps=None,
            start_seconds=0.0,
            end_seconds=6.0,
        )
    )
    first = simplejpeg.decode_jpeg(film.frames[0]).astype(np.float32)
    distances = [float(np.abs(frame.image - first).mean()) for frame in frames]
    assert frames[int(np.argmin(distances))].seconds == pytest.approx(5, abs=0.1)
    missing = [json.loads(line) for line in (out / "missing.jsonl").read_text().splitlines()]
    assert missing == [
        {
            "id": "gone5678901_000000_000010",
            "split": "val",
            "expected": "gone5678901_000000_000010.mp4",
        }
    ]


def test_several_classes_of_audioset(tmp_path: Path) -> None:
    media_folder, out = tmp_path / "media", tmp_path / "out"
    media_folder.mkdir()
    write_clip(media_folder / "YabcdefghijK.mp4", 10)
    lists = write(tmp_path / "eval_segments.csv", 'abcdefghijK, 30.000, 40.000, "/m/2,/m/0"\n')
    classes = write(tmp_path / "c.csv", "index,mid,display_name\n0,/m/0,A\n1,/m/1,B\n2,/m/2,C\n")
    assert (
        prepare(
            *("audioset", media_folder, "--lists", lists, "--classes-from", classes),
            *(f"--out={out}", "--name=mine"),
        )
        == 0
    )
    records = RecordDataset(out, "eval")
    assert records.class_names == {"class": ["A", "B", "C"]}
    assert records[0].labels == {"class": (0, 2)}
    assert list(out.glob("mine-eval.tfrecord-*"))


def test_nothing_of_a_collection_is_there(tmp_path, capsys):
    lists = write(tmp_path / "vggsound.csv", "A,7,owl,train\nB,8,owl,test\n")
    assert prepare("vggsound", tmp_path, "--lists", lists, f"--out={tmp_path / 'out'}") == 1
    captured = capsys.readouterr()
    assert captured.err == (
        "error: none of the 2 listed clips is there; the first looked for was 'A_000007.mp4'\n"
    )
    assert not (tmp_path / "out").exists()


def test_every_collection_is_a_command_with_its_own_summary(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # each summary in one line
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    names = {"prepare": "folder_or_table", "sequence-examples": "sequence_examples"}
    names |= {n: n for n in ("kinetics", "vggsound", "audioset", "ucf101", "hmdb51", "esc50")}
    for name, module_name in (names | {"tfds": "tfds"}).items():
        module = importlib.import_module(f"avcl_jax.data_prep.collections.{module_name}")
        assert f" {name} {module.__doc__.splitlines()[0]} " in text
    for helper in ("lists", "listed-clips", "example-files", "tfds-features", "folder-or-table"):
        with pytest.raises(SystemExit):
            main([helper, "--help"])
        assert f"invalid choice: '{helper}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("collection", "source"),
    [
        ("kinetics", "https://github.com/cvdfoundation/kinetics-dataset"),
        ("vggsound", "https://www.robots.ox.ac.uk/~vgg/data/vggsound/"),
        ("audioset", "/youtube_corpus/v1/csv/balanced_train_segments.csv"),
        ("ucf101", "https://www.crcv.ucf.edu/data/UCF101.php"),
        ("hmdb51", "https://serre-lab.clps.brown.edu/resource/"),
        ("esc50", "https://github.com/karolpiczak/ESC-50"),
    ],
)
def test_help_says_where_the_lists_come_from(collection, source, capsys):
    with pytest.raises(SystemExit):
        main([collection, "--help"])
    text = capsys.readouterr().out
    assert "Nothing is downloaded." in text
    assert source in text
    # Tables of layouts stay tables.
    module = importlib.import_module(f"avcl_jax.data_prep.collections.{collection}")
    tables = [part for part in module.__doc__.split("\n\n") if part.startswith("  ")]
    assert tables
    assert all(f"\n{table}\n" in text for table in tables)
    assert f"(default: {collection})" in " ".join(text.split())


# The commands of docs/data, in the folder of each collection.
DOCUMENTED = {
    "kinetics400": ["kinetics . --lists train.csv val.csv"],
    "kinetics600": ["kinetics . --lists train.csv val.csv"],
    "vggsound": ["vggsound . --lists vggsound.csv"],
    "audioset": [
        "audioset . --lists balanced_train_segments.csv unbalanced_train_segments.csv"
        " --split train --classes-from class_labels_indices.csv",
        "audioset . --lists eval_segments.csv --classes-from class_labels_indices.csv",
    ],
    "esc10": ["esc50 . --subset esc10 --name esc10"],
}


def _write_collection(folder: Path) -> None:
    """Writes a second of noise for each row of lists that have the form of the official ones."""
    kinetics = "label,youtube_id,time_start,time_end,split\n"
    segments = "# Segments\n# num_ytids=1\n# YTID, start_seconds, end_seconds, positive_labels\n"
    esc = [f"{n}.wav,{n % 2 + 1},{n // 2},c{n // 2},True,{n},A\n" for n in range(20)]
    lists = {
        "train.csv": f"{kinetics}a,kinetrain00,0,10,train\nb,kinetrain11,0,10,train\n",
        "val.csv": f"{kinetics}a,kineval0000,0,10,val\n",
        "vggsound.csv": "vggtrain000,0,a,train\nvggtest0000,0,a,test\n",
        "balanced_train_segments.csv": f'{segments}audbalanced, 0.000, 10.000, "/m/a"\n',
        "unbalanced_train_segments.csv": f'{segments}audunbalanc, 0.000, 10.000, "/m/a"\n',
        "eval_segments.csv": f'{segments}audeval0000, 0.000, 10.000, "/m/a"\n',
        "class_labels_indices.csv": "index,mid,display_name\n0,/m/a,Speech\n",
        "meta/esc50.csv": "filename,fold,target,category,esc10,src_file,take\n" + "".join(esc),
    }
    for name, text in lists.items():
        write(folder / name, text)
    kinds = ("kinetrain00", "kinetrain11", "kineval0000", "vggtrain000", "vggtest0000")
    names = [f"{name}_000000_000010.wav" for name in kinds]
    names += [f"{name}_0_10.wav" for name in ("audbalanced", "audunbalanc", "audeval0000")]
    (folder / "audio").mkdir()
    for name in [*names, *(f"audio/{n}.wav" for n in range(20))]:
        with wave.open(str(folder / name), "wb") as sound:
            sound.setnchannels(1)
            sound.setsampwidth(2)
            sound.setframerate(16_000)
            samples = np.random.default_rng(len(name)).integers(-9_000, 9_000, 16_000)
            sound.writeframes(samples.astype(np.int16).tobytes())


@pytest.mark.slow
def test_presets_name_splits_that_the_documented_commands_make(tmp_path, monkeypatch) -> None:
    (tmp_path / "media").mkdir()
    _write_collection(tmp_path / "media")
    monkeypatch.chdir(tmp_path / "media")
    for preset, commands in DOCUMENTED.items():
        out = tmp_path / preset
        for command in commands:
            assert prepare(*command.split(), f"--out={out}") == 0
        splits = [(pretrain.get_config(preset).data.split, "")]
        section = evaluate.get_config(preset).evaluation
        splits += [(section[f"{r}_split"], section[f"{r}_select"]) for r in ("train", "test")]
        if preset != "esc10":
            config = cross_modal.get_config(preset)
            splits.append((config.data.split, config.data.select))
        for split, select in splits:
            records = RecordDataset(out, split)
            assert len(Selection.parse(select).positions(records))
        for label, _ in section.probes:
            assert label in records.class_names
