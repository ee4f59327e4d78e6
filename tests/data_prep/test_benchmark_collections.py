"""UCF101, HMDB51 and ESC-50: official lists and splits, layouts, what is wrong in a list."""

from __future__ import annotations

import collections
import csv
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from avcl_jax.data_prep.manifest import Manifest, PrepareError
from avcl_jax.errors import UserError
from tests.data_prep.collection_files import LISTS, SHARED, by_id, needs_lists, read, touch, write

ESC = "filename,fold,target,category,esc10,src_file,take\n"


def parts(manifest: Manifest, split: str) -> Mapping[str, int]:
    """Returns how many records are in each part of an official split."""
    names = manifest.class_names[split]
    return collections.Counter(names[entry.labels[split]] for entry in manifest.entries)


def no_source_is_divided(manifest: Manifest, split: str, kept_apart: set[int]) -> bool:
    sides = collections.defaultdict(set)
    for entry in manifest.entries:
        sides[entry.source_id] |= {entry.labels[split]} & kept_apart
    return max(map(len, sides.values())) == 1


@needs_lists
def test_ucf101_as_published(tmp_path: Path) -> None:
    lists = LISTS / "ucf101"
    names = set()
    for path in lists.glob("t*list0?.txt"):
        names |= {line.split()[0] for line in path.read_text().splitlines()}
    # In UCF101.rar the files of this class are spelt unlike the lists.
    on_disk = [name.replace("/v_HandStandPushups", "/v_HandstandPushups") for name in names]
    manifest = read("ucf101", touch(tmp_path, on_disk), "--lists", lists)
    assert len(manifest.entries) == 13320
    assert (manifest.missing, manifest.ignored) == ((), 0)
    assert parts(manifest, "split1") == {"train": 9537, "test": 3783}
    assert parts(manifest, "split2") == {"train": 9586, "test": 3734}
    assert parts(manifest, "split3") == {"train": 9624, "test": 3696}
    classes = manifest.class_names["class"]
    assert len(classes) == 101
    assert [f"{number} {name}" for number, name in enumerate(classes, start=1)] == [
        line.strip() for line in (lists / "classInd.txt").read_text().splitlines()
    ]
    for entry in manifest.entries:
        assert Path(entry.path).parent.name == classes[entry.labels["class"]]
        assert entry.split == "all"
    one = by_id(manifest)["v_HandStandPushups_g01_c04"]
    assert one.source_id == "v_HandStandPushups_g01"
    assert one.labels == {"class": 36, "split1": 1, "split2": 0, "split3": 0}
    assert len({entry.source_id for entry in manifest.entries}) == 101 * 25
    for split in ("split1", "split2", "split3"):
        assert no_source_is_divided(manifest, split, {0, 1})


def ucf101_lists(folder: Path, **changes: str) -> Path:
    """Writes lists of 101 classes with two videos each, the first for training."""
    classes = [f"Class{number:03d}" for number in range(101)]
    text = {"classInd": "".join(f"{n} {name}\r\n" for n, name in enumerate(classes, start=1))}
    for split in ("01", "02", "03"):
        text[f"trainlist{split}"] = "".join(
            f"{name}/v_{name}_g01_c01.avi {n}\n" for n, name in enumerate(classes, start=1)
        )
        text[f"testlist{split}"] = "".join(f"{name}/v_{name}_g02_c01.avi\n" for name in classes)
    for name, content in (text | changes).items():
        write(folder / f"{name}.txt", content)
    return folder


def test_ucf101_flat_converted_and_missing(tmp_path: Path) -> None:
    lists = ucf101_lists(tmp_path / "lists")
    folder = touch(
        tmp_path / "flat", ["v_Class000_g01_c01.mp4", "v_class007_g02_c01.webm", "x.mp4"]
    )
    manifest = read("ucf101", folder, "--lists", lists)
    assert {entry.record_id: entry.labels["split2"] for entry in manifest.entries} == {
        "v_Class000_g01_c01": 0,
        "v_Class007_g02_c01": 1,
    }
    assert (len(manifest.missing), manifest.ignored) == (200, 1)
    assert manifest.missing[0].expected == "v_Class001_g01_c01.avi"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classInd": "1 A\n"}, r"classInd.txt: 1 different classes, expected 101"),
        ({"classInd": "1 A\n3 B\n"}, r"classInd.txt, line 2: '3 B', expected 2 and a class"),
        ({"trainlist02": "A/v_A_g01_c01.avi 1\n"}, "trainlist02.txt, line 1: unknown class 'A'"),
        (
            {"trainlist01": "Class000/v_Class000_g01_c01.avi 2\n"},
            "trainlist01.txt, line 1: Class000 is class 1, not 2",
        ),
        ({"trainlist01": "Class000/v_Class000_g01_c01.avi\n"}, "line 1: .* is not of the form .*N"),
        (
            {"testlist03": "\nv_Class000_g01_c01.avi\n"},
            "testlist03.txt, line 2: .* not of the form",
        ),
        (
            {"testlist01": "Class000/v_Class000_g01_c01.avi\n"},
            "testlist01.txt, line 1: 'v_Class000_g01_c01' comes twice in split1",
        ),
    ],
)
def test_what_is_wrong_in_lists_of_ucf101(tmp_path, changes, message):
    with pytest.raises(PrepareError, match=message):
        read("ucf101", tmp_path, "--lists", ucf101_lists(tmp_path / "lists", **changes))


def test_an_absent_list_of_ucf101(tmp_path: Path) -> None:
    lists = ucf101_lists(tmp_path / "lists")
    (lists / "testlist03.txt").unlink()
    with pytest.raises(PrepareError, match=r"the list .*testlist03.txt does not exist"):
        read("ucf101", tmp_path, "--lists", lists)


@needs_lists
def test_hmdb51_as_published(tmp_path: Path) -> None:
    lists = LISTS / "hmdb51"
    names = [
        f"{path.name.removesuffix('_test_split1.txt')}/{line.split()[0]}"
        for path in lists.glob("*_test_split1.txt")
        for line in path.read_text().splitlines()
    ]
    assert set("[]()#&;!+~@") < set("".join(names))  # the odd characters, literally
    manifest = read("hmdb51", touch(tmp_path, names), "--lists", lists)
    assert len(manifest.entries) == 6766
    assert (manifest.missing, manifest.ignored) == ((), 0)
    classes = manifest.class_names["class"]
    assert len(classes) == 51
    assert list(classes) == sorted(classes)
    assert (classes[0], classes[-1]) == ("brush_hair", "wave")
    for split in ("split1", "split2", "split3"):
        assert manifest.class_names[split] == ("unused", "train", "test")
        assert parts(manifest, split) == {"unused": 1666, "train": 3570, "test": 1530}
        # What we call one source is what the official splits keep together.
        assert no_source_is_divided(manifest, split, {1, 2})
    for entry in manifest.entries:
        assert Path(entry.path).parent.name == classes[entry.labels["class"]]
        assert entry.source_id.endswith("_" + classes[entry.labels["class"]])
    one = by_id(manifest)["Geena_und_die_Radschl_ge___;-)_cartwheel_f_cm_np1_fr_med_2"]
    assert one.source_id == "Geena_und_die_Radschl_ge___;-)_cartwheel"
    # Ten people in the picture are two digits.
    assert "metacafe_coolsoccer_run" in {entry.source_id for entry in manifest.entries}


def hmdb51_lists(folder: Path, **changes: str) -> Path:
    """Writes lists of 51 classes with three clips each."""
    for number in range(51):
        name = f"act_{number:02d}"
        for split in (1, 2, 3):
            key = f"{name}_test_split{split}"
            text = "".join(
                f"A_film!_{name}_f_cm_np1_fr_med_{part}.avi {part} \n" for part in (0, 1, 2)
            )
            write(folder / f"{key}.txt", changes.get(key, text))
    return folder


def test_hmdb51_flat_converted_and_missing(tmp_path: Path) -> None:
    lists = hmdb51_lists(tmp_path / "lists")
    folder = touch(tmp_path / "flat", ["A_film!_act_03_f_cm_np1_fr_med_2.mp4"])
    manifest = read("hmdb51", folder, "--lists", lists)
    (entry,) = manifest.entries
    assert entry.labels == {"class": 3, "split1": 2, "split2": 2, "split3": 2}
    assert entry.source_id == "A_film!_act_03"
    assert len(manifest.missing) == 152


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a_f_cm_np1_fr_med_0.avi 3\n", "split1.txt, line 1: .* is not of the form NAME.avi and 0"),
        ("a_f_cm_np1_fr_med_0.avi\n", "split1.txt, line 1: .* is not of the form"),
        ("a.avi 1\n", "split1.txt, line 1: 'a' is not a name of HMDB51"),
        (2 * "a_f_cm_np1_fr_med_0.avi 1\n", "line 2: 'a_f_cm_np1_fr_med_0' comes twice in split1"),
        ("A_film!_act_01_f_cm_np1_fr_med_1.avi 1\n", "line .: 'A_film!_act_01_f.* comes twice in"),
    ],
)
def test_what_is_wrong_in_lists_of_hmdb51(tmp_path: Path, text: str, message: str) -> None:
    lists = hmdb51_lists(tmp_path / "lists", act_00_test_split1=text)
    with pytest.raises(PrepareError, match=message):
        read("hmdb51", tmp_path, "--lists", lists)


def test_a_clip_of_two_classes_of_hmdb51(tmp_path: Path) -> None:
    line = "a_f_cm_np1_fr_med_0.avi 1\n"
    changes = {"act_00_test_split1": line, "act_01_test_split2": line}
    lists = hmdb51_lists(tmp_path / "lists", **changes)
    with pytest.raises(PrepareError, match=r"act_01_test_split2.txt, line 1: .* of two classes"):
        read("hmdb51", tmp_path, "--lists", lists)


def test_hmdb51_without_one_of_its_lists(tmp_path: Path) -> None:
    lists = hmdb51_lists(tmp_path / "lists")
    (lists / "act_50_test_split1.txt").unlink()
    with pytest.raises(PrepareError, match=r"has 50 lists CLASS_test_split1.txt, expected 51"):
        read("hmdb51", tmp_path, "--lists", lists)


@pytest.mark.skipif(not SHARED.exists(), reason=f"no real data in {SHARED}")
def test_esc10_as_published() -> None:
    folder = SHARED / "esc10"
    manifest = read("esc50", folder, "--subset=esc10")
    assert len(manifest.entries) == 400
    assert not manifest.missing
    # In the order of their numbers in ESC-50: 0, 1, 10, 11, 12, 20, 21, 38, 40, 41.
    assert manifest.class_names["class"] == (
        *("dog", "rooster", "rain", "sea_waves", "crackling_fire", "crying_baby", "sneezing"),
        *("clock_tick", "helicopter", "chainsaw"),
    )
    assert manifest.class_names["fold"] == ("1", "2", "3", "4", "5")
    assert parts(manifest, "fold") == dict.fromkeys("12345", 80)
    assert set(parts(manifest, "class").values()) == {40}
    with (folder / "meta" / "esc50.csv").open(newline="") as file:
        rows = {Path(row["filename"]).stem: row for row in csv.DictReader(file)}
    for entry in manifest.entries:
        row = rows[entry.record_id]
        assert manifest.class_names["class"][entry.labels["class"]] == row["category"]
        assert manifest.class_names["fold"][entry.labels["fold"]] == row["fold"]
        assert entry.source_id == row["src_file"]
    assert no_source_is_divided(manifest, "fold", {0, 1, 2, 3, 4})
    with pytest.raises(PrepareError, match="10 classes, esc50 has 50: give --subset esc10"):
        read("esc50", folder)


def esc50_folder(folder: Path, text: str | None = None) -> Path:
    """Writes a list of 50 classes with one clip each, in an order that is not theirs."""
    rows = "".join(
        f"{n % 5 + 1}-{n}-A-{n}.wav,{n % 5 + 1},{n},class {n},{n % 5 == 0},{n},A\n"
        for n in reversed(range(50))
    )
    write(folder / "meta" / "esc50.csv", ESC + (rows if text is None else text))
    return folder


def test_esc50_with_its_original_wav_files(tmp_path: Path) -> None:
    folder = esc50_folder(tmp_path)
    touch(folder / "audio", ["1-0-A-0.wav", "5-49-A-49.wav", "notes.txt"])
    manifest = read("esc50", folder)
    assert manifest.class_names["class"] == tuple(f"class {n}" for n in range(50))
    assert [(e.record_id, e.labels) for e in manifest.entries] == [
        ("5-49-A-49", {"class": 49, "fold": 4}),
        ("1-0-A-0", {"class": 0, "fold": 0}),
    ]
    assert (len(manifest.missing), manifest.ignored) == (48, 1)
    assert manifest.missing[0].expected == "4-48-A-48.wav"
    ten = read("esc50", folder, "--subset=esc10")
    assert ten.class_names["class"] == tuple(f"class {n}" for n in range(0, 50, 5))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1-0-A-0.wav,1,0,dog,True,0\n", "line 2: not 7 columns"),
        ("1-0-A-0.wav,1,0,dog,yes,0,A\n", "line 2: esc10 is 'yes', expected True or False"),
        ("1-0-A-0.wav,1,first,dog,True,0,A\n", "line 2: target is 'first', expected a number"),
        (
            "a.wav,1,0,dog,True,0,A\nb.wav,1,0,cat,True,0,A\n",
            "line 3: target 0 is 'cat', and 'dog'",
        ),
        ("a.wav,1,0,dog,True,0,A\n", "esc50.csv: 1 classes, esc50 has 50$"),
    ],
)
def test_what_is_wrong_in_the_list_of_esc50(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(PrepareError, match=message):
        read("esc50", esc50_folder(tmp_path, text))


def test_folds_and_clips_of_esc50(tmp_path: Path) -> None:
    folder = touch(esc50_folder(tmp_path), ["audio/1-0-A-0.wav"])
    path = folder / "meta" / "esc50.csv"
    good = path.read_text()
    path.write_text(good.replace("1-0-A-0.wav,1,", "1-0-A-0.wav,6,"))
    with pytest.raises(PrepareError, match="line 51: unknown class '6': 1 to 5 does not name it"):
        read("esc50", folder)
    path.write_text(good + good.splitlines()[-1] + "\n")
    with pytest.raises(PrepareError, match="line 52: the clip '1-0-A-0' is listed a second time"):
        read("esc50", folder)
    path.write_text(good)
    shutil.rmtree(folder / "audio")
    with pytest.raises(UserError, match=r"cannot list the folder .*audio: No such file"):
        read("esc50", folder)
