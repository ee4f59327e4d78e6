"""Linear probe of a frozen encoder, video or audio: official training and test lists.

python -m avcl_jax.main --config=configs/linear_probe.py:ucf101 --config.encoder=RUN
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from avcl_jax.data.records import RecordDataset
from avcl_jax.encoder_source import EncoderSource, random_like
from avcl_jax.evaluation.fold_encoders import fold_names, open_fold_encoders, split_selections
from avcl_jax.evaluation.linear_classifier import (
    LinearProbe,
    fit_probe,
    held_out_folds,
    ranked_classes,
)
from avcl_jax.evaluation.metrics import confusion_matrix
from avcl_jax.evaluation.page import section, table
from avcl_jax.evaluation.protocol import (
    Measured,
    Metric,
    Outcomes,
    Protocol,
    ProtocolError,
    in_unit,
)
from avcl_jax.evaluation.protocol_records import (
    check_apart,
    check_pooled,
    feature_spec,
    open_splits,
    record_clips,
)
from avcl_jax.evaluation.protocol_run import ProtocolRun
from avcl_jax.evaluation.recognition import class_scores, confusion_section
from avcl_jax.evaluation.record_clips import RecordClips
from avcl_jax.evaluation.record_features import record_features
from avcl_jax.evaluation.trained_on import check_not_trained_on
from avcl_jax.evaluation.written import Stages
from avcl_jax.paths import absolute_path

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


@dataclass(frozen=True)
class _Side:
    """Training or test records with their classes."""

    clips: RecordClips
    targets: np.ndarray


@dataclass(frozen=True)
class _Split:
    """Training and test records, and the encoder that is probed with them."""

    name: str
    encoder: EncoderSource
    train: _Side
    test: _Side


def run_linear_probe(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> dict[str, Any]:
    """Runs the protocol and writes its results to `workdir`.

    Args:
        config: as `configs/linear_probe.py` returns it.
        workdir: output directory, local or gs://.

    Returns:
        The contents of results.json; empty in processes other than the first.

    Raises:
        ExportError: if there is no encoder of the modality.
        LackingError: if records lack the label or the modality.
        ProtocolError: if labels, records or features do not fit the protocol.
    """
    workdir = absolute_path(workdir)
    stages = Stages()
    names = fold_names(config.encoder, [test for _, test in split_selections(config.data)])
    encoders = open_fold_encoders(config.encoder, names)
    encoders.named.require(config.modality)
    splits = _splits(config, [encoders.by_fold[name] for name in names])
    protocol = SEVERAL if splits[0].test.targets.ndim == 2 else SINGLE
    data = {
        role: "; ".join(dict.fromkeys(getattr(s, role).clips.fingerprint for s in splits))
        for role in ("train", "test")
    }
    protocol_run = ProtocolRun(protocol, config, workdir, encoders.named, data)
    if (done := protocol_run.finished()) is not None:
        return done
    for split in splits:
        check_not_trained_on(
            split.encoder,
            split.test.clips.records,
            split.test.clips.indices,
            allow=config.data.allow_trained_on,
            what="test records",
        )
    drawn = random_like(encoders.named, config.seed) if config.baselines.random else None
    scores: dict[str, list[np.ndarray]] = {}
    probes: dict[str, list[LinearProbe]] = {}
    for split in splits:
        for name, network in {"": split.encoder, **({"random": drawn} if drawn else {})}.items():
            shown = f"{name or 'trained'} encoder, {split.name}"
            with stages(f"features, {shown}"):
                features = [
                    record_features(
                        network.require(config.modality),
                        side.clips,
                        feature_spec(config),
                        fingerprint=network.fingerprint,
                        directory=protocol_run.features,
                    )
                    for side in (split.train, split.test)
                ]
            if jax.process_index():
                continue
            with stages(f"classifier, {shown}"):
                probe = fit_probe(
                    features[0],
                    split.train.targets,
                    split.train.clips.sources,
                    classes=len(split.train.clips.records.class_names[config.data.label]),
                    seed=config.seed,
                    **config.probe,
                )
            probes.setdefault(name, []).append(probe)
            scores.setdefault(name, []).append(probe.classifier.scores(features[1]))
    if jax.process_index():
        return {}
    return protocol_run.write(_measured(config, splits, scores, probes), stages)


def _splits(config: ml_collections.ConfigDict, encoders: Sequence[EncoderSource]) -> list[_Split]:
    """Returns the records of every split, without reading one."""
    section = config.data
    check_pooled(config)
    opened = open_splits(section.directory, section.train_split, section.test_split)
    splits = []
    pairs = split_selections(section)
    for number, (selections, encoder) in enumerate(zip(pairs, encoders, strict=True), 1):
        train, test = (
            _side(config, encoder, opened[section[f"{role}_split"]], select)
            for role, select in zip(("train", "test"), selections, strict=True)
        )
        check_apart(train.clips, test.clips)
        splits.append(_Split(f"split{number}", encoder, train, test))
    if splits[0].test.targets.ndim == 2:
        if len(splits) > 1:
            raise ProtocolError(
                f"{section.label!r} may have several classes per record, for which mAP over "
                f"{len(splits)} splits is not defined: set one data.train_select and test_select"
            )
        for role, side in (("train", splits[0].train), ("test", splits[0].test)):
            if not ranked_classes(side.targets).any():
                raise ProtocolError(
                    f"no class of {section.label!r} has both positive and negative records among "
                    f"the {role} records, so mAP is not defined: change data.{role}_select"
                )
    for split in splits:
        held_out_folds(
            split.train.targets,
            split.train.clips.sources,
            folds=config.probe.folds,
            seed=config.seed,
        )
    return splits


def _side(
    config: ml_collections.ConfigDict, source: EncoderSource, records: RecordDataset, select: str
) -> _Side:
    label = config.data.label
    several = label in records.multilabel
    clips = record_clips(
        config, source, config.modality, records, select=select, labels=() if several else [label]
    )
    if several:
        return _Side(clips, records.class_matrix(label, clips.indices.tolist()))
    return _Side(clips, clips.classes_of(label))


def _measured(
    config: ml_collections.ConfigDict,
    splits: Sequence[_Split],
    scores: Mapping[str, Sequence[np.ndarray]],
    probes: Mapping[str, Sequence[LinearProbe]],
) -> Measured:
    class_names = splits[0].test.clips.records.class_names[config.data.label]
    targets = np.concatenate([split.test.targets for split in splits])
    number = np.repeat(np.arange(len(splits)), [len(split.test.clips) for split in splits])
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
            *(in_unit(value, "share") for value in probe.held_out.values()),
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
                for record in split.test.clips.record_ids
            ],
            [source for split in splits for source in split.test.clips.sources],
            outcomes,
        ),
        metrics,
        details={
            "splits": [
                {
                    "name": split.name,
                    "encoder": {
                        "path": split.encoder.path,
                        "fingerprint": split.encoder.fingerprint,
                    },
                    "train_records": len(split.train.clips),
                    "test_records": len(split.test.clips),
                    "left_out": split.train.clips.left_out + split.test.clips.left_out,
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
