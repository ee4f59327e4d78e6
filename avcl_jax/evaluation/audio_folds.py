"""ESC-10 and ESC-50: frozen features and a support vector machine over the official folds.

python -m avcl_jax.main --config=configs/audio_classification.py:esc10 --config.encoder=RUN
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ml_collections
import numpy as np
from etils import epath
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC
from threadpoolctl import threadpool_limits

from avcl_jax.data.clips import ClipRecords
from avcl_jax.data.records import RecordDataset
from avcl_jax.data.selection import Selection
from avcl_jax.errors import UserError
from avcl_jax.evaluation.driver import Context, run_protocol
from avcl_jax.evaluation.features import classical_record_features, open_clips, record_features
from avcl_jax.evaluation.page import as_text, matrix, section, table
from avcl_jax.evaluation.protocol import Measured, Metric, Outcomes, Protocol
from avcl_jax.evaluation.splits import Split, feature_spec, split_encoders
from avcl_jax.evaluation.statistics import compare, confusion_matrix, top_k_hits

Kernel = Literal["linear", "rbf"]

PROTOCOL = Protocol(
    name="audio_classification_folds",
    version=1,
    title="Audio classification over official folds",
    definition=(
        "The encoder is frozen: one for all folds, pretrained on other recordings, or one for each "
        "test fold, pretrained on none of its recordings.",
        "Each file gives features.clips clips at each of features.speeds, uniformly spaced from "
        "its beginning to its end.",
        "Every official fold is the test fold once, for a classifier that saw the other folds.",
        "Features are standardised by mean and deviation of the training clips; a linear support "
        "vector machine (one class against the rest, squared hinge loss, L2) is trained on clips; "
        "a file is given the class with the highest mean decision value of its clips.",
        "C is chosen for each test fold by holding out each of its training folds in "
        "turn; the smallest of equally good ones. The test fold decides nothing.",
        "Accuracy is the mean over folds. A tie between classes counts as wrong.",
        "Clips of one recording are all in one fold; this is checked.",
        "Baselines are measured on the same files in the same way: a random encoder of the same "
        "shape, and statistics of MFCC and of the log-mel spectrum of the whole file.",
    ),
)
_TITLES = {
    "": "encoder",
    "random": "random encoder",
    "mfcc_rbf": "MFCC + RBF",
    "log_mel_rbf": "log-mel + RBF",
    "log_mel_linear": "log-mel + linear",
}


@dataclass(frozen=True)
class FoldResult:
    """Result of a classification over folds.

    Attributes:
        correct: float64 [n], 1 where the item's class has the highest mean decision value, when
            its fold was the test fold; a tie counts as wrong.
        predicted: int64 [n], class in [0, classes).
        costs: C for each test fold, chosen on the other folds.
        inner_accuracy: mean accuracy over the other folds at that C, each held out in turn.
    """

    correct: np.ndarray
    predicted: np.ndarray
    costs: list[float]
    inner_accuracy: list[float]


def classify_folds(
    features: Sequence[np.ndarray],
    labels: np.ndarray,
    folds: np.ndarray,
    *,
    classes: int,
    kernel: Kernel,
    costs: Sequence[float],
) -> FoldResult:
    """Tests every fold with a support vector machine that was trained on the other folds.

    Features are standardised by mean and deviation of the training clips; every clip of a training
    item is a training example of its class; an item is classified by the mean of its clips'
    decision values, one class against the rest. C is the one with the highest accuracy over items
    when each of the training folds is held out in turn, the smallest of equally good ones.

    Args:
        features: float [n, clips, C] for each test fold, in the order of the fold numbers: those of
            one encoder, or of an encoder per fold.
        labels: int [n] in [0, classes).
        folds: int [n].
        kernel: "linear" is liblinear's L2-regularised squared hinge loss, "rbf" libsvm's with gamma
            1 / (C · variance).
        costs: candidates for C.
    """
    names, costs = np.unique(folds), sorted(costs)
    trained: dict[tuple[Any, ...], list[np.ndarray]] = {}

    def scores(values: np.ndarray, train: np.ndarray, costs: Sequence[float]) -> list[np.ndarray]:
        """Mean decision values [items that are not in training, classes], for each C."""
        scaler = StandardScaler().fit(_clips(values[train]))
        known, unknown = (scaler.transform(_clips(values[rows])) for rows in (train, ~train))
        answers = np.repeat(labels[train], values.shape[1])
        return [
            _decisions(_machine(kernel, cost).fit(known, answers), unknown, classes)
            .reshape(-1, values.shape[1], classes)
            .mean(axis=1)
            for cost in costs
        ]

    def held_out(values: np.ndarray, test: int, inner: int) -> list[float]:
        """Accuracies on fold `inner` without it and fold `test` in training, for each C."""
        key = id(values), frozenset((test, inner))
        train = ~np.isin(folds, (test, inner))
        if key not in trained:  # the same machines serve the choice for the other of the two
            trained[key] = scores(values, train, costs)
        rows = folds[~train] == inner
        return [float(top_k_hits(found, labels[~train], 1)[rows].mean()) for found in trained[key]]

    correct, predicted = np.empty(len(labels)), np.empty(len(labels), np.int64)
    chosen, accuracies = [], []
    # More than one thread of BLAS costs more than it saves on matrices of this size.
    with threadpool_limits(1):
        for test, values in zip(names, features, strict=True):
            inner = [held_out(values, test, other) for other in names if other != test]
            accuracy = np.mean(inner, axis=0)
            best = int(accuracy.argmax())  # the first, so the smallest C, of equal ones
            rows = folds == test
            (found,) = scores(values, ~rows, [costs[best]])
            correct[rows] = top_k_hits(found, labels[rows], 1)
            predicted[rows] = found.argmax(axis=1)
            chosen.append(costs[best])
            accuracies.append(float(accuracy[best]))
    return FoldResult(correct, predicted, chosen, accuracies)


def check_folds(labels: np.ndarray, folds: np.ndarray, sources: Sequence[str]) -> None:
    """Refuses items that `classify_folds` cannot classify.

    Args:
        labels: int [n].
        folds: int [n].
        sources: [n].

    Raises:
        UserError: if there are fewer than three folds, a source is in two of them, or training
            without two of them would have one class.
    """
    names = np.unique(folds)
    if len(names) < 3:
        raise UserError(f"nested cross-validation needs three folds, there are {len(names)}")
    for pair in itertools.combinations(names, 2):
        if len(np.unique(labels[~np.isin(folds, pair)])) < 2:
            raise UserError(
                f"without folds {pair[0]} and {pair[1]}, numbered from 0, training records have "
                "fewer than two classes"
            )
    seen: dict[str, int] = {}
    for fold, source in zip(folds.tolist(), sources, strict=True):
        if seen.setdefault(source, fold) != fold:
            raise UserError(
                f"source {source} is in two folds: a test fold would have been heard in training"
            )


def _clips(features: np.ndarray) -> np.ndarray:
    return features.reshape(-1, features.shape[-1]).astype(np.float64)


def _machine(kernel: Kernel, cost: float) -> LinearSVC | SVC:
    if kernel == "linear":
        # The primal problem: the dual does not converge in thousands of passes at large costs.
        return LinearSVC(C=cost, dual=False)
    return SVC(C=cost, kernel="rbf", gamma="scale", decision_function_shape="ovr")


def _decisions(model: LinearSVC | SVC, features: np.ndarray, classes: int) -> np.ndarray:
    """Returns [n, classes]; a class that training did not have is never chosen."""
    values = model.decision_function(features)
    if values.ndim == 1:
        values = np.stack([-values, values], axis=1)
    decisions = np.full((len(values), classes), values.min() - 1.0)
    decisions[:, model.classes_] = values
    return decisions


def audio_classification(
    config: ml_collections.ConfigDict, workdir: epath.PathLike
) -> dict[str, Any] | None:
    """Runs the protocol by `configs/audio_classification.py`; returns as `run_protocol`.

    Raises:
        UserError: if the data set lacks the labels, or a record's class or fold is unknown.
    """
    data, spec = config.data, feature_spec(config, by_clip=True)
    records = RecordDataset(data.directory, data.split)
    names = _fold_names(records, data.fold_label)
    encoders = split_encoders(
        config.encoder, {name: f"{data.fold_label}={name}" for name in names}, "audio"
    )
    first = next(iter(encoders.values()))

    def selected(select: str) -> ClipRecords:
        return open_clips(
            first,
            "audio",
            records,
            Selection.parse(select),
            spec,
            labels=[data.label, data.fold_label],
            leave_out=data.leave_out,
        )

    clips = selected("")
    labels, folds = (clips.classes_of(label) for label in (data.label, data.fold_label))
    check_folds(labels, folds, clips.sources)
    splits = [
        Split(
            name,
            encoders[name],
            selected(f"{data.fold_label}={name}"),
            selected(f"{data.fold_label}!={name}"),
        )
        for name in (records.class_names[data.fold_label][fold] for fold in np.unique(folds))
    ]
    distinct = {split.encoder.fingerprint: split.encoder for split in splits}

    def compute(context: Context) -> dict[str, np.ndarray]:
        with context.stages("features"):
            features = record_features(
                distinct | context.random(), clips, spec, directory=context.directory
            )
        if config.baselines.classical:
            with context.stages("classical features"):
                features |= classical_record_features(
                    clips,
                    threads=data.threads,
                    part_records=spec.part_records,
                    directory=context.directory,
                )
        return features

    def measure(context: Context, features: dict[str, np.ndarray]) -> Measured:
        by_item = {
            name: values if values.ndim == 3 else values[:, None]
            for name, values in features.items()
        }
        settings = config.evaluation
        own = [by_item[split.encoder.fingerprint] for split in splits]
        tasks: dict[str, tuple[list[np.ndarray], Kernel, Sequence[float]]] = {
            "": (own, "linear", settings.costs)
        }
        if "random" in by_item:
            tasks["random"] = [by_item["random"]] * len(splits), "linear", settings.costs
        if "mfcc" in by_item:
            mfcc, log_mel = ([by_item[name]] * len(splits) for name in ("mfcc", "log_mel"))
            tasks["mfcc_rbf"] = mfcc, "rbf", settings.classical_costs
            tasks["log_mel_rbf"] = log_mel, "rbf", settings.classical_costs
            tasks["log_mel_linear"] = log_mel, "linear", settings.classical_linear_costs
        class_names = records.class_names[data.label]
        with context.stages("classifiers"):
            results = {
                name: classify_folds(
                    values,
                    labels,
                    folds,
                    classes=len(class_names),
                    kernel=kernel,
                    costs=tuple(costs),
                )
                for name, (values, kernel, costs) in tasks.items()
            }
        return _measured(config, results, clips, labels, folds, class_names)

    return run_protocol(
        PROTOCOL,
        config,
        workdir,
        splits,
        compute=compute,
        measure=measure,
        data={"all": clips.fingerprint},
    )


def _fold_names(records: RecordDataset, label: str) -> list[str]:
    """Returns the names of the folds that records have, or of all if none is known."""
    if label not in records.class_names:
        raise UserError(
            f"{records} has the labels {', '.join(sorted(records.class_names)) or 'none'}, not "
            f"{label!r}: set data.fold_label"
        )
    names = records.class_names[label]
    numbers = records.labels[label] if label in records.labels else np.arange(len(names))
    known = np.unique(numbers[numbers >= 0])
    return [names[number] for number in known] or names


def _measured(
    config: ml_collections.ConfigDict,
    results: Mapping[str, FoldResult],
    clips: ClipRecords,
    labels: np.ndarray,
    folds: np.ndarray,
    class_names: Sequence[str],
) -> Measured:
    values: dict[str, np.ndarray] = {"fold": folds, "label": labels}
    metrics, choices, differences = {}, {}, {}
    for name, result in results.items():
        suffix = f"_{name}" if name else ""
        values[f"correct{suffix}"] = result.correct
        values[f"predicted{suffix}"] = result.predicted
        metrics[f"accuracy{suffix}"] = Metric(
            "class_mean",  # mean over folds of the accuracy within each
            (f"correct{suffix}", "fold"),
            f"accuracy, {_TITLES[name]}",
            chance=1 / len(class_names),
            headline=name in ("", "random"),
        )
        choices[name or "encoder"] = {
            "cost": result.costs,
            "inner_accuracy": result.inner_accuracy,
            "fold_accuracy": [
                float(result.correct[folds == fold].mean()) for fold in np.unique(folds)
            ],
        }
        if name:
            pair = compare(
                "class_mean",
                [result.correct, folds],
                [results[""].correct, folds],
                np.array(clips.sources),
                resamples=config.bootstrap.resamples,
                seed=config.seed,
            )
            differences[name] = pair.difference._asdict() | {"p_value": pair.p_value}
    confusion = confusion_matrix(labels, results[""].predicted, len(class_names))
    rows = [
        [
            _TITLES[name],
            *(as_text(value) for value in choices[name or "encoder"]["fold_accuracy"]),
            ", ".join(f"{cost:g}" for cost in result.costs),
        ]
        for name, result in results.items()
    ]
    fold_names = clips.records.class_names[config.data.fold_label]
    tested = [fold_names[int(fold)] for fold in np.unique(folds)]
    header = ["", *(f"fold {name}" for name in tested), "costs"]
    return Measured(
        Outcomes(clips.record_ids, clips.sources, values),
        metrics,
        details={
            "by_fold": choices,
            "encoder_minus": differences,
            "confusion": confusion.tolist(),
            "classes": list(class_names),
            "folds": tested,
            "left_out": clips.left_out,
        },
        sections=[
            section(
                "By fold",
                "Accuracy when each fold is the test fold, and the cost that its training folds "
                "chose.",
                table(header, rows),
            ),
            section(
                "Confusion",
                "Rows are true classes, columns predictions from the encoder, in % of the row.",
                matrix("all folds", confusion, class_names),
            ),
        ],
    )
