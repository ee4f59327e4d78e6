"""Choice of a preset by its name, and sections that tasks share."""

from collections.abc import Callable

from ml_collections import ConfigDict

from avcl_jax.errors import UserError


def choose(preset: str, *presets: Callable[[], ConfigDict], name: str = "{}") -> ConfigDict:
    """Returns the config of `--config=FILE:PRESET`, locked.

    Args:
        presets: functions with the names of their presets.
        name: name of the config, after which its workdir is named, with {} for the preset; a
            preset that sets one keeps it.
    """
    by_name = {function.__name__: function for function in presets}
    if preset not in by_name:
        raise UserError(f"unknown preset {preset!r}: use one of {', '.join(by_name)}")
    config = by_name[preset]()
    if "name" not in config:
        config.name = name.format(preset)
    return config.lock()


def execution(**settings: int | str) -> ConfigDict:
    """Returns the section `execution`: how and where a task runs; no setting changes results.

    Args:
        workers: processes that render records; 0 renders in threads, which suits few cores.
        threads: records rendered at a time, by each worker.
        prefetch: batches kept ready.
        max_bad_records: unreadable records that are left out; one more stops the run.
        chunk: records encoded at a time, over all devices of a host.
        part_records: records per file of computed features; an interrupted task resumes from them.
        fsdp: devices over which parameters are split.
        remat: what the backward pass computes again instead of keeping it: "none", "norms"
            (normalisation and activation) or "blocks" (convolutions too). docs/large_batches.md
        log_every: steps between lines of metrics.
        checkpoint_every: steps between checkpoints.
        keep_checkpoints: newest checkpoints that are kept.
    """
    # Compiled programs are kept here for the next start; "" keeps none. Only process 0 writes, so
    # hosts of a pod need a directory that all of them see: gs://bucket/xla. JAX's own variable
    # JAX_COMPILATION_CACHE_DIR goes first.
    return ConfigDict(settings | {"compilation_cache": "~/.cache/avcl_jax/xla"})


def protocol(task: str, name: str) -> ConfigDict:
    """Returns the settings that every protocol of an encoder reads; `task` is its function."""
    c = ConfigDict(dict(task=task, name=name, seed=0, bootstrap=dict(resamples=1000)))
    c.encoder = "runs/demo"  # workdir of a run, directory of its export, or imported weights
    c.execution = execution(threads=2, chunk=16, part_records=1024)
    return c


def linear_probe() -> ConfigDict:
    """Returns the settings of the linear probe, `evaluation.linear`."""
    p = ConfigDict(dict(iterations=500, tolerance=1e-5))
    p.costs = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # candidates for C
    p.folds = 5  # of the training sources, by which C is chosen
    return p
