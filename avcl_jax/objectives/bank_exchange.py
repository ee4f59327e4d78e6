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
# A device asks a shard at once for up to this many times the share of its picks that would be the
# shard's if picks were spread evenly.
_SLACK = 2
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
        present: Modality → bool [videos, 2].
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
    travel to the anchor's device, which picks and asks the shards for the embeddings; counted is
    one round of asking, with room for twice an even share of every shard. Gather: every device
    receives the modalities of the bank that are read. Both receive the rows' numbers. Counted is
    the size of every collective's result on one device; what several terms exchange alike is
    counted once, because XLA makes equal collectives one.

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
    picks = anchors // shards * sampling.samples
    answers = shards * _asked_at_once(picks, shards) * (_INT_BYTES + embedding) + _INT_BYTES
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


def _asked_at_once(picks: int, shards: int) -> int:
    """Rows that a device asks of every shard in one round of `_fetch`."""
    return min(picks, -(-_SLACK * picks // shards))


def _fetch(
    embeddings: Array, rows: Array, wanted: Array, data_axes: tuple[str, ...], shards: int
) -> Array:
    """Embeddings of the wanted ones of rows of any shard; anything where not wanted."""
    size, dim = embeddings.shape
    shape, rows = rows.shape, rows.ravel()
    owner = jnp.where(wanted.ravel(), rows // size, shards)
    order = jnp.argsort(owner)
    start = jnp.searchsorted(owner[order], jnp.arange(shards + 1))
    # The how manieth of its owner's rows each one is.
    place = jnp.argsort(order) - start[owner]
    at_once = _asked_at_once(rows.size, shards)
    most = jax.lax.pmax(jnp.diff(start).max(), data_axes)

    def ask(number, found):
        column = place - number * at_once
        now = (owner < shards) & (column >= 0) & (column < at_once)
        asked = jnp.zeros((shards, at_once), rows.dtype)
        asked = asked.at[jnp.where(now, owner, shards), column].set(rows % size, mode="drop")
        answers = _send(embeddings[_send(asked, data_axes)], data_axes)
        answers = answers.at[owner, column].get(mode="clip")
        return jnp.where(now[:, None], answers, found)

    # Shapes are static, so the tables have room for twice an even share. Rows lie on shards at
    # random: more than one round is next to never needed, and none is when nothing is wanted.
    found = jax.lax.pcast(jnp.zeros((rows.size, dim), embeddings.dtype), data_axes, to="varying")
    found = jax.lax.fori_loop(0, -(-most // at_once), ask, found)
    return found.reshape(*shape, dim)


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
    # Two bits per view, so that one number per video is exchanged instead of two.
    first, second = _presence(anchors.present).astype(jnp.int32).T
    anchor_numbers = jnp.stack([anchors.source_id.astype(jnp.int32), first | (second << 2)], axis=1)

    merge = merge and shards > 1
    if shards > 1 and not merge:
        embeddings = {name: _gather(values, data_axes) for name, values in embeddings.items()}
        numbers, presence = _gather(numbers, data_axes), _gather(presence, data_axes)
    if merge:
        queries = tuple(_gather(query, data_axes) for query in queries)
        anchor_numbers = _gather(anchor_numbers, data_axes)
    both = anchor_numbers[:, 1]
    anchor_presence = jnp.stack([both & 3, both >> 2], axis=1).ravel()
    anchor_usable = _has_all(anchor_presence, anchor_modalities(sampling, term[0]))
    scores, ranked = rank(
        queries,
        tuple(embeddings[row] for _, row in pairs),
        jnp.repeat(anchor_numbers[:, 0], 2),
        anchor_usable,
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
    drawn = _fetch(target, picks, picked, data_axes, shards) if merge else target[picks]

    def per_view(values):
        return values.reshape(videos, 2, *values.shape[1:])

    return per_view(drawn), per_view(numbers[picks]), per_view(picked)
