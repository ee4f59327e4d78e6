"""VGG-Sound and AudioSet: a linear classifier on frozen features, fixed training and test lists."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from avcl_jax.data.records import RecordDataset
from avcl_jax.encoder_source import EncoderSource, open_encoders, random_like
from avcl_jax.evaluation import metrics
from avcl_jax.evaluation.linear_classifier import LinearClassifier, fit_linear
from avcl_jax.evaluation.page import definitions, section
from avcl_jax.evaluation.protocol import (
    Measured,
    Metric,
    Outcomes,
    Protocol,
    ProtocolError,
)
from avcl_jax.evaluation.protocol_records import (
    check_apart,
    feature_spec,
    open_splits,
    record_clips,
)
from avcl_jax.evaluation.protocol_run import ProtocolRun
from avcl_jax.evaluation.record_clips import RecordClips
from avcl_jax.evaluation.record_features import record_features
from avcl_jax.evaluation.significance import STATISTICS
from avcl_jax.evaluation.trained_on import check_not_trained_on
from avcl_jax.evaluation.written import Stages

_SHARED = (
    "The encoder is frozen. Each record gives features.clips clips at each of features.speeds, "
    "uniformly spaced, pooled over time and clips as features.clip_pooling and "
    "features.record_pooling say.",
    "Features are standardised by mean and deviation of the training records.",
    "The cost is the one that is best on a share evaluation.held_out of the training records' "
    "sources, drawn once and held out; the smallest of equally good ones. The classifier is then "
    "trained on all training records. Test records decide nothing.",
)
SINGLE = Protocol(
    name="audio_classification_linear_probe",
    version=1,
    title="Audio classification by a linear probe",
    definition=(
        *_SHARED,
        "Multinomial logistic regression, L2, L-BFGS until the gradient is below "
        "evaluation.tolerance.",
        "Top-1, top-5 (a tie counts against the record's class), and the mean over classes of the "
        "accuracy within each.",
    ),
)
SEVERAL = Protocol(
    name="audio_classification_multilabel_probe",
    version=1,
    title="Tagging by a linear probe",
    definition=(
        *_SHARED,
        "One logistic regression a class, L2 with one cost for all, L-BFGS until the gradient is "
        "below evaluation.tolerance; the cost is chosen by mAP.",
        "mAP is the mean over classes of average precision, of equal scores the wrong first; AUC "
        "the mean over classes of the area under the ROC curve; d′ is √2 times the normal quantile "
        "of the mean AUC. Classes without a positive or without a negative test record are left "
        "out of the means.",
    ),
)


@dataclass(frozen=True)
class _Side:
    """Training or test records."""

    clips: RecordClips
    targets: np.ndarray


def run_linear_probe(config: ml_collections.ConfigDict, workdir: epath.Path) -> dict[str, Any]:
    """Runs the probe of one class a record; see `_run`."""
    return _run(config, workdir, SINGLE)


def run_multilabel_probe(config: ml_collections.ConfigDict, workdir: epath.Path) -> dict[str, Any]:
    """Runs the probe of several classes a record; see `_run`."""
    return _run(config, workdir, SEVERAL)


def _run(
    config: ml_collections.ConfigDict, workdir: epath.Path, protocol: Protocol
) -> dict[str, Any]:
    """Runs a protocol and writes its results.

    Returns:
        The contents of results.json; empty in processes other than the first.

    Raises:
        ProtocolError: if labels, records or features do not fit the protocol.
    """
    stages = Stages()
    source = open_encoders(config.encoder)
    source.require("audio")
    opened = open_splits(config.data.directory, config.data.train_split, config.data.test_split)
    train, test = (_side(config, source, opened, side, protocol) for side in ("train", "test"))
    check_apart(train.clips, test.clips)
    data = {"train": train.clips.fingerprint, "test": test.clips.fingerprint}
    protocol_run = ProtocolRun(protocol, config, workdir, source, data)
    if (done := protocol_run.finished()) is not None:
        return done
    check_not_trained_on(
        source,
        test.clips.records,
        test.clips.indices,
        allow=config.data.allow_trained_on,
        what="test records",
    )
    networks = {"": source}
    if config.baselines.random:
        networks["random"] = random_like(source, config.seed)
    scores, chosen = {}, {}
    for name, network in networks.items():
        shown = name or "of the encoder"
        with stages(f"features {shown}"):
            found = [
                record_features(
                    network.require("audio"),
                    side.clips,
                    feature_spec(config),
                    fingerprint=network.fingerprint,
                    directory=protocol_run.features,
                )
                for side in (train, test)
            ]
        if jax.process_index():
            continue
        with stages(f"classifier {shown}"):
            classifier, chosen[name or "encoder"] = _fit(config, found[0], train)
            scores[name] = classifier.scores(found[1])
    if jax.process_index():
        return {}
    measured = _measured(config, protocol, scores, chosen, test)
    return protocol_run.write(measured, stages)


def _side(
    config: ml_collections.ConfigDict,
    source: EncoderSource,
    opened: Mapping[str, RecordDataset],
    side: str,
    protocol: Protocol,
) -> _Side:
    section, label = config.data, config.data.label
    clips = record_clips(
        config,
        source,
        "audio",
        opened[section[f"{side}_split"]],
        select=section[f"{side}_select"],
        labels=[label] if protocol is SINGLE else (),
    )
    records = clips.records
    if config.features.record_pooling == "clips":
        raise ProtocolError(
            "features.record_pooling 'clips' is for folds: use 'mean' or 'mean_max'"
        )
    if protocol is SINGLE:
        return _Side(clips, clips.classes_of(label))
    if label not in records.multilabel:
        raise ProtocolError(
            f"{records!r} has the labels {sorted(records.multilabel)} of which a record may have "
            f"several, not {label!r}: set evaluation.method to 'linear_probe' for one class a "
            "record"
        )
    return _Side(clips, records.class_matrix(label, clips.indices.tolist()))


def _fit(
    config: ml_collections.ConfigDict, features: np.ndarray, train: _Side
) -> tuple[LinearClassifier, dict[str, Any]]:
    section = config.evaluation
    classes = len(train.clips.records.class_names[config.data.label])
    several = train.targets.ndim == 2
    sources = np.array(train.clips.sources)
    names = np.unique(sources)
    drawn = np.random.default_rng(config.seed).permutation(len(names))
    held = np.isin(sources, names[drawn[: max(1, round(section.held_out * len(names)))]])
    if held.all():
        raise ProtocolError("a probe needs two training sources, one to choose the cost by")

    def fit(rows: np.ndarray, cost: float) -> LinearClassifier:
        return fit_linear(
            features[rows],
            train.targets[rows],
            classes=classes,
            cost=cost,
            iterations=section.iterations,
            tolerance=section.tolerance,
        )

    score: Callable[[np.ndarray, np.ndarray], float] = (
        STATISTICS["mean_average_precision"]
        if several
        else lambda scores, labels: float(metrics.top_k_hits(scores, labels, 1).mean())
    )
    costs = sorted(section.costs)
    reached = [score(fit(~held, c).scores(features[held]), train.targets[held]) for c in costs]
    cost = costs[int(np.argmax(reached))]
    every = np.ones(len(features), bool)
    by_cost = {f"{c:g}": value for c, value in zip(costs, reached, strict=True)}
    return fit(every, cost), {"cost": cost, "held_out_score": by_cost}


def _measured(
    config: ml_collections.ConfigDict,
    protocol: Protocol,
    scores: dict[str, np.ndarray],
    chosen: dict[str, Any],
    test: _Side,
) -> Measured:
    names = test.clips.records.class_names[config.data.label]
    values: dict[str, np.ndarray] = {}
    figures: dict[str, Metric] = {}
    if protocol is SINGLE:
        values["label"] = test.targets
        tops = [k for k in (1, 5) if k < len(names)]
    else:
        values["relevant"] = test.targets
        both = test.targets.any(axis=0) & ~test.targets.all(axis=0)
    for name, logits in scores.items():
        suffix, what = (f"_{name}", f", {name} encoder") if name else ("", "")
        if protocol is SINGLE:
            for k in tops:
                values[f"top{k}{suffix}"] = metrics.top_k_hits(logits, test.targets, k)
                figures[f"top{k}{suffix}"] = Metric(
                    "mean",
                    (f"top{k}{suffix}",),
                    f"top-{k}{what}",
                    chance=k / len(names),
                    headline=True,
                )
            figures[f"mean_class_accuracy{suffix}"] = Metric(
                "class_mean",
                (f"top1{suffix}", "label"),
                f"mean class accuracy{what}",
                chance=1 / len(names),
            )
        else:
            values[f"scores{suffix}"] = logits.astype(np.float32)
            inputs = (f"scores{suffix}", "relevant")
            chance = float(test.targets[:, both].mean(axis=0).mean())
            for key, kind, title, unit, level in (
                ("map", "mean_average_precision", "mAP", "share", chance),
                ("auc", "mean_auc", "AUC", "share", 0.5),
                ("d_prime", "d_prime", "d′", "number", 0.0),
            ):
                figures[f"{key}{suffix}"] = Metric(
                    kind, inputs, title + what, unit=unit, chance=level, headline=not name
                )
    return Measured(
        Outcomes(test.clips.record_ids, test.clips.sources, values),
        figures,
        details={
            "chosen": chosen,
            "left_out": test.clips.left_out,
            "classes": len(names),
        },
        sections=[
            section(
                "Cost",
                "What each cost reached on the held-out training sources.",
                definitions(
                    {k: f"{v['cost']:g}, of {v['held_out_score']}" for k, v in chosen.items()}
                ),
            )
        ],
    )
