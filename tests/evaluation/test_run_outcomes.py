"""What the evaluation of a run says of each record, and its metrics, against what it measured."""

from __future__ import annotations

import json

import numpy as np
import pytest

from avcl_jax.evaluation.compare import compare_runs, read_run
from avcl_jax.evaluation.evaluate import evaluate
from avcl_jax.evaluation.protocol import ProtocolError, read_outcomes


@pytest.fixture(scope="module")
def results(small_run):
    evaluate(*small_run[:2])
    return json.loads((small_run[1] / "results.json").read_text())


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
    config = small_run[0].copy_and_resolve_references()
    config.evaluation.test_split = config.evaluation.train_split
    with pytest.raises(ProtocolError, match="test records"):
        evaluate(config, small_run[1])
