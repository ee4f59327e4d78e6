"""Which rows of a feature bank an anchor gets (design §2.3): ranking, noise, picking.

Positives are drawn from the rows that are most similar to the anchor, without replacement and one
per source. Negatives are drawn from candidates, rows chosen at random for the whole step, of which
every anchor leaves out those nearest to it, and every source that stands among the first ranks: the
rows next to the positives are those most likely to show the same. All here works on arrays of one
device; `bank_exchange` brings anchors and rows of many devices together.

Embeddings of one speed and direction are alike, whatever they show. Ranking by content subtracts
from a row the mean of the bank's rows that are played back in the same way, and from an anchor of
the same modality likewise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
from jaxtyping import Array

from avcl_jax.errors import UserError

Modality = Literal["video", "audio"]
Term = tuple[Modality, Modality]  # of the anchor, of its positives and negatives

# Similarities of anchors × bank rows are computed in tiles of at most this many float32 values
# (32 MiB), so that a bank of a million rows fits beside the activations.
_TILE_ELEMENTS = 2**23
# Rows are summed by playback in blocks of so many where these divide the bank: the masks of a
# million rows at once would take 64 MiB a modality.
_SUMMED_ROWS = 2**16
# The nearest of a handful need not be alike: an anchor has positives only if so many times
# `positive_ranks` rows are eligible, as estimated from the candidates.
_ELIGIBLE_PER_POSITIVE_RANK = 4
# Noise of candidates is keyed by this in the place of an anchor's number, which no anchor has.
_NO_ANCHOR = 2**32 - 1


@dataclass(frozen=True)
class BankSampling:
    """How bank rows become the positives and negatives of an anchor.

    Attributes:
        space: Similarity that ranks the rows. "same": the anchor with the bank's rows of the
            anchor's own modality; "cross": the anchor with the bank's rows of the other modality;
            "agreement": min of the video-video and the audio-audio similarity of the two views.
        ranking: "raw": by that similarity; "content": by that of embeddings from which the mean of
            their playback (speed and direction) in the bank was subtracted.
        playbacks: Number of different playbacks; rows carry numbers below it.
        num_positives: Sampled per anchor from the most similar rows, at most one per source.
        num_negatives: Sampled per anchor from the candidates.
        positive_ranks: How many of the most similar rows positives are drawn from.
        negative_candidates: How many rows of the bank are candidates in a step.
        negative_offset: Fraction of an anchor's candidates, the most similar, that is left out.
        positive_sampling: "gumbel": Gumbel top-k of similarity / temperature; "uniform": all ranks
            alike.
        negative_sampling: Likewise.
        temperature: Of Gumbel sampling, in units of similarity.
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
        drawn = {"positive": self.positive_sampling, "negative": self.negative_sampling}
        for name, sampling in drawn.items():
            if sampling not in ("gumbel", "uniform"):
                raise UserError(f"{name}_sampling is {sampling!r}; use 'gumbel' or 'uniform'.")
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
                "negative_candidates is 0; at least 1 tells how many rows are eligible."
            )
        if "gumbel" in drawn.values() and not self.temperature > 0:
            raise UserError(f"temperature is {self.temperature}; Gumbel sampling needs > 0.")

    @property
    def samples(self) -> int:
        """Rows that are returned per anchor."""
        return self.num_positives + self.num_negatives


def ranking_pairs(sampling: BankSampling, anchor: Modality) -> tuple[Term, ...]:
    """(modality of the anchor, modality of the bank row) pairs whose similarities rank the rows."""
    if sampling.space == "agreement":
        return (("video", "video"), ("audio", "audio"))
    other: Modality = "audio" if anchor == "video" else "video"
    return ((anchor, anchor if sampling.space == "same" else other),)


def bank_modalities(sampling: BankSampling, term: Term) -> tuple[Modality, ...]:
    """Bank modalities that ranking and returning read, each once."""
    anchor, target = term
    return tuple(dict.fromkeys([*(row for _, row in ranking_pairs(sampling, anchor)), target]))


def anchor_modalities(sampling: BankSampling, anchor: Modality) -> tuple[Modality, ...]:
    """Modalities that an anchor must have, each once."""
    return tuple(dict.fromkeys([anchor, *(own for own, _ in ranking_pairs(sampling, anchor))]))


def _top_k(values: Array, k: int) -> tuple[Array, Array]:
    """`jax.lax.top_k` of [rows], ties in its order too, that sorts about 2 √(rows · k) values."""
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
    """Sums of the usable rows of each playback, with their number: [playbacks, dim + 1]."""

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

    rows = (embeddings, playback, usable)
    block = math.gcd(len(playback), _SUMMED_ROWS)
    if block < _SUMMED_ROWS:
        return of_block(rows)
    blocks = jax.tree.map(lambda values: values.reshape(-1, block, *values.shape[1:]), rows)
    return jax.lax.map(of_block, blocks).sum(axis=0)


def playback_means(sums: Array) -> Array:
    """Means [playbacks, dim] from the sums of `playback_sums`; 0 of a playback without rows."""
    return sums[:, :-1] / jnp.maximum(sums[:, -1:], 1)


def _lookup(values: Array, number: Array) -> Array:
    """`values[number]` of a few values: comparisons are fused, and a TPU's gather is slow."""
    chosen = (jnp.where(number == k, value, 0) for k, value in enumerate(values))
    return reduce(jnp.add, chosen)


def similarities(
    queries: Sequence[Array],
    embeddings: Sequence[Array],
    means: Sequence[Array],
    playbacks: Sequence[Array],
) -> Array:
    """Similarity [rows] of an anchor with every row, the least over pairs of modalities.

    Args:
        queries: [dim] of the anchor, for each pair.
        embeddings: [rows, dim].
        means: [playbacks, dim] to subtract from rows of each playback; or none.
        playbacks: int [rows].
    """
    # HIGHEST is free for a bfloat16 bank; a float32 bank is ranked as what it holds.
    highest: Any = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": "f4"}
    found = [
        jnp.einsum("d,rd->r", query, rows, **highest)
        for query, rows in zip(queries, embeddings, strict=True)
    ]
    for number, mean in enumerate(means):
        query = queries[number].astype(jnp.float32)
        mean = jnp.einsum("d,pd->p", query, mean, **highest)
        found[number] -= _lookup(mean, playbacks[number])
    return reduce(jnp.minimum, found)


class Comparison(NamedTuple):
    """Anchors and the rows that they are compared with.

    Attributes:
        queries: [anchors, dim] embeddings of the anchors, for each pair of modalities.
        embeddings: [rows, dim].
        means: [playbacks, dim] to subtract from rows of each playback; or none.
        playbacks: int [rows].
        anchor_source: int [anchors].
        anchor_usable: bool [anchors], whether all that is compared exists.
        row_source: int [rows].
        row_usable: bool [rows].
    """

    queries: Sequence[Array]
    embeddings: Sequence[Array]
    means: Sequence[Array]
    playbacks: Sequence[Array]
    anchor_source: Array
    anchor_usable: Array
    row_source: Array
    row_usable: Array


def compare(c: Comparison) -> Array:
    """Similarities [anchors, rows], the least over pairs of modalities; −inf where not eligible."""
    return _by_anchor(c, lambda similarity: similarity)


def rank(c: Comparison, ranks: int) -> tuple[Array, Array]:
    """The `ranks` most similar eligible rows of every anchor, −inf behind the last eligible one."""
    return _by_anchor(c, lambda similarity: _top_k(similarity, ranks))


def _by_anchor(c: Comparison, reduced: Callable[[Array], Any]) -> Any:
    # HIGHEST is free for a bfloat16 bank; a float32 bank is ranked as what it holds.
    highest: Any = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": "f4"}

    def one(anchor):
        *queries, source, usable = anchor
        found = [
            jnp.einsum("d,rd->r", query, rows, **highest)
            for query, rows in zip(queries, c.embeddings, strict=True)
        ]
        for pair, means in enumerate(c.means):
            by_playback = jnp.einsum("d,pd->p", queries[pair].astype("f4"), means, **highest)
            found[pair] -= _lookup(by_playback, c.playbacks[pair])
        eligible = c.row_usable & usable & (c.row_source != source)
        return reduced(jnp.where(eligible, reduce(jnp.minimum, found), -jnp.inf))

    anchors = (*c.queries, c.anchor_source, c.anchor_usable)
    tile = max(1, _TILE_ELEMENTS // c.row_source.shape[0])
    if c.anchor_source.shape[0] <= tile:
        return jax.vmap(one)(anchors)
    return jax.lax.map(one, anchors, batch_size=tile)


def _random_bits(key: Array, anchor: Array, insertion: Array) -> Array:
    """32 bits [anchors, rows] that depend on (key, anchor, insertion number) alone."""
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
    """Rows [candidates] that are candidates in the step of `key`, written ones first.

    Depends on the key and the rows' insertion numbers [rows] alone, not on where they lie.
    """
    bits = _random_bits(key, jnp.full(1, _NO_ANCHOR, jnp.uint32), insertion[None])[0]
    order = jnp.where(insertion >= 0, (bits >> 1).astype(jnp.int32), -1)
    return jax.lax.top_k(order, sampling.negative_candidates)[1]


def pick_positives(
    scores: Array,
    row_numbers: Array,
    enough: Array,
    key: Array,
    anchor: Array,
    sampling: BankSampling,
) -> tuple[Array, Array]:
    """Positions [anchors, num_positives] among the first ranks, and their validity.

    Args:
        scores: [anchors, ranks] similarities, −inf of no row.
        row_numbers: int [anchors, ranks, numbers] insertion number and source first.
        enough: bool [anchors], whether so many rows are eligible that the first are alike.
        key: Of the step and term.
        anchor: int [anchors] number of each anchor.
        sampling: Counts and distribution.
    """
    insertion, source = row_numbers[..., 0], row_numbers[..., 1]
    near = _gumbel(key, anchor, insertion)
    if sampling.positive_sampling == "gumbel":
        near = scores / sampling.temperature + near
    near = jnp.where(scores > -jnp.inf, near, -jnp.inf)
    near = jnp.where(enough[:, None], near, -jnp.inf)
    # One per source, sampled without replacement: the best, then the best of all other sources, …
    values, positions = [], []
    for _ in range(sampling.num_positives):
        best = jnp.argmax(near, axis=1, keepdims=True)
        values.append(jnp.take_along_axis(near, best, axis=1))
        positions.append(best)
        same = source == jnp.take_along_axis(source, best, axis=1)
        near = jnp.where(same, -jnp.inf, near)
    if not values:
        return jnp.zeros((len(scores), 0), jnp.int32), jnp.zeros((len(scores), 0), bool)
    return jnp.concatenate(positions, axis=1), jnp.concatenate(values, axis=1) > -jnp.inf


def pick_negatives(
    scores: Array,
    row_numbers: Array,
    near_source: Array,
    key: Array,
    anchor: Array,
    sampling: BankSampling,
) -> tuple[Array, Array]:
    """Positions [anchors, num_negatives] among the candidates, and their validity.

    Args:
        scores: [anchors, candidates] similarities, −inf where not eligible.
        row_numbers: int [candidates, numbers] insertion number and source first.
        near_source: int [anchors, ranks] sources that stand in the first ranks, −1 of no row.
        key: Of the step and term.
        anchor: int [anchors] number of each anchor.
        sampling: Counts and distribution.
    """
    eligible = scores > -jnp.inf
    left_out = jnp.floor(sampling.negative_offset * eligible.sum(-1, keepdims=True))
    nearest_first = -jnp.sort(-scores, axis=-1)
    threshold = jnp.take_along_axis(nearest_first, left_out.astype(jnp.int32), axis=1)
    insertion = jnp.broadcast_to(row_numbers[:, 0], scores.shape)
    far = _gumbel(key, anchor, insertion)
    if sampling.negative_sampling == "gumbel":
        far = scores / sampling.temperature + far
    # One rank after the other: of a million rows all at once would take 256 MiB.
    is_near, _ = jax.lax.scan(
        lambda found, near: (found | (row_numbers[None, :, 1] == near[:, None]), None),
        scores > jnp.inf,
        near_source.T,
    )
    far = jnp.where(eligible & (scores <= threshold) & ~is_near, far, -jnp.inf)
    value, position = jax.lax.top_k(far, sampling.num_negatives)
    return position, value > -jnp.inf


def enough_eligible(scores: Array, rows: int, sampling: BankSampling) -> Array:
    """Whether enough of the bank's rows are eligible, estimated from candidates' `scores`."""
    eligible = (scores > -jnp.inf).mean(-1) * rows
    return eligible >= _ELIGIBLE_PER_POSITIVE_RANK * sampling.positive_ranks
