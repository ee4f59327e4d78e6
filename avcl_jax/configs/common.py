"""Choice of a preset by its name, and sections that tasks share."""

from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from avcl_jax import compilation_cache, weights
from avcl_jax.configs import datasets

# Name → function that returns the preset, or the one that it changes, and changes by setting.
Presets = Mapping[str, tuple[Callable[[], ConfigDict], Mapping[str, Any]]]


def choose(
    preset: str,
    presets: Presets,
    *,
    data: Callable[[str], ConfigDict] | None = None,
    name: str = "{}",
) -> ConfigDict:
    """Returns the config of `--config=FILE:PRESET`, locked.

    `data` returns the section `data` of a preset that is a row of `datasets.DATASETS`; `name` is
    that of the config and its workdir, with {} for the preset.
    """
    datasets.check_preset(preset, presets)
    function, changes = presets[preset]
    config = function()
    if data is not None and preset in datasets.DATASETS:
        config.data = data(preset)
    config.update_from_flattened_dict({"name": name.format(preset), **changes})
    return config.lock()


def execution(**settings: bool | int | str | tuple[str, ...]) -> ConfigDict:
    """Returns the section `execution`: how and where a task runs; no setting changes results.

    Args:
        workers: processes that render records; 0 renders in threads, which suits few cores.
        threads: records rendered at a time without workers.
        max_bad_records: unreadable records that are left out; one more stops the run.
        chunk: records encoded at a time, over all devices of a host.
        part_records: records per file of computed features; an interrupted task resumes from them.
        fsdp: devices over which parameters are split.
        remat: what the backward pass computes again instead of keeping it: "none", "norms"
            (normalisation and activation) or "blocks" (convolutions too). docs/large_batches.md
        log_every: steps between lines of metrics.
        checkpoint_every: steps between checkpoints.
        keep_checkpoints: newest checkpoints that are kept.
        on_nan: "stop", or "skip" to return to the newest checkpoint and leave out the batches of
            the log period that was not finite, at most 10 times in a run.
        profile_step: first of three steps that are profiled; 0 for none.
        accept_changes: resume with other values of settings that may change during a run.
        writers: functions `module:function` that open further writers of metrics.
            docs/reliability.md
    """
    # Compiled programs are kept here for the next start; "" keeps none. Process 0 writes, so hosts
    # of a pod need one that all see: gs://bucket/xla. JAX_COMPILATION_CACHE_DIR goes first.
    return ConfigDict(settings | {"compilation_cache": compilation_cache.DIRECTORY})


def protocol(task: str, name: str) -> ConfigDict:
    """Returns the settings that every protocol of an encoder reads; `task` is its function."""
    c = ConfigDict(dict(task=task, name=name, seed=0, bootstrap=dict(resamples=1000)))
    # Name of shipped encoders, workdir of a run, directory of its export, or imported weights.
    c.encoder = weights.DEFAULT
    c.execution = execution(threads=2, chunk=16, part_records=1024)
    return c


def linear_probe() -> ConfigDict:
    """Returns the settings of the linear probe, `evaluation.linear`."""
    p = ConfigDict(dict(iterations=500, tolerance=1e-5, folds=5))  # folds of the training sources
    p.costs = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # C is chosen from these by the folds
    return p
