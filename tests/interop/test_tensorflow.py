"""Plain TFDS under TensorFlow reads what we write, and what it writes is what we read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from avcl_jax.data.images import decode_jpegs
from avcl_jax.data.record_files import FILE_FORMATS
from avcl_jax.data.record_writer import write_dataset_metadata
from avcl_jax.data.records import Record, RecordDataset, shard_name
from avcl_jax.data_prep.__main__ import main
from tests.data.synthetic_records import write_shard
from tests.data.test_records import make_record

pytestmark = pytest.mark.interop
tf = pytest.importorskip(
    "tensorflow", reason="TensorFlow is not installed (requirements-interop.txt)"
)
DATA = Path(__file__).parents[1] / "data_prep" / "testdata"


def assert_equal(example: dict[str, np.ndarray], record: Record) -> None:
    """Compares all features of an example that TensorFlow read with the record."""
    labels = {name.removeprefix("label_") for name in example if name.startswith("label_")}
    assert labels == set(record.labels)
    for label in labels:
        assert np.array_equal(example[f"label_{label}"], record.labels[label])
    assert example["id"] == record.record_id.encode("utf-8", "surrogateescape")
    assert example["source"] == record.source_id.encode()
    np.testing.assert_array_equal(example["frame_seconds"], record.frame_seconds)
    np.testing.assert_array_equal(example["audio"], record.waveform)
    for name in ("sample_rate_hz", "audio_start_seconds", "duration_seconds", "height", "width"):
        assert example[name] == getattr(record, name)
    if record.has_video:
        # TensorFlow's decoder is libjpeg-turbo with other upsampling of colours.
        ours = decode_jpegs(record.frames).astype(int)
        exact = np.stack(
            [
                tf.io.decode_jpeg(frame, channels=3, dct_method="INTEGER_ACCURATE")
                for frame in record.frames
            ]
        )
        assert np.abs(np.stack(example["video"]).astype(int) - exact).max() <= 8
        assert np.abs(exact - ours).max() <= 2
    else:
        assert len(example["video"]) == 0


def examples(directory: Path, split: str) -> list[dict[str, np.ndarray]]:
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(directory)
    if builder.info.file_format is tfds.core.FileFormat.ARRAY_RECORD:
        # TFDS 4.9.10 has no `as_dataset` for these files, whoever wrote them.
        found = list(builder.as_data_source(split=split))
    else:
        found = list(tfds.as_numpy(builder.as_dataset(split=split)))
    return sorted(found, key=lambda example: example["id"])


@pytest.mark.parametrize("file_format", FILE_FORMATS)
def test_tfds_reads_all_that_we_write(tmp_path: Path, file_format: str) -> None:
    shards = [[make_record(0), make_record(1, video=False)], [make_record(2, audio=False)]]
    infos = [
        write_shard(
            tmp_path / shard_name("demo", "train", number, 2, file_format), shard, file_format
        )
        for number, shard in enumerate(shards)
    ]
    write_dataset_metadata(
        tmp_path,
        name="demo",
        class_names={"motion": ["fall", "roll"]},
        splits={"train": infos},
        file_format=file_format,
    )
    found = examples(tmp_path, "train")
    assert len(found) == 3
    for example, record in zip(found, [r for shard in shards for r in shard], strict=True):
        assert_equal(example, record)


@pytest.mark.parametrize("file_format", FILE_FORMATS)
def test_there_and_back(tmp_path: Path, file_format: str) -> None:
    """From TFDS through our preparation to TFDS: frames, sound and labels are the same."""
    import tensorflow_datasets as tfds

    command = ["tfds", str(DATA / "tiny"), f"--out={tmp_path}", "--fps=10", "--sample-rate=2000"]
    more = ["--id-feature=name", "--workers=1", f"--file-format={file_format}"]
    assert main([*command, *more]) == 0
    builder = tfds.builder_from_directory(DATA / "tiny")
    before = sorted(
        tfds.as_numpy(builder.as_dataset(split="train")), key=lambda example: example["name"]
    )
    after = examples(tmp_path, "train")
    records = RecordDataset(tmp_path, "train")
    by_id = {records.record_ids[number]: records[number] for number in range(len(records))}
    for old, new in zip(before, after, strict=True):
        assert_equal(new, by_id[new["id"].decode()])
        assert old["name"] == new["id"]
        if file_format == "tfrecord":  # the same decoder
            np.testing.assert_array_equal(old["clip"], new["video"])
        np.testing.assert_array_equal(old["sound"], new["audio"])
        assert old["action"] == new["label_action"]
        np.testing.assert_array_equal(old["heard"], new["label_heard"])


def test_the_checked_in_files_are_what_the_script_writes(tmp_path: Path) -> None:
    import importlib.util
    import shutil

    script = tmp_path / "make_with_tensorflow.py"
    shutil.copy(DATA / script.name, script)
    spec = importlib.util.spec_from_file_location("make_with_tensorflow", script)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    made.main()
    files = sorted(path for path in DATA.rglob("*.tfrecord*") if path.is_file())
    assert len(files) == 6
    for path in files:
        again = tmp_path / path.relative_to(DATA)
        assert contents(again) == contents(path), path.name


def contents(path: Path) -> list[bytes]:
    """Returns the examples, serialized with their features in order."""
    is_tfds = path.parent.name in ("tiny", "variants")
    kind = tf.train.Example if is_tfds else tf.train.SequenceExample
    return [
        kind.FromString(payload.numpy()).SerializeToString(deterministic=True)
        for payload in tf.data.TFRecordDataset(str(path))
    ]
