"""Video retrieval: test videos find training videos of their class by frozen features.

python -m avcl_jax.main --config=configs/retrieval.py:ucf101 --config.encoder=RUN
"""

from __future__ import annotations

from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from avcl_jax.encoder_source import open_encoders, random_like
from avcl_jax.evaluation.page import section, table
from avcl_jax.evaluation.protocol import (
    Measured,
    Metric,
    Outcomes,
    Protocol,
    ProtocolError,
)
from avcl_jax.evaluation.protocol_records import (
    check_apart,
    check_pooled,
    feature_spec,
    open_splits,
    record_clips,
)
from avcl_jax.evaluation.protocol_run import ProtocolRun
from avcl_jax.evaluation.record_clips import RecordClips
from avcl_jax.evaluation.record_features import record_features
from avcl_jax.evaluation.retrieval import (
    RetrievalScores,
    check_recall_at,
    nearest,
    retrieval_scores,
)
from avcl_jax.evaluation.trained_on import check_not_trained_on
from avcl_jax.evaluation.written import Stages
from avcl_jax.paths import absolute_path

PROTOCOL = Protocol(
    name="video_retrieval",
    version=3,
    title="Video retrieval",
    definition=(
        "Queries are the test records, the gallery the training records of one official split.",
        "The encoder is frozen; features are its output before any projection head, averaged over "
        "time and space of a clip.",
        "Each video gives features.clips clips at features.speeds, uniformly spaced from its first "
        "possible start to its last, the largest centred square; its feature is their mean "
        "(features.clip_pooling and features.record_pooling say if another).",
        "A video that is shorter than a clip is shown once, its last picture then stays. None is "
        "left out.",
        "Features are scaled to unit length and compared by cosine. No whitening, no centring.",
        "R@k is the share of queries with a video of their class among the k most similar; an item "
        "of another class within 1e-6 of the similarity stands before it.",
    ),
)
_SHOWN = 5  # queries in the report, each with so many results


def video_retrieval(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> dict[str, Any]:
    """Runs the protocol and writes its results to `workdir`.

    Args:
        config: as `configs/retrieval.py` returns it.
        workdir: of the results, local or gs://.

    Returns:
        The contents of results.json; empty in processes other than the first.

    Raises:
        ProtocolError: if records and protocol do not fit.
        ExportError: if there is no video encoder.
        SelectionError: if the data set lacks the split.
    """
    workdir = absolute_path(workdir)
    stages = Stages()
    check_recall_at(config.evaluation.recall_at, setting="evaluation.recall_at")
    check_pooled(config)
    source = open_encoders(config.encoder)
    splits = {side: config.data[f"{side}_split"] for side in ("query", "gallery")}
    opened = open_splits(config.data.directory, *splits.values())
    sides = {}
    for side, split in splits.items():
        sides[side] = record_clips(
            config,
            source,
            "video",
            opened[split],
            select=config.data[f"{side}_select"].replace(
                "{split}", str(config.data.official_split)
            ),
            labels=[config.data.label],
        )
    check_apart(sides["gallery"], sides["query"])
    ids = {side: clips.classes_of(config.data.label) for side, clips in sides.items()}
    _check_relevant(ids, sides["gallery"].records.class_names[config.data.label])
    data = {side: clips.fingerprint for side, clips in sides.items()}
    protocol_run = ProtocolRun(PROTOCOL, config, workdir, source, data)
    if (done := protocol_run.finished()) is not None:
        return done
    check_not_trained_on(
        source,
        sides["query"].records,
        sides["query"].indices,
        allow=config.data.allow_trained_on,
        what="queries",
    )
    networks = {"": source}
    if config.baselines.random:
        networks["random"] = random_like(source, config.seed)
    features: dict[str, dict[str, np.ndarray]] = {}
    for name, network in networks.items():
        features[name] = {}
        for side, clips in sides.items():
            with stages(f"{side} features {name or 'of the encoder'}"):
                features[name][side] = record_features(
                    network.require("video"),
                    clips,
                    feature_spec(config),
                    fingerprint=network.fingerprint,
                    directory=protocol_run.features,
                )
    if jax.process_index():
        return {}
    with stages("ranking"):
        scores = {
            name: retrieval_scores(
                found["query"],
                found["gallery"],
                query_ids=ids["query"],
                gallery_ids=ids["gallery"],
                recall_at=tuple(config.evaluation.recall_at),
            )
            for name, found in features.items()
        }
    measured = _measured(config, scores, sides, ids, features[""])
    return protocol_run.write(measured, stages)


def _check_relevant(ids: dict[str, np.ndarray], classes: list[str]) -> None:
    """Refuses queries of a class that the gallery lacks: they have nothing to find."""
    missing = ids["query"][~np.isin(ids["query"], ids["gallery"])]
    if missing.size:
        raise ProtocolError(
            f"{missing.size} queries are of classes that no record of the gallery has, first "
            f"{classes[int(missing[0])]!r}: correct data.query_select, data.gallery_select or the "
            "splits"
        )


def _measured(
    config: ml_collections.ConfigDict,
    scores: dict[str, RetrievalScores],
    sides: dict[str, RecordClips],
    ids: dict[str, np.ndarray],
    features: dict[str, np.ndarray],
) -> Measured:
    values: dict[str, np.ndarray] = {}
    metrics: dict[str, Metric] = {}
    for name, found in scores.items():
        suffix, what = (f"_{name}", f", {name} encoder") if name else ("", "")
        values[f"rank{suffix}"] = found.ranks
        for k in config.evaluation.recall_at:
            if k not in found.recall:
                continue  # the gallery is smaller
            values[f"hit{k}{suffix}"] = (found.ranks <= k).astype(np.float64)
            metrics[f"r{k}{suffix}"] = Metric(
                "mean",
                (f"hit{k}{suffix}",),
                f"R@{k}{what}",
                chance=found.chance[k],
                headline=k in (1, 5),
            )
    names = {side: clips.record_ids for side, clips in sides.items()}
    classes = sides["query"].records.class_names[config.data.label]
    shown = np.linspace(0, len(sides["query"]) - 1, _SHOWN).astype(int)
    found_items = nearest(features["query"][shown], features["gallery"], k=_SHOWN)

    def described(side: str, row: int) -> str:
        return f"{names[side][row]} ({classes[int(ids[side][row])]})"

    return Measured(
        Outcomes(names["query"], sides["query"].sources, values),
        metrics,
        details={
            "queries": len(sides["query"]),
            "gallery": len(sides["gallery"]),
            "left_out": {side: clips.left_out for side, clips in sides.items()},
            "r1_by_class": _by_class(scores[""], ids["query"], classes),
        },
        sections=[
            section(
                "Nearest neighbours",
                "Some queries, and what was found, most similar first.",
                table(
                    ["query", *(f"{n + 1}" for n in range(found_items.shape[1]))],
                    [
                        [
                            described("query", int(row)),
                            *(described("gallery", int(item)) for item in items),
                        ]
                        for row, items in zip(shown, found_items, strict=True)
                    ],
                ),
            )
        ],
    )


def _by_class(scores: RetrievalScores, labels: np.ndarray, classes: list[str]) -> dict[str, float]:
    return {
        classes[label]: float((scores.ranks[labels == label] <= 1).mean())
        for label in np.unique(labels).tolist()
    }
