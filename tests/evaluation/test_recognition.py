"""Figures of several splits: means over splits, not over records."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from etils import epath
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from avcl_jax.data.labelled import LabelledRecords, VideoClipSpec
from avcl_jax.data.records import RecordDataset
from avcl_jax.data.selection import Selection
from avcl_jax.encoder_source import EncoderSource
from avcl_jax.evaluation.protocol_run import ProtocolRun
from avcl_jax.evaluation.recognition import Fold, measured, protocol_of
from avcl_jax.evaluation.written import Stages
from tests.evaluation.labelled import NAMES, toy_config, write_labelled


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return write_labelled(tmp_path_factory.mktemp("recognition") / "records")


def make_folds(records, directory, label="class"):
    spec = object.__new__(VideoClipSpec)  # no clip is rendered
    data = RecordDataset(records, "all")
    rng = np.random.default_rng(0)
    encoder = EncoderSource("runs/demo", {}, "12ab", 7, None)
    folds = []
    for number in (1, 2):
        train, test = (
            LabelledRecords(data, Selection.of({f"split{number}": part}), label, spec, False)
            for part in ("train", "test")
        )
        path = directory / f"{number}.jsonl"
        rows = [
            {"step": s, "loss": 1 / s, "accuracy": 0.1 * s, "train_seconds": s} for s in (1, 2, 3)
        ]
        path.write_text("\n".join(map(json.dumps, rows)))
        logits = rng.normal(size=(len(test), len(data.class_names[label])))
        logits[np.arange(len(test)), test.classes] += number  # the second split is easier
        folds.append(Fold(f"split{number}", encoder, train, test, np.exp(logits), path))
    return folds


def test_figures_are_means_over_splits(records, tmp_path):
    folds = make_folds(records, tmp_path)
    assert len(folds[0].test) != len(folds[1].test)
    config = toy_config(records, "nowhere")
    run = ProtocolRun(
        protocol_of(config), config, epath.Path(tmp_path / "out"), None, {"train": "a", "test": "a"}
    )
    results = run.write(measured(config, folds, NAMES["class"]), Stages())
    predicted = [fold.probabilities.argmax(axis=1) for fold in folds]
    top1 = [np.mean(p == fold.test.classes) for p, fold in zip(predicted, folds, strict=True)]
    balanced = [
        balanced_accuracy_score(fold.test.classes, p)
        for p, fold in zip(predicted, folds, strict=True)
    ]
    figures = results["metrics"]
    assert figures["top1"]["value"] == pytest.approx(np.mean(top1))
    assert figures["mean_class_accuracy"]["value"] == pytest.approx(np.mean(balanced))
    assert "top5" not in figures  # of three classes
    described = results["details"]["splits"]
    assert [entry["top1"] for entry in described] == pytest.approx(top1)
    assert described[0]["sources_in_both"] == len(
        {i // 2 for i in folds[0].train.indices} & {i // 2 for i in folds[0].test.indices}
    )
    assert figures["top1"]["low"] < np.mean(top1) < figures["top1"]["high"]
    assert results["sources"] < results["units"]


def test_top_5_is_that_of_scikit_learn(records, tmp_path):
    folds = make_folds(records, tmp_path)
    rng = np.random.default_rng(1)
    wide = [
        dataclasses.replace(f, probabilities=rng.random((len(f.test), 40)).astype(np.float32))
        for f in folds
    ]
    found = measured(toy_config(records, "nowhere"), wide, [f"class {n}" for n in range(40)])
    hits, split = found.outcomes.values["top5"], found.outcomes.values["split"]
    for number, fold in enumerate(wide):
        expected = top_k_accuracy_score(
            fold.test.classes, fold.probabilities, k=5, labels=np.arange(40)
        )
        assert hits[split == number].mean() == pytest.approx(expected)
    assert found.metrics["top5"].chance == pytest.approx(5 / 40)
    assert any("taken for" in html for html in found.sections)
    assert "confusion" not in found.details
