"""Which rows of a feature bank an anchor gets (design §2.3): ranking, noise, picking.

Per anchor the eligible rows are ranked by similarity; positives are drawn without replacement, one
per source, from the first ranks, negatives from the next, by Gumbel top-k. All here works on arrays
of one device; `bank_exchange` brings anchors and rows of many devices together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce
from typing import Literal

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


@dataclass(frozen=True)
class BankSampling:
    """How bank rows become the positives and negatives of an anchor.

    Attributes:
        space: Similarity that ranks the rows. "same": the anchor with the bank's rows of the
            anchor's own modality; "cross": the anchor with the bank's rows of the other modality;
            "agreement": min of the video-video and the audio-audio similarity of the two views.
        num_positives: Sampled per anchor from ranks [0, positive_ranks), at most one per source.
        num_negatives: Sampled from ranks [positive_ranks, positive_ranks + negative_ranks).
        positive_ranks: k_p of design §2.3.
        negative_ranks: k_n of design §2.3.
        sampling: "gumbel": Gumbel top-k of similarity / temperature; "uniform": all ranks alike.
        temperature: Of the Gumbel sampling, in units of similarity.
    """

    space: str
    num_positives: int
    num_negatives: int
    positive_ranks: int
    negative_ranks: int
    sampling: str
    temperature: float

    def __post_init__(self) -> None:
        if self.space not in ("same", "cross", "agreement"):
            raise UserError(f"space is {self.space!r}; use 'same', 'cross' or 'agreement'.")
        if self.sampling not in ("gumbel", "uniform"):
            raise UserError(f"sampling is {self.sampling!r}; use 'gumbel' or 'uniform'.")
        for name, count, ranks in (
            ("positive", self.num_positives, self.positive_ranks),
            ("negative", self.num_negatives, self.negative_ranks),
        ):
            if not 0 <= count <= ranks:
                raise UserError(
                    f"num_{name}s = {count} cannot be drawn from {name}_ranks = {ranks} ranks; "
                    f"need 0 <= num_{name}s <= {name}_ranks."
                )
        if self.sampling == "gumbel" and not self.temperature > 0:
            raise UserError(f"temperature is {self.temperature}; Gumbel sampling needs > 0.")

    @property
    def ranks(self) -> int:
        """Rows that are ranked per anchor."""
        return self.positive_ranks + self.negative_ranks

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


def rank(
    queries: tuple[Array, ...],
    embeddings: tuple[Array, ...],
    anchor_source: Array,
    anchor_usable: Array,
    row_source: Array,
    row_usable: Array,
    ranks: int,
) -> tuple[Array, Array]:
    """The `ranks` most similar eligible rows of every anchor, −inf behind the last eligible one."""

    def dot(query, rows):
        # HIGHEST is free for a bfloat16 bank; a float32 bank is ranked as what it holds.
        highest = jax.lax.Precision.HIGHEST
        return jnp.einsum("d,rd->r", query, rows, precision=highest, preferred_element_type="f4")

    def one(anchor):
        *query, source, usable = anchor
        similarity = reduce(jnp.minimum, map(dot, query, embeddings))
        eligible = row_usable & usable & (row_source != source)
        return _top_k(jnp.where(eligible, similarity, -jnp.inf), ranks)

    anchors = (*queries, anchor_source, anchor_usable)
    tile = max(1, _TILE_ELEMENTS // row_source.shape[0])
    if anchor_source.shape[0] <= tile:
        return jax.vmap(one)(anchors)
    return jax.lax.map(one, anchors, batch_size=tile)


def _gumbel(key: Array, anchor: Array, insertion: Array) -> Array:
    """Gumbel noise [anchors, rows] that depends on (key, anchor, insertion number) alone."""
    # One Threefry block per pair, counting (anchor, insertion). `jax.random` under vmap needs three
    # (two fold_in, one draw), and draws of an "rbg" key would depend on the batch's shape.
    counter = jnp.stack([jnp.broadcast_to(anchor[:, None], insertion.shape), insertion])
    words = jax.random.key_data(key).ravel()[:2]
    bits = jax.extend.random.threefry_2x32(words, counter.astype(jnp.uint32))[0]
    # 23 bits, centred: float32 holds every value exactly, and neither 0 nor 1 is among them.
    uniform = ((bits >> 9).astype(jnp.float32) + 0.5) * 2.0**-23
    return -jnp.log(-jnp.log(uniform))


def pick(
    scores: Array, row_numbers: Array, key: Array, anchor: Array, sampling: BankSampling
) -> tuple[Array, Array]:
    """Positions [anchors, samples] among the ranked rows, positives first, and their validity."""
    valid = scores > -jnp.inf
    insertion, source = row_numbers[..., 0], row_numbers[..., 1]
    noise = _gumbel(key, anchor, insertion)
    perturbed = noise if sampling.sampling == "uniform" else scores / sampling.temperature + noise
    perturbed = jnp.where(valid, perturbed, -jnp.inf)

    def split(values):
        return values[:, : sampling.positive_ranks], values[:, sampling.positive_ranks :]

    near, far = split(perturbed)
    near_source, _ = split(source)
    # One per source, sampled without replacement, is the best perturbed row of every source.
    earlier = jnp.arange(near.shape[1])
    better = (near[:, None, :] > near[:, :, None]) | (
        (near[:, None, :] == near[:, :, None]) & (earlier[None, None, :] < earlier[None, :, None])
    )
    beaten = (better & (near_source[:, None, :] == near_source[:, :, None])).any(-1)
    near = jnp.where(beaten, -jnp.inf, near)
    near_value, near_position = jax.lax.top_k(near, sampling.num_positives)
    far_value, far_position = jax.lax.top_k(far, sampling.num_negatives)
    position = jnp.concatenate([near_position, far_position + sampling.positive_ranks], axis=1)
    return position, jnp.concatenate([near_value, far_value], axis=1) > -jnp.inf
