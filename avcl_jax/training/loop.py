"""Pretraining from config to checkpoints: mesh, data, model, state, restore, loop."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
from clu import parameter_overview
from etils import epath

from avcl_jax import experiment, peers
from avcl_jax.data.pipeline import train_batches
from avcl_jax.data.selection import UsableRecords
from avcl_jax.data.workers import check_room
from avcl_jax.errors import UserError
from avcl_jax.paths import absolute_path
from avcl_jax.processes import StopRequest, check_same, stop_request
from avcl_jax.training import sharding
from avcl_jax.training.checkpoint import (
    CheckpointError,
    Checkpoints,
    Progress,
    check_config,
    check_place,
    read_progress,
)
from avcl_jax.training.history import History
from avcl_jax.training.initial_state import resumed_state, state_from_run
from avcl_jax.training.metrics import MetricWriter
from avcl_jax.training.profiler import Profiler
from avcl_jax.training.program import (
    bank_exchange,
    bank_start,
    build,
    loss_spec,
    trained_modalities,
)
from avcl_jax.training.run_steps import CompiledTogether, NonFiniteError, run_steps
from avcl_jax.training.state import TrainState
from avcl_jax.training.step import jit_train_step
from avcl_jax.training.trained_records import UnreadableRecords, open_records
from avcl_jax.training.writers import Open, Writers, find_writers

# Returns to a checkpoint in one run. Data that are the cause are left out by the first one.
_MOST_SKIPS = 10


def pretrain(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> None:
    """Trains from the newest checkpoint of `workdir`, or from the beginning, to `config.steps`.

    Raises:
        CheckpointError: if the directory belongs to a run of another config or other data.
        NonFiniteError: within one log period of the first value that is not finite, unless
            `config.execution.on_nan` is "skip".
        Stopped: after saving, if a signal came.
        RecordError: if more records than `config.execution.max_bad_records` cannot be read.
        UserError: if the config does not fit data or devices.
    """
    workdir = absolute_path(workdir)
    check_place(workdir)
    # From here on, because the first compilation takes minutes.
    with stop_request() as request, contextlib.ExitStack() as opened:
        run = _open(config, workdir, opened)
        while True:
            try:
                return run.train(request)
            except NonFiniteError as error:
                run.skip(error)


@dataclasses.dataclass
class _Run:
    """Opened parts of a run, which begins again from its newest checkpoint after a skip."""

    config: ml_collections.ConfigDict
    workdir: epath.Path
    mesh: Any
    init: Callable[[jax.Array], tuple[TrainState, Any]]
    step: Callable[..., Any]
    source: UsableRecords
    unreadable: UnreadableRecords
    checkpoints: Checkpoints
    history: History
    writers: Mapping[str, Open]
    compiled: CompiledTogether | None = None

    def train(self, request: StopRequest) -> None:
        """Trains from the newest checkpoint, or from the beginning, to the last step."""
        config, run, history = self.config, self.config.execution, self.history
        init_key, step_key = jax.random.split(jax.random.key(config.seed))
        state, shardings = self.init(init_key)
        progress = Progress(0, 0.0, self.source.fingerprint, self.mesh.size)
        if (saved := self.checkpoints.latest_step()) is not None:
            progress = read_progress(self.workdir, saved)
            state = resumed_state(
                self.checkpoints, progress, state, shardings, config, shards=self.mesh.size
            )
            self.unreadable.add(progress.unreadable)
        elif config.init_from:
            state, origin = state_from_run(
                state,
                shardings,
                config,
                data_fingerprint=self.source.fingerprint,
                shards=self.mesh.size,
            )
            if not history.of("init_from"):  # from which it may begin again after a skip
                history.add(0, init_from=origin)
        if self.compiled is None:
            self.compiled = CompiledTogether(jit_train_step(self.step, self.mesh, shardings))
        first = progress.step
        profiler = Profiler(self.workdir, request, at=run.profile_step)
        with (
            Writers(self.writers, config, self.workdir) as writers,
            contextlib.closing(
                MetricWriter(
                    self.workdir,
                    steps=config.steps,
                    first_step=first,
                    warmup_steps=config.optimizer.warmup_steps,
                    also=writers.write,
                )
            ) as writer,
            contextlib.closing(profiler),
            contextlib.closing(self._batches(first)) as batches,
        ):
            summary = _summary(config, state, self.source, self.mesh.size, first)
            writer.note(f"{summary}, workdir {self.workdir}")
            for origin in [] if saved else history.of("init_from"):
                parts = ", ".join(origin["parts"])
                writer.note(f"begins with {parts} of {origin['workdir']} at step {origin['step']}")
            if jax.process_index() == 0:
                table = parameter_overview.get_parameter_overview(
                    state.params, include_stats=False, max_lines=None
                )
                (self.workdir / "parameters.txt").write_text(table + "\n")
            if first >= config.steps:
                writer.note(f"{self.workdir} is already trained to step {first}")
                return
            run_steps(
                state,
                self.compiled,
                batches,
                step_key,
                rows=sharding.rows_sharding(self.mesh),
                request=request,
                steps=config.steps,
                log_every=run.log_every,
                checkpoint_every=run.checkpoint_every,
                clips_per_step=2 * config.global_batch_size,
                progress=dataclasses.replace(
                    progress, devices=self.mesh.size, bank_labels=tuple(config.bank.health_labels)
                ),
                checkpoints=self.checkpoints,
                writer=writer,
                profiler=profiler,
                more_values=lambda: {
                    "unreadable_records": self.unreadable.count,
                    "restarts": len(history.of("start")) - 1,
                },
                more_progress=lambda: {"unreadable": self.unreadable.gather()},
            )

    def _batches(self, first_step: int) -> Generator[dict[str, np.ndarray]]:
        """Yields the batches after a step, without those that the run skips."""
        config, run = self.config, self.config.execution
        read = self.history.batches_read(first_step)
        batches = train_batches(
            self.source,
            experiment.render_spec(config),
            seed=config.seed,
            global_batch_size=config.global_batch_size,
            rows=sharding.local_rows(self.mesh, config.global_batch_size),
            first_step=read,
            workers=run.workers,
            threads=run.threads,
            skip_unreadable=run.max_bad_records > 0,
        )
        with contextlib.closing(batches):
            for number, batch in enumerate(batches, read + 1):
                if number in self.history.skipped:
                    peers.doing(peers.READS, first_step)
                    continue
                self.unreadable.check(batch)
                yield batch

    def skip(self, error: NonFiniteError) -> None:
        """Leaves out the batches of steps that were not finite, from the newest checkpoint on.

        Raises:
            NonFiniteError: if the config does not say so, or the run has done it often enough.
        """
        skips, back = len(self.history.of("skipped_batches")), self.checkpoints.latest_step() or 0
        if self.config.execution.on_nan == "stop":
            raise NonFiniteError(
                f"{error}: --config.execution.accept_changes=True resumes with other settings, "
                "--config.execution.on_nan=skip without these batches",
                error.steps,
            ) from error
        if skips >= _MOST_SKIPS:
            raise NonFiniteError(
                f"{error}. Batches were skipped {skips} times, which is all that "
                "execution.on_nan=skip may do: the data are not the cause",
                error.steps,
            ) from error
        peers.doing("returns to a checkpoint", back)
        first, last = (self.history.batches_read(step) for step in error.steps)
        # Earlier batches keep their numbers, and older checkpoints their positions in the data.
        self.history.add(back, skipped_batches=[first, last])
        if jax.process_index() == 0:
            print(
                f"{error}. Returns to step {back} and skips batches {first} to {last} "
                f"({skips + 1} of at most {_MOST_SKIPS} times)",
                flush=True,
            )


def _open(
    config: ml_collections.ConfigDict, workdir: epath.Path, opened: contextlib.ExitStack
) -> _Run:
    """Opens records, workdir and checkpoints of a run, and compares them with each other."""
    run = config.execution
    if run.on_nan not in ("stop", "skip"):
        raise UserError(f"execution.on_nan {run.on_nan!r} must be 'stop' or 'skip'")
    if (config.init_optimizer or config.init_bank) and not config.init_from:
        raise UserError("init_optimizer and init_bank need init_from: set it to a workdir")
    writers = find_writers(run.writers)
    mesh, init, step = build(config)
    source = open_records(config, mesh)
    check_same({"the data set": source.fingerprint})
    unreadable = UnreadableRecords(source.records, budget=run.max_bad_records)
    rows = config.global_batch_size // jax.process_count()
    check_room(experiment.render_spec(config).batch_shapes(rows), workers=run.workers)
    workdir.mkdir(parents=True, exist_ok=True)
    checkpoints = opened.enter_context(Checkpoints(workdir, keep=run.keep_checkpoints))
    if (saved := checkpoints.latest_step()) is not None:
        trained_on = read_progress(workdir, saved).data_fingerprint
        if trained_on != source.fingerprint:
            raise CheckpointError(
                f"{workdir} was trained on records {trained_on}, {config.data.directory} contains "
                f"{source.fingerprint}: choose another --workdir"
            )
    elif config.init_from and not (absolute_path(config.init_from) / "checkpoints").exists():
        raise UserError(
            f"init_from {config.init_from} has no checkpoints: give the workdir of a pretraining"
        )
    history = History(workdir, resumes=saved is not None)

    def record_changes(lines: list[str]) -> None:
        history.add(saved or 0, changed=lines)
        if jax.process_index() == 0:
            print(f"{workdir} resumes at step {saved} with {'; '.join(lines)}", flush=True)

    check_config(
        workdir,
        experiment.to_json(config),
        resumes=saved is not None,
        record_changes=record_changes,
        accept_changes=run.accept_changes,
    )
    history.add(saved or 0, start={"processes": jax.process_count(), "devices": mesh.size})
    return _Run(
        config, workdir, mesh, init, step, source, unreadable, checkpoints, history, writers
    )


def _summary(
    config: ml_collections.ConfigDict,
    state: TrainState,
    source: UsableRecords,
    devices: int,
    first: int,
) -> str:
    """Returns records, parameters, devices and steps of a run, with remarks on its bank."""
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    trained = trained_modalities(config)
    remarks = [
        f"{n} without {modality}" for modality in trained if (n := source.num_without(modality))
    ]
    left_out = {f"without {' and '.join(trained)}": source.num_empty}
    left_out["too short for a view"] = source.num_too_short
    reasons = [f"{n} {reason}" for reason, n in left_out.items() if n]
    remarks += [f"left out: {', '.join(reasons)}"] if reasons else []
    noted = f" ({'; '.join(remarks)})" if remarks else ""
    bank, start, spec = f"bank {config.bank.size} rows", bank_start(config), loss_spec(config)
    if start is not None and start >= config.steps:
        bank += f" (never used: it starts after step {start})"
    if devices > 1 and spec.bank is not None and spec.bank_terms:
        moved = bank_exchange(config, devices)
        bank += (
            f" ({'merged' if moved.merge < moved.gather else 'gathered'}: merging nearest rows "
            f"would move {moved.merge / 1e6:.1f} MB per device and step, gathering the bank "
            f"{moved.gather / 1e6:.1f} MB)"
        )
    return (
        f"{config.name}: {len(source)} videos{noted} from {config.data.directory}, "
        f"{count / 1e6:.2f} M parameters, {devices} {jax.default_backend()} device(s), "
        f"{jax.process_count()} process(es), batch {config.global_batch_size} x 2 views, {bank}, "
        f"steps {first} to {config.steps}"
    )
