"""Records: exact round trips, and every damage is one clear error."""

from __future__ import annotations

import dataclasses
import gc
import io
import itertools
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import simplejpeg
from etils import epath

from avcl_jax.data import record_files, record_index, records
from avcl_jax.data.images import decode_jpegs
from avcl_jax.data.record_format import (
    message_class,
    parse_record,
    serialize_parts,
    serialize_record,
)
from avcl_jax.data.record_index import index_path
from avcl_jax.data.record_writer import RecordWriter, record_features, write_dataset_metadata
from avcl_jax.data.records import Record, RecordDataset, RecordError, shard_name
from tests.data.synthetic_records import write_shard

CLASS_NAMES = {"motion": ["fall", "roll"]}


def make_record(number: int, *, video: bool = True, audio: bool = True, side: int = 8) -> Record:
    rng = np.random.default_rng(number)
    frames = [
        simplejpeg.encode_jpeg(rng.integers(0, 256, (side, side + 1, 3), dtype=np.uint8))
        for _ in range(3 * video)
    ]
    return Record(
        record_id=f"clip {number} é\udcff\n",
        source_id=f"source {number // 2}",
        frames=frames,
        frame_seconds=np.array([0.0, 1 / 3, 0.7])[: len(frames)],
        waveform=rng.integers(-32768, 32768, 40 * audio).astype(np.int16),
        sample_rate_hz=16000 * audio,
        audio_start_seconds=1 / 7 * audio,
        duration_seconds=1.1,
        height=side * video,
        width=(side + 1) * video,
        labels={"motion": number % 3 - 1},
    )


def write_dataset(
    directory: Path, shards: list[list[Record]], file_format: str = "tfrecord"
) -> list[Path]:
    """Writes the split "train"; returns the paths of its shards."""
    count = len(shards)
    paths = [directory / shard_name("demo", "train", n, count, file_format) for n in range(count)]
    written = [write_shard(*each, file_format) for each in zip(paths, shards, strict=True)]
    write_dataset_metadata(
        directory,
        name="demo",
        class_names=CLASS_NAMES,
        splits={"train": written},
        file_format=file_format,
    )
    return paths


SHARDS = [[make_record(0), make_record(1, video=False)], [make_record(2, audio=False)]]


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    write_dataset(tmp_path, SHARDS)
    return tmp_path


def assert_same(left: Record, right: Record) -> None:
    for name in Record.__dataclass_fields__:
        a, b = getattr(left, name), getattr(right, name)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
        elif name == "frames":
            assert list(a) == list(b)
        else:
            assert a == b, name


@pytest.mark.parametrize("with_index", [True, False])
@pytest.mark.parametrize("file_format", record_files.FILE_FORMATS)
def test_round_trip_is_exact_with_and_without_each_modality(tmp_path, file_format, with_index):
    write_dataset(tmp_path, SHARDS, file_format)
    fingerprint = RecordDataset(tmp_path, "train").fingerprint
    if not with_index:
        index_path(tmp_path, "demo", "train").unlink()
    dataset = RecordDataset(tmp_path, "train")
    assert (len(dataset), dataset.file_format) == (3, file_format)
    assert dataset.fingerprint == fingerprint
    for number, record in enumerate(itertools.chain(*SHARDS)):
        assert_same(dataset[number], record)
        assert dataset.timelines["num_frames"][number] == len(record.frames)
        assert dataset.timelines["num_samples"][number] == len(record.waveform)
        assert dataset.timelines["duration_seconds"][number] == 1.1
        assert dataset.labels["motion"][number] == record.labels["motion"]
    assert dataset.timelines["max_frame_gap_seconds"][0] == pytest.approx(0.7 - 1 / 3)
    assert dataset.timelines["min_frame_gap_seconds"][0] == pytest.approx(1 / 3)
    assert dataset.timelines["audio_start_seconds"][0] == pytest.approx(1 / 7)
    assert dataset.source_numbers.tolist() == [0, 0, 1]
    assert dataset.class_names == CLASS_NAMES
    with pytest.raises(IndexError):
        dataset[3]


def test_tfds_reads_what_we_write(prepared: Path) -> None:
    import tensorflow_datasets as tfds

    info = tfds.builder_from_directory(prepared).info
    assert info.splits["train"].num_examples == 3
    assert info.splits["train"].shard_lengths == [2, 1]
    assert info.features["label_motion"].names == ["fall", "roll"]
    for template, path in zip(
        info.splits["train"].filepaths, sorted(prepared.glob("*-of-00002")), strict=True
    ):
        assert Path(template) == path
    record = dataclasses.replace(make_record(0), is_still=True)
    payload = serialize_record(record)
    example = info.features.deserialize_example_np(payload)
    begins, sizes, _ = example["parts"].reshape(-1, 3).T
    begins = begins + len(serialize_parts(record)[0])
    found = [payload[begin : begin + size] for begin, size in zip(begins, sizes, strict=True)]
    assert found == [record.waveform.tobytes(), *record.frames]
    np.testing.assert_array_equal(np.stack(example["video"]), decode_jpegs(record.frames))
    np.testing.assert_array_equal(example["frame_seconds"], record.frame_seconds)
    np.testing.assert_array_equal(example["audio"], record.waveform)
    assert example["audio_start_seconds"] == record.audio_start_seconds
    assert example["label_motion"] == -1
    assert example["is_still"]


def test_we_read_what_tfds_serializes() -> None:
    record = dataclasses.replace(make_record(4), is_still=True)
    features = record_features(CLASS_NAMES, ())
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    payload = ExampleSerializer(features.get_serialized_info()).serialize_example(
        {
            "id": record.record_id.encode("utf-8", "surrogateescape"),
            "source": record.source_id.encode(),
            "video": list(record.frames),
            "frame_seconds": record.frame_seconds.tobytes(),
            "audio": record.waveform.tobytes(),
            "sample_rate_hz": record.sample_rate_hz,
            "audio_start_seconds": np.float64(record.audio_start_seconds).tobytes(),
            "duration_seconds": np.float64(record.duration_seconds).tobytes(),
            "height": record.height,
            "width": record.width,
            "is_still": record.is_still,
            "parts": b"",
            "label_motion": record.labels["motion"],
        }
    )
    assert_same(parse_record(payload, CLASS_NAMES, (), where="tfds"), record)


def test_a_crc_of_the_tfrecord_format() -> None:
    # The published test vector of CRC-32C for 32 zero bytes, masked as TFRecord does.
    crc = 0x8A9136AA
    assert record_files.masked_crc(bytes(32)) == (
        ((crc >> 15 | crc << 17) & 0xFFFFFFFF) + 0xA282EAD8
    ) % (1 << 32)


@pytest.mark.parametrize("with_index", [True, False])
def test_every_flipped_byte_that_is_used_is_detected(tmp_path: Path, with_index: bool) -> None:
    records = [make_record(0), make_record(1, video=False)]
    write_dataset(tmp_path, [records])
    shard = tmp_path / shard_name("demo", "train", 0, 1)
    index = Path(index_path(tmp_path, "demo", "train"))
    RecordDataset(tmp_path, "train")
    good_shard, good_index = shard.read_bytes(), index.read_bytes()
    unseen = 0
    for position in range(0, len(good_shard), 1 if with_index else 7):
        damaged = bytearray(good_shard)
        damaged[position] ^= 1 << position % 8
        shard.write_bytes(damaged)
        index.write_bytes(good_index) if with_index else index.unlink(missing_ok=True)
        try:  # opening or reading may find it
            dataset = RecordDataset(tmp_path, "train")
            found = [dataset[number] for number in range(len(dataset))]
        except RecordError as error:
            assert any(word in str(error) for word in ("damaged", "truncated", "stale"))  # noqa: PT017
            continue
        unseen += 1
        for left, right in zip(found, records, strict=True):
            assert_same(left, right)
    used = [
        len(part)
        for r in records
        for part in (serialize_parts(r)[0], r.waveform.tobytes(), *r.frames)
    ]
    # Tags and sizes of TFRecord and protocol buffers: offsets and the index stand for them.
    assert unseen == (len(good_shard) - sum(used) if with_index else 0)


def read_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns a list that will have the bytes of each read."""
    sizes: list[int] = []
    pread = os.pread

    def counting(file: int, size: int, at: int) -> bytes:
        sizes.append(size)
        return pread(file, size, at)

    monkeypatch.setattr(os, "pread", counting)
    return sizes


def test_only_the_frames_that_are_used_are_read_and_checked(prepared, monkeypatch):
    record = make_record(0)
    shard = prepared / shard_name("demo", "train", 0, 2)
    dataset = RecordDataset(prepared, "train")
    damaged = shard.read_bytes().replace(record.frames[2], bytes(len(record.frames[2])))
    shard.write_bytes(damaged)
    sizes = read_sizes(monkeypatch)
    header = len(serialize_parts(record)[0])
    with dataset.reader.open(dataset.place_of(0)) as found:
        assert sizes == [header, record.waveform.nbytes]
        assert found.frames[1] == record.frames[1]
        assert found.frames[:2] == record.frames[:2]
        assert len(found.frames) == 3
        np.testing.assert_array_equal(found.waveform, record.waveform)
    assert sizes[2:] == [len(record.frames[n]) for n in (1, 0, 1)]
    message = f"{shard}, record {record.record_id!r} is damaged (CRC does not match): prepare this"

    def use() -> None:
        with dataset.reader.open(dataset.place_of(0)) as found:
            found.frames[2]

    for read in (use, lambda: dataset[0]):
        with pytest.raises(RecordError, match=re.escape(message)):
            read()


@pytest.mark.parametrize("parts", [None, b"", "true"])
def test_records_of_other_writers_are_read_whole(tmp_path, monkeypatch, parts):
    """In the order of names, as earlier releases and TFDS write them, with `parts` or without."""
    record = make_record(0)
    payload = serialize_record(record)
    example = message_class("Example").FromString(payload)
    if parts is None:
        del example.features.feature["parts"]
    elif not parts:
        example.features.feature["parts"].bytes_list.value[0] = parts
    other = example.SerializeToString(deterministic=True)
    assert other != payload
    (shard,) = write_dataset(tmp_path, [[record]])
    shard.write_bytes(record_files.frame_payload(other))
    dataset = RecordDataset(tmp_path, "train")
    sizes = read_sizes(monkeypatch)
    assert_same(dataset[0], record)
    with dataset.reader.open(dataset.place_of(0)) as found:
        assert_same(found, record)
    assert set(sizes) == {len(other)}
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(RecordError, match="damaged"):
        dataset[0]


def test_one_request_reads_a_record_in_an_object_store(prepared, monkeypatch):
    requests = []

    class Store:
        def cat_file(self, name: str, *, start: int, end: int) -> bytes:
            requests.append((name, start, end))
            return (prepared / Path(name).name).read_bytes()[start:end]

    monkeypatch.setattr("fsspec.core.url_to_fs", lambda url: (Store(), url.removeprefix("s3://")))
    dataset = RecordDataset(prepared, "train")
    for number, record in enumerate(itertools.chain(*SHARDS)):
        place = dataset.place_of(number)
        name, begin = f"bucket/{Path(place.shard).name}", place.place + 12
        with dataset.reader.open(place._replace(shard=f"s3://{name}")) as found:
            assert_same(found, record)
        assert requests.pop() == (name, begin, begin + place.length)
        assert not requests


@pytest.mark.parametrize("cut", [1, 4, 100])
def test_a_truncated_shard_is_one_error(prepared: Path, cut: int) -> None:
    shard = prepared / shard_name("demo", "train", 0, 2)
    os.truncate(shard, shard.stat().st_size - cut)
    with pytest.raises(RecordError, match="truncated: prepare this data set again"):
        RecordDataset(prepared, "train")


def test_a_missing_shard_or_record_is_one_error(prepared: Path) -> None:
    shard = prepared / shard_name("demo", "train", 0, 2)
    other = shard.read_bytes()
    write_shard(shard, [make_record(0)])
    with pytest.raises(RecordError, match=r"has 1 records where dataset_info.json says 2"):
        RecordDataset(prepared, "train")
    shard.write_bytes(other)
    shard.unlink()
    with pytest.raises(RecordError, match="is missing"):
        RecordDataset(prepared, "train")


def test_a_stale_or_damaged_index_is_rebuilt(prepared: Path) -> None:
    shard = prepared / shard_name("demo", "train", 0, 2)
    index = Path(index_path(prepared, "demo", "train"))
    first = RecordDataset(prepared, "train").fingerprint
    good = index.read_bytes()
    damaged = bytearray(good)
    damaged[len(good) // 2] ^= 1
    for bad in (b"", b"garbage", good[:-20], bytes(damaged)):
        index.write_bytes(bad)
        assert RecordDataset(prepared, "train").fingerprint == first
        assert index.read_bytes() == good
    write_shard(shard, [make_record(5), make_record(6)])
    dataset = RecordDataset(prepared, "train")
    assert dataset.record_ids[0] == make_record(5).record_id
    assert dataset.fingerprint != first


def test_every_flipped_bit_of_an_index_is_detected_or_changes_nothing(tmp_path: Path) -> None:
    write_dataset(tmp_path, [[make_record(0), make_record(1, video=False)]])
    index = Path(index_path(tmp_path, "demo", "train"))
    expected = RecordDataset(tmp_path, "train")
    good = index.read_bytes()
    for position in range(0, len(good), 3):
        damaged = bytearray(good)
        damaged[position] ^= 1 << position % 8
        index.write_bytes(damaged)
        dataset = RecordDataset(tmp_path, "train")
        assert dataset.fingerprint == expected.fingerprint
        assert list(dataset.record_ids) == list(expected.record_ids)
        for name, values in expected.timelines.items():
            np.testing.assert_array_equal(dataset.timelines[name], values)


def test_a_shard_replaced_by_one_of_the_same_size_is_a_stale_index(tmp_path: Path) -> None:
    write_dataset(tmp_path, [[make_record(0, video=False)]])
    shard = tmp_path / shard_name("demo", "train", 0, 1)
    RecordDataset(tmp_path, "train")
    size = shard.stat().st_size
    write_shard(shard, [make_record(3, video=False)])
    assert shard.stat().st_size == size
    dataset = RecordDataset(tmp_path, "train")
    with pytest.raises(RecordError, match="or its index is stale: delete"):
        dataset[0]
    index_path(tmp_path, "demo", "train").unlink()
    assert_same(RecordDataset(tmp_path, "train")[0], make_record(3, video=False))


def test_several_labels_a_clip(tmp_path: Path) -> None:
    sets = [(0, 2), (), (1,)]
    made = [
        dataclasses.replace(make_record(n), labels={"sound": labels, "motion": n - 1})
        for n, labels in enumerate(sets)
    ]
    info = write_shard(tmp_path / shard_name("demo", "train", 0, 1), made)
    write_dataset_metadata(
        tmp_path,
        name="demo",
        class_names={"sound": ["a", "b", "c"], "motion": ["x", "y", "z"]},
        multilabel={"sound"},
        splits={"train": [info]},
    )
    for _ in range(2):  # the second time from the index
        dataset = RecordDataset(tmp_path, "train")
        assert dataset.multilabel == {"sound"}
        assert [dataset[n].labels["sound"] for n in range(3)] == sets
        assert list(dataset.labels) == ["motion"]
        assert dataset.labels["motion"].tolist() == [-1, 0, 1]
        matrix = dataset.class_matrix("sound", [2, 0])
        np.testing.assert_array_equal(matrix, [[False, True, False], [True, False, True]])
        for label, expected in (("sound", [0, 2, 1]), ("motion", [0, 1])):
            numbers, without = dataset.class_numbers(label)
            assert (numbers.tolist(), without) == (expected, 1)
    import tensorflow_datasets as tfds

    feature = tfds.builder_from_directory(tmp_path).info.features["label_sound"]
    assert isinstance(feature, tfds.features.Sequence)
    assert feature.feature.names == ["a", "b", "c"]


def test_an_index_is_mapped_from_a_file_and_kept_in_memory_without_one(
    prepared, monkeypatch, capsys
):
    def nameless() -> int:
        return Path("/proc/self/maps").read_text().count(" (deleted)")

    RecordDataset(prepared, "train")  # makes it
    gc.collect()  # of other tests
    before = nameless()
    mapped = RecordDataset(prepared, "train")
    assert nameless() == before + 1
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent")
    record_index._say_in_memory.cache_clear()
    assert capsys.readouterr().err == ""
    kept = RecordDataset(prepared, "train")
    assert len(RecordDataset(prepared, "train")) == len(kept)
    assert capsys.readouterr().err == (
        "no temporary file for the index (No such file or directory): every process keeps it in "
        "memory; free some space in /tmp, or set TMPDIR to a directory with room\n"
    )
    assert nameless() == before + 1
    assert kept.fingerprint == mapped.fingerprint
    assert kept.record_ids[:] == mapped.record_ids[:]
    assert_same(kept[2], mapped[2])


def test_a_read_only_directory_needs_no_index(prepared, monkeypatch):
    for path in prepared.glob("*.index"):
        path.unlink()

    def refuse(*_: object) -> None:
        raise PermissionError(13, "read-only")

    monkeypatch.setattr(records, "save_table", refuse)
    assert_same(RecordDataset(prepared, "train")[2], make_record(2, audio=False))
    assert not list(prepared.glob("*.index"))


def edit_json(path: Path, edit: object) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_other_versions_features_and_splits_are_refused(prepared: Path) -> None:
    with pytest.raises(RecordError, match=r"no split 'valid', it has train"):
        RecordDataset(prepared, "valid")
    features = prepared / "features.json"
    good = features.read_text()
    edit_json(features, lambda c: c["featuresDict"]["features"].pop("frame_seconds"))
    with pytest.raises(RecordError, match="no feature frame_seconds: not a data set of"):
        RecordDataset(prepared, "train")
    features.write_text(good)
    edit_json(prepared / "dataset_info.json", lambda c: c.update(version="0.9.0"))
    with pytest.raises(RecordError, match=r"records of version 0.9.0, this code reads 1"):
        RecordDataset(prepared, "train")
    edit_json(prepared / "dataset_info.json", lambda c: c.update(version="1.0.0"))
    names = prepared / "label_motion.labels.txt"
    names.rename(prepared / "elsewhere")
    with pytest.raises(RecordError, match=r"label_motion\.labels\.txt is missing"):
        RecordDataset(prepared, "train")
    (prepared / "elsewhere").rename(names)
    edit_json(prepared / "dataset_info.json", lambda c: c["splits"][0].update(shardLengths=["0"]))
    with pytest.raises(RecordError, match="split 'train' has no records"):
        RecordDataset(prepared, "train")
    edit_json(prepared / "dataset_info.json", lambda c: c.update(fileFormat="riegeli"))
    with pytest.raises(RecordError, match="'riegeli', this code reads tfrecord and array_record"):
        RecordDataset(prepared, "train")
    (prepared / "dataset_info.json").unlink()
    with pytest.raises(RecordError, match="not a finished data set"):
        RecordDataset(prepared, "train")


def test_a_contradictory_record_is_not_written(tmp_path: Path) -> None:
    good = make_record(0)
    for change, message in (
        ({"frame_seconds": np.array([0.0, 0.5, 0.5])}, "strictly increase"),
        ({"frame_seconds": np.array([0.0, 0.5])}, "3 frames but"),
        ({"waveform": np.zeros(4, np.float32)}, "waveform must be int16"),
        ({"audio_start_seconds": -0.1}, "audio_start_seconds"),
        (
            {"frames": [], "frame_seconds": np.zeros(0), "waveform": np.zeros(0, np.int16)},
            "neither",
        ),
    ):
        record = Record(**{**vars(good), **change})
        with pytest.raises(ValueError, match=message):
            write_shard(tmp_path / "x.tfrecord", [good, record])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("file_format", record_files.FILE_FORMATS)
def test_a_shard_appears_only_when_complete(tmp_path: Path, file_format: str) -> None:
    # What is written before the error is the point, hence several statements.
    with pytest.raises(RuntimeError), RecordWriter(tmp_path / "x", file_format) as writer:  # noqa: PT012
        writer.write(make_record(0))
        assert not (tmp_path / "x").exists()
        raise RuntimeError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("file_format", record_files.FILE_FORMATS)
def test_reading_from_threads_and_after_pickling(tmp_path: Path, file_format: str) -> None:
    write_dataset(tmp_path, SHARDS, file_format)
    pickled = pickle.dumps(RecordDataset(tmp_path, "train"))
    assert len(pickled) < 1000
    dataset = pickle.loads(pickled)
    with ThreadPoolExecutor(4) as pool:
        ids = list(pool.map(lambda n: dataset[n % 3].record_id, range(60)))
    assert ids == [make_record(n % 3).record_id for n in range(60)]


def test_reading_imports_neither_tensorflow_nor_jax(prepared: Path) -> None:
    code = (
        "import sys; from avcl_jax.data.records import RecordDataset\n"
        f"RecordDataset({str(prepared)!r}, 'train')[0]\n"
        "print(sorted({'jax', 'tensorflow'} & set(sys.modules)))"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True
    )
    assert done.stdout == "[]\n"


def test_decoding_jpegs() -> None:
    image = np.full((6, 10, 3), (200, 100, 50), np.uint8)
    jpeg = simplejpeg.encode_jpeg(image, quality=95)
    video = decode_jpegs([jpeg, jpeg])
    assert video.shape == (2, 6, 10, 3)
    assert np.abs(video.astype(int) - image).max() <= 3
    with pytest.raises(ValueError, match="at least one frame"):
        decode_jpegs([])
    with pytest.raises(ValueError, match="frame 1 of 2"):
        decode_jpegs([jpeg, b"no jpeg"])
    with pytest.raises(ValueError, match="is 8x8, expected 6x10"):
        decode_jpegs([jpeg, simplejpeg.encode_jpeg(np.zeros((8, 8, 3), np.uint8))])


class ObjectStorePath:
    """Stands for a path that only etils can open (gs://)."""

    def __init__(self, content: bytes):
        self.content = content

    def __fspath__(self) -> str:
        return "gs://bucket/x"

    def open(self, mode: str) -> io.BytesIO:
        assert mode == "rb"
        return io.BytesIO(self.content)

    def stat(self) -> SimpleNamespace:
        return SimpleNamespace(length=len(self.content))


def test_reading_through_etils_where_there_is_no_local_file(tmp_path: Path) -> None:
    payloads = [bytes(range(256)) * 8, b"", b"x"]
    content = b"".join(map(record_files.frame_payload, payloads))
    (tmp_path / "x").write_bytes(content)
    for path in (epath.Path(tmp_path / "x"), ObjectStorePath(content)):
        scanned = list(record_files.scan(path, "tfrecord"))
        assert [bytes(payload) for _, payload in scanned] == payloads
        for (place, _), payload in zip(scanned, payloads, strict=True):
            assert record_files.read(path, "tfrecord", place, where="x") == payload


def test_messages_are_imported_by_one_thread_at_a_time(monkeypatch):
    both = threading.Barrier(2)

    class Importing(types.ModuleType):
        def __getattr__(self, name: str) -> SimpleNamespace:
            if name != "tf_example_generated_pb2":
                raise AttributeError(name)
            try:
                both.wait(0.5)
            except threading.BrokenBarrierError:
                return SimpleNamespace(Example="alone")
            return SimpleNamespace(Example="together")

    proto = "tensorflow_datasets.proto"
    monkeypatch.setitem(sys.modules, proto, Importing(proto))
    with ThreadPoolExecutor(2) as threads:  # beside the cache, which has the real class
        found = list(threads.map(message_class.__wrapped__, ["Example", "Example"]))
    assert found == ["alone", "alone"]
