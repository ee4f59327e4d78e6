"""Choice of records: by label, by modality, by the views that fit on them."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from avcl_jax import experiment
from avcl_jax.configs import pretrain
from avcl_jax.data import selection
from avcl_jax.data.clips import AudioClipSpec, ClipRecords, VideoClipSpec
from avcl_jax.data.record_format import is_silent, peak
from avcl_jax.data.records import RecordDataset
from avcl_jax.data.render_spec import CropSpec
from avcl_jax.data.selection import Selection, SelectionError, UsableRecords, single_classes
from avcl_jax.data.spectrogram import LogMelSpec
from avcl_jax.data.views import Timeline, ViewSpec
from tests.data.synthetic_records import make_record, write_records
from tests.evaluation.conftest import RATE, small_record, sound_record
from tests.evaluation.conftest import write_records as write_splits


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    made = [make_record(number, seconds=7.0, side=16, fps=16.0) for number in range(12)]
    made[3] = dataclasses.replace(made[3], labels={"motion": -1, "material": 0})
    made.append(make_record(12, seconds=0.3, side=16))  # too short for any view
    return RecordDataset(write_records(tmp_path_factory.mktemp("selection") / "r", made), "train")


def expected(records, keep):
    """Positions by reading every record."""
    names = records.class_names["motion"]
    motions = [records[i].labels["motion"] for i in range(len(records))]
    return [i for i, m in enumerate(motions) if m >= 0 and keep(names[m])]


@pytest.mark.parametrize(
    ("text", "keep"),
    [
        ("motion=b", lambda name: name == "b"),
        ("motion=b|d", lambda name: name in "bd"),
        ("motion!=b", lambda name: name != "b"),
        (" motion = b | d ", lambda name: name in "bd"),
    ],
)
def test_positions_are_those_whose_record_has_the_class(records, text, keep):
    found = Selection.parse(text).positions(records)
    assert found.tolist() == expected(records, keep)
    assert 0 < len(found) < len(records)


def test_conditions_are_joined_and_none_is_everything(records):
    both = Selection.parse("motion!=a;material=a|b").positions(records)
    assert set(both) == set(Selection.parse("motion!=a").positions(records)) & set(
        Selection.parse("material=a|b").positions(records)
    )
    np.testing.assert_array_equal(Selection.parse("").positions(records), np.arange(13))


def test_a_selection_reads_what_it_writes():
    selection = Selection.parse("split1=train;fold!=2|3")
    assert str(selection) == "split1=train;fold!=2|3"
    assert Selection.parse(str(selection)) == selection


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("motion", "'motion' selects nothing: write LABEL=VALUE"),
        ("motion=", "'motion=' selects nothing"),
        ("motion=a||b", "'motion=a||b' selects nothing"),
        ("split1=train", "material, motion of one class per record, not 'split1': choose"),
        ("motion=z", "has no class 'z', it has a, b, c, d, e"),
        ("motion=a;material=a;motion=b", "has motion=a;material=a;motion=b"),
    ],
)
def test_mistakes_are_one_clear_error(records, text, message):
    with pytest.raises(SelectionError, match=re.escape(message)) as caught:
        Selection.parse(text).positions(records)
    assert "\n" not in str(caught.value)


def test_records_without_labels_are_said_to_have_none(records, monkeypatch):
    monkeypatch.setattr(records, "labels", {})
    with pytest.raises(SelectionError, match="has no label of one class per record, not 'a'"):
        single_classes(records, "a")


def test_usable_records_of_a_selection_are_the_same_records(records):
    spec = experiment.render_spec(pretrain.get_config())
    everything = UsableRecords(records, spec)
    some = UsableRecords(records, spec, Selection.parse("motion=c"))
    assert some.indices.tolist() == [
        i for i in everything.indices if i in expected(records, lambda name: name == "c")
    ]
    assert (some.num_too_short, everything.num_too_short) == (1, 1)
    assert some.fingerprint != everything.fingerprint
    for position, index in enumerate(some.indices.tolist()):
        found, record, use = some[position]
        assert (found, record.record_id) == (index, records.record_ids[index])
        assert [use] == everything.usable([everything.indices.tolist().index(index)])


@pytest.mark.parametrize("block", [4, selection._BLOCK])
def test_the_usable_part_is_what_video_and_audio_share_or_else_one_of_them(
    tmp_path, monkeypatch, block
):
    monkeypatch.setattr(selection, "_BLOCK", block)
    film = make_record(0, seconds=4.0, side=16)  # 64 frames, the last of which stays until 4 s
    made = [
        film,
        dataclasses.replace(film, waveform=film.waveform[:32_000], audio_start_seconds=1.0),
        # They share less than a view.
        dataclasses.replace(film, audio_start_seconds=3.75, duration_seconds=7.75),
        # One frame does not move, silence cannot be told from another.
        dataclasses.replace(film, frames=film.frames[:1], frame_seconds=film.frame_seconds[:1]),
        dataclasses.replace(film, waveform=np.full(64_000, 33, np.int16)),
        dataclasses.replace(film, waveform=np.full(64_000, 34, np.int16)),
        make_record(1, seconds=4.0, side=16, fps=1.0),  # frames that repeat would tell the speed
    ]
    silent = np.zeros(64_000, np.int16)
    made += [dataclasses.replace(record, waveform=silent) for record in (made[3], made[6])]
    dataset = RecordDataset(write_records(tmp_path / "r", made, shards=1), "train")
    views = ViewSpec(num_frames=8, clip_seconds=0.5, speeds=(1, 2), audio_transform="shared")
    spec = dataclasses.replace(experiment.render_spec(pretrain.get_config()), views=views)
    assert list(map(dataclasses.astuple, UsableRecords(dataset, spec).usable(range(7)))) == [
        (0.0, 4.0, 1 / 16, True, True),
        (1.0, 3.0, 1 / 16, True, True),
        (0.0, 4.0, 1 / 16, True, False),
        (0.0, 4.0, 0.0, False, True),
        (0.0, 4.0, 1 / 16, True, False),
        (0.0, 4.0, 1 / 16, True, True),
        (0.0, 4.0, 0.0, False, True),
    ]
    heard = UsableRecords(dataset, dataclasses.replace(spec, modalities="audio"))
    assert heard.usable([1]) == [Timeline(1.0, 3.0, 0.0, False, True)]
    assert (heard.num_empty, heard.num_without("video"), heard.num_without("audio")) == (3, 6, 0)
    both = UsableRecords(dataset, spec)
    assert both.lacking(("video", "audio")).tolist() == [2, 3, 4, 6, 7, 8]
    # A single silent frame is nothing; slow frames are video, but fit no view.
    assert (both.num_selected, both.num_empty, both.num_too_short) == (9, 1, 1)
    quiet = RecordDataset(write_records(tmp_path / "quiet", made[7:], shards=1), "train")
    with pytest.raises(SelectionError, match=r"none .* has audio that is not silent: set modal"):
        UsableRecords(quiet, dataclasses.replace(spec, modalities="audio"))
    with pytest.raises(SelectionError, match=r"none .* is long enough for a view of 0\.5 s"):
        UsableRecords(quiet, dataclasses.replace(spec, modalities="video"))


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
    write_splits(directory, "toy", NAMES, {"all": records})
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
    spec = {
        "audio": AudioClipSpec(LogMelSpec(rate_hz, 10, 8, 0.5, 60.0, rate_hz / 2, 1e-6, 0.0, 1.0)),
        "video": VideoClipSpec(ViewSpec(5, 0.5, (1,), "shared"), CropSpec(16, 1.0, False, False)),
    }[modality]
    return ClipRecords(dataset, Selection.parse(select), spec, labels, leave_out)


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
    write_splits(tmp_path, "toy", {}, {"all": [film, cut]})
    dataset = RecordDataset(tmp_path, "all")
    seen = _records(dataset, modality="video")
    assert seen.interval(0) == pytest.approx((0.25, 1.15))
    assert seen.interval(1) == pytest.approx((0.25, 1.1))
    assert _records(dataset).interval(0) == pytest.approx((0.5, 1.5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"leave_out": False},
            "1 of the 4 records .* have no audio, or only silence, first 'r2': set leave_",
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
        ({"rate_hz": 8000}, f"have audio at {RATE} Hz, the spectrogram is defined at 8000 Hz"),
    ],
)
def test_what_is_missing_is_named(dataset, settings, message):
    with pytest.raises(SelectionError, match=message) as caught:
        _records(dataset, **settings)
    assert "\n" not in str(caught.value)
