"""Training data of the shipped encoders: videos that follow a recording, and their records."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest

from avcl_jax.data.records import RecordDataset
from avcl_jax.data_prep.__main__ import main
from avcl_jax.data_prep.foley.heard import render_heard, renewed
from avcl_jax.data_prep.foley.scene import SAMPLE_RATE_HZ, VIDEO_FPS

ONSETS = (1.0, 2.5)


def recording(seconds: float = 4.0) -> np.ndarray:
    """Returns silence with two decaying tones, the second higher."""
    time = np.arange(int(seconds * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    tones = sum(
        np.sin(2 * np.pi * hz * time) * np.exp(-(time - begin) / 0.1) * (time >= begin)
        for begin, hz in zip(ONSETS, (400, 2_000), strict=True)
    )
    return (0.5 * tones).astype(np.float32)


@pytest.mark.parametrize("seed", range(4))  # with and without a moving camera
def test_a_video_lights_up_with_its_recording(seed):
    frames = render_heard(np.random.default_rng(seed), recording())
    assert frames.shape == (4 * VIDEO_FPS, 64, 64, 3)
    change = np.abs(np.diff(frames.astype(float), axis=0)).mean(axis=(1, 2, 3))
    loud = change > 1.8 * np.median(change)
    begins = np.flatnonzero(np.diff(loud, prepend=False) & loud) + 1
    np.testing.assert_allclose(begins / VIDEO_FPS, ONSETS, atol=1 / VIDEO_FPS)


def test_silence_is_rendered_too():
    frames = render_heard(np.random.default_rng(0), np.zeros(SAMPLE_RATE_HZ, np.float32))
    assert frames.shape[0] == VIDEO_FPS


def test_versions_of_a_recording_differ_in_length_and_pitch():
    versions = [renewed(np.random.default_rng(seed), recording()) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(versions[0], versions[1])
    assert len(versions[0]) != len(versions[2])
    for version in versions:
        assert 0.8 <= len(version) / len(recording()) <= 1.4
        assert 0 < np.abs(version).max() < 1


@pytest.fixture(scope="module")
def esc(tmp_path_factory) -> Path:
    """One recording of each of ten classes, and one that may not be used."""
    folder = tmp_path_factory.mktemp("esc")
    (folder / "audio").mkdir()
    (folder / "meta").mkdir()
    rows = ["filename,fold,target,category,esc10,src_file,take"]
    names = [f"1-{n}-A-{n}" for n in range(10)]
    for number, name in enumerate([*names, "1-40730-A-1"]):
        rows.append(f"{name}.wav,1,{number % 10},c{number % 10},True,{name.split('-')[1]},A")
        with wave.open(str(folder / "audio" / f"{name}.wav"), "wb") as file:
            file.setparams((1, 2, SAMPLE_RATE_HZ, 0, "NONE", ""))
            file.writeframes((recording(2.0) * 2**15).astype(np.int16).tobytes())
    (folder / "meta" / "esc50.csv").write_text("\n".join(rows))
    return folder


def test_records_are_versions_of_recordings_and_rendered_videos(esc, tmp_path, capsys):
    command = ["small", str(esc), "--out", str(tmp_path / "a b"), "--rendered=1", "--workers=2"]
    assert main(command) == 0
    records = RecordDataset(str(tmp_path / "a b" / "records"), "train")
    ids = records.record_ids
    sources = {records[n].source_id for n in range(len(records))}
    assert len(ids) == 1 + 2 * 10
    assert "heard_1-40730-A-1_0" not in ids
    assert sources == {"foley_00000", *(f"heard_{n}" for n in range(10))}
    video = tmp_path / "a b" / "media" / "heard" / "1-3-A-3_1.mp4"
    before = video.read_bytes()
    video.unlink()
    assert main(command) == 0
    assert video.read_bytes() == before


def test_an_incomplete_collection_is_refused(esc, tmp_path, capsys):
    (tmp_path / "meta").symlink_to(esc / "meta")
    (tmp_path / "audio").mkdir()
    name = "1-3-A-3.wav"
    (tmp_path / "audio" / name).symlink_to(esc / "audio" / name)
    assert main(["small", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "lacks 10 of the recordings of ESC-10, first 1-0-A-0.wav" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
