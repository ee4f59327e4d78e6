"""Similarity of a feature bank's rows to anchors, by which they are ranked.

Embeddings of equal playback (speed and direction) are alike whatever they show. Ranking by content
subtracts from each row the mean of the bank's rows of its playback and, where anchor and row have
the same modality, from the anchor the mean of its own. The differences are compared by cosine: by
its dot product the rows furthest from the mean would be near to every anchor, and their pull, to
which no gradient of targets answers, would drive video and audio embeddings apart.

Functions work on the rows of one device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from avcl_jax.objectives.bank_rows import BankRows
from avcl_jax.objectives.views import Modality, Term, Views

# Similarities of anchors × bank rows are computed in tiles of at most this many float32 values
# (32 MiB), so that a bank of a million rows fits in memory with the activations.
_TILE_ELEMENTS = 2**23
# Sums by playback and lengths are computed in blocks of this many rows where it divides the bank:
# masks of a million rows at once would take 64 MiB per modality, their products with means 32 MiB.
_BLOCK_ROWS = 2**16
# HIGHEST is free for a bfloat16 bank; a float32 bank is ranked in float32.
HIGHEST: Any = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": "f4"}


class Anchors(NamedTuple):
    """Views that rows are ranked for.

    Attributes:
        queries: unit vectors [anchors, dim] for each pair of modalities, see `queries_of`.
        source: int [anchors].
        usable: bool [anchors], the anchor has all modalities that are read.
    """

    queries: Sequence[Array]
    source: Array
    usable: Array


def queries_of(
    views: Views, rows: BankRows, *, pairs: Sequence[Term], means: Sequence[Array]
) -> list[Array]:
    """Unit vectors of anchors [views, dim] for each pair, in the dtype of the bank.

    Args:
        views: views of the batch, all of them anchors.
        rows: rows of the bank.
        pairs: (modality of the anchor, modality of the row) pairs, see `BankSampling.pairs`.
        means: means [playbacks, dim] of rows, for each pair; empty for raw similarities.
    """
    queries = []
    for pair, (own, row) in enumerate(pairs):
        query = views.embeddings[own].reshape(-1, views.embeddings[own].shape[-1])
        if means and own == row:
            query = query - means[pair][views.playback[own].ravel()]
            query = query / jnp.maximum(jnp.linalg.norm(query, axis=1, keepdims=True), 1e-3)
        # In the bank's dtype, so that both sides of a similarity are rounded alike.
        queries.append(query.astype(rows.embeddings[row].dtype))
    return queries


def compare(
    anchors: Anchors,
    rows: BankRows,
    usable: Array,
    *,
    pairs: Sequence[Term],
    means: Sequence[Array],
) -> Array:
    """Similarities [anchors, rows], the minimum over pairs; −inf where a row is not eligible.

    Args:
        anchors: the anchors.
        rows: rows to compare them with; only those of other sources are eligible.
        usable: bool [rows], the row has all modalities that are read.
        pairs: argument of `queries_of`, like `means`.
    """
    return _by_anchor(anchors, rows, usable, pairs, means, lambda similarity: similarity)


def rank(
    anchors: Anchors,
    rows: BankRows,
    usable: Array,
    ranks: int,
    *,
    pairs: Sequence[Term],
    means: Sequence[Array],
) -> tuple[Array, Array]:
    """Similarities and positions [anchors, ranks] of the most similar rows, in descending order.

    Args are those of `compare`. The similarity is −inf behind the last eligible row.
    """
    return _by_anchor(anchors, rows, usable, pairs, means, lambda s: _top_k(s, ranks))


def _by_anchor(
    anchors: Anchors,
    rows: BankRows,
    usable: Array,
    pairs: Sequence[Term],
    means: Sequence[Array],
    reduced: Callable[[Array], Any],
) -> Any:
    """Applies `reduced` to the similarities [rows] of every anchor, in tiles."""
    keys = [rows.embeddings[row] for _, row in pairs]
    playbacks = [rows.numbers.playback(row) for _, row in pairs]
    # No means and no lengths for raw similarities.
    inverse = [_inverse_lengths(*key) for key in zip(keys, playbacks, means, strict=False)]

    def one(anchor: Anchors) -> Any:
        similarities = [
            jnp.einsum("d,rd->r", query, key, **HIGHEST)
            for query, key in zip(anchor.queries, keys, strict=True)
        ]
        for pair, mean in enumerate(means):
            query = anchor.queries[pair].astype("f4")
            by_playback = jnp.einsum("d,pd->p", query, mean, **HIGHEST)
            centred = similarities[pair] - _lookup(by_playback, playbacks[pair])
            similarities[pair] = centred * inverse[pair]
        eligible = usable & anchor.usable & (rows.numbers.source_id != anchor.source)
        return reduced(jnp.where(eligible, reduce(jnp.minimum, similarities), -jnp.inf))

    tile = max(1, _TILE_ELEMENTS // usable.shape[0])
    if anchors.source.shape[0] <= tile:
        return jax.vmap(one)(anchors)
    return jax.lax.map(one, anchors, batch_size=tile)


def _top_k(values: Array, k: int) -> tuple[Array, Array]:
    """Equals `jax.lax.top_k` of [rows], also in ties, but sorts only about 2 √(rows · k) values."""
    size = values.shape[0]
    if not k:
        return values[:0], jnp.zeros(0, jnp.int32)
    block = 2 ** round(math.log2(size / k) / 2)
    if block < 4 or size % block:
        best, rows = jax.lax.top_k(values, k)
        return best, rows
    blocks = values.reshape(-1, block)
    # The k largest values lie in the k blocks with the largest maxima. In ascending order of the
    # blocks, equal values stay in order of their rows.
    chosen = jnp.sort(jax.lax.top_k(blocks.max(axis=1), k)[1])
    best, position = jax.lax.top_k(blocks[chosen].ravel(), k)
    return best, chosen[position // block] * block + position % block


def playback_means(
    rows: BankRows, modality: Modality, playbacks: int, axes: tuple[str, ...]
) -> Array:
    """Means of the usable rows of each playback, float32 [playbacks, dim]; 0 without rows.

    Args:
        axes: mesh axes over which the rows are sharded.
    """

    def of_block(block: tuple[Array, Array, Array]) -> Array:
        embeddings, number, usable = block
        chosen = (number[None] == jnp.arange(playbacks)[:, None]) & usable[None]
        sums = jnp.matmul(
            chosen.astype(embeddings.dtype),
            embeddings,
            **HIGHEST,
        )
        return jnp.concatenate([sums, chosen.sum(axis=1, keepdims=True, dtype="f4")], axis=1)

    arrays = rows.embeddings[modality], rows.numbers.playback(modality), rows.usable(modality)
    sums = _by_block(of_block, arrays).sum(axis=0)
    sums = jax.lax.psum(sums, axes) if axes else sums
    return sums[:, :-1] / jnp.maximum(sums[:, -1:], 1)


def _by_block(function: Callable[[Any], Array], rows: tuple[Array, ...]) -> Array:
    """Applies `function` to blocks of rows: [blocks, ...]; the whole is one block if none fits."""
    block = math.gcd(len(rows[0]), _BLOCK_ROWS)
    if block < _BLOCK_ROWS:
        return function(rows)[None]
    blocks = jax.tree.map(lambda values: values.reshape(-1, block, *values.shape[1:]), rows)
    return jax.lax.map(function, blocks)


def _lookup(values: Array, number: Array) -> Array:
    """Equals `values[number]`, for few values: comparisons are fused, a TPU's gather is slow."""
    chosen = (jnp.where(number == k, value, 0) for k, value in enumerate(values))
    return reduce(jnp.add, chosen)


def _inverse_lengths(embeddings: Array, playback: Array, means: Array) -> Array:
    """1 / |row − mean of its playback|, float32 [rows]; 0 for a row that equals the mean."""
    # |r|² − 2 r·m + |m|²: the rows minus their means would take float32 [rows, dim].
    squared_means = jnp.square(means).sum(axis=1)

    def of_block(block: tuple[Array, Array]) -> Array:
        rows, number = block
        squared = jnp.einsum("rd,rd->r", rows, rows, **HIGHEST)
        by_playback = jnp.einsum("pd,rd->pr", means, rows.astype("f4"), **HIGHEST)
        squared = squared - 2 * _lookup(by_playback, number) + _lookup(squared_means, number)
        # Below the rounding of the sum nothing is known of the direction.
        return jnp.where(squared > 1e-6, jax.lax.rsqrt(jnp.maximum(squared, 1e-6)), 0.0)

    return _by_block(of_block, (embeddings, playback)).ravel()
