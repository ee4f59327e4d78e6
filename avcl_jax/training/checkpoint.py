"""Checkpoints by orbax: the state, the position in the data, and the config they belong to.

Orbax notices neither a changed byte in an array nor every missing file, so each checkpoint contains
the checksums of its files.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import crc32c
import flax.serialization
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from avcl_jax import experiment
from avcl_jax.errors import UserError, one_line
from avcl_jax.objectives import feature_bank
from avcl_jax.objectives.feature_bank import FeatureBank
from avcl_jax.paths import absolute_path, is_remote, write_bytes
from avcl_jax.training.state import TrainState
from avcl_jax.versions import versions

_CHECKSUMS = "checksums.json"
_COMMITTED = "commit_success.txt"  # written last, by orbax
_INCOMPLETE = "it is not complete"
_BLOCK = 1 << 24
_METADATA = 1 << 20
_NICENESS = 10
_UNWRITTEN = (
    "RESOURCE_EXHAUSTED",
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "ABORTED",
    "PERMISSION_DENIED",
)


class CheckpointError(UserError):
    """A workdir from which no run can resume."""


class SaveError(UserError):
    """A checkpoint that could not be written; those before are as they were."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """Progress of a run, saved with the state."""

    step: int  # steps taken; the next batch has this number, which is the position in the data
    train_seconds: float  # of all starts
    data_fingerprint: str  # of the records; a position means nothing in other data
    devices: int  # over which the bank's rows were laid out
    # Older checkpoints lack these.
    unreadable: Sequence[int] = ()  # records that any process could not read
    bank_labels: Sequence[str] | None = None  # of the columns of the bank's labels


def check_place(workdir: epath.Path) -> None:
    """Refuses object stores in which orbax cannot write arrays, before anything is written there.

    Raises:
        CheckpointError: naming what can be used.
    """
    if is_remote(workdir) and not str(workdir).startswith("gs://"):
        raise CheckpointError(
            f"checkpoints cannot be saved in {workdir}: orbax writes to local disks and gs://; "
            "give --workdir on one of these, such as a mounted bucket"
        )


def check_config(
    workdir: epath.Path,
    config_json: str,
    *,
    resumes: bool = True,
    record_changes: Callable[[list[str]], None] | None = None,
    accept_changes: bool = False,
) -> None:
    """Writes config.json and versions.json into the workdir, unless it has another run's.

    A run may be resumed by another version; one line says so.

    Args:
        config_json: text of config.json.
        resumes: the workdir contains something that other settings would continue.
        record_changes: records accepted differences; None for a task that accepts none.
        accept_changes: accept differences in settings that may change during a run.

    Raises:
        CheckpointError: naming the differences that decide results.
    """
    path = workdir / "config.json"
    old = path.read_text() if resumes and path.exists() else config_json
    if lines := experiment.decisive_differences(old, config_json):
        fixed = [line for line in lines if not experiment.may_change(line.split(":")[0])]
        problem, way = f"{workdir} contains a run of another config", "choose another --workdir"
        if record_changes is None:
            raise CheckpointError(f"{problem}: {way}, or undo {'; '.join(lines)}")
        if fixed:
            names = ", ".join(line.split(":")[0] for line in fixed)
            undo = "; ".join(fixed if accept_changes else lines)
            raise CheckpointError(f"{problem}: {names} cannot change; {way}, or undo {undo}")
        if not accept_changes:
            raise CheckpointError(
                f"{problem}: {way}, resume with the changes by "
                f"--config.execution.accept_changes=True, or undo {'; '.join(lines)}"
            )
        record_changes(lines)
    if jax.process_index():
        return
    write_bytes(path, config_json.encode())
    now, path = json.dumps(versions(), indent=1), workdir / "versions.json"
    before = path.read_text() if resumes and path.exists() else now
    if lines := experiment.differences(before, now):
        print(f"{workdir} was begun with other versions: {'; '.join(lines)}", flush=True)
    write_bytes(path, now.encode())


class Checkpoints:
    """WORKDIR/checkpoints, written while training continues; the newest `keep` are kept.

    Those that are newer than the newest good one get names WORKDIR/damaged_checkpoint_STEP_TIME.
    As a context manager it waits for the last checkpoint.

    Raises:
        CheckpointError: if all are damaged.
    """

    def __init__(self, workdir: epath.Path, *, keep: int) -> None:
        _set_damaged_aside(workdir)
        self._directory = absolute_path(workdir) / "checkpoints"
        self._directory.mkdir(parents=True, exist_ok=True)
        self._keep = keep
        self._manager = self._open()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint", _yield_to_others)
        self._hook, sys.unraisablehook = sys.unraisablehook, self._print_unraisable
        self._unfinished: tuple[int, concurrent.futures.Future[None]] | None = None

    def _open(self) -> ocp.CheckpointManager:
        # With named processes orbax waits for the others by the coordinator, which a thread may do
        # while the step runs collectives; without, by a collective of its own.
        everyone = set(range(jax.process_count()))
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep,
            create=False,
            multiprocessing_options=ocp.options.MultiprocessingOptions(active_processes=everyone),
        )
        # Weights hardly compress, and that takes as long as all else.
        together = {"multiprocessing_options": options.multiprocessing_options}
        handlers = {
            "state": ocp.PyTreeCheckpointHandler(use_compression=False, **together),
            "progress": ocp.JsonCheckpointHandler(**together),
        }
        return ocp.CheckpointManager(self._directory, options=options, item_handlers=handlers)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self.finish()
        except SaveError as unsaved:
            if error is None:
                raise
            print(unsaved, flush=True)  # beside the error that ends the run
        finally:
            self._thread.shutdown()
            self._manager.close()
            sys.unraisablehook = self._hook

    def _print_unraisable(self, error: Any) -> None:
        """Prints no errors of arrays that were being written when another one failed.

        TensorStore tells each of them to the event loop of orbax, which that failure has closed.
        """
        if str(error.exc_value) != "Event loop is closed":
            self._hook(error)

    def latest_step(self) -> int | None:
        """Returns the step of the newest checkpoint, which may be unfinished."""
        return self._manager.latest_step()

    def kept(self) -> str:
        """Says which checkpoint a run would resume from."""
        newest = self.latest_step()
        return "no checkpoint was written" if newest is None else f"checkpoint {newest} is kept"

    def save(self, state: TrainState, progress: Progress) -> None:
        """Writes a checkpoint while the caller continues, unless there is one of this step.

        Args:
            state: not to be donated.

        Raises:
            SaveError: if the checkpoint before could not be written.
        """
        self.finish()
        if self.latest_step() != progress.step:
            self._unfinished = progress.step, self._thread.submit(self._write, state, progress)

    def _write(self, state: TrainState, progress: Progress) -> None:
        """Writes a checkpoint and its checksums."""
        _check_room(self._directory, state)
        saved = {
            "state": ocp.args.PyTreeSave(state),
            "progress": ocp.args.JsonSave(dataclasses.asdict(progress)),
        }
        self._manager.save(progress.step, args=ocp.args.Composite(**saved))
        self._manager.wait_until_finished()
        if jax.process_index() == 0:
            directory = self._directory / str(progress.step)
            text = json.dumps(_checksums(directory), indent=1)
            write_bytes(directory / _CHECKSUMS, text.encode())

    def finish(self, *, wait: bool = True) -> None:
        """Waits until the last checkpoint is complete; without `wait` only looks whether it is.

        Raises:
            SaveError: if it could not be written; those before are as they were.
        """
        if self._unfinished is None or not (wait or self._unfinished[1].done()):
            return
        (step, written), self._unfinished = self._unfinished, None
        with self._naming(step):
            written.result()

    @contextlib.contextmanager
    def _naming(self, step: int) -> Iterator[None]:
        """Turns errors of writing into a `SaveError`, and removes what was written."""
        try:
            yield
        except (OSError, ValueError) as error:
            # TensorStore raises ValueError, which begins with the code of absl.
            known = isinstance(error, OSError | SaveError) or str(error).startswith(_UNWRITTEN)
            if not known:
                raise
            if jax.process_index() == 0:  # so that what was written takes no space
                for path in (self._directory / str(step), *self._directory.glob(f"{step}.*")):
                    path.rmtree(missing_ok=True)
            self._manager = self._open()  # the other would raise this error for ever
            if isinstance(error, OSError) and error.errno and error.filename is None:
                error.filename = str(self._directory)  # a write does not say where
            line = f"step {step} is not saved, {self.kept()}: {one_line(error)}"
            raise SaveError(line) from error

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Restores the state of `step` with the shapes, dtypes and shardings of `like`.

        Raises:
            CheckpointError: if the saved state has another structure or other shapes.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        wanted = ocp.checkpoint_utils.construct_restore_args(abstract)
        args = ocp.args.PyTreeRestore(abstract, restore_args=wanted)
        try:
            return self._manager.restore(step, args=ocp.args.Composite(state=args))["state"]
        except ValueError as error:
            raise CheckpointError(
                f"checkpoint {step} of {self._directory} does not fit this model: {one_line(error)}"
            ) from error


def _yield_to_others() -> None:
    """Lets threads that train and render come first: orbax takes milliseconds for every array.

    On Linux each thread has a priority of its own; those that it starts inherit it.
    """
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


def _check_room(directory: epath.Path, state: TrainState) -> None:
    """Refuses to begin what does not fit: orbax would print a hundred lines for each file."""
    if is_remote(directory):
        return
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + _METADATA
    if needed > (free := shutil.disk_usage(directory).free):
        raise SaveError(
            f"{directory} has room for {free / 1e6:,.1f} MB of a checkpoint of {needed / 1e6:,.1f} "
            "MB: free some space"
        )


def damage(checkpoint: epath.Path) -> str | None:
    """Describes damage to the files of a checkpoint; returns None if there is none.

    One without checksums is good if orbax had committed it: the process was killed just then.
    """
    if not (checkpoint / _CHECKSUMS).exists():
        return None if (checkpoint / _COMMITTED).exists() else _INCOMPLETE
    try:
        expected = json.loads((checkpoint / _CHECKSUMS).read_text())
    except ValueError:
        return f"{_CHECKSUMS} cannot be read"
    actual = _checksums(checkpoint)
    for name, (size, checksum) in expected.items():
        if name not in actual:
            return f"{name} is missing"
        if actual[name][0] != size:
            return f"{name} has {actual[name][0]:,} bytes instead of {size:,}"
        if actual[name][1] != checksum:
            return f"{name} has changed"
    return None


def _checksums(checkpoint: epath.Path) -> dict[str, list[int]]:
    """Returns size and CRC-32C of every file of a checkpoint, by its path in it."""
    sums = {}
    for path in _files(checkpoint):
        if path.name == _CHECKSUMS or path.name.endswith(".tmp"):
            continue
        size = checksum = 0
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                size, checksum = size + len(block), crc32c.crc32c(block, checksum)
        sums[str(path.relative_to(checkpoint))] = [size, checksum]
    return sums


def _files(directory: epath.Path) -> Iterator[epath.Path]:
    """Yields the files at any depth, by name; epath has no recursive glob."""
    for path in sorted(directory.iterdir()):
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def _steps(directory: epath.Path) -> list[int]:
    """Returns the steps of the checkpoints in a directory, the newest first."""
    names = [path.name for path in directory.iterdir()] if directory.exists() else []
    return sorted(map(int, filter(str.isdecimal, names)), reverse=True)


def _set_damaged_aside(workdir: epath.Path) -> None:
    """Moves damaged checkpoints that are newer than the newest good one, in process 0."""
    directory, damaged, lost = workdir / "checkpoints", {}, False
    if jax.process_index() == 0:
        steps = _steps(directory)
        for step in steps:
            if (problem := damage(directory / str(step))) is None:
                break
            damaged[step] = problem
        # On a disk a checkpoint gets its name when it is complete, in an object store before.
        unfinished = is_remote(directory) and set(damaged.values()) == {_INCOMPLETE}
        lost = bool(steps) and len(damaged) == len(steps) and not unfinished
        if not lost:
            for step, problem in damaged.items():
                aside = workdir / f"damaged_checkpoint_{step}_{time.time():.0f}"
                (directory / str(step)).rename(aside)
                print(f"checkpoint {step} is damaged ({problem}): moved to {aside}", flush=True)
    if jax.process_count() > 1:
        lost = bool(multihost_utils.broadcast_one_to_all(np.array(lost)))
    if lost:
        problems = "; ".join(f"{step}: {problem}" for step, problem in damaged.items())
        raise CheckpointError(
            f"every checkpoint in {directory} is damaged ({problems or 'process 0 says how'}): "
            "restore the files, or choose another --workdir"
        )


def load_variables(workdir: epath.PathLike) -> tuple[dict[str, Any], int]:
    """Parameters and statistics of the newest checkpoint of a run, as numpy arrays on the host.

    Where their averages were kept, these.

    Returns:
        ({"params", "batch_stats"}, step).

    Raises:
        CheckpointError: if there is no checkpoint.
    """
    state, step = load_state(workdir)
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
    state, _ = load_state(workdir)
    if state["bank"] is None:
        raise CheckpointError(f"the run in {workdir} has no feature bank: bank.size was 0")
    like = feature_bank.create(0, 0, np.float32, labels=0)
    try:
        return flax.serialization.from_state_dict(like, state["bank"])
    except ValueError as error:
        raise CheckpointError(
            f"the feature bank in {workdir} has another format ({error}): pretrain again"
        ) from error


def load_state(workdir: epath.PathLike) -> tuple[dict[str, Any], int]:
    """State in the newest checkpoint of a run, as nested dicts of numpy arrays, and its step.

    Raises:
        CheckpointError: if there is no checkpoint.
    """
    directory = absolute_path(workdir) / "checkpoints"
    if not directory.exists():
        raise CheckpointError(f"{workdir} has no checkpoints: pretrain with this --workdir first")
    complete = (s for s in _steps(directory) if (directory / str(s) / _COMMITTED).exists())
    if (step := next(complete, None)) is None:
        raise CheckpointError(f"{directory} is empty: pretrain with this --workdir first")
    if problem := damage(directory / str(step)):
        raise CheckpointError(
            f"checkpoint {step} in {directory} is damaged ({problem}): the command that trained it "
            "resumes from an older one"
        )
    path = directory / str(step) / "state"
    # Not a Checkpointer, which warns that metadata of the whole checkpoint are not in this part.
    handler = ocp.PyTreeCheckpointHandler()
    tree = handler.metadata(path).tree
    # As numpy, whatever devices the run had: a laptop can read a pod's checkpoint.
    restore_args = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
        tree,
        is_leaf=lambda leaf: not isinstance(leaf, dict | list | tuple),
    )
    args = ocp.args.PyTreeRestore(restore_args=restore_args)
    return handler.restore(path, args=args), step
