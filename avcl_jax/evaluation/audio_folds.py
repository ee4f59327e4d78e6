"""ESC-10 and ESC-50: frozen features and a support vector machine over the official folds.

python -m avcl_jax.main --config=configs/audio_classification.py:esc10 --config.encoder=RUN
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from avcl_jax.data.records import RecordDataset
from avcl_jax.evaluation.classical_audio import classical_record_features
from avcl_jax.evaluation.fold_classification import FoldResult, check_folds, classify_folds
from avcl_jax.evaluation.fold_encoders import (
    by_test_fold,
    check_unheard,
    open_fold_encoders,
)
from avcl_jax.evaluation.metrics import confusion_matrix
from avcl_jax.evaluation.page import matrix, section, table
from avcl_jax.evaluation.parts import in_parts, key_of
from avcl_jax.evaluation.protocol import (
    Measured,
    Metric,
    Outcomes,
    Protocol,
    ProtocolError,
    in_unit,
)
from avcl_jax.evaluation.protocol_records import feature_spec, record_clips
from avcl_jax.evaluation.protocol_run import ProtocolRun
from avcl_jax.evaluation.record_features import record_features
from avcl_jax.evaluation.significance import compare
from avcl_jax.evaluation.written import Stages
from avcl_jax.paths import absolute_path

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
        "The cost is chosen for each test fold anew, by holding out each of its training folds in "
        "turn; the smallest of equally good ones. The test fold decides nothing.",
        "Accuracy is the mean over folds. A tie between classes counts as wrong.",
        "Clips of one recording are all in one fold; this is checked.",
        "Baselines are measured on the same files in the same way: a random encoder of the same "
        "shape, and statistics of MFCC and of the log-mel spectrum of the whole file.",
    ),
)


def _fold_names(records: RecordDataset, label: str) -> list[str]:
    """Names of the official folds.

    Raises:
        ProtocolError: if the data set has no label for them.
    """
    if label not in records.class_names:
        raise ProtocolError(
            f"{records} has the labels {', '.join(sorted(records.class_names)) or 'none'}, not "
            f"{label!r}: set data.fold_label"
        )
    return records.class_names[label]


def run_folds(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> dict[str, Any]:
    """Runs the protocol and writes its results.

    Args:
        config: as `configs/audio_classification.py` returns it.
        workdir: of the results.

    Returns:
        The contents of results.json; empty in processes other than the first.

    Raises:
        ProtocolError: if the data set lacks the labels, or a record's class or fold is unknown.
    """
    workdir = absolute_path(workdir)
    stages = Stages()
    records = RecordDataset(config.data.directory, config.data.split)
    names = _fold_names(records, config.data.fold_label)
    encoders = open_fold_encoders(config.encoder, names)
    for source in encoders.distinct.values():
        source.require("audio")
    source = encoders.named
    clips = record_clips(
        config,
        source,
        "audio",
        records,
        select="",
        labels=[config.data.label, config.data.fold_label],
    )
    indices = clips.indices
    labels, folds = (
        clips.classes_of(label) for label in (config.data.label, config.data.fold_label)
    )
    check_folds(labels, folds, clips.sources)
    data = {"all": clips.fingerprint}
    protocol_run = ProtocolRun(PROTOCOL, config, workdir, source, data)
    if (done := protocol_run.finished()) is not None:
        return done
    check_unheard(
        encoders,
        records,
        records.labels[config.data.fold_label],
        names,
        allow=config.data.allow_trained_on,
    )
    networks = {"": encoders}
    if config.baselines.random:
        networks["random"] = encoders.random_like(config.seed)
    features: dict[str, dict[str, np.ndarray]] = {}
    for name, network in networks.items():
        with stages(f"features {name or 'of the encoder'}"):
            features[name] = {
                fingerprint: record_features(
                    one.require("audio"),
                    clips,
                    feature_spec(config),
                    fingerprint=fingerprint,
                    directory=protocol_run.features,
                )
                for fingerprint, one in network.distinct.items()
            }
    if config.baselines.classical:
        with stages("classical features"):
            classical = in_parts(
                protocol_run.features / key_of("classical", records.fingerprint, indices.tolist()),
                len(indices),
                lambda chosen: classical_record_features(
                    records, indices[list(chosen)].tolist(), threads=config.data.threads
                ),
                rows=config.features.part_records,
            )
    if jax.process_index():
        return {}
    sources = clips.sources
    class_names = records.class_names[config.data.label]

    def classify(values: np.ndarray, kernel: Any, costs: Any, tested: Any = None) -> FoldResult:
        return classify_folds(
            values if values.ndim == 3 else values[:, None],
            labels,
            folds,
            sources,
            classes=len(class_names),
            kernel=kernel,
            costs=tuple(costs),
            tested=tested,
        )

    with stages("classifiers"):
        settings = config.evaluation
        results = {
            name: by_test_fold(
                lambda values, tested: classify(values, "linear", settings.costs, tested),
                by_encoder,
                networks[name],
                folds,
                names,
            )
            for name, by_encoder in features.items()
        }
        if config.baselines.classical:
            rbf, linear = settings.classical_costs, settings.classical_linear_costs
            results["mfcc_rbf"] = classify(classical["mfcc"], "rbf", rbf)
            results["log_mel_rbf"] = classify(classical["log_mel"], "rbf", rbf)
            results["log_mel_linear"] = classify(classical["log_mel"], "linear", linear)
    measured = _measured(
        results,
        units=clips.record_ids,
        sources=sources,
        labels=labels,
        folds=folds,
        class_names=class_names,
        fold_names=names,
        left_out=clips.left_out,
        config=config,
    )
    return protocol_run.write(measured, stages)


_TITLES = {
    "": "encoder",
    "random": "random encoder",
    "mfcc_rbf": "MFCC + RBF",
    "log_mel_rbf": "log-mel + RBF",
    "log_mel_linear": "log-mel + linear",
}


def _measured(
    results: Mapping[str, FoldResult],
    *,
    units: list[str],
    sources: list[str],
    labels: np.ndarray,
    folds: np.ndarray,
    class_names: list[str],
    fold_names: list[str],
    left_out: int,
    config: ml_collections.ConfigDict,
) -> Measured:
    values: dict[str, np.ndarray] = {"fold": folds, "label": labels}
    metrics, choices, differences = {}, {}, {}
    for name, result in results.items():
        suffix = f"_{name}" if name else ""
        values[f"correct{suffix}"] = result.correct
        values[f"predicted{suffix}"] = result.predicted
        metrics[f"accuracy{suffix}"] = Metric(
            "class_mean",  # a fold is what is averaged within first
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
                np.array(sources),
                resamples=config.bootstrap.resamples,
                seed=config.seed,
            )
            differences[name] = pair.difference._asdict() | {"p_value": pair.p_value}
    confusion = confusion_matrix(labels, results[""].predicted, len(class_names))
    rows = [
        [
            _TITLES[name],
            *(in_unit(value, "share") for value in choices[name or "encoder"]["fold_accuracy"]),
            ", ".join(f"{cost:g}" for cost in result.costs),
        ]
        for name, result in results.items()
    ]
    tested = [fold_names[int(fold)] for fold in np.unique(folds)]
    header = ["", *(f"fold {name}" for name in tested), "costs"]
    return Measured(
        Outcomes(units, sources, values),
        metrics,
        details={
            "by_fold": choices,
            "encoder_minus": differences,
            "confusion": confusion.tolist(),
            "classes": class_names,
            "folds": tested,
            "left_out": left_out,
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
                "Rows are true classes, columns what the encoder's classifier answered, in per "
                "cent of the row.",
                matrix("all folds", confusion.tolist(), class_names),
            ),
        ],
    )
