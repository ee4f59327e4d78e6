"""Ranking of a feature bank's rows by similarity to an anchor, and sampling from them.

Positives are drawn without replacement from the rows that are most similar to the anchor, at most
one per source. Negatives are drawn from candidates: rows chosen at random once per step, for all
anchors. Each anchor leaves out the nearest candidates and every source among its first ranks, as
rows next to the positives are the likeliest to show the same content. Functions work on arrays of
one device; `bank_exchange` connects anchors and rows of several devices.

Embeddings of equal playback (speed and direction) are alike whatever they show. Ranking by content
subtracts from each row the mean of the bank's rows of its playback and, where anchor and row have
the same modality, from the anchor the mean of its own. The differences are compared by cosine: by
its dot product the rows furthest from the mean would be near to every anchor, and their pull, to
which no gradient of targets answers, would drive video and audio embeddings apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
from jaxtyping import Array

from avcl_jax.errors import UserError
from avcl_jax.objectives.bank_rows import RowNumbers
from avcl_jax.objectives.views import Modality

Term = tuple[Modality, Modality]  # of the anchor, of its positives and negatives

# Similarities of anchors × bank rows are computed in tiles of at most this many float32 values
# (32 MiB), so that a bank of a million rows fits in memory with the activations.
_TILE_ELEMENTS = 2**23
# Sums by playback and lengths are computed in blocks of this many rows where it divides the bank:
# masks of a million rows at once would take 64 MiB per modality, their products with means 32 MiB.
_BLOCK_ROWS = 2**16
# The nearest of few rows need not be similar: an anchor has positives only if at least this many
# times `positive_ranks` rows are eligible, as estimated from the candidates.
ELIGIBLE_PER_POSITIVE_RANK = 4
# HIGHEST is free for a bfloat16 bank; a float32 bank is ranked in float32.
_HIGHEST: Any = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": "f4"}
# Keys the choice of candidates in place of an anchor's number; no anchor has it.
_NO_ANCHOR = 2**32 - 1


@dataclass(frozen=True)
class BankSampling:
    """Settings of ranking and sampling.

    Attributes:
        space: Similarity that ranks the rows. "same": of anchor and row in the anchor's modality;
            "cross": of the anchor and the row's other modality; "agreement": minimum of the
            video-video and the audio-audio similarity.
        ranking: "raw": by the cosine of embeddings; "content": by the cosine of their differences
            from the mean of their playback in the bank.
        playbacks: Number of playbacks; those of rows are in [0, playbacks).
        num_positives: Positives per anchor, at most one per source.
        num_negatives: Negatives per anchor.
        positive_ranks: Number of most similar rows that positives are drawn from.
        negative_candidates: Number of candidates per step.
        negative_offset: Fraction of an anchor's eligible candidates, the most similar, that is left
            out.
        positive_sampling: "gumbel": Gumbel top-k of similarity / temperature; "uniform": equal
            probabilities.
        negative_sampling: As `positive_sampling`.
        temperature: Temperature of Gumbel sampling, in units of similarity.

    Raises:
        UserError: On an unknown name or a number out of range.
    """

    space: str
    ranking: str
    playbacks: int
    num_positives: int
    num_negatives: int
    positive_ranks: int
    negative_candidates: int
    negative_offset: float
    positive_sampling: str
    negative_sampling: str
    temperature: float

    def __post_init__(self) -> None:
        if self.space not in ("same", "cross", "agreement"):
            raise UserError(f"space is {self.space!r}; use 'same', 'cross' or 'agreement'.")
        if self.ranking not in ("raw", "content"):
            raise UserError(f"ranking is {self.ranking!r}; use 'raw' or 'content'.")
        distributions = {"positive": self.positive_sampling, "negative": self.negative_sampling}
        for kind, distribution in distributions.items():
            if distribution not in ("gumbel", "uniform"):
                raise UserError(f"{kind}_sampling is {distribution!r}; use 'gumbel' or 'uniform'.")
        if not 0 <= self.negative_offset < 1:
            raise UserError(f"negative_offset is {self.negative_offset}; need 0 <= it < 1.")
        for kind, number, rows, of in (
            ("positives", self.num_positives, "positive_ranks", self.positive_ranks),
            ("negatives", self.num_negatives, "negative_candidates", self.negative_candidates),
        ):
            if not 0 <= number <= of:
                raise UserError(
                    f"num_{kind} = {number} cannot be drawn from {rows} = {of} rows; "
                    f"need 0 <= num_{kind} <= {rows}."
                )
        if self.negative_candidates < 1:
            raise UserError(
                "negative_candidates is 0; use at least 1, from which the number of eligible "
                "rows is estimated."
            )
        if "gumbel" in distributions.values() and not self.temperature > 0:
            raise UserError(f"temperature is {self.temperature}; Gumbel sampling needs > 0.")


def ranking_pairs(sampling: BankSampling, anchor: Modality) -> tuple[Term, ...]:
    """(modality of the anchor, modality of the bank row) pairs whose similarities rank the rows."""
    if sampling.space == "agreement":
        return (("video", "video"), ("audio", "audio"))
    other: Modality = "audio" if anchor == "video" else "video"
    return ((anchor, anchor if sampling.space == "same" else other),)


def bank_modalities(sampling: BankSampling, term: Term) -> tuple[Modality, ...]:
    """Modalities of the bank that ranking and returned rows read, each once."""
    anchor, target = term
    return tuple(dict.fromkeys([*(row for _, row in ranking_pairs(sampling, anchor)), target]))


def anchor_modalities(sampling: BankSampling, anchor: Modality) -> tuple[Modality, ...]:
    """Modalities that an anchor must have, each once."""
    return tuple(dict.fromkeys([anchor, *(own for own, _ in ranking_pairs(sampling, anchor))]))


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


def playback_sums(
    embeddings: Array, playback: Array, usable: Array, sampling: BankSampling
) -> Array:
    """Sums the usable rows of each playback.

    Args:
        embeddings: [rows, dim].
        playback: int [rows].
        usable: bool [rows].
        sampling: For the number of playbacks.

    Returns:
        float32 [playbacks, dim + 1]; the last column is the number of rows.
    """

    def of_block(block: tuple[Array, Array, Array]) -> Array:
        rows, number, counted = block
        chosen = (number[None] == jnp.arange(sampling.playbacks)[:, None]) & counted[None]
        sums = jnp.matmul(
            chosen.astype(rows.dtype),
            rows,
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type="f4",
        )
        return jnp.concatenate([sums, chosen.sum(axis=1, keepdims=True, dtype="f4")], axis=1)

    return _by_block(of_block, (embeddings, playback, usable)).sum(axis=0)


def _by_block(function: Callable[[Any], Array], rows: tuple[Array, ...]) -> Array:
    """Applies `function` to blocks of rows: [blocks, ...]; the whole is one block if none fits."""
    block = math.gcd(len(rows[0]), _BLOCK_ROWS)
    if block < _BLOCK_ROWS:
        return function(rows)[None]
    blocks = jax.tree.map(lambda values: values.reshape(-1, block, *values.shape[1:]), rows)
    return jax.lax.map(function, blocks)


def playback_means(sums: Array) -> Array:
    """Means [playbacks, dim] from `playback_sums`; 0 for a playback without rows."""
    return sums[:, :-1] / jnp.maximum(sums[:, -1:], 1)


def _lookup(values: Array, number: Array) -> Array:
    """Equals `values[number]`, for few values: comparisons are fused, a TPU's gather is slow."""
    chosen = (jnp.where(number == k, value, 0) for k, value in enumerate(values))
    return reduce(jnp.add, chosen)


def inverse_lengths(embeddings: Array, playback: Array, means: Array) -> Array:
    """1 / |row − mean of its playback|, float32 [rows]; 0 for a row that equals the mean.

    Args:
        embeddings: [rows, dim].
        playback: int [rows].
        means: float32 [playbacks, dim].
    """
    # |r|² − 2 r·m + |m|²: the rows minus their means would take float32 [rows, dim].
    squared_means = jnp.square(means).sum(axis=1)

    def of_block(block: tuple[Array, Array]) -> Array:
        rows, number = block
        squared = jnp.einsum("rd,rd->r", rows, rows, **_HIGHEST)
        by_playback = jnp.einsum("pd,rd->pr", means, rows.astype("f4"), **_HIGHEST)
        squared = squared - 2 * _lookup(by_playback, number) + _lookup(squared_means, number)
        # Below the rounding of the sum nothing is known of the direction.
        return jnp.where(squared > 1e-6, jax.lax.rsqrt(jnp.maximum(squared, 1e-6)), 0.0)

    return _by_block(of_block, (embeddings, playback)).ravel()


class Comparison(NamedTuple):
    """Anchors and the rows to compare them with, for each pair of `ranking_pairs`.

    Attributes:
        queries: [anchors, dim] embeddings of the anchors, for each pair.
        embeddings: [rows, dim], for each pair.
        means: [playbacks, dim] to subtract from rows of each playback, for each pair; empty for raw
            similarities.
        inverse_lengths: float32 [rows] of `inverse_lengths`, for each pair; empty likewise.
        playbacks: int [rows], for each pair.
        anchor_source: int [anchors].
        anchor_usable: bool [anchors], the anchor has all modalities that are read.
        row_source: int [rows].
        row_usable: bool [rows], likewise.
    """

    queries: Sequence[Array]
    embeddings: Sequence[Array]
    means: Sequence[Array]
    inverse_lengths: Sequence[Array]
    playbacks: Sequence[Array]
    anchor_source: Array
    anchor_usable: Array
    row_source: Array
    row_usable: Array


def compare(c: Comparison) -> Array:
    """Similarities [anchors, rows], the minimum over pairs; −inf where a row is not eligible."""
    return _by_anchor(c, lambda similarity: similarity)


def rank(c: Comparison, ranks: int) -> tuple[Array, Array]:
    """Similarities and positions [anchors, ranks] of the most similar rows, in descending order.

    The similarity is −inf behind the last eligible row.
    """
    return _by_anchor(c, lambda similarity: _top_k(similarity, ranks))


def _by_anchor(c: Comparison, reduced: Callable[[Array], Any]) -> Any:
    """Applies `reduced` to the similarities [rows] of every anchor, in tiles."""

    def one(anchor):
        *queries, source, usable = anchor
        similarities = [
            jnp.einsum("d,rd->r", query, rows, **_HIGHEST)
            for query, rows in zip(queries, c.embeddings, strict=True)
        ]
        for pair, means in enumerate(c.means):
            by_playback = jnp.einsum("d,pd->p", queries[pair].astype("f4"), means, **_HIGHEST)
            centred = similarities[pair] - _lookup(by_playback, c.playbacks[pair])
            similarities[pair] = centred * c.inverse_lengths[pair]
        eligible = c.row_usable & usable & (c.row_source != source)
        return reduced(jnp.where(eligible, reduce(jnp.minimum, similarities), -jnp.inf))

    anchors = (*c.queries, c.anchor_source, c.anchor_usable)
    tile = max(1, _TILE_ELEMENTS // c.row_source.shape[0])
    if c.anchor_source.shape[0] <= tile:
        return jax.vmap(one)(anchors)
    return jax.lax.map(one, anchors, batch_size=tile)


def _random_bits(key: Array, anchor: Array, insertion: Array) -> Array:
    """Random 32 bits [anchors, rows] that depend on (key, anchor, insertion number) alone."""
    # One Threefry block per pair, counting (anchor, insertion). `jax.random` under vmap needs three
    # (two fold_in, one draw), and draws of an "rbg" key would depend on the batch's shape.
    counter = jnp.stack([jnp.broadcast_to(anchor[:, None], insertion.shape), insertion])
    words = jax.random.key_data(key).ravel()[:2]
    return jax.extend.random.threefry_2x32(words, counter.astype(jnp.uint32))[0]


def _gumbel(key: Array, anchor: Array, insertion: Array) -> Array:
    """Gumbel noise [anchors, rows]."""
    # 23 bits, centred: float32 holds every value exactly, and neither 0 nor 1 is among them.
    bits = _random_bits(key, anchor, insertion)
    uniform = ((bits >> 9).astype(jnp.float32) + 0.5) * 2.0**-23
    return -jnp.log(-jnp.log(uniform))


def choose_candidates(insertion: Array, key: Array, sampling: BankSampling) -> Array:
    """Chooses candidates, written rows first: int [candidates] positions of rows.

    The choice depends on the step's key and the insertion numbers [rows] alone, not on positions.
    """
    bits = _random_bits(key, jnp.full(1, _NO_ANCHOR, jnp.uint32), insertion[None])[0]
    order = jnp.where(insertion >= 0, (bits >> 1).astype(jnp.int32), -1)
    return jax.lax.top_k(order, sampling.negative_candidates)[1]


def pick_positives(
    scores: Array,
    rows: RowNumbers,
    enough: Array,
    key: Array,
    anchor: Array,
    sampling: BankSampling,
) -> tuple[Array, Array]:
    """Draws positives: positions [anchors, num_positives] among the first ranks, and validity.

    Args:
        scores: [anchors, ranks] similarities, −inf where there is no row.
        rows: Numbers of the rows [anchors, ranks].
        enough: bool [anchors] from `enough_eligible`; other anchors get no positives.
        key: Key of the step and term.
        anchor: int [anchors] number of each anchor.
        sampling: Count, distribution and temperature.
    """
    perturbed = _gumbel(key, anchor, rows.insertion)
    if sampling.positive_sampling == "gumbel":
        perturbed = scores / sampling.temperature + perturbed
    perturbed = jnp.where((scores > -jnp.inf) & enough[:, None], perturbed, -jnp.inf)
    # One per source, without replacement: the best, then the best of all other sources, …
    values, positions = [], []
    for _ in range(sampling.num_positives):
        best = jnp.argmax(perturbed, axis=1, keepdims=True)
        values.append(jnp.take_along_axis(perturbed, best, axis=1))
        positions.append(best)
        same = rows.source_id == jnp.take_along_axis(rows.source_id, best, axis=1)
        perturbed = jnp.where(same, -jnp.inf, perturbed)
    if not values:
        return jnp.zeros((len(scores), 0), jnp.int32), jnp.zeros((len(scores), 0), bool)
    return jnp.concatenate(positions, axis=1), jnp.concatenate(values, axis=1) > -jnp.inf


def pick_negatives(
    scores: Array,
    rows: RowNumbers,
    near_source: Array,
    key: Array,
    anchor: Array,
    sampling: BankSampling,
) -> tuple[Array, Array]:
    """Draws negatives: positions [anchors, num_negatives] among the candidates, and validity.

    Args:
        scores: [anchors, candidates] similarities, −inf where not eligible.
        rows: Numbers of the candidates.
        near_source: int [anchors, ranks] sources of the first ranks, −1 where there is no row.
        key: Key of the step and term.
        anchor: int [anchors] number of each anchor.
        sampling: Count, offset, distribution and temperature.
    """
    eligible = scores > -jnp.inf
    left_out = jnp.floor(sampling.negative_offset * eligible.sum(-1, keepdims=True))
    descending = -jnp.sort(-scores, axis=-1)
    threshold = jnp.take_along_axis(descending, left_out.astype(jnp.int32), axis=1)
    perturbed = _gumbel(key, anchor, jnp.broadcast_to(rows.insertion, scores.shape))
    if sampling.negative_sampling == "gumbel":
        perturbed = scores / sampling.temperature + perturbed
    # Rank by rank: for a bank of a million rows, comparing with all ranks at once takes 256 MiB.
    # `scores > inf` is False everywhere and varies over devices as the result does.
    near, _ = jax.lax.scan(
        lambda near, source: (near | (rows.source_id[None] == source[:, None]), None),
        scores > jnp.inf,
        near_source.T,
    )
    perturbed = jnp.where(eligible & (scores <= threshold) & ~near, perturbed, -jnp.inf)
    value, position = jax.lax.top_k(perturbed, sampling.num_negatives)
    return position, value > -jnp.inf


def enough_eligible(scores: Array, rows: int, sampling: BankSampling) -> Array:
    """Tests whether enough rows are eligible for positives: bool [anchors].

    Args:
        scores: [anchors, candidates] similarities, −inf where not eligible; their fraction is the
            estimate.
        rows: Rows of the bank.
        sampling: For the number of ranks.
    """
    eligible = (scores > -jnp.inf).mean(-1) * rows
    return eligible >= ELIGIBLE_PER_POSITIVE_RANK * sampling.positive_ranks
