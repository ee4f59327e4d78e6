"""Record files that TensorFlow wrote (testdata/make_with_tensorflow.py), read without it."""

from __future__ import annotations

import dataclasses
import gzip
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
from etils import epath

from avcl_jax.data import record_files
from avcl_jax.data.record_format import Record, message_class
from avcl_jax.data.records import RecordDataset
from avcl_jax.data_prep.__main__ import main
from avcl_jax.data_prep.footage import Samples, mix_to_mono
from tests.data_prep.conftest import listed, only_error

DATA = Path(__file__).parent / "testdata"
RATE, FRAMES, TIMES = 2000, 5, [0.0, 0.1, 0.2, 0.3, 0.4]
DMVR = "dmvr.tfrecord-00000-of-00001"


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    with np.load(DATA / "expected.npz") as stored:
        return dict(stored)


def jpegs(expected: dict[str, np.ndarray], number: int) -> list[bytes]:
    return [expected[f"jpeg_{number}_{frame}"].tobytes() for frame in range(FRAMES)]


def run(out: Path, *arguments: str | Path, rate: int = RATE) -> int:
    more = (f"--out={out}", "--workers=1", f"--sample-rate={rate}")
    return main([*map(str, arguments), *more])


def error(capsys: pytest.CaptureFixture[str], out: Path, *arguments: str | Path) -> str:
    """Returns the one line that a failing command prints."""
    capsys.readouterr()
    assert run(out, *arguments) == 1
    return only_error(capsys)


def rejected(out: Path) -> dict[str, tuple[str, str]]:
    return {line["id"]: (line["reason"], line["message"]) for line in listed(out)}


def only_record(out: Path) -> Record:
    dataset = RecordDataset(out, "train")
    assert len(dataset) == 1
    return dataset[0]


@pytest.mark.parametrize("directory", ["tiny", "tiny_array_record"])
def test_tfds_comes_out_as_it_went_in(tmp_path, expected, directory):
    assert run(tmp_path, "tfds", DATA / directory, "--fps=10", "--id-feature=name") == 0
    dataset = RecordDataset(tmp_path, "train")
    assert sorted(dataset.record_ids) == ["clip 0", "clip 1", "clip 2"]
    assert dataset.class_names == {"action": ["fall", "roll", "spin"], "heard": ["bell", "wind"]}
    assert dataset.multilabel == {"heard"}
    for record in (dataset[n] for n in range(3)):
        number = int(record.record_id.split()[1])
        assert list(record.frames) == jpegs(expected, number)
        np.testing.assert_array_equal(record.frame_seconds, TIMES)
        np.testing.assert_array_equal(record.waveform, expected[f"samples_{number}"])
        assert (record.sample_rate_hz, record.audio_start_seconds) == (RATE, 0.0)
        assert record.duration_seconds == 0.5
        assert (record.height, record.width) == (24, 32)
        assert record.labels == {"action": number % 3, "heard": [(), (0,), (0, 1)][number]}
    if directory == "tiny":
        test = RecordDataset(tmp_path, "test")
        assert list(test.record_ids) == ["clip 3"]
        assert test[0].labels == {"action": 0, "heard": (1,)}


@pytest.mark.parametrize("feature", ["png", "images", "pixels", "packed"])
def test_every_way_to_keep_a_video(tmp_path, expected, feature):
    arguments = ("--fps=10", f"--video-feature={feature}", "--audio-feature=none", "--quality=95")
    assert run(tmp_path, "tfds", DATA / "variants", *arguments) == 0
    record = only_record(tmp_path)
    if feature == "images":
        assert list(record.frames) == jpegs(expected, 0)
    else:
        wanted = [
            simplejpeg.encode_jpeg(frame, quality=95, colorspace="RGB", colorsubsampling="420")
            for frame in expected["pixels"]
        ]
        assert list(record.frames) == wanted
    assert not record.has_audio
    assert record.duration_seconds == 0.5


@pytest.mark.parametrize(
    ("feature", "more"),
    [
        ("wav", ()),
        ("int16", ("--sample-rate-of-source=2000",)),
        ("listed", ("--sample-rate-of-source=2000",)),
        ("nested/stereo", ("--sample-rate-of-source=2000",)),
    ],
)
def test_every_way_to_keep_a_sound(tmp_path, expected, feature, more):
    arguments = ("--video-feature=none", f"--audio-feature={feature}", *more)
    assert run(tmp_path, "tfds", DATA / "variants", *arguments) == 0
    record = only_record(tmp_path)
    wanted = expected["samples_0"].astype(np.float64)
    # The second channel of nested/stereo is minus one half of the first: they cancel.
    np.testing.assert_array_equal(record.waveform, wanted)
    assert not record.has_video


def test_other_rates_are_resampled_in_time(tmp_path: Path, expected: dict[str, np.ndarray]) -> None:
    arguments = ("tfds", DATA / "tiny", "--fps=10", "--split=test")
    assert run(tmp_path, *arguments, rate=8000) == 0
    record = RecordDataset(tmp_path, "test")[0]
    assert abs(len(record.waveform) - 4 * len(expected["samples_3"])) <= 8
    middle = slice(200, 800)  # the filter's ends apart
    np.testing.assert_allclose(record.waveform[::4][middle], expected["samples_3"][middle], atol=60)


def test_what_cannot_be_told_is_asked_for(tmp_path, capsys):
    tiny, variants = DATA / "tiny", DATA / "variants"
    assert "'clip': say --fps" in error(capsys, tmp_path, "tfds", tiny)
    message = error(capsys, tmp_path, "tfds", tiny, "--fps=10", "--id-feature=nme")
    assert "--id-feature=nme: there is no such feature; candidates: name (Text)" in message
    message = error(capsys, tmp_path, "tfds", tiny, "--fps=10", "--video-feature=sound")
    assert "is a Audio; candidates: clip (Video)" in message
    message = error(
        capsys, tmp_path, "tfds", variants, "--video-feature=none", "--audio-feature=int16"
    )
    assert "'int16' does not state its sample rate: say --sample-rate-of-source" in message
    message = error(capsys, tmp_path, "tfds", tiny, "--fps=10", "--split=valid")
    assert "no split 'valid', it has test, train" in message
    for option in ("--fps=nan", "--sample-rate-of-source=0", "--full-scale=inf"):
        with pytest.raises(SystemExit, match="2"):
            run(tmp_path, "tfds", tiny, option)
    assert "is not a data set of TFDS" in error(capsys, tmp_path, "tfds", DATA)


def edited(tmp_path: Path, source: str, edit: object) -> Path:
    """Returns a copy of a data set whose features.json was changed."""
    copy = tmp_path / "edited"
    shutil.copytree(DATA / source, copy)
    features = json.loads((copy / "features.json").read_text())
    edit(features["featuresDict"]["features"])
    (copy / "features.json").write_text(json.dumps(features))
    return copy


def test_several_features_that_can_be_it_are_listed(tmp_path, capsys):
    def edit(features: dict[str, object]) -> None:
        del features["png"], features["wav"]

    copy = edited(tmp_path, "variants", edit)
    message = error(capsys, tmp_path / "out", "tfds", copy, "--fps=10")
    for name in ("images (Sequence(Image))", "pixels (Tensor uint8", "packed (Tensor uint8"):
        assert name in message
    assert "choose by --video-feature=NAME" in message
    message = error(capsys, tmp_path / "out", "tfds", copy, "--video-feature=none")
    assert "int16 (" in message
    assert "nested/stereo (" in message
    assert "embedding" not in message


def test_integers_and_text_as_labels(tmp_path: Path) -> None:
    arguments = ("--fps=10", "--label=grade", "--audio-feature=none")
    assert run(tmp_path / "a", "tfds", DATA / "variants", *arguments) == 0
    assert RecordDataset(tmp_path / "a", "train").class_names == {"grade": ["0", "1", "2"]}
    assert only_record(tmp_path / "a").labels == {"grade": 2}
    assert run(tmp_path / "b", "tfds", DATA / "tiny", "--fps=10", "--label=name") == 0
    dataset = RecordDataset(tmp_path / "b", "train")
    assert dataset.class_names == {"name": [f"clip {n}" for n in range(4)]}
    assert sorted(dataset.labels["name"].tolist()) == [0, 1, 2]


def test_media_sequence_keeps_its_times(tmp_path: Path, expected: dict[str, np.ndarray]) -> None:
    source = DATA / "media_sequence.tfrecord"
    assert run(tmp_path, "sequence-examples", source, "--id-feature=example/id") == 0
    dataset = RecordDataset(tmp_path, "train")
    assert list(dataset.record_ids) == ["first", "second"]
    assert dataset.source_numbers.tolist() == [0, 0]
    assert dataset[0].source_id == "film"
    assert dataset.class_names == {"class": ["fall", "1", "spin"]}
    assert [dataset[n].labels["class"] for n in range(2)] == [(2,), (0, 2)]
    for number in range(2):
        record = dataset[number]
        assert list(record.frames) == jpegs(expected, number)
        # At 5.0, 5.1, 5.15, 5.3 and 5.4 s of the film.
        np.testing.assert_allclose(record.frame_seconds, [0.0, 0.1, 0.15, 0.3, 0.4], atol=1e-9)
        assert record.audio_start_seconds == 0.0
        assert len(record.waveform) == 1000
    np.testing.assert_array_equal(dataset[0].waveform, expected["samples_0"])
    # Two channels in four packets with times, x and -x/2, which cancel: the first is heard.
    assert np.abs(dataset[1].waveform - expected["samples_1"]).max() <= 0.51


def test_dmvr_is_asked_for_its_rates(tmp_path, expected, capsys):
    message = error(capsys, tmp_path, "sequence-examples", DATA / DMVR)
    assert "example 0: states neither times nor rates: say --fps and --sample-rate-of-" in message
    rates = ("--fps=10", "--sample-rate-of-source=2000")
    assert run(tmp_path, "sequence-examples", f"test={DATA / DMVR}", *rates) == 0
    dataset = RecordDataset(tmp_path, "test")
    assert list(dataset.record_ids) == [f"{DMVR}#{number}" for number in range(3)]
    assert dataset.class_names == {"class": ["fall", "roll"]}
    assert dataset.labels["class"].tolist() == [0, 1, 0]
    assert dataset.source_numbers.tolist() == [0, 0, 0]
    for number in range(3):
        assert list(dataset[number].frames) == jpegs(expected, number)
        np.testing.assert_array_equal(dataset[number].frame_seconds, TIMES)
        np.testing.assert_array_equal(dataset[number].waveform, expected[f"samples_{number}"])


def test_integers_read_as_floats_are_refused(tmp_path: Path) -> None:
    source = DATA / "dmvr_s32le.tfrecord-00000-of-00001"
    rates = ("--fps=10", "--sample-rate-of-source=2000")
    assert run(tmp_path, "sequence-examples", source, *rates) == 3
    ((name, (reason, message)),) = rejected(tmp_path).items()
    assert name == f"{source.name}#1"
    assert reason == "bad_samples"
    assert "s32le" in message
    assert "generate_from_file.py" in message
    assert only_record(tmp_path).record_id == f"{source.name}#0"


def sequence(expected: dict[str, np.ndarray], **floats: object) -> object:
    example = message_class("SequenceExample")()
    lists = example.feature_lists.feature_list
    for frame in jpegs(expected, 0):
        lists["image/encoded"].feature.add().bytes_list.value.append(frame)
    for value in floats.values():
        lists["WAVEFORM/feature/floats"].feature.add().float_list.value.extend(value)
    return example


def write(path: Path, *examples: object) -> Path:
    path.write_bytes(b"".join(record_files.frame_payload(e.SerializeToString()) for e in examples))
    return path


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([np.nan, 0.0, 0.1], "not numbers"),
        ([np.inf, 0.0, 0.1], "not numbers"),
        ([1e-40, 0.0, 2e-41], "s32le"),
        ([12000.0, -3.0], "12000 where 1 is full scale: say --full-scale"),
    ],
)
def test_absurd_samples(tmp_path, expected, values, words):
    path = write(
        tmp_path / "a.tfrecord", sequence(expected, a=[0.1, -0.2]), sequence(expected, a=values)
    )
    rates = ("--fps=10", "--sample-rate-of-source=2000")
    assert run(tmp_path / "out", "sequence-examples", path, *rates) == 3
    reason, message = rejected(tmp_path / "out")["a.tfrecord#1"]
    assert reason == "bad_samples"
    assert words in message


def test_examples_can_be_cut(tmp_path: Path, expected: dict[str, np.ndarray]) -> None:
    options = ("--cut=0.2", "--min-seconds=0.1")
    assert run(tmp_path, "tfds", DATA / "tiny", "--fps=10", "--id-feature=name", *options) == 0
    dataset = RecordDataset(tmp_path, "train")
    pieces = {dataset[n].record_id: dataset[n] for n in range(len(dataset))}
    assert sorted(pieces) == [f"clip {n}#{part}" for n in range(3) for part in ("0-0.2", "0.2-0.4")]
    for number in range(3):
        second = pieces[f"clip {number}#0.2-0.4"]
        assert list(second.frames) == jpegs(expected, number)[2:4]
        np.testing.assert_array_equal(second.waveform, expected[f"samples_{number}"][400:800])
        assert second.source_id == pieces[f"clip {number}#0-0.2"].source_id


def test_full_scale_of_samples(tmp_path: Path, expected: dict[str, np.ndarray]) -> None:
    path = write(tmp_path / "a.tfrecord", sequence(expected, a=[12000.0, -3000.0, 0.0, 7.0]))
    options = ("--fps=10", "--sample-rate-of-source=2000", "--full-scale=32768")
    assert run(tmp_path / "out", "sequence-examples", path, *options) == 0
    assert only_record(tmp_path / "out").waveform.tolist() == [12000, -3000, 0, 7]


def test_frames_that_are_too_large_or_not_jpeg_are_encoded_again(tmp_path, expected):
    example = sequence(expected)
    steps = example.feature_lists.feature_list["image/encoded"].feature
    picture = expected["pixels"][0]
    _, png = cv2.imencode(".png", picture[:, :, ::-1])
    steps[1].bytes_list.value[0] = png.tobytes()
    path = write(tmp_path / "a.tfrecord", example)
    assert run(tmp_path / "same", "sequence-examples", path, "--fps=10") == 0
    frames = only_record(tmp_path / "same").frames
    assert list(frames[2:]) == jpegs(expected, 0)[2:]
    assert frames[1].startswith(b"\xff\xd8\xff")
    assert np.abs(simplejpeg.decode_jpeg(frames[1]).astype(int) - picture).mean() < 3
    half = tmp_path / "half"
    assert run(half, "sequence-examples", path, "--fps=10", "--short-side=12", "--min-side=8") == 0
    record = only_record(half)
    assert (record.height, record.width) == (12, 16)
    small = cv2.resize(picture, (16, 12), interpolation=cv2.INTER_AREA)
    assert np.abs(simplejpeg.decode_jpeg(record.frames[0]).astype(int) - small).mean() < 4


def test_frames_are_dropped_to_a_rate(tmp_path: Path, expected: dict[str, np.ndarray]) -> None:
    assert run(tmp_path, "tfds", DATA / "tiny", "--fps=10", "--split=test", "--max-fps=5") == 0
    record = RecordDataset(tmp_path, "test")[0]
    assert list(record.frames) == jpegs(expected, 3)[::2]
    np.testing.assert_allclose(record.frame_seconds, [0, 0.2, 0.4])


def spoiled(expected: dict[str, np.ndarray]) -> dict[str, object]:
    """Examples that each lack something, by the reason for which they are refused."""
    short = sequence(expected)
    short.feature_lists.feature_list["image/encoded"].feature[2].bytes_list.value[0] = jpegs(
        expected, 0
    )[2][:-40]
    sizes = sequence(expected)
    small = simplejpeg.encode_jpeg(np.zeros((20, 20, 3), np.uint8))
    sizes.feature_lists.feature_list["image/encoded"].feature[3].bytes_list.value[0] = small
    back = sequence(expected)
    for time in (0, 2, 1, 3, 4):
        stamps = back.feature_lists.feature_list["image/timestamp"].feature
        stamps.add().int64_list.value.append(time * 100_000)
    kind = sequence(expected)
    kind.feature_lists.feature_list["image/encoded"].feature[1].int64_list.value.append(3)
    return {
        "damaged": short,
        "mixed_sizes": sizes,
        "bad_timestamps": back,
        "bad_example": kind,
        "empty": message_class("SequenceExample")(),
    }


def test_each_example_is_refused_for_its_own_reason(tmp_path, expected):
    examples = spoiled(expected)
    path = write(tmp_path / "a.tfrecord", *examples.values(), sequence(expected))
    assert run(tmp_path / "out", "sequence-examples", path, "--fps=10") == 3
    found = {name: reason for name, (reason, _) in rejected(tmp_path / "out").items()}
    assert found == {f"a.tfrecord#{n}": reason for n, reason in enumerate(examples)}
    assert only_record(tmp_path / "out").record_id == "a.tfrecord#5"


@pytest.mark.parametrize("where", ["payload", "length", "end", "garbage"])
def test_damage_to_a_file_costs_only_what_it_hit(tmp_path, expected, where):
    parts = [record_files.frame_payload(sequence(expected).SerializeToString()) for _ in range(3)]
    data = bytearray(b"".join(parts))
    if where == "garbage":
        data[len(parts[0]) : 2 * len(parts[0])] = record_files.frame_payload(b"\xff" * 9)
    elif where == "end":
        del data[-10:]
    else:
        data[len(parts[0]) + (500 if where == "payload" else 2)] ^= 1
    (tmp_path / "a.tfrecord").write_bytes(data)
    out = tmp_path / "out"
    assert run(out, "sequence-examples", tmp_path / "a.tfrecord", "--fps=10") == 3
    names = [name.partition("#")[2] for name in RecordDataset(out, "train").record_ids]
    wanted = {"payload": ["0", "2"], "length": ["0"], "end": ["0", "1"], "garbage": ["0", "2"]}
    assert names == wanted[where]
    ((_, (reason, _)),) = rejected(out).items()
    assert reason == {"end": "truncated", "garbage": "bad_example"}.get(where, "damaged")


def test_array_record_of_sequence_examples(tmp_path: Path, expected: dict[str, np.ndarray]) -> None:
    path = tmp_path / "a.array_record"
    with record_files.create(epath.Path(path), "array_record") as append:
        for values in ([0.5], [0.25], [0.125]):
            append(sequence(expected, a=values).SerializeToString())
    rates = ("--fps=10", "--sample-rate-of-source=2000")
    assert run(tmp_path / "good", "sequence-examples", tmp_path, *rates) == 0
    dataset = RecordDataset(tmp_path / "good", "train")
    assert [dataset[n].waveform.tolist() for n in range(3)] == [[16384], [8192], [4096]]
    data = bytearray(path.read_bytes())
    second = data.index(np.float32(0.25).tobytes())
    data[second] ^= 1
    path.write_bytes(data)
    assert run(tmp_path / "bad", "sequence-examples", path, *rates) == 3
    assert {n: r for n, (r, _) in rejected(tmp_path / "bad").items()} == {
        "a.array_record#1": "damaged"
    }
    path.write_bytes(data[:-1])
    assert main(["sequence-examples", str(path), f"--out={tmp_path / 'none'}", *rates]) == 1


def test_missing_shards_and_examples_are_listed(tmp_path: Path) -> None:
    copy = tmp_path / "tiny"
    shutil.copytree(DATA / "tiny", copy)
    (copy / "tiny-test.tfrecord-00000-of-00001").unlink()
    shard = copy / "tiny-train.tfrecord-00000-of-00001"
    first = next(iter(record_files.scan(epath.Path(shard), "tfrecord")))[1]
    shard.write_bytes(shard.read_bytes()[: len(first) + record_files.OVERHEAD_BYTES])
    assert run(tmp_path / "out", "tfds", copy, "--fps=10") == 0
    assert len(RecordDataset(tmp_path / "out", "train")) == 1
    lines = listed(tmp_path / "out", "missing")
    assert [(line["split"], line["id"][-2:]) for line in lines] == [
        ("train", "#1"),
        ("train", "#2"),
        ("test", "#0"),
    ]


def test_an_example_without_a_feature_is_refused(tmp_path: Path) -> None:
    copy = tmp_path / "tiny"
    shutil.copytree(DATA / "tiny", copy)
    shard = copy / "tiny-test.tfrecord-00000-of-00001"
    train = copy / "tiny-train.tfrecord-00000-of-00001"
    payloads = [payload for _, payload in record_files.scan(epath.Path(train), "tfrecord")]
    example = message_class("Example").FromString(bytes(payloads[0]))
    del example.features.feature["sound"]
    write(shard, example)
    assert run(tmp_path / "out", "tfds", copy, "--fps=10") == 3
    ((name, (reason, message)),) = rejected(tmp_path / "out").items()
    assert (name, reason) == (f"{shard.name}#0", "bad_example")
    there = ", ".join(sorted(example.features.feature))
    assert message == f"no feature 'sound', there are {there}"


@pytest.mark.parametrize(
    ("options", "lacking"),
    [
        ((), "image/encoded"),
        (("--video-feature=image/raw",), "image/raw"),
        (("--video-feature=none", "--audio-feature=audio/floats"), "audio/floats"),
        (("--video-feature=LEFT/image/encoded", "--audio-feature=audio/floats"), "audio/floats"),
        (("--video-feature=none",), "WAVEFORM/feature/floats"),
    ],
)
def test_features_of_other_names_are_listed(tmp_path, expected, capsys, options, lacking):
    lists = ["LEFT/image/encoded", "sound/floats"]
    example = sequence(expected, a=[0.5])
    for old, new in zip(("image/encoded", "WAVEFORM/feature/floats"), lists, strict=True):
        stored = example.feature_lists.feature_list
        stored[new].CopyFrom(stored[old])
        del stored[old]
    path = write(tmp_path / "a.tfrecord", example)
    more = ("--fps=10", "--sample-rate-of-source=2000")
    text = error(capsys, tmp_path / "out", "sequence-examples", path, *more, *options)
    assert f"no example has the feature list {lacking}; there are {', '.join(lists)}:" in text
    assert not (tmp_path / "out" / "rejected.jsonl").exists()
    named = (f"--video-feature={lists[0]}", f"--audio-feature={lists[1]}")
    assert run(tmp_path / "named", "sequence-examples", path, *more, *named) == 0
    assert only_record(tmp_path / "named").has_audio


def test_compressed_files_and_clashing_labels_are_one_error(tmp_path, expected, capsys):
    packed = tmp_path / "a.tfrecord"
    packed.write_bytes(gzip.compress((DATA / DMVR).read_bytes()))
    assert "is compressed: decompress it" in error(
        capsys, tmp_path / "out", "sequence-examples", packed
    )
    clash = []
    for text in (b"run", b"jump"):
        example = sequence(expected)
        example.context.feature["clip/label/index"].int64_list.value.append(4)
        example.context.feature["clip/label/text"].bytes_list.value.append(text)
        clash.append(example)
    path = write(tmp_path / "b.tfrecord", *clash)
    message = error(capsys, tmp_path / "out", "sequence-examples", path, "--fps=10")
    assert "class 4 of class is 'run' in one example and 'jump' in another" in message
    (tmp_path / "names").write_text("walk\nrun\n")
    names = f"--classes={tmp_path / 'names'}"
    message = error(
        capsys, tmp_path / "out", "sequence-examples", write(path, clash[0]), "--fps=10", names
    )
    assert "class 4 of class is not among the names given" in message


def test_texts_alone_make_classes(tmp_path: Path, expected: dict[str, np.ndarray]) -> None:
    examples = []
    for text in (b"run", b"jump", None):
        example = sequence(expected)
        if text:
            example.context.feature["clip/label/string"].bytes_list.value.append(text)
        examples.append(example)
    path = write(tmp_path / "a.tfrecord", *examples)
    assert run(tmp_path / "out", "sequence-examples", path, "--fps=10", "--label=action") == 0
    dataset = RecordDataset(tmp_path / "out", "train")
    assert dataset.class_names == {"action": ["jump", "run"]}
    assert dataset.labels["action"].tolist() == [1, 0, -1]


def test_encoded_media_inside_an_example(tmp_path: Path) -> None:
    from tests.data.synthetic_media import write_clip

    write_clip(tmp_path / "a.mp4", 15)
    example = message_class("SequenceExample")()
    content = (tmp_path / "a.mp4").read_bytes()
    example.context.feature["clip/encoded_media_bytes"].bytes_list.value.append(content)
    path = write(tmp_path / "a.tfrecord", example)
    assert run(tmp_path / "record", "sequence-examples", path) == 0
    assert run(tmp_path / "file", "prepare", tmp_path / "a.mp4") == 0
    record, wanted = only_record(tmp_path / "record"), only_record(tmp_path / "file")
    assert record.frames == wanted.frames
    np.testing.assert_array_equal(record.waveform, wanted.waveform)


def test_only_a_changed_shard_is_prepared_again(tmp_path, expected, capsys):
    a = write(tmp_path / "a.tfrecord", sequence(expected), sequence(expected))
    write(tmp_path / "b.tfrecord", sequence(expected))
    command = ("sequence-examples", tmp_path, "--fps=10")
    assert run(tmp_path / "out", *command) == 0
    assert run(tmp_path / "out", *command) == 0
    assert "is up to date" in capsys.readouterr().out
    changed = sequence(expected)
    changed.feature_lists.feature_list["image/encoded"].feature.pop()
    write(a, changed, sequence(expected))
    assert run(tmp_path / "out", *command) == 0
    assert "1 unchanged, 2 changed, 0 new" in capsys.readouterr().out
    assert [len(RecordDataset(tmp_path / "out", "train")[n].frames) for n in range(3)] == [4, 5, 5]


def test_an_entry_names_all_that_decides_its_record(tmp_path: Path) -> None:
    from avcl_jax.data_prep.collections.sequence_examples import SequenceLayout
    from avcl_jax.data_prep.manifest import Entry, ExamplePlace
    from avcl_jax.data_prep.shards import entry_plan
    from tests.data.test_media import OPTIONS

    layout = SequenceLayout("image/encoded", None, 10.0, None, None)
    entry = Entry("p", "train", "x", "x", 0.0, None, {}, ExamplePlace("tfrecord", 0, layout))
    others = [
        dataclasses.replace(entry.example, place=7),
        dataclasses.replace(entry.example, file_format="array_record"),
        dataclasses.replace(entry.example, layout=dataclasses.replace(layout, fps=9.0)),
    ]
    plans = {entry_plan(dataclasses.replace(entry, example=e), OPTIONS) for e in others}
    assert len(plans | {entry_plan(entry, OPTIONS)}) == 4


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_channels_of_an_example_never_cancel(dtype: type) -> None:
    left, other = (np.sin(np.arange(4000) * step) for step in (0.1, 0.37))
    full = 9000 if dtype == np.int16 else 9000 / 32768
    for factors, expected, kind in (
        ((left, other), (left + other) / 2, None),
        ((left, -left), left, "antiphase"),
        ((0 * left, left, 0 * left), left, "dead_channel"),
    ):
        data = (full * np.stack(factors, axis=1)).astype(dtype)
        samples = Samples([(0.0, data[:1000]), (0.5, data[1000:])], RATE, None)
        sound = mix_to_mono(samples, sample_rate_hz=RATE, start_seconds=0.0, end_seconds=None)
        assert sound is not None
        assert list(sound.notes) == ([kind] if kind else [])
        np.testing.assert_allclose(sound.waveform, 9000 * expected, atol=1.5)
