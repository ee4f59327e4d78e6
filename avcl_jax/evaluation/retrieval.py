"""Retrieval by nearest neighbours, and its two protocols.

One definition serves class retrieval (a test video finds training videos of its class) and instance
retrieval (audio finds the video of its record, and video the audio): an item of the gallery is
*relevant* to a query when their identities are equal. Of equal similarities the irrelevant item
counts first.

    python -m avcl_jax.main --config=configs/retrieval.py:ucf101 --config.encoder=RUN
    python -m avcl_jax.main --config=configs/cross_modal.py:vggsound --config.encoder=RUN
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
from etils import epath
from scipy.stats import hypergeom
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize
from sklearn.utils import gen_batches

from avcl_jax.data.selection import Modality, UsableRecords
from avcl_jax.errors import UserError
from avcl_jax.evaluation.driver import Context, run_protocol
from avcl_jax.evaluation.features import record_features
from avcl_jax.evaluation.protocol import Measured, Metric, Outcomes, Protocol
from avcl_jax.evaluation.splits import Trial, clip_splits
from avcl_jax.evaluation.views import encode, fixed_views, open_run, speed_indices
from avcl_jax.page import section, table

VIDEO_RETRIEVAL = Protocol(
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
        "A video that is shorter than a clip is shown once, its last frame then stays. None is "
        "left out.",
        "Features are scaled to unit length and compared by cosine. No whitening, no centring.",
        "R@k is the fraction of queries with a video of their class among the k most similar; an "
        "item of another class within 1e-6 of the similarity counts first.",
    ),
)
AUDIO_VIDEO_RETRIEVAL = Protocol(
    name="audio_video_retrieval",
    version=2,
    title="Audio-video retrieval",
    definition=(
        "Records with video and audio of at least one view; each is query and gallery item.",
        "Each record gives features.clips views at each of features.speeds, forward, "
        "uniformly spaced over the time that video and audio share, the largest centred square; "
        "video and audio of a view are of the same interval.",
        "Embeddings are the outputs of the projection heads, of unit length; those of all views "
        "are concatenated, so that the similarity of two records is the mean cosine of their views "
        "of the same place in the order.",
        "The one relevant item is the other half of the same record. R@k is the fraction of "
        "queries that have it among the k most similar, median rank is counted from 1; another "
        "item within 1e-6 of its similarity counts first.",
    ),
)
DIRECTIONS: Mapping[str, tuple[Modality, Modality]] = {
    "audio_to_video": ("audio", "video"),
    "video_to_audio": ("video", "audio"),
}
_SHOWN = 5  # queries in the report, each with this many results

# Two similarities of unit float32 vectors that differ by less than this are tied. A blocked matrix
# product returns the last bits of equal vectors differently, and a collapsed encoder must not gain
# from that lottery.
TIE_TOLERANCE = 1e-6
# Similarities at a time, of 10 bytes each, whatever the size of the gallery.
_COMPARED = 2**24


def rank_queries(
    queries: np.ndarray,
    gallery: np.ndarray,
    *,
    query_ids: np.ndarray,
    gallery_ids: np.ndarray,
    recall_at: Sequence[int],
    suffix: str = "",
    what: str = "",
) -> tuple[dict[str, np.ndarray], dict[int, Metric]]:
    """Returns the rank, from 1, of the most similar relevant item of each query, and R@k by k.

    Similarity is the cosine; an irrelevant item that ties with the relevant one stands before it,
    so that embeddings that all collapsed to one point rank last instead of first.

    Args:
        queries: float [q, D].
        gallery: float [g, D].
        query_ids: int [q], identity of each query, that of an item at least.
        gallery_ids: int [g], identity of each item.
        recall_at: the k of R@k; 1 is always added, and a k above the size of the gallery left out.
        suffix: appended to the names of outcomes, which are `rank` and `hit5` for k = 5.
        what: appended to the titles of metrics.

    Raises:
        ValueError: if a value is not finite.
    """
    queries, gallery = (normalize(np.asarray(v, np.float32)) for v in (queries, gallery))
    ranks = np.empty(len(queries), np.int64)
    for rows in gen_batches(len(queries), max(1, _COMPARED // len(gallery))):
        similarity = queries[rows] @ gallery.T
        relevant = query_ids[rows, None] == gallery_ids
        best = np.where(relevant, similarity, -np.inf).max(axis=1, keepdims=True)
        ranks[rows] = 1 + ((similarity >= best - TIE_TOLERANCE) & ~relevant).sum(axis=1)
    ks = sorted({1, *(k for k in recall_at if k <= len(gallery))})
    values, metrics = {f"rank{suffix}": ranks}, {}
    for k, chance in chance_recall(query_ids, gallery_ids, ks).items():
        name = f"hit{k}{suffix}"
        values[name] = (ranks <= k).astype(np.float64)
        headline = k in (1, 5)
        metrics[k] = Metric("mean", (name,), f"R@{k}{what}", chance=chance, headline=headline)
    return values, metrics


def check_recall_at(config: ml_collections.ConfigDict) -> None:
    """Refuses values of k for R@k that are not positive whole numbers, by a UserError."""
    recall_at = tuple(config.evaluation.recall_at)
    if not all(isinstance(k, int) and k >= 1 for k in recall_at):
        raise UserError(f"evaluation.recall_at {recall_at} must be whole numbers of at least 1")


def chance_recall(
    query_ids: np.ndarray, gallery_ids: np.ndarray, recall_at: Sequence[int]
) -> dict[int, float]:
    """Returns R@k of a random order of the gallery, by k; identities are int [q] and int [g]."""
    identities, counts = np.unique(gallery_ids, return_counts=True)
    relevant, size = counts[np.searchsorted(identities, query_ids)], len(gallery_ids)
    # Rounded, so that one in 200 is written as 0.005.
    return {k: round(float(hypergeom.sf(0, size, relevant, k).mean()), 12) for k in recall_at}


def nearest(queries: np.ndarray, gallery: np.ndarray, *, k: int) -> np.ndarray:
    """Returns int64 [q, min(k, g)], the items of the highest cosine to each query, best first.

    Args:
        queries: float [q, D].
        gallery: float [g, D].
    """
    model = NearestNeighbors(n_neighbors=min(k, len(gallery)), metric="cosine").fit(gallery)
    return model.kneighbors(queries, return_distance=False)


def video_retrieval(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> dict[str, Any]:
    """Runs video retrieval by `configs/retrieval.py`; returns as `run_protocol`.

    Raises:
        UserError: if encoder, records and protocol do not fit.
    """
    check_recall_at(config)
    data = config.data
    (split,), spec = clip_splits(config, "video", [data.label], only=data.official_split)
    gallery, queries = split.train, split.test
    classes = queries.records.class_names[data.label]
    ids, gallery_ids = (records.classes_of(data.label) for records in (queries, gallery))
    if (missing := ids[~np.isin(ids, gallery_ids)]).size:
        raise UserError(
            f"{missing.size} queries are of classes that no record of the gallery has, first "
            f"{classes[int(missing[0])]!r}: correct data.test_select, data.train_select or the "
            "splits"
        )

    def compute(context: Context) -> list[dict[str, np.ndarray]]:
        networks = {"": split.encoder} | context.random()
        with context.stages("features"):
            return record_features(networks, [queries, gallery], spec, directory=context.directory)

    def measure(context: Context, features: list[dict[str, np.ndarray]]) -> Measured:
        of_queries, of_gallery = features
        values: dict[str, np.ndarray] = {}
        metrics: dict[str, Metric] = {}
        with context.stages("ranking"):
            for name, vectors in of_queries.items():
                suffix = f"_{name}" if name else ""
                ranked, recalls = rank_queries(
                    vectors,
                    of_gallery[name],
                    query_ids=ids,
                    gallery_ids=gallery_ids,
                    recall_at=tuple(config.evaluation.recall_at),
                    suffix=suffix,
                    what=f", {name} encoder" if name else "",
                )
                values |= ranked
                metrics |= {f"r{k}{suffix}": metric for k, metric in recalls.items()}
        rows = np.linspace(0, len(queries) - 1, _SHOWN).astype(int)
        items = nearest(of_queries[""][rows], of_gallery[""], k=_SHOWN)
        names, gallery_names = (
            [f"{name} ({classes[label]})" for name, label in zip(side.record_ids, of, strict=True)]
            for side, of in ((queries, ids), (gallery, gallery_ids))
        )
        neighbours = [
            [names[row], *(gallery_names[item] for item in of_query)]
            for row, of_query in zip(rows, items, strict=True)
        ]
        return Measured(
            Outcomes(queries.record_ids, queries.sources, values),
            metrics,
            details={
                "queries": len(queries),
                "gallery": len(gallery),
                "left_out": {"query": queries.left_out, "gallery": gallery.left_out},
                "r1_by_class": {
                    classes[label]: float((values["rank"][ids == label] <= 1).mean())
                    for label in np.unique(ids).tolist()
                },
            },
            sections=[
                section(
                    "Nearest neighbours",
                    "Some queries and their results, most similar first.",
                    table(["query", *(f"{n + 1}" for n in range(items.shape[1]))], neighbours),
                )
            ],
        )

    return run_protocol(VIDEO_RETRIEVAL, config, workdir, [split], compute=compute, measure=measure)


def measure_cross_modal(
    records: UsableRecords,
    features: Mapping[str, np.ndarray],
    network: str,
    recall_at: Sequence[int],
) -> Measured:
    """Returns outcomes by record with video and audio, and the metrics of both directions; none if
    the network or all records lack a modality.

    Args:
        features: outputs of `PretrainedRun.features` for the `fixed_views` of the records.
        network: name of the network whose embeddings are compared.
    """
    keys = {modality: f"{network}/{modality}_embeddings" for modality in ("video", "audio")}
    known = (
        features["has_video"] & features["has_audio"] & all(k in features for k in keys.values())
    )
    both = np.flatnonzero(known)
    embeddings = {m: features[key][both] for m, key in keys.items() if len(both)}
    values: dict[str, np.ndarray] = {}
    metrics: dict[str, Metric] = {}
    for direction, (query, target) in DIRECTIONS.items() if embeddings else ():
        what, ids = f", {direction.replace('_to_', ' → ')}", features["record_index"][both]
        ranked, recalls = rank_queries(
            embeddings[query],
            embeddings[target],
            query_ids=ids,
            gallery_ids=ids,
            recall_at=recall_at,
            suffix=f"_{direction}",
            what=what,
        )
        values |= ranked
        metrics |= {f"{direction}_r{k}": metric for k, metric in recalls.items()}
        metrics[f"{direction}_median_rank"] = Metric(
            "median",
            (f"rank_{direction}",),
            f"median rank{what}",
            unit="number",
            chance=(len(both) + 1) / 2,
        )
    names, sources = records.record_ids, records.sources
    return Measured(
        Outcomes([names[row] for row in both], [sources[row] for row in both], values),
        metrics,
        details={
            "gallery": len(both),
            "left_out": records.num_selected - len(both),
            # Spread over records: 0 if all embeddings have become the same.
            "embedding_std": {
                f"{modality}_embeddings": float(vectors.std(axis=0).mean())
                for modality, vectors in embeddings.items()
            },
        },
    )


def audio_video_retrieval(
    config: ml_collections.ConfigDict, workdir: epath.PathLike
) -> dict[str, Any]:
    """Runs audio-video retrieval by `configs/cross_modal.py`; returns as `run_protocol`.

    Raises:
        UserError: if run and records do not fit, or one has not both modalities.
    """
    settings = config.features
    check_recall_at(config)
    run, records = open_run(config)
    if run.config.modalities != "audio_visual":
        raise UserError(
            f"{config.encoder} was trained on {run.config.modalities} alone: audio-video retrieval "
            "needs a run of both"
        )
    speeds = speed_indices(settings.speeds, run.config.views.speeds, setting="features.speeds")

    def render(position: int) -> dict[str, Any]:
        return fixed_views(records, position, run.spec, speeds=speeds, clips=settings.clips)

    def compute(context: Context) -> dict[str, np.ndarray]:
        with context.stages("embeddings"):
            return encode(context, run, run.features, render, records, key=[settings.to_dict()])

    def measure(context: Context, features: dict[str, np.ndarray]) -> Measured:
        with context.stages("ranking"):
            recall_at = tuple(config.evaluation.recall_at)
            measured = measure_cross_modal(records, features, "run", recall_at)
        if not measured.metrics:
            raise UserError(f"no record of {records} has both video and audio")
        return measured

    trials = [Trial("all", run.source, records)]
    return run_protocol(
        AUDIO_VIDEO_RETRIEVAL,
        config,
        workdir,
        trials,
        compute=compute,
        measure=measure,
        heads=run.heads,
    )
