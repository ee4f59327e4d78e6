"""From a protocol's config to the records it is about."""

from __future__ import annotations

from collections.abc import Sequence

import ml_collections
import numpy as np

from avcl_jax.data.record_format import UNKNOWN_LABEL
from avcl_jax.data.records import RecordDataset
from avcl_jax.data.selection import Selection
from avcl_jax.data.usable_records import UsableRecords
from avcl_jax.encoder_source import EncoderSource
from avcl_jax.evaluation.protocol import ProtocolError
from avcl_jax.evaluation.record_clips import ClipTimes, RecordClips
from avcl_jax.evaluation.record_features import FeatureSpec


def feature_spec(config: ml_collections.ConfigDict) -> FeatureSpec:
    """Returns what the section `features` of a protocol's config says."""
    section = config.features
    return FeatureSpec(
        clip_pooling=section.clip_pooling,
        record_pooling=section.record_pooling,
        chunk=section.chunk,
        threads=config.data.threads,
        part_records=section.part_records,
    )


def record_clips(
    config: ml_collections.ConfigDict,
    source: EncoderSource,
    modality: str,
    records: RecordDataset,
    *,
    select: str,
) -> RecordClips:
    """Returns the clips of selected records.

    Args:
        config: of a protocol; its sections `data` and `features` are read.
        source: its encoder's preprocessing makes the clips.
        modality: "video" or "audio".
        records: a split of the data set.
        select: as `Selection.parse` reads it.

    Raises:
        ExportError: if there is no encoder of the modality.
        ProtocolError: if records lack the modality.
        SelectionError: if the selection does not fit the data set.
    """
    return RecordClips(
        records,
        Selection.parse(select),
        source.require(modality).preprocess,
        ClipTimes(tuple(config.features.speeds), config.features.clips),
        leave_out=config.data.leave_out,
    )


def known_labels(clips: RecordClips, labels: list[str], *, leave_out: bool) -> np.ndarray:
    """Returns bool [records], of which all labels are known.

    Args:
        clips: of the records.
        labels: of one class a record.
        leave_out: leave out records without a label, instead of an error.

    Raises:
        ProtocolError: if the data set lacks a label, or records do.
    """
    records = clips.records
    known = np.ones(len(clips), bool)
    for label in labels:
        if label not in records.labels:
            several = ", of which a record may have several" * (label in records.multilabel)
            raise ProtocolError(
                f"{records!r} has the labels {sorted(records.labels)} of one class a record, not "
                f"{label!r}{several}"
            )
        missing = records.labels[label][clips.indices] == UNKNOWN_LABEL
        if missing.all() or (missing.any() and not leave_out):
            first = records.record_ids[int(clips.indices[missing][0])]
            raise ProtocolError(
                f"{int(missing.sum())} of the {len(clips)} records of {clips.fingerprint} have no "
                f"known {label!r}, first {first!r}: set data.leave_out=True to go on without"
            )
        known &= ~missing
    return known


def check_views(records: UsableRecords, modalities: Sequence[str], *, leave_out: bool) -> None:
    """Refuses records that lack a modality, or are too short for a view of it.

    Args:
        records: selected ones on which any view fits.
        modalities: that the encoders take.
        leave_out: go on all the same.

    Raises:
        ProtocolError: naming the first.
    """
    lacking = records.lacking(modalities)
    if len(lacking) and not leave_out:
        raise ProtocolError(
            f"{len(lacking)} of the {records.num_selected} records of {records.fingerprint} lack "
            f"{' or '.join(modalities)} or are too short for a view, first "
            f"{records.records.record_ids[int(lacking[0])]!r}: set data.leave_out=True to go on "
            "without"
        )


def check_apart(train: RecordClips, test: RecordClips) -> None:
    """Refuses a test record, or where that can be told its source, among the training records.

    Raises:
        ProtocolError: if there is one.
    """
    common = set(train.record_ids) & set(test.record_ids)
    what = "records"
    if not common and train.records.fingerprint == test.records.fingerprint:
        common, what = set(train.sources) & set(test.sources), "sources"
    if common:
        raise ProtocolError(
            f"{len(common)} {what} are among both the training and the test records of "
            f"{train.records!r}, for instance {min(common)}: select them apart"
        )
