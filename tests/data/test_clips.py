"""Clips of selected records: which times and crops, and what happens at the ends."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
import pytest
import simplejpeg

from avcl_jax.data.clips import AudioClipSpec, ClipRecords, RandomClips, VideoClipSpec
from avcl_jax.data.images import Crop, crops_along
from avcl_jax.data.pipeline import drawn_batches
from avcl_jax.data.records import RecordDataset
from avcl_jax.data.render_spec import CropSpec
from avcl_jax.data.selection import Selection
from avcl_jax.data.spectrogram import LogMelSpec
from avcl_jax.data.views import FORWARD, Clip, ViewSpec
from tests.data.synthetic_records import make_record, write_records

FPS, COUNT = 10.0, 30
VIDEO = VideoClipSpec(ViewSpec(5, 0.5, (1,), "shared"), CropSpec(16, 0.3, True, False))
MEL = LogMelSpec(16_000, 10, 8, 0.5, 60.0, 7_600.0, 1e-6, 0.0, 1.0)
AUDIO = AudioClipSpec(MEL)


def counting_record(number: int, frames: int):
    """A record whose pictures get lighter by 8 from one to the next, and whose sound is a ramp."""
    record = make_record(number, seconds=1.0, fps=FPS, side=16)
    pictures = [np.full((16, 16, 3), 8 * n, np.uint8) for n in range(frames)]
    samples = round(frames / FPS * 16_000)
    return dataclasses.replace(
        record,
        frames=[simplejpeg.encode_jpeg(picture, quality=100) for picture in pictures],
        frame_seconds=np.arange(frames) / FPS,
        waveform=np.arange(1, samples + 1).astype(np.int16),
        duration_seconds=frames / FPS,
    )


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    made = [counting_record(0, COUNT), counting_record(1, 3)]
    return RecordDataset(write_records(tmp_path_factory.mktemp("l") / "r", made, shards=1), "train")


def clips_of(records, spec) -> ClipRecords:
    return ClipRecords(records, Selection(), spec, ("motion",))


def shown(clips: np.ndarray) -> list[list[int]]:
    """Number of the picture in every place of every clip."""
    return np.round(clips.mean(axis=(2, 3, 4)) / 8).astype(int).tolist()


def test_fixed_clips_lie_at_equal_distances_from_the_first_to_the_last(records):
    clips = clips_of(records, VIDEO).fixed(0, clips=6, crops=1)
    assert shown(clips) == [[n, n + 1, n + 2, n + 3, n + 4] for n in (0, 5, 10, 15, 20, 25)]
    (middle,) = clips_of(records, VIDEO).fixed(0, clips=1, crops=1)
    assert shown(middle[None])[0][0] in (12, 13)


def test_the_last_picture_of_a_short_record_stays(records):
    clips = clips_of(records, VIDEO).fixed(1, clips=2, crops=1)
    assert shown(clips) == [[0, 1, 2, 2, 2]] * 2


def test_sound_lies_where_the_pictures_do_and_silence_follows(records):
    source = clips_of(records, AUDIO)
    clips = source.fixed(0, clips=6, crops=1)
    assert clips.shape == (6, 10, 800)
    assert clips.reshape(6, -1)[:, 0].tolist() == [
        np.int16(n * 8000 + 1).item() for n in range(4)
    ] + [np.int64(n * 8000 + 1).astype(np.int16).item() for n in (4, 5)]
    short = source.fixed(1, clips=1, crops=1).ravel()
    np.testing.assert_array_equal(short, [*range(1, 4801), *[0] * 3200])


def test_crops_stand_along_the_longer_side():
    assert crops_along(16, 40, 1) == [Crop(0, 12, 16, False)]
    assert crops_along(16, 40, 3) == [Crop(0, left, 16, False) for left in (0, 12, 24)]
    assert crops_along(40, 16, 3) == [Crop(top, 0, 16, False) for top in (0, 12, 24)]


def test_ten_times_three_crops_are_clip_by_clip(records):
    clips = clips_of(records, VIDEO).fixed(0, clips=2, crops=3)
    assert [row[0] for row in shown(clips)] == [0, 0, 0, 25, 25, 25]


def batches(records, seed, first_step=0, workers=0):
    source = clips_of(records, VIDEO)
    return iter(
        drawn_batches(
            RandomClips(source, "motion"),
            seed=seed,
            global_batch_size=2,
            first_step=first_step,
            workers=workers,
            threads=1,
        )
    )


def test_random_clips_are_a_function_of_seed_and_step(records):
    first, again, other = batches(records, 0), batches(records, 0), batches(records, 1)
    whole = [next(first) for _ in range(6)]
    for batch in whole:
        found = next(again)
        for name in batch:
            np.testing.assert_array_equal(batch[name], found[name])
    assert any((a["clips"] != next(other)["clips"]).any() for a in whole)
    resumed = next(batches(records, 0, first_step=4))
    np.testing.assert_array_equal(resumed["clips"], whole[4]["clips"])
    starts = {shown(b["clips"])[int(np.argmin(b["record_index"]))][0] for b in whole}
    assert len(starts) > 2
    assert all(0 <= start <= COUNT - 5 for start in starts)
    labels = {
        int(i): int(c) for b in whole for i, c in zip(b["record_index"], b["label"], strict=True)
    }
    assert labels == {0: 0, 1: 1}


def test_a_crop_is_the_same_in_all_pictures_of_a_clip():
    still = make_record(0, seconds=3.0, fps=FPS, side=32)
    still = dataclasses.replace(still, frames=[still.frames[0]] * len(still.frames))
    rng = np.random.default_rng(0)
    clips = np.empty((4, *VIDEO.shape), np.uint8)
    for clip in clips:
        VIDEO.random(still, Clip(0.0, 0, FORWARD), rng, clip)
        assert (clip == clip[:1]).all()
    small = [cv2.resize(clip[0], (4, 4)).astype(int) for clip in clips]
    assert any(np.abs(small[0] - other).max() > 5 for other in small[1:])
