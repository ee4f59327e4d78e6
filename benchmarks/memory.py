"""What reading takes beside time on the processor: memory, and waiting for the first batch."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from benchmarks import measure


def peak_gigabytes(*, directory: str, workers: int, threads: int, count: int) -> dict[str, Any]:
    """Largest resident memory of the pipeline with all its worker processes.

    Memory that processes share is counted for each of them.

    Returns:
        GB (1e9 bytes) of the `main` process, of each of the `workers`, and in `total`.
    """
    import psutil

    from benchmarks import rendering

    batches = rendering.pipeline(directory, workers=workers, threads=threads)
    for _ in range(count):
        next(batches)

    def peak(process: psutil.Process) -> float:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024 / 1e9
        return 0.0

    mine = peak(psutil.Process())
    others = [peak(child) for child in psutil.Process().children(recursive=True)]
    return {
        "main": round(mine, 3),
        "workers": [round(other, 3) for other in others],
        "total": round(mine + sum(others), 3),
    }


def open_index(*, directory: str) -> dict[str, float]:
    """Seconds to open a data set, megabytes (1e6) of its index file, and its records."""
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
    from avcl_jax.data.pipeline import train_batches
    from avcl_jax.data.records import RecordDataset
    from avcl_jax.data.selection import UsableRecords
    from configs import pretrain

    imported = measure.seconds_since_start()
    config = pretrain.get_config()
    source = UsableRecords(
        RecordDataset(directory, config.data.split), experiment.render_spec(config)
    )
    opened = measure.seconds_since_start()
    batches = train_batches(
        source,
        experiment.render_spec(config),
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        workers=config.execution.workers,
        threads=config.execution.threads,
        prefetch=config.execution.prefetch,
    )
    next(iter(batches))
    return {"imports": imported, "open": opened, "first_batch": measure.seconds_since_start()}
