"""Feature bank: a sharded ring of past embeddings, sampled per anchor.

The bank is device state: `size` rows, each the video and audio embedding of one view with its
source and presence, sharded over the mesh's data axes. Every shard is a ring of the embeddings that
its own device computed, so inserting moves nothing between devices. Rows have a running insertion
number, which identifies a row wherever it is stored: noise is keyed by it, so the number of devices
changes neither the bank's contents nor the samples. Before they reach 2³¹ the numbers are reduced
by a multiple of the bank's size (`_period`), which keeps the places of rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from avcl_jax.errors import UserError
from avcl_jax.objectives.bank_exchange import Anchors, BankRows, draw, exchange_bytes
from avcl_jax.objectives.bank_sampling import BankSampling, Modality, Term
from avcl_jax.objectives.masks import per_view

__all__ = [
    "BankSample",
    "BankSampling",
    "FeatureBank",
    "age",
    "check_size",
    "create",
    "exchange_bytes",
    "insert",
    "is_full",
    "num_shards",
    "partition_specs",
    "redistribute",
    "sample",
    "shardings",
]


@flax.struct.dataclass
class FeatureBank:
    """Rows of past embeddings; a pytree, saved and restored with the training state.

    The fields are arrays, or the shapes or shardings of arrays.

    Attributes:
        video: [size, dim] video embedding of a view, in the bank's dtype; 0 where there is none.
        audio: [size, dim] audio embedding of the same view.
        source_id: int32 [size] source of the view.
        label: int32 [size, labels] labels, for health metrics only; −1 unknown.
        video_playback: int32 [size] number of the video's speed and direction.
        audio_playback: int32 [size] number of the audio's speed and direction.
        has_video: bool [size].
        has_audio: bool [size].
        insertion: int32 [size] insertion number, −1 while the row is empty.
        inserted: int32 scalar, the next row's number: rows ever inserted until the bank is full,
            from then on in [size, size + `_period`).
    """

    video: Any
    audio: Any
    source_id: Any
    label: Any
    video_playback: Any
    audio_playback: Any
    has_video: Any
    has_audio: Any
    insertion: Any
    inserted: Any


class BankSample(NamedTuple):
    """Rows sampled for each anchor; where a mask is not set, the row is 0 and its numbers are −1.

    Attributes:
        positives: [videos, 2, num_positives, dim] embeddings of the target modality.
        positive_mask: bool [videos, 2, num_positives].
        positive_numbers: int32 [videos, 2, num_positives, 4 + labels], as in `BankRows`.
        negatives: [videos, 2, num_negatives, dim] embeddings of the target modality.
        negative_mask: bool [videos, 2, num_negatives].
        negative_numbers: int32 [videos, 2, num_negatives, 4 + labels].
    """

    positives: Float[Array, "videos 2 positives dim"]
    positive_mask: Bool[Array, "videos 2 positives"]
    positive_numbers: Int[Array, "videos 2 positives numbers"]
    negatives: Float[Array, "videos 2 negatives dim"]
    negative_mask: Bool[Array, "videos 2 negatives"]
    negative_numbers: Int[Array, "videos 2 negatives numbers"]


def check_size(size: int, *, global_batch_size: int, shards: int) -> None:
    """Checks that whole batches fill the bank's shards evenly.

    Args:
        size: Rows of the bank.
        global_batch_size: Videos of a step; each inserts two rows.
        shards: Devices that the batch and the bank are sharded over.

    Raises:
        UserError: With what does not fit and sizes that do.
    """
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
    """An empty bank of `size` rows of `dim` numbers of `dtype` (bfloat16 halves what is moved)."""
    return FeatureBank(
        video=jnp.zeros((size, dim), dtype),
        audio=jnp.zeros((size, dim), dtype),
        source_id=jnp.full(size, -1, jnp.int32),
        label=jnp.full((size, labels), -1, jnp.int32),
        video_playback=jnp.zeros(size, jnp.int32),
        audio_playback=jnp.zeros(size, jnp.int32),
        has_video=jnp.zeros(size, bool),
        has_audio=jnp.zeros(size, bool),
        insertion=jnp.full(size, -1, jnp.int32),
        inserted=jnp.zeros((), jnp.int32),
    )


def partition_specs(data_axes: tuple[str, ...]) -> FeatureBank:
    """A FeatureBank of PartitionSpecs: rows over the data axes, the counter replicated."""
    rows = PartitionSpec(data_axes)
    return FeatureBank(
        video=rows,
        audio=rows,
        source_id=rows,
        label=rows,
        video_playback=rows,
        audio_playback=rows,
        has_video=rows,
        has_audio=rows,
        insertion=rows,
        inserted=PartitionSpec(),
    )


def shardings(mesh: Mesh, data_axes: tuple[str, ...]) -> FeatureBank:
    """A FeatureBank of NamedShardings, for the shardings of the training state."""
    return jax.tree.map(
        partial(NamedSharding, mesh),
        partition_specs(data_axes),
        is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
    )


def _period(size: int) -> int:
    """Period of insertion numbers: the largest multiple of `size` below 2³⁰.

    As a multiple of the size it changes neither the place of the next row in the ring nor the
    places in `redistribute` when numbers start over.
    """
    return (2**30 - 1) // size * size


def is_full(bank: FeatureBank) -> Bool[Array, ""]:
    """Tests whether every row has been written."""
    return bank.inserted >= bank.insertion.shape[0]


def age(bank: FeatureBank, insertion: Array) -> Array:
    """Number of rows inserted since those of the given insertion numbers."""
    return (bank.inserted - insertion) % _period(bank.insertion.shape[0])


def num_shards(mesh: Mesh | None, data_axes: tuple[str, ...]) -> int:
    """Devices along the data axes; 1 without a mesh."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in data_axes)


def insert(
    bank: FeatureBank,
    video: Float[Array, "videos 2 dim"],
    audio: Float[Array, "videos 2 dim"],
    *,
    source_id: Int[Array, " videos"],
    label: Int[Array, "videos labels"],
    video_playback: Int[Array, "videos 2"],
    audio_playback: Int[Array, "videos 2"],
    has_video: Bool[Array, "videos *views"],
    has_audio: Bool[Array, "videos *views"],
    mesh: Mesh | None,
    data_axes: tuple[str, ...],
) -> FeatureBank:
    """Writes a batch over the oldest rows, each device its own videos into its own shard.

    The insertion number of view v of video i of the global batch is inserted + 2 i + v, which
    starts over at the bank's size after `_period` rows more. A bank takes batches of one size
    throughout its life.

    Args:
        bank: The bank, rows sharded over `data_axes`.
        video: [videos, 2, dim] video embeddings of the global batch, any float dtype.
        audio: [videos, 2, dim] audio embeddings.
        source_id: int [videos].
        label: int [videos, labels], −1 unknown.
        video_playback: int [videos, 2] number of the speed and direction of each view's video.
        audio_playback: int [videos, 2] of each view's audio.
        has_video: bool [videos], or [videos, 2] of each view.
        has_audio: bool of the same shape.
        mesh: The mesh of Auto axes, or None for one device.
        data_axes: Mesh axes that batch and bank are sharded over.

    Returns:
        The bank with 2 × videos new rows, without gradient.

    Raises:
        UserError: If whole batches do not fill the shards evenly.
    """
    shards = num_shards(mesh, data_axes)
    check_size(bank.insertion.shape[0], global_batch_size=video.shape[0], shards=shards)

    has_video, has_audio = per_view(has_video), per_view(has_audio)

    def write(bank, video, audio, source_id, label, playback, has_video, has_audio):
        size = bank.insertion.shape[0]
        rows = 2 * video.shape[0]
        shard = jax.lax.axis_index(data_axes) if shards > 1 else 0
        start = (bank.inserted // shards) % size

        def put(ring, values):
            values = values.astype(ring.dtype)
            return jax.lax.dynamic_update_slice_in_dim(ring, values, start, axis=0)

        def embeddings(ring, values, mask):
            # The encoder's output for a missing modality may be NaN.
            values = jnp.where(mask[..., None], values, jnp.zeros((), values.dtype))
            return put(ring, values.reshape(rows, -1))

        number = bank.inserted + shard * rows + jnp.arange(rows, dtype=jnp.int32)
        inserted = bank.inserted + rows * shards
        period = _period(size * shards)
        inserted = jnp.where(inserted >= size * shards + period, inserted - period, inserted)
        return FeatureBank(
            video=embeddings(bank.video, video, has_video),
            audio=embeddings(bank.audio, audio, has_audio),
            source_id=put(bank.source_id, jnp.repeat(source_id, 2)),
            label=put(bank.label, jnp.repeat(label, 2, axis=0)),
            video_playback=put(bank.video_playback, playback[0].ravel()),
            audio_playback=put(bank.audio_playback, playback[1].ravel()),
            has_video=put(bank.has_video, has_video.ravel()),
            has_audio=put(bank.has_audio, has_audio.ravel()),
            insertion=put(bank.insertion, number),
            inserted=inserted,
        )

    if shards > 1:
        videos = PartitionSpec(data_axes)
        specs = partition_specs(data_axes)
        write = jax.shard_map(write, mesh=mesh, in_specs=(specs, *(videos,) * 7), out_specs=specs)
    return write(
        *jax.lax.stop_gradient(
            (
                bank,
                video,
                audio,
                source_id,
                label,
                (video_playback, audio_playback),
                has_video,
                has_audio,
            )
        )
    )


def redistribute(bank: FeatureBank, *, global_batch_size: int, shards: int) -> FeatureBank:
    """Lays the rows out as if `shards` devices had inserted them: for a resume on other devices.

    Without this a bank stays valid, but for one turn of the ring the rows that are overwritten are
    not the oldest ones. A bank that lies right already is returned unchanged.

    Args:
        bank: A bank filled in batches of one size. If its rows lie on several processes, call this
            under `jax.jit` with `out_shardings`.
        global_batch_size: Videos of a step.
        shards: Devices along the data axes.

    Raises:
        UserError: If whole batches do not fill the shards evenly.
    """
    size = bank.insertion.shape[0]
    check_size(size, global_batch_size=global_batch_size, shards=shards)
    shard_size, local_rows = size // shards, 2 * global_batch_size // shards
    step, row = jnp.divmod(bank.insertion, 2 * global_batch_size)
    shard, local_row = jnp.divmod(row, local_rows)
    place = shard * shard_size + (step * local_rows + local_row) % shard_size
    place = jnp.where(bank.insertion >= 0, place, size)
    empty = create(size, bank.video.shape[1], bank.video.dtype, labels=bank.label.shape[1])
    return jax.tree.map(
        lambda old, new: new.at[place].set(old, mode="drop") if new.ndim else old, bank, empty
    )


def sample(
    bank: FeatureBank,
    key: Array,
    *,
    anchors_video: Float[Array, "videos 2 dim"],
    anchors_audio: Float[Array, "videos 2 dim"],
    has_video: Bool[Array, "videos *views"],
    has_audio: Bool[Array, "videos *views"],
    video_playback: Int[Array, "videos 2"],
    audio_playback: Int[Array, "videos 2"],
    source_id: Int[Array, " videos"],
    anchor_id: Int[Array, " videos"],
    active: Bool[Array, ""] | bool,
    anchor_modality: Modality,
    target_modality: Modality,
    sampling: BankSampling,
    mesh: Mesh | None,
    data_axes: tuple[str, ...],
    terms: Sequence[Term],
) -> BankSample:
    """Samples bank rows as positives and negatives of every anchor, by similarity.

    Never returned: empty rows, rows of the anchor's source, rows that lack the target modality or
    one that the similarity space reads. An anchor that lacks its own or such a modality gets none.

    Args:
        bank: The bank, rows sharded over `data_axes`.
        key: Key of this step, the same for all terms. Noise depends on it, the term, the anchor id,
            the view and the row's insertion number only.
        anchors_video: [videos, 2, dim] video embeddings of the global batch.
        anchors_audio: [videos, 2, dim] audio embeddings.
        has_video: bool [videos], or [videos, 2] of each view.
        has_audio: bool of the same shape.
        video_playback: int [videos, 2] number of the speed and direction of each view's video.
        audio_playback: int [videos, 2] of each view's audio.
        source_id: int [videos].
        anchor_id: int [videos] number of the video, independent of the number of devices.
        active: bool scalar; if False (warm-up, bank not yet full) every mask is False.
        anchor_modality: "video" or "audio".
        target_modality: Modality of the rows returned.
        sampling: Space, ranks, counts and distribution.
        mesh: The mesh of Auto axes, or None for one device.
        data_axes: Mesh axes that batch and bank are sharded over.
        terms: (anchor modality, target modality) of all terms that the step samples: they share
            candidates, and choose merge or gather together.

    Returns:
        The sampled rows and masks, sharded like the batch, without gradient.

    Raises:
        UserError: If the bank or the batch does not divide over the shards, or the bank has fewer
            rows than ranks or candidates.
    """
    shards = num_shards(mesh, data_axes)
    term = (anchor_modality, target_modality)
    size, dim = bank.video.shape
    videos = source_id.shape[0]
    if size % shards or videos % shards:
        raise UserError(
            f"bank of {size} rows and batch of {videos} videos must both divide over {shards} data "
            f"shards; use multiples of {shards}."
        )
    if max(sampling.positive_ranks, sampling.negative_candidates) > size:
        raise UserError(
            f"positive_ranks = {sampling.positive_ranks} and negative_candidates = "
            f"{sampling.negative_candidates} must be at most the bank's {size} rows."
        )
    count = exchange_bytes(
        size=size,
        dim=dim,
        dtype=bank.video.dtype,
        labels=bank.label.shape[1],
        global_batch_size=videos,
        shards=shards,
        terms=terms,
        sampling=sampling,
    )
    local = partial(
        draw,
        term=term,
        number=terms.index(term),
        sampling=sampling,
        data_axes=data_axes,
        shards=shards,
        merge=count.merge < count.gather,
    )
    rows = BankRows(
        embeddings={"video": bank.video, "audio": bank.audio},
        present={"video": bank.has_video, "audio": bank.has_audio},
        numbers=jnp.concatenate(
            [
                jnp.stack(
                    [bank.insertion, bank.source_id, bank.video_playback, bank.audio_playback],
                    axis=1,
                ),
                bank.label,
            ],
            axis=1,
        ),
    )
    anchors = Anchors(
        embeddings={"video": anchors_video, "audio": anchors_audio},
        present={"video": per_view(has_video), "audio": per_view(has_audio)},
        playback={"video": video_playback, "audio": audio_playback},
        source_id=source_id,
        anchor_id=anchor_id,
    )
    if shards > 1:
        sharded = PartitionSpec(data_axes)
        local = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(sharded, PartitionSpec(), sharded),
            out_specs=sharded,
        )
    both = local(jax.lax.stop_gradient(rows), key, jax.lax.stop_gradient(anchors))

    def where_valid(drawn: Array, numbers: Array, mask: Array) -> tuple[Array, Array, Array]:
        mask = mask & active
        zero = jnp.zeros((), drawn.dtype)
        return (
            jnp.where(mask[..., None], drawn, zero),
            mask,
            jnp.where(mask[..., None], numbers, -1),
        )

    positives, negatives = (where_valid(*kind) for kind in both)
    return BankSample(*positives, *negatives)
