"""Which records have a modality and the labels that are needed, and when clips may begin."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from avcl_jax.data.modality_records import LackingError, ModalityRecords, evenly_spaced
from avcl_jax.data.records import RecordDataset
from avcl_jax.data.selection import Selection
from avcl_jax.data.silence import is_silent, peak
from tests.evaluation.conftest import RATE, small_record, sound_record, write_records

NAMES = {"motion": ["down", "across"], "part": ["a", "b"]}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Sounds of 1, 0.5 and 1 s and a silent picture; `part` of r1 and r3 is unknown."""
    labels = [{"motion": 0, "part": 1}, {"motion": 1, "part": -1}]
    labels += [{"motion": 1, "part": 0}, {"motion": 0, "part": -1}]
    records = [
        sound_record(f"r{n}", f"s{n // 2}", n, 300, known, seconds=(1.0, 0.5, 1.0, 1.0)[n])
        for n, known in enumerate(labels)
    ]
    records[2] = dataclasses.replace(
        small_record("test", 0),
        record_id="r2",
        source_id="s1",
        waveform=np.empty(0, np.int16),
        sample_rate_hz=0,
        labels=labels[2],
    )
    directory = tmp_path_factory.mktemp("modality")
    write_records(directory, "toy", NAMES, {"all": records})
    return RecordDataset(directory, "all")


def test_silence_is_up_to_a_peak_of_33_of_either_sign():
    for samples, loudest in (
        ([], 0),
        ([0, 0], 0),
        ([5, 9], 9),
        ([-7, -3], 7),
        ([3, -32768], 32768),
    ):
        assert peak(np.array(samples, np.int16)) == loudest
    for sample, silent in ((33, True), (-33, True), (34, False), (-34, False)):
        assert is_silent(np.array([[0, sample]], np.int16)) is silent


def _records(dataset, *, select="", modality="audio", labels=(), leave_out=True, rate_hz=RATE):
    return ModalityRecords(
        dataset,
        Selection.parse(select),
        modality,
        sample_rate_hz=rate_hz,
        labels=labels,
        leave_out=leave_out,
    )


def test_what_lacks_modality_or_a_label_is_left_out_and_counted(dataset):
    heard = _records(dataset)
    assert (heard.record_ids, heard.left_out) == (["r0", "r1", "r3"], 1)
    assert heard.sources[0] == heard.sources[1] != heard.sources[2]
    np.testing.assert_array_equal(heard.classes_of("motion"), [0, 1, 0])
    known = _records(dataset, labels=["motion", "part"])
    assert (known.record_ids, known.left_out) == (["r0"], 3)
    assert known.fingerprint == heard.fingerprint == dataset.fingerprint
    chosen = _records(dataset, select="motion=across")
    assert (chosen.record_ids, chosen.left_out) == (["r1"], 1)
    assert chosen.fingerprint == f"{dataset.fingerprint} motion=across"


def test_starts_are_within_the_sound_and_at_its_beginning_where_it_is_too_short(dataset):
    heard = _records(dataset)
    assert [heard.seconds(n) for n in range(3)] == pytest.approx([1.0, 0.5, 1.0])
    assert heard.starts(0, 0.75) == pytest.approx((0.0, 0.25))
    assert heard.starts(1, 0.75) == (0.0, 0.0)


def test_pictures_and_sound_last_as_long_as_they_are_there(tmp_path):
    # Nine pictures at 10 Hz from 0.25 s, so the last stays until 1.15 s; sound from 0.5 to 1.5 s.
    film = dataclasses.replace(
        small_record("test", 0),
        record_id="late",
        frames=small_record("test", 0).frames[:9],
        frame_seconds=0.25 + np.arange(9) / 10,
        waveform=sound_record("late", "s", 0, 300, {}).waveform,
        audio_start_seconds=0.5,
        duration_seconds=2.0,
        labels={},
    )
    # The container of this one ends before its last picture would.
    cut = dataclasses.replace(film, record_id="cut", duration_seconds=1.1)
    write_records(tmp_path, "toy", {}, {"all": [film, cut]})
    dataset = RecordDataset(tmp_path, "all")
    seen = _records(dataset, modality="video", rate_hz=None)
    assert [seen.seconds(n) for n in range(2)] == pytest.approx([0.9, 0.85])
    assert seen.starts(0, 0.5) == pytest.approx((0.25, 0.65))
    heard = _records(dataset)
    assert heard.seconds(0) == pytest.approx(1.0)
    assert heard.starts(0, 0.75) == pytest.approx((0.5, 0.75))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"leave_out": False},
            "1 of the 4 records .* have no audio, or only silence, first 'r2': set data.leave",
        ),
        (
            {"modality": "video", "select": "motion=down"},
            "2 of the 2 records .* have no video, first 'r0'$",
        ),
        (
            {"labels": ["part"], "select": "motion=across"},
            "no record of .* with motion=across has audio and known part",
        ),
        ({"labels": ["colour"]}, r"has the labels motion, part of one class .* 'colour'"),
        ({"rate_hz": 8000}, f"have sound at {RATE} Hz, the encoder takes 8000 Hz"),
    ],
)
def test_what_is_missing_is_named(dataset, settings, message):
    with pytest.raises(LackingError, match=message) as caught:
        _records(dataset, **settings)
    assert "\n" not in str(caught.value)


def test_times_are_evenly_spaced_and_a_single_one_is_in_the_middle():
    assert evenly_spaced(1.0, 3.0, 3) == [1.0, 2.0, 3.0]
    assert evenly_spaced(1.0, 3.0, 1) == [2.0]
    assert evenly_spaced(1.0, 1.0, 2) == [1.0, 1.0]
