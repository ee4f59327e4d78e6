"""Long computations over records: batches over the devices of a host, parts over hosts.

A part is a file of the workdir. Process i of n computes parts i, i + n, …, each whole or not at
all; existing parts are not computed again, whatever number of processes wrote them. Process 0
then reads them all, so the workdir must be one that all processes see, as for checkpoints.
"""

from __future__ import annotations

import collections
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from avcl_jax.compilation_cache import compiled
from avcl_jax.errors import UserError
from avcl_jax.paths import write_bytes
from avcl_jax.training import sharding

Arrays = Mapping[str, np.ndarray]
Render = Callable[[int], Mapping[str, Any]]

_MEDIA = ("video", "spectrogram", "audio_windows", "clips")  # too large to keep
_BATCHES_AHEAD = 2


def cache_key(*identity: Any) -> str:
    """Returns a hash of a JSON-serialisable identity, as a name of results that it decides."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]


def in_parts(
    directory: epath.PathLike,
    count: int,
    compute: Callable[[Sequence[int]], Arrays],
    *,
    rows: int,
) -> dict[str, np.ndarray]:
    """Computes rows 0 … count − 1, one part at a time, and returns them together.

    Args:
        directory: directory of the parts; its name must change when the results would
            (`cache_key`).
        count: number of rows.
        compute: maps positions to arrays [positions, …].
        rows: rows per part; the last may have fewer.

    Returns:
        Arrays [count, …] in process 0, nothing elsewhere.

    Raises:
        UserError: if a part cannot be read.
    """
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    parts = [range(start, min(start + rows, count)) for start in range(0, count, rows)]
    # Named by their rows, so that those of another size are never taken for these.
    paths = [directory / f"rows-{part.start:07d}-{part.stop:07d}.npz" for part in parts]
    for number in range(jax.process_index(), len(parts), jax.process_count()):
        if not paths[number].exists():
            buffer = io.BytesIO()
            np.savez(buffer, **dict(compute(parts[number])))  # type: ignore[arg-type] # numpy's stub
            write_bytes(paths[number], buffer.getvalue())
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(str(directory))
        if jax.process_index():
            return {}
    return _concatenated([_read(path) for path in paths])


def batched_map(
    function: Callable[[Any, Mapping[str, jax.Array]], Mapping[str, jax.Array]],
    networks: Mapping[str, Any],
    *,
    inputs: Sequence[str],
    chunk: int,
    threads: int,
    identity: str | None = None,
) -> Callable[[Render, Sequence[int]], dict[str, np.ndarray]]:
    """Returns a map of records to the outputs of networks, batch by batch over local devices.

    Threads render the next batches while the devices compute. The last batch is padded by its last
    record, whose outputs are dropped, so that one shape is compiled.

    Args:
        function: pure function of the variables of a network and stacked arrays [batch, …], to
            arrays [batch, …]; jitted here.
        networks: variables by name of the network, all of the same structure.
        inputs: names of the rendered arrays that the function takes.
        chunk: records per batch over all devices; rounded up to a multiple of the devices.
        identity: text that the function depends on, beside the sources of this package: later
            starts neither trace nor compile it (`compilation_cache.compiled`).

    Raises:
        UserError: if a batch is larger than the memory of this machine.

    Returns:
        A function of `render`, arrays of the record at a position, and the positions. It returns
        the outputs of each network as NETWORK/OUTPUT, [positions, …], and beside them all rendered
        arrays but frames and spectrograms.
    """
    mesh = sharding.create_mesh(1, jax.local_devices())
    rows = -(-chunk // mesh.size) * mesh.size
    placed = jax.device_put(dict(networks), sharding.replicated(mesh))
    jitted = jax.jit(function)
    program: Any = None

    def start(rendered: Sequence[Mapping[str, Any]]) -> tuple[dict[str, jax.Array], Arrays]:
        first = rendered[0]
        _check_memory(rows, sum(np.asarray(first[name]).nbytes for name in inputs))
        padded = [*rendered, *[rendered[-1]] * (rows - len(rendered))]
        batch = stack([{name: row[name] for name in inputs} for row in padded])
        batch = jax.device_put(batch, sharding.rows_sharding(mesh))
        nonlocal program
        if program is None:
            arguments = next(iter(placed.values())), batch
            program = jitted if identity is None else compiled(jitted, arguments, identity)
        outputs = {
            f"{network}/{name}": value
            for network, variables in placed.items()
            for name, value in program(variables, batch).items()
        }
        return outputs, stack(
            [{n: a for n, a in row.items() if n not in _MEDIA} for row in rendered]
        )

    def finish(outputs: Mapping[str, jax.Array], kept: Arrays, count: int) -> Arrays:
        return {name: np.asarray(value)[:count] for name, value in outputs.items()} | dict(kept)

    def compute(render: Render, positions: Sequence[int]) -> dict[str, np.ndarray]:
        found: list[Arrays] = []
        running: tuple[Mapping[str, jax.Array], Arrays, int] | None = None
        for rendered in _rendered_ahead(render, positions, chunk=rows, threads=threads):
            started = *start(rendered), len(rendered)
            if running is not None:  # the devices compute the batch that was just started
                found.append(finish(*running))
            running = started
        if running is not None:
            found.append(finish(*running))
        return _concatenated(found)

    return compute


def _check_memory(rows: int, row_bytes: int) -> None:
    """Raises UserError if a batch is larger than the memory of this machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if rows * row_bytes > memory:
        raise UserError(
            f"a batch of {rows:,} takes {rows * row_bytes / 1e9:,.0f} GB and this machine has "
            f"{memory / 1e9:,.0f} GB of memory: choose a smaller batch (--batch-size, or the "
            "setting chunk)"
        )


def render_all(render: Render, positions: Sequence[int], *, threads: int) -> dict[str, np.ndarray]:
    """Renders records and stacks them, for computations on the host: arrays [positions, …]."""
    with ThreadPoolExecutor(threads) as pool:
        return stack(list(pool.map(render, positions)))


def stack(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Stacks the arrays of several records."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _rendered_ahead(
    render: Render,
    positions: Sequence[int],
    *,
    chunk: int,
    threads: int,
) -> Iterator[list[Mapping[str, Any]]]:
    """Yields rendered records in order, up to `chunk` at a time, while threads render the next."""
    with ThreadPoolExecutor(threads) as pool:
        pending: collections.deque[list[Future[Mapping[str, Any]]]] = collections.deque()
        for start in range(0, len(positions), chunk):
            pending.append([pool.submit(render, p) for p in positions[start : start + chunk]])
            if len(pending) > _BATCHES_AHEAD:
                yield [future.result() for future in pending.popleft()]
        while pending:
            yield [future.result() for future in pending.popleft()]


def _concatenated(parts: Sequence[Arrays]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([arrays[name] for arrays in parts]) for name in parts[0]}


def _read(path: epath.Path) -> dict[str, np.ndarray]:
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged ({error}): delete it and run again") from error
