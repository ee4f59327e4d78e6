"""Metrics of several splits: means over splits, not over records."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from avcl_jax.data.clips import ClipRecords, VideoClipSpec
from avcl_jax.data.records import RecordDataset
from avcl_jax.data.selection import Selection
from avcl_jax.evaluation.classification import class_results
from avcl_jax.evaluation.protocol import estimate
from avcl_jax.evaluation.splits import Split
from avcl_jax.export.runs import EncoderSource
from tests.evaluation.labelled import write_labelled

ENCODER = EncoderSource("runs/demo", {}, "12ab", 7, None)


@pytest.mark.filterwarnings("ignore:y_pred contains classes")
@pytest.mark.parametrize("classes", [3, 40])
def test_metrics_are_means_over_splits_and_those_of_scikit_learn(tmp_path, classes):
    spec = object.__new__(VideoClipSpec)  # no clip is rendered
    data = RecordDataset(write_labelled(tmp_path / "records"), "all")
    data.class_names = data.class_names | {"class": [f"class {n}" for n in range(classes)]}
    rng, splits, scores = np.random.default_rng(0), [], []
    for number in (1, 2):
        train, test = (
            ClipRecords(data, Selection.parse(f"split{number}={part}"), spec, ("class",))
            for part in ("train", "test")
        )
        logits = rng.normal(size=(len(test), classes))
        # The second split is easier.
        logits[np.arange(len(test)), test.classes_of("class")] += number
        splits.append(Split(f"split{number}", ENCODER, test, train))
        scores.append(logits)
    assert len(splits[0].test) != len(splits[1].test)
    found = class_results(splits, "class", {"": scores})
    results = estimate(found, resamples=50, seed=0)
    truths = [split.test.classes_of("class") for split in splits]
    predicted = [logits.argmax(axis=1) for logits in scores]
    top1 = [np.mean(p == t) for p, t in zip(predicted, truths, strict=True)]
    balanced = [balanced_accuracy_score(t, p) for t, p in zip(truths, predicted, strict=True)]
    assert results["top1"]["value"] == pytest.approx(np.mean(top1))
    assert results["top1"]["low"] < np.mean(top1) < results["top1"]["high"]
    assert results["mean_class_accuracy"]["value"] == pytest.approx(np.mean(balanced))
    assert [entry["top1"] for entry in found.details["splits"]] == pytest.approx(top1)
    by_split = [entry["mean_class_accuracy"] for entry in found.details["splits"]]
    assert by_split == pytest.approx(balanced)
    assert ("top5" in results) == (classes > 5)
    assert ("confusion" in found.details) == (classes == 3)
    if classes > 5:
        top5 = [
            top_k_accuracy_score(t, logits, k=5, labels=np.arange(classes))
            for t, logits in zip(truths, scores, strict=True)
        ]
        assert results["top5"]["value"] == pytest.approx(np.mean(top5))
        assert results["top5"]["chance"] == pytest.approx(5 / 40)
        # The most frequent mistake is first, the class that is hardest too.
        wrong = np.zeros((classes, classes), int)
        for t, p in zip(truths, predicted, strict=True):
            np.add.at(wrong, (t[t != p], p[t != p]), 1)
        (html,) = found.sections
        taken, count = np.unravel_index(wrong.argmax(), wrong.shape), wrong.max()
        total = int(np.sum(np.concatenate(truths) == taken[0]))
        row = f"<td>class {taken[0]}</td><td>class {taken[1]}</td><td>{count} of {total}</td>"
        assert f"<th>records</th></tr><tr>{row}" in html
