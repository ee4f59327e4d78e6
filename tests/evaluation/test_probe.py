"""Probes: what they reach, what they never see, and what they refuse."""

from __future__ import annotations

import tracemalloc
import types

import ml_collections
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC

from avcl_jax.configs import evaluate as evaluate_config
from avcl_jax.evaluation.evaluate import measure_probe, trivial_statistics
from avcl_jax.evaluation.linear import check_sources, fit_probe, held_out_groups
from avcl_jax.evaluation.protocol import point_values
from avcl_jax.evaluation.statistics import gap_closed

FIT = {"classifier": "logistic", "classes": 3, "iterations": 300, "tolerance": 1e-6}
COSTS = (1e-3, 1e-1, 10.0)
STATISTICS = ("mean_colour", "position_histogram", "mean_loudness", "mean_log_mel")


def _probe(features, targets, sources, *, folds=3, **settings):
    """A probe whose C is chosen by folds of sources; the only C if one is given."""
    groups = held_out_groups(targets, sources, folds=folds, seed=0)
    return fit_probe(features, targets, groups, **FIT | {"costs": COSTS} | settings)


def _gaussians(rng: np.random.Generator, items: int, distance: float):
    labels = np.arange(items) % 3
    features = rng.normal(size=(items, 10)) * 5.0 + 100.0
    features[:, :3] += distance * np.eye(3)[labels]
    return features, labels


def test_clips_of_one_source_stay_in_one_fold():
    # Each source has a signature of its own and no class: with its clips on both sides of a fold a
    # probe recognises the source and looks far better than it is.
    rng = np.random.default_rng(2)
    sources = np.repeat(np.arange(30), 8)
    signatures = rng.normal(size=(30, 40))[sources] * 3.0
    features = signatures + 0.1 * rng.normal(size=(240, 40))
    labels = (np.arange(30) % 3)[sources]
    whole = _probe(features, labels, sources)
    torn = _probe(features, labels, np.arange(240))
    assert max(torn.held_out.values()) > 0.95
    assert max(whole.held_out.values()) < 0.7


def test_folds_are_of_sources_whatever_these_are_called():
    numbers = np.repeat(np.arange(40), 3)
    groups = held_out_groups(numbers % 3, numbers, folds=4, seed=0)
    assert np.bincount(groups).tolist() == [30] * 4
    assert (groups.reshape(40, 3) == groups[::3, None]).all()
    for sources in ([str(number) for number in numbers], 7 - numbers):
        np.testing.assert_array_equal(held_out_groups(numbers, sources, folds=4, seed=0), groups)


def test_the_chosen_c_and_its_logits_are_those_of_scikit_learn_on_the_same_folds():
    rng = np.random.default_rng(6)
    features, labels = _gaussians(rng, 90, 12.0)
    features[:, 5:7] = 0.1, 0.0  # constant features must do no harm
    costs = (1e-4, 1e-2, 1.0)
    probe = _probe(features, labels, np.arange(90), costs=costs)
    fold = np.random.default_rng(0).permutation(90) % 3
    for cost in costs:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=cost, tol=1e-8, max_iter=999))
        held = [
            model.fit(features[fold != n], labels[fold != n]).score(
                features[fold == n], labels[fold == n]
            )
            for n in range(3)
        ]
        assert probe.held_out[cost] == pytest.approx(np.mean(held))
    assert probe.cost == max(costs, key=lambda cost: (probe.held_out[cost], -cost))
    model.set_params(logisticregression__C=probe.cost).fit(features, labels)
    # Logits are defined up to what all classes share.
    logits = probe.scores(features), model.decision_function(features)
    np.testing.assert_allclose(*(z - z.mean(axis=1, keepdims=True) for z in logits), atol=5e-3)


def test_several_labels_are_independent_regressions():
    rng = np.random.default_rng(1)
    features = rng.normal(size=(80, 5)).astype(np.float32)
    targets = features @ rng.normal(size=(5, 3)) + rng.normal(size=(80, 3)) > 0.5
    found = fit_probe(features, targets, np.arange(80) % 2, costs=(0.2,), **FIT)
    scores, scaled = found.scores(features), StandardScaler().fit_transform(features)
    for number in range(3):
        reference = LogisticRegression(C=0.2, tol=1e-8, max_iter=2000)
        reference.fit(scaled, targets[:, number])
        np.testing.assert_allclose(
            scores[:, number], reference.decision_function(scaled), atol=5e-3
        )


def _folded(rng, *, per_class=8, separation=0.0):
    """Features [n, 3 clips, 5 channels] of three classes in four folds, labels and folds."""
    labels = np.tile(np.repeat(np.arange(3), per_class), 4)
    folds = np.repeat(np.arange(4), 3 * per_class)
    centres = separation * rng.normal(size=(3, 5))
    return centres[labels][:, None] + rng.normal(size=(len(labels), 3, 5)), labels, folds


@pytest.mark.parametrize("kind", ["svm", "rbf"])
def test_a_machine_is_that_of_scikit_learn_fold_by_fold(kind):
    features, labels, folds = _folded(np.random.default_rng(0), separation=0.7)
    features[folds == 1] = 3 * features[folds == 1] + 2  # to standardise by it would be noticed
    costs = (1e-3, 0.1)
    probe = fit_probe(features, labels, folds, **FIT | {"classifier": kind, "costs": costs})

    def decisions(train, test, cost):
        machine = SVC(C=cost) if kind == "rbf" else LinearSVC(C=cost, dual=False)
        model = make_pipeline(StandardScaler(), machine)
        model.fit(features[train].reshape(-1, 5), labels[train].repeat(3))
        return model.decision_function(features[test].reshape(-1, 5)).reshape(-1, 3, 3).mean(axis=1)

    for cost in costs:
        held = [
            (decisions(folds != n, folds == n, cost).argmax(axis=1) == labels[folds == n]).mean()
            for n in range(4)
        ]
        assert probe.held_out[cost] == pytest.approx(np.mean(held))
    assert probe.cost == max(costs, key=lambda cost: (probe.held_out[cost], -cost))
    everything = np.ones(len(labels), bool)
    np.testing.assert_allclose(
        probe.scores(features), decisions(everything, everything, probe.cost), atol=1e-6
    )


@pytest.mark.parametrize("kind", ["logistic", "svm"])
def test_perfect_noisy_and_collapsed_clips_give_known_scores(kind):
    settings = FIT | {"classifier": kind, "costs": (0.1,)}
    features, labels, folds = _folded(np.random.default_rng(1), per_class=12)
    perfect = np.eye(3)[labels][:, None].repeat(3, axis=1)
    score = [
        fit_probe(values, labels, folds, **settings).held_out[0.1]
        for values in (perfect, features, np.ones_like(features))
    ]
    assert score[0] == 1.0
    assert 0.2 < score[1] < 0.47
    assert score[2] <= 1 / 3


def test_iterations_end_at_their_number_or_when_the_gradient_is_small():
    features, labels = _gaussians(np.random.default_rng(9), 60, 6.0)

    def scores(iterations, tolerance):
        settings = {"costs": (1.0,), "iterations": iterations, "tolerance": tolerance}
        return _probe(features, labels, np.arange(60), **settings).scores(features)

    one = scores(1, 0.0)
    np.testing.assert_array_equal(scores(5, 1.0), one)  # no gradient of a mean loss is larger
    assert np.abs(scores(2, 0.0) - one).max() > 1e-3


def test_features_are_not_copied_on_the_host():
    rng = np.random.default_rng(7)
    features = rng.normal(size=(160_000, 32)).astype(np.float32)
    labels = rng.integers(0, 3, len(features))
    tracemalloc.start()
    groups = np.arange(len(features)) % 2
    settings = FIT | {"costs": (1.0,), "iterations": 1, "tolerance": 1.0}
    fit_probe(features, labels, groups, **settings).scores(features)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < features.nbytes


def test_a_probe_of_a_run_is_about_the_records_with_its_modality_and_a_label():
    rng = np.random.default_rng(3)

    def side(items):
        features, labels = _gaussians(rng, items, 60.0)
        labels[:15] = -1
        has_audio = np.arange(items) >= 10  # of which 5 have no label
        features[~has_audio | (labels < 0)] = np.nan
        arrays = {"label_class": labels, "has_audio": has_audio, "source_id": np.arange(items)}
        names = ("pretrained/audio_features", "random/audio_features", *STATISTICS)
        noise = np.where(np.isnan(features), np.nan, rng.normal(size=features.shape))
        return arrays | dict.fromkeys(names, noise) | {names[0]: features}

    config = ml_collections.ConfigDict({"seed": 0})
    config.evaluation = evaluate_config.get_config().evaluation
    config.evaluation.probe.update({"folds": 3, "costs": (0.1,)})
    test = side(60)
    records = types.SimpleNamespace(
        records=types.SimpleNamespace(class_names={"class": ["a", "b", "c"]}),
        record_ids=[f"record {n}" for n in range(60)],
        sources=[f"source {n // 2}" for n in range(60)],
    )
    measured = measure_probe(config, records, side(120), test, "class", "audio")
    assert measured.outcomes.units == records.record_ids[15:]
    assert measured.outcomes.sources == records.sources[15:]
    assert set(measured.metrics) == {"class_from_audio_random", "class_from_audio_pretrained"}
    values = point_values(measured)
    assert values["class_from_audio_pretrained"] >= 0.95
    assert values["class_from_audio_random"] < 0.6
    assert measured.metrics["class_from_audio_random"].chance == pytest.approx(1 / 3)
    confusion = measured.details["confusion"]
    np.testing.assert_array_equal(confusion.sum(axis=1), np.bincount(test["label_class"][15:]))
    assert np.trace(confusion) / 45 == pytest.approx(values["class_from_audio_pretrained"])
    assert measured.details["costs"] == {"random": 0.1, "pretrained": 0.1}


def test_bad_input_says_what_and_which():
    rng = np.random.default_rng(4)
    features, labels = _gaussians(rng, 30, 1.0)
    check_sources((groups := np.arange(30)) % 3, 3)
    with pytest.raises(ValueError, match="3 folds need as many training sources, got 2"):
        _probe(features, labels, groups % 2)
    with pytest.raises(ValueError, match="features contains NaN"):
        _probe(features * np.nan, labels, groups)


def test_gap_closed():
    assert gap_closed(0.4, 0.7, 0.9) == pytest.approx(0.6)
    assert gap_closed(0.4, 0.2, 0.9) == pytest.approx(-0.4)
    assert np.isnan(gap_closed(0.9, 0.95, 0.9))


def test_trivial_statistics_say_what_they_claim():
    video = np.zeros((2, 5, 12, 12, 3), dtype=np.uint8)
    video[..., 0] = 255
    video[:, ::2, 9:, :3] = (255, 255, 255)  # flickers in the bottom left corner only
    log_mel = np.tile(np.arange(4.0), (2, 6, 1))
    log_mel[1] += np.log(0.01)
    statistics = trivial_statistics(video, log_mel, cells=4)
    assert statistics["mean_colour"][0] == 1.0
    assert 0 < statistics["mean_colour"][1] == statistics["mean_colour"][2] < 0.1
    histogram = statistics["position_histogram"].reshape(4, 4)
    assert histogram[3, 0] == pytest.approx(1.0)
    full = 10 * np.log10(np.exp(np.arange(4.0)).sum())
    assert statistics["mean_loudness"] == pytest.approx([full - 10.0])
    np.testing.assert_allclose(statistics["mean_log_mel"], np.arange(4.0) + np.log(0.1))
