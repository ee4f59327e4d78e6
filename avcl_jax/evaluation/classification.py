"""Linear probes of frozen encoders, video or audio, over training and test records or folds.

python -m avcl_jax.main --config=configs/linear_probe.py:ucf101 --config.encoder=RUN
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
from etils import epath

from avcl_jax.data.clips import ClipRecords
from avcl_jax.errors import UserError
from avcl_jax.evaluation.driver import Context, run_protocol
from avcl_jax.evaluation.features import (
    classical_record_features,
    record_features,
)
from avcl_jax.evaluation.linear import (
    Kind,
    LinearProbe,
    fit_probe,
    held_out_groups,
    ranked_classes,
)
from avcl_jax.evaluation.page import as_text, matrices, section, table
from avcl_jax.evaluation.protocol import Measured, Metric, Outcomes, Protocol
from avcl_jax.evaluation.splits import (
    Split,
    clip_splits,
    numbered_sides,
)
from avcl_jax.evaluation.statistics import class_mean, compare, confusion_matrix, top_k_hits
from avcl_jax.export.runs import EncoderSource

# A matrix of more classes than this cannot be read on a page; the most confused pairs are listed.
_MATRIX_CLASSES = 25
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
    choice = (
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
        f"C is chosen by {choice}, the smallest of equally good ones. The classifier is then "
        "trained on all training records. Test records decide nothing.",
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


def class_results(
    splits: Sequence[Split[ClipRecords]], label: str, scores: Mapping[str, Sequence[np.ndarray]]
) -> tuple[Outcomes, dict[str, Metric], dict[str, Any], str]:
    """Scores records of one class each; metrics are means over splits.

    Args:
        splits: tested splits.
        label: label of the classes.
        scores: float [test records, classes] of each split, by network; "" is the first.

    Returns:
        Outcomes, metrics, details, and the section that shows the confusion of the network "".
    """
    names = splits[0].test.records.class_names[label]
    by_split = [split.test.classes_of(label) for split in splits]
    labels, classes = np.concatenate(by_split), len(names)
    number = np.repeat(np.arange(len(splits)), [len(split.test) for split in splits])
    mean = f", mean over {len(splits)} splits" * (len(splits) > 1)
    # Cells of the mean over splits of the mean over classes.
    values = {"split": number, "label": labels, "split_class": number * classes + labels}
    metrics: dict[str, Metric] = {}
    for name, of_splits in scores.items():
        suffix, what = (f"_{name}", f", {_TITLES[name]}") if name else ("", "")
        rows = [("mean_class_accuracy", "mean class accuracy", "top1", "split_class", 1)]
        for k in (5, 1):
            if k < classes:  # of five classes, all are among the first five
                values[f"top{k}{suffix}"] = top_k_hits(np.concatenate(of_splits), labels, k)
                rows.insert(0, (f"top{k}", f"top-{k}", f"top{k}", "split", k))
        for key, title, hit, within, k in rows:
            metrics[key + suffix] = Metric(
                "class_mean",
                (hit + suffix, within),
                title + what + mean,
                chance=k / classes,
                headline=name in ("", "random"),
            )
    confusion = confusion_matrix(labels, np.concatenate(scores[""]).argmax(axis=1), classes)
    details: dict[str, Any] = {"classes": list(names), "splits": []}
    if classes <= _MATRIX_CLASSES:
        details["confusion"] = confusion.tolist()
    for split, logits, own in zip(splits, scores[""], by_split, strict=True):
        hits = top_k_hits(logits, own, 1)
        accuracies = {"top1": float(hits.mean()), "mean_class_accuracy": class_mean(hits, own)}
        details["splits"].append(_described(split) | accuracies)
    outcomes = _outcomes(splits, values)
    return outcomes, metrics, details, _confusion_section(confusion, names)


def _described(split: Split[ClipRecords]) -> dict[str, Any]:
    """Returns name, encoder and numbers of records of a split, as JSON."""
    return {
        "name": split.name,
        "encoder": {"path": split.encoder.path, "fingerprint": split.encoder.fingerprint},
        "train_records": len(split.train),
        "test_records": len(split.test),
        "left_out": split.train.left_out + split.test.left_out,
    }


def _outcomes(splits: Sequence[Split[Any]], values: Mapping[str, np.ndarray]) -> Outcomes:
    """Returns values of the test records of all splits, one after the other, as outcomes."""
    return Outcomes(
        [f"{split.name}/{record}" for split in splits for record in split.test.record_ids],
        [source for split in splits for source in split.test.sources],
        values,
    )


def splits_section(splits: Sequence[Mapping[str, Any]]) -> str:
    """Returns the section that shows records and accuracies of the splits in the details."""
    counts = {"trained on": "train_records", "tested on": "test_records", "left out": "left_out"}
    accuracies = {"top-1": "top1", "mean class": "mean_class_accuracy"}
    caption = ""
    if "train_accuracy" in splits[0]:
        accuracies["training top-1"] = "train_accuracy"
        caption = "Training top-1 is that of augmented single clips, at the end."
    rows = [
        [
            split["name"],
            split["encoder"]["path"],
            *(str(split[key]) for key in counts.values()),
            *(as_text(split[key]) for key in accuracies.values()),
        ]
        for split in splits
    ]
    return section("Splits", caption, table(("", "encoder", *counts, *accuracies), rows))


def _confusion_section(confusion: np.ndarray, names: Sequence[str]) -> str:
    """Returns the section that shows which classes are taken for which."""
    if len(names) <= _MATRIX_CLASSES:
        caption = "Rows are true classes, in % of the row."
        return section("Confusion", caption, matrices({"All splits": (confusion, names)}))
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
    data = config.data
    labels = [label for label in (data.label, data.group_label) if label]
    splits, spec = clip_splits(
        config, config.modality, numbered_sides(data), labels, by_clip=True, tags=data.label
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
            features = record_features(
                networks | context.random(), sides, spec, directory=context.directory
            )
        if config.baselines.classical:
            with context.stages("classical features"):
                classical = classical_record_features(sides, spec, directory=context.directory)
            features = [one | other for one, other in zip(features, classical, strict=True)]
        return features

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


def _measured(
    config: ml_collections.ConfigDict,
    splits: Sequence[Split[ClipRecords]],
    targets: Sequence[np.ndarray],
    scores: Mapping[str, Sequence[np.ndarray]],
    probes: Mapping[str, Sequence[LinearProbe]],
) -> Measured:
    label, sections = config.data.label, [_choice_section(splits, probes)]
    if targets[0].ndim == 1:
        outcomes, metrics, details, confusion = class_results(splits, label, scores)
        details["encoder_minus"] = _differences(config, outcomes, list(scores)[1:])
        sections += [splits_section(details["splits"]), confusion]
    else:
        outcomes, metrics = _tag_results(splits, targets[0], scores)
        details = {"classes": list(splits[0].test.records.class_names[label])}
        details["splits"] = [_described(split) for split in splits]
    for place, split in enumerate(details["splits"]):
        split["chosen"] = {
            name or "encoder": {
                "cost": by_split[place].cost,
                "held_out_score": {
                    f"{c:g}": value for c, value in by_split[place].held_out.items()
                },
            }
            for name, by_split in probes.items()
        }
        if targets[0].ndim == 1:
            for name, by_network in scores.items():
                hits = top_k_hits(by_network[place], targets[place], 1)
                split["chosen"][name or "encoder"]["top1"] = float(hits.mean())
    return Measured(outcomes, metrics, details, sections)


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


def _tag_results(
    splits: Sequence[Split[ClipRecords]],
    targets: np.ndarray,
    scores: Mapping[str, Sequence[np.ndarray]],
) -> tuple[Outcomes, dict[str, Metric]]:
    """Scores records that may have several classes, of one split."""
    values, metrics = {"relevant": targets}, {}
    chance = float(targets[:, ranked_classes(targets)].mean(axis=0).mean())
    for name, (of_split,) in scores.items():
        suffix, what = (f"_{name}", f", {_TITLES[name]}") if name else ("", "")
        values[f"scores{suffix}"] = of_split.astype(np.float32)
        for key, kind, title, unit, level in (
            ("map", "mean_average_precision", "mAP", "share", chance),
            ("auc", "mean_auc", "AUC", "share", 0.5),
            ("d_prime", "d_prime", "d′", "number", 0.0),
        ):
            metrics[key + suffix] = Metric(
                kind,
                (f"scores{suffix}", "relevant"),
                title + what,
                unit=unit,
                chance=level,
                headline=not name,
            )
    return _outcomes(splits, values), metrics
