"""What all choices among the records of a data set have in common."""

from __future__ import annotations

import numpy as np

from avcl_jax.data.records import RecordDataset
from avcl_jax.data.selection import Selection


class SelectedRecords:
    """Some records of a data set.

    Attributes:
        records: the data set.
        selection: selection that they are from.
        indices: int64 [n], positions in it.
    """

    records: RecordDataset
    selection: Selection
    indices: np.ndarray

    def __len__(self) -> int:
        """Number of records."""
        return len(self.indices)

    def __str__(self) -> str:
        """Returns data set and selection, for messages."""
        return f"{self.records}" + f" with {self.selection}" * bool(self.selection.conditions)

    @property
    def record_ids(self) -> list[str]:
        """Names of the records."""
        return [self.records.record_ids[int(index)] for index in self.indices]

    @property
    def sources(self) -> list[str]:
        """A name of the source of each record."""
        return [str(number) for number in self.records.source_numbers[self.indices].tolist()]
