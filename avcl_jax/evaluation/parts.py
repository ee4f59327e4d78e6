"""Long computations over records, in parts that survive an interruption and spread over hosts.

A part is a file of the workdir. Process i of n computes parts i, i + n, …, each whole or not at
all; those that are there are not computed again, by however many processes they were. Process 0
then reads them all, so the workdir must be one that all processes see, as for checkpoints.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from avcl_jax.evaluation.protocol import ProtocolError
from avcl_jax.evaluation.written import write_bytes


def key_of(*identity: Any) -> str:
    """Returns a name for results that are decided by `identity`, which JSON can write."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]


def in_parts(
    directory: epath.PathLike,
    count: int,
    compute: Callable[[Sequence[int]], Mapping[str, np.ndarray]],
    *,
    rows: int,
) -> dict[str, np.ndarray]:
    """Computes rows 0 … count − 1, a part at a time, and returns them together.

    Args:
        directory: of the parts; its name must change when the results would (`key_of`).
        count: number of rows.
        compute: from positions to arrays [positions, …].
        rows: of a part; the last has what is left.

    Returns:
        Arrays [count, …] in process 0, nothing elsewhere.

    Raises:
        ProtocolError: if a part cannot be read.
    """
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    parts = [range(start, min(start + rows, count)) for start in range(0, count, rows)]
    # Named by their rows, so that those of another size are never taken for these.
    paths = [directory / f"rows-{part.start:07d}-{part.stop:07d}.npz" for part in parts]
    for number in range(jax.process_index(), len(parts), jax.process_count()):
        if not paths[number].exists():
            positions = parts[number]
            buffer = io.BytesIO()
            np.savez(buffer, **dict(compute(positions)))  # type: ignore[arg-type] # numpy's stub
            write_bytes(paths[number], buffer.getvalue())
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(str(directory))
        if jax.process_index():
            return {}
    found = [_read(path) for path in paths]
    return {name: np.concatenate([arrays[name] for arrays in found]) for name in found[0]}


def _read(path: epath.Path) -> dict[str, np.ndarray]:
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ProtocolError(f"{path} is damaged ({error}): delete it and run again") from error
