"""Recognition by fine-tuning an encoder on labels.

    python -m avcl_jax.main --config=configs/finetune.py:ucf101 --config.encoder=runs/k400

Every official split is trained and tested on its own, in WORKDIR/split1 and so on, where an
interrupted run resumes. No test record is read before the last step of training. With
`--config.encoder='runs/fold{fold}'` every split begins with an encoder of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from etils import epath

from avcl_jax import experiment
from avcl_jax.data.clips import (
    AudioClipSpec,
    ClipRecords,
    ClipSpec,
    RandomClips,
    VideoClipSpec,
)
from avcl_jax.data.pipeline import check_enough, drawn_batches
from avcl_jax.data.preprocessing import VideoPreprocessing
from avcl_jax.data.render_spec import CropSpec
from avcl_jax.data.views import ViewSpec
from avcl_jax.data.workers import check_room
from avcl_jax.errors import UserError
from avcl_jax.evaluation.charts import line_chart
from avcl_jax.evaluation.classification import class_results, splits_section
from avcl_jax.evaluation.classifier import (
    ENCODER,
    FROZEN,
    HEAD,
    ClipClassifier,
    Inputs,
    classifier_training,
    parts,
    predict,
)
from avcl_jax.evaluation.driver import Context, run_protocol
from avcl_jax.evaluation.protocol import Measured, Protocol
from avcl_jax.evaluation.splits import Split, open_splits
from avcl_jax.export import Encoder
from avcl_jax.export.runs import random_like
from avcl_jax.page import section
from avcl_jax.paths import absolute_path
from avcl_jax.processes import StopRequest, stop_request
from avcl_jax.training import sharding
from avcl_jax.training.checkpoint import (
    Checkpoints,
    Progress,
    check_config,
    check_place,
    read_progress,
)
from avcl_jax.training.metrics import MetricWriter
from avcl_jax.training.optimizer import create_optimizer, warmup_cosine, warmup_multistep
from avcl_jax.training.profiler import Profiler
from avcl_jax.training.run_steps import CompiledTogether, NonFiniteError, run_steps
from avcl_jax.training.writers import Writers, find_writers

# Sections that decide the test and the results, but not the training.
_NOT_TRAINING = ("test", "bootstrap")


def finetune(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> dict[str, Any]:
    """Trains and tests a classifier on every split by `configs/finetune.py`.

    Returns as `run_protocol`.

    Raises:
        ExportError: if `config.encoder` contains no encoder of the modality.
        CheckpointError: if a split's directory belongs to another training.
        SelectionError: if records lack the class or the modality.
        NonFiniteError: if the loss stops being a number.
        Stopped: after saving, if a signal came in a training.
        UserError: if settings contradict each other or the records.
    """
    check_place(absolute_path(workdir))
    splits = labelled_splits(config)

    def compute(context: Context) -> list[np.ndarray]:
        for split in splits:  # before the first is trained
            optimizer_of(config, len(split.train))
            if ((directory := context.workdir / split.name) / "config.json").exists():
                _check_training(config, directory, split)
        with stop_request() as request:
            try:
                return [
                    run_split(config, context.workdir / split.name, number, split, request)
                    for number, split in enumerate(splits, 1)
                ]
            except NonFiniteError as error:
                raise NonFiniteError(
                    f"{error}. With other settings choose another --workdir", error.steps
                ) from error

    return run_protocol(
        protocol_of(config),
        config,
        workdir,
        splits,
        compute=compute,
        measure=lambda context, softmax: measured(config, splits, softmax, context.workdir),
    )


def clip_spec(config: ml_collections.ConfigDict, encoder: Encoder) -> ClipSpec:
    """Returns the clips of `config.clip`; 0 there means the encoder's own value.

    Raises:
        UserError: if a setting does not belong to the modality, or audio windows would have another
            length than the encoder's.
    """
    clip, preprocess = config.clip, encoder.preprocess
    if isinstance(preprocess, VideoPreprocessing):
        frames = clip.num_frames or preprocess.num_frames
        seconds = clip.seconds or preprocess.clip_seconds
        size = clip.image_size or preprocess.image_size
        crop = CropSpec(image_size=size, **config.crop.to_dict())
        return VideoClipSpec(ViewSpec(frames, seconds, (1,), "shared"), crop)
    if clip.num_frames or clip.image_size or config.test.crops != 1:
        raise UserError(
            "audio has neither frames nor crops: set clip.num_frames=0, clip.image_size=0 and "
            "test.crops=1, or modality=video"
        )
    mel = preprocess.log_mel
    seconds = clip.seconds or mel.clip_seconds
    frames = round(mel.frames * seconds / mel.clip_seconds)
    longer = dataclasses.replace(mel, frames=frames, clip_seconds=seconds)
    if longer.window != mel.window:
        raise UserError(
            f"clip.seconds {seconds:g} is not a whole number of the encoder's frames of "
            f"{mel.clip_seconds / mel.frames:g} s"
        )
    return AudioClipSpec(longer)


def labelled_splits(config: ml_collections.ConfigDict) -> list[Split[ClipRecords]]:
    """Returns the splits with the encoders that they begin with; reads no record."""
    for setting, one, other in (
        ("modality", "video", "audio"),
        ("init", "pretrained", "random"),
        ("batch_norm", "train", "frozen"),
    ):
        if config[setting] not in (one, other):
            raise UserError(f"{setting} {config[setting]!r} must be {one!r} or {other!r}")
    data = config.data
    clips = functools.partial(clip_spec, config)
    splits = open_splits(config, config.modality, [data.label], clips, shared_sources=True)
    if config.init == "random":
        drawn = random_like(splits[0].encoder, config.seed)
        drawn = dataclasses.replace(drawn, path=f"random like {config.encoder}")
        splits = [dataclasses.replace(split, encoder=drawn) for split in splits]
    for split in splits:
        check_enough(split.train, config.global_batch_size, multiple=jax.device_count())
    clips_of_host = RandomClips(splits[0].train, data.label).shapes(
        config.global_batch_size // jax.process_count()
    )
    check_room(clips_of_host, workers=config.execution.workers)
    return splits


def run_split(
    config: ml_collections.ConfigDict,
    workdir: epath.Path,
    number: int,
    split: Split[ClipRecords],
    request: StopRequest,
) -> np.ndarray:
    """Trains on one split and tests once; finished parts are not computed again.

    Args:
        number: number of this split, from 1; it decides the draws.

    Returns:
        Mean softmax float32 [test records, classes] in process 0, elsewhere empty.

    Raises:
        Stopped: after saving, if `request` came in the training.
    """
    train, encoder = split.train, split.encoder.require(config.modality)
    writers = find_writers(config.execution.writers)
    run, freeze = config.execution, tuple(config.freeze)
    mesh = sharding.create_mesh(run.fsdp)
    sharding.check_batch(config.global_batch_size, mesh, 1)
    optimizer, schedule, steps = optimizer_of(config, len(train))
    classes = len(train.records.class_names[config.data.label])
    classifier = ClipClassifier(
        encoder=encoder.module.clone(dtype=experiment.compute_dtype(config), remat=run.remat),
        heads={HEAD: classes},
        dropout=config.head.dropout,
        train_statistics=config.batch_norm == "train",
    )
    inputs = Inputs(train.spec, encoder.preprocess, experiment.augmentation(config))
    state, step = classifier_training(
        classifier,
        optimizer,
        encoder,
        inputs,
        freeze=freeze,
        schedule=schedule,
        label_smoothing=config.label_smoothing,
        key=jax.random.fold_in(jax.random.key(config.seed), number),
        mesh=mesh,
    )
    # Not before, so that a mistake in the settings above leaves no directory behind.
    workdir.mkdir(parents=True, exist_ok=True)
    _check_training(config, workdir, split)
    with Checkpoints(workdir, keep=run.keep_checkpoints) as checkpoints:
        progress = Progress(0, 0.0, train.fingerprint, mesh.size)
        if (saved := checkpoints.latest_step()) is not None:
            progress = dataclasses.replace(read_progress(workdir, saved), devices=mesh.size)
            state = checkpoints.restore(saved, state)
        if progress.step < steps:
            leaves = jax.tree.leaves(state.params), jax.tree.leaves(parts(state.params, freeze))
            trained = sum(leaf.size for leaf, part in zip(*leaves, strict=True) if part != FROZEN)
            batches = drawn_batches(
                RandomClips(train, config.data.label),
                seed=int(np.random.SeedSequence([config.seed, number]).generate_state(1)[0]),
                global_batch_size=config.global_batch_size,
                rows=sharding.local_rows(mesh, config.global_batch_size),
                first_step=progress.step,
                workers=run.workers,
                threads=run.threads,
            )
            profiler = Profiler(workdir, request, at=0)
            with (
                Writers(writers, config, workdir) as more,
                contextlib.closing(
                    MetricWriter(workdir, steps=steps, first_step=progress.step, also=more.write)
                ) as writer,
                contextlib.closing(profiler),
                contextlib.closing(batches),  # before the test, which needs the memory
            ):
                writer.note(
                    f"{config.name}, {workdir.name}: {len(train)} records of {classes} classes, "
                    f"{trained / 1e6:.3f} M trained parameters, batch {config.global_batch_size}, "
                    f"steps {progress.step} to {steps}"
                )
                state = run_steps(
                    state,
                    CompiledTogether(step),
                    batches,
                    rows=sharding.rows_sharding(mesh),
                    request=request,
                    steps=steps,
                    log_every=run.log_every,
                    checkpoint_every=run.checkpoint_every,
                    clips_per_step=config.global_batch_size,
                    progress=progress,
                    checkpoints=checkpoints,
                    writer=writer,
                    profiler=profiler,
                )
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    # A whole copy, also of parameters that are split over hosts.
    whole = jax.jit(lambda tree: tree, out_shardings=sharding.replicated(mesh))(variables)
    return predict(
        classifier,
        jax.device_get(whole),
        inputs,
        split.test,
        **config.test,
        chunk=run.chunk,
        part_records=run.part_records,
        threads=max(run.threads, run.workers),
        directory=workdir / "predictions",
    )


def optimizer_of(
    config: ml_collections.ConfigDict, records: int
) -> tuple[optax.GradientTransformation, optax.Schedule, int]:
    """Returns optimizer, learning rate by step and number of steps for a number of records.

    Raises:
        UserError: if a name is unknown, or warm-up and milestones do not fit the epochs.
    """
    section = config.optimizer

    def steps_of(epochs: float) -> int:
        return round(epochs * records / config.global_batch_size)

    steps, head_steps = max(steps_of(config.epochs), 1), steps_of(section.head_epochs)
    rise = {"learning_rate": section.learning_rate, "warmup_steps": steps_of(section.warmup_epochs)}
    if section.schedule == "cosine":
        schedule = warmup_cosine(**rise, steps=steps)
    elif section.schedule == "multistep":
        milestones = [steps_of(epoch) for epoch in section.milestones]
        schedule = warmup_multistep(**rise, milestones=milestones, factor=section.factor)
    else:
        raise UserError(f"optimizer.schedule {section.schedule!r} must be 'cosine' or 'multistep'")
    rates = {
        ENCODER: lambda step: jnp.where(step >= head_steps, schedule(step), 0.0),
        HEAD: lambda step: section.head_factor * schedule(step),
        FROZEN: None,
    }
    optimizer = create_optimizer(
        schedule=rates,
        part_of=functools.partial(parts, freeze=tuple(config.freeze)),
        **experiment.optimizer_settings(config),
    )
    return optimizer, schedule, steps


def _check_training(
    config: ml_collections.ConfigDict, workdir: epath.Path, split: Split[ClipRecords]
) -> None:
    """Refuses to resume a training of other settings, another encoder or other records."""
    settings = {k: v for k, v in config.to_dict().items() if k not in _NOT_TRAINING}
    settings["encoder_fingerprint"] = split.encoder.fingerprint
    settings["records"] = split.train.fingerprint
    check_config(workdir, json.dumps(settings, indent=2, sort_keys=True))


def protocol_of(config: ml_collections.ConfigDict) -> Protocol:
    """Returns the protocol of a config."""
    began = {
        "pretrained": "The encoder begins as pretraining left it.",
        "random": "The encoder begins with random weights; nothing was pretrained.",
    }[config.init]
    video, crops = config.modality == "video", config.test.crops
    places = "in the centre" if crops == 1 else f"{crops} times along the longer side"
    return Protocol(
        name="action_recognition" if video else "audio_recognition",
        version=2 if video else 1,
        title=f"{'Action' if video else 'Audio'} recognition by fine-tuning",
        definition=(
            "The encoder and a linear classifier on its pooled features are trained together. "
            f"{began}",
            "Training draws one clip of each record at a random time in every epoch, "
            f"{config.epochs:g} epochs.",
            f"A test record is rendered as {config.test.clips} clips at equal distances"
            f"{f', cropped {places}' * video}; the clips' mean softmax is its prediction.",
            "The network after the last epoch is tested, once; no test record is read before. "
            "Nothing is chosen by test accuracy, neither epoch nor setting.",
            "Records shorter than a clip are tested too: the last frame stays, silence follows.",
            "Metrics are means over the splits. Of equal scores the wrong class counts first.",
        ),
    )


def measured(
    config: ml_collections.ConfigDict,
    splits: Sequence[Split[ClipRecords]],
    probabilities: Sequence[np.ndarray],
    workdir: epath.Path,
) -> Measured:
    """Scores the predictions of all splits.

    Args:
        probabilities: float32 [test records, classes] of each split.
        workdir: directory with that of each split, which has metrics.jsonl of its training.
    """
    found = class_results(splits, config.data.label, {"": probabilities})
    scores, curves, details = np.concatenate(probabilities), {}, dict(found.details)
    predictions = {"predicted": scores.argmax(axis=1), "probabilities": scores}
    outcomes = dataclasses.replace(found.outcomes, values={**found.outcomes.values, **predictions})
    for split, entry in zip(splits, details["splits"], strict=True):
        lines = (workdir / split.name / "metrics.jsonl").read_text().splitlines()
        curves[split.name] = [json.loads(line) for line in lines]
        last, train, test = curves[split.name][-1], split.train, split.test
        # Numbers of sources are those of one split of the data set.
        alike = train.records.split == test.records.split
        entry |= {
            "train": train.fingerprint,
            "test": test.fingerprint,
            "sources_in_both": len({*train.sources} & {*test.sources}) if alike else None,
            "steps": last["step"],
            "train_seconds": round(last["train_seconds"], 1),
            "train_loss": last["loss"],
            "train_accuracy": last["accuracy"],
        }
    details["init"] = config.init
    sections = [splits_section(details["splits"]), *found.sections, _curves_section(curves)]
    return Measured(outcomes, found.metrics, details, sections)


def _curves_section(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    def chart(name: str, *, percent: bool = False) -> str:
        series = {
            split: (np.array([row["step"] for row in rows]), np.array([row[name] for row in rows]))
            for split, rows in curves.items()
        }
        return line_chart(series, name=f"finetune_{name}", ylabel=name, percent=percent)

    charts = ['<div class="charts">', chart("loss"), chart("accuracy", percent=True), "</div>"]
    return section("Training", "Augmented clips, in training mode.", *charts)
