"""Records that cannot be read: the run stops with their name, or leaves out just them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from avcl_jax import experiment
from avcl_jax.data.pipeline import to_device_batch, train_batches
from avcl_jax.data.records import RecordDataset, RecordError
from avcl_jax.data.selection import UsableRecords
from avcl_jax.training import program, sharding
from avcl_jax.training.trained_records import UnreadableRecords
from tests.data.synthetic_records import make_record, write_records
from tests.training.small import PATIENCE, arguments, run, small_config, start_processes

# Position in the data set, and in what way the record is bad.
FLIPPED, NO_JPEG, OTHER_SIZE = 2, 5, 9


def flip_byte(directory: Path, index: int) -> None:
    """Damages a record behind the back of the index, as a disk does."""
    dataset = RecordDataset(directory, "train")
    shard = Path(dataset.shard_of(index))
    at = dataset[index].waveform.tobytes()[:64]
    data = bytearray(shard.read_bytes())
    data[data.index(at)] ^= 1
    shard.write_bytes(data)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    made = [make_record(number, seconds=5.0, side=24) for number in range(12)]
    return write_records(tmp_path_factory.mktemp("unreadable") / "good", made, shards=1)


@pytest.fixture(scope="module")
def bad(tmp_path_factory) -> Path:
    """The same records, three of them bad in three ways."""
    made = [make_record(number, seconds=5.0, side=24) for number in range(12)]
    frames = [b"no JPEG at all"] * len(made[NO_JPEG].frames)
    made[NO_JPEG] = dataclasses.replace(made[NO_JPEG], frames=frames)
    other = make_record(OTHER_SIZE, seconds=5.0, side=32).frames
    made[OTHER_SIZE] = dataclasses.replace(made[OTHER_SIZE], frames=other)
    directory = write_records(tmp_path_factory.mktemp("unreadable") / "bad", made, shards=1)
    flip_byte(directory, FLIPPED)
    return directory


def batches(directory: Path, number: int, **options) -> list[dict[str, np.ndarray]]:
    spec = experiment.render_spec(small_config(directory))
    source = UsableRecords(RecordDataset(directory, "train"), spec)
    settings = {"seed": 3, "global_batch_size": 12, "skip_unreadable": True} | options
    found = itertools.islice(iter(train_batches(source, spec, **settings)), number)
    return [{name: np.array(value) for name, value in batch.items()} for batch in found]


def test_unreadable_rows_are_empty_and_the_others_as_they_were(good, bad):
    for expected, found in zip(batches(good, 3), batches(bad, 3), strict=True):
        assert found.keys() == expected.keys()
        lost = found["unreadable"]
        assert sorted(found["record_index"][lost]) == [FLIPPED, NO_JPEG, OTHER_SIZE]
        assert not expected["unreadable"].any()
        for name, values in expected.items():
            assert found[name].dtype == values.dtype
            assert found[name].shape == values.shape
            np.testing.assert_array_equal(found[name][~lost], values[~lost], err_msg=name)
        for name in ("source_id", "record_index"):
            np.testing.assert_array_equal(found[name], expected[name])
        for name in ("has_video", "has_audio", "speed_mask", "direction_mask", "order_mask"):
            assert not found[name][lost].any(), name
        for name in ("video", "spectrogram"):
            assert not found[name][lost].any(), name
        assert (found["label_motion"][lost] == -1).all()


def test_the_same_rows_are_unreadable_whoever_reads(bad):
    hosts = [batches(bad, 2, rows=rows) for rows in (range(6), range(6, 12))]
    joined = [{n: np.concatenate([a[n], b[n]]) for n in a} for a, b in zip(*hosts, strict=True)]
    for found in (batches(bad, 2, workers=2), batches(bad, 2, threads=5), joined):
        for left, right in zip(batches(bad, 2), found, strict=True):
            for name in left:
                np.testing.assert_array_equal(right[name], left[name], err_msg=name)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (FLIPPED, ("CRC does not match",)),
        (NO_JPEG, ("frame 0 of 4",)),
        (OTHER_SIZE, ("is 32x32, expected 24x24",)),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_by_default_the_first_stops_with_its_name_and_shard(
    good, tmp_path, index, words, workers, bad
):
    dataset = RecordDataset(bad, "train")
    # Alone: which of several comes first depends on the order of reading.
    made = [make_record(number, seconds=5.0, side=24) for number in range(12)]
    if index != FLIPPED:
        made[index] = dataset[index]
    directory = write_records(tmp_path / "one", made, shards=2)
    place = made.index(made[index]) // 2 + 6 * (index % 2)  # dealt out to two shards
    RecordDataset(directory, "train")
    if index == FLIPPED:
        flip_byte(directory, place)
    with pytest.raises(RecordError) as caught:
        batches(directory, 1, skip_unreadable=False, workers=workers)
    for word in (f"record 'record {index}'", f"made-train.tfrecord-0000{index % 2}", *words):
        assert word in str(caught.value)
    assert "prepare this data set again" in str(caught.value)


def steps(directory: Path, batch: dict[str, np.ndarray], **overrides):
    """State, and metrics by name, after two steps on one batch without augmentation."""
    still = {
        **dict.fromkeys(("photometric.brightness", "photometric.contrast"), 0.0),
        **dict.fromkeys(("photometric.saturation", "photometric.hue"), 0.0),
        **dict.fromkeys(("photometric.gray_probability", "spectral.equalizer"), 0.0),
        **{"spectral.noise": 0.0, "spectral.mask_mels": 0, "optimizer.name": "sgd"},
        "global_batch_size": len(batch["unreadable"]),
    }
    mesh, init, step = program.build(small_config(directory, **still | overrides))
    state, _ = init(jax.random.key(0))
    jitted = jax.jit(step)
    on_device = to_device_batch(batch, sharding.rows_sharding(mesh))
    for _ in range(2):
        state, metrics = jitted(state, on_device, jax.random.key(1))
    values = {name: float(value.compute()) for name, value in metrics.items() if value.count > 0}
    return jax.device_get(state), values


@pytest.mark.slow
def test_losses_gradients_and_statistics_are_those_of_the_readable_rows(bad):
    """Whatever an unreadable row holds; and the bank never returns one."""
    batch = batches(bad, 1)[0]
    lost, rng = batch["unreadable"], np.random.default_rng(0)
    expected, values = steps(bad, {n: v[~lost] for n, v in batch.items()}, **{"bank.size": 0})
    for name in ("order", "video_speed", "audio_speed", "video_direction", "label_motion"):
        batch[name][lost] = 1
    batch["video"][lost] = rng.integers(0, 256, batch["video"][lost].shape)
    batch["spectrogram"][lost] = rng.normal(0, 50, batch["spectrogram"][lost].shape)
    found, metrics = steps(bad, batch, **{"bank.size": 0})
    assert metrics.keys() == values.keys()
    for name, value in values.items():
        assert metrics[name] == pytest.approx(value, rel=2e-4, abs=1e-5), name
    for part in ("params", "batch_stats"):
        close = functools.partial(np.testing.assert_allclose, atol=2e-5)
        jax.tree.map(close, getattr(found, part), getattr(expected, part))
    rows = steps(bad, batch, **{"bank.size": 24})[0].bank.rows
    present = rows.presence > 0
    assert present.sum() == 2 * 9
    assert not {*batch["source_id"][lost]} & {*rows.numbers.source_id[present].tolist()}


def test_the_budget_counts_records_and_not_rows(bad, capsys):
    records = RecordDataset(bad, "train")
    counter = UnreadableRecords(records, budget=3)
    for batch in batches(bad, 4):
        counter.check(batch)
    said = capsys.readouterr().out.splitlines()
    assert counter.count == len(said) == 3
    assert all("made-train.tfrecord-00000-of-00001" in line for line in said)
    assert {line.split("'")[1] for line in said} == {"record 2", "record 5", "record 9"}
    strict = UnreadableRecords(records, budget=2)
    with pytest.raises(RecordError, match=r"number 3 of such records where .* allows 2"):
        strict.check(batches(bad, 1)[0])


@pytest.mark.parametrize("budget", [0, pytest.param(2, marks=pytest.mark.slow), 3])
def test_a_run_stops_or_goes_on_as_its_budget_says(bad, tmp_path, budget):
    workdir = tmp_path / "run"
    options = arguments(bad, workdir, execution__max_bad_records=budget, steps=3)
    output = run(options, code=0 if budget == 3 else 1)
    errors = [line for line in output.splitlines() if "error:" in line]
    assert "Traceback" not in output
    left_out = [line for line in output.splitlines() if "is left out" in line]
    if budget == 3:
        assert not errors
        assert len(left_out) == 3
        last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["unreadable_records"] == 3
        return
    assert len(errors) == 1
    assert "made-train.tfrecord-00000-of-00001" in errors[0]
    assert "prepare this data set again" in errors[0]
    assert len(left_out) == budget
    if budget:
        assert "execution.max_bad_records allows 2" in errors[0]


@pytest.mark.slow
def test_a_process_that_fails_ends_the_other_which_says_why(bad, tmp_path):
    options = [*arguments(bad, tmp_path / "run", steps=3, global_batch_size=12, bank__size=48)]
    processes = start_processes([*options, "--peer_timeout=8"], devices=1)
    outputs = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], outputs
    lines = [line for output in outputs for line in output.splitlines() if "error: " in line]
    assert len(lines) == 2, outputs
    own, told = sorted(lines, key=lambda line: "failed after step 0: " in line)
    assert "prepare this data set again" in own
    assert own.removeprefix("avcl_jax: error: ") in told
    assert "Traceback" not in "".join(outputs)
