"""Recognition by fine-tuning an encoder on labels.

    python -m avcl_jax.main --config=configs/finetune.py:ucf101 --config.encoder=runs/k400

Every official split is trained and tested on its own, in WORKDIR/split1 and so on, where an
interrupted run resumes. No test record is read before the last step of training. With
`--config.encoder='runs/fold{fold}'` every split begins with an encoder of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from etils import epath

from avcl_jax import experiment
from avcl_jax.batched import batched_map, cache_key, in_parts
from avcl_jax.data.clips import (
    AudioClipSpec,
    ClipRecords,
    ClipSpec,
    RenderRandomClips,
    VideoClipSpec,
)
from avcl_jax.data.images import CropSpec
from avcl_jax.data.pipeline import check_enough, drawn_batches
from avcl_jax.data.preprocessing import VideoPreprocessing
from avcl_jax.data.records import RecordDataset
from avcl_jax.data.selection import Selection
from avcl_jax.data.views import ViewSpec
from avcl_jax.data.workers import check_room
from avcl_jax.errors import UserError
from avcl_jax.evaluation.charts import line_chart
from avcl_jax.evaluation.classification import (
    MATRIX_CLASSES,
    class_scores,
    confusion_section,
    described,
    split_outcomes,
)
from avcl_jax.evaluation.classifier import (
    ClipClassifier,
    Inputs,
    classifier_step,
    create_classifier_state,
    mean_softmax,
    scale_updates,
)
from avcl_jax.evaluation.driver import Context, run_protocol
from avcl_jax.evaluation.page import as_text, section, table
from avcl_jax.evaluation.protocol import Measured, Protocol
from avcl_jax.evaluation.splits import Split, numbered_sides, open_splits
from avcl_jax.evaluation.statistics import class_mean, confusion_matrix, top_k_hits
from avcl_jax.export import Encoder
from avcl_jax.export.runs import EncoderSource, random_like
from avcl_jax.training import sharding
from avcl_jax.training.checkpoint import Checkpoints, Progress, check_config
from avcl_jax.training.metrics import MetricWriter
from avcl_jax.training.optimizer import create_optimizer, warmup_cosine, warmup_multistep
from avcl_jax.training.run_steps import Pace, run_steps
from avcl_jax.training.state import TrainState

# Sections that decide the test and the results, but not the training.
_NOT_TRAINING = ("test", "bootstrap")

LabelledSplit = Split[ClipRecords]


def finetune(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> dict[str, Any] | None:
    """Trains and tests a classifier on every split by `configs/finetune.py`.

    Returns as `run_protocol`: None if a signal stopped a training after saving.

    Raises:
        ExportError: if `config.encoder` contains no encoder of the modality.
        CheckpointError: if a split's directory belongs to another training.
        SelectionError: if records lack the class or the modality.
        NonFiniteError: if the loss stops being a number.
        UserError: if settings contradict each other or the records.
    """
    splits, spec = labelled_splits(config)

    def compute(context: Context) -> dict[str, np.ndarray] | None:
        for split in splits:  # before the first is trained
            optimizer_of(config, len(split.train))
            directory = context.workdir / split.name
            if (directory / "config.json").exists():
                _check_training(config, directory, split)
        probabilities = {}
        for number, split in enumerate(splits, 1):
            tested = run_split(config, context.workdir / split.name, number, split, spec)
            if tested is None:
                return None
            probabilities[split.name] = tested
        return probabilities

    def measure(context: Context, probabilities: dict[str, np.ndarray]) -> Measured:
        return measured(config, splits, probabilities, context.workdir)

    return run_protocol(
        protocol_of(config), config, workdir, splits, compute=compute, measure=measure
    )


def clip_spec(config: ml_collections.ConfigDict, encoder: Encoder) -> ClipSpec:
    """Returns the clips of `config.clip`; 0 there means the encoder's own value.

    Raises:
        UserError: if a setting does not belong to the modality, or audio windows would have another
            length than the encoder's.
    """
    clip, preprocess = config.clip, encoder.preprocess
    if isinstance(preprocess, VideoPreprocessing):
        return VideoClipSpec(
            views=ViewSpec(
                clip.num_frames or preprocess.num_frames,
                clip.seconds or preprocess.clip_seconds,
                (1,),
                "shared",
            ),
            crop=CropSpec(
                image_size=clip.image_size or preprocess.image_size,
                min_area=config.crop.min_area,
                flip=config.crop.flip,
                quarter_turns=config.crop.quarter_turns,
            ),
        )
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


def labelled_splits(
    config: ml_collections.ConfigDict,
) -> tuple[list[LabelledSplit], ClipSpec]:
    """Returns the splits with the encoders that they begin with, and the clips; reads no record.

    Raises:
        UserError: if settings contradict each other, or a record is in training and test.
    """
    if config.modality not in ("video", "audio"):
        raise UserError(f"modality {config.modality!r} must be 'video' or 'audio'")
    if config.init not in ("pretrained", "random"):
        raise UserError(f"init {config.init!r} must be 'pretrained' or 'random'")
    data = config.data

    def labelled(
        source: EncoderSource, records: RecordDataset, selection: Selection
    ) -> ClipRecords:
        spec = clip_spec(config, source.require(config.modality))
        return ClipRecords(records, selection, spec, (data.label,), data.leave_out)

    splits = open_splits(
        data.directory,
        config.encoder,
        config.modality,
        numbered_sides(data),
        labelled,
        shared_sources=True,
    )
    first = splits[0].encoder
    spec = clip_spec(config, first.require(config.modality))
    if config.init == "random":
        drawn = random_like(first, config.seed)
        drawn = dataclasses.replace(drawn, path=f"random like {config.encoder}")
        splits = [dataclasses.replace(split, encoder=drawn) for split in splits]
    for split in splits:
        check_enough(split.train, config.global_batch_size, multiple=jax.device_count())
    rows = config.global_batch_size // jax.process_count()
    size = rows * math.prod(spec.shape) * np.dtype(spec.dtype).itemsize
    check_room(size, workers=config.execution.workers, prefetch=config.execution.prefetch)
    return splits, spec


def run_split(
    config: ml_collections.ConfigDict,
    workdir: epath.Path,
    number: int,
    split: LabelledSplit,
    spec: ClipSpec,
) -> np.ndarray | None:
    """Trains on one split and tests once; finished parts are not computed again.

    Args:
        number: number of this split, from 1; it decides the draws.
        split: records, and the encoder to begin with.
        spec: clips.

    Returns:
        Mean softmax float32 [test records, classes] in process 0, elsewhere empty; None if a signal
        stopped the training after saving.
    """
    mesh = sharding.create_mesh(config.execution.fsdp)
    encoder = split.encoder.require(config.modality)
    classifier = ClipClassifier(
        encoder=encoder.module.clone(
            dtype=jnp.dtype(config.model.dtype), remat=config.execution.remat
        ),
        classes=len(split.test.records.class_names[config.data.label]),
        dropout=config.head.dropout,
        train_statistics=_trains_statistics(config),
    )
    augmentation = (experiment.photometric_spec(config), experiment.spectral_spec(config))
    inputs = Inputs(spec, encoder.preprocess, augmentation)
    state = _trained(config, workdir, number, split, classifier, inputs, mesh)
    if state is None:
        return None
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    # A whole copy, also of parameters that are split over hosts.
    whole = jax.jit(lambda tree: tree, out_shardings=sharding.replicated(mesh))(variables)
    return predict(
        classifier,
        jax.device_get(whole),
        inputs,
        split.test,
        clips=config.test.clips,
        crops=config.test.crops,
        chunk=config.execution.chunk,
        part_records=config.execution.part_records,
        threads=max(config.execution.threads, config.execution.workers),
        directory=workdir / "predictions",
    )


def _trains_statistics(config: ml_collections.ConfigDict) -> bool:
    if config.batch_norm not in ("train", "frozen"):
        raise UserError(f"batch_norm {config.batch_norm!r} must be 'train' or 'frozen'")
    return config.batch_norm == "train"


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


def _trained(
    config: ml_collections.ConfigDict,
    workdir: epath.Path,
    number: int,
    split: LabelledSplit,
    classifier: ClipClassifier,
    inputs: Inputs,
    mesh: Any,
) -> TrainState | None:
    """Trains to the last step from the newest checkpoint; None if a signal stopped it."""
    train = split.train
    sharding.check_batch(config.global_batch_size, mesh, 1)
    optimizer, schedule, steps = optimizer_of(config, len(train))
    key = jax.random.fold_in(jax.random.key(config.seed), number)
    head_key, step_key = jax.random.split(key)
    state, shardings, mask = create_classifier_state(
        classifier,
        optimizer,
        split.encoder.require(config.modality),
        input_shape=input_shape(inputs.spec),
        freeze=tuple(config.freeze),
        key=head_key,
        mesh=mesh,
    )
    # Not before, so that a mistake in the settings above leaves no directory behind.
    workdir.mkdir(parents=True, exist_ok=True)
    _check_training(config, workdir, split)
    checkpoints = Checkpoints(workdir, keep=config.execution.keep_checkpoints)
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
        f"{config.name}, {workdir.name}: {len(train)} records of {classifier.classes} classes, "
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
        training_batches(config, number, train, progress.step),
        rows=sharding.rows_sharding(mesh),
        pace=Pace(
            steps,
            config.execution.log_every,
            config.execution.checkpoint_every,
            config.global_batch_size,
        ),
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
    train: ClipRecords,
    first_step: int,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields local rows of random clips of `train` without end, from a step on."""
    seed = int(np.random.SeedSequence([config.seed, number]).generate_state(1)[0])
    execution = config.execution
    return iter(
        drawn_batches(
            len(train),
            RenderRandomClips(train, config.data.label, shared=execution.workers > 0),
            seed=seed,
            global_batch_size=config.global_batch_size,
            host=jax.process_index(),
            hosts=jax.process_count(),
            first_step=first_step,
            workers=execution.workers,
            threads=execution.threads,
            prefetch=execution.prefetch,
        )
    )


def input_shape(spec: ClipSpec) -> tuple[int, ...]:
    """Returns the shape of the encoder's input of one clip."""
    if isinstance(spec, VideoClipSpec):
        return spec.shape
    return spec.log_mel.frames, spec.log_mel.mels


def _check_training(
    config: ml_collections.ConfigDict,
    workdir: epath.Path,
    split: LabelledSplit,
) -> None:
    """Refuses to resume a training of other settings, another encoder or other records."""
    settings = {k: v for k, v in config.to_dict().items() if k not in _NOT_TRAINING}
    settings |= {"encoder_fingerprint": split.encoder.fingerprint}
    settings |= {"records": split.train.fingerprint}
    text = json.dumps(settings, indent=2, sort_keys=True)
    path = workdir / "config.json"
    differing = []
    if path.exists():
        differing = experiment.decisive_differences(path.read_text(), text)
    check_config(workdir, text, differing)


def predict(
    classifier: ClipClassifier,
    variables: Any,
    inputs: Inputs,
    source: ClipRecords,
    *,
    clips: int,
    crops: int,
    chunk: int,
    part_records: int,
    threads: int,
    directory: epath.Path,
) -> np.ndarray:
    """Returns the mean softmax over evenly spaced clips of every record.

    Args:
        variables: its parameters and statistics.
        inputs: preparation of clips for the encoder.
        clips: times per record.
        crops: crops per time.

    Returns:
        float32 [records, classes] in process 0, elsewhere empty.
    """
    compute = batched_map(
        mean_softmax(classifier, inputs),
        {"classifier": variables},
        inputs=("clips",),
        chunk=chunk,
        threads=threads,
    )
    render = functools.partial(source.fixed, clips=clips, crops=crops)
    arrays = in_parts(
        directory / cache_key(clips, crops, source.fingerprint),
        len(source),
        functools.partial(compute, lambda position: {"clips": render(position)}),
        rows=part_records,
    )
    return arrays.get("classifier/probabilities", np.empty((0, classifier.classes), np.float32))


def protocol_of(config: ml_collections.ConfigDict) -> Protocol:
    """Returns the protocol of a config."""
    began = (
        "The encoder begins as pretraining left it."
        if config.init == "pretrained"
        else "The encoder begins with random weights; nothing was pretrained."
    )
    video = config.modality == "video"
    shown = f"{config.test.clips} clips at equal distances"
    if video:
        crops = config.test.crops
        where = "in the centre" if crops == 1 else f"{crops} times along the longer side"
        shown += f", cropped {where}"
    return Protocol(
        name="action_recognition" if video else "audio_recognition",
        version=2 if video else 1,
        title=f"{'Action' if video else 'Audio'} recognition by fine-tuning",
        definition=(
            "The encoder and a linear classifier on its pooled features are trained together. "
            f"{began}",
            "Training draws one clip of each record at a random time in every epoch, "
            f"{config.epochs:g} epochs.",
            f"A test record is rendered as {shown}; the clips' mean softmax is its prediction.",
            "The network after the last epoch is tested, once; no test record is read before. "
            "Nothing is chosen by test accuracy, neither epoch nor setting.",
            "Records shorter than a clip are tested too: the last frame stays, silence follows.",
            "Metrics are means over the splits. Of equal scores the wrong class counts first.",
        ),
    )


def measured(
    config: ml_collections.ConfigDict,
    splits: Sequence[LabelledSplit],
    probabilities: Mapping[str, np.ndarray],
    workdir: epath.Path,
) -> Measured:
    """Scores the predictions of all splits.

    Args:
        splits: tested splits.
        probabilities: float32 [test records, classes] by split.
        workdir: directory with that of each split, which has metrics.jsonl of its training.
    """
    label = config.data.label
    class_names = splits[0].test.records.class_names[label]
    labels = np.concatenate([split.test.classes_of(label) for split in splits])
    scores = np.concatenate([probabilities[split.name] for split in splits])
    number = np.repeat(np.arange(len(splits)), [len(split.test) for split in splits])
    values, metrics = class_scores(scores, labels, split=number)
    values |= {"predicted": scores.argmax(axis=1), "probabilities": scores}
    confusion = confusion_matrix(labels, values["predicted"], len(class_names))
    curves = {
        split.name: [
            json.loads(line)
            for line in (workdir / split.name / "metrics.jsonl").read_text().splitlines()
        ]
        for split in splits
    }
    by_split = [
        _described(split, label, probabilities[split.name], curves[split.name][-1])
        for split in splits
    ]
    details: dict[str, Any] = {
        "init": config.init,
        "splits": by_split,
        "classes": list(class_names),
    }
    if len(class_names) <= MATRIX_CLASSES:
        details["confusion"] = confusion.tolist()
    return Measured(
        outcomes=split_outcomes(splits, values),
        metrics=metrics,
        details=details,
        sections=[
            _splits_section(by_split),
            confusion_section(confusion, class_names),
            _curves_section(curves),
        ],
    )


def _described(
    split: LabelledSplit, label: str, probabilities: np.ndarray, last: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns a split as JSON; `last` is the last line of its metrics."""
    train, test = split.train, split.test
    hits = top_k_hits(probabilities, test.classes_of(label), 1)
    # Numbers of sources are those of one split of the data set.
    alike = train.records.split == test.records.split
    return described(split) | {
        "train": train.fingerprint,
        "test": test.fingerprint,
        "sources_in_both": len({*train.sources} & {*test.sources}) if alike else None,
        "top1": float(hits.mean()),
        "mean_class_accuracy": class_mean(hits, test.classes_of(label)),
        "steps": last["step"],
        "train_seconds": round(last["train_seconds"], 1),
        "train_loss": last["loss"],
        "train_accuracy": last["accuracy"],
    }


def _splits_section(splits: Sequence[Mapping[str, Any]]) -> str:
    header = (
        "",
        "encoder",
        "trained on",
        "tested on",
        "left out",
        "top-1",
        "mean class",
        "training top-1",
    )
    rows = [
        [
            entry["name"],
            entry["encoder"]["path"],
            str(entry["train_records"]),
            str(entry["test_records"]),
            str(entry["left_out"]),
            as_text(entry["top1"]),
            as_text(entry["mean_class_accuracy"]),
            as_text(entry["train_accuracy"]),
        ]
        for entry in splits
    ]
    caption = "Training top-1 is that of augmented single clips, at the end."
    return section("Splits", caption, table(header, rows))


def _curves_section(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    def series(name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        return {
            split: (np.array([row["step"] for row in rows]), np.array([row[name] for row in rows]))
            for split, rows in curves.items()
        }

    return section(
        "Training",
        "Augmented clips, in training mode.",
        '<div class="charts">',
        line_chart(series("loss"), name="finetune_loss", ylabel="loss"),
        line_chart(series("accuracy"), name="finetune_accuracy", ylabel="accuracy", percent=True),
        "</div>",
    )
