"""What a tested classifier is worth: outcomes, figures and the report's sections."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
from etils import epath

from avcl_jax.data.labelled import LabelledRecords
from avcl_jax.encoder_source import EncoderSource
from avcl_jax.evaluation.figures import line_chart
from avcl_jax.evaluation.metrics import class_mean, confusion_matrix, top_k_hits
from avcl_jax.evaluation.page import matrix, percent, section, table
from avcl_jax.evaluation.protocol import Measured, Metric, Outcomes, Protocol

# A matrix of more classes than this cannot be read on a page; the most confused pairs are listed.
_MATRIX_CLASSES = 25
_LISTED = 15


@dataclasses.dataclass(frozen=True)
class Fold:
    """One split, trained and tested.

    Attributes:
        name: "split1".
        encoder: that it began with.
        train: records trained on.
        test: records tested.
        probabilities: float32 [test records, classes], mean softmax.
        metrics: metrics.jsonl of the training.
    """

    name: str
    encoder: EncoderSource
    train: LabelledRecords
    test: LabelledRecords
    probabilities: np.ndarray
    metrics: epath.Path


def protocol_of(config: ml_collections.ConfigDict) -> Protocol:
    """The protocol of a config: what is said of how its figures are made."""
    began = (
        "The encoder begins as pretraining left it."
        if config.init == "pretrained"
        else "The encoder begins with random weights; nothing was pretrained."
    )
    video = config.modality == "video"
    shown = f"{config.test.clips} clips at equal distances"
    if video:
        crops = config.test.crops
        where = "in the centre" if crops == 1 else f"{crops} times along the longer side"
        shown += f", cropped {where}"
    return Protocol(
        name="action_recognition" if video else "audio_recognition",
        version=2 if video else 1,
        title=f"{'Action' if video else 'Audio'} recognition by fine-tuning",
        definition=(
            "The encoder and a linear classifier on its pooled features are trained together. "
            f"{began}",
            "Training draws one clip of each record at a random time in every epoch, "
            f"{config.epochs:g} epochs.",
            f"A test record is shown as {shown}; its prediction is the mean of the clips' softmax.",
            "The network after the last epoch is tested, once; no test record is read before. "
            "Nothing is chosen by test accuracy, neither epoch nor setting.",
            "Records shorter than a clip are tested too: the last picture stays, silence follows.",
            "Figures are means over the splits. Of equal scores the wrong class counts first.",
        ),
    )


def measured(
    config: ml_collections.ConfigDict, folds: Sequence[Fold], class_names: Sequence[str]
) -> Measured:
    """Scores the predictions of all splits.

    Args:
        config: of the run.
        folds: tested splits.
        class_names: of the label.
    """
    classes = len(class_names)
    labels = np.concatenate([fold.test.classes for fold in folds])
    probabilities = np.concatenate([fold.probabilities for fold in folds])
    split = np.repeat(np.arange(len(folds)), [len(fold.test) for fold in folds])
    records = [
        (fold.test.records, int(index), fold.name) for fold in folds for index in fold.test.indices
    ]
    values, metrics = class_scores(probabilities, labels, split)
    values["predicted"] = probabilities.argmax(axis=1)
    confusion = confusion_matrix(labels, values["predicted"], classes)
    details: dict[str, Any] = {
        "init": config.init,
        "splits": [_described(fold) for fold in folds],
        "classes": list(class_names),
    }
    if classes <= _MATRIX_CLASSES:
        details["confusion"] = confusion.tolist()
    return Measured(
        outcomes=Outcomes(
            units=[f"{name}/{data.record_ids[index]}" for data, index, name in records],
            sources=[str(data.source_numbers[index]) for data, index, _ in records],
            values=values,
        ),
        metrics=metrics,
        details=details,
        sections=[
            _splits_section(details["splits"]),
            confusion_section(confusion, class_names),
            _curves_section(folds),
        ],
    )


def class_scores(
    scores: np.ndarray, labels: np.ndarray, split: np.ndarray, *, suffix: str = "", what: str = ""
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


def _described(fold: Fold) -> dict[str, Any]:
    hits = top_k_hits(fold.probabilities, fold.test.classes, 1)
    last = _curves(fold.metrics)[-1]
    # Numbers of sources are those of one split of the data set.
    shared = (
        np.intersect1d(
            fold.train.records.source_numbers[fold.train.indices],
            fold.test.records.source_numbers[fold.test.indices],
        ).size
        if fold.train.records.split == fold.test.records.split
        else None
    )
    return {
        "name": fold.name,
        "encoder": {"path": fold.encoder.path, "fingerprint": fold.encoder.fingerprint},
        "train": fold.train.fingerprint,
        "test": fold.test.fingerprint,
        "train_records": len(fold.train),
        "test_records": len(fold.test),
        "left_out": fold.train.left_out + fold.test.left_out,
        "sources_in_both": shared,
        "top1": float(hits.mean()),
        "mean_class_accuracy": class_mean(hits, fold.test.classes),
        "steps": last["step"],
        "train_seconds": round(last["train_seconds"], 1),
        "train_loss": last["loss"],
        "train_accuracy": last["accuracy"],
    }


def _curves(path: epath.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _splits_section(splits: Sequence[Mapping[str, Any]]) -> str:
    header = (
        "",
        "encoder",
        "trained on",
        "tested on",
        "left out",
        "top-1",
        "mean class",
        "training top-1",
    )
    rows = [
        [
            entry["name"],
            entry["encoder"]["path"],
            str(entry["train_records"]),
            str(entry["test_records"]),
            str(entry["left_out"]),
            percent(entry["top1"], 1),
            percent(entry["mean_class_accuracy"], 1),
            percent(entry["train_accuracy"], 1),
        ]
        for entry in splits
    ]
    caption = "Training top-1 is that of augmented single clips, at the end."
    return section("Splits", caption, table(header, rows))


def confusion_section(confusion: np.ndarray, names: Sequence[str]) -> str:
    """Returns the section that shows which classes are taken for which."""
    if len(names) <= _MATRIX_CLASSES:
        shown = matrix("All splits", confusion.tolist(), names)
        return section("Confusion", "Rows are true classes, in per cent of the row.", shown)
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
        [names[i], percent(float(accuracy[i]), 1), str(totals[i])]
        for i in np.argsort(accuracy, kind="stable")[:_LISTED]
        if confusion[i].sum()
    ]
    return section(
        "Confusion",
        f"The {_LISTED} most frequent mistakes and the {_LISTED} hardest of {len(names)} classes.",
        table(("class", "taken for", "records"), rows),
        table(("class", "accuracy", "records"), hardest),
    )


def _curves_section(folds: Sequence[Fold]) -> str:
    curves = {fold.name: _curves(fold.metrics) for fold in folds}

    def series(name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        return {
            fold: (np.array([row["step"] for row in rows]), np.array([row[name] for row in rows]))
            for fold, rows in curves.items()
        }

    return section(
        "Training",
        "Of augmented clips, in training mode.",
        '<div class="charts">',
        line_chart(series("loss"), name="finetune_loss", ylabel="loss"),
        line_chart(series("accuracy"), name="finetune_accuracy", ylabel="accuracy", percent=True),
        "</div>",
    )
