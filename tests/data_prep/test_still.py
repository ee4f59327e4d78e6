"""Still pictures under sound: found at preparation, counted, and not asked what moves."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from avcl_jax.data.encode import write_mp4
from avcl_jax.data.pipeline import train_batches
from avcl_jax.data.record_format import message_class, parse_record, serialize_record
from avcl_jax.data.records import RecordDataset
from avcl_jax.data.selection import UsableRecords
from avcl_jax.data_prep.__main__ import main
from avcl_jax.data_prep.clip import is_still
from tests.data.synthetic_media import click_waveform
from tests.data.test_records import assert_same, make_record
from tests.data.test_synchrony import SPEC

FRAMES, HEIGHT, WIDTH = 75, 96, 128  # 3 s


def photo(seed: int) -> np.ndarray:
    """Texture of all scales, as a photograph has it."""
    rng = np.random.default_rng(seed)
    image = np.zeros((HEIGHT, WIDTH, 3))
    for cells in (2, 4, 8, 16, 32):
        block = rng.normal(0, 60 / cells**0.5, (cells, cells, 3))
        image += np.kron(block, np.ones((HEIGHT // cells, WIDTH // cells, 1)))
    return np.clip(image + 120, 0, 255).astype(np.uint8)


def ball(number: int) -> np.ndarray:
    """A grey disc of 11 pixels that moves by three quarters of a pixel a frame."""
    image = photo(0)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    image[(y - 48) ** 2 + (x - 20 - 0.75 * number) ** 2 < 30] = 110
    return image


def noisy(number: int) -> np.ndarray:
    noise = np.random.default_rng(number).normal(0, 4, (HEIGHT, WIDTH, 3))
    return np.clip(photo(1) + noise, 0, 255).astype(np.uint8)


# Frame by number, and options of H.264.
VIDEOS = {
    "still": (lambda _: photo(0), {"crf": "23"}),
    "poor": (lambda _: photo(2), {"crf": "28", "g": "12"}),
    "grain": (noisy, {"crf": "28", "g": "25"}),
    "black": (lambda _: np.zeros((HEIGHT, WIDTH, 3), np.uint8), {"crf": "23"}),
    "slideshow": (lambda number: photo(number // 25), {"crf": "23"}),
    "ball": (ball, {"crf": "28"}),
}
STILL = {"still", "poor", "grain", "black"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stills")
    for name, (image, options) in VIDEOS.items():
        write_mp4(
            folder / f"{name}.mp4",
            ((number / 25, image(number)) for number in range(FRAMES)),
            click_waveform(3.0)[0],
            fps=25,
            sample_rate_hz=48_000,
            audio_bits_per_second=128_000,
            video_options={"preset": "veryfast"} | options,
        )
    return folder


def test_stills_are_noted_counted_and_masked(folder, tmp_path, capsys):
    out = tmp_path / "records"
    assert main(["prepare", str(folder), f"--out={out}", "--workers=1"]) == 0
    assert "4 prepared, but still: nothing moves in the video" in capsys.readouterr().out
    records = RecordDataset(out, "train")
    assert {Path(record.record_id).stem for record in records if record.is_still} == STILL
    lines = [json.loads(line) for line in (out / "sources.jsonl").read_text().splitlines()]
    noted = {
        Path(line["path"]).stem for line in lines if [n[1] for n in line["notes"]] == ["still"]
    }
    assert noted == STILL
    assert main(["inspect", str(out)]) == 0
    assert "note       4 still: nothing moves in the video" in capsys.readouterr().out
    # A still picture has no speed, direction or order, but everything else.
    batch = next(
        iter(train_batches(UsableRecords(records, SPEC), SPEC, seed=0, global_batch_size=6))
    )
    names = [Path(records.record_ids[i]).stem for i in batch["record_index"]]
    assert {n for n, moves in zip(names, batch["video_moves"], strict=True) if not moves} == STILL
    for mask in ("has_video", "has_audio", "direction_mask"):
        assert batch[mask].all()


def test_records_of_earlier_releases_lack_the_feature() -> None:
    record = dataclasses.replace(make_record(0), is_still=True)
    payload = serialize_record(record)
    assert parse_record(payload, {}, (), where="here").is_still
    example = message_class("Example").FromString(payload)
    del example.features.feature["is_still"]
    older = parse_record(example.SerializeToString(), {}, (), where="here")
    assert_same(older, dataclasses.replace(record, is_still=False))


def test_what_is_too_short_to_judge_is_not_still() -> None:
    frame = simplejpeg.encode_jpeg(photo(0))
    assert is_still([frame] * 3, 0.5)
    assert not is_still([frame] * 3, 0.4)
    assert is_still([frame], 3.0)


def test_a_mouth_that_speaks_in_a_still_picture_moves() -> None:
    frames = []
    for height in (4, 8, 14, 8):
        image = np.kron(photo(1), np.ones((4, 4, 1), np.uint8))
        image[220 - height // 2 : 220 + height // 2, 306:334] = (60, 20, 20)
        frames.append(simplejpeg.encode_jpeg(image, quality=90))
    assert not is_still(frames, 3.0)
    assert is_still(frames[1::2], 3.0)
