"""Records to global batches of rendered views.

The chain is: positions, global shuffle, repeat, a generator for each, this host's rows of each
global batch, render the batch. Everything random is a pure function of (seed, position in the
order), and rows are chosen last, so batches do not depend on the number of workers or of hosts,
and the position of the pipeline is the number of steps taken.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Any, NamedTuple

import grain
import numpy as np

from avcl_jax.data.images import random_crop
from avcl_jax.data.record_format import UNKNOWN_LABEL
from avcl_jax.data.records import RecordError
from avcl_jax.data.rendering import RenderSpec, describe, render_views
from avcl_jax.data.selection import UsableRecords
from avcl_jax.data.views import MASKS, draw_views
from avcl_jax.data.workers import empty_batch, in_workers
from avcl_jax.errors import UserError


class Draw(NamedTuple):
    """Position of a record, and the generator of everything that is drawn for it."""

    position: int
    rng: np.random.Generator


def _draw(position: int, rng: np.random.Generator) -> Draw:
    # grain lends the generator to the next element as soon as this returns.
    return Draw(int(position), copy.deepcopy(rng))


@dataclasses.dataclass(frozen=True)
class RenderBatch:
    """Reads records, draws two views of each and renders them, straight into the batch.

    Arrays of single videos, copied into a batch, would cost twice the memory, and page faults that
    took as long as a third of the decoding.

    Attributes:
        skip_unreadable: a record that cannot be read becomes a row without video, audio, tasks and
            labels, in which `unreadable` is set, not an error.
        shared: the video is a `SharedArray`, to be received by another process.
    """

    source: UsableRecords
    spec: RenderSpec
    skip_unreadable: bool
    shared: bool

    def __call__(self, draws: Sequence[Draw]) -> dict[str, Any]:
        """Returns the arrays of `batch_shapes`, one row per draw.

        Raises:
            RecordError: if a record cannot be read, with its name and shard.
        """
        shapes = batch_shapes(self.spec, len(draws))
        sent, video = empty_batch(*shapes.pop("video"), shared=self.shared)
        batch: dict[str, Any] = {name: np.zeros(*array) for name, array in shapes.items()}
        for place, draw in enumerate(draws):
            try:
                row = self._row(draw, video[place])
            except RecordError:
                if not self.skip_unreadable:
                    raise
                video[place] = 0
                batch["unreadable"][place] = True
                continue
            for name in row.keys() - {"video"}:
                batch[name][place] = row[name]
        records = self.source.records
        batch |= describe(self.source.indices[[draw.position for draw in draws]], records)
        for label in records.labels:
            batch[f"label_{label}"][batch["unreadable"]] = UNKNOWN_LABEL
        return {"video": sent} | batch

    def _row(self, draw: Draw, pixels: np.ndarray) -> dict[str, Any]:
        index, record, use = self.source[draw.position]
        pair = draw_views(draw.rng, use, self.spec.views, record.frame_seconds)
        size = max(record.height, 1), max(record.width, 1)
        crops = [random_crop(draw.rng, *size, self.spec.crop) for _ in pair.video]
        with self.source.records.naming_shard(index):
            row = render_views(record, use, pair.video, pair.audio, crops, self.spec, pixels)
        return row | pair.labels()


def batch_shapes(
    spec: RenderSpec, rows: int, labels: Sequence[str] = ()
) -> dict[str, tuple[tuple[int, ...], type]]:
    """Returns name -> (shape, numpy dtype) of a batch of `train_batches`, without any data.

    `labels` are names of labels of one class per record.
    """
    audio, audio_shape, audio_dtype = spec.audio_array()
    flags = ("has_video", "video_moves", "unreadable", *MASKS)
    numbers = ("order", "source_id", "record_index", *(f"label_{name}" for name in labels))
    playback = [f"{kind}_{task}" for kind in ("video", "audio") for task in ("speed", "direction")]
    return {
        "video": ((rows, 2, *spec.video_shape), np.uint8),
        audio: ((rows, 2, *audio_shape), audio_dtype),
        "has_audio": ((rows, 2), np.bool_),
        **{name: ((rows,), np.bool_) for name in flags},
        **{name: ((rows,), np.int32) for name in numbers},
        **{name: ((rows, 2), np.int32) for name in playback},
    }


def batch_bytes(spec: RenderSpec, rows: int) -> int:
    """Returns the size of a batch of `train_batches` in memory, without labels."""
    arrays = batch_shapes(spec, rows).values()
    return sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in arrays)


def check_enough(
    source: Sized, global_batch_size: int, *, multiple: int = 1, least: int = 1, bank_size: int = 0
) -> None:
    """Raises UserError if a batch has more videos than there are usable records.

    It names the largest batch that fits, of at least `least` videos and a `multiple` of devices and
    micro-batches, and the bank, whose `bank_size` rows are two per video inserted; 0 for none.
    """
    count = len(source)
    if global_batch_size <= count:
        return
    problem = f"global_batch_size {global_batch_size} is larger than the {count} usable records"
    smallest = math.ceil(least / multiple) * multiple
    sizes = range(smallest, count + 1, multiple)
    if not sizes:
        raise UserError(f"{problem}: prepare at least {smallest} videos, the smallest batch")
    if fitting := [size for size in sizes if bank_size % (2 * size) == 0]:
        bank = f", the largest that fits bank_size {bank_size}" if bank_size else ""
        advice = f"set global_batch_size={fitting[-1]}{bank}"
    else:
        rows = 2 * sizes[-1]
        fitting_bank = math.ceil(bank_size / rows) * rows
        advice = f"set global_batch_size={sizes[-1]} and bank_size={fitting_bank}"
    raise UserError(f"{problem}: {advice}, or prepare more videos")


def train_batches(
    source: UsableRecords,
    spec: RenderSpec,
    *,
    global_batch_size: int,
    workers: int = 0,
    skip_unreadable: bool = False,
    **options: Any,
) -> grain.IterDataset:
    """Returns endless batches of rendered random views, as `batch_shapes` describes them.

    `skip_unreadable` is that of `RenderBatch`; other arguments are those of `drawn_batches`.

    Raises:
        UserError: if a batch contains more videos than there are records.
    """
    check_enough(source, global_batch_size)
    render = RenderBatch(source, spec, skip_unreadable, shared=workers > 0)
    options |= {"global_batch_size": global_batch_size, "workers": workers}
    return drawn_batches(len(source), render, **options)


def drawn_batches(
    count: int,
    render: Callable[[Sequence[Draw]], dict[str, Any]],
    *,
    seed: int,
    global_batch_size: int,
    rows: Sequence[int] | None = None,
    first_step: int = 0,
    workers: int = 0,
    threads: int = 2,
    prefetch: int = 4,
) -> grain.IterDataset:
    """Returns endless batches of `count` records in random order, a function of the seed alone.

    Every record is drawn once before one is drawn again. A batch is what `render` returns for the
    draws of `rows`.

    Args:
        render: makes the arrays of a batch, one row per draw; called in worker processes if there
            are any, and may then return a `SharedArray` for each large array.
        rows: rows of each global batch that this process renders, all by default.
        first_step: batches to skip; a resumed run gets the batch that would have come.
        workers: worker processes; 0 renders in threads of this process.
        threads: reading threads (of each worker).
        prefetch: batches kept ready (by each worker).
    """
    if rows is None:
        rows = range(global_batch_size)
    dataset = grain.MapDataset.range(count).seed(seed).shuffle().repeat().random_map(_draw)
    # Chosen last: earlier, every host would draw other random numbers.
    render_rows = functools.partial(_render_rows, render, rows)
    batches = dataset.batch(global_batch_size, drop_remainder=True, batch_fn=render_rows)
    batches = batches[first_step:]
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    iterable = batches.to_iter_dataset(options)
    return in_workers(iterable, workers=workers, prefetch=prefetch) if workers else iterable


def _render_rows(
    render: Callable[[Sequence[Draw]], dict[str, Any]], rows: Sequence[int], draws: Sequence[Draw]
) -> dict[str, Any]:
    return render([draws[row] for row in rows])


def to_device_batch(batch: Mapping[str, np.ndarray], sharding: Any) -> dict[str, Any]:
    """Returns a batch of `sharding.local_rows` as global `jax.Array`s, sharded by `sharding`."""
    import jax  # Not at the top: worker processes render without JAX.

    return {
        name: jax.make_array_from_process_local_data(sharding, value)
        for name, value in batch.items()
    }
