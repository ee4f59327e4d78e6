"""Metrics of classification, of one class per record or of several, and sections that show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from avcl_jax.data.clips import ClipRecords
from avcl_jax.evaluation.linear import ranked_classes
from avcl_jax.evaluation.page import as_text, matrices, section, table
from avcl_jax.evaluation.protocol import Measured, Metric, Outcomes
from avcl_jax.evaluation.splits import Split
from avcl_jax.evaluation.statistics import class_mean, confusion_matrix, top_k_hits

# A matrix of more classes than this cannot be read on a page; the most confused pairs are listed.
_MATRIX_CLASSES = 25
_LISTED = 15

# Titles of networks by name; "" is the one that is measured, the others are baselines.
NETWORKS = {
    "": "trained encoder",
    "random": "random encoder",
    "mfcc_rbf": "MFCC + RBF",
    "log_mel_rbf": "log-mel + RBF",
    "log_mel_linear": "log-mel + linear",
}


def targets_of(clips: ClipRecords, label: str) -> np.ndarray:
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
    confusion = confusion_matrix(labels, np.concatenate(scores[""]).argmax(axis=1), classes)
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


def tag_results(
    splits: Sequence[Split[ClipRecords]], label: str, scores: Mapping[str, Sequence[np.ndarray]]
) -> Measured:
    """Scores records that may have several classes, of one split; arguments of `class_results`."""
    (split,) = splits
    targets = targets_of(split.test, label)
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
    return (f"_{network}", f", {NETWORKS[network]}") if network else ("", "")


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
