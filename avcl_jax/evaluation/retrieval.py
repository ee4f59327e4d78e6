"""Nearest neighbours and retrieval scores, with worst-case tie order.

One definition serves instance retrieval (the audio of a video finds its picture: every identity is
unique) and class retrieval (a UCF101 test clip finds training clips of its class): an item of the
gallery is *relevant* to a query when their identities are equal.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from avcl_jax.errors import UserError

# Two similarities of unit float32 vectors that differ by less than this are tied. A blocked matrix
# product returns the last bits of equal vectors differently, and a collapsed encoder must not gain
# from that lottery.
TIE_TOLERANCE = 1e-6


@dataclass(frozen=True)
class RetrievalScores:
    """What a ranking of a gallery is worth.

    Attributes:
        recall: share of queries with a relevant item within the first k, by k.
        chance: the same share for a random order of the gallery, by k.
        median_rank: median over queries of the rank of the first relevant item, counted from 1.
        chance_median_rank: the same for a random order and one relevant item of each query,
            (gallery + 1) / 2.
        queries: number of queries.
        gallery: number of items they are ranked over.
        ranks: int64 [queries], that of the first relevant item.
    """

    recall: dict[int, float]
    chance: dict[int, float]
    median_rank: float
    chance_median_rank: float
    queries: int
    gallery: int
    ranks: np.ndarray

    def as_results(self) -> dict[str, float | int]:
        """Returns the flat mapping that results.json stores; `chance` is that of R@1."""
        results: dict[str, float | int] = {}
        for k, value in self.recall.items():
            results[f"r{k}"] = value
            results[f"chance_r{k}"] = self.chance[k]
        results["median_rank"] = self.median_rank
        results["chance_median_rank"] = self.chance_median_rank
        results["chance"] = self.chance[1]
        results["queries"] = self.queries
        results["gallery"] = self.gallery
        return results


def normalise(vectors: np.ndarray) -> np.ndarray:
    """Returns float32 [n, D] vectors scaled to unit length; a zero vector stays zero.

    Args:
        vectors: float [n, D].

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
        chunk: queries compared at a time.
        gallery_chunk: items compared at a time. Beside the vectors themselves, memory is bounded
            to 10 bytes times both: 170 MB, however many there are. Every similarity is computed
            twice, first to find the best relevant one and then to count what stands before it.

    Raises:
        UserError: if shapes do not match, or a query has no relevant item (its rank would be
            undefined).
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
    ranks = np.ones(len(queries), dtype=np.int64)
    for start in range(0, len(queries), chunk):
        rows = slice(start, start + chunk)
        best = np.full((len(queries[rows]), 1), -np.inf, np.float32)
        blocks = functools.partial(
            _blocks, rows, queries, gallery, query_ids, gallery_ids, gallery_chunk
        )
        for similarity, relevant in blocks():
            found = np.where(relevant, similarity, -np.inf).max(axis=1, keepdims=True)
            best = np.maximum(best, found)
        for similarity, relevant in blocks():
            ranks[rows] += ((similarity >= best - TIE_TOLERANCE) & ~relevant).sum(axis=1)
    return ranks


def _blocks(
    rows: slice,
    queries: np.ndarray,
    gallery: np.ndarray,
    query_ids: np.ndarray,
    gallery_ids: np.ndarray,
    size: int,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields similarities of some queries with a part of the gallery, and which are relevant."""
    for start in range(0, len(gallery), size):
        part = slice(start, start + size)
        relevant = query_ids[rows, None] == gallery_ids[None, part]
        yield queries[rows] @ gallery[part].T, relevant


def retrieval_scores(
    queries: np.ndarray,
    gallery: np.ndarray,
    *,
    query_ids: np.ndarray,
    gallery_ids: np.ndarray,
    recall_at: Sequence[int],
    chunk: int = 1024,
) -> RetrievalScores:
    """Ranks the gallery for every query and scores the order.

    Args:
        queries: float [q, D].
        gallery: float [g, D].
        query_ids: int [q], identity of each query.
        gallery_ids: int [g], identity of each item.
        recall_at: the k of R@k; 1 is always added, and a k above the size of the gallery is left
            out.
        chunk: queries compared at a time.

    Returns:
        Scores over all queries.

    Raises:
        ValueError: as `first_relevant_ranks`.
    """
    ranks = first_relevant_ranks(
        queries, gallery, query_ids=query_ids, gallery_ids=gallery_ids, chunk=chunk
    )
    size = len(gallery)
    ks = sorted({1, *(k for k in recall_at if k <= size)})
    return RetrievalScores(
        recall={k: float(np.mean(ranks <= k)) for k in ks},
        chance=chance_recall(query_ids, gallery_ids, ks),
        median_rank=float(np.median(ranks)),
        chance_median_rank=(size + 1) / 2,
        queries=len(ranks),
        gallery=size,
        ranks=ranks,
    )


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
        recall_at: the k.
    """
    identities, counts = np.unique(np.asarray(gallery_ids), return_counts=True)
    relevant = counts[np.searchsorted(identities, np.asarray(query_ids))]
    size = len(gallery_ids)
    # Rounded, so that one in 200 is written as 0.005.
    return {k: round(float(np.mean(_chance_of_hit(relevant, size, k))), 12) for k in recall_at}


def _chance_of_hit(relevant: np.ndarray, size: int, k: int) -> np.ndarray:
    """Returns the probability that k of `size` items, drawn at random, hold a relevant one."""
    drawn = np.arange(k)
    miss = np.clip(size - relevant[:, None] - drawn, 0, None) / (size - drawn)
    return 1.0 - miss.prod(axis=1)


def nearest(
    queries: np.ndarray,
    gallery: np.ndarray,
    *,
    k: int,
    chunk: int = 1024,
    gallery_chunk: int = 16_384,
) -> np.ndarray:
    """Returns int64 [q, min(k, g)], the most similar items of each query, most similar first.

    Args:
        queries: float [q, D].
        gallery: float [g, D].
        k: how many; of equally similar ones the first.
        chunk: queries compared at a time.
        gallery_chunk: items compared at a time.
    """
    queries, gallery = normalise(queries), normalise(gallery)
    k = min(k, len(gallery))
    found = np.empty((len(queries), k), dtype=np.int64)
    for start in range(0, len(queries), chunk):
        rows = queries[start : start + chunk]
        best = np.empty((len(rows), 0), np.float32)
        items = np.empty((len(rows), 0), np.int64)
        for first in range(0, len(gallery), gallery_chunk):
            part = gallery[first : first + gallery_chunk]
            numbers = np.broadcast_to(np.arange(first, first + len(part)), (len(rows), len(part)))
            best = np.concatenate([best, rows @ part.T], axis=1)
            items = np.concatenate([items, numbers], axis=1)
            order = np.argsort(-best, axis=1, kind="stable")[:, :k]
            best = np.take_along_axis(best, order, axis=1)
            items = np.take_along_axis(items, order, axis=1)
        found[start : start + chunk] = items
    return found
