"""Records that a run trains on: checked before anything slow, and counted if unreadable."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import jax
import ml_collections
import numpy as np

from avcl_jax import experiment, processes
from avcl_jax.data.pipeline import check_enough
from avcl_jax.data.record_files import RecordError
from avcl_jax.data.records import RecordDataset
from avcl_jax.data.selection import Selection, UsableRecords
from avcl_jax.errors import UserError
from avcl_jax.objectives.bank_health import PLAYBACK_KINDS
from avcl_jax.training.program import LEAST_VIDEOS


def open_records(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> UsableRecords:
    """Opens the records that a pretraining config trains on, and checks that they fit it.

    Raises:
        RecordError: if the data set or the split does not exist.
        UserError: if the config does not fit the records.
    """
    records = RecordDataset(config.data.directory, config.data.split)
    selection = Selection.parse(config.data.select)
    source = UsableRecords(records, experiment.render_spec(config), selection)
    for label in config.bank.health_labels:
        if label in PLAYBACK_KINDS:
            raise UserError(
                f"bank.health_labels {label!r} would share its metrics with the {label} of "
                "playback: leave it out, or prepare the records with another name for the label"
            )
        if label not in records.labels:
            raise UserError(
                f"bank.health_labels {label!r} is not a label with one class per clip in "
                f"{records}, which has {', '.join(sorted(records.labels)) or 'none'}: name some of "
                "these, or set bank.health_labels='()' for none"
            )
    if config.modalities == "audio_visual":  # else nothing would be contrasted
        for name, other in (("audio", "video"), ("video", "audio")):
            if len(source.lacking([name])) == source.num_selected:
                raise UserError(
                    f"modalities='audio_visual', and none of the {source.num_selected} records of "
                    f"{config.data.directory} has {name} on which a view fits: set "
                    f"--config.modalities={other} to train on {other} alone"
                )
    check_enough(
        source,
        config.global_batch_size,
        multiple=mesh.size * config.micro_batches,
        least=LEAST_VIDEOS,
        bank_size=config.bank.size,
    )
    return source


class UnreadableRecords:
    """Counts the records that a run met and could not read, each once, and prints them.

    A process knows those of the others when they were last gathered.
    """

    def __init__(self, records: RecordDataset, *, budget: int):
        """Counts none yet; more than `budget` are an error.

        Raises:
            UserError: if the budget is negative.
        """
        if budget < 0:
            raise UserError(f"execution.max_bad_records {budget} must be at least 0")
        self._records = records
        self._budget = budget
        self._met: set[int] = set()

    @property
    def count(self) -> int:
        """Records met so far."""
        return len(self._met)

    def add(self, indices: Iterable[int]) -> None:
        """Counts records that were met before this start."""
        self._met.update(indices)

    def gather(self) -> list[int]:
        """Returns the indices of those of all processes; every process calls it.

        Raises:
            RecordError: if there are more than the budget allows.
        """
        own = self.count
        for indices in processes.gather(sorted(self._met)) if self._budget else ():
            self._met.update(indices)
        if self.count > max(own, self._budget):
            raise RecordError(
                f"{self.count} records cannot be read where execution.max_bad_records allows "
                f"{self._budget}: the logs of the processes name them"
            )
        return sorted(self._met)

    def check(self, batch: Mapping[str, np.ndarray]) -> None:
        """Counts the unreadable rows of a batch.

        Raises:
            RecordError: if there are more than the budget allows.
        """
        rows = np.flatnonzero(batch["unreadable"])
        for index in np.asarray(batch["record_index"])[rows].tolist():
            if index in self._met:
                continue
            self._met.add(index)
            name = f"record {self._records.record_ids[index]!r} in {self._records.shard_of(index)}"
            if self.count > self._budget:
                raise RecordError(
                    f"{name} cannot be read, and is number {self.count} of such records where "
                    f"execution.max_bad_records allows {self._budget}: prepare this data set "
                    "again, or set execution.max_bad_records=0 for the first error in full"
                )
            print(
                f"{name} cannot be read and is left out: {self.count} of at most {self._budget} "
                "(execution.max_bad_records)",
                flush=True,
            )
