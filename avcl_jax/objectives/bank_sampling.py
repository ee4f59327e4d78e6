"""Which rows of a feature bank an anchor gets, and how rows and anchors on many devices meet.

Per anchor the eligible rows are ranked by similarity; positives are drawn from the first ranks,
negatives from the next, by Gumbel top-k. With the bank sharded, either every shard ranks all
anchors and the candidates are merged, or the bank is gathered: whichever moves fewer bytes, counted
by `exchange_bytes` from the shapes alone. All here works on arrays; `feature_bank` owns them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

Modality = Literal["video", "audio"]
Term = tuple[Modality, Modality]  # of the anchor, of its positives and negatives

# Similarities of anchors × bank rows are computed in tiles of at most this many float32 values
# (256 MiB), so that a bank of a million rows fits beside the activations.
_TILE_ELEMENTS = 2**26
# Insertion number, source and label of a row, in one int32 array.
_ROW_NUMBERS = 3
_INT_BYTES = 4
_SAME_WIDTH = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


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

    space: Literal["same", "cross", "agreement"]
    num_positives: int
    num_negatives: int
    positive_ranks: int
    negative_ranks: int
    sampling: Literal["gumbel", "uniform"]
    temperature: float

    def __post_init__(self) -> None:
        if self.space not in ("same", "cross", "agreement"):
            raise ValueError(f"space is {self.space!r}; use 'same', 'cross' or 'agreement'.")
        if self.sampling not in ("gumbel", "uniform"):
            raise ValueError(f"sampling is {self.sampling!r}; use 'gumbel' or 'uniform'.")
        for name, count, ranks in (
            ("positive", self.num_positives, self.positive_ranks),
            ("negative", self.num_negatives, self.negative_ranks),
        ):
            if not 0 <= count <= ranks:
                raise ValueError(
                    f"num_{name}s = {count} cannot be drawn from {name}_ranks = {ranks} ranks; "
                    f"need 0 <= num_{name}s <= {name}_ranks."
                )
        if self.sampling == "gumbel" and not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}; Gumbel sampling needs > 0.")

    @property
    def ranks(self) -> int:
        """Rows that are ranked per anchor."""
        return self.positive_ranks + self.negative_ranks

    @property
    def samples(self) -> int:
        """Rows that are returned per anchor."""
        return self.num_positives + self.num_negatives


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


def _rank(
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
        return jax.lax.top_k(jnp.where(eligible, similarity, -jnp.inf), ranks)

    anchors = (*queries, anchor_source, anchor_usable)
    tile = max(1, _TILE_ELEMENTS // row_source.shape[0])
    if anchor_source.shape[0] <= tile:
        return jax.vmap(one)(anchors)
    return jax.lax.map(one, anchors, batch_size=tile)


def _gumbel(key: Array, anchor: Array, insertion: Array) -> Array:
    """Gumbel noise [anchors, rows] that depends on (key, anchor, insertion number) alone."""
    # Whatever the implementation of `key`: vmapped draws of "rbg" depend on the batch's shape.
    key = jax.random.wrap_key_data(jax.random.bits(key, (2,), jnp.uint32), impl="threefry2x32")

    def draw(anchor, insertion):
        anchor_key = jax.random.fold_in(key, anchor)
        return jax.vmap(lambda number: jax.random.gumbel(jax.random.fold_in(anchor_key, number)))(
            insertion
        )

    return jax.vmap(draw)(anchor, insertion)


def _pick(
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
    anchor, pick = jnp.indices(rows.shape)
    return answers[rows // size, anchor, pick]


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
    scores, ranked = _rank(
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
    view_id = 2 * anchors.anchor_id.astype(jnp.uint32)[:, None] + jnp.arange(2, dtype=jnp.uint32)
    position, picked = _pick(scores, numbers[ranked], key, view_id.reshape(-1), sampling)
    picks = jnp.take_along_axis(ranked, position, axis=1)
    target = embeddings[term[1]]
    drawn = _fetch(target, picks, data_axes) if merge else target[picks]

    def per_view(values):
        return values.reshape(videos, 2, *values.shape[1:])

    return per_view(drawn), per_view(numbers[picks]), per_view(picked)
