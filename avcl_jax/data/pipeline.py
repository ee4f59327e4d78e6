"""Records to global batches of rendered views.

The chain is: positions, global shuffle, repeat, a generator for each, this host's rows of each
global batch, render these a few at a time. Everything random is a pure function of (seed, position
in the order), so batches do not depend on the number of workers or of hosts, and the position of
the pipeline is the number of steps taken.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Generator, Mapping, Sequence, Sized
from typing import Any, Protocol

import grain
import numpy as np

from avcl_jax.data.render_spec import RenderSpec
from avcl_jax.data.rendering import Renderer, describe, render_drawn, render_random_views
from avcl_jax.data.selection import UsableRecords
from avcl_jax.data.workers import Shapes, filled_batches
from avcl_jax.errors import UserError


class Batches(Protocol):
    """Records, and how rows of a batch are rendered from them; `len` is the number of records."""

    def __len__(self) -> int: ...

    def shapes(self, rows: int) -> Shapes:
        """Returns shape and dtype of each array of a batch."""

    def requests(self, positions: np.ndarray) -> Any:
        """Returns what `render` needs of the records at these positions, and no more."""

    @property
    def render(self) -> Renderer:
        """Function that writes rows; worker processes receive it, and no index of the records."""


@dataclasses.dataclass(frozen=True)
class RandomViews:
    """Batches of two random views of each record, as `batch_shapes` describes them.

    Attributes:
        skip_unreadable: a record that cannot be read becomes a row without video, audio, tasks and
            labels, in which `unreadable` is set, not a RecordError with its name and shard.
    """

    source: UsableRecords
    spec: RenderSpec
    skip_unreadable: bool

    def __len__(self) -> int:
        return len(self.source)

    def shapes(self, rows: int) -> Shapes:
        """Returns `batch_shapes` with all labels."""
        return self.spec.batch_shapes(rows, list(self.source.records.labels))

    def requests(self, positions: np.ndarray) -> Any:
        """Returns what `render` needs of these records: places, usable parts, numbers."""
        source, records = self.source, self.source.records
        indices = source.indices[positions]
        places = [records.place_of(index) for index in indices.tolist()]
        return places, source.usable(positions), describe(indices, records)

    @property
    def render(self) -> Renderer:
        """Function that writes rows of a batch, for worker processes."""
        reader = self.source.records.reader
        return functools.partial(render_random_views, reader, self.spec, self.skip_unreadable)


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
    skip_unreadable: bool = False,
    **options: Any,
) -> Generator[dict[str, np.ndarray]]:
    """Returns endless batches of rendered random views, as `batch_shapes` describes them.

    `skip_unreadable` is that of `RandomViews`; other arguments are those of `drawn_batches`.

    Raises:
        UserError: if a batch contains more videos than there are records.
    """
    check_enough(source, global_batch_size)
    views = RandomViews(source, spec, skip_unreadable)
    return drawn_batches(views, global_batch_size=global_batch_size, **options)


def drawn_batches(
    batches: Batches,
    *,
    seed: int,
    global_batch_size: int,
    rows: Sequence[int] | None = None,
    first_step: int = 0,
    workers: int = 0,
    threads: int = 2,
) -> Generator[dict[str, np.ndarray]]:
    """Returns endless batches of records in random order, a function of the seed alone.

    Every record is drawn once before one is drawn again. An array is memory of a later batch when
    nothing refers to it any more.

    Args:
        rows: rows of each global batch that this process renders, all by default.
        first_step: batches to skip; a resumed run gets the batch that would have come.
        workers: worker processes; 0 renders in threads of this process.
        threads: threads if there are no workers.
    """
    rows = range(global_batch_size) if rows is None else rows
    order = grain.MapDataset.range(len(batches)).seed(seed).shuffle().repeat().random_map(_draw)

    def request(step: int, part: slice) -> Any:
        draws = [order[step * global_batch_size + row] for row in rows[part]]
        positions, generators = zip(*draws, strict=True)
        return generators, batches.requests(np.array(positions))

    return filled_batches(
        batches.shapes(len(rows)),
        request,
        functools.partial(render_drawn, batches.render),
        first=first_step,
        workers=workers,
        threads=threads,
    )


def _draw(position: int, rng: np.random.Generator) -> tuple[int, tuple[Any, Any]]:
    """Returns the position, and of the generator, which grain takes back, what makes it again."""
    state: Any = rng.bit_generator.state["state"]
    return position, (state["key"], state["counter"])


def to_device_batch(batch: Mapping[str, np.ndarray], sharding: Any) -> dict[str, Any]:
    """Returns a batch of `sharding.local_rows` as global `jax.Array`s, sharded by `sharding`."""
    import jax  # Not at the top: worker processes render without JAX.

    return {
        name: jax.make_array_from_process_local_data(sharding, value)
        for name, value in batch.items()
    }
