"""The task `evaluate` on a tiny run: every key of results.json, and a page that shows it."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest

from avcl_jax import experiment
from avcl_jax.data.records import RecordDataset
from avcl_jax.evaluation.evaluate import evaluate
from avcl_jax.evaluation.linear_probe import run_linear_probe
from avcl_jax.evaluation.protocol import OUTCOMES, read_outcomes
from avcl_jax.export import export_run, load_encoder
from configs import linear_probe
from tests.evaluation.conftest import small_config


@pytest.fixture(scope="module")
def results(small_run):
    config, workdir, _ = small_run
    evaluate(config, workdir)
    return json.loads((workdir / "results.json").read_text())


def test_views_that_form_no_pairs_are_refused_before_any_work(small_run, tmp_path):
    config = small_run[0].copy_and_resolve_references()
    config.evaluation.speeds = (1, 2, 4)
    with pytest.raises(ValueError, match="3 views of each video do not form pairs"):
        evaluate(config, tmp_path)  # where no run is, so that only the first check can speak


def test_too_few_labelled_videos_are_refused_before_any_work(small_run, tmp_path, monkeypatch):
    config, workdir, _ = small_run
    shutil.copytree(workdir, tmp_path / "run")
    monkeypatch.setattr(RecordDataset, "__getitem__", None)  # no record is read
    config = config.copy_and_resolve_references()
    config.evaluation.probe.folds = 25
    with pytest.raises(ValueError, match="25 folds need as many training sources, got 24"):
        evaluate(config, tmp_path / "run")
    config.evaluation.test_split = "null_test"
    with pytest.raises(ValueError, match=r"no record of .*null_test.* has a known 'motion'"):
        evaluate(config, tmp_path / "run")


def test_results_have_every_key_of_the_issue_and_fractions(results):
    for probe in ("motion_from_video", "material_from_audio"):
        scores = results["probe"][probe]
        for name in ("random", "pretrained", "supervised", "chance"):
            assert 0 <= scores[name] <= 1
        gap = scores["supervised"] - scores["random"]
        if gap > 0:
            closed = (scores["pretrained"] - scores["random"]) / gap
            assert scores["gap_closed"] == pytest.approx(closed)
        else:
            assert scores["gap_closed"] is None
        for statistic in ("mean_colour", "mean_loudness", "mean_log_mel", "position_histogram"):
            assert 0 <= results["trivial"][probe][statistic] <= 1
    for direction in ("audio_to_video", "video_to_audio"):
        scores = results["retrieval"][direction]
        assert scores["chance"] == 1 / 16
        assert 0 <= scores["r1"] <= scores["r5"] <= 1
        assert 1 <= scores["median_rank"] <= 16
    tasks = {"speed": 3, "direction": 2, "order": 3}
    for name in ("speed_video", "speed_audio", "direction_video", "direction_audio"):
        assert 0 <= results["temporal"][name]["null_accuracy"] <= 1
    for name, scores in results["temporal"].items():
        classes = tasks[name.split("_")[0]]
        confusion = np.array(scores["confusion"])
        assert confusion.shape == (classes, classes)
        assert scores["chance"] == pytest.approx(1 / classes)
        assert scores["accuracy"] == pytest.approx(np.trace(confusion) / confusion.sum())
    assert set(results["temporal"]) >= {"order_vv", "order_aa", "order_va"}
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
    run, workdir, _ = small_run
    config = linear_probe.get_config(preset)
    with config.unlocked():
        config.encoder = str(workdir)
        config.data.update({"directory": str(small_records), "make_demo": False})
        config.features.update({"speeds": (1, 2), "clips": 1})
        config.probe = run.evaluation.probe
        config.bootstrap.resamples = 20
    alone = run_linear_probe(config, tmp_path)
    chosen = alone["details"]["splits"][0]["chosen"]
    ours, theirs = (read_outcomes(directory / OUTCOMES).values for directory in (tmp_path, workdir))
    for network, suffix, name in (("pretrained", "", "encoder"), ("random", "_random", "random")):
        assert alone["metrics"][f"top1{suffix}"]["value"] == results["probe"][probe][network]
        np.testing.assert_array_equal(ours[f"top1{suffix}"], theirs[f"correct_{probe}_{network}"])
        assert chosen[name]["cost"] == results["details"]["probe_costs"][probe][network]


def test_the_page_shows_the_run(small_run, results):
    page = (small_run[1] / "report.html").read_text()
    for text in ("What was learned from demo", "Finding the other half", "Nearest neighbours"):
        assert text in page
    assert page.count("data:image/jpeg;base64,") == 2 * 4 * 3
    assert "picture–sound" in page
    assert "Playback speed (1×, 2×, 4×)," in page
    assert not [path.name for path in small_run[1].iterdir() if path.name.endswith(".writing")]


def test_exported_encoders_compute_what_the_run_computes(small_run):
    config, workdir, state = small_run
    exported = export_run(config, workdir)
    assert set(exported) == {"video", "audio"}
    encoder = load_encoder(workdir / "export" / "video")
    frames = np.random.default_rng(0).integers(0, 256, size=(8, 16, 16, 3), dtype=np.uint8)
    clips = encoder.preprocess(frames, 16.0)
    variables = {
        "params": state.params["video_encoder"],
        "batch_stats": state.batch_stats["video_encoder"],
    }
    pixels = (clips.astype(np.float32) / 255 - config.pixels.mean) / config.pixels.std
    module = experiment.video_encoder(config)
    apply = jax.jit(module.apply, static_argnames="train")
    expected = apply(variables, jax.numpy.asarray(pixels), train=False)["features"]
    np.testing.assert_allclose(encoder(frames, 16.0), expected, atol=1e-6)
    assert encoder.config["source"]["step"] == 0


def test_what_does_not_fit_the_run_is_refused(small_run, small_records):
    _, workdir, _ = small_run
    config = small_config(small_records)
    config.model.video.widths = (16,)
    with pytest.raises(ValueError, match=r"other settings: model\.video\.widths"):
        evaluate(config, workdir)
    config = small_config(small_records)
    config.evaluation.probes = (("colour", "video"),)
    with pytest.raises(ValueError, match=r"no label 'colour', it has \['material', 'motion'\]"):
        evaluate(config, workdir)
    with pytest.raises(ValueError, match=r"holds no run \(config\.json is missing\)"):
        evaluate(config, workdir / "elsewhere")
