"""Exchange of anchors and rows between the devices that share a feature bank.

Either every shard ranks all anchors and their nearest rows are merged, or the bank is gathered:
whichever moves fewer bytes, as `exchange_bytes` counts them from the shapes alone. Functions work
on arrays; `feature_bank` owns them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from avcl_jax.objectives.bank_sampling import (
    BankSampling,
    Comparison,
    Modality,
    Term,
    anchor_modalities,
    bank_modalities,
    choose_candidates,
    compare,
    enough_eligible,
    pick_negatives,
    pick_positives,
    playback_means,
    playback_sums,
    rank,
    ranking_pairs,
)

# Columns of `BankRows.numbers` before the labels, and those of the playback.
ROW_NUMBERS = 4
PLAYBACK_COLUMN: Mapping[Modality, int] = {"video": 2, "audio": 3}
_INT_BYTES = 4
# In one round a device requests from a shard up to this many times the rows that it would request
# if its picks were spread evenly.
_SLACK = 2
_SAME_WIDTH = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


class BankRows(NamedTuple):
    """The rows of a bank, or of one shard of it.

    Attributes:
        embeddings: Modality → [rows, dim].
        present: Modality → bool [rows].
        numbers: int32 [rows, 4 + labels] insertion number (−1 empty), source, playback of the
            video and of the audio, labels.
    """

    embeddings: Mapping[Modality, Array]
    present: Mapping[Modality, Array]
    numbers: Array


class Anchors(NamedTuple):
    """The videos of a global batch, or of one device, two views each.

    Attributes:
        embeddings: Modality → [videos, 2, dim].
        present: Modality → bool [videos, 2].
        playback: Modality → int [videos, 2].
        source_id: int [videos].
        anchor_id: int [videos] number of the video, independent of the number of devices.
    """

    embeddings: Mapping[Modality, Array]
    present: Mapping[Modality, Array]
    playback: Mapping[Modality, Array]
    source_id: Array
    anchor_id: Array


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
    """Counts bytes per device and step, for both ways of exchange.

    Merge: every shard ranks all anchors against its own rows; the nearest (similarity and row) are
    sent to the anchor's device, which picks positives and requests their embeddings from the
    shards. One round of requests counts, with room for twice the rows of an even spread. Every
    device also receives the candidates for negatives, in whole words. Gather: every device receives
    the modalities of the bank that are read. Both: every device receives the rows' numbers and
    presence.

    The size of every collective's result on one device counts; equal collectives of several terms
    count once, because XLA merges them.

    Args:
        size: Rows of the bank.
        dim: Size of an embedding.
        dtype: Dtype of the bank.
        labels: Labels per row.
        global_batch_size: Videos per step.
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
    words = -(-embedding // _INT_BYTES) * _INT_BYTES
    numbers = size * (ROW_NUMBERS + labels) * _INT_BYTES
    queries = {own for anchor, _ in terms for own, _ in ranking_pairs(sampling, anchor)}
    rankings = {
        (
            ranking_pairs(sampling, term[0]),
            frozenset(bank_modalities(sampling, term)),
            frozenset(anchor_modalities(sampling, term[0])),
        )
        for term in terms
    }
    nearest = anchors * min(sampling.positive_ranks, size // shards) * 2 * _INT_BYTES
    picks = anchors // shards * sampling.num_positives
    answers = shards * _asked_at_once(picks, shards) * (_INT_BYTES + embedding) + _INT_BYTES
    averaged = {row for anchor, _ in terms for _, row in ranking_pairs(sampling, anchor)}
    means = len(averaged) * sampling.playbacks * (dim + 1) * _INT_BYTES
    modalities = {modality for term in terms for modality in bank_modalities(sampling, term)}
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


def _presence(present: Mapping[Modality, Array]) -> Array:
    """One bit per modality, so that all terms exchange the same array."""
    return present["video"].astype(jnp.uint8) | (present["audio"].astype(jnp.uint8) << 1)


def _has_all(presence: Array, modalities: tuple[Modality, ...]) -> Array:
    wanted = sum({"video": 1, "audio": 2}[modality] for modality in modalities)
    return (presence & wanted) == wanted


def _exchangeable(values: Array) -> Array:
    # As integers: XLA on CPU (and for some collectives on GPU) widens 16-bit floats before it moves
    # them, and may hoist a conversion to float32 over a collective.
    return jax.lax.bitcast_convert_type(values, _SAME_WIDTH[values.dtype.itemsize])


def _gather(values: Array, data_axes: tuple[str, ...]) -> Array:
    """Concatenates [rows, ...] of all shards, bit for bit."""
    moved = jax.lax.all_gather(_exchangeable(values), data_axes, tiled=True)
    return jax.lax.bitcast_convert_type(moved, values.dtype)


def _send(values: Array, data_axes: tuple[str, ...]) -> Array:
    """Sends [to shard, ...], receives [from shard, ...], bit for bit."""
    moved = jax.lax.all_to_all(_exchangeable(values), data_axes, split_axis=0, concat_axis=0)
    return jax.lax.bitcast_convert_type(moved, values.dtype)


def _merge_nearest(
    scores: Array, rows: Array, ranks: int, data_axes: tuple[str, ...], shards: int
) -> tuple[Array, Array]:
    """Exchanges nearest rows, keeps the best of own anchors: [all anchors, k] → [own, ranks]."""
    packed = jnp.stack([jax.lax.bitcast_convert_type(scores, jnp.int32), rows], axis=-1)
    anchors, nearest = scores.shape[0] // shards, scores.shape[1]  # `nearest` may be 0
    received = _send(packed.reshape(shards, anchors, nearest, 2), data_axes)
    received = received.swapaxes(0, 1).reshape(anchors, shards * nearest, 2)
    best, position = jax.lax.top_k(
        jax.lax.bitcast_convert_type(received[..., 0], jnp.float32), ranks
    )
    return best, jnp.take_along_axis(received[..., 1], position, axis=1)


def _asked_at_once(picks: int, shards: int) -> int:
    """Rows that a device requests from every shard in one round of `_fetch`."""
    return min(picks, -(-_SLACK * picks // shards))


def _fetch(
    embeddings: Array, rows: Array, wanted: Array, data_axes: tuple[str, ...], shards: int
) -> Array:
    """Embeddings of `rows`, which may be on any shard; undefined where not `wanted`."""
    size, dim = embeddings.shape
    shape, rows = rows.shape, rows.ravel()
    owner = jnp.where(wanted.ravel(), rows // size, shards)
    order = jnp.argsort(owner)
    start = jnp.searchsorted(owner[order], jnp.arange(shards + 1))
    # Index of each row among the rows of its owner.
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

    # Shapes are static, so the tables have room for twice the rows of an even spread. Rows are on
    # random shards: more than one round is hardly ever needed, and none if nothing is wanted.
    found = jax.lax.pcast(jnp.zeros((rows.size, dim), embeddings.dtype), data_axes, to="varying")
    found = jax.lax.fori_loop(0, -(-most // at_once), ask, found)
    return found.reshape(*shape, dim)


def _broadcast(embeddings: Array, rows: Array, data_axes: tuple[str, ...]) -> Array:
    """Embeddings [rows, dim] of rows on any shard, equal on every device, bit for bit."""
    size, dim = embeddings.shape
    own = rows // size == jax.lax.axis_index(data_axes)
    mine = jnp.where(own[:, None], embeddings[rows % size], jnp.zeros((), embeddings.dtype))
    # Whole words: a TPU widens each 16-bit integer of a sum to 32 bits.
    per_word = _INT_BYTES // embeddings.dtype.itemsize
    mine = jnp.pad(mine, ((0, 0), (0, -dim % per_word)))
    words = mine if per_word == 1 else mine.reshape(len(rows), -1, per_word)
    total = jax.lax.psum(jax.lax.bitcast_convert_type(words, jnp.uint32), data_axes)
    return jax.lax.bitcast_convert_type(total, embeddings.dtype).reshape(mine.shape)[:, :dim]


def _query(anchors: Anchors, own: Modality, means: Array | None) -> Array:
    """Embeddings of anchors [views, dim], minus the mean of their playback unless None."""
    embeddings = anchors.embeddings[own]
    query = embeddings.reshape(-1, embeddings.shape[-1])
    return query if means is None else query - means[anchors.playback[own].ravel()]


def draw(
    rows: BankRows,
    key: Array,
    anchors: Anchors,
    *,
    term: Term,
    number: int,
    sampling: BankSampling,
    data_axes: tuple[str, ...],
    shards: int,
    merge: bool,
) -> tuple[tuple[Array, ...], ...]:
    """Samples rows for the anchors of one device; with several shards, inside `jax.shard_map`.

    Args:
        rows: This device's shard of the bank.
        key: Key of this step, the same on every device and for every term.
        anchors: This device's videos.
        term: Modality of the anchors, and of the rows to return.
        number: Number of the term; noise differs between terms, candidates do not.
        sampling: Space, ranks, counts and distribution.
        data_axes: Mesh axes that batch and bank are sharded over.
        shards: Devices along these axes.
        merge: Merge nearest rows instead of gathering the bank; ignored for one shard.

    Returns:
        For positives and for negatives: embeddings [videos, 2, samples, dim], numbers
        [videos, 2, samples, :] as in `BankRows`, and validity [videos, 2, samples].
    """
    size = rows.numbers.shape[0]
    videos = anchors.source_id.shape[0]
    pairs = ranking_pairs(sampling, term[0])
    modalities = bank_modalities(sampling, term)
    merge = merge and shards > 1
    embeddings = {modality: rows.embeddings[modality] for modality in modalities}
    numbers, presence = rows.numbers, _presence(rows.present)
    all_numbers, all_presence = numbers, presence
    if shards > 1:
        all_numbers, all_presence = _gather(numbers, data_axes), _gather(presence, data_axes)
    if shards > 1 and not merge:
        embeddings = {name: _gather(values, data_axes) for name, values in embeddings.items()}
        numbers, presence = all_numbers, all_presence

    def usable(numbers: Array, presence: Array, modalities: tuple[Modality, ...]) -> Array:
        return (numbers[:, 0] >= 0) & _has_all(presence, modalities)

    def playbacks(numbers: Array) -> list[Array]:
        return [numbers[:, PLAYBACK_COLUMN[row]] for _, row in pairs]

    means: list[Array] = []
    if sampling.ranking == "content":
        sums = [
            playback_sums(embeddings[row], playback, usable(numbers, presence, (row,)), sampling)
            for (_, row), playback in zip(pairs, playbacks(numbers), strict=True)
        ]
        means = [playback_means(jax.lax.psum(s, data_axes) if merge else s) for s in sums]
    # In the bank's dtype, so that both sides of a similarity are rounded alike.
    queries = [
        _query(anchors, own, means[pair] if means and own == row else None).astype(
            embeddings[row].dtype
        )
        for pair, (own, row) in enumerate(pairs)
    ]
    # Two bits per view, so that one number per video is exchanged.
    first, second = _presence(anchors.present).astype(jnp.int32).T
    anchor_numbers = jnp.stack([anchors.source_id.astype(jnp.int32), first | (second << 2)], axis=1)

    def comparison(
        queries: list[Array],
        anchor_numbers: Array,
        embeddings: Mapping[Modality, Array],
        numbers: Array,
        presence: Array,
    ) -> Comparison:
        both = anchor_numbers[:, 1]
        anchor_presence = jnp.stack([both & 3, both >> 2], axis=1).ravel()
        return Comparison(
            queries=queries,
            embeddings=[embeddings[row] for _, row in pairs],
            means=means,
            playbacks=playbacks(numbers),
            anchor_source=jnp.repeat(anchor_numbers[:, 0], 2),
            anchor_usable=_has_all(anchor_presence, anchor_modalities(sampling, term[0])),
            row_source=numbers[:, 1],
            row_usable=usable(numbers, presence, modalities),
        )

    ranks = min(sampling.positive_ranks, numbers.shape[0])
    if merge:
        everyone = [_gather(query, data_axes) for query in queries]
        all_anchors = _gather(anchor_numbers, data_axes)
        own_rows = comparison(everyone, all_anchors, embeddings, numbers, presence)
        scores, ranked = rank(own_rows, ranks)
        ranked = ranked + jax.lax.axis_index(data_axes) * size
        scores, ranked = _merge_nearest(scores, ranked, sampling.positive_ranks, data_axes, shards)
    else:
        all_rows = comparison(queries, anchor_numbers, embeddings, numbers, presence)
        scores, ranked = rank(all_rows, ranks)
    chosen = choose_candidates(all_numbers[:, 0], key, sampling)
    chosen_numbers = all_numbers[chosen]
    candidates = {
        name: _broadcast(values, chosen, data_axes) if merge else values[chosen]
        for name, values in embeddings.items()
    }
    similarities = compare(
        comparison(queries, anchor_numbers, candidates, chosen_numbers, all_presence[chosen])
    )

    key = jax.random.fold_in(key, number)
    view_id = jnp.repeat(2 * anchors.anchor_id.astype(jnp.uint32), 2)
    view_id = view_id + jnp.tile(jnp.arange(2, dtype=jnp.uint32), videos)
    enough = enough_eligible(similarities, all_numbers.shape[0], sampling)
    near_numbers = all_numbers[ranked]
    position, is_positive = pick_positives(scores, near_numbers, enough, key, view_id, sampling)
    near_source = jnp.where(scores > -jnp.inf, near_numbers[..., 1], -1)
    negatives, is_negative = pick_negatives(
        similarities, chosen_numbers, near_source, key, view_id, sampling
    )
    positives = jnp.take_along_axis(ranked, position, axis=1)
    target = embeddings[term[1]]
    drawn = (
        _fetch(target, positives, is_positive, data_axes, shards) if merge else target[positives]
    )

    def per_view(values: Array) -> Array:
        return values.reshape(videos, 2, *values.shape[1:])

    rows_drawn = (drawn, candidates[term[1]][negatives])
    numbers_drawn = (all_numbers[positives], chosen_numbers[negatives])
    return tuple(
        tuple(map(per_view, kind))
        for kind in zip(rows_drawn, numbers_drawn, (is_positive, is_negative), strict=True)
    )
