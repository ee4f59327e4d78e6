"""The tasks that need a run's heads: audio-video retrieval and temporal tasks."""

from __future__ import annotations

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from avcl_jax import experiment
from avcl_jax.configs import cross_modal, temporal
from avcl_jax.errors import UserError
from avcl_jax.evaluation.protocol import OUTCOMES, read_outcomes
from avcl_jax.evaluation.retrieval import audio_video_retrieval
from avcl_jax.evaluation.temporal import temporal_tasks
from avcl_jax.export import ExportError
from avcl_jax.export.runs import load_run, open_encoders
from avcl_jax.objectives.temporal import TASKS
from avcl_jax.training.checkpoint import Checkpoints, Progress
from tests.evaluation.conftest import CLASS_NAMES, small_record, write_records

both_protocols = pytest.mark.parametrize("protocol", [audio_video_retrieval, temporal_tasks])


def _config(protocol, records, small_run, **overrides):
    """A small config of the protocol; `**{"a.b": 1}` overrides `config.a.b`."""
    module, settings = cross_modal, {"features.speeds": (1, 2), "features.clips": 2}
    if protocol is temporal_tasks:
        module, settings = temporal, {"evaluation.pairs_per_video": 6}
    c = module.get_config("demo")
    given = {"encoder": str(small_run[1]), "data.directory": str(records)}
    given |= {"bootstrap.resamples": 20, "execution.part_records": 10}
    with c.unlocked():
        c.update_from_flattened_dict(given | settings | overrides)
    return c


@both_protocols
def test_one_command_repeats_and_a_run_of_other_heads_is_another_run(
    small_records, small_run, tmp_path, protocol
):
    config = _config(protocol, small_records, small_run)
    first = protocol(config, tmp_path / "out")
    again = protocol(config, tmp_path / "again")
    assert (first["metrics"], first["details"]) == (again["metrics"], again["details"])
    encoders, state = small_run[1], small_run[2]
    params = {
        name: tree if "encoder" in name else jax.tree.map(lambda leaf: leaf + 0.5, tree)
        for name, tree in state.params.items()
    }
    with Checkpoints(tmp_path / "run", keep=1) as manager:
        manager.save(state.replace(params=params), Progress(0, 1.0, "small-train-24-aa", 1))
    (tmp_path / "run" / "config.json").write_text((encoders / "config.json").read_text())
    config.encoder = str(tmp_path / "run")
    with pytest.raises(UserError, match="holds results of this protocol with another encoder"):
        protocol(config, tmp_path / "out")
    (tmp_path / "out" / "results.json").unlink()  # the parts of the first run are still there
    second = protocol(config, tmp_path / "out")
    assert second["encoder"]["fingerprint"] == first["encoder"]["fingerprint"]
    assert second["encoder"]["heads"] != first["encoder"]["heads"]
    parts = {path.parent.name for path in (tmp_path / "out" / "features").rglob("*.npz")}
    assert len(parts) == 2


def test_audio_video_retrieval_ranks_the_halves_of_all_records(small_records, small_run, tmp_path):
    config = _config(audio_video_retrieval, small_records, small_run)
    config.features.update({"speeds": (1,), "clips": 3})  # one of the views has no partner
    results = audio_video_retrieval(config, tmp_path)
    metrics = results["metrics"]
    assert set(metrics) == {
        f"{way}_{name}"
        for way in ("audio_to_video", "video_to_audio")
        for name in ("r1", "r5", "r10", "median_rank")
    }
    assert metrics["audio_to_video_r1"]["chance"] == 1 / 16
    assert results["details"]["gallery"] == 16
    ranks = read_outcomes(tmp_path / OUTCOMES).values["rank_audio_to_video"]
    assert metrics["audio_to_video_median_rank"]["value"] == np.median(ranks)
    assert 1 <= ranks.min() <= ranks.max() <= 16


def test_temporal_tasks_have_confusion_matrices(small_records, small_run, tmp_path):
    results = temporal_tasks(_config(temporal_tasks, small_records, small_run), tmp_path)
    assert set(results["metrics"]) == set(TASKS)
    for name, metric in results["metrics"].items():
        confusion = np.array(results["details"]["confusion"][name])
        assert len(set(confusion.sum(axis=1))) == 1  # every class equally often
        assert metric["value"] == pytest.approx(np.trace(confusion) / confusion.sum())
        assert metric["chance"] == pytest.approx(1 / len(confusion))
        assert metric["low"] <= metric["value"] <= metric["high"]
    assert "order, video-audio" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"encoder": "."}, "lacks the heads"),
        ({"features.speeds": (1, 3)}, r"features.speeds 3 were not trained"),
        ({"evaluation.recall_at": (0, 5)}, r"evaluation.recall_at \(0, 5\) must be whole"),
        (
            {"data.directory": "FOLDS", "data.split": "all", "data.leave_out": True},
            r"no record of .* has both video and audio",
        ),
    ],
)
def test_audio_video_retrieval_says_what_it_needs(
    small_records, fold_records, small_run, tmp_path, overrides, message
):
    overrides = {k: str(fold_records) if v == "FOLDS" else v for k, v in overrides.items()}
    config = _config(audio_video_retrieval, small_records, small_run, **overrides)
    with pytest.raises((UserError, ExportError), match=message):
        audio_video_retrieval(config, tmp_path / "w")


@both_protocols
def test_a_run_from_before_a_task_is_refused_in_one_line(
    small_records, small_run, tmp_path, protocol, monkeypatch
):
    task = dataclasses.replace(TASKS["order_va"], kind="pace")
    monkeypatch.setitem(TASKS, "pace_va", task)  # the model has a head for it, the run has not
    known = "speed_video, .*, order_va, and lacks pace_va: pretrain again"
    with pytest.raises(UserError, match=rf"has heads of the temporal tasks {known}"):
        protocol(_config(protocol, small_records, small_run), tmp_path / "w")
    assert not (tmp_path / "w").exists()


@pytest.fixture(scope="module")
def mixed_records(tmp_path_factory):
    """Three records with both, one without audio, one too short for any view."""
    whole = [small_record("test", number) for number in range(5)]
    silent = {"record_id": "silent", "waveform": np.empty(0, np.int16), "sample_rate_hz": 0}
    short = {
        "record_id": "short",
        "frames": whole[4].frames[:2],
        "frame_seconds": whole[4].frame_seconds[:2],
        "waveform": whole[4].waveform[:400],
        "duration_seconds": 0.1,
    }
    whole[3] = dataclasses.replace(whole[3], **silent)
    whole[4] = dataclasses.replace(whole[4], **short)
    return write_records(tmp_path_factory.mktemp("mixed"), "mixed", CLASS_NAMES, {"test": whole})


@both_protocols
def test_a_record_without_audio_stops_unless_left_out(mixed_records, small_run, tmp_path, protocol):
    config = _config(protocol, mixed_records, small_run)
    with pytest.raises(
        UserError, match=r"2 of the 5 records .* lack video or audio .* first 'silent': set"
    ) as error:
        protocol(config, tmp_path / "w")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "w").exists()
    config.data.leave_out = True
    details = protocol(config, tmp_path / "w")["details"]
    if protocol is audio_video_retrieval:
        assert (details["gallery"], details["left_out"]) == (3, 2)
    else:
        assert (details["incomplete"], details["too_short"]) == (1, 1)
        assert details["views_scored"]["direction_video"] > 0


@pytest.mark.parametrize("given", ["runs/demo", "~/runs/demo"])
def test_a_run_is_opened_by_a_path_as_a_person_writes_it(small_run, tmp_path, monkeypatch, given):
    shutil.copytree(small_run[1], tmp_path / "runs" / "demo")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    config, variables, step = load_run(given)
    assert (config.task, step) == (experiment.PRETRAIN, 0)
    assert variables["params"]
    assert open_encoders(given).path == f"{tmp_path}/runs/demo"
