"""Long videos to clips."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from avcl_jax.data.records import RecordDataset
from avcl_jax.data_prep.__main__ import main
from avcl_jax.data_prep.clip import Cut, parse_cut, pieces
from avcl_jax.data_prep.manifest import Entry, PrepareError
from tests.data.synthetic_media import write_clip
from tests.data_prep.conftest import listed

_SECONDS = 5.2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    write_clip(folder / "long.mp4", 52)
    return folder


def entry(path: Path, start: float = 0.0, end: float | None = None) -> Entry:
    return Entry(str(path), "train", "v", "source", start, end, {})


def intervals(found: list[Entry]) -> list[tuple[float, float]]:
    return [(e.start_seconds, e.end_seconds) for e in found]


@pytest.mark.parametrize(
    ("text", "expected"), [("10", Cut(10, 10)), ("10/2.5", Cut(10, 2.5)), ("0.5", Cut(0.5, 0.5))]
)
def test_forms(text: str, expected: Cut) -> None:
    assert parse_cut(text) == expected


@pytest.mark.parametrize("text", ["0", "10/0", "-1", "ten", "scene", "scenes:0", "1/2/3", ""])
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(PrepareError, match="--cut is"):
        parse_cut(text)


@pytest.mark.parametrize(
    ("cut", "start", "end", "expected"),
    [
        (Cut(2, 2), 0.0, None, [(0, 2), (2, 4)]),
        (Cut(2, 1), 0.0, None, [(0, 2), (1, 3), (2, 4), (3, 5)]),
        (Cut(1, 2), 0.0, None, [(0, 1), (2, 3), (4, 5)]),
        (Cut(2, 2), 1.0, 5.0, [(1, 3), (3, 5)]),
        (Cut(2, 2), 1.0, 4.5, [(1, 3)]),
        (Cut(9, 9), 1.0, 4.0, [(1, 4)]),
    ],
)
def test_fixed_lengths(folder, cut, start, end, expected):
    found = pieces(entry(folder / "long.mp4", start, end), cut, min_seconds=0.0)
    assert intervals(found) == expected
    assert {e.source_id for e in found} == {"source"}
    assert len({e.record_id for e in found}) == len(found)


def test_overlapping_clips_show_and_sound_what_the_video_does(folder: Path, tmp_path: Path) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert main(["prepare", str(folder), f"--out={out}", "--cut=2/1", "--workers=1"]) == 0
    assert main(["prepare", str(folder), f"--out={whole}", "--workers=1"]) == 0
    (film,) = RecordDataset(whole, "train")
    clips = RecordDataset(out, "train")
    assert len(clips) == 4
    assert clips.source_numbers.tolist() == [0] * 4
    for number, clip in enumerate(clips):
        assert clip.record_id == f"long.mp4#{number}-{number + 2}"
        first = number * 10
        assert list(clip.frames) == list(film.frames[first : first + 20])
        np.testing.assert_allclose(clip.frame_seconds, np.arange(20) / 10, atol=1e-6)
        begin = number * 16000
        expected = film.waveform[begin : begin + 32000].astype(int)
        # Resampling begins afresh in each clip, so its first samples differ.
        off = np.abs(clip.waveform.astype(int) - expected)
        assert off[200:-200].max() <= 2


def test_a_cut_video_is_known_again_and_rejected_clip_by_clip(folder, tmp_path, capsys):
    (tmp_path / "m.csv").write_text(f"path,id,start,end\n{folder}/long.mp4,v,0,5\n")
    arguments = ["prepare", str(tmp_path / "m.csv"), f"--out={tmp_path / 'out'}", "--workers=1"]
    assert main([*arguments, "--cut=2"]) == 0
    assert main([*arguments, "--cut=2"]) == 0
    assert "up to date" in capsys.readouterr().out
    assert main([*arguments, "--cut=1"]) == 1
    assert "with other options" in capsys.readouterr().err.replace("\n", " ")
    assert main([*arguments, "--cut=1", "--overwrite", "--min-seconds=1.5"]) == 1
    rejected = listed(tmp_path / "out")
    assert [line["id"] for line in rejected] == [f"v#{n}-{n + 1}" for n in range(5)]
    assert {line["reason"] for line in rejected} == {"too_short"}
