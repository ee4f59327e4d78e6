"""Linear probes: whole runs of either kind, and metrics that are those of scikit-learn."""

from __future__ import annotations

import collections
import shutil
from statistics import NormalDist

import numpy as np
import pytest
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    roc_auc_score,
    top_k_accuracy_score,
)
from sklearn.svm import SVC, LinearSVC

from avcl_jax.configs import linear_probe as config_file
from avcl_jax.data.clips import ClipRecords, VideoClipSpec
from avcl_jax.data.records import RecordDataset
from avcl_jax.data.selection import Selection
from avcl_jax.errors import UserError
from avcl_jax.evaluation.classification import class_results, run_linear_probe
from avcl_jax.evaluation.protocol import OUTCOMES, estimate, read_outcomes
from avcl_jax.evaluation.splits import Split
from avcl_jax.export.runs import EncoderSource
from tests.evaluation.conftest import FOLD_CLASSES, sound_record, write_records
from tests.evaluation.labelled import write_labelled


def _config(records, small_run, preset="demo_audio"):
    c = config_file.get_config(preset)
    c.unlock()
    c.encoder = str(small_run[1])
    c.data.directory = str(records)
    c.execution.update({"threads": 2, "chunk": 8})
    c.features.update({"clips": 2, "speeds": (1, 2)})
    c.probe.update({"costs": (0.01, 1.0), "folds": 3})
    c.bootstrap.resamples = 20
    return c


def test_one_command_gives_accuracies_that_repeat(small_records, small_run, tmp_path):
    config = _config(small_records, small_run)
    first = run_linear_probe(config, tmp_path / "a")
    second = run_linear_probe(config, tmp_path / "b")
    assert first["metrics"] == second["metrics"]
    assert first["details"] == second["details"]
    # Two materials of other pitches, which even an untrained encoder lets a linear probe tell.
    assert first["metrics"]["top1"]["value"] == 1.0
    assert first["metrics"]["mean_class_accuracy"]["value"] == 1.0
    assert set(first["metrics"]) == {
        f"{name}{suffix}" for name in ("top1", "mean_class_accuracy") for suffix in ("", "_random")
    }
    assert first["units"] == 16
    assert first["data"]["train"].startswith("small-train")


def test_splits_have_their_own_encoders_and_figures_are_means_over_them(
    fold_records, small_run, tmp_path
):
    for fold in "12":
        shutil.copytree(small_run[1], tmp_path / f"fold{fold}")
    config = _config(fold_records, small_run)
    config.encoder = str(tmp_path / "fold{fold}")
    folds = {"train_select": ("fold!=1", "fold!=2"), "test_select": ("fold=1", "fold=2")}
    config.data.update({"label": "class", "train_split": "all", "test_split": "all", **folds})
    results = run_linear_probe(config, tmp_path / "out")
    described = results["details"]["splits"]
    assert [split["encoder"]["path"][-1] for split in described] == ["1", "2"]
    values = read_outcomes(tmp_path / "out" / OUTCOMES).values
    means = [values["top1"][values["split"] == number].mean() for number in (0, 1)]
    assert results["metrics"]["top1"]["value"] == pytest.approx(np.mean(means))
    assert results["units"] == sum(split["test_records"] for split in described) == 24


def _folds(directory, run, **settings):
    """The config of ESC-10 for the four folds of `fold_records`."""
    c = _config(directory, run, "esc10")
    names = "1234"
    c.data.train_select = tuple(f"fold!={name}" for name in names)
    c.data.test_select = tuple(f"fold={name}" for name in names)
    c.baselines.update({"classical_costs": (1.0,), "classical_linear_costs": (0.1,)})
    c.update_from_flattened_dict(settings)
    return c


# librosa says of sounds this short and low that its default bands and windows are too many.
@pytest.mark.filterwarnings("ignore:Empty filters", "ignore:n_fft")
@pytest.mark.parametrize("pooling", ["mean_max", "clips"])
def test_official_folds_are_classified_by_machines_beside_classical_baselines(
    fold_records, small_run, tmp_path, pooling, monkeypatch
):
    config = _folds(fold_records, small_run, **{"features.record_pooling": pooling})
    trained = collections.Counter()
    for machine in (LinearSVC, SVC):

        def fit(self, *given, fit=machine.fit):
            trained[type(self)] += 1
            return fit(self, *given)

        monkeypatch.setattr(machine, "fit", fit)
    results = run_linear_probe(config, tmp_path)
    # Two C for two encoders and one C for each baseline: a machine without each of the 6 pairs of
    # folds, which serves both folds, and one without each of the 4 folds.
    assert trained == {LinearSVC: 2 * (2 * 6 + 4) + 6 + 4, SVC: 2 * (6 + 4)}
    baselines = {"random", "mfcc_rbf", "log_mel_rbf", "log_mel_linear"}
    assert set(results["details"]["encoder_minus"]) == baselines
    # Pitch tells these classes: features of the log-mel spectrum must find it.
    assert results["metrics"]["top1_log_mel_linear"]["value"] == 1.0
    assert results["metrics"]["top1"]["value"] > 0.6
    assert (results["units"], results["sources"]) == (48, 24)
    splits = results["details"]["splits"]
    for name, metric in (("encoder", "top1"), ("random", "top1_random")):
        mean = np.mean([split["chosen"][name]["top1"] for split in splits])
        assert results["metrics"][metric]["value"] == pytest.approx(mean)
    assert set(splits[0]["chosen"]) == baselines | {"encoder"}
    page = (tmp_path / "report.html").read_text()
    assert "support vector machine" in page
    assert "MFCC + RBF" in page


@pytest.mark.parametrize(
    ("said", "classes", "sources"),
    [
        ("1 sources are among both", [0, 1, 0, 1, 0, 1], "xaxbcd"),
        ("without fold=2, .* has fewer than two classes", [1, 1, 0, 0, 1, 1], "abcdef"),
    ],
)
def test_folds_that_cannot_be_classified_are_refused_before_any_work(
    small_run, tmp_path, monkeypatch, said, classes, sources
):
    records = [
        sound_record(f"{n}", source, n, 300, {"class": label, "fold": n // 2})
        for n, (label, source) in enumerate(zip(classes, sources, strict=True))
    ]
    directory = write_records(tmp_path, "few", FOLD_CLASSES, {"all": records})
    config = _folds(directory, small_run)
    config.data.train_select, config.data.test_select = ("fold!=1",), ("fold=1",)
    monkeypatch.setattr(RecordDataset, "__getitem__", None)
    with pytest.raises(UserError, match=said):
        run_linear_probe(config, tmp_path / "w")


@pytest.fixture(scope="module")
def tagged_records(tmp_path_factory):
    """Sounds of which a low one is `low`, a loud one `loud`, and all `sound`; some are neither."""
    rng = np.random.default_rng(0)
    names = {"tags": ["low", "loud", "sound"], "kind": ["a", "b"], "level": ["loud"]}
    splits = {}
    for split, count in (("train", 40), ("eval", 24)):
        splits[split] = []
        for number in range(count):
            low, loud = rng.integers(0, 2, 2).tolist()
            tags = (*([0] * low), *([1] * loud), 2)
            record = sound_record(
                f"{split}{number}",
                f"{split}{number}",
                number,
                300 if low else 1500,
                {"tags": tags, "kind": 0, "level": 0},
            )
            if not loud:
                record.waveform[...] = record.waveform // 16
            splits[split].append(record)
    alike = {"tags": (2,), "kind": 1, "level": 0}
    splits["alike"] = [sound_record(f"alike{n}", f"alike{n}", n, 500, alike) for n in range(2)]
    directory = tmp_path_factory.mktemp("tagged")
    return write_records(directory, "tagged", names, splits, ["tags"])


def test_tagging_is_scored_as_scikit_learn_scores_it(tagged_records, small_run, tmp_path):
    config = _config(tagged_records, small_run, "audioset")
    config.data.label = "tags"
    results = run_linear_probe(config, tmp_path)
    figures = results["metrics"]
    values = read_outcomes(tmp_path / OUTCOMES).values
    relevant, scores = values["relevant"], values["scores"]
    assert relevant[:, 2].all()  # so that class is in no mean
    assert figures["map"]["value"] == pytest.approx(
        average_precision_score(relevant[:, :2], scores[:, :2], average="macro")
    )
    assert figures["auc"]["value"] == pytest.approx(
        roc_auc_score(relevant[:, :2], scores[:, :2], average="macro")
    )
    assert figures["map"]["value"] > 0.9
    mean_auc = min(figures["auc"]["value"], 1 - 1e-6)
    assert figures["d_prime"]["value"] == pytest.approx(2**0.5 * NormalDist().inv_cdf(mean_auc))
    assert figures["map"]["chance"] == pytest.approx(relevant[:, :2].mean())
    assert len(results["details"]["classes"]) == 3


@pytest.mark.parametrize(
    ("records", "settings", "message"),
    [
        ("small", {"data.label": "color"}, "has the labels material, motion"),
        ("small", {"probe.folds": 25}, "25 folds need as many training sources, got 24"),
        ("small", {"data.test_split": "train"}, "24 records are among both the training"),
        ("small", {"probe.classifier": "tree"}, "'tree' must be one of logistic, svm"),
        ("small", {"data.group_label": "kind"}, "has the labels material, motion"),
        ("demo", {"baselines.classical": True}, "classical are features of audio"),
        (
            "tagged",
            {"data.test_select": ("kind=a", "kind=a"), "data.train_select": ("", "kind=a")},
            "for which mAP over 2 splits is not defined",
        ),
        (
            "tagged",
            {"data.test_select": ("kind=b",), "data.test_split": "alike"},
            "no class of 'tags' has both .* the test records",
        ),
        # Each held-out fold would be one record, of which no class is both positive and negative.
        ("tagged", {"probe.folds": 40}, "no held-out fold has .* set probe.folds lower"),
        ("tagged", {"data.label": "level"}, "'level' of .* has only the class 'loud'"),
        ("tagged", {"probe.classifier": "svm"}, "may have several classes per record: set"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(
    request, small_run, tmp_path, monkeypatch, records, settings, message
):
    monkeypatch.setattr(RecordDataset, "__getitem__", None)
    tagged = records == "tagged"
    directory = request.getfixturevalue("tagged_records" if tagged else "small_records")
    preset = {"small": "demo_audio", "demo": "demo", "tagged": "audioset"}[records]
    config = _config(directory, small_run, preset)
    given = {"data.label": "tags"} if tagged else {}
    config.update_from_flattened_dict(given | settings)
    with pytest.raises(UserError, match=message):
        run_linear_probe(config, tmp_path)
    assert not list(tmp_path.iterdir())


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
