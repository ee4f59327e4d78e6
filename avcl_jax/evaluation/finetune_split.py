"""One split of a benchmark: train a classifier to the last step, test it once."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from etils import epath

from avcl_jax import experiment
from avcl_jax.data.labelled import (
    ClipSpec,
    LabelledRecords,
    RenderRandomClips,
    VideoClipSpec,
    fixed_clips,
)
from avcl_jax.data.pipeline import drawn_batches, to_device_batch
from avcl_jax.encoder_source import EncoderSource
from avcl_jax.errors import UserError
from avcl_jax.evaluation.classifier import (
    ClipClassifier,
    Inputs,
    classifier_step,
    create_classifier_state,
    mean_softmax,
    scale_updates,
)
from avcl_jax.evaluation.recognition import Fold
from avcl_jax.evaluation.written import write_bytes
from avcl_jax.training import sharding
from avcl_jax.training.checkpoint import Checkpoints, Progress, check_config
from avcl_jax.training.metric_writer import MetricWriter
from avcl_jax.training.optimizer import create_optimizer, warmup_cosine, warmup_multistep
from avcl_jax.training.run_steps import Pace, run_steps
from avcl_jax.training.state import TrainState

_PREDICTIONS = "predictions.npz"
# Sections that decide what is tested and written, not what is trained.
_NOT_TRAINING = ("test", "bootstrap")


def check_split(
    config: ml_collections.ConfigDict,
    workdir: epath.Path,
    source: EncoderSource,
    train: LabelledRecords,
) -> None:
    """Refuses a split whose training could not begin, before another split is trained.

    Args:
        config: of the run.
        workdir: of this split.
        source: encoders to begin with.
        train: records to train on.

    Raises:
        CheckpointError: if `workdir` belongs to another training.
        UserError: if settings contradict each other.
    """
    optimizer_of(config, len(train))
    if (workdir / "config.json").exists():
        _check_training(config, workdir, source, train)


def run_split(
    config: ml_collections.ConfigDict,
    workdir: epath.Path,
    number: int,
    source: EncoderSource,
    spec: ClipSpec,
    train: LabelledRecords,
    test: LabelledRecords,
) -> Fold | None:
    """Trains on one split and tests once; what is already there is not done again.

    Args:
        config: of the run.
        workdir: of this split.
        number: of this split, from 1; it decides the draws.
        source: encoders to begin with.
        spec: clips.
        train: records to train on.
        test: records to test, read after the last step.

    Returns:
        What was predicted; None if a signal stopped the training after saving.

    Raises:
        CheckpointError: if `workdir` belongs to another training.
        NonFiniteError: if the loss stops being a number.
        RecordError: if a record cannot be read.
        UserError: if settings contradict each other.
    """
    mesh = sharding.create_mesh(config.mesh.fsdp)
    encoder = source.require(config.modality)
    classifier = ClipClassifier(
        encoder=encoder.module.clone(dtype=jnp.dtype(config.model.dtype), remat=config.model.remat),
        classes=len(train.class_names),
        dropout=config.head.dropout,
        train_statistics=_trains_statistics(config),
    )
    augmentation = (experiment.photometric_spec(config), experiment.spectral_spec(config))
    inputs = Inputs(spec, encoder.preprocess, augmentation)
    state = _train(config, workdir, number, source, classifier, inputs, train, mesh)
    if state is None:
        return None
    settings = json.dumps([config.test.clips, config.test.crops, test.fingerprint])
    path = workdir / _PREDICTIONS
    probabilities = _read_predictions(path, settings)
    if probabilities is None:
        if jax.process_index() == 0:
            print(f"testing {len(test)} records of {test}", flush=True)
        probabilities = predict(
            classifier,
            {"params": state.params, "batch_stats": state.batch_stats},
            inputs,
            test,
            clips=config.test.clips,
            crops=config.test.crops,
            chunk=config.test.chunk,
            threads=max(config.data.threads, config.data.workers),
            mesh=mesh,
        )
        if jax.process_index() == 0:
            buffer = io.BytesIO()
            ids = [test.records.record_ids[index] for index in test.indices.tolist()]
            np.savez_compressed(
                buffer,
                records=np.array(ids, np.str_),
                classes=test.classes,
                probabilities=probabilities,
                settings=settings,
            )
            write_bytes(path, buffer.getvalue())
    return Fold(f"split{number}", source, train, test, probabilities, workdir / "metrics.jsonl")


def _trains_statistics(config: ml_collections.ConfigDict) -> bool:
    if config.batch_norm not in ("train", "frozen"):
        raise UserError(f"batch_norm {config.batch_norm!r} must be 'train' or 'frozen'")
    return config.batch_norm == "train"


def optimizer_of(
    config: ml_collections.ConfigDict, records: int
) -> tuple[optax.GradientTransformation, optax.Schedule, int]:
    """Optimizer, learning rate by step, and number of steps for so many training records.

    Raises:
        UserError: if a name is unknown, or warm-up and milestones do not fit the epochs.
    """
    section = config.optimizer

    def steps_of(epochs: float) -> int:
        return round(epochs * records / config.global_batch_size)

    steps = max(steps_of(config.epochs), 1)
    warmup = steps_of(section.warmup_epochs)
    if section.schedule == "cosine":
        schedule = warmup_cosine(
            learning_rate=section.learning_rate, warmup_steps=warmup, steps=steps
        )
    elif section.schedule == "multistep":
        schedule = warmup_multistep(
            learning_rate=section.learning_rate,
            warmup_steps=warmup,
            milestones=[steps_of(epoch) for epoch in section.milestones],
            factor=section.factor,
        )
    else:
        raise UserError(f"optimizer.schedule {section.schedule!r} must be 'cosine' or 'multistep'")
    optimizer = optax.chain(
        create_optimizer(
            name=section.name,
            schedule=schedule,
            weight_decay=section.weight_decay,
            momentum=section.momentum,
            beta2=section.beta2,
            clip_norm=section.clip_norm,
        ),
        scale_updates(head_factor=section.head_factor, head_steps=steps_of(section.head_epochs)),
    )
    return optimizer, schedule, steps


def _train(
    config: ml_collections.ConfigDict,
    workdir: epath.Path,
    number: int,
    source: EncoderSource,
    classifier: ClipClassifier,
    inputs: Inputs,
    train: LabelledRecords,
    mesh: Any,
) -> TrainState | None:
    """Trains to the last step from the newest checkpoint; None if a signal stopped it."""
    sharding.check_batch(config.global_batch_size, mesh, 1)
    optimizer, schedule, steps = optimizer_of(config, len(train))
    key = jax.random.fold_in(jax.random.key(config.seed), number)
    head_key, step_key = jax.random.split(key)
    state, shardings, mask = create_classifier_state(
        classifier,
        optimizer,
        source.require(config.modality),
        input_shape=input_shape(inputs.spec),
        freeze=tuple(config.freeze),
        key=head_key,
        mesh=mesh,
    )
    # Asked here, so that a mistake in the settings above leaves no directory behind.
    workdir.mkdir(parents=True, exist_ok=True)
    _check_training(config, workdir, source, train)
    checkpoints = Checkpoints(workdir, keep=config.keep_checkpoints)
    progress = Progress(0, 0.0, train.fingerprint, mesh.size)
    if (saved := checkpoints.latest_step()) is not None:
        progress = dataclasses.replace(checkpoints.restore_progress(saved), devices=mesh.size)
        state = checkpoints.restore(saved, state)
    if progress.step >= steps:
        checkpoints.close()
        return state
    writer = MetricWriter(workdir, steps=steps, first_step=progress.step)
    leaves = zip(jax.tree.leaves(state.params), jax.tree.leaves(mask), strict=True)
    trained = sum(leaf.size for leaf, used in leaves if used)
    writer.note(
        f"{config.name}, {workdir.name}: {len(train)} records of {len(train.class_names)} classes, "
        f"{trained / 1e6:.3f} M trained parameters, batch {config.global_batch_size}, steps "
        f"{progress.step} to {steps}"
    )
    step = classifier_step(
        classifier,
        optimizer,
        inputs,
        mask=mask,
        schedule=schedule,
        label_smoothing=config.label_smoothing,
        mesh=mesh,
        shardings=shardings,
    )
    state, complete = run_steps(
        state,
        lambda state, batch: step(state, batch, step_key),
        training_batches(config, number, inputs.spec, train, progress.step),
        rows=sharding.rows_sharding(mesh),
        pace=Pace(steps, config.log_every, config.checkpoint_every, config.global_batch_size),
        progress=progress,
        checkpoints=checkpoints,
        writer=writer,
        also=dict,
    )
    checkpoints.close()
    writer.close()
    return state if complete else None


def training_batches(
    config: ml_collections.ConfigDict,
    number: int,
    spec: ClipSpec,
    train: LabelledRecords,
    first_step: int,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless local rows of random clips of `train`, from a step on."""
    seed = int(np.random.SeedSequence([config.seed, number]).generate_state(1)[0])
    section = config.data
    return iter(
        drawn_batches(
            len(train),
            RenderRandomClips(train, spec, shared=section.workers > 0),
            seed=seed,
            global_batch_size=config.global_batch_size,
            host=jax.process_index(),
            hosts=jax.process_count(),
            first_step=first_step,
            workers=section.workers,
            threads=section.threads,
            prefetch=section.prefetch,
        )
    )


def input_shape(spec: ClipSpec) -> tuple[int, ...]:
    """Shape of what the encoder takes of one clip."""
    if isinstance(spec, VideoClipSpec):
        return spec.shape
    return spec.log_mel.frames, spec.log_mel.mels


def _check_training(
    config: ml_collections.ConfigDict,
    workdir: epath.Path,
    source: EncoderSource,
    train: LabelledRecords,
) -> None:
    """Refuses to go on with a training of other settings, another encoder or other records."""
    settings = {k: v for k, v in config.to_dict().items() if k not in _NOT_TRAINING}
    settings |= {"encoder_fingerprint": source.fingerprint, "records": train.fingerprint}
    text = json.dumps(settings, indent=2, sort_keys=True)
    path = workdir / "config.json"
    differing = []
    if path.exists():
        differing = experiment.decisive_differences(path.read_text(), text)
    check_config(workdir, text, differing)


def _read_predictions(path: epath.Path, settings: str) -> np.ndarray | None:
    """Probabilities of an earlier test with the same settings, None if there was none."""
    if not path.exists():
        return None
    with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
        return arrays["probabilities"] if str(arrays["settings"]) == settings else None


def predict(
    classifier: ClipClassifier,
    variables: Any,
    inputs: Inputs,
    source: LabelledRecords,
    *,
    clips: int,
    crops: int,
    chunk: int,
    threads: int,
    mesh: Any,
) -> np.ndarray:
    """Mean softmax over evenly spaced clips of every record.

    Args:
        classifier: module.
        variables: its parameters and statistics.
        inputs: how clips reach the encoder.
        source: records.
        clips: times of each record.
        crops: of each time.
        chunk: records in a call, rounded up to whole devices.
        threads: records rendered at a time.
        mesh: devices.

    Returns:
        float32 [records, classes].
    """
    compute = mean_softmax(classifier, inputs, mesh=mesh)
    rows = sharding.rows_sharding(mesh)
    chunk = -(-chunk // mesh.size) * mesh.size
    local = chunk // jax.process_count()
    render = functools.partial(fixed_clips, source, spec=inputs.spec, clips=clips, crops=crops)
    collected: list[np.ndarray] = []
    running: Any = None
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(source), chunk):
            mine = start + jax.process_index() * local + np.arange(local)
            # The last chunk is filled up with the last record: one shape is compiled.
            rendered = list(pool.map(render, np.minimum(mine, len(source) - 1).tolist()))
            batch = to_device_batch({"clips": np.stack(rendered)}, rows)
            if running is not None:  # The device was busy with it while these were rendered.
                collected.append(np.asarray(running))
            running = compute(variables, batch["clips"])
    collected.append(np.asarray(running))
    return np.concatenate(collected)[: len(source)]
