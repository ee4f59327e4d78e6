"""Any content of a record's file: a record, or our own error, at no more memory than its size."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

import crc32c
import numpy as np
import pyarrow as pa
import pytest

from avcl_jax.data.record_index import load_table, save_table
from avcl_jax.data.records import RecordDataset, RecordError
from tests.data.synthetic_records import make_record, write_records

ROOT = Path(__file__).resolve().parents[2]


def mutate_and_read(number: int, seed: int) -> dict[str, int]:
    """Runs `tests.data.hostile_records`; an error of another kind, or too much memory, ends it."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.data.hostile_records", str(number), str(seed)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout)
    assert sum(n for kind, n in counts.items() if not kind.startswith("header")) == number
    # What changes anything in the frame is always found.
    assert counts["frame refused"] == -(-number // 3)
    kinds = itertools.product(("content", "header"), ("refused", "contradicts", "record"))
    assert min(counts[" ".join(kind)] for kind in kinds) > 0
    return counts


def test_mutated_records_are_records_or_one_kind_of_error() -> None:
    mutate_and_read(3000, seed=0)


@pytest.mark.slow
def test_100_000_mutated_records_are_records_or_one_kind_of_error() -> None:
    mutate_and_read(100_000, seed=1)


def test_an_index_of_other_content_with_a_true_crc_is_made_again(tmp_path: Path) -> None:
    records = [make_record(n, seconds=1.0, side=16) for n in range(3)]
    directory = write_records(tmp_path, records, shards=1)
    expected = RecordDataset(directory, "train")
    (index,) = directory.glob("*.index")
    good, table = index.read_bytes(), load_table(index)

    def changed(name: str, values: object) -> pa.Table:
        place, kind = table.column_names.index(name), table.schema.field(name).type
        return table.set_column(place, name, pa.array(values, kind))

    # One length more and one less: the sum, which the size of the shard confirms, stays.
    lengths = table["length"].to_numpy() + np.array([1 << 40, -(1 << 40), 0])
    bad = [
        changed("length", lengths),
        changed("header_crc", [1, None, 2]),
        changed("header_length", [-1, 0, 1]),
        changed("header_length", [1 << 30, 0, 0]),
        changed("shard", [0, 1, 1]),
        table.slice(0, 2),
        table.drop_columns(["num_frames"]),
        table.drop_columns(["label_motion"]),
        pa.table({"other": [1, 2, 3]}),
    ]

    def assert_made_again() -> None:
        dataset = RecordDataset(directory, "train")
        assert [dataset[n].record_id for n in range(3)] == list(expected.record_ids)
        assert index.read_bytes() == good

    for table in bad:
        save_table(index, table)
        assert_made_again()
    for content in (b"", b"no table at all", good[:-200]):
        index.write_bytes(with_crc(content))
        assert_made_again()
    # Made for this purpose it may have any ids; nothing in it ends the process.
    rng = np.random.default_rng(0)
    for _ in range(200):
        mutated = bytearray(good[:-4])
        for at in rng.integers(0, len(mutated), 4):
            mutated[at] ^= 1 << int(rng.integers(8))
        index.write_bytes(with_crc(bytes(mutated)))
        with contextlib.suppress(RecordError):
            [record.height for record in RecordDataset(directory, "train")]


def with_crc(data: bytes) -> bytes:
    return data + crc32c.crc32c(data).to_bytes(4, "little")


@pytest.mark.parametrize("number", [5, 1 << 30])
def test_a_class_that_the_data_set_does_not_have_is_refused(tmp_path: Path, number: int) -> None:
    record = make_record(0, seconds=1.0, side=16)
    bad = dataclasses.replace(record, labels={"motion": number, "material": 0})
    directory = write_records(tmp_path, [record, bad], shards=1)
    message = "none of the 5 classes of label 'motion'"
    with pytest.raises(RecordError, match=message):  # where the index is made
        RecordDataset(directory, "train")
    del bad.labels["motion"]
    write_records(directory, [record, bad], shards=1)
    with pytest.raises(RecordError, match=message):
        RecordDataset(directory, "train")
