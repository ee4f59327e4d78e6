"""What all choices among the records of a data set have in common."""

from __future__ import annotations

import numpy as np

from avcl_jax.data.records import RecordDataset


class SelectedRecords:
    """Some records of a data set.

    Attributes:
        records: the data set.
        indices: int64 [n], positions in it.
    """

    records: RecordDataset
    indices: np.ndarray

    def __len__(self) -> int:
        """Number of records."""
        return len(self.indices)

    @property
    def record_ids(self) -> list[str]:
        """Names of the records."""
        return [self.records.record_ids[int(index)] for index in self.indices]

    @property
    def sources(self) -> list[str]:
        """A name of the source of each record."""
        return [str(number) for number in self.records.source_numbers[self.indices].tolist()]
