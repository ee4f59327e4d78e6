"""State with which a start of training begins: that of a checkpoint, or parts of another run's."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from avcl_jax import experiment
from avcl_jax.errors import UserError
from avcl_jax.objectives import feature_bank
from avcl_jax.paths import absolute_path
from avcl_jax.training.checkpoint import Checkpoints, Progress, load_state, read_progress
from avcl_jax.training.state import TrainState


def resumed_state(
    checkpoints: Checkpoints,
    progress: Progress,
    like: TrainState,
    shardings: Any,
    config: ml_collections.ConfigDict,
    *,
    shards: int,
) -> TrainState:
    """Restores the state of a checkpoint, its bank with the labels and devices of this start.

    Args:
        progress: progress in the checkpoint.
        like: state with the shapes of this start.
        shardings: shardings of `like`.
        shards: devices over which the bank is laid out.
    """
    if like.bank is None:
        return checkpoints.restore(progress.step, like)
    labels = tuple(config.bank.health_labels)
    saved = labels if progress.bank_labels is None else tuple(progress.bank_labels)
    like = dataclasses.replace(like, bank=_relabelled(like.bank, shardings, labels, saved))
    state = checkpoints.restore(progress.step, like)
    bank = _relabelled(state.bank, shardings, saved, labels)
    return dataclasses.replace(
        state, bank=_laid_out(bank, shardings, config, progress.devices, shards)
    )


def _relabelled(bank: Any, shardings: Any, before: tuple[str, ...], after: tuple[str, ...]) -> Any:
    if before == after:
        return bank
    relabel = functools.partial(feature_bank.relabel, before=before, after=after)
    return jax.jit(relabel, out_shardings=shardings.bank)(bank)


def _laid_out(
    bank: Any, shardings: Any, config: ml_collections.ConfigDict, before: int, shards: int
) -> Any:
    if before == shards:
        return bank
    redistribute = functools.partial(
        feature_bank.redistribute, global_batch_size=config.global_batch_size, shards=shards
    )
    return jax.jit(redistribute, out_shardings=shardings.bank)(bank)


def state_from_run(
    state: TrainState,
    shardings: Any,
    config: ml_collections.ConfigDict,
    *,
    data_fingerprint: str,
    shards: int,
) -> tuple[TrainState, dict[str, Any]]:
    """Replaces parts of a new state by those of the newest checkpoint of `config.init_from`.

    These are parameters and statistics; where `config` says so, the optimizer's moments and the
    bank. Steps are counted from 0, so the schedule of the learning rate begins.

    Returns:
        The state, and a description of its origin for the history of the run.

    Raises:
        UserError: naming the first array that does not fit, or why the bank would mean something
            else.
    """
    other = config.init_from
    saved, step = load_state(other)
    parts = ["params", *["batch_stats"] * bool(state.batch_stats)]
    parts += ["opt_state"] * config.init_optimizer + ["bank"] * config.init_bank
    if config.init_bank:
        _check_bank(config, read_progress(other, step), data_fingerprint)
    for part in parts:
        values = _fitted(f"{part} in {other}", getattr(state, part), saved[part])
        placed = jax.tree.map(_place, values, _expand(getattr(shardings, part), values))
        if part == "opt_state":
            placed = _restart_schedule(placed)
        if part == "bank":
            before = read_progress(other, step).devices
            placed = _laid_out(placed, shardings, config, before, shards)
        state = dataclasses.replace(state, **{part: placed})
    return state, {"workdir": other, "step": step, "parts": parts}


def _check_bank(
    config: ml_collections.ConfigDict, progress: Progress, data_fingerprint: str
) -> None:
    """Refuses a bank whose numbers of sources, playbacks or labels are those of other names."""
    path = absolute_path(config.init_from) / "config.json"
    old = experiment.from_json(path.read_text())
    pairs = {
        "the records": (progress.data_fingerprint, data_fingerprint),
        "views.speeds": (tuple(old.views.speeds), tuple(config.views.speeds)),
        "bank.health_labels": (tuple(old.bank.health_labels), tuple(config.bank.health_labels)),
        "global_batch_size": (old.global_batch_size, config.global_batch_size),
    }
    for name, (before, now) in pairs.items():
        if before != now:
            raise UserError(
                f"init_bank: the bank in {config.init_from} belongs to another run: {name} "
                f"{before!r}, here {now!r}; set init_bank=False for an empty bank"
            )


def _fitted(name: str, like: Any, saved: Any) -> Any:
    """Returns the saved arrays in the structure of `like`.

    Raises:
        UserError: naming an array that only one of both has, or of another shape.
    """
    arrays = _by_path(saved)
    wanted = _by_path(like)
    shapes = {path: jnp.shape(value) for path, value in wanted.items()}
    found = {path: jnp.shape(value) for path, value in arrays.items()}
    differing = sorted(
        path for path in shapes.keys() | found.keys() if shapes.get(path) != found.get(path)
    )
    if differing:
        path = differing[0]
        raise UserError(
            f"init_from: {name} does not fit this config: {path or 'it'} has shape "
            f"{found.get(path, '(absent)')}, here {shapes.get(path, '(absent)')}"
        )
    leaves, structure = jax.tree.flatten(like)
    values = [arrays[path].astype(leaf.dtype) for path, leaf in zip(wanted, leaves, strict=True)]
    return jax.tree.unflatten(structure, values)


def _by_path(tree: Any) -> Mapping[str, Any]:
    """Arrays of a tree by their path, the same for tuples and for the dicts that are saved."""
    return {
        "/".join(
            str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in path
        ): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def _expand(shardings: Any, values: Any) -> Any:
    """Shardings of a prefix of a tree, for each of its leaves."""
    return jax.tree.map(
        lambda sharding, part: jax.tree.map(lambda _: sharding, part), shardings, values
    )


def _place(value: Any, sharding: Any) -> jax.Array:
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def _restart_schedule(opt_state: Any) -> Any:
    """Sets the steps that schedules count to 0; the moments keep the number of theirs."""

    def is_schedule(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    return jax.tree.map(
        lambda node: node._replace(count=jnp.zeros_like(node.count)) if is_schedule(node) else node,
        opt_state,
        is_leaf=is_schedule,
    )
