"""Prepared data sets as ArrayRecord files: the same records, the same care about damage."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from avcl_jax.data.images import decode_jpegs
from avcl_jax.data.records import Record, RecordDataset, RecordError
from avcl_jax.data_prep.__main__ import main
from tests.data.synthetic_records import write_shard
from tests.data.test_records import SHARDS, assert_same, make_record, write_dataset

FORMAT = "array_record"


def test_tfds_opens_it_as_a_data_source(tmp_path: Path) -> None:
    # Where the default tests run there is no TensorFlow.
    import tensorflow_datasets as tfds

    paths = write_dataset(tmp_path, SHARDS, FORMAT)
    assert paths[0].name == "demo-train.array_record-00000-of-00002"
    source = tfds.builder_from_directory(tmp_path).as_data_source(split="train")
    assert len(source) == 3
    for example, record in zip(source, itertools.chain(*SHARDS), strict=True):
        assert example["source"] == record.source_id.encode()
        assert example["label_motion"] == record.labels["motion"]
        np.testing.assert_array_equal(example["audio"], record.waveform)
        np.testing.assert_array_equal(example["frame_seconds"], record.frame_seconds)
        assert example["sample_rate_hz"] == record.sample_rate_hz
        assert example["duration_seconds"] == record.duration_seconds
        assert example["audio_start_seconds"] == record.audio_start_seconds
        if record.has_video:
            np.testing.assert_array_equal(np.stack(example["video"]), decode_jpegs(record.frames))
        else:
            assert len(example["video"]) == 0


def read_all(directory: Path) -> list[Record]:
    dataset = RecordDataset(directory, "train")
    return [dataset[number] for number in range(len(dataset))]


@pytest.mark.parametrize("with_index", [True, False])
def test_a_flipped_byte_is_detected_or_changes_nothing(tmp_path: Path, with_index: bool) -> None:
    expected = [make_record(0), make_record(1, video=False)]
    (shard,) = write_dataset(tmp_path, [expected], FORMAT)
    read_all(tmp_path)
    index = tmp_path / "demo-train.index"
    good, good_index = shard.read_bytes(), index.read_bytes()
    # Zeros between what is written pad the file to blocks of 64 KiB.
    written = np.flatnonzero(np.frombuffer(good, np.uint8))
    detected = 0
    for position in written[:: 8 if with_index else 17].tolist():
        damaged = bytearray(good)
        damaged[position] ^= 1 << position % 8
        shard.write_bytes(damaged)
        index.write_bytes(good_index) if with_index else index.unlink(missing_ok=True)
        try:
            found = read_all(tmp_path)
        except RecordError as error:
            assert "damaged" in str(error) or "stale" in str(error)  # noqa: PT017 - one of many
            detected += 1
            continue
        for left, right in zip(found, expected, strict=True):
            assert_same(left, right)
    # The rest are the block headers, which only help to find chunks after damage.
    assert detected > 0.9 * len(written[:: 8 if with_index else 17])


@pytest.mark.parametrize("cut", [1, 100, 70_000, 131_000, 131_072])
def test_a_truncated_file_is_one_error(tmp_path: Path, cut: int) -> None:
    (shard,) = write_dataset(tmp_path, [[make_record(0)]], FORMAT)
    read_all(tmp_path)
    os.truncate(shard, shard.stat().st_size - cut)
    for _ in range(2):  # the second time without an index
        with pytest.raises(RecordError, match="truncated, damaged or not an ArrayRecord file"):
            read_all(tmp_path)
        (tmp_path / "demo-train.index").unlink(missing_ok=True)


def test_another_file_of_the_name_is_a_stale_index(tmp_path: Path) -> None:
    (shard,) = write_dataset(tmp_path, [[make_record(0), make_record(2)]], FORMAT)
    dataset = RecordDataset(tmp_path, "train")
    assert_same(dataset[1], make_record(2))
    write_shard(shard, [make_record(0), make_record(5)], FORMAT)
    with pytest.raises(RecordError, match="or its index is stale"):
        dataset[1]
    write_shard(shard, [make_record(0)], FORMAT)
    with pytest.raises(RecordError, match="has 1 records only"):
        dataset[1]
    shard.unlink()
    with pytest.raises(RecordError, match="is missing"):
        dataset[1]


@pytest.fixture
def small_disk() -> Iterator[None]:
    """Files may have 100 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("small_disk")
def test_a_full_disk_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="File too large") as caught:
        write_shard(tmp_path / "x.array_record", [make_record(0, side=300)] * 3, FORMAT)
    assert caught.value.errno == errno.EFBIG
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError):
        write_shard(tmp_path / "none" / "x.array_record", [make_record(0)], FORMAT)


def test_the_command_writes_it_and_the_same_bytes_again(tmp_path, capsys):
    tiny = Path(__file__).parents[1] / "data_prep" / "testdata" / "tiny"

    def run(out: str, *more: str) -> int:
        command = ["tfds", str(tiny), f"--out={tmp_path / out}", "--fps=10", "--workers=1", *more]
        return main([*command, "--sample-rate=2000"])

    assert run("a", "--file-format=array_record") == 0
    assert run("b", "--file-format=array_record") == 0
    shards = sorted(path.name for path in (tmp_path / "a").glob("*-of-*"))
    assert shards == [f"tfds-{split}.array_record-00000-of-00001" for split in ("test", "train")]
    for shard in shards:
        assert (tmp_path / "a" / shard).read_bytes() == (tmp_path / "b" / shard).read_bytes()
    assert run("c") == 0
    of_a, of_c = (RecordDataset(tmp_path / name, "train") for name in "ac")
    for number in range(3):
        assert_same(of_a[number], of_c[number])
    # What it wrote can be prepared again.
    status = main(
        [
            *("tfds", str(tmp_path / "a"), f"--out={tmp_path / 'd'}", "--fps=10", "--workers=1"),
            *("--id-feature=id", "--source-feature=source", "--split=test", "--sample-rate=2000"),
            "--sample-rate-of-source=2000",
        ]
    )
    assert status == 0
    again, test = RecordDataset(tmp_path / "d", "test"), RecordDataset(tmp_path / "a", "test")
    assert again.record_ids[0] == test.record_ids[0]
    assert list(again[0].frames) == list(test[0].frames)
    np.testing.assert_array_equal(again[0].waveform, test[0].waveform)
    # One data set has one format.
    capsys.readouterr()
    assert run("e", "--file-format=array_record", "--split=test") == 0
    assert run("e", "--split=train") == 1
    assert "use --file-format array_record" in capsys.readouterr().err
    assert run("e", "--file-format=array_record", "--split=train") == 0
    assert_same(RecordDataset(tmp_path / "e", "train")[0], of_c[0])
