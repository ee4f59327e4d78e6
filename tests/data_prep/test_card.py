"""The card of a data set."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from avcl_jax.data.record_writer import write_dataset_metadata
from avcl_jax.data.records import Record, RecordDataset, shard_name
from avcl_jax.data_prep.__main__ import main
from avcl_jax.data_prep.card import describe
from tests.data.synthetic_records import write_shard
from tests.data.test_records import make_record


def write(directory: Path, made: list[Record], split: str = "train") -> None:
    info = write_shard(directory / shard_name("demo", split, 0, 1), made)
    write_dataset_metadata(
        directory,
        name="demo",
        class_names={"sound": ["a", "b", "c"], "motion": ["x", "y"]},
        multilabel={"sound"},
        splits={split: [info]},
    )


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    labels = [((0, 2), 1), ((), 1), ((2,), 0), ((2,), -1)]
    made = [
        dataclasses.replace(
            make_record(n, video=n != 1, audio=n != 2), labels={"sound": sound, "motion": motion}
        )
        for n, (sound, motion) in enumerate(labels)
    ]
    write(tmp_path, made)
    return tmp_path


def test_counts_are_those_of_the_records(prepared: Path) -> None:
    text = "\n".join(describe(RecordDataset(prepared, "train")))
    assert "clips      4, of 2 sources" in text
    # Frames at 0, 1/3 and 0.7 s: two intervals in 0.7 s.
    assert "video      3 clips; 2.857 / 2.857 / 2.857 frames per second" in text
    assert "audio      3 clips; 16000 Hz" in text
    assert "length     1.1 / 1.1 / 1.1 s" in text
    assert "label      sound: 3 classes, several per clip, 1 clips without" in text
    assert "label      motion: 2 classes, 1 clips without" in text
    histogram = [line.split()[:2] for line in text.splitlines() if line.startswith("    ")]
    assert histogram == [["y", "2"], ["x", "1"], ["c", "3"], ["a", "1"], ["b", "0"]]


def test_the_picture_shows_the_stills(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import cv2

    pictures = []
    for path in ("one.png", "two.png"):
        assert main(["inspect", str(prepared), "--rows=4", f"--png={prepared / path}"]) == 0
        pictures.append(cv2.imread(str(prepared / path)))
    assert "image" in capsys.readouterr().out
    np.testing.assert_array_equal(*pictures)
    assert pictures[0].shape[1] == 960
    # A frame of random colours has thousands of them, a chart few.
    assert len(np.unique(pictures[0].reshape(-1, 3), axis=0)) > 500


def test_what_cannot_be_shown_is_one_line(prepared, tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "nothing")]) == 1
    assert "error: " in capsys.readouterr().err
    assert main(["inspect", str(prepared), "--split=valid"]) == 1
    assert "has no split 'valid'" in capsys.readouterr().err
