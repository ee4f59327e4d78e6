"""Feature bank: a sharded ring of past embeddings, sampled per anchor.

The bank is device state: rows (`bank_rows`), each the video and audio embedding of one view with
its presence and its numbers, sharded over all axes of the mesh. Every shard is a ring of the
embeddings that its own device computed, so inserting the views of a batch moves nothing between
devices. To sample it, anchors and rows are brought together (`bank_exchange`), ranked
(`bank_ranking`) and drawn (`bank_sampling`). Rows have a running insertion number, which identifies
a row wherever it is stored: noise is keyed by it, so the number of devices changes neither the
bank's contents nor the samples. Before they reach 2³¹ the numbers are reduced by a multiple of the
bank's size (`_period`), which keeps the places of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool

from avcl_jax.errors import UserError
from avcl_jax.objectives import bank_exchange, bank_ranking, bank_sampling
from avcl_jax.objectives.bank_rows import (
    FIXED_COLUMNS,
    BankRows,
    BankSample,
    DrawnRows,
    RowNumbers,
    has_all,
    presence_bits,
    rows_of,
)
from avcl_jax.objectives.bank_sampling import BankSampling
from avcl_jax.objectives.views import MODALITIES, Term, Views


@flax.struct.dataclass
class FeatureBank:
    """Rows of past embeddings; a pytree, saved and restored with the training state.

    The fields are arrays, or the shapes or shardings of arrays.

    Attributes:
        rows: `BankRows`, embeddings in the bank's dtype.
        inserted: int32 scalar, the next row's number: rows ever inserted until the bank is full,
            from then on in [size, size + `_period`).
    """

    rows: Any
    inserted: Any

    @property
    def size(self) -> int:
        """Number of rows."""
        return self.rows.presence.shape[0]


def check_size(size: int, *, global_batch_size: int, shards: int) -> None:
    """Checks that whole batches, of two rows per video, fill the bank's shards evenly.

    Raises:
        UserError: With the size that does not fit and sizes that do.
    """
    if size > jnp.iinfo(jnp.int32).max:
        raise UserError(f"bank of {size} rows is too large: they are numbered in 32 bits")
    rows = 2 * global_batch_size
    if global_batch_size % shards:
        raise UserError(
            f"global batch of {global_batch_size} videos does not divide over {shards} data "
            f"shards; use a multiple of {shards}."
        )
    if size < rows or size % rows:
        lower = size // rows * rows
        fitting = f"{lower} or {lower + rows}" if lower else f"{rows}"
        raise UserError(
            f"bank of {size} rows must be a multiple of the {rows} rows (2 views of "
            f"{global_batch_size} videos) that a step inserts; use {fitting}."
        )


def create(size: int, dim: int, dtype: Any, *, labels: int) -> FeatureBank:
    """An empty bank of `size` rows of `dim` numbers of `dtype` (bfloat16 halves the traffic)."""
    rows = BankRows(
        embeddings={name: jnp.zeros((size, dim), dtype) for name in MODALITIES},
        presence=jnp.zeros(size, jnp.uint8),
        numbers=RowNumbers(jnp.full((size, FIXED_COLUMNS + labels), -1, jnp.int32)),
    )
    return FeatureBank(rows, jnp.zeros((), jnp.int32))


def shardings(mesh: Mesh) -> FeatureBank:
    """Shardings of a bank, a prefix of its tree: rows over all axes, the counter replicated."""
    return FeatureBank(
        NamedSharding(mesh, PartitionSpec(mesh.axis_names)), NamedSharding(mesh, PartitionSpec())
    )


def _period(size: int) -> int:
    """Period of insertion numbers: the largest multiple of `size` below 2³⁰.

    As a multiple of the size it changes neither the place of the next row in the ring nor the
    places in `redistribute` when numbers start over.
    """
    return (2**30 - 1) // size * size


def is_full(bank: FeatureBank) -> Bool[Array, ""]:
    """Tests whether every row has been written."""
    return bank.inserted >= bank.size


def age(bank: FeatureBank, insertion: Array) -> Array:
    """Number of rows inserted since those of the given insertion numbers."""
    return (bank.inserted - insertion) % _period(bank.size)


def _shape(bank: FeatureBank) -> dict[str, Any]:
    """Arguments of `create`."""
    video = bank.rows.embeddings["video"]
    labels = bank.rows.numbers.columns.shape[1] - FIXED_COLUMNS
    return {"size": bank.size, "dim": video.shape[1], "dtype": video.dtype, "labels": labels}


def _axes(mesh: Mesh | None) -> tuple[tuple[str, ...], int]:
    """Axes over which rows are sharded, () for one device, and the number of shards."""
    if mesh is None or mesh.size == 1:
        return (), 1
    return mesh.axis_names, mesh.size


def insert(bank: FeatureBank, views: Views, *, mesh: Mesh | None = None) -> FeatureBank:
    """Writes a batch over the oldest rows, each device its own videos into its own shard.

    The insertion number of view v of video i of the global batch is inserted + 2 i + v, which
    starts over at the bank's size after `_period` rows more. A bank takes batches of one size
    throughout its life. New rows have no gradient.

    Args:
        bank: The bank, rows sharded over the axes of `mesh`.
        views: The global batch.
        mesh: Mesh of Auto axes; None for one device.
    """
    axes, shards = _axes(mesh)
    size, videos = bank.size, len(views.source_id)
    check_size(size, global_batch_size=videos, shards=shards)

    def write(bank: FeatureBank, views: Views) -> FeatureBank:
        start = (bank.inserted // shards) % bank.size
        rows = 2 * videos // shards
        first = bank.inserted + (jax.lax.axis_index(axes) * rows if axes else 0)
        insertion = first + jnp.arange(rows, dtype=jnp.int32)
        inserted = bank.inserted + 2 * videos
        restarted = inserted - _period(size)

        def put(ring: Array, values: Array) -> Array:
            values = values.astype(ring.dtype)
            return jax.lax.dynamic_update_slice_in_dim(ring, values, start, axis=0)

        return FeatureBank(
            rows=jax.tree.map(put, bank.rows, rows_of(views, insertion)),
            inserted=jnp.where(restarted >= size, restarted, inserted),
        )

    if axes:
        rows, whole = PartitionSpec(axes), PartitionSpec()
        specs = FeatureBank(rows, whole)
        write = jax.shard_map(write, mesh=mesh, in_specs=(specs, rows), out_specs=specs)
    return write(*jax.lax.stop_gradient((bank, views)))


def redistribute(bank: FeatureBank, *, global_batch_size: int, shards: int) -> FeatureBank:
    """Lays the rows out as if `shards` devices had inserted them: for a resume on other devices.

    Without this a bank stays valid, but for one turn of the ring the rows that are overwritten are
    not the oldest ones. A bank that lies right already is returned unchanged.

    The bank must have been filled in batches of one size, and pass `check_size`. If its rows lie on
    several processes, call this under `jax.jit` with `out_shardings`.
    """
    size, insertion = bank.size, bank.rows.numbers.insertion
    shard_size, local_rows = size // shards, 2 * global_batch_size // shards
    step, row = jnp.divmod(insertion, 2 * global_batch_size)
    shard, local_row = jnp.divmod(row, local_rows)
    place = shard * shard_size + (step * local_rows + local_row) % shard_size
    place = jnp.where(insertion >= 0, place, size)

    def put(empty: Array, rows: Array) -> Array:
        return empty.at[place].set(rows, mode="drop")

    empty = create(**_shape(bank)).rows
    return FeatureBank(jax.tree.map(put, empty, bank.rows), bank.inserted)


def relabel(bank: FeatureBank, *, before: Sequence[str], after: Sequence[str]) -> FeatureBank:
    """Replaces the labels named `before` of every row by those named `after`.

    Labels of both are kept, new ones are unknown in the rows that the bank has.
    """
    columns = bank.rows.numbers.columns
    fixed, label = jnp.split(columns, [FIXED_COLUMNS], axis=1)
    unknown = jnp.full_like(columns[:, 0], -1)
    labels = [label[:, before.index(name)] if name in before else unknown for name in after]
    columns = jnp.concatenate([fixed, jnp.stack(labels or [unknown], axis=1)], axis=1)
    rows = BankRows(bank.rows.embeddings, bank.rows.presence, RowNumbers(columns))
    return FeatureBank(rows, bank.inserted)


def sample(
    bank: FeatureBank,
    key: Array,
    views: Views,
    *,
    term: Term,
    terms: Sequence[Term],
    sampling: BankSampling,
    active: Bool[Array, ""] | bool,
    mesh: Mesh | None = None,
) -> BankSample:
    """Samples bank rows as positives and negatives of every anchor, by similarity.

    Never returned: empty rows, rows of the anchor's source, rows that lack the target modality or
    one that the similarity space reads. An anchor that lacks its own or such a modality gets none.

    Args:
        key: Key of this step, the same for all terms. Noise depends on it, the term, the record
            index, the view and the row's insertion number only.
        views: The global batch; every view of the anchor modality is an anchor.
        term: (anchor modality, target modality); rows of the target modality are returned.
        terms: All terms that the step samples: they share candidates, and choose merge or gather
            together.
        sampling: Settings, with at most as many ranks and candidates as the bank has rows.
        active: If False (warm-up, bank not yet full) every mask is False.

    Returns:
        The sampled rows and masks, sharded like the batch, without gradient.
    """
    axes, shards = _axes(mesh)
    moved = bank_exchange.exchange_bytes(
        **_shape(bank),
        global_batch_size=len(views.source_id),
        shards=shards,
        terms=terms,
        sampling=sampling,
    )
    local = partial(
        _draw,
        term=term,
        number=terms.index(term),
        sampling=sampling,
        axes=axes,
        merge=moved.merge < moved.gather,
    )
    if axes:
        rows, whole = PartitionSpec(axes), PartitionSpec()
        local = jax.shard_map(local, mesh=mesh, in_specs=(rows, whole, rows), out_specs=rows)
    drawn = local(jax.lax.stop_gradient(bank.rows), key, jax.lax.stop_gradient(views))
    return BankSample(*(kind.where(active) for kind in drawn))


def _draw(
    rows: BankRows,
    key: Array,
    views: Views,
    *,
    term: Term,
    number: int,
    sampling: BankSampling,
    axes: tuple[str, ...],
    merge: bool,
) -> BankSample:
    """Samples rows for the anchors of one device; with several, inside `jax.shard_map`.

    Args:
        rows: This device's shard of the bank, as `views` are its videos.
        number: Number of the term; noise differs between terms, candidates do not.
        merge: Merge nearest rows instead of gathering the bank.
    """
    pairs, modalities = sampling.pairs(term[0]), sampling.row_modalities(term)
    embeddings = {name: rows.embeddings[name] for name in modalities}
    rows = BankRows(embeddings, rows.presence, rows.numbers)
    if not merge:  # Every device searches the whole bank.
        rows, axes = bank_exchange.gather(rows, axes), ()
    all_numbers, all_presence = bank_exchange.gather((rows.numbers, rows.presence), axes)
    means = []
    if sampling.ranking == "content":
        means = [
            bank_ranking.playback_means(rows, row, sampling.playbacks, axes) for _, row in pairs
        ]
    queries = bank_ranking.queries_of(views, rows, pairs=pairs, means=means)
    # Two bits per view, so that one number per video is exchanged.
    first, second = presence_bits(views.present).astype(jnp.int32).T
    numbers = jnp.stack([views.source_id.astype(jnp.int32), first | (second << 2)], axis=1)

    def anchors(queries: list[Array], numbers: Array) -> bank_ranking.Anchors:
        both = numbers[:, 1]
        presence = jnp.stack([both & 3, both >> 2], axis=1).ravel()
        usable = has_all(presence, sampling.anchor_modalities(term[0]))
        return bank_ranking.Anchors(queries, jnp.repeat(numbers[:, 0], 2), usable)

    size = rows.presence.shape[0]
    ranks = min(sampling.positive_ranks, size)
    everyone = anchors(bank_exchange.gather(queries, axes), bank_exchange.gather(numbers, axes))
    scores, ranked = bank_ranking.rank(
        everyone, rows, rows.usable(*modalities), ranks, pairs=pairs, means=means
    )
    if axes:
        ranked = ranked + jax.lax.axis_index(axes) * size
        scores, ranked = bank_exchange.merge_nearest(scores, ranked, sampling.positive_ranks, axes)
    places = bank_sampling.choose_candidates(all_numbers.insertion, key, sampling)
    candidates = BankRows(
        {
            name: bank_exchange.broadcast(values, places, axes)
            for name, values in rows.embeddings.items()
        },
        all_presence[places],
        all_numbers[places],
    )
    usable = candidates.usable(*modalities)
    similarities = bank_ranking.compare(
        anchors(queries, numbers), candidates, usable, pairs=pairs, means=means
    )

    key = jax.random.fold_in(key, number)
    videos = len(views.record_index)
    view_id = jnp.repeat(2 * views.record_index.astype(jnp.uint32), 2)
    view_id = view_id + jnp.tile(jnp.arange(2, dtype=jnp.uint32), videos)
    enough = bank_sampling.enough_eligible(similarities, all_presence.shape[0], sampling)
    near = all_numbers[ranked]
    position, is_positive = bank_sampling.pick_positives(
        scores, near, enough, key, view_id, sampling
    )
    near_source = jnp.where(scores > -jnp.inf, near.source_id, -1)
    negatives, is_negative = bank_sampling.pick_negatives(
        similarities, candidates.numbers, near_source, key, view_id, sampling
    )
    positives = jnp.take_along_axis(ranked, position, axis=1)
    near_embeddings = bank_exchange.fetch(rows.embeddings[term[1]], positives, is_positive, axes)
    far_embeddings = candidates.embeddings[term[1]][negatives]
    sample = BankSample(
        DrawnRows(near_embeddings, is_positive, all_numbers[positives]),
        DrawnRows(far_embeddings, is_negative, candidates.numbers[negatives]),
    )
    return jax.tree.map(lambda values: values.reshape(videos, 2, *values.shape[1:]), sample)
