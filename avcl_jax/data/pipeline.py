"""Records to global batches of rendered views.

The chain is: positions, global shuffle, repeat, a generator for each, take this host's rows of each
global batch, render the batch. Everything random is a pure function of (seed, position in the
order), and hosts are sliced last, so batches do not depend on the number of workers or of hosts,
and the position of the pipeline is the number of steps taken.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Any, NamedTuple

import grain
import numpy as np

from avcl_jax.data import shared_memory
from avcl_jax.data.crop import center_crop, random_crop
from avcl_jax.data.record_format import UNKNOWN_LABEL, Record
from avcl_jax.data.rendering import RenderSpec, describe, render_views
from avcl_jax.data.tfrecord import RecordError
from avcl_jax.data.usable_records import UsableRecords
from avcl_jax.data.views import FORWARD, Clip, draw_views
from avcl_jax.data.worker_processes import in_workers
from avcl_jax.errors import UserError


def unreadable_row(
    source: UsableRecords, position: int, spec: RenderSpec, pixels: np.ndarray
) -> dict[str, Any]:
    """A row for a record that cannot be read: neither picture nor sound, no task, no label.

    Args:
        source: usable records.
        position: which one.
        spec: rendering.
        pixels: where its picture is to be.

    Returns:
        The arrays of a row of a training batch, with `unreadable` set.
    """
    records, index = source.records, int(source.indices[position])
    nothing = Record(
        record_id=records.record_ids[index],
        source_id="",
        frames=(),
        frame_seconds=np.empty(0),
        waveform=np.empty(0, np.int16),
        sample_rate_hz=0,
        audio_start_seconds=0.0,
        duration_seconds=0.0,
        height=0,
        width=0,
        labels={
            label: () if label in records.multilabel else UNKNOWN_LABEL
            for label in records.class_names
        },
    )
    use = dataclasses.replace(source.usable(position), has_video=False, has_audio=False)
    clips = [Clip(0.0, 0, FORWARD)] * 2
    arrays = render_views(nothing, use, clips, clips, [center_crop(1, 1)] * 2, spec, pixels)
    masks = dict.fromkeys(("speed_mask", "direction_mask", "order_mask"), np.bool_(False))
    other = {"order": np.int32(0), "unreadable": np.bool_(True)}
    return arrays | masks | other | describe(index, nothing, records)


class Draw(NamedTuple):
    """A record to show, and what decides how."""

    position: int
    rng: np.random.Generator


class _KeepGenerator(grain.transforms.RandomMap):
    """Pairs a position with its own generator."""

    def random_map(self, position: int, rng: np.random.Generator) -> Draw:
        # grain lends the generator to the next element as soon as this returns.
        return Draw(int(position), copy.deepcopy(rng))


@dataclasses.dataclass(frozen=True)
class RenderBatch:
    """Reads records, draws two views of each and renders them, straight into the batch.

    One array for the pictures of all: arrays of single videos, filled and then copied into a
    batch, cost twice the memory, and page faults that took as long as a third of the decoding.

    Attributes:
        source: usable records.
        spec: rendering.
        skip_unreadable: a record that cannot be read becomes an `unreadable_row`, not an error.
        shared: the pictures are a `SharedArray`, to be received by another process.
    """

    source: UsableRecords
    spec: RenderSpec
    skip_unreadable: bool
    shared: bool

    def __call__(self, draws: Sequence[Draw]) -> dict[str, Any]:
        """Returns the arrays of `render_views`, labels, masks and numbers of all, stacked.

        Raises:
            RecordError: if one cannot be read, with its name and shard.
        """
        shape = (len(draws), 2, *self.spec.video_shape)
        sent, video = shared_memory.empty_batch(shape, np.uint8, shared=self.shared)
        rows = [self._row(draw, pixels) for draw, pixels in zip(draws, video, strict=True)]
        names = [name for name in rows[0] if name != "video"]
        return {"video": sent} | {name: np.stack([row[name] for row in rows]) for name in names}

    def _row(self, draw: Draw, pixels: np.ndarray) -> dict[str, Any]:
        try:
            return self._render(draw, pixels)
        except RecordError:
            if not self.skip_unreadable:
                raise
            return unreadable_row(self.source, draw.position, self.spec, pixels)

    def _render(self, draw: Draw, pixels: np.ndarray) -> dict[str, Any]:
        index, record, use = self.source[draw.position]
        pair = draw_views(draw.rng, use.timeline, self.spec.views, use.frame_seconds(record))
        crops = [
            random_crop(draw.rng, max(record.height, 1), max(record.width, 1), self.spec.crop)
            for _ in pair.video
        ]
        try:
            arrays = render_views(record, use, pair.video, pair.audio, crops, self.spec, pixels)
        except RecordError as error:
            raise RecordError(f"{self.source.records.shard_of(index)}, {error}") from error
        return arrays | {
            "order": np.int32(pair.order),
            "speed_mask": np.bool_(pair.speed_mask),
            "direction_mask": np.bool_(pair.direction_mask),
            "order_mask": np.bool_(pair.order_mask),
            "unreadable": np.bool_(False),
            **describe(index, record, self.source.records),
        }


class HostSlice(grain.MapDataset):
    """This host's contiguous rows of every global batch, from a given batch on.

    Element i is row `host * local + i % local` of global batch `first_batch + i // local`. It is
    the last step before batching: slicing earlier would give each host other random numbers.
    """

    def __init__(
        self, parent: grain.MapDataset, *, global_batch_size: int, host: int, hosts: int, first: int
    ):
        """Slices `parent` for `host` of `hosts`, starting at global batch `first`.

        Raises:
            UserError: if the global batch does not divide over the hosts.
        """
        super().__init__(parent)
        if global_batch_size % hosts:
            raise UserError(
                f"global_batch_size {global_batch_size} is not divisible by the {hosts} processes"
            )
        self._global = global_batch_size
        self._local = global_batch_size // hosts
        self._host = host
        self._first = first

    def __len__(self) -> int:
        """Rows that this host will see."""
        return (len(self._parent) // self._global - self._first) * self._local

    def __getitem__(self, index: int | slice) -> Any:
        """Row `index`, or a slice of rows."""
        if isinstance(index, slice):
            return self.slice(index)
        batch, row = divmod(index, self._local)
        return self._parent[(self._first + batch) * self._global + self._host * self._local + row]

    def __str__(self) -> str:
        """Constant description."""
        return f"HostSlice({self._host}, {self._local} of {self._global}, from {self._first})"


def batch_shapes(
    spec: RenderSpec, rows: int, labels: Sequence[str] = ()
) -> dict[str, tuple[tuple[int, ...], type]]:
    """Shapes and dtypes of a batch of `train_batches`, without any data.

    Args:
        spec: rendering.
        rows: videos.
        labels: names of labels of one class a clip.

    Returns:
        Name -> (shape, numpy dtype).
    """
    mel = spec.log_mel
    tasks = ("speed", "direction")
    sound: dict[str, tuple[tuple[int, ...], type]] = (
        {"audio_windows": ((rows, 2, mel.frames, mel.window), np.int16)}
        if spec.spectrogram_on_device
        else {"spectrogram": ((rows, 2, mel.frames, mel.mels), np.float32)}
    )
    flags = (
        "has_video",
        "video_moves",
        "unreadable",
        *(f"{task}_mask" for task in (*tasks, "order")),
    )
    numbers = ("order", "source_id", "record_index", *(f"label_{name}" for name in labels))
    return {
        "video": ((rows, 2, *spec.video_shape), np.uint8),
        **sound,
        "has_audio": ((rows, 2), np.bool_),
        **{name: ((rows,), np.bool_) for name in flags},
        **{name: ((rows,), np.int32) for name in numbers},
        **{
            f"{kind}_{task}": ((rows, 2), np.int32) for kind in ("video", "audio") for task in tasks
        },
    }


def batch_bytes(spec: RenderSpec, rows: int) -> int:
    """Returns the size of a batch of `train_batches` in memory, without labels."""
    arrays = batch_shapes(spec, rows).values()
    return sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in arrays)


def check_enough(
    source: Sized,
    global_batch_size: int,
    *,
    multiple: int = 1,
    least: int = 1,
    bank_size: int = 0,
) -> None:
    """Checks that a batch holds no more videos than there are.

    Args:
        source: usable records.
        global_batch_size: videos of a batch.
        multiple: devices and micro-batches that a batch is divided over.
        least: videos of the smallest batch.
        bank_size: rows of the feature bank, a multiple of the two that each video inserts; 0 for
            none.

    Raises:
        UserError: naming the largest batch that fits, or batch and bank.
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
        which = f", the largest that fits bank.size {bank_size}" if bank_size else ""
        advice = f"set global_batch_size={fitting[-1]}{which}"
    else:
        rows = 2 * sizes[-1]
        bank = math.ceil(bank_size / rows) * rows
        advice = f"set global_batch_size={sizes[-1]} and bank.size={bank}"
    raise UserError(f"{problem}: {advice}, or prepare more videos")


def train_batches(
    source: UsableRecords,
    spec: RenderSpec,
    *,
    seed: int,
    global_batch_size: int,
    host: int = 0,
    hosts: int = 1,
    first_step: int = 0,
    workers: int = 0,
    threads: int = 2,
    prefetch: int = 4,
    skip_unreadable: bool = False,
) -> grain.IterDataset:
    """Endless batches of rendered random views.

    Args:
        source: usable records.
        spec: rendering.
        skip_unreadable: a record that cannot be read becomes an `unreadable_row`, and is otherwise
            an error when its batch is taken.
        seed: as the other arguments: see `drawn_batches`.

    Returns:
        Dataset of dicts of arrays with `global_batch_size / hosts` rows.

    Raises:
        UserError: if a batch holds more videos than there are records, or does not divide.
    """
    check_enough(source, global_batch_size)
    return drawn_batches(
        len(source),
        RenderBatch(source, spec, skip_unreadable, shared=workers > 0),
        seed=seed,
        global_batch_size=global_batch_size,
        host=host,
        hosts=hosts,
        first_step=first_step,
        workers=workers,
        threads=threads,
        prefetch=prefetch,
    )


def drawn_batches(
    count: int,
    render: Callable[[Sequence[Draw]], dict[str, Any]],
    *,
    seed: int,
    global_batch_size: int,
    host: int,
    hosts: int,
    first_step: int,
    workers: int,
    threads: int,
    prefetch: int,
) -> grain.IterDataset:
    """Endless batches of records in random order, drawn and rendered as a function of the seed.

    Args:
        count: records; every one is drawn once before one is drawn again.
        render: makes the arrays of a batch, one row a draw; called in worker processes if there
            are any, and may then return a `SharedArray` for each large array.
        seed: of the order and of every draw.
        global_batch_size: records in a batch over all hosts.
        host: number of this process.
        hosts: number of processes.
        first_step: batches to skip; a resumed run gets the batch that would have come.
        workers: worker processes; 0 renders in threads of this process.
        threads: reading threads (of each worker).
        prefetch: batches kept ready (by each worker).

    Returns:
        Dataset of what `render` returns for `global_batch_size / hosts` draws.

    Raises:
        UserError: if the batch does not divide over the hosts.
    """
    dataset = (
        grain.MapDataset.range(count).seed(seed).shuffle().repeat().random_map(_KeepGenerator())
    )
    local = HostSlice(
        dataset, global_batch_size=global_batch_size, host=host, hosts=hosts, first=first_step
    )
    batches = local.batch(global_batch_size // hosts, drop_remainder=True, batch_fn=render)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    iterable = batches.to_iter_dataset(options)
    return in_workers(iterable, workers=workers, prefetch=prefetch) if workers else iterable


def to_device_batch(batch: Mapping[str, np.ndarray], sharding: Any) -> dict[str, Any]:
    """This host's rows of a batch as global arrays.

    Args:
        batch: local rows.
        sharding: JAX sharding of the leading dimension.

    Returns:
        Global `jax.Array`s.
    """
    import jax  # Not at the top: worker processes render without JAX.

    return {
        name: jax.make_array_from_process_local_data(sharding, value)
        for name, value in batch.items()
    }
