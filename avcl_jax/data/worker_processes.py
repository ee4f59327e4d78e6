"""Worker processes that render batches beside training."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading

import grain

from avcl_jax.data import shared_memory

_SMALL_BYTES = 1 << 16


def in_workers(dataset: grain.IterDataset, *, workers: int, prefetch: int) -> grain.IterDataset:
    """Returns a dataset whose elements are made by worker processes.

    Args:
        dataset: dataset of dicts of arrays, of which large ones may be a `SharedArray`.
        workers: number of processes, at least 1.
        prefetch: elements that each keeps ready.
    """
    # Masks and labels travel through the queue: shared memory of their own would cost each of them
    # a page, two system calls and a name that a killed run leaves behind.
    small = grain.experimental.DatasetOptions(min_shm_size=_SMALL_BYTES)
    return (
        grain.experimental.WithOptionsIterDataset(dataset, small)
        .mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch),
            worker_init_fn=_follow_training,
        )
        .map(shared_memory.Receive())
    )


def _follow_training(worker: int, workers: int) -> None:
    """Makes a worker process end when the training process ends, and for no other reason.

    Ctrl-C, `timeout` and SLURM signal all processes of a run. If the signal ended a worker while it
    sends a batch, the training process would wait for the rest for ever. If the training process
    was killed, a worker would wait for ever too, and keep its shared memory.
    """
    del worker, workers
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    def end() -> None:
        training = multiprocessing.parent_process()
        assert training is not None
        training.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()
