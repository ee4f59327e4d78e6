"""Retrieval by nearest neighbours, and its two protocols.

One definition serves class retrieval (a test video finds training videos of its class) and instance
retrieval (audio finds the video of its record, and video the audio): an item of the gallery is
*relevant* to a query when their identities are equal. Of equal similarities the irrelevant item
counts first.

    python -m avcl_jax.main --config=configs/retrieval.py:ucf101 --config.encoder=RUN
    python -m avcl_jax.main --config=configs/cross_modal.py:vggsound --config.encoder=RUN
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
from etils import epath
from sklearn.neighbors import NearestNeighbors

from avcl_jax.batched import cache_key
from avcl_jax.data.clips import ClipRecords
from avcl_jax.data.selection import Modality, UsableRecords
from avcl_jax.errors import UserError
from avcl_jax.evaluation.driver import Context, run_protocol
from avcl_jax.evaluation.features import record_features
from avcl_jax.evaluation.page import section, table
from avcl_jax.evaluation.protocol import Measured, Metric, Outcomes, Protocol
from avcl_jax.evaluation.splits import (
    Trial,
    clip_splits,
    numbered_sides,
)
from avcl_jax.evaluation.views import (
    check_pairs,
    open_run,
    speed_indices,
    view_features,
    view_map,
)

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


@dataclasses.dataclass(frozen=True)
class RetrievalScores:
    """Ranks of the first relevant items in a gallery.

    Attributes:
        ranks: int64 [queries], counted from 1.
        gallery: number of items.
        chance: R@k of a random order of the gallery, by k.
    """

    ranks: np.ndarray
    gallery: int
    chance: dict[int, float]

    def hits(self, k: int) -> np.ndarray:
        """Returns float64 [queries], 1 with a relevant item within the first k."""
        return (self.ranks <= k).astype(np.float64)

    def recall(self, k: int) -> float:
        """Returns R@k, the mean of `hits`."""
        return float(np.mean(self.hits(k)))

    def outcomes(
        self, suffix: str, key: str, what: str
    ) -> tuple[dict[str, np.ndarray], dict[str, Metric]]:
        """Returns outcomes by query, and the metrics R@k.

        Args:
            suffix: appended to the names of outcomes.
            key: name of the metrics, with {} for "r5" and so on.
            what: appended to the titles of metrics.
        """
        values, metrics = {f"rank{suffix}": self.ranks}, {}
        for k, chance in self.chance.items():
            values[f"hit{k}{suffix}"] = self.hits(k)
            metrics[key.format(f"r{k}")] = Metric(
                "mean",
                (f"hit{k}{suffix}",),
                f"R@{k}, {what}" if what else f"R@{k}",
                chance=chance,
                headline=k in (1, 5),
            )
        return values, metrics


def normalise(vectors: np.ndarray) -> np.ndarray:
    """Returns float32 [n, D] vectors scaled to unit length; a zero vector stays zero.

    Raises:
        ValueError: if a value is not finite or the array is not a matrix.
    """
    vectors = np.asarray(vectors, dtype=np.float32)
    if vectors.ndim != 2:
        raise ValueError(f"expected vectors [n, D], got shape {vectors.shape}")
    if not np.isfinite(vectors).all():
        rows = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        raise ValueError(
            f"{len(rows)} of {len(vectors)} vectors are not finite, first row {rows[0]}"
        )
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(lengths, np.finfo(np.float32).tiny)


def first_relevant_ranks(
    queries: np.ndarray,
    gallery: np.ndarray,
    *,
    query_ids: np.ndarray,
    gallery_ids: np.ndarray,
    chunk: int = 1024,
    gallery_chunk: int = 16_384,
) -> np.ndarray:
    """Returns int64 [q], the rank from 1 of the most similar relevant item of each query, ties
    counted against it.

    Similarity is the cosine; an irrelevant item that ties with the relevant one stands before it,
    so that embeddings that all collapsed to one point rank last instead of first.

    Args:
        queries: float [q, D].
        gallery: float [g, D].
        query_ids: int [q], identity of each query.
        gallery_ids: int [g], identity of each item.
        gallery_chunk: items compared at a time. Beside the vectors themselves, memory is bounded
            to 10 bytes times both: 170 MB, however many there are. Every similarity is computed
            twice, first to find the best relevant one and then to count what stands before it.

    Raises:
        ValueError: if shapes do not match.
        UserError: if a query has no relevant item, so that its rank is undefined.
    """
    queries, gallery = normalise(queries), normalise(gallery)
    query_ids, gallery_ids = np.asarray(query_ids), np.asarray(gallery_ids)
    if queries.shape[1] != gallery.shape[1]:
        raise ValueError(
            f"queries are {queries.shape[1]}-d and the gallery is {gallery.shape[1]}-d"
        )
    if query_ids.shape != queries.shape[:1] or gallery_ids.shape != gallery.shape[:1]:
        raise ValueError(
            f"identities {query_ids.shape} and {gallery_ids.shape} do not match "
            f"{len(queries)} queries and {len(gallery)} items"
        )
    missing = ~np.isin(query_ids, gallery_ids)
    if missing.any():
        raise UserError(
            f"{int(missing.sum())} queries have no relevant item in the gallery, first identity "
            f"{query_ids[missing][0]}; leave them out"
        )

    def blocks(rows: slice) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for first in range(0, len(gallery), gallery_chunk):
            part = slice(first, first + gallery_chunk)
            yield queries[rows] @ gallery[part].T, query_ids[rows, None] == gallery_ids[None, part]

    ranks = np.ones(len(queries), dtype=np.int64)
    for start in range(0, len(queries), chunk):
        rows = slice(start, start + chunk)
        best = np.full((len(queries[rows]), 1), -np.inf, np.float32)
        for similarity, relevant in blocks(rows):
            relevant_only = np.where(relevant, similarity, -np.inf)
            best = np.maximum(best, relevant_only.max(axis=1, keepdims=True))
        for similarity, relevant in blocks(rows):
            ranks[rows] += ((similarity >= best - TIE_TOLERANCE) & ~relevant).sum(axis=1)
    return ranks


def retrieval_scores(
    queries: np.ndarray,
    gallery: np.ndarray,
    *,
    query_ids: np.ndarray,
    gallery_ids: np.ndarray,
    recall_at: Sequence[int],
) -> RetrievalScores:
    """Ranks the gallery for every query; takes the arguments of `first_relevant_ranks`.

    Args:
        recall_at: the k of R@k; 1 is always added, and a k above the size of the gallery left out.

    Raises:
        UserError: if a query has no relevant item.
    """
    ranks = first_relevant_ranks(queries, gallery, query_ids=query_ids, gallery_ids=gallery_ids)
    ks = sorted({1, *(k for k in recall_at if k <= len(gallery))})
    return RetrievalScores(ranks, len(gallery), chance_recall(query_ids, gallery_ids, ks))


def check_recall_at(recall_at: Sequence[int], *, setting: str) -> None:
    """Refuses values of K for R@K that are not positive whole numbers.

    Raises:
        UserError: naming `setting`.
    """
    if not all(isinstance(k, int) and k >= 1 for k in recall_at):
        raise UserError(f"{setting} {tuple(recall_at)} must be whole numbers of at least 1")


def chance_recall(
    query_ids: np.ndarray, gallery_ids: np.ndarray, recall_at: Sequence[int]
) -> dict[int, float]:
    """Returns R@k of a random order of the gallery, by k.

    Args:
        query_ids: int [q], identity of each query.
        gallery_ids: int [g], identity of each item.
    """
    identities, counts = np.unique(np.asarray(gallery_ids), return_counts=True)
    relevant = counts[np.searchsorted(identities, np.asarray(query_ids))]
    size = len(gallery_ids)

    def hit(k: int) -> np.ndarray:
        """Probability that k items, drawn at random, contain a relevant one."""
        drawn = np.arange(k)
        miss = np.clip(size - relevant[:, None] - drawn, 0, None) / (size - drawn)
        return 1.0 - miss.prod(axis=1)

    # Rounded, so that one in 200 is written as 0.005.
    return {k: round(float(np.mean(hit(k))), 12) for k in recall_at}


def nearest(queries: np.ndarray, gallery: np.ndarray, *, k: int) -> np.ndarray:
    """Returns int64 [q, min(k, g)], the items of the highest cosine to each query, best first.

    Args:
        queries: float [q, D].
        gallery: float [g, D].
    """
    model = NearestNeighbors(metric="cosine", algorithm="brute").fit(normalise(gallery))
    count = min(k, len(gallery))
    return model.kneighbors(normalise(queries), n_neighbors=count, return_distance=False)


def video_retrieval(
    config: ml_collections.ConfigDict, workdir: epath.PathLike
) -> dict[str, Any] | None:
    """Runs video retrieval by `configs/retrieval.py`; returns as `run_protocol`.

    Raises:
        UserError: if encoder, records and protocol do not fit.
    """
    check_recall_at(config.evaluation.recall_at, setting="evaluation.recall_at")
    data = config.data

    sides, number = numbered_sides(data), f"split{data.official_split}"
    if number not in sides:
        raise UserError(
            f"data.official_split {data.official_split} must be one of 1 to {len(sides)}, the "
            "entries of data.test_select"
        )
    (split,), spec = clip_splits(config, "video", {"split": sides[number]}, [data.label])
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
            for name in of_queries:
                scores = retrieval_scores(
                    of_queries[name],
                    of_gallery[name],
                    query_ids=ids,
                    gallery_ids=gallery_ids,
                    recall_at=tuple(config.evaluation.recall_at),
                )
                suffix = f"_{name}" if name else ""
                what = f"{name} encoder" if name else ""
                more_values, more_metrics = scores.outcomes(suffix, "{}" + suffix, what)
                values |= more_values
                metrics |= more_metrics
        rows = np.linspace(0, len(queries) - 1, _SHOWN).astype(int)
        items = nearest(of_queries[""][rows], of_gallery[""], k=_SHOWN)
        neighbours = [
            [
                _described(queries, int(row), ids, classes),
                *(_described(gallery, int(item), gallery_ids, classes) for item in of_query),
            ]
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


def _described(clips: ClipRecords, row: int, ids: np.ndarray, classes: Sequence[str]) -> str:
    return f"{clips.record_ids[row]} ({classes[int(ids[row])]})"


def cross_modal_scores(
    features: Mapping[str, np.ndarray], network: str, recall_at: Sequence[int]
) -> dict[str, RetrievalScores]:
    """Ranks the other halves of all records, in both directions.

    Args:
        features: outputs of `views.view_features`.
        network: name of the network whose embeddings are compared.
        recall_at: the k of R@k.

    Returns:
        By the names of `DIRECTIONS`; nothing if the network or the records lack a modality.
    """
    both = features["has_video"] & features["has_audio"]
    names = {m: f"{network}/{m}_embeddings" for m in ("video", "audio")}
    if not both.any() or any(name not in features for name in names.values()):
        return {}
    ids = features["record_index"][both]
    return {
        direction: retrieval_scores(
            features[names[query]][both],
            features[names[target]][both],
            query_ids=ids,
            gallery_ids=ids,
            recall_at=recall_at,
        )
        for direction, (query, target) in DIRECTIONS.items()
    }


def measure_cross_modal(
    records: UsableRecords,
    features: Mapping[str, np.ndarray],
    network: str,
    recall_at: Sequence[int],
) -> Measured:
    """Returns outcomes by ranked record, and the metrics of both directions.

    Args:
        records: records, in the order of `features`.
        features: outputs of `views.view_features`.
        network: name of the network whose embeddings are compared.
        recall_at: the k of R@k.
    """
    values: dict[str, np.ndarray] = {}
    metrics: dict[str, Metric] = {}
    scores = cross_modal_scores(features, network, recall_at)
    for direction, ranked in scores.items():
        what = direction.replace("_to_", " → ")
        of_direction = ranked.outcomes(f"_{direction}", f"{direction}_{{}}", what)
        values |= of_direction[0]
        metrics |= of_direction[1]
        metrics[f"{direction}_median_rank"] = Metric(
            "median",
            (f"rank_{direction}",),
            f"median rank, {what}",
            unit="number",
            chance=(ranked.gallery + 1) / 2,
        )
    both = np.flatnonzero(features["has_video"] & features["has_audio"] & bool(scores))
    names, sources = records.record_ids, records.sources
    return Measured(
        Outcomes([names[row] for row in both], [sources[row] for row in both], values),
        metrics,
        details={
            "gallery": len(both),
            "left_out": records.num_selected - len(both),
            # Spread over records: 0 if all embeddings have become the same.
            "embedding_std": {
                f"{modality}_embeddings": float(
                    features[f"{network}/{modality}_embeddings"][both].std(axis=0).mean()
                )
                for modality in ("video", "audio")
                if scores
            },
        },
    )


def audio_video_retrieval(
    config: ml_collections.ConfigDict, workdir: epath.PathLike
) -> dict[str, Any] | None:
    """Runs audio-video retrieval by `configs/cross_modal.py`; returns as `run_protocol`.

    Raises:
        ExportError: if `config.encoder` is not a run.
        UserError: if the run trained one modality, or no record has both.
    """
    settings = config.features
    check_pairs(len(settings.speeds) * settings.clips)
    run, records = open_run(config)
    if run.config.modalities != "audio_visual":
        raise UserError(
            f"{config.encoder} was trained on {run.config.modalities} alone: audio-video retrieval "
            "needs a run of both"
        )
    speeds = speed_indices(settings.speeds, run.config.views.speeds, setting="features.speeds")

    def compute(context: Context) -> dict[str, np.ndarray]:
        key = cache_key(run.source.fingerprint, run.heads, records.fingerprint, settings.to_dict())
        with context.stages("embeddings"):
            return view_features(
                view_map(
                    run, {"run": run.variables}, config.execution.chunk, config.execution.threads
                ),
                records,
                run.spec,
                speeds=speeds,
                views_per_speed=settings.clips,
                directory=context.directory / key,
                part_records=config.execution.part_records,
            )

    def measure(context: Context, features: dict[str, np.ndarray]) -> Measured:
        with context.stages("ranking"):
            measured = measure_cross_modal(
                records, features, "run", tuple(config.evaluation.recall_at)
            )
        if not measured.metrics:
            raise UserError(f"no record of {records} has both video and audio")
        return measured

    return run_protocol(
        AUDIO_VIDEO_RETRIEVAL,
        config,
        workdir,
        [Trial("all", run.source, records)],
        compute=compute,
        measure=measure,
        heads=run.heads,
    )
