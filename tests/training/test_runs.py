"""Whole runs through `avcl_jax.main`: what they leave, and mistakes."""

from __future__ import annotations

import dataclasses
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

from avcl_jax.data.records import RecordError
from avcl_jax.training import step as training_step
from avcl_jax.training.checkpoint import CheckpointError
from avcl_jax.training.loop import pretrain
from avcl_jax.training.objective import total_loss
from avcl_jax.training.run_steps import NonFiniteError
from tests.data.synthetic_records import make_record, write_records
from tests.training.small import (
    arguments,
    one_line,
    run,
    saved_state,
    saved_steps,
    small_config,
)


def test_a_run_leaves_metrics_events_config_and_parameters(whole_run):
    rows = [json.loads(line) for line in (whole_run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert json.loads((whole_run / "config.json").read_text())["seed"] == 0
    for name in (
        *("vv/loss", "va/loss", "aa/loss", "speed_video/accuracy", "order_va/accuracy"),
        *("va/positive_similarity", "va/negative_similarity", "va/bank_negative_similarity"),
        *("va/bank_age_rows", "va/bank_positive_share/speed", "bank/base_rate/direction"),
        *("health/video_embedding_std", "health/gradient_norm", "learning_rate"),
        "data_wait_share",
    ):
        assert np.isfinite(rows[-1][name]), name
    assert list((whole_run / "events").glob("events.out.tfevents.*"))
    assert "video_encoder" in (whole_run / "parameters.txt").read_text()


def test_a_checkpoint_of_another_config_or_of_other_data_is_refused(records, whole_run, tmp_path):
    output = run(arguments(records, whole_run, loss__temperature=0.2, seed=3), code=1)
    line = one_line(output)
    assert "loss.temperature: 0.1 -> 0.2" in line
    assert "seed: 0 -> 3" in line
    assert json.loads((whole_run / "config.json").read_text())["seed"] == 0
    made = [make_record(n, seconds=5.0, side=24) for n in range(1, 25)]
    other = write_records(tmp_path / "other", made)
    line = one_line(run(arguments(other, whole_run), code=1))
    assert "was trained on records made-train" in line


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_checkpoint(records, tmp_path):
    workdir = tmp_path / "nan"
    options = {"optimizer__name": "sgd", "optimizer__learning_rate": 1e17}
    options |= {"optimizer__clip_norm": 0.0, "steps": 8}
    options |= {"execution__log_every": 2, "execution__checkpoint_every": 1}
    line = one_line(run(arguments(records, workdir, **options), code=1))
    assert "not finite between steps" in line
    assert "loss" in line
    kept = sorted(int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*"))
    assert kept
    assert f"checkpoint {kept[-1]} is kept" in line
    for name, values in saved_state(workdir, kept[-1]).items():
        assert np.isfinite(values).all(), name


@pytest.mark.slow
def test_a_gradient_that_is_no_number_stops_a_run_of_finite_loss(records, tmp_path, monkeypatch):
    def with_root_of_zero(outputs, *others, **options):
        loss, metrics = total_loss(outputs, *others, **options)
        return loss + jnp.sqrt(0 * outputs["audio_embeddings"]).sum(), metrics

    monkeypatch.setattr(training_step, "total_loss", with_root_of_zero)
    names = ("audio_encoder_gradient_norm", "gradient_norm", "parameter_norm")
    message = f"steps 1 and 1: {', '.join(f'health/{name}' for name in names)}; no checkpoint"
    with pytest.raises(NonFiniteError, match=message) as caught:
        pretrain(small_config(records), tmp_path)
    assert "--config.execution.on_nan=skip without these batches" in str(caught.value)
    (row,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert row["health/gradient_norm"] == "nan"
    assert np.isfinite([value for name, value in row.items() if name.endswith("loss")]).all()
    assert not saved_steps(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"bank.size": 24}, "must be a multiple of the 16 rows"),
        ({"bank.negative_candidates": 40}, "negative_candidates 40 must be at most bank.size 32"),
        ({"bank.positive_window": 0.5}, "bank.size 32 must be at least 4 times the 16 rows that"),
        ({"model.dtype": "float99"}, "model.dtype 'float99' must be 'float32' or 'bfloat16'"),
        ({"bank.dtype": "int8"}, "bank.dtype 'int8' must be 'float32' or 'bfloat16'"),
        ({"global_batch_size": 32, "bank.size": 64}, "size=16, the largest that fits bank_size 64"),
        (
            {"global_batch_size": 37, "bank.size": 74},
            "global_batch_size=24 and bank_size=96, or",
        ),
        (
            {"global_batch_size": 50, "bank.size": 100, "micro_batches": 25},
            "24 usable records: prepare at least 25 videos, the smallest batch",
        ),
        ({"global_batch_size": 32, "bank.size": 0}, "records: set global_batch_size=24, or prep"),
        ({"global_batch_size": 1}, "use at least 2"),
        ({"model.video.name": "vit"}, "unknown video encoder 'vit'"),
        ({"data.directory": "/nonexistent"}, "/nonexistent"),
        ({"data.split": "validation"}, "no split 'validation', it has"),
        ({"optimizer.name": "adam"}, "unknown optimizer 'adam': use 'adamw' or 'sgd'"),
        ({"optimizer.ema_decay": 1.0}, "optimizer.ema_decay 1.0 must be at least 0 and below 1"),
        ({"optimizer.warmup_steps": 6}, "must be at least 0 and below steps 6"),
        ({"execution.fsdp": 3}, "does not divide the 1 devices"),
        ({"execution.max_bad_records": -1}, "execution.max_bad_records -1 must be at least 0"),
        ({"modalities": "both"}, "modalities 'both' must be"),
        ({"spectrogram.where": "gpu"}, "'gpu' must be 'host' or 'device'"),
        ({"spectrogram.frames": 17}, "choose frames or clip_seconds"),
        ({"crop.min_area": 1.5}, "min_area 1.5 must be above 0 and at most 1"),
    ],
)
def test_mistakes_in_the_config_are_one_clear_error(records, tmp_path, overrides, message):
    workdir = tmp_path / "mistake"
    config = small_config(records, **overrides)
    with pytest.raises((ValueError, RecordError), match=re.escape(message)) as caught:
        pretrain(config, workdir)
    assert "\n" not in str(caught.value)
    assert not (workdir / "checkpoints").exists()


def test_a_store_in_which_checkpoints_cannot_be_saved_is_refused_at_once(records):
    with pytest.raises(CheckpointError, match="cannot be saved in s3://bucket/run: "):
        pretrain(small_config(records), "s3://bucket/run")


@pytest.mark.slow
def test_the_batch_that_is_named_for_three_videos_trains_on_them(tmp_path):
    directory = tmp_path / "three"
    write_records(directory, [make_record(n, seconds=8.0, side=64) for n in range(3)])
    workdir = tmp_path / "run"
    command = ["--config=configs/pretrain.py:records", f"--config.data.directory={directory}"]
    line = one_line(run([*command, f"--workdir={workdir}"], code=1))
    named = re.search(
        r"3 usable records: set global_batch_size=(2), the largest that fits bank_size (256)", line
    )
    assert named, line
    batch, bank = named.groups()
    output = run(arguments(directory, workdir, global_batch_size=batch, bank__size=bank, steps=2))
    assert "demo: 3 videos" in output
    assert "bank 256 rows (never used: it starts after step 64), steps 0 to 2" in output
    assert "trained to step 2" in output


@pytest.mark.parametrize(
    ("kind", "overrides", "message"),
    [
        ("missing", {}, "does not exist: give the --out of `avcl-data prepare`"),
        ("file", {}, "is a file, not a directory: give the --out"),
        ("empty", {}, "is not a finished data set (dataset_info.json is missing): give the --out"),
        ("no_audio", {}, "has audio on which a view fits: set --config.modalities=video"),
        ("no_video", {}, "has video on which a view fits: set --config.modalities=audio"),
        ("no_audio", {"modalities": "audio"}, "has audio that is not silent: set modalities to wh"),
        ("silent", {"modalities": "audio"}, "has audio that is not silent: set modalities to wha"),
        ("no_video", {"modalities": "video"}, "has video: set modalities to what the records have"),
        ("good", {"views.clip_seconds": 60.0}, "for a view of 60 s (clip_seconds=60 at speed"),
        ("good", {"views.speeds": (32, 64)}, "for a view of 16 s (clip_seconds=0.5 at speed"),
        ("good", {"views.num_frames": 400}, "has video on which a view fits"),
        ("good", {"bank.health_labels": ("colour",)}, "bank.health_labels 'colour' is not a label"),
        ("speed", {"bank.health_labels": ("speed",)}, "bank.health_labels 'speed' would share its"),
    ],
)
def test_data_that_cannot_be_trained_on_is_one_clear_error(tmp_path, kind, overrides, message):
    directory = tmp_path / kind
    if kind == "empty":
        directory.mkdir()
    elif kind == "file":
        directory.write_text("not a directory")
    elif kind != "missing":
        has = {"has_audio": kind != "no_audio", "has_video": kind != "no_video"}
        made = [make_record(n, seconds=5.0, side=24, **has) for n in range(8)]
        if kind == "speed":
            made = [dataclasses.replace(r, labels={"speed": n % 5}) for n, r in enumerate(made)]
        if kind == "silent":
            made = [dataclasses.replace(r, waveform=np.zeros_like(r.waveform)) for r in made]
        write_records(directory, made)
    workdir = tmp_path / "run"
    with pytest.raises((ValueError, RecordError), match=re.escape(message)) as caught:
        pretrain(small_config(directory, **overrides), workdir)
    assert "\n" not in str(caught.value)
    assert not workdir.exists()
