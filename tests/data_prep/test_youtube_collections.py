"""Kinetics, VGG-Sound and AudioSet: official lists, layouts of downloaders, what is wrong."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest

from avcl_jax.data_prep.manifest import Missing, PrepareError
from avcl_jax.errors import UserError
from tests.data_prep.collection_files import LISTS, found, needs_lists, read, touch, write

KINETICS = "label,youtube_id,time_start,time_end,split\n"
MIDS = (
    'index,mid,display_name\n0,/m/09x0r,"Speech"\n'
    '1,/m/05zppz,"Male speech, man speaking"\n2,/t/dd00125,Inside\n'
)
SEGMENTS = "# Segments csv created\n# num_ytids=2\n# YTID, start_seconds, end_seconds, labels\n"
ID = "-0_b-5-_30Q"  # ids may look like anything


@needs_lists
@pytest.mark.parametrize(("name", "classes", "clips"), [("400", 400, 19906), ("600", 600, 30000)])
def test_kinetics_as_published(tmp_path: Path, name: str, classes: int, clips: int) -> None:
    path = LISTS / "kinetics" / f"kinetics-{name}_val.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    # A clip for every seventh row, where ActivityNet's crawler puts it.
    there = rows[::7]
    names = [
        f"val/{row['label']}/{row['youtube_id']}_{int(row['time_start']):06d}"
        f"_{int(row['time_end']):06d}.mp4"
        for row in there
    ]
    manifest = read("kinetics", touch(tmp_path, names), "--lists", path)
    published = manifest.class_names["class"]
    assert len(published) == classes
    assert published[0] == "abseiling"
    assert published[-1] == "zumba"
    # The list is in the order of the classes.
    assert list(published) == list(dict.fromkeys(row["label"] for row in rows))
    assert len(manifest.entries) + len(manifest.missing) == clips
    assert [published[entry.labels["class"]] for entry in manifest.entries] == [
        row["label"] for row in there
    ]
    assert [os.path.relpath(entry.path, tmp_path) for entry in manifest.entries] == names
    assert [entry.source_id for entry in manifest.entries] == [row["youtube_id"] for row in there]
    assert {
        (entry.split, entry.start_seconds, entry.end_seconds) for entry in manifest.entries
    } == {("val", 0.0, None)}


def test_kinetics_layouts(tmp_path: Path) -> None:
    lists = write(
        tmp_path / "train.csv",
        KINETICS
        + f"b (x),{ID},417,427,train\n"
        + "a,second00000,3,13,train\n"
        + "a,second00000,0,10,validate\n"
        + "b (x),third000000,3.5,13.5,validation\n"
        + "a,fourth00000,3,13,test\n"
        + "a,absent00000,3,13,val\n",
    )
    folder = touch(
        tmp_path / "videos",
        [
            f"train/b (x)/{ID}_000417_000427.mp4",
            "second00000.webm",
            "elsewhere/third000000_000003.500_000013.500.MKV",
            "val/fourth00000_3_13.mp4",
            "fourth00000.mp4",  # the cut clip goes before
            "absent00000.mp4.part",
            "Absent00000.mp4",  # ids differ by case
            "absent00000_000003_000014.mp4",
        ],
    )
    manifest = read("kinetics", folder, "--lists", lists)
    assert found(manifest, folder) == {
        f"{ID}_000417_000427": (f"train/b (x)/{ID}_000417_000427.mp4", 0.0, None),
        "second00000_000003_000013": ("second00000.webm", 3.0, 13.0),
        "second00000_000000_000010": ("second00000.webm", 0.0, 10.0),
        "third000000_000003.500_000013.500": (
            "elsewhere/third000000_000003.500_000013.500.MKV",
            0.0,
            None,
        ),
        "fourth00000_000003_000013": ("val/fourth00000_3_13.mp4", 0.0, None),
    }
    assert [entry.split for entry in manifest.entries] == ["train", "train", "val", "val", "test"]
    assert [entry.labels["class"] for entry in manifest.entries] == [1, 0, 0, 1, 0]
    assert manifest.missing == (
        Missing("absent00000_000003_000013", "val", "absent00000_000003_000013.mp4"),
    )
    assert manifest.ignored == 4


def test_kinetics_splits_prepared_apart_share_their_classes(tmp_path: Path) -> None:
    train = write(tmp_path / "t.csv", KINETICS + "a,A,0,10,train\nb,B,0,10,train\nc,C,0,10,train\n")
    val = write(tmp_path / "v.csv", KINETICS + "c,D,0,10,val\n")
    touch(tmp_path, ["A.mp4", "B.mp4", "C.mp4", "D.mp4"])
    together = read("kinetics", tmp_path, "--lists", train, val)
    apart = read("kinetics", tmp_path, "--lists", val, "--classes-from", train)
    alone = read("kinetics", tmp_path, "--lists", val)
    assert together.class_names == apart.class_names == {"class": ("a", "b", "c")}
    assert together.entries[-1] == apart.entries[-1]
    assert (alone.class_names["class"], alone.entries[0].labels) == (("c",), {"class": 0})
    other = write(tmp_path / "w.csv", KINETICS + "d,D,0,10,val\n")
    with pytest.raises(PrepareError, match=r"w.csv, line 2: unknown class 'd': .*t.csv does not"):
        read("kinetics", tmp_path, "--lists", other, "--classes-from", train)


def test_kinetics_lists_that_hold_the_labels_back(tmp_path: Path) -> None:
    touch(tmp_path, ["A.mp4", "B.mp4"])
    test = write(tmp_path / "test.csv", "youtube_id,time_start,time_end,split\nA,0,10,test\n")
    val = write(tmp_path / "val.csv", KINETICS + "b,B,0,10,val\n")
    assert [e.labels for e in read("kinetics", tmp_path, "--lists", test, val).entries] == [
        {"class": -1},
        {"class": 0},
    ]
    alone = read("kinetics", tmp_path, "--lists", test)
    assert (alone.class_names, alone.entries[0].labels) == ({}, {})


def test_files_of_the_id_alone_that_are_cut_already(tmp_path: Path) -> None:
    lists = write(tmp_path / "train.csv", KINETICS + "a,A,5,15,train\n")
    touch(tmp_path, ["A.mp4"])
    cut = read("kinetics", tmp_path, "--lists", lists, "--already-cut")
    assert found(cut, tmp_path) == {"A_000005_000015": ("A.mp4", 0.0, None)}
    twice = write(tmp_path / "two.csv", KINETICS + "a,A,5,15,train\na,A,20,30,train\n")
    assert len(read("kinetics", tmp_path, "--lists", twice).entries) == 2
    with pytest.raises(PrepareError, match=r"two.csv, line 3: .*A.mp4 would be this clip and an"):
        read("kinetics", tmp_path, "--lists", twice, "--already-cut")


@needs_lists
def test_vggsound_as_published(tmp_path: Path) -> None:
    path = LISTS / "vggsound" / "test.csv"
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    with (LISTS / "vggsound" / "stat.csv").open(newline="") as file:
        classes = sorted(row[0] for row in csv.reader(file))  # as the authors' dataloader
    touch(tmp_path, [name for name, _ in rows])
    manifest = read("vggsound", tmp_path, "--lists", path)
    assert len(manifest.entries) == 15446
    assert not manifest.missing
    assert list(manifest.class_names["class"]) == classes
    assert len(classes) == 309
    assert classes[0] == "air conditioning noise"
    assert "bird chirping, tweeting" in classes
    for entry, (name, label) in zip(manifest.entries, rows, strict=True):
        assert (entry.path, entry.split) == (str(tmp_path / name), "test")
        assert classes[entry.labels["class"]] == label
        assert f"{entry.record_id}.mp4" == name
        assert entry.record_id.startswith(f"{entry.source_id}_")
    # stat.csv says the same, which a list without all classes needs.
    few = write(tmp_path / "lists" / "test.csv", ",".join(rows[0]) + "\n")
    by_stat = read(
        "vggsound", tmp_path, "--lists", few, "--classes-from", LISTS / "vggsound" / "stat.csv"
    )
    assert by_stat.class_names == manifest.class_names
    assert by_stat.entries[0] == manifest.entries[0]


def test_the_two_forms_of_the_vggsound_lists_are_read_alike(tmp_path: Path) -> None:
    # The published forms differ by 291 rows: docs/data/vggsound.md.
    rows = [("A", 7, "owl", "train"), ("B", 30, "bell, tolling", "train"), ("C", 0, "owl", "test")]
    one = write(
        tmp_path / "vggsound.csv",
        "".join(f'{video},{at},"{label}",{split}\n' for video, at, label, split in rows)
        + "D,5,owl,test\n",
    )
    pair = [
        write(
            tmp_path / f"{split}.csv",
            "".join(f'{v}_{at:06d}.mp4,"{label}"\n' for v, at, label, s in rows if s == split),
        )
        for split in ("train", "test")
    ]
    for video, at, _, _ in (*rows, ("D", 5, "", "")):
        (tmp_path / f"{video}_{at:06d}.mp4").touch()
    whole = read("vggsound", tmp_path, "--lists", one)
    halves = read("vggsound", tmp_path, "--lists", *pair)
    assert whole.class_names == halves.class_names
    assert [entry for entry in whole.entries if entry.source_id != "D"] == list(halves.entries)
    assert (len(whole.entries), len(halves.entries)) == (4, 3)
    with pytest.raises(PrepareError, match=r"train.csv, line 1: the clip 'A_000007' is listed a"):
        read("vggsound", tmp_path, "--lists", one, *pair)


def test_vggsound_layouts(tmp_path: Path) -> None:
    lists = write(
        tmp_path / "vggsound.csv",
        f'{ID},300,"dog barking, howling",train\nB,3,owl,test\nB,30,owl,test\nC,1,owl,train\n'
        "D,0,owl,test\n",
    )
    folder = touch(
        tmp_path / "videos", [f"x/{ID}_000300.mp4", "B.mp4", "B_30000_40000.webm", "C_000001.wav"]
    )
    manifest = read("vggsound", folder, "--lists", lists)
    assert found(manifest, folder) == {
        f"{ID}_000300": (f"x/{ID}_000300.mp4", 0.0, None),
        "B_000003": ("B.mp4", 3.0, 13.0),
        "B_000030": ("B_30000_40000.webm", 0.0, None),
        "C_000001": ("C_000001.wav", 0.0, None),
    }
    assert manifest.class_names == {"class": ("dog barking, howling", "owl")}
    assert [(e.split, e.source_id) for e in manifest.entries] == [
        ("train", ID),
        ("test", "B"),
        ("test", "B"),
        ("train", "C"),
    ]
    assert manifest.missing == (Missing("D_000000", "test", "D_000000.mp4"),)


@needs_lists
def test_audioset_as_published(tmp_path: Path) -> None:
    labels = LISTS / "audioset" / "class_labels_indices.csv"
    with labels.open(newline="") as file:
        rows = list(csv.DictReader(file))
    ontology = {
        node["id"]: node["name"]
        for node in json.loads((LISTS / "audioset" / "ontology.json").read_text())
    }
    lists = write(
        tmp_path / "eval_segments.csv", SEGMENTS + f'{ID}, 30.000, 40.000, "/m/05zppz,/m/09x0r"\n'
    )
    touch(tmp_path, [f"{ID}.mp4"])
    manifest = read("audioset", tmp_path, "--lists", lists, "--classes-from", labels)
    names = manifest.class_names["class"]
    assert len(names) == 527
    assert names[:2] == ("Speech", "Male speech, man speaking")
    assert [ontology[row["mid"]] for row in rows] == list(names)
    assert manifest.multilabel == {"class"}
    assert manifest.entries[0].labels == {"class": (0, 1)}


def test_audioset_layouts(tmp_path: Path) -> None:
    names = {
        "sixdigits00": "sixdigits00_000030_000040.mp4",
        "millisecond": "audio/millisecond_30000_40000.flac",
        "plain000000": "plain000000_30_40.wav",
        "float000000": "Speech/float000000_30.0-40.0.ogg",
        "csvtimes000": "csvtimes000_30.000_40.000.m4a",
        "startonly00": "startonly00_30.mp4",
        "startcsv000": "startcsv000_30.000.wav",
        "startsix000": "startsix000_000030.mp4",
        "panns000000": "Ypanns000000.wav",
        "fast0000000": "wavs/id_fast0000000.m4a",
    }
    rows = "".join(f"{video}, 30.000, 40.000, /m/09x0r\n" for video in names)
    rows += "full0000000, 1.500, 8.250, /t/dd00125\n"
    lists = write(tmp_path / "unbalanced_train_segments.csv", SEGMENTS + rows)
    labels = write(tmp_path / "classes.csv", MIDS)
    folder = touch(tmp_path / "media", [*names.values(), "full0000000.mp4"])
    manifest = read("audioset", folder, "--lists", lists, "--classes-from", labels)
    expected: dict[str, tuple[str, float, float | None]] = {
        f"{video}_000030_000040": (name, 0.0, None) for video, name in names.items()
    }
    expected["full0000000_000001.500_000008.250"] = ("full0000000.mp4", 1.5, 8.25)
    assert found(manifest, folder) == expected
    assert {entry.split for entry in manifest.entries} == {"unbalanced_train"}
    assert (manifest.missing, manifest.ignored) == ((), 0)


def test_audioset_splits(tmp_path: Path) -> None:
    row = "{}, 0.000, 10.000, /m/09x0r\n"
    labels = write(tmp_path / "classes.csv", MIDS)
    touch(tmp_path, ["A.mp4", "B.mp4"])
    balanced = write(tmp_path / "balanced_train_segments.csv", SEGMENTS + row.format("A"))
    other = write(tmp_path / "mine.csv", row.format("B"))
    common = ("--classes-from", labels)
    assert read("audioset", tmp_path, "--lists", balanced, *common).entries[0].split == (
        "balanced_train"
    )
    with pytest.raises(PrepareError, match=r"mine.csv: no split follows .* give --split"):
        read("audioset", tmp_path, "--lists", balanced, other, *common)
    train = read("audioset", tmp_path, "--lists", balanced, other, *common, "--split", "train")
    assert [entry.split for entry in train.entries] == ["train", "train"]


def test_of_files_with_one_name_the_one_with_a_picture_is_taken(tmp_path: Path) -> None:
    lists = write(tmp_path / "eval_segments.csv", SEGMENTS + "A, 0.000, 10.000, /m/09x0r\n")
    labels = write(tmp_path / "classes.csv", MIDS)
    folder = touch(
        tmp_path / "data", ["a/A_0_10000.flac", "z/A_0_10000.mp4", "y/A_0_10000.webm", "A.txt"]
    )
    manifest = read("audioset", folder, "--lists", lists, "--classes-from", labels)
    assert found(manifest, folder) == {"A_000000_000010": ("y/A_0_10000.webm", 0.0, None)}
    assert manifest.ignored == 3


@pytest.mark.parametrize(
    ("collection", "text", "message"),
    [
        ("kinetics", KINETICS + "a,A,0,10\n", "line 2: not 5 columns"),
        ("kinetics", KINETICS + "a,A,0,10,val,0\n", "line 2: not 5 columns"),
        ("kinetics", KINETICS + "a,A,zero,10,val\n", "line 2: start is 'zero', expected seconds"),
        ("kinetics", KINETICS + "a,A,-1,10,val\n", "line 2: start is '-1'"),
        ("kinetics", KINETICS + "a,A,0,inf,val\n", "line 2: end is 'inf'"),
        ("kinetics", KINETICS + "a,A,10,10,val\n", "line 2: end 10 is not after start 10"),
        ("kinetics", KINETICS + "a,,0,10,val\n", "line 2: no youtube_id"),
        ("kinetics", KINETICS + 'a,A,0,9,val\nb,"B,0,9,val\nc,C\n', "line 3: unexpected end"),
        ("kinetics", "a,A,0,10,val\n", "line 1: no column 'youtube_id'"),
        ("kinetics", "", "line 1: no column 'youtube_id'"),
        ("kinetics", KINETICS, "the lists name no clips"),
        ("kinetics", KINETICS + 2 * "a,A,0,10,val\n", "line 3: the clip 'A_.*' is listed"),
        ("kinetics", KINETICS + "a,A,0,10,my val\n", "split 'my val' of 'A_000000_000010'"),
        ("vggsound", 'A,0,owl,test\nB,0,"o\nwl",x,test\n', "line 2: 5 columns"),
        ("vggsound", "A,0,owl\n", "line 1: 3 columns, expected 4 or 2"),
        ("vggsound", "A,0,owl,barking,train\n", "line 1: 5 columns"),
        ("vggsound", "A,0,owl,train\nA,x,owl,train\n", "line 2: start is 'x'"),
        ("vggsound", "A,0,owl,val\n", "line 1: split 'val', expected train or test"),
        ("vggsound", "A,0,,train\n", "line 1: no label"),
        ("vggsound", "A_000000.mp4,owl\n", "split 'list', .* of two columns is train.csv or test"),
        ("vggsound", "A.mp4,owl\n", "line 1: 'A.mp4' is not of the form ID_START.mp4"),
        ("vggsound", "A,0,owl,train\nA,0,owl,test\n", "line 2: the clip 'A_000000' is listed a"),
        ("audioset", SEGMENTS + "A, 0.000, 10.000\n", "line 4: 3 columns, expected 4"),
        ("audioset", SEGMENTS + "A, 0.000, 10.000, /m/1, /m/2\n", "line 4: 5 columns"),
        ("audioset", SEGMENTS + "A, start, 10.000, /m/09x0r\n", "line 4: start is 'start'"),
        ("audioset", SEGMENTS + 'A, 0, 9, "/m/09x0r,/m/x"\n', "line 4: unknown class '/m/x': .*cl"),
        ("audioset", SEGMENTS + ", 0, 10, /m/09x0r\n", "line 4: no YTID"),
        ("audioset", 2 * "A, 0, 10, /m/09x0r\n", "line 2: the clip 'A_000000_000010' is listed"),
    ],
)
def test_what_is_wrong_in_a_list(tmp_path: Path, collection: str, text: str, message: str) -> None:
    touch(tmp_path, ["A.mp4"])
    more: tuple[object, ...] = ()
    if collection == "audioset":
        more = ("--split=eval", "--classes-from", write(tmp_path / "classes.csv", MIDS))
    lists = write(tmp_path / "list.csv", text)
    with pytest.raises(PrepareError, match=message) as caught:
        read(collection, tmp_path, "--lists", lists, *more)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("index,mid,display_name\n1,/m/1,x\n", "line 2: index '1', expected 0"),
        ("index,mid,display_name\n0,/m/1,x\n1,/m/1,y\n", "line 3: /m/1 'y' comes twice"),
        ("mid,display_name\n", "line 1: no column 'index'"),
        ("index,mid,display_name\n", "names no classes"),
    ],
)
def test_what_is_wrong_in_audioset_classes(tmp_path: Path, text: str, message: str) -> None:
    lists = write(tmp_path / "eval_segments.csv", SEGMENTS + "A, 0, 10, /m/1\n")
    classes = write(tmp_path / "classes.csv", text)
    with pytest.raises(PrepareError, match=message):
        read("audioset", tmp_path, "--lists", lists, "--classes-from", classes)


def test_what_is_not_there(tmp_path: Path) -> None:
    lists = write(tmp_path / "val.csv", KINETICS + "a,A,0,10,val\n")
    with pytest.raises(PrepareError, match=r"the list .*absent.csv does not exist"):
        read("kinetics", tmp_path, "--lists", tmp_path / "absent.csv")
    with pytest.raises(UserError, match=r"cannot list the folder .*absent: No such file"):
        read("kinetics", tmp_path / "absent", "--lists", lists)
