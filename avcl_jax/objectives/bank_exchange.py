"""Exchange of anchors and rows between the devices that share a feature bank.

Either every shard ranks all anchors and their nearest rows are merged, or the bank is gathered:
whichever moves fewer bytes. `axes` are the mesh axes over which the bank is sharded; if there are
none, one device has the whole bank, and nothing is exchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from avcl_jax.objectives.bank_rows import FIXED_COLUMNS
from avcl_jax.objectives.bank_sampling import BankSampling
from avcl_jax.objectives.views import Term

_INT_BYTES = 4
# In one round a device requests from a shard up to this many times the rows that it would request
# if its picks were spread evenly.
_SLACK = 2
_SAME_WIDTH = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


class ExchangeBytes(NamedTuple):
    """Bytes that a device receives in one step from the bank's exchange, its own part included."""

    merge: int
    gather: int


def exchange_bytes(
    *,
    size: int,
    dim: int,
    dtype: Any,
    labels: int,
    global_batch_size: int,
    shards: int,
    terms: Sequence[Term],
    sampling: BankSampling,
) -> ExchangeBytes:
    """Counts bytes per device and step, for both ways of exchange, from shapes alone.

    Merge: every shard ranks all anchors against its own rows; the nearest (similarity and row) are
    sent to the anchor's device, which picks positives and requests their embeddings from the
    shards. One round of requests counts, with room for twice the rows of an even spread. Every
    device also receives the candidates for negatives, in whole words. Gather: every device receives
    the modalities of the bank that are read. Both: every device receives the rows' numbers and
    presence.

    The size of every collective's result on one device counts; equal collectives of several terms
    count once, because XLA merges them.

    Args:
        size: Rows of the bank, each of `labels` labels and embeddings of `dim` numbers of `dtype`.
        global_batch_size: Videos per step.
        terms: All terms that a step samples.

    Returns:
        (merge, gather); both 0 for one shard. `sample` takes the smaller, gather when equal.
    """
    if shards == 1:
        return ExchangeBytes(0, 0)
    anchors = 2 * global_batch_size
    embedding = dim * jnp.dtype(dtype).itemsize
    words = -(-embedding // _INT_BYTES) * _INT_BYTES
    numbers = size * (FIXED_COLUMNS + labels) * _INT_BYTES
    pairs = {pair for anchor, _ in terms for pair in sampling.pairs(anchor)}
    queries, averaged = ({pair[side] for pair in pairs} for side in (0, 1))
    rankings = {
        (
            sampling.pairs(term[0]),
            frozenset(sampling.row_modalities(term)),
            frozenset(sampling.anchor_modalities(term[0])),
        )
        for term in terms
    }
    nearest = anchors * min(sampling.positive_ranks, size // shards) * 2 * _INT_BYTES
    picks = anchors // shards * sampling.num_positives
    answers = shards * _asked_at_once(picks, shards) * (_INT_BYTES + embedding) + _INT_BYTES
    means = len(averaged) * sampling.playbacks * (dim + 1) * _INT_BYTES
    modalities = {modality for term in terms for modality in sampling.row_modalities(term)}
    merge = (
        numbers
        + size
        + (means if sampling.ranking == "content" else 0)
        + global_batch_size * 2 * _INT_BYTES
        + len(queries) * anchors * embedding
        + len(rankings) * nearest
        + len(set(terms)) * answers
        + len(modalities) * sampling.negative_candidates * words
    )
    return ExchangeBytes(merge, numbers + size * (1 + len(modalities) * embedding))


def _exchangeable(values: Array) -> Array:
    # As integers: XLA on CPU (and for some collectives on GPU) widens 16-bit floats before it moves
    # them, and may hoist a conversion to float32 over a collective.
    return jax.lax.bitcast_convert_type(values, _SAME_WIDTH[values.dtype.itemsize])


def gather(tree: Any, axes: tuple[str, ...]) -> Any:
    """Concatenates the arrays [rows, ...] of all shards, bit for bit."""

    def whole(values: Array) -> Array:
        moved = jax.lax.all_gather(_exchangeable(values), axes, tiled=True)
        return jax.lax.bitcast_convert_type(moved, values.dtype)

    return jax.tree.map(whole, tree) if axes else tree


def _send(values: Array, axes: tuple[str, ...]) -> Array:
    """Sends [to shard, ...], receives [from shard, ...], bit for bit."""
    moved = jax.lax.all_to_all(_exchangeable(values), axes, split_axis=0, concat_axis=0)
    return jax.lax.bitcast_convert_type(moved, values.dtype)


def merge_nearest(
    scores: Array, rows: Array, ranks: int, axes: tuple[str, ...]
) -> tuple[Array, Array]:
    """Exchanges nearest rows, keeps the best of own anchors: [all anchors, k] → [own, ranks]."""
    shards = jax.lax.axis_size(axes)
    packed = jnp.stack([jax.lax.bitcast_convert_type(scores, jnp.int32), rows], axis=-1)
    anchors, nearest = scores.shape[0] // shards, scores.shape[1]  # `nearest` may be 0
    received = _send(packed.reshape(shards, anchors, nearest, 2), axes)
    received = received.swapaxes(0, 1).reshape(anchors, shards * nearest, 2)
    best, position = jax.lax.top_k(
        jax.lax.bitcast_convert_type(received[..., 0], jnp.float32), ranks
    )
    return best, jnp.take_along_axis(received[..., 1], position, axis=1)


def _asked_at_once(picks: int, shards: int) -> int:
    """Rows that a device requests from every shard in one round of `fetch`."""
    return min(picks, -(-_SLACK * picks // shards))


def fetch(embeddings: Array, rows: Array, wanted: Array, axes: tuple[str, ...]) -> Array:
    """Embeddings of `rows`, which may be on any shard; undefined where not `wanted`."""
    if not axes:
        return embeddings[rows]
    shards = jax.lax.axis_size(axes)
    size, dim = embeddings.shape
    shape, rows = rows.shape, rows.ravel()
    owner = jnp.where(wanted.ravel(), rows // size, shards)
    order = jnp.argsort(owner)
    start = jnp.searchsorted(owner[order], jnp.arange(shards + 1))
    # Index of each row among the rows of its owner.
    place = jnp.argsort(order) - start[owner]
    at_once = _asked_at_once(rows.size, shards)
    most = jax.lax.pmax(jnp.diff(start).max(), axes)

    def ask(number, found):
        column = place - number * at_once
        now = (column >= 0) & (column < at_once)
        asked = jnp.zeros((shards, at_once), rows.dtype)
        asked = asked.at[jnp.where(now, owner, shards), column].set(rows % size, mode="drop")
        answers = _send(embeddings[_send(asked, axes)], axes)
        answers = answers.at[owner, column].get(mode="clip")
        return jnp.where(now[:, None], answers, found)

    # Shapes are static, so the tables have room for twice the rows of an even spread. Rows are on
    # random shards: more than one round is hardly ever needed, and none if nothing is wanted.
    found = jax.lax.pcast(jnp.zeros((rows.size, dim), embeddings.dtype), axes, to="varying")
    found = jax.lax.fori_loop(0, -(-most // at_once), ask, found)
    return found.reshape(*shape, dim)


def broadcast(embeddings: Array, rows: Array, axes: tuple[str, ...]) -> Array:
    """Embeddings [rows, dim] of rows on any shard, equal on every device, bit for bit."""
    if not axes:
        return embeddings[rows]
    size, dim = embeddings.shape
    own = rows // size == jax.lax.axis_index(axes)
    mine = jnp.where(own[:, None], embeddings[rows % size], jnp.zeros((), embeddings.dtype))
    # Whole words: a TPU widens each 16-bit integer of a sum to 32 bits.
    per_word = _INT_BYTES // embeddings.dtype.itemsize
    mine = jnp.pad(mine, ((0, 0), (0, -dim % per_word)))
    words = mine if per_word == 1 else mine.reshape(len(rows), -1, per_word)
    total = jax.lax.psum(jax.lax.bitcast_convert_type(words, jnp.uint32), axes)
    return jax.lax.bitcast_convert_type(total, embeddings.dtype).reshape(mine.shape)[:, :dim]
