"""Memory of the input pipeline, and waiting time for the index and the first batch."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from benchmarks.measure import peak_bytes, seconds_since_start


def peak_gigabytes(*, directory: str, workers: int, threads: int, count: int) -> dict[str, Any]:
    """Peak resident memory of the pipeline with its worker processes over `count` batches.

    Memory that processes share is counted for each of them.

    Returns:
        GB (1e9 bytes) of the `main` process, of each of the `workers`, and in `total`.
    """
    import psutil

    from benchmarks import rendering

    batches = rendering.pipeline(directory, workers=workers, threads=threads)
    for _ in range(count):
        next(batches)
    main = peak_bytes() / 1e9
    others = [peak_bytes(child.pid) / 1e9 for child in psutil.Process().children(recursive=True)]
    return {
        "main": round(main, 3),
        "workers": [round(other, 3) for other in others],
        "total": round(main + sum(others), 3),
    }


def open_index(*, directory: str) -> dict[str, float]:
    """Seconds to open a data set, megabytes (1e6) of its index file, and number of records."""
    from avcl_jax.data.record_index import index_path
    from avcl_jax.data.records import RecordDataset
    from benchmarks.footage import NAME

    begin = time.perf_counter()
    records = RecordDataset(directory, "train")
    seconds = time.perf_counter() - begin
    size = Path(index_path(directory, NAME, "train")).stat().st_size
    return {"seconds": seconds, "megabytes": size / 1e6, "records": len(records)}


def first_batch(*, directory: str) -> dict[str, float]:
    """Seconds from the start of the process to each stage of the demo's first batch."""
    from avcl_jax import experiment
    from avcl_jax.configs import pretrain
    from avcl_jax.data.pipeline import train_batches
    from avcl_jax.data.records import RecordDataset
    from avcl_jax.data.selection import UsableRecords

    imported = seconds_since_start()
    config = pretrain.get_config()
    spec = experiment.render_spec(config)
    source = UsableRecords(RecordDataset(directory, config.data.split), spec)
    opened = seconds_since_start()
    batches = train_batches(
        source,
        spec,
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        workers=config.execution.workers,
        threads=config.execution.threads,
    )
    next(iter(batches))
    return {"imports": imported, "open": opened, "first_batch": seconds_since_start()}
