"""Classification metrics of several splits, and the protocol of linear probes.

python -m avcl_jax.main --config=configs/linear_probe.py:ucf101 --config.encoder=RUN
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
from etils import epath

from avcl_jax.data.clips import ClipRecords
from avcl_jax.data.records import RecordDataset
from avcl_jax.data.selection import Selection
from avcl_jax.encoder_source import EncoderSource
from avcl_jax.errors import UserError
from avcl_jax.evaluation.driver import Context, run_protocol
from avcl_jax.evaluation.features import open_clips, record_features
from avcl_jax.evaluation.linear import LinearProbe, fit_probe, held_out_folds, ranked_classes
from avcl_jax.evaluation.page import as_text, matrix, section, table
from avcl_jax.evaluation.protocol import Measured, Metric, Outcomes, Protocol
from avcl_jax.evaluation.splits import (
    Split,
    feature_spec,
    numbered_sides,
    open_splits,
)
from avcl_jax.evaluation.statistics import confusion_matrix, top_k_hits

# A matrix of more classes than this cannot be read on a page; the most confused pairs are listed.
MATRIX_CLASSES = 25
_LISTED = 15

_SHARED = (
    "The encoder is frozen. Each record gives features.clips clips at each of features.speeds, "
    "uniformly spaced, the largest centred square; its feature is the mean of the encoder's "
    "output over time, space and clips (features.clip_pooling and features.record_pooling).",
    "Features are standardised by mean and deviation of the training records.",
    "C is chosen by cross-validation over the sources of the training records (probe.folds random "
    "folds), the smallest of equally good ones. The classifier is then trained on all training "
    "records. Test records decide nothing.",
)
SINGLE = Protocol(
    name="linear_probe",
    version=2,
    title="Linear probe",
    definition=(
        *_SHARED,
        "Multinomial logistic regression, L2, L-BFGS until the gradient is below probe.tolerance.",
        "Top-1, top-5 (a tie counts against the record's class), and the mean over classes of the "
        "accuracy within each; with several splits the mean over splits.",
    ),
)
SEVERAL = Protocol(
    name="linear_probe_tagging",
    version=2,
    title="Tagging by a linear probe",
    definition=(
        *_SHARED,
        "One logistic regression per class, L2 with one C for all, L-BFGS until the gradient is "
        "below probe.tolerance; C is chosen by mAP.",
        "mAP is the mean over classes of average precision, of equal scores the wrong first; AUC "
        "the mean over classes of the area under the ROC curve; d′ is √2 times the normal quantile "
        "of the mean AUC. Classes without a positive or without a negative test record are left "
        "out of the means.",
    ),
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
    spec, data = feature_spec(config), config.data

    def clips(source: EncoderSource, records: RecordDataset, selection: Selection) -> ClipRecords:
        labels = [] if data.label in records.multilabel else [data.label]
        return open_clips(
            source,
            config.modality,
            records,
            selection,
            spec,
            labels=labels,
            leave_out=data.leave_out,
        )

    splits = open_splits(
        data.directory, config.encoder, config.modality, numbered_sides(data), clips
    )
    targets = {s.name: [_targets(side, data.label) for side in (s.train, s.test)] for s in splits}
    several = targets[splits[0].name][1].ndim == 2
    if several:
        _check_tags(data, targets)
    for split in splits:
        held_out_folds(
            targets[split.name][0],
            split.train.sources,
            folds=config.probe.folds,
            seed=config.seed,
        )

    def compute(context: Context) -> dict[str, list[dict[str, np.ndarray]]]:
        drawn = context.random()
        features = {}
        for split in splits:
            with context.stages(f"features, {split.name}"):
                features[split.name] = [
                    record_features({"": split.encoder} | drawn, side, spec, directory=cache)
                    for side, cache in ((s, context.directory) for s in (split.train, split.test))
                ]
        return features

    def measure(context: Context, features: dict[str, list[dict[str, np.ndarray]]]) -> Measured:
        probes: dict[str, list[LinearProbe]] = {}
        scores: dict[str, list[np.ndarray]] = {}
        for split in splits:
            train, test = features[split.name]
            for name in train:
                with context.stages(f"classifier, {name or 'trained'} encoder, {split.name}"):
                    probe = fit_probe(
                        train[name],
                        targets[split.name][0],
                        split.train.sources,
                        classes=len(split.train.records.class_names[data.label]),
                        seed=config.seed,
                        **config.probe,
                    )
                probes.setdefault(name, []).append(probe)
                scores.setdefault(name, []).append(probe.classifier.scores(test[name]))
        tested = [targets[split.name][1] for split in splits]
        return _measured(splits, data.label, tested, scores, probes)

    protocol = SEVERAL if several else SINGLE
    return run_protocol(protocol, config, workdir, splits, compute=compute, measure=measure)


def _targets(clips: ClipRecords, label: str) -> np.ndarray:
    """Returns the class of each record, int [n], or bool [n, classes] of several."""
    if label in clips.records.multilabel:
        return clips.records.class_matrix(label, clips.indices.tolist())
    return clips.classes_of(label)


def _check_tags(
    data: ml_collections.ConfigDict, targets: Mapping[str, Sequence[np.ndarray]]
) -> None:
    """Refuses records of several classes for which mAP is not defined."""
    if len(targets) > 1:
        raise UserError(
            f"{data.label!r} may have several classes per record, for which mAP over "
            f"{len(targets)} splits is not defined: set one data.train_select and test_select"
        )
    (sides,) = targets.values()
    for role, side in zip(("train", "test"), sides, strict=True):
        if not ranked_classes(side).any():
            raise UserError(
                f"no class of {data.label!r} has both positive and negative records among "
                f"the {role} records, so mAP is not defined: change data.{role}_select"
            )


def _measured(
    splits: Sequence[Split[ClipRecords]],
    label: str,
    tested: Sequence[np.ndarray],
    scores: Mapping[str, Sequence[np.ndarray]],
    probes: Mapping[str, Sequence[LinearProbe]],
) -> Measured:
    class_names = splits[0].test.records.class_names[label]
    targets = np.concatenate(tested)
    number = np.repeat(np.arange(len(splits)), [len(split.test) for split in splits])
    outcomes: dict[str, np.ndarray] = {}
    metrics: dict[str, Metric] = {}
    sections = []
    for name, by_split in scores.items():
        suffix, what = (f"_{name}", f", {name} encoder") if name else ("", "")
        logits = np.concatenate(by_split)
        if targets.ndim == 1:
            scored = class_scores(logits, targets, number, suffix=suffix, what=what)
            if not name:
                predicted = logits.argmax(axis=1)
                confusion = confusion_matrix(targets, predicted, len(class_names))
                sections.append(confusion_section(confusion, class_names))
        else:
            scored = _tag_scores(logits, targets, suffix=suffix, what=what)
        outcomes |= scored[0]
        metrics |= scored[1]
    one = len(splits) == 1
    rows = [
        [
            f"{name or 'trained'} encoder{'' if one else f', {split.name}'}",
            f"{probe.cost:g}",
            *(as_text(value) for value in probe.held_out.values()),
        ]
        for name, by_split in probes.items()
        for split, probe in zip(splits, by_split, strict=True)
    ]
    header = ["", "chosen", *(f"C = {cost:g}" for cost in probes[""][0].held_out)]
    caption = "Score of each C on the held-out training sources, mean over folds."
    return Measured(
        Outcomes(
            [
                record if one else f"{split.name}/{record}"
                for split in splits
                for record in split.test.record_ids
            ],
            [source for split in splits for source in split.test.sources],
            outcomes,
        ),
        metrics,
        details={
            "splits": [
                {
                    **described(split),
                    "chosen": {
                        name or "encoder": {
                            "cost": probes[name][place].cost,
                            "held_out_score": {
                                f"{cost:g}": value
                                for cost, value in probes[name][place].held_out.items()
                            },
                        }
                        for name in probes
                    },
                }
                for place, split in enumerate(splits)
            ],
            "classes": list(class_names),
        },
        sections=[section("C", caption, table(header, rows)), *sections],
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
