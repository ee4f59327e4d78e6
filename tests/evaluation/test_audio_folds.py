"""Classification over folds: known values, nothing of a test fold in training, one whole run."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC

from avcl_jax.data.records import RecordDataset
from avcl_jax.data.selection import SelectionError
from avcl_jax.errors import UserError
from avcl_jax.evaluation import audio_folds
from avcl_jax.evaluation.audio_folds import audio_classification, check_folds, classify_folds
from avcl_jax.evaluation.features import classical_features
from configs import audio_classification as config_file
from tests.evaluation.conftest import FOLD_CLASSES, sound_record, write_records


def _items(rng, *, per_class=8, clips=3, classes=3, folds=4, separation=0.0):
    labels = np.tile(np.repeat(np.arange(classes), per_class), folds)
    names = np.repeat(np.arange(folds), per_class * classes)
    centres = separation * rng.normal(size=(classes, 5))
    features = centres[labels][:, None] + rng.normal(size=(len(labels), clips, 5))
    return features, labels, names, [str(n) for n in range(len(labels))]


def _classify(features, labels, folds, sources, **settings):
    settings = {"kernel": "linear", "costs": (0.01, 1.0), "classes": 3} | settings
    check_folds(labels, folds, sources)
    return classify_folds([features] * len(np.unique(folds)), labels, folds, **settings)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_is_scikit_learn_fold_by_fold(kernel):
    features, labels, folds, sources = _items(np.random.default_rng(0), separation=0.7)
    features[folds == 1] = 3 * features[folds == 1] + 2  # to standardise by it would be noticed
    found = _classify(features, labels, folds, sources, kernel=kernel, costs=(0.1,))
    for fold in range(4):
        train = folds != fold
        machine = SVC(C=0.1) if kernel == "rbf" else LinearSVC(C=0.1, dual=False)
        model = make_pipeline(StandardScaler(), machine)
        model.fit(features[train].reshape(-1, 5), labels[train].repeat(3))
        decisions = model.decision_function(features[~train].reshape(-1, 5))
        predicted = decisions.reshape(-1, 3, 3).mean(axis=1).argmax(axis=1)
        np.testing.assert_array_equal(found.predicted[~train], predicted)
    np.testing.assert_array_equal(found.correct, found.predicted == labels)


def test_perfect_random_and_collapsed_features_give_known_accuracies():
    rng = np.random.default_rng(1)
    features, labels, folds, sources = _items(rng, per_class=12)
    perfect = np.eye(3)[labels][:, None].repeat(3, axis=1)
    assert _classify(perfect, labels, folds, sources).correct.mean() == 1.0
    assert 0.2 < _classify(features, labels, folds, sources).correct.mean() < 0.47
    collapsed = np.ones_like(features)
    assert _classify(collapsed, labels, folds, sources).correct.mean() <= 1 / 3


def test_shuffled_labels_give_chance():
    rng = np.random.default_rng(2)
    features, labels, folds, sources = _items(rng, per_class=12, separation=3.0)
    assert _classify(features, labels, folds, sources).correct.mean() > 0.95
    assert _classify(features, rng.permutation(labels), folds, sources).correct.mean() < 0.47


def test_each_fold_is_classified_by_the_features_of_its_own_encoder(monkeypatch):
    features, labels, folds, sources = _items(np.random.default_rng(4), separation=0.7)
    other = features[..., ::-1] * np.arange(1, 6)
    trained, machine = [], audio_folds._machine
    monkeypatch.setattr(audio_folds, "_machine", lambda *a: trained.append(a) or machine(*a))
    one, two = (_classify(values, labels, folds, sources) for values in (features, other))
    # Each pair of folds is left out once for two costs, then each fold once.
    assert len(trained) == 2 * (6 * 2 + 4)
    settings = {"kernel": "linear", "costs": (0.01, 1.0), "classes": 3}
    mixed = classify_folds([features, other, features, other], labels, folds, **settings)
    for fold, whole in enumerate((one, two, one, two)):
        rows = folds == fold
        np.testing.assert_array_equal(mixed.predicted[rows], whole.predicted[rows])
        assert mixed.costs[fold] == whole.costs[fold]
        assert mixed.inner_accuracy[fold] == whole.inner_accuracy[fold]


def test_the_test_fold_decides_nothing():
    """Other labels in fold 0 leave its cost, and what is learned for it, as they are."""
    rng = np.random.default_rng(3)
    features, labels, folds, sources = _items(rng, separation=0.5)
    costs = (1e-4, 1e-2, 1.0)
    before = _classify(features, labels, folds, sources, costs=costs)
    changed = labels.copy()
    changed[folds == 0] = rng.permutation(changed[folds == 0])
    after = _classify(features, changed, folds, sources, costs=costs)
    assert after.costs[0] == before.costs[0]
    assert after.inner_accuracy[0] == before.inner_accuracy[0]
    np.testing.assert_array_equal(after.predicted[folds == 0], before.predicted[folds == 0])
    # And the other folds, which train on fold 0, do notice.
    assert after.inner_accuracy[1:] != before.inner_accuracy[1:]


def test_the_cost_is_the_best_of_the_training_folds():
    rng = np.random.default_rng(4)
    features, labels, folds, sources = _items(rng, per_class=4, separation=1.0)
    costs = (1e-6, 0.1)
    found = _classify(features, labels, folds, sources, costs=costs)
    for fold in range(4):
        inside = folds != fold
        alone = [
            classify_folds(
                [features[inside]] * 3,
                labels[inside],
                folds[inside],
                classes=3,
                kernel="linear",
                costs=(cost,),
            ).correct
            for cost in costs
        ]
        means = [correct.mean() for correct in alone]
        assert found.inner_accuracy[fold] == pytest.approx(max(means))
        assert found.costs[fold] == costs[int(np.argmax(means))]


def test_a_recording_in_two_folds_and_too_few_folds_are_refused():
    features, labels, folds, sources = _items(np.random.default_rng(5))
    with pytest.raises(UserError, match="source 0 is in two folds"):
        _classify(features, labels, folds, [*sources[:-1], "0"])
    with pytest.raises(UserError, match="needs three folds, there are 2"):
        _classify(features, labels, folds % 2, sources)


def test_classical_features_tell_pitch_and_change():
    time = np.arange(8000) / 8000
    low = (9000 * np.sin(2 * np.pi * 300 * time)).astype(np.int16)
    high = (9000 * np.sin(2 * np.pi * 3000 * time)).astype(np.int16)
    steady, above = (classical_features(w, 8000) for w in (low, high))
    assert steady["log_mel"].shape == (512,)
    assert steady["mfcc"].shape == (80,)
    assert steady["log_mel"][:128].argmax() < above["log_mel"][:128].argmax()
    noise = np.random.default_rng(0).normal(0, 3000, size=8000).astype(np.int16)
    gated = np.concatenate([noise[:4000], noise[4000:] // 100])
    even, changing = (classical_features(w, 8000)["log_mel"][128:256] for w in (noise, gated))
    assert changing.mean() > 2 * even.mean()


def _config(fold_records, small_run):
    c = config_file.get_config("esc10")
    c.unlock()
    c.encoder = str(small_run[1])
    c.data.directory = str(fold_records)
    c.features.clips = 2
    c.evaluation.update(
        {"costs": (0.01, 1.0), "classical_costs": (1.0,), "classical_linear_costs": (0.1,)}
    )
    c.bootstrap.resamples = 20
    return c


# librosa says of sounds this short and low that its default bands and windows are too many.
@pytest.mark.filterwarnings("ignore:Empty filters", "ignore:n_fft")
def test_one_command_from_a_run_to_results_that_repeat(
    fold_records, small_run, tmp_path, capsys, monkeypatch
):
    config = _config(fold_records, small_run)
    first = audio_classification(config, tmp_path / "a")
    second = audio_classification(config, tmp_path / "b")
    for key in ("metrics", "details", "fingerprint"):
        assert first[key] == second[key]
    # Pitch tells these classes: features of the log-mel spectrum must find it.
    assert first["metrics"]["accuracy_log_mel_linear"]["value"] == 1.0
    assert first["metrics"]["accuracy"]["value"] > 0.6
    assert first["units"] == 48
    assert first["sources"] == 24
    by_fold = first["details"]["by_fold"]["encoder"]
    assert first["metrics"]["accuracy"]["value"] == pytest.approx(np.mean(by_fold["fold_accuracy"]))
    assert np.sum(first["details"]["confusion"]) == 48
    assert set(first["details"]["encoder_minus"]) == {
        "random",
        "mfcc_rbf",
        "log_mel_rbf",
        "log_mel_linear",
    }
    assert json.loads((tmp_path / "a" / "results.json").read_text()) == first
    page = (tmp_path / "a" / "report.html").read_text()
    assert "By fold" in page
    capsys.readouterr()
    opened, init = [], RecordDataset.__init__

    def opening(self, *arguments):
        opened.append(arguments)
        init(self, *arguments)

    monkeypatch.setattr(RecordDataset, "__init__", opening)
    audio_classification(config, tmp_path / "a")
    assert "already holds these results" in capsys.readouterr().out
    assert len(opened) == 1  # of a large data set that takes seconds


def test_what_does_not_fit_is_refused_before_any_work(
    fold_records, small_run, small_records, tmp_path, monkeypatch
):
    monkeypatch.setattr(RecordDataset, "__getitem__", None)
    config = _config(fold_records, small_run)
    config.encoder = str(tmp_path / "nothing")
    with pytest.raises(ValueError, match="there is no directory"):
        audio_classification(config, tmp_path)
    config = _config(fold_records, small_run)
    config.data.update({"directory": str(small_records), "split": "test", "label": "material"})
    with pytest.raises(UserError, match=r"material, motion, not 'fold'"):
        audio_classification(config, tmp_path)
    config.data.update({"split": "null_test", "fold_label": "motion"})
    with pytest.raises(SelectionError, match=r"10 of the 10 .* have no known 'material'"):
        audio_classification(config, tmp_path)
    config.data.update({"split": "test"})
    with pytest.raises(UserError, match="needs three folds, there are 2"):
        audio_classification(config, tmp_path)


@pytest.mark.parametrize(
    ("said", "classes", "sources"),
    [
        ("source 0 is in two folds", [0, 1, 0, 1, 0, 1], "xaxbcd"),
        ("without folds 0 and 1, .* fewer than two classes", [1, 1, 0, 1, 0, 0], "abcdef"),
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
    monkeypatch.setattr(RecordDataset, "__getitem__", None)
    with pytest.raises(UserError, match=said):
        audio_classification(_config(directory, small_run), tmp_path / "w")


def test_a_label_of_several_classes_is_refused(small_run, tmp_path):
    labels = {"class": (0, 1), "fold": 0}
    record = sound_record("a", "a", 0, 300, labels)
    directory = write_records(tmp_path, "several", FOLD_CLASSES, {"all": [record]}, ["class"])
    with pytest.raises(SelectionError, match="'class', which allows several"):
        audio_classification(_config(directory, small_run), tmp_path)
