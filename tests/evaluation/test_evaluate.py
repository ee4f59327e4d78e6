"""The task `evaluate` on a tiny run: every key of results.json, and a page that shows it."""

from __future__ import annotations

import json
import shutil
from unittest.mock import ANY

import jax
import numpy as np
import pytest
import yaml

from avcl_jax import experiment
from avcl_jax.configs import evaluate as evaluate_config
from avcl_jax.configs import export, linear_probe
from avcl_jax.data.records import RecordDataset
from avcl_jax.errors import UserError
from avcl_jax.evaluation.classification import run_linear_probe
from avcl_jax.evaluation.compare import compare_runs, read_run
from avcl_jax.evaluation.evaluate import evaluate, open_evaluation_records
from avcl_jax.evaluation.protocol import OUTCOMES, read_outcomes
from avcl_jax.export import load_encoder
from avcl_jax.export.runs import config_of_run, export_run
from avcl_jax.objectives.temporal import TASKS
from tests.evaluation.conftest import small_config, small_evaluation, untrained_run


@pytest.fixture(scope="module")
def results(small_run):
    evaluate(small_evaluation(), small_run[1])
    return json.loads((small_run[1] / "results.json").read_text())


# What a person sets, and what is said of it before the first record is read.
REFUSED = {
    r"speeds 3 were not trained, these were: 1, 2, 4": {"evaluation.speeds": (1, 3)},
    r"recall_at \(0, 5\) must be whole numbers": {"evaluation.recall_at": (0, 5)},
    "25 folds need as many training sources, got 24": {"evaluation.probe.folds": 25},
    "no record of .*null_test.* with video and a known 'motion'": {
        "evaluation.test_split": "null_test"
    },
    r"probes asks for 'colour' from video, but .* has the labels material, motion": {
        "evaluation.probes": (("colour", "video"),)
    },
    "'motion' from picture: modality must be": {"evaluation.probes": (("motion", "picture"),)},
    "'motion' from video more than once": {"evaluation.probes": (("motion", "video"),) * 2},
    r"no split 'validation', it has .*test_split": {"evaluation.test_split": "validation"},
    r"no split 'noise', it has .*null.train_split": {"evaluation.null.train_split": "noise"},
    "24 records .* do not fill a batch of 32: set .*supervised.audio": {
        "evaluation.supervised.audio.fit.batch_size": 32
    },
    "60 views .* do not fill a batch of 99: set .*null": {"evaluation.null.fit.batch_size": 99},
    "no records at .*nowhere: set --config.data.directory": {"data.directory": "nowhere"},
    r"cannot select fold=1: .* has the labels": {"evaluation.test_select": "fold=1"},
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_does_not_fit_is_refused_before_any_work(small_run, tmp_path, monkeypatch, said):
    shutil.copytree(small_run[1], tmp_path / "run")
    monkeypatch.setattr(RecordDataset, "__getitem__", None)
    monkeypatch.setattr("avcl_jax.evaluation.views.load_run", None)  # reads the weights
    config = small_evaluation()
    config.update_from_flattened_dict(REFUSED[said])
    with pytest.raises(ValueError, match=said) as error:
        evaluate(config, tmp_path / "run")
    assert "\n" not in str(error.value)


def test_records_that_fill_one_batch_suffice_for_bounds_and_null_controls(small_run):
    config = small_evaluation()
    for modality in ("video", "audio"):
        config.evaluation.supervised[modality].fit.batch_size = 24
    config.evaluation.null.fit.batch_size = 60
    run = config_of_run(small_run[1])
    merged, records = open_evaluation_records(run, config, small_run[1])
    lengths = {"test": 16, "train": 24, "null.train": 10, "null.test": 10}
    assert {role: len(side) for role, side in records.items()} == lengths
    assert (merged.evaluation.speeds, merged.steps) == ((1, 2), run.steps)
    config.evaluation.probes, config.evaluation.null.train_split = (), ""
    config.evaluation.speeds = ()
    config.evaluation.clips = 2
    merged, records = open_evaluation_records(run, config, small_run[1])
    assert records.keys() == {"test"}
    assert merged.evaluation.speeds == (1, 2, 4)  # all that it trained


def test_a_directory_without_a_run_or_that_cannot_be_written_is_refused(small_run, tmp_path):
    with pytest.raises(ValueError, match="does not contain a pretraining run"):
        evaluate(small_evaluation(), tmp_path)
    with pytest.raises(ValueError, match="does not contain a pretraining run"):
        export_run(export.get_config(), tmp_path)
    shutil.copytree(small_run[1], tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink(missing_ok=True)
    (tmp_path / "run" / "results.json.trial").mkdir()
    with pytest.raises(UserError, match=r"run cannot be written to .*: choose another --work"):
        evaluate(small_evaluation(), tmp_path / "run")


def test_each_probe_of_a_modality_is_bounded_by_its_own_supervised_encoder(
    small_run, results, tmp_path
):
    shutil.copytree(small_run[1], tmp_path / "run")
    config = small_evaluation()
    config.evaluation.probes = (("material", "video"), ("motion", "video"), ("material", "audio"))
    config.evaluation.null.train_split = ""
    ours = evaluate(config, tmp_path / "run")
    assert set(ours["supervised"]) == {
        "material_from_video",
        "motion_from_video",
        "material_from_audio",
    }
    first, second = (ours["supervised"][f"{name}_from_video"] for name in ("material", "motion"))
    assert first != second
    for probe in ("motion_from_video", "material_from_audio"):
        assert ours["supervised"][probe] == results["supervised"][probe]
        assert ours["probe"][probe] == results["probe"][probe]


def test_an_interrupted_evaluation_resumes_from_its_parts(
    small_run, results, tmp_path, monkeypatch
):
    shutil.copytree(small_run[1], tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    monkeypatch.setattr("avcl_jax.evaluation.views.fixed_views", None)
    monkeypatch.setattr("avcl_jax.evaluation.temporal.drawn_pairs", None)
    config = small_evaluation()
    config.data.directory = ""  # that of the run
    again = evaluate(config, tmp_path / "run")
    assert again["metrics"] == results["metrics"]


def test_a_run_of_other_speeds_is_evaluated_by_the_general_preset(small_records, tmp_path):
    config = small_config(small_records)
    config.views.speeds = (2, 3)
    workdir = untrained_run(config, small_records, tmp_path / "run")
    (workdir / "metrics.jsonl").unlink()
    general = evaluate_config.get_config()
    general.evaluation.update({"clips": 2, "pairs_per_video": 4})
    found = evaluate(general, workdir)
    assert found["config"]["evaluation"]["speeds"] == [2, 3]
    assert found["probe"] == {}
    assert set(found["temporal"]) == set(TASKS)
    assert found["data"].keys() == {"test"}
    page = (workdir / "report.html").read_text()
    assert "<h2>Training</h2>" not in page
    assert "Temporal tasks" in page


def test_promised_keys_are_a_view_of_the_metrics(results):
    """Values under the keys `probe`, `retrieval` and `temporal` are those of the metrics."""
    metrics = {name: metric["value"] for name, metric in results["metrics"].items()}
    expected = {}
    for probe in ("motion_from_video", "material_from_audio"):
        scores = results["probe"][probe]
        networks = ("random", "pretrained", "supervised")
        assert all(0 <= scores[name] <= 1 for name in (*networks, "chance"))
        gap = scores["supervised"] - scores["random"]
        closed = (scores["pretrained"] - scores["random"]) / gap if gap > 0 else None
        assert scores["gap_closed"] == (closed if closed is None else pytest.approx(closed))
        expected |= {f"{probe}_{name}": scores[name] for name in (*networks, "gap_closed")}
        for statistic in ("mean_colour", "mean_loudness", "mean_log_mel", "position_histogram"):
            assert 0 <= results["trivial"][probe][statistic] <= 1
    for direction in ("audio_to_video", "video_to_audio"):
        scores = results["retrieval"][direction]
        assert (scores["chance"], scores["chance_r5"]) == (1 / 16, 5 / 16)
        assert scores["chance_median_rank"] == 8.5
        assert scores["queries"] == scores["gallery"] == 16
        assert 0 <= scores["r1"] <= scores["r5"] <= scores["r10"] <= 1
        assert 1 <= scores["median_rank"] <= 16
        keys = ("r1", "r5", "r10", "median_rank")
        expected |= {f"{direction}_{key}": scores[key] for key in keys}
    classes = {"speed": 3, "direction": 2, "order": 3}
    for name, scores in results["temporal"].items():
        count = classes[name.split("_")[0]]
        confusion = np.array(scores["confusion"])
        assert confusion.shape == (count, count)
        assert scores["chance"] == pytest.approx(1 / count)
        assert scores["accuracy"] == pytest.approx(np.trace(confusion) / confusion.sum())
        if len(TASKS[name].reads) == 1:
            assert 0 <= scores["null_accuracy"] <= 1
        expected[name] = scores["accuracy"]
    assert set(results["temporal"]) == set(TASKS)
    assert metrics == pytest.approx(expected)
    for metric in results["metrics"].values():
        if metric["value"] is not None:
            assert metric["low"] <= metric["value"] <= metric["high"]
    assert results["seed"] == 0
    assert results["train_seconds"] == 12.5
    assert results["total_seconds"] == pytest.approx(12.5 + results["evaluation_seconds"], abs=0.2)
    assert results["peak_memory_gb"] == 99.0
    assert results["versions"]["jax"] == jax.__version__


def test_material_is_read_where_its_mean_spectrum_gives_it_away(results):
    # The small data set tells its two materials by pitch: a probe that missed that is broken.
    assert results["trivial"]["material_from_audio"]["mean_log_mel"] == 1.0
    assert results["trivial"]["motion_from_video"]["mean_loudness"] < 0.9


@pytest.mark.parametrize(
    ("preset", "probe"), [("demo", "motion_from_video"), ("demo_audio", "material_from_audio")]
)
def test_the_linear_probe_is_one_number_whichever_command_gives_it(
    small_run, small_records, results, tmp_path, preset, probe
):
    workdir = small_run[1]
    config = linear_probe.get_config(preset)
    with config.unlocked():
        config.encoder = str(workdir)
        config.data.directory = str(small_records)
        config.features.update({"speeds": (1, 2), "clips": 1})
        config.probe.update(small_evaluation().evaluation.probe)
        config.bootstrap.resamples = 20
    alone = run_linear_probe(config, tmp_path)
    chosen = alone["details"]["splits"][0]["chosen"]
    ours, theirs = (read_outcomes(directory / OUTCOMES).values for directory in (tmp_path, workdir))
    for network, suffix, name in (("pretrained", "", "encoder"), ("random", "_random", "random")):
        assert alone["metrics"][f"top1{suffix}"]["value"] == results["probe"][probe][network]
        np.testing.assert_array_equal(ours[f"top1{suffix}"], theirs[f"correct_{probe}_{network}"])
        assert chosen[name]["cost"] == results["details"]["probe_costs"][probe][network]


def test_exported_encoders_compute_what_the_run_computes(small_run):
    config, workdir, state = small_run
    exported = export_run(export.get_config(), workdir)
    assert set(exported) == {"video", "audio"}
    encoder = load_encoder(workdir / "export" / "video")
    frames = np.random.default_rng(0).integers(0, 256, size=(8, 16, 16, 3), dtype=np.uint8)
    clips = encoder.preprocess(frames, 16.0)
    variables = {
        "params": state.params["video_encoder"],
        "batch_stats": state.batch_stats["video_encoder"],
    }
    pixels = (clips.astype(np.float32) / 255 - config.pixels.mean) / config.pixels.std
    module = experiment.encoder(config, "video")
    apply = jax.jit(module.apply, static_argnames="train")
    expected = apply(variables, jax.numpy.asarray(pixels), train=False)["features"]
    np.testing.assert_allclose(encoder(frames, 16.0), expected, atol=1e-6)
    assert encoder.config["source"]["step"] == 0


def test_an_export_has_a_model_card_with_the_results_of_its_weights(small_run, results, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(small_run[1], workdir)
    config = export.get_config()
    config.license = "cc-by-4.0"
    export_run(config, workdir)
    card = (workdir / "export" / "README.md").read_text()
    _, header, body = card.split("---\n", 2)
    header = yaml.safe_load(header)
    assert (header["license"], header["library_name"]) == ("cc-by-4.0", "avcl-jax")
    assert {"video", "audio"} <= set(header["tags"])
    (evaluated,) = header["model-index"][0]["results"]
    assert evaluated["dataset"]["name"] == results["data"]["test"]
    values = {metric["type"]: metric["value"] for metric in evaluated["metrics"]}
    assert values["speed_video"] == round(results["metrics"]["speed_video"]["value"], 4)
    assert "motion_from_video_pretrained" in values
    assert not any(name.endswith(("_random", "_supervised")) for name in values)
    assert "| video | VideoResNet |" in body
    assert "learning_rate" in body
    assert str(workdir) not in card
    # Results of other weights, or none.
    for other in (results | {"encoder": results["encoder"] | {"fingerprint": "12ab"}}, None):
        (workdir / "results.json").unlink()
        if other:
            (workdir / "results.json").write_text(json.dumps(other))
        export_run(config, workdir)
        card = (workdir / "export" / "README.md").read_text()
        assert "model-index" not in card
        assert "Not evaluated." in card


def test_outcomes_are_by_test_record_and_a_run_does_not_differ_from_itself(small_run, results):
    outcomes = read_outcomes(small_run[1] / "outcomes.npz")
    assert len(outcomes.units) == results["units"] == 16
    confusion = np.array(results["temporal"]["speed_audio"]["confusion"])
    assert outcomes.values["scored_speed_audio"].sum() == confusion.sum()
    run = read_run(small_run[1])
    compared = compare_runs([run, run], resamples=20, seed=0, other_data=False)
    for name, metric in results["metrics"].items():
        assert compared[name][0].difference.value == (0 if metric["value"] is not None else ANY)


def test_records_that_were_pretrained_on_are_no_test(small_run):
    config = small_evaluation()
    config.evaluation.test_split = config.evaluation.train_split
    with pytest.raises(UserError, match="test records"):
        evaluate(config, small_run[1])
