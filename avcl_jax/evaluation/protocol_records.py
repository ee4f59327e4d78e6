"""From a protocol's config to the records it is about."""

from __future__ import annotations

from collections.abc import Sequence

import ml_collections
from etils import epath

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


def check_pooled(config: ml_collections.ConfigDict) -> None:
    """Refuses features of single clips where a protocol needs one feature per record.

    Raises:
        ProtocolError: if `features.record_pooling` is "clips".
    """
    if config.features.record_pooling == "clips":
        raise ProtocolError(
            "features.record_pooling 'clips' is for folds: use 'mean' or 'mean_max'"
        )


def open_splits(directory: epath.PathLike, *names: str) -> dict[str, RecordDataset]:
    """Opens splits of a data set, each once however often it is named.

    Raises:
        RecordError: if there is no such data set or split.
    """
    return {name: RecordDataset(directory, name) for name in dict.fromkeys(names)}


def record_clips(
    config: ml_collections.ConfigDict,
    source: EncoderSource,
    modality: str,
    records: RecordDataset,
    *,
    select: str,
    labels: Sequence[str] = (),
) -> RecordClips:
    """Returns the clips of selected records.

    Args:
        config: of a protocol; its sections `data` and `features` are read.
        source: its encoder's preprocessing makes the clips.
        modality: "video" or "audio".
        records: a split of the data set.
        select: as `Selection.parse` reads it.
        labels: of one class a record, that must be known.

    Raises:
        ExportError: if there is no encoder of the modality.
        LackingError: if records lack the modality or a label.
        SelectionError: if the selection does not fit the data set.
    """
    return RecordClips(
        records,
        Selection.parse(select),
        source.require(modality).preprocess,
        ClipTimes(tuple(config.features.speeds), config.features.clips),
        labels=labels,
        leave_out=config.data.leave_out,
    )


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
            f"{train.records}, for instance {min(common)}: select them apart"
        )
