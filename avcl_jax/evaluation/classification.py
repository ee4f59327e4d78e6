"""Linear probes of frozen encoders, video or audio, over training and test records or folds.

python -m avcl_jax.main --config=configs/linear_probe.py:ucf101 --config.encoder=RUN
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
from etils import epath

from avcl_jax.data.clips import ClipRecords
from avcl_jax.data.records import RecordDataset
from avcl_jax.data.selection import Selection
from avcl_jax.errors import UserError
from avcl_jax.evaluation.driver import Context, run_protocol
from avcl_jax.evaluation.features import (
    classical_record_features,
    open_clips,
    record_features,
)
from avcl_jax.evaluation.linear import (
    Kind,
    LinearProbe,
    fit_probe,
    held_out_groups,
    ranked_classes,
)
from avcl_jax.evaluation.page import as_text, matrix, section, table
from avcl_jax.evaluation.protocol import Measured, Metric, Outcomes, Protocol
from avcl_jax.evaluation.splits import (
    Split,
    feature_spec,
    numbered_sides,
    open_splits,
)
from avcl_jax.evaluation.statistics import compare, confusion_matrix, top_k_hits
from avcl_jax.export.runs import EncoderSource

# A matrix of more classes than this cannot be read on a page; the most confused pairs are listed.
MATRIX_CLASSES = 25
_LISTED = 15

_CLASSIFIERS = {
    "logistic": "Multinomial logistic regression, L2, L-BFGS until the gradient is below "
    "probe.tolerance.",
    "svm": "A linear support vector machine: one class against the rest, squared hinge loss, L2.",
}
# Classical features of whole audio by name of the baseline, the classifier, and the setting of C.
_CLASSICAL: Mapping[str, tuple[str, Kind, str]] = {
    "mfcc_rbf": ("mfcc", "rbf", "classical_costs"),
    "log_mel_rbf": ("log_mel", "rbf", "classical_costs"),
    "log_mel_linear": ("log_mel", "svm", "classical_linear_costs"),
}
_TITLES = {
    "": "trained encoder",
    "random": "random encoder",
    "mfcc_rbf": "MFCC + RBF",
    "log_mel_rbf": "log-mel + RBF",
    "log_mel_linear": "log-mel + linear",
}


def protocol_of(config: ml_collections.ConfigDict, tags: bool) -> Protocol:
    """Returns the protocol of a config; `tags` if a record may have several classes."""
    held = (
        f"holding out each class of {config.data.group_label} among the training records in turn"
        if config.data.group_label
        else "cross-validation over the sources of the training records (probe.folds random folds)"
    )
    shared = (
        "The encoder is frozen: one for all splits, or one for each, pretrained on none of its "
        "test records.",
        "Each record gives features.clips clips at each of features.speeds, uniformly spaced, the "
        "largest centred square; its feature is the encoder's output over time and space by "
        "features.clip_pooling, and over clips by features.record_pooling ('clips': each clip is a "
        "training example, and a record gets the mean score of its clips).",
        "Features are standardised by mean and deviation of the training records.",
        f"C is chosen by {held}, the smallest of equally good ones. The classifier is then trained "
        "on all training records. Test records decide nothing.",
    )
    if tags:
        return Protocol(
            name="linear_probe_tagging",
            version=3,
            title="Tagging by a linear probe",
            definition=(
                *shared,
                "One logistic regression per class, L2 with one C for all, L-BFGS until the "
                "gradient is below probe.tolerance; C is chosen by mAP.",
                "mAP is the mean over classes of average precision, of equal scores the wrong "
                "first; AUC the mean over classes of the area under the ROC curve; d′ is √2 times "
                "the normal quantile of the mean AUC. Classes without a positive or without a "
                "negative test record are left out of the means.",
            ),
        )
    return Protocol(
        name="linear_probe",
        version=3,
        title="Linear probe",
        definition=(
            *shared,
            _CLASSIFIERS[config.probe.classifier],
            "Top-1, top-5 (a tie counts against the record's class), and the mean over classes of "
            "the accuracy within each; with several splits the mean over splits.",
            "Baselines classify the same records in the same way: a random encoder of the same "
            "shape; with baselines.classical statistics of MFCC and of the log-mel spectrum of the "
            "whole audio.",
        ),
    )


def class_scores(
    scores: np.ndarray, labels: np.ndarray, *, split: np.ndarray, suffix: str = "", what: str = ""
) -> tuple[dict[str, np.ndarray], dict[str, Metric]]:
    """Returns outcomes of records with one class each, and their metrics as means over splits.

    Args:
        scores: float [n, classes].
        labels: int [n].
        split: int [n], number of the split in which a record was tested.
        suffix: appended to the names of outcomes and metrics, to tell networks apart.
        what: appended to the titles of metrics.
    """
    classes, splits = scores.shape[1], len(np.unique(split))
    what += f", mean over {splits} splits" * (splits > 1)
    values = {
        "split": split,
        "label": labels,
        # Cells of the mean over splits of the mean over classes.
        "split_class": split * classes + labels,
    }
    metrics = {}
    for k in (1, 5):
        if k >= classes:  # of five classes, all are among the first five
            continue
        values[f"top{k}{suffix}"] = top_k_hits(scores, labels, k)
        metrics[f"top{k}{suffix}"] = Metric(
            "class_mean",
            (f"top{k}{suffix}", "split"),
            f"top-{k}{what}",
            chance=k / classes,
            headline=True,
        )
    metrics[f"mean_class_accuracy{suffix}"] = Metric(
        "class_mean",
        (f"top1{suffix}", "split_class"),
        f"mean class accuracy{what}",
        chance=1 / classes,
        headline=True,
    )
    return values, metrics


def described(split: Split[Any]) -> dict[str, Any]:
    """Returns name, encoder and numbers of records of a split of `ModalityRecords`, as JSON."""
    return {
        "name": split.name,
        "encoder": {"path": split.encoder.path, "fingerprint": split.encoder.fingerprint},
        "train_records": len(split.train),
        "test_records": len(split.test),
        "left_out": split.train.left_out + split.test.left_out,
    }


def confusion_section(confusion: np.ndarray, names: Sequence[str]) -> str:
    """Returns the section that shows which classes are taken for which."""
    if len(names) <= MATRIX_CLASSES:
        shown = matrix("All splits", confusion, names)
        return section("Confusion", "Rows are true classes, in % of the row.", shown)
    totals = np.maximum(confusion.sum(axis=1), 1)
    wrong = confusion - np.diag(np.diag(confusion))
    pairs = np.argsort(-wrong, axis=None, kind="stable")[:_LISTED]
    rows = [
        [names[true], names[taken], f"{confusion[true, taken]} of {totals[true]}"]
        for true, taken in zip(*np.unravel_index(pairs, wrong.shape), strict=True)
        if wrong[true, taken]
    ]
    accuracy = np.diag(confusion) / totals
    hardest = [
        [names[i], as_text(float(accuracy[i])), str(totals[i])]
        for i in np.argsort(accuracy, kind="stable")[:_LISTED]
        if confusion[i].sum()
    ]
    return section(
        "Confusion",
        f"The {_LISTED} most frequent mistakes and the {_LISTED} hardest of {len(names)} classes.",
        table(("class", "taken for", "records"), rows),
        table(("class", "accuracy", "records"), hardest),
    )


def run_linear_probe(
    config: ml_collections.ConfigDict, workdir: epath.PathLike
) -> dict[str, Any] | None:
    """Runs the protocol by `configs/linear_probe.py`; returns as `run_protocol`.

    Raises:
        ExportError: if there is no encoder of the modality.
        SelectionError: if records lack the label or the modality.
        UserError: if labels, records or features do not fit the protocol.
    """
    spec, data = feature_spec(config, by_clip=True), config.data

    def clips(source: EncoderSource, records: RecordDataset, selection: Selection) -> ClipRecords:
        needed = [label for label in (data.label, data.group_label) if label]
        return open_clips(
            source,
            config.modality,
            records,
            selection,
            spec,
            labels=[label for label in needed if label not in records.multilabel],
            leave_out=data.leave_out,
        )

    splits = open_splits(
        data.directory, config.encoder, config.modality, numbered_sides(data), clips
    )
    sides = [side for split in splits for side in (split.train, split.test)]
    targets = [_targets(side, data.label) for side in sides]
    tags = targets[0].ndim == 2
    _check_settings(config, tags)
    if tags:
        _check_tags(data, targets)
    groups = [
        _groups(config, split.train, t) for split, t in zip(splits, targets[::2], strict=True)
    ]

    def compute(context: Context) -> list[dict[str, np.ndarray]]:
        networks = {split.encoder.fingerprint: split.encoder for split in splits}
        with context.stages("features"):
            found = record_features(
                networks | context.random(), sides, spec, directory=context.directory
            )
        if config.baselines.classical:
            with context.stages("classical features"):
                classical = classical_record_features(sides, spec, directory=context.directory)
            found = [one | other for one, other in zip(found, classical, strict=True)]
        return found

    def measure(context: Context, features: list[dict[str, np.ndarray]]) -> Measured:
        probes: dict[str, list[LinearProbe]] = {}
        scores: dict[str, list[np.ndarray]] = {}
        for place, split in enumerate(splits):
            train, test = features[2 * place : 2 * place + 2]
            for name, (feature, classifier, costs) in _tasks(config, split.encoder).items():
                with context.stages(f"classifier, {_TITLES[name]}, {split.name}"):
                    probe = fit_probe(
                        train[feature],
                        targets[2 * place],
                        groups[place],
                        classes=len(split.train.records.class_names[data.label]),
                        classifier=classifier,
                        costs=costs,
                        iterations=config.probe.iterations,
                        tolerance=config.probe.tolerance,
                    )
                probes.setdefault(name, []).append(probe)
                scores.setdefault(name, []).append(probe.scores(test[feature]))
        return _measured(config, splits, targets[1::2], scores, probes)

    return run_protocol(
        protocol_of(config, tags), config, workdir, splits, compute=compute, measure=measure
    )


def _tasks(
    config: ml_collections.ConfigDict, encoder: EncoderSource
) -> dict[str, tuple[str, Kind, tuple[float, ...]]]:
    """Returns features, classifier and candidates for C of the encoder and of each baseline."""
    classifier, costs = config.probe.classifier, tuple(config.probe.costs)
    tasks = {"": (encoder.fingerprint, classifier, costs)}
    if config.baselines.random:
        tasks["random"] = "random", classifier, costs
    if config.baselines.classical:
        for name, (feature, kind, setting) in _CLASSICAL.items():
            tasks[name] = feature, kind, tuple(config.baselines[setting])
    return tasks


def _targets(clips: ClipRecords, label: str) -> np.ndarray:
    """Returns the class of each record, int [n], or bool [n, classes] of several."""
    if label in clips.records.multilabel:
        return clips.records.class_matrix(label, clips.indices.tolist())
    return clips.classes_of(label)


def _groups(
    config: ml_collections.ConfigDict, train: ClipRecords, targets: np.ndarray
) -> np.ndarray:
    """Returns the group of each training record, by which C is chosen."""
    label = config.data.group_label
    if not label:
        return held_out_groups(targets, train.sources, folds=config.probe.folds, seed=config.seed)
    groups = train.classes_of(label)
    if len(names := np.unique(groups)) < 2:
        raise UserError(
            f"C is chosen by classes of data.group_label {label!r}, and all of {train} have one: "
            "two are needed"
        )
    for group in names:
        if len(np.unique(targets[groups != group], axis=0)) < 2:
            raise UserError(
                f"without {label}={train.records.class_names[label][group]}, {train} has fewer "
                "than two classes"
            )
    return groups


def _check_settings(config: ml_collections.ConfigDict, tags: bool) -> None:
    classifier = config.probe.classifier
    if classifier not in _CLASSIFIERS:
        raise UserError(f"probe.classifier {classifier!r} must be one of {', '.join(_CLASSIFIERS)}")
    if config.baselines.classical and config.modality != "audio":
        raise UserError("baselines.classical are features of audio: set it to False")
    if tags and (classifier != "logistic" or config.baselines.classical):
        raise UserError(
            f"{config.data.label!r} may have several classes per record: set "
            "probe.classifier='logistic' and baselines.classical=False"
        )


def _check_tags(data: ml_collections.ConfigDict, targets: Sequence[np.ndarray]) -> None:
    """Refuses records of several classes for which mAP is not defined."""
    if len(targets) > 2:
        raise UserError(
            f"{data.label!r} may have several classes per record, for which mAP over "
            f"{len(targets) // 2} splits is not defined: set one data.train_select and test_select"
        )
    for role, side in zip(("train", "test"), targets, strict=True):
        if not ranked_classes(side).any():
            raise UserError(
                f"no class of {data.label!r} has both positive and negative records among "
                f"the {role} records, so mAP is not defined: change data.{role}_select"
            )


def split_outcomes(splits: Sequence[Split[Any]], values: Mapping[str, np.ndarray]) -> Outcomes:
    """Returns values of the test records of all splits, one after the other, as outcomes."""
    return Outcomes(
        [f"{split.name}/{record}" for split in splits for record in split.test.record_ids],
        [source for split in splits for source in split.test.sources],
        values,
    )


def _measured(
    config: ml_collections.ConfigDict,
    splits: Sequence[Split[ClipRecords]],
    tested: Sequence[np.ndarray],
    scores: Mapping[str, Sequence[np.ndarray]],
    probes: Mapping[str, Sequence[LinearProbe]],
) -> Measured:
    class_names = splits[0].test.records.class_names[config.data.label]
    targets = np.concatenate(tested)
    number = np.repeat(np.arange(len(splits)), [len(split.test) for split in splits])
    values: dict[str, np.ndarray] = {}
    metrics: dict[str, Metric] = {}
    for name, by_split in scores.items():
        suffix, what = (f"_{name}", f", {_TITLES[name]}") if name else ("", "")
        score = _tag_scores if targets.ndim == 2 else functools.partial(class_scores, split=number)
        found = score(np.concatenate(by_split), targets, suffix=suffix, what=what)
        values |= found[0]
        metrics |= found[1]
    outcomes = split_outcomes(splits, values)
    details: dict[str, Any] = {"classes": list(class_names)}
    sections = [_choice_section(splits, probes)]
    if targets.ndim == 1:
        predicted = np.concatenate(scores[""]).argmax(axis=1)
        confusion = confusion_matrix(targets, predicted, len(class_names))
        sections.append(confusion_section(confusion, class_names))
        details["encoder_minus"] = _differences(config, outcomes, list(scores)[1:])
    details["splits"] = [
        described(split)
        | {
            "chosen": {
                name or "encoder": {
                    "cost": by_split[place].cost,
                    "held_out_score": {
                        f"{cost:g}": value for cost, value in by_split[place].held_out.items()
                    },
                }
                | ({"top1": _top1(scores[name][place], tested[place])} if targets.ndim == 1 else {})
                for name, by_split in probes.items()
            }
        }
        for place, split in enumerate(splits)
    ]
    return Measured(outcomes, metrics, details, sections)


def _top1(scores: np.ndarray, labels: np.ndarray) -> float:
    return float(top_k_hits(scores, labels, 1).mean())


def _differences(
    config: ml_collections.ConfigDict, outcomes: Outcomes, names: Sequence[str]
) -> dict[str, Any]:
    """Returns top-1 of the trained encoder minus that of each baseline, with paired tests."""
    values = outcomes.values
    differences = {}
    for name in names:
        pair = compare(
            "class_mean",
            [values[f"top1_{name}"], values["split"]],
            [values["top1"], values["split"]],
            np.array(outcomes.sources),
            resamples=config.bootstrap.resamples,
            seed=config.seed,
        )
        differences[name] = pair.difference._asdict() | {"p_value": pair.p_value}
    return differences


def _choice_section(
    splits: Sequence[Split[Any]], probes: Mapping[str, Sequence[LinearProbe]]
) -> str:
    """Returns the section that shows which C was chosen, and by which scores."""
    costs = sorted({cost for by_split in probes.values() for cost in by_split[0].held_out})
    rows = [
        [
            _TITLES[name],
            split.name,
            f"{probe.cost:g}",
            *(as_text(probe.held_out[c]) if c in probe.held_out else "" for c in costs),
        ]
        for name, by_split in probes.items()
        for split, probe in zip(splits, by_split, strict=True)
    ]
    return section(
        "C",
        "Score of each C on the held-out training records, mean over the groups held out.",
        table(("", "split", "chosen", *(f"C = {cost:g}" for cost in costs)), rows),
    )


def _tag_scores(
    scores: np.ndarray, targets: np.ndarray, *, suffix: str, what: str
) -> tuple[dict[str, np.ndarray], dict[str, Metric]]:
    """Returns outcomes and metrics of records that may have several classes."""
    values = {"relevant": targets, f"scores{suffix}": scores.astype(np.float32)}
    chance = float(targets[:, ranked_classes(targets)].mean(axis=0).mean())
    metrics = {
        f"{key}{suffix}": Metric(
            kind,
            (f"scores{suffix}", "relevant"),
            title + what,
            unit=unit,
            chance=level,
            headline=not suffix,
        )
        for key, kind, title, unit, level in (
            ("map", "mean_average_precision", "mAP", "share", chance),
            ("auc", "mean_auc", "AUC", "share", 0.5),
            ("d_prime", "d_prime", "d′", "number", 0.0),
        )
    }
    return values, metrics
