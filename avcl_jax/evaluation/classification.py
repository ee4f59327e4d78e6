"""Classification: linear probes of frozen encoders, and metrics that fine-tuning has in common.

python -m avcl_jax.main --config=configs/linear_probe.py:ucf101 --config.encoder=RUN
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
from etils import epath
from sklearn.metrics import confusion_matrix

from avcl_jax.data.clips import ClipRecords
from avcl_jax.errors import UserError
from avcl_jax.evaluation.driver import Context, run_protocol
from avcl_jax.evaluation.features import classical_record_features, record_features
from avcl_jax.evaluation.linear import Kind, LinearProbe, fit_probe, held_out_groups, ranked_classes
from avcl_jax.evaluation.protocol import Measured, Metric, Outcomes, Protocol
from avcl_jax.evaluation.splits import Split, clip_splits
from avcl_jax.evaluation.statistics import class_mean, compare, top_k_hits
from avcl_jax.page import as_text, matrices, section, table

_CLASSIFIERS = {
    "logistic": "Multinomial logistic regression, L2, L-BFGS until the gradient is below "
    "probe.tolerance.",
    "svm": "A linear support vector machine: one class against the rest, squared hinge loss, L2.",
}
# Baselines of classical features of whole audio: title, features, classifier, setting of C.
_CLASSICAL: Mapping[str, tuple[str, str, Kind, str]] = {
    "mfcc_rbf": ("MFCC + RBF", "mfcc", "rbf", "classical_costs"),
    "log_mel_rbf": ("log-mel + RBF", "log_mel", "rbf", "classical_costs"),
    "log_mel_linear": ("log-mel + linear", "log_mel", "svm", "classical_linear_costs"),
}
# Titles of networks by name; "" is the one that is measured, the others are baselines.
_NETWORKS = {"": "trained encoder", "random": "random encoder"}
_NETWORKS |= {name: title for name, (title, *_) in _CLASSICAL.items()}
# A matrix of more classes than this cannot be read on a page; the most confused pairs are listed.
_MATRIX_CLASSES = 25
_LISTED = 15


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


def run_linear_probe(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> dict[str, Any]:
    """Runs the protocol by `configs/linear_probe.py`; returns as `run_protocol`.

    Raises:
        ExportError: if there is no encoder of the modality.
        SelectionError: if records lack the label or the modality.
        UserError: if labels, records or features do not fit the protocol.
    """
    data, settings, baselines = config.data, config.probe.to_dict(), config.baselines
    labels = [label for label in (data.label, data.group_label) if label]
    splits, spec = clip_splits(config, config.modality, labels, by_clip=True, tags=data.label)
    sides = [side for split in splits for side in (split.train, split.test)]
    targets = [_targets_of(side, data.label) for side in sides]
    tags = targets[0].ndim == 2
    _check(config, targets, tags)
    folds, classifier, costs = settings.pop("folds"), settings.pop("classifier"), config.probe.costs
    groups = [
        _fold_groups(split.train, data.group_label, own)
        if data.group_label
        else held_out_groups(own, split.train.sources, folds=folds, seed=config.seed)
        for split, own in zip(splits, targets[::2], strict=True)
    ]

    def compute(context: Context) -> list[dict[str, np.ndarray]]:
        networks = {split.encoder.fingerprint: split.encoder for split in splits}
        with context.stages("features"):
            features = record_features(
                networks | context.random(), sides, spec, directory=context.directory
            )
        if baselines.classical:
            with context.stages("classical features"):
                classical = classical_record_features(sides, spec, directory=context.directory)
            features = [one | other for one, other in zip(features, classical, strict=True)]
        return features

    def measure(context: Context, features: list[dict[str, np.ndarray]]) -> Measured:
        tasks: dict[str, tuple[str, Kind, Sequence[float]]] = {"": ("", classifier, costs)}
        if baselines.random:
            tasks["random"] = "random", classifier, costs
        if baselines.classical:
            tasks |= {n: (f, kind, baselines[c]) for n, (_, f, kind, c) in _CLASSICAL.items()}
        probes: dict[str, list[LinearProbe]] = {}
        scores: dict[str, list[np.ndarray]] = {}
        for name, (feature, kind, costs_of) in tasks.items():
            machines: dict[Any, Any] = {}
            probes[name], scores[name] = [], []
            for place, split in enumerate(splits):
                key = feature or split.encoder.fingerprint
                with context.stages(f"classifier, {_NETWORKS[name]}, {split.name}"):
                    probe = fit_probe(
                        features[2 * place][key],
                        targets[2 * place],
                        groups[place],
                        classes=len(split.train.records.class_names[data.label]),
                        machines=machines,
                        **settings | {"classifier": kind, "costs": costs_of},
                    )
                probes[name].append(probe)
                scores[name].append(probe.scores(features[2 * place + 1][key]))
        return _measured(config, splits, scores, probes, tags)

    return run_protocol(
        protocol_of(config, tags), config, workdir, splits, compute=compute, measure=measure
    )


def _fold_groups(train: ClipRecords, label: str, targets: np.ndarray) -> np.ndarray:
    """Returns the class of `label` of each training record, by which C is chosen."""
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


def _check(config: ml_collections.ConfigDict, targets: Sequence[np.ndarray], tags: bool) -> None:
    """Refuses settings that do not fit each other, and tags for which mAP is not defined."""
    data, classifier = config.data, config.probe.classifier
    if classifier not in _CLASSIFIERS:
        raise UserError(f"probe.classifier {classifier!r} must be one of {', '.join(_CLASSIFIERS)}")
    if config.baselines.classical and config.modality != "audio":
        raise UserError("baselines.classical are features of audio: set it to False")
    if not tags:
        return
    several = f"{data.label!r} may have several classes per record"
    if classifier != "logistic" or config.baselines.classical:
        raise UserError(f"{several}: set probe.classifier='logistic' and baselines.classical=False")
    if len(targets) > 2:
        raise UserError(
            f"{several}, for which mAP over {len(targets) // 2} splits is not defined: set one "
            "data.train_select and test_select"
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
    scores: Mapping[str, Sequence[np.ndarray]],
    probes: Mapping[str, Sequence[LinearProbe]],
    tags: bool,
) -> Measured:
    """Returns the results with the choice of C, and of top-1 the difference to each baseline."""
    found = (_tag_results if tags else class_results)(splits, config.data.label, scores)
    values, details = found.outcomes.values, dict(found.details)
    for place, split in enumerate(details["splits"]):
        split["chosen"] = {
            name or "encoder": {
                "cost": of_splits[place].cost,
                "held_out_score": {f"{c:g}": v for c, v in of_splits[place].held_out.items()},
            }
            for name, of_splits in probes.items()
        }
    sections = [_choice_section(splits, probes)]
    if not tags:
        details["encoder_minus"] = {}
        for name in scores:
            hits = values[f"top1_{name}" if name else "top1"]
            for place, split in enumerate(details["splits"]):
                share = float(hits[values["split"] == place].mean())
                split["chosen"][name or "encoder"]["top1"] = share
            if name:
                pair = compare(
                    "class_mean",
                    [hits, values["split"]],
                    [values["top1"], values["split"]],
                    np.array(found.outcomes.sources),
                    resamples=config.bootstrap.resamples,
                    seed=config.seed,
                )
                difference = pair.difference._asdict() | {"p_value": pair.p_value}
                details["encoder_minus"][name] = difference
        sections.append(splits_section(details["splits"]))
    return Measured(found.outcomes, found.metrics, details, [*sections, *found.sections])


def _choice_section(
    splits: Sequence[Split[Any]], probes: Mapping[str, Sequence[LinearProbe]]
) -> str:
    """Returns the section that shows which C was chosen, and by which scores."""
    costs = sorted({cost for by_split in probes.values() for cost in by_split[0].held_out})
    rows = [
        [
            _NETWORKS[name],
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


def _targets_of(clips: ClipRecords, label: str) -> np.ndarray:
    """Returns the class of each record, int [n], or bool [n, classes] of several."""
    if label in clips.records.multilabel:
        return clips.records.class_matrix(label, clips.indices.tolist())
    return clips.classes_of(label)


def class_results(
    splits: Sequence[Split[ClipRecords]], label: str, scores: Mapping[str, Sequence[np.ndarray]]
) -> Measured:
    """Scores records of one class each; metrics are means over splits.

    Args:
        splits: tested splits.
        label: label of the classes.
        scores: float [test records, classes] of each split, by network; "" is the first.

    Returns:
        The results, with the section that shows the confusion of the network "".
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
        suffix, what = _naming(name)
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
    predicted = np.concatenate(scores[""]).argmax(axis=1)
    confusion = confusion_matrix(labels, predicted, labels=range(classes))
    described = [
        _describe(split)
        | {"top1": float(hits.mean()), "mean_class_accuracy": class_mean(hits, own)}
        for place, (split, own) in enumerate(zip(splits, by_split, strict=True))
        for hits in [values["top1"][number == place]]
    ]
    details: dict[str, Any] = {"classes": list(names), "splits": described}
    if classes <= _MATRIX_CLASSES:
        details["confusion"] = confusion.tolist()
    return Measured(
        _outcomes(splits, values), metrics, details, [_confusion_section(confusion, names)]
    )


def _tag_results(
    splits: Sequence[Split[ClipRecords]], label: str, scores: Mapping[str, Sequence[np.ndarray]]
) -> Measured:
    """Scores records that may have several classes, of one split; arguments of `class_results`."""
    (split,) = splits
    targets = _targets_of(split.test, label)
    values, metrics = {"relevant": targets}, {}
    chance = float(targets[:, ranked_classes(targets)].mean(axis=0).mean())
    for name, (of_split,) in scores.items():
        suffix, what = _naming(name)
        values[f"scores{suffix}"] = of_split.astype(np.float32)
        for key, kind, title, unit, level in (
            ("map", "mean_average_precision", "mAP", "share", chance),
            ("auc", "mean_auc", "AUC", "share", 0.5),
            ("d_prime", "d_prime", "d′", "number", 0.0),
        ):
            inputs = f"scores{suffix}", "relevant"
            metrics[key + suffix] = Metric(kind, inputs, title + what, unit, level, not name)
    details = {"classes": list(split.test.records.class_names[label]), "splits": [_describe(split)]}
    return Measured(_outcomes(splits, values), metrics, details)


def _naming(network: str) -> tuple[str, str]:
    """Returns what the metrics of a network have behind their names and behind their titles."""
    return (f"_{network}", f", {_NETWORKS[network]}") if network else ("", "")


def _describe(split: Split[ClipRecords]) -> dict[str, Any]:
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
            *(split[key] for key in counts.values()),
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
    totals, right = np.maximum(confusion.sum(axis=1), 1), np.diag(confusion)
    wrong = confusion - np.diag(right)
    pairs = np.argsort(-wrong, axis=None, kind="stable")[:_LISTED]
    rows = [
        [names[true], names[taken], f"{confusion[true, taken]} of {totals[true]}"]
        for true, taken in zip(*np.unravel_index(pairs, wrong.shape), strict=True)
        if wrong[true, taken]
    ]
    hardest = [
        [names[i], as_text(float(right[i] / totals[i])), totals[i]]
        for i in np.argsort(right / totals, kind="stable")[:_LISTED]
        if confusion[i].sum()
    ]
    return section(
        "Confusion",
        f"The {_LISTED} most frequent mistakes and the {_LISTED} hardest of {len(names)} classes.",
        table(("class", "taken for", "records"), rows),
        table(("class", "accuracy", "records"), hardest),
    )
