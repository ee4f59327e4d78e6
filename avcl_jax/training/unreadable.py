"""Records that cannot be read in training: how many are left out before the run stops."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from avcl_jax.data.record_files import RecordError
from avcl_jax.data.records import RecordDataset
from avcl_jax.errors import UserError


class UnreadableRecords:
    """Counts the records that this process met and could not read, each once.

    Attributes:
        count: how many so far.
    """

    def __init__(self, records: RecordDataset, *, budget: int, note: Callable[[str], None]):
        """Has met none yet.

        Args:
            records: data set.
            budget: how many are left out; one more is an error.
            note: prints a line.

        Raises:
            UserError: if the budget is negative.
        """
        if budget < 0:
            raise UserError(f"data.max_bad_records {budget} must be at least 0")
        self._records = records
        self._budget = budget
        self._note = note
        self._met: set[int] = set()

    @property
    def count(self) -> int:
        """Records met so far."""
        return len(self._met)

    def check(self, batch: Mapping[str, np.ndarray]) -> None:
        """Looks at the rows of a batch.

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
                    f"data.max_bad_records allows {self._budget}: prepare this data set again, or "
                    "set data.max_bad_records=0 for the first error in full"
                )
            self._note(
                f"{name} cannot be read and is left out: {self.count} of at most {self._budget} "
                "(data.max_bad_records)"
            )
