"""Checkpoints by orbax: the state, the position in the data, and the config they belong to."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.serialization
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from avcl_jax import experiment
from avcl_jax.errors import UserError
from avcl_jax.objectives import feature_bank
from avcl_jax.objectives.feature_bank import FeatureBank
from avcl_jax.paths import absolute_path, write_bytes
from avcl_jax.training.state import TrainState


class CheckpointError(UserError):
    """A workdir from which no run can resume."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """Progress of a run, saved with the state."""

    step: int  # steps taken; the next batch has this number, which is the position in the data
    train_seconds: float  # of all starts
    data_fingerprint: str  # of the records; a position means nothing in other data
    devices: int  # over which the bank's rows were laid out


def check_config(workdir: epath.Path, config_json: str, *, resumes: bool = True) -> None:
    """Writes config.json of this start into the workdir, unless it would resume another run's.

    Args:
        config_json: text of config.json.
        resumes: the workdir contains something that other settings would continue.

    Raises:
        CheckpointError: naming the differences that decide results.
    """
    path = workdir / "config.json"
    old = path.read_text() if resumes and path.exists() else config_json
    if lines := experiment.decisive_differences(old, config_json):
        raise CheckpointError(
            f"{workdir} contains a run of another config: choose another --workdir, or undo "
            + "; ".join(lines)
        )
    if jax.process_index() == 0:
        write_bytes(path, config_json.encode())


def open_checkpoints(workdir: epath.Path, *, keep: int) -> ocp.CheckpointManager:
    """Opens or creates WORKDIR/checkpoints, in which the newest `keep` are kept."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, create=True, enable_async_checkpointing=False
    )
    return ocp.CheckpointManager(workdir / "checkpoints", options=options)


def save(manager: ocp.CheckpointManager, state: TrainState, progress: Progress) -> None:
    """Saves everything; returns when it is complete on disk."""
    if manager.latest_step() == progress.step:
        return
    saved = {
        "state": ocp.args.StandardSave(state),
        "progress": ocp.args.JsonSave(dataclasses.asdict(progress)),
    }
    manager.save(progress.step, args=ocp.args.Composite(**saved))
    manager.wait_until_finished()


def restore(manager: ocp.CheckpointManager, step: int, like: TrainState) -> TrainState:
    """Restores the state of `step` with the shapes, dtypes and shardings of `like`.

    Raises:
        CheckpointError: if the saved state has another structure or other shapes.
    """
    abstract = ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, like))
    try:
        return manager.restore(step, args=ocp.args.Composite(state=abstract))["state"]
    except ValueError as error:
        raise CheckpointError(
            f"checkpoint {step} of {manager.directory} does not fit this model: {error}"
        ) from error


def load_variables(workdir: epath.PathLike) -> tuple[dict[str, Any], int]:
    """Parameters and statistics of the newest checkpoint of a run, as numpy arrays on the host.

    Where their averages were kept, these.

    Returns:
        ({"params", "batch_stats"}, step).

    Raises:
        CheckpointError: if there is no checkpoint.
    """
    state, step = _load_state(workdir)
    prefix = "" if state["ema_params"] is None else "ema_"
    return {name: state[prefix + name] for name in ("params", "batch_stats")}, step


def read_progress(workdir: epath.PathLike, step: int) -> Progress:
    """Progress in the checkpoint of `step`."""
    path = absolute_path(workdir) / "checkpoints" / str(step) / "progress"
    return Progress(**ocp.JsonCheckpointHandler().restore(path))


def load_bank(workdir: epath.PathLike) -> FeatureBank:
    """Feature bank of the newest checkpoint, of numpy arrays.

    Raises:
        CheckpointError: if there is no checkpoint, the run kept no bank, or another version of this
            project wrote it.
    """
    state, _ = _load_state(workdir)
    if state["bank"] is None:
        raise CheckpointError(f"the run in {workdir} has no feature bank: bank.size was 0")
    like = feature_bank.create(0, 0, np.float32, labels=0)
    try:
        return flax.serialization.from_state_dict(like, state["bank"])
    except ValueError as error:
        raise CheckpointError(
            f"the feature bank in {workdir} has another format ({error}): pretrain again"
        ) from error


def _load_state(workdir: epath.PathLike) -> tuple[dict[str, Any], int]:
    directory = absolute_path(workdir) / "checkpoints"
    if not directory.exists():
        raise CheckpointError(f"{workdir} has no checkpoints: pretrain with this --workdir first")
    with ocp.CheckpointManager(directory) as manager:
        step = manager.latest_step()
    if step is None:
        raise CheckpointError(f"{directory} is empty: pretrain with this --workdir first")
    path = directory / str(step) / "state"
    checkpointer = ocp.PyTreeCheckpointer()
    tree = checkpointer.metadata(path).item_metadata.tree
    # As numpy, whatever devices the run had: a laptop can read a pod's checkpoint.
    restore_args = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
        tree,
        is_leaf=lambda leaf: not isinstance(leaf, dict | list | tuple),
    )
    state = checkpointer.restore(path, restore_args=restore_args)
    return state, step
