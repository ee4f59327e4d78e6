"""What the evaluation of a run says of each record, and its metrics, against what it measured."""

from __future__ import annotations

import json

import numpy as np
import pytest

from avcl_jax.data.selection import SelectedRecords
from avcl_jax.errors import UserError
from avcl_jax.evaluation.compare import compare_runs, read_run
from avcl_jax.evaluation.evaluate import evaluate, run_outcomes
from avcl_jax.evaluation.linear import ProbeResult
from avcl_jax.evaluation.protocol import Measured, estimate, read_outcomes
from avcl_jax.evaluation.retrieval import RetrievalScores
from tests.evaluation.conftest import small_evaluation


@pytest.fixture(scope="module")
def results(small_run):
    evaluate(small_evaluation(), small_run[1])
    return json.loads((small_run[1] / "results.json").read_text())


class _Five(SelectedRecords):
    """A picture, a sound, and three records of both."""

    record_ids = ("picture", "sound", "both0", "both1", "both2")
    sources = ("s0", "s1", "s2", "s3", "s3")

    def __init__(self):
        self.indices = np.arange(5)

    def __len__(self):
        return 5


HAS_VIDEO = np.array([1, 0, 1, 1, 1], bool)
HAS_AUDIO = np.array([0, 1, 1, 1, 1], bool)


def _probe(known, correct, chance=0.25):
    confusion = np.zeros((4, 4), int)
    return ProbeResult(
        float(np.mean(correct)),
        chance,
        1.0,
        confusion,
        np.array(known, bool),
        np.array(correct),
    )


def _figures(probes, ranked):
    features = {"has_video": HAS_VIDEO, "has_audio": HAS_AUDIO}
    outcomes, metrics = run_outcomes(_Five(), features, probes, ranked, {})
    found = estimate(Measured(outcomes, metrics, details={}, sections=()), resamples=50, seed=0)
    return outcomes, {name: (figure["value"], figure["chance"]) for name, figure in found.items()}


def test_a_probe_is_about_the_records_that_have_its_modality_and_a_label():
    # The sound, then three of both; the label of both1 is unknown.
    known = [1, 1, 0, 1]
    networks = {
        "random": _probe(known, [0.0, 1.0, 0.0]),
        "pretrained": _probe(known, [1.0, 1.0, 0.0]),
        "supervised": _probe(known, [1.0, 1.0, 1.0]),
    }
    outcomes, figures = _figures({"material_from_audio": networks}, {})
    np.testing.assert_array_equal(outcomes.values["known_material_from_audio"], [0, 1, 1, 0, 1])
    np.testing.assert_array_equal(
        outcomes.values["correct_material_from_audio_pretrained"], [0, 1, 1, 0, 0]
    )
    assert figures["material_from_audio_random"] == pytest.approx((1 / 3, 0.25))
    assert figures["material_from_audio_pretrained"] == pytest.approx((2 / 3, 0.25))
    assert figures["material_from_audio_gap_closed"][0] == pytest.approx(0.5)
    # Without a supervised network there is no gap to close a share of.
    del networks["supervised"]
    assert set(_figures({"material_from_audio": networks}, {})[1]) == {
        "material_from_audio_random",
        "material_from_audio_pretrained",
    }


def test_retrieval_is_about_the_records_of_both_modalities():
    ranked = RetrievalScores(np.array([1, 3, 1]), 3, {1: 1 / 3})
    outcomes, figures = _figures({}, {"audio_to_video": ranked})
    np.testing.assert_array_equal(outcomes.values["hit1_audio_to_video"], [0, 0, 1, 0, 1])
    assert figures["audio_to_video_r1"] == pytest.approx((2 / 3, 1 / 3))
    assert figures["audio_to_video_median_rank"] == (1.0, 2.0)


def test_metrics_are_the_figures_of_the_sections(results):
    metrics = {name: figure["value"] for name, figure in results["metrics"].items()}
    expected = {}
    for probe, scores in results["probe"].items():
        expected |= {
            f"{probe}_{name}": scores[name]
            for name in ("random", "pretrained", "supervised", "gap_closed")
        }
    for direction, scores in results["retrieval"].items():
        ks = [k for k in (1, 5, 10, 20, 50) if f"r{k}" in scores]
        expected |= {f"{direction}_r{k}": scores[f"r{k}"] for k in ks}
        expected[f"{direction}_median_rank"] = scores["median_rank"]
    expected |= {task: scores["accuracy"] for task, scores in results["temporal"].items()}
    assert metrics == pytest.approx(expected, nan_ok=False)
    for figure in results["metrics"].values():
        if figure["value"] is not None:
            assert figure["low"] <= figure["value"] <= figure["high"]


def test_outcomes_are_by_test_record(small_run, results):
    outcomes = read_outcomes(small_run[1] / "outcomes.npz")
    assert len(outcomes.units) == results["units"] == 16
    confusion = np.array(results["temporal"]["speed_audio"]["confusion"])
    assert outcomes.values["scored_speed_audio"].sum() == confusion.sum()
    assert outcomes.values["correct_speed_audio"].sum() == np.trace(confusion)


def test_the_run_is_compared_with_itself_and_tells_no_difference(small_run, results):
    run = read_run(small_run[1])
    compared = compare_runs([run, run], resamples=20, seed=0, other_data=False)
    defined = {name for name, f in results["metrics"].items() if f["value"] is not None}
    assert defined <= set(compared)
    assert all(compared[name][0].difference.value == 0 for name in defined)


def test_records_that_were_pretrained_on_are_no_test(small_run):
    config = small_evaluation()
    config.evaluation.test_split = config.evaluation.train_split
    with pytest.raises(UserError, match="test records"):
        evaluate(config, small_run[1])
