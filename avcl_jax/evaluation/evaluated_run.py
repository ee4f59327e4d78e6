"""Run and records of an evaluation, opened and checked before the first slow step."""

from __future__ import annotations

import dataclasses

import ml_collections
import numpy as np
from etils import epath

from avcl_jax.data.records import RecordDataset, RecordError
from avcl_jax.data.selection import Selection, UsableRecords
from avcl_jax.errors import UserError
from avcl_jax.evaluation.linear import check_sources
from avcl_jax.evaluation.retrieval import check_recall_at
from avcl_jax.evaluation.views import (
    PretrainedRun,
    check_pairs,
    host_render_spec,
    speed_indices,
)
from avcl_jax.export.runs import config_of_run
from avcl_jax.paths import absolute_path


@dataclasses.dataclass(frozen=True)
class EvaluationRecords:
    """The records that a pretraining run is evaluated on.

    Attributes:
        config: the run's own config with the sections of `configs/evaluate.py`.
        test: test records.
        train: training records of the probes; None without probes.
        null: training and test records of noise; None without null controls.
    """

    config: ml_collections.ConfigDict
    test: UsableRecords
    train: UsableRecords | None
    null: tuple[UsableRecords, UsableRecords] | None

    @property
    def speeds(self) -> list[int]:
        """Indices of the playback speeds at which features are computed."""
        asked, trained = self.config.evaluation.speeds, self.config.views.speeds
        return speed_indices(asked, trained, setting="evaluation.speeds")


def probe_name(label: str, modality: str) -> str:
    """Returns the name of a linear probe in results.json."""
    return f"{label}_from_{modality}"


def open_evaluated_run(
    config: ml_collections.ConfigDict, workdir: epath.Path
) -> tuple[PretrainedRun, EvaluationRecords]:
    """Opens a run and its records, and checks everything that its evaluation will need.

    Raises:
        ExportError: if `workdir` does not contain a pretraining run.
        RecordError: if the data set or a split is missing.
        UserError: if settings contradict each other, the run or the records.
    """
    # Settings are checked before the weights are read: gigabytes of a large run.
    records = open_evaluation_records(config_of_run(workdir), config, workdir)
    return PretrainedRun.load(workdir, records.config), records


def open_evaluation_records(
    run: ml_collections.ConfigDict, config: ml_collections.ConfigDict, workdir: epath.Path
) -> EvaluationRecords:
    """Opens the records of an evaluation, and checks its settings; needs no trained weights.

    Args:
        run: config of the pretraining run.
        workdir: working directory of the run, which may not exist yet.

    Raises:
        RecordError: if the data set or a split is missing.
        UserError: if settings contradict each other, the run or the records.
    """
    section = config.evaluation
    check_recall_at(section.recall_at, setting="evaluation.recall_at")
    merged = _with_sections(run, config)
    check_pairs(len(merged.evaluation.speeds) * section.clips)
    spec = host_render_spec(merged)
    directory = absolute_path(merged.data.directory)
    if not directory.exists():
        raise UserError(
            f"there are no records at {directory}: set --config.data.directory to the records of "
            f"{workdir}"
        )

    def records(setting: str, split: str, select: str = "") -> UsableRecords:
        try:
            dataset = RecordDataset(directory, split)
        except RecordError as error:
            raise RecordError(
                f"{error}: set --config.{setting}, or prepare more media into the data set with "
                "--split"
            ) from error
        return UsableRecords(dataset, spec, Selection.parse(select))

    test = records("evaluation.test_split", section.test_split, section.test_select)
    train = null = None
    if len(section.probes):
        train = records("evaluation.train_split", section.train_split, section.train_select)
        _check_probes(merged, train, test)
    if section.null.train_split:
        null = (
            records("evaluation.null.train_split", section.null.train_split),
            records("evaluation.null.test_split", section.null.test_split),
        )
        views = len(null[0]) * section.null.train_views * 2 * len(merged.views.speeds)
        _check_fills_a_batch("null", section.null.fit, views, f"views of {null[0]!r}")
    return EvaluationRecords(merged, test, train, null)


def _with_sections(
    run: ml_collections.ConfigDict, config: ml_collections.ConfigDict
) -> ml_collections.ConfigDict:
    """Returns the config of a run with the settings of its evaluation."""
    merged = run.copy_and_resolve_references()
    with merged.unlocked():
        merged.task = config.task
        merged.evaluation = config.evaluation.copy_and_resolve_references()
        merged.bootstrap = config.bootstrap
        merged.execution.update(config.execution)
        merged.data.allow_trained_on = config.data.allow_trained_on
        if config.data.directory:
            merged.data.directory = config.data.directory
        asked, trained = tuple(config.evaluation.speeds), tuple(run.views.speeds)
        speed_indices(asked, trained, setting="evaluation.speeds")
        merged.evaluation.speeds = asked or trained
    return merged


def _check_probes(
    config: ml_collections.ConfigDict, train: UsableRecords, test: UsableRecords
) -> None:
    section = config.evaluation
    probes = [tuple(probe) for probe in section.probes]
    for label, modality in probes:
        asked = f"evaluation.probes asks for {label!r} from {modality}"
        if modality not in ("video", "audio"):
            raise UserError(f"{asked}: modality must be 'video' or 'audio'")
        if probes.count((label, modality)) > 1:
            raise UserError(f"{asked} more than once")
        if config.modalities not in ("audio_visual", modality):
            raise UserError(f"{asked}, but the run trained {config.modalities} only")
        for records in (train, test):
            if label in records.records.multilabel:
                raise UserError(
                    f"{asked}, but a record may have several classes of it: linear probes need one "
                    "class per record"
                )
            if label not in records.records.class_names:
                raise UserError(
                    f"{asked}, but {records} has the labels "
                    f"{', '.join(sorted(records.records.class_names)) or 'none'}: set "
                    '--config.evaluation.probes, or "--config.evaluation.probes=()" for none'
                )
        train_rows, test_rows = (_labelled(records, label, modality) for records in (train, test))
        what = f"with {modality} and a known {label!r}"
        if not len(test_rows):
            raise UserError(f"no record of {test} {what}: set --config.evaluation.probes")
        check_sources(train.records.source_numbers[train_rows], section.probe.folds)
        if section.supervised.enabled:
            fit = section.supervised[modality].fit
            records_of = f"records of {train} {what}"
            _check_fills_a_batch(f"supervised.{modality}", fit, len(train_rows), records_of)


def _labelled(records: UsableRecords, label: str, modality: str) -> np.ndarray:
    """Returns positions in the data set of usable records with a modality and a known label."""
    usable = np.setdiff1d(records.indices, records.lacking((modality,)))
    return usable[records.records.labels[label][usable] >= 0]


def _check_fills_a_batch(
    section: str, fit: ml_collections.ConfigDict, items: int, what: str
) -> None:
    if items < fit.batch_size:
        raise UserError(
            f"{items} {what} do not fill a batch of {fit.batch_size}: set "
            f"--config.evaluation.{section}.fit.batch_size"
        )
