"""How the anchors of many devices meet the rows of a sharded feature bank (design §4).

Either every shard ranks all anchors and the candidates are merged, or the bank is gathered:
whichever moves fewer bytes, counted by `exchange_bytes` from the shapes alone. All here works on
arrays; `feature_bank` owns them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from avcl_jax.objectives.bank_sampling import (
    BankSampling,
    Modality,
    Term,
    anchor_modalities,
    bank_modalities,
    pick,
    rank,
    ranking_pairs,
)

# Insertion number, source and label of a row, in one int32 array.
_ROW_NUMBERS = 3
_INT_BYTES = 4
_SAME_WIDTH = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


class BankRows(NamedTuple):
    """The rows of a bank, or of one shard of it.

    Attributes:
        embeddings: Modality → [rows, dim].
        present: Modality → bool [rows].
        numbers: int32 [rows, 3] insertion number (−1 empty), source, label.
    """

    embeddings: Mapping[Modality, Array]
    present: Mapping[Modality, Array]
    numbers: Array


class Anchors(NamedTuple):
    """The videos of a global batch, or of one device, two views each.

    Attributes:
        embeddings: Modality → [videos, 2, dim].
        present: Modality → bool [videos].
        source_id: int [videos].
        anchor_id: int [videos], a number of the video that does not depend on the device count.
    """

    embeddings: Mapping[Modality, Array]
    present: Mapping[Modality, Array]
    source_id: Array
    anchor_id: Array


class ExchangeBytes(NamedTuple):
    """Bytes that the bank's exchange makes a device receive in one step, its own share counted."""

    merge: int
    gather: int


def exchange_bytes(
    *,
    size: int,
    dim: int,
    dtype: Any,
    global_batch_size: int,
    shards: int,
    terms: Sequence[Term],
    sampling: BankSampling,
) -> ExchangeBytes:
    """Bytes per device and step, for either way to bring anchors and rows together.

    Merge: every shard ranks all anchors against its own rows, the candidates (similarity and row)
    travel to the anchor's device, which picks and asks for the embeddings; every shard answers
    for every pick. Gather: every device receives the modalities of the bank that are read. Both
    receive the rows' numbers. Counted is the size of every collective's result on one device; what
    several terms exchange alike is counted once, because XLA makes equal collectives one.

    Args:
        size: Rows of the bank.
        dim: Numbers in an embedding.
        dtype: Of the bank.
        global_batch_size: Videos of a step.
        shards: Devices along the data axes.
        terms: (anchor modality, target modality) of every term that a step samples.
        sampling: Ranks and samples per anchor.

    Returns:
        (merge, gather); both 0 for one shard. `sample` takes the smaller, gather when equal.
    """
    if shards == 1:
        return ExchangeBytes(0, 0)
    anchors = 2 * global_batch_size
    embedding = dim * jnp.dtype(dtype).itemsize
    numbers = size * _ROW_NUMBERS * _INT_BYTES
    queries = {own for anchor, _ in terms for own, _ in ranking_pairs(sampling, anchor)}
    rankings = {
        (
            ranking_pairs(sampling, term[0]),
            frozenset(bank_modalities(sampling, term)),
            frozenset(anchor_modalities(sampling, term[0])),
        )
        for term in terms
    }
    candidates = anchors * min(sampling.ranks, size // shards) * 2 * _INT_BYTES
    answers = anchors * sampling.samples * (_INT_BYTES + embedding)
    merge = (
        numbers
        + global_batch_size * 2 * _INT_BYTES
        + len(queries) * anchors * embedding
        + len(rankings) * candidates
        + len(set(terms)) * answers
    )
    modalities = {modality for term in terms for modality in bank_modalities(sampling, term)}
    return ExchangeBytes(merge, numbers + size * (1 + len(modalities) * embedding))


def _presence(present: Mapping[Modality, Array]) -> Array:
    """One bit per modality: the same array for every term, whatever modalities the term needs."""
    return present["video"].astype(jnp.uint8) | (present["audio"].astype(jnp.uint8) << 1)


def _has_all(presence: Array, modalities: tuple[Modality, ...]) -> Array:
    wanted = sum({"video": 1, "audio": 2}[modality] for modality in modalities)
    return (presence & wanted) == wanted


def _exchangeable(values: Array) -> Array:
    # As integers: XLA on CPU (and for some collectives on GPU) widens 16-bit floats before it moves
    # them, and may hoist a conversion to float32 over a collective.
    return jax.lax.bitcast_convert_type(values, _SAME_WIDTH[values.dtype.itemsize])


def _gather(values: Array, data_axes: tuple[str, ...]) -> Array:
    """[rows, ...] of every shard, one after another; bit for bit."""
    moved = jax.lax.all_gather(_exchangeable(values), data_axes, tiled=True)
    return jax.lax.bitcast_convert_type(moved, values.dtype)


def _send(values: Array, data_axes: tuple[str, ...]) -> Array:
    """[to shard, ...] → [from shard, ...]; bit for bit."""
    moved = jax.lax.all_to_all(_exchangeable(values), data_axes, split_axis=0, concat_axis=0)
    return jax.lax.bitcast_convert_type(moved, values.dtype)


def _merge_candidates(
    scores: Array, rows: Array, ranks: int, data_axes: tuple[str, ...], shards: int
) -> tuple[Array, Array]:
    """Sends every anchor's candidates home and keeps the best: [all anchors, k] → [own, ranks]."""
    packed = jnp.stack([jax.lax.bitcast_convert_type(scores, jnp.int32), rows], axis=-1)
    received = _send(packed.reshape(shards, -1, *packed.shape[1:]), data_axes)
    received = received.swapaxes(0, 1).reshape(received.shape[1], -1, 2)
    best, position = jax.lax.top_k(
        jax.lax.bitcast_convert_type(received[..., 0], jnp.float32), ranks
    )
    return best, jnp.take_along_axis(received[..., 1], position, axis=1)


def _fetch(embeddings: Array, rows: Array, data_axes: tuple[str, ...]) -> Array:
    """Embeddings of rows of any shard: everyone asks everyone, and keeps the owner's answer."""
    size = embeddings.shape[0]
    asked = jax.lax.all_gather(rows, data_axes)
    local = asked - jax.lax.axis_index(data_axes) * size
    # Shapes are static, so a shard answers for every row, with any row of its own where the asked
    # one is not its own.
    answers = _send(embeddings[jnp.clip(local, 0, size - 1)], data_axes)
    anchor, column = jnp.indices(rows.shape)
    return answers[rows // size, anchor, column]


def draw(
    rows: BankRows,
    key: Array,
    anchors: Anchors,
    *,
    term: Term,
    sampling: BankSampling,
    data_axes: tuple[str, ...],
    shards: int,
    merge: bool,
) -> tuple[Array, Array, Array]:
    """Samples rows for the anchors of one device; with several shards, inside `jax.shard_map`.

    Args:
        rows: This device's shard of the bank.
        key: Key of this step and term, the same on every device.
        anchors: This device's videos.
        term: Modality of the anchors, and of the rows to return.
        sampling: Space, ranks, counts and distribution.
        data_axes: Mesh axes that batch and bank are sharded over.
        shards: Devices along these axes.
        merge: Whether candidates are merged; else the bank is gathered. Irrelevant for one shard.

    Returns:
        Embeddings [videos, 2, samples, dim], numbers [videos, 2, samples, 3] as in `BankRows`, and
        validity [videos, 2, samples]; positives first, then negatives.
    """
    size = rows.numbers.shape[0]
    videos = anchors.source_id.shape[0]
    pairs = ranking_pairs(sampling, term[0])
    modalities = bank_modalities(sampling, term)
    embeddings = {modality: rows.embeddings[modality] for modality in modalities}
    numbers = rows.numbers
    presence = _presence(rows.present)
    # In the bank's dtype, so that both sides of a similarity are rounded alike.
    queries = tuple(
        anchors.embeddings[modality].reshape(2 * videos, -1).astype(embeddings[row].dtype)
        for modality, row in pairs
    )
    anchor_numbers = jnp.stack(
        [anchors.source_id.astype(jnp.int32), _presence(anchors.present).astype(jnp.int32)], axis=1
    )

    merge = merge and shards > 1
    if shards > 1 and not merge:
        embeddings = {name: _gather(values, data_axes) for name, values in embeddings.items()}
        numbers, presence = _gather(numbers, data_axes), _gather(presence, data_axes)
    if merge:
        queries = tuple(_gather(query, data_axes) for query in queries)
        anchor_numbers = _gather(anchor_numbers, data_axes)
    anchor_usable = _has_all(anchor_numbers[:, 1], anchor_modalities(sampling, term[0]))
    scores, ranked = rank(
        queries,
        tuple(embeddings[row] for _, row in pairs),
        jnp.repeat(anchor_numbers[:, 0], 2),
        jnp.repeat(anchor_usable, 2),
        numbers[:, 1],
        (numbers[:, 0] >= 0) & _has_all(presence, modalities),
        min(sampling.ranks, numbers.shape[0]),
    )
    if merge:
        ranked = ranked + jax.lax.axis_index(data_axes) * size
        scores, ranked = _merge_candidates(scores, ranked, sampling.ranks, data_axes, shards)
        numbers = _gather(numbers, data_axes)
    view_id = jnp.repeat(2 * anchors.anchor_id.astype(jnp.uint32), 2)
    view_id = view_id + jnp.tile(jnp.arange(2, dtype=jnp.uint32), videos)
    position, picked = pick(scores, numbers[ranked], key, view_id, sampling)
    picks = jnp.take_along_axis(ranked, position, axis=1)
    target = embeddings[term[1]]
    drawn = _fetch(target, picks, data_axes) if merge else target[picks]

    def per_view(values):
        return values.reshape(videos, 2, *values.shape[1:])

    return per_view(drawn), per_view(numbers[picks]), per_view(picked)
