"""Metrics of several splits: means over splits, not over records."""

from __future__ import annotations

import json

import numpy as np
import pytest
from etils import epath
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from avcl_jax.data.clips import ClipRecords, VideoClipSpec
from avcl_jax.data.records import RecordDataset
from avcl_jax.data.selection import Selection
from avcl_jax.evaluation.driver import Context
from avcl_jax.evaluation.finetune import measured, protocol_of
from avcl_jax.evaluation.splits import Split
from avcl_jax.export.runs import EncoderSource
from tests.evaluation.labelled import toy_config, write_labelled


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return write_labelled(tmp_path_factory.mktemp("recognition") / "records")


ENCODER = EncoderSource("runs/demo", {}, "12ab", 7, None)


def make_splits(records, directory, classes=None):
    """Two splits, their probabilities and a directory with lines of their training."""
    spec = object.__new__(VideoClipSpec)  # no clip is rendered
    data = RecordDataset(records, "all")
    if classes is not None:
        data.class_names = data.class_names | {"class": classes}
    rng = np.random.default_rng(0)
    splits, probabilities = [], {}
    for number in (1, 2):
        train, test = (
            ClipRecords(data, Selection.parse(f"split{number}={part}"), spec, ("class",))
            for part in ("train", "test")
        )
        name = f"split{number}"
        rows = [
            {"step": s, "loss": 1 / s, "accuracy": 0.1 * s, "train_seconds": s} for s in (1, 2, 3)
        ]
        (directory / name).mkdir()
        (directory / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
        logits = rng.normal(size=(len(test), len(data.class_names["class"])))
        logits[np.arange(len(test)), test.classes_of("class")] += (
            number  # the second split is easier
        )
        splits.append(Split(name, ENCODER, test, train))
        probabilities[name] = np.exp(logits)
    return splits, probabilities


def test_metrics_are_means_over_splits(records, tmp_path):
    splits, probabilities = make_splits(records, tmp_path)
    assert len(splits[0].test) != len(splits[1].test)
    config = toy_config(records, "nowhere")
    run = Context(
        protocol_of(config), config, epath.Path(tmp_path / "out"), ENCODER, {"train": "a"}
    )
    results = run.write(
        measured(config, splits, list(probabilities.values()), epath.Path(tmp_path))
    )
    truth = {split.name: split.test.classes_of("class") for split in splits}
    predicted = {name: values.argmax(axis=1) for name, values in probabilities.items()}
    top1 = [np.mean(predicted[name] == truth[name]) for name in truth]
    balanced = [balanced_accuracy_score(truth[name], predicted[name]) for name in truth]
    metrics = results["metrics"]
    assert metrics["top1"]["value"] == pytest.approx(np.mean(top1))
    assert metrics["mean_class_accuracy"]["value"] == pytest.approx(np.mean(balanced))
    assert "top5" not in metrics  # of three classes
    described = results["details"]["splits"]
    assert [entry["top1"] for entry in described] == pytest.approx(top1)
    assert described[0]["sources_in_both"] == len(
        {i // 2 for i in splits[0].train.indices} & {i // 2 for i in splits[0].test.indices}
    )
    assert metrics["top1"]["low"] < np.mean(top1) < metrics["top1"]["high"]
    assert results["sources"] < results["units"]


def test_top_5_is_that_of_scikit_learn(records, tmp_path):
    splits, probabilities = make_splits(records, tmp_path, [f"class {n}" for n in range(40)])
    config = toy_config(records, "nowhere")
    found = measured(config, splits, list(probabilities.values()), epath.Path(tmp_path))
    hits, number = found.outcomes.values["top5"], found.outcomes.values["split"]
    for place, split in enumerate(splits):
        expected = top_k_accuracy_score(
            split.test.classes_of("class"), probabilities[split.name], k=5, labels=np.arange(40)
        )
        assert hits[number == place].mean() == pytest.approx(expected)
    assert found.metrics["top5"].chance == pytest.approx(5 / 40)
    assert any("taken for" in html for html in found.sections)
    assert "confusion" not in found.details
