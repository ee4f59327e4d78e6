"""Recognition by fine-tuning an encoder on labels.

    python -m avcl_jax.main --config=configs/finetune.py:ucf101 --config.encoder=runs/k400

Every official split is trained and tested on its own, under WORKDIR/split1 and so on, where an
interrupted run goes on. No test record is read before the last step of training is taken. With
`--config.encoder='runs/fold{fold}'` every split begins with an encoder of its own.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from avcl_jax.data.crop import CropSpec
from avcl_jax.data.labelled import AudioClipSpec, ClipSpec, LabelledRecords, VideoClipSpec
from avcl_jax.data.pipeline import check_enough
from avcl_jax.data.preprocessing import VideoPreprocessing
from avcl_jax.data.selection import Selection
from avcl_jax.data.shared_memory import check_room
from avcl_jax.data.views import ViewSpec
from avcl_jax.encoder_source import EncoderSource
from avcl_jax.errors import UserError
from avcl_jax.evaluation.finetune_split import check_split, run_split
from avcl_jax.evaluation.fold_encoders import (
    FoldEncoders,
    fold_names,
    open_fold_encoders,
    split_selections,
)
from avcl_jax.evaluation.protocol_records import open_splits
from avcl_jax.evaluation.protocol_run import ProtocolRun
from avcl_jax.evaluation.recognition import measured, protocol_of
from avcl_jax.evaluation.trained_on import check_not_trained_on
from avcl_jax.evaluation.written import Stages
from avcl_jax.export import Encoder
from avcl_jax.paths import absolute_path


def finetune(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> dict[str, Any] | None:
    """Trains and tests a classifier on every split, and writes what `evaluation.protocol` says.

    Args:
        config: as `configs/finetune.py` returns it.
        workdir: local or gs://; not the run's that trained the encoder.

    Returns:
        The contents of results.json; None if a signal stopped a training after saving, and in all
        processes but the first.

    Raises:
        ExportError: if `config.encoder` holds no encoder of the modality.
        CheckpointError: if a split's directory belongs to another training.
        LackingError: if records lack the class or the modality.
        NonFiniteError: if the loss stops being a number.
        ProtocolError: if an encoder was pretrained on records that it is tested on, or encoders of
            several splits are not alike.
        SelectionError: if a split does not fit the data set.
        UserError: if settings contradict each other.
    """
    workdir = absolute_path(workdir)
    encoders, own = _opened(config)
    source = encoders.named
    encoder = source.require(config.modality)
    spec = clip_spec(config, encoder)
    splits = folds(config, spec)
    protocol = protocol_of(config)
    data = {
        "train": splits[0][0].records.fingerprint,
        "test": splits[0][1].records.fingerprint,
    }
    protocol_run = ProtocolRun(protocol, config, workdir, source, data)
    if (results := protocol_run.finished()) is not None:
        return results
    for begin, (_, test) in zip(own, splits, strict=True):
        check_not_trained_on(
            begin,
            test.records,
            test.indices,
            allow=config.data.allow_trained_on,
            what="test records",
        )
    directories = [workdir / f"split{number}" for number in range(1, len(splits) + 1)]
    for directory, begin, (train, _) in zip(directories, own, splits, strict=True):
        check_split(config, directory, begin, train)
    stages = Stages()
    tested = []
    for number, (begin, (train, test)) in enumerate(zip(own, splits, strict=True), 1):
        fold = run_split(config, directories[number - 1], number, begin, spec, train, test)
        if fold is None:
            return None
        tested.append(fold)
    if jax.process_index():
        return None
    return protocol_run.write(measured(config, tested, splits[0][0].class_names), stages)


def clip_spec(config: ml_collections.ConfigDict, encoder: Encoder) -> ClipSpec:
    """Clips of `config.clip`; what is 0 there is as the encoder was trained.

    Raises:
        UserError: if a setting does not belong to the modality, or windows of sound would have
            another length than the encoder's.
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
            "sound has neither pictures nor crops: set clip.num_frames=0, clip.image_size=0 and "
            "test.crops=1, or modality=video"
        )
    mel = preprocess.log_mel
    seconds = clip.seconds or mel.clip_seconds
    frames = round(mel.frames * seconds / mel.clip_seconds)
    longer = dataclasses.replace(mel, frames=frames, clip_seconds=seconds)
    if longer.window != mel.window:
        raise UserError(
            f"clip.seconds {seconds:g} is no whole number of the encoder's frames of "
            f"{mel.clip_seconds / mel.frames:g} s"
        )
    return AudioClipSpec(longer)


def _opened(config: ml_collections.ConfigDict) -> tuple[FoldEncoders, list[EncoderSource]]:
    """Encoders, and of them the one that each split begins with."""
    if config.modality not in ("video", "audio"):
        raise UserError(f"modality {config.modality!r} must be 'video' or 'audio'")
    if config.init not in ("pretrained", "random"):
        raise UserError(f"init {config.init!r} must be 'pretrained' or 'random'")
    names = fold_names(config.encoder, [test for _, test in split_selections(config.data)])
    encoders = open_fold_encoders(config.encoder, names)
    encoders.named.require(config.modality)
    if config.init == "random":
        encoders = encoders.random_like(config.seed)
    return encoders, [encoders.by_fold[name] for name in names]


def folds(
    config: ml_collections.ConfigDict, spec: ClipSpec
) -> list[tuple[LabelledRecords, LabelledRecords]]:
    """Returns the training and the test records of every split; reads no record.

    Raises:
        UserError: if there are not as many of one as of the other, or a record is in both.
    """
    section = config.data
    opened = open_splits(section.directory, section.train_split, section.test_split)
    splits = []
    for selections in split_selections(section):
        train, test = (
            LabelledRecords(
                opened[name], Selection.parse(text), section.label, spec, section.leave_out
            )
            for name, text in zip(
                (section.train_split, section.test_split), selections, strict=True
            )
        )
        ids = set(train.record_ids)
        if both := [name for name in test.record_ids if name in ids]:
            raise UserError(
                f"{len(both)} records are in training ({train}) and in test ({test}), first "
                f"{both[0]!r}: correct data.train_select, data.test_select or the splits"
            )
        check_enough(train, config.global_batch_size, multiple=jax.device_count())
        rows = config.global_batch_size // jax.process_count()
        check_room(
            rows * math.prod(spec.shape) * np.dtype(spec.dtype).itemsize,
            workers=section.workers,
            prefetch=section.prefetch,
        )
        splits.append((train, test))
    return splits
