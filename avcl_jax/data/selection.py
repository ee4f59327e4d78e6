"""Records chosen by their labels: the training and test lists of a benchmark in one prepared split.

UCF101 and HMDB51 keep their three official splits as labels `split1`, `split2` and `split3`, ESC-50
its folds as label `fold`. `split1=train`, `fold!=3` or `fold=1|2` says which records are meant.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from avcl_jax.data.record_format import UNKNOWN_LABEL
from avcl_jax.data.records import RecordDataset
from avcl_jax.errors import UserError


class SelectionError(UserError):
    """A selection that says nothing, or that nothing in a data set fits."""


class Condition(NamedTuple):
    """What is demanded of one label.

    Attributes:
        label: name of a label of one class a record.
        values: names of classes.
        negated: any other known class is demanded, instead of one of these.
    """

    label: str
    values: tuple[str, ...]
    negated: bool

    def __str__(self) -> str:
        """As `Selection.parse` reads it."""
        return f"{self.label}{'!=' if self.negated else '='}{'|'.join(self.values)}"


@dataclasses.dataclass(frozen=True)
class Selection:
    """Records that meet all conditions; without a condition, all records.

    Attributes:
        conditions: what is demanded. A record whose label is unknown meets none on that label, not
            even a negated one.
    """

    conditions: tuple[Condition, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Selection:
        """Reads `LABEL=VALUE`, `LABEL=VALUE|VALUE` or `LABEL!=VALUE`, several joined by `;`.

        Args:
            text: the selection; empty for all records.

        Raises:
            SelectionError: if it is written otherwise.
        """
        conditions = []
        for part in text.split(";") if text.strip() else []:
            found = re.fullmatch(r"\s*([^=!\s]+)\s*(!?=)(.+)", part)
            values = [value.strip() for value in found.group(3).split("|")] if found else []
            if found is None or not all(values):
                raise SelectionError(
                    f"{part.strip()!r} selects nothing: write LABEL=VALUE, LABEL=VALUE|VALUE or "
                    "LABEL!=VALUE, several joined by ';'"
                )
            conditions.append(Condition(found.group(1), tuple(values), found.group(2) == "!="))
        return cls(tuple(conditions))

    @classmethod
    def of(cls, wanted: Mapping[str, str | Sequence[str]]) -> Selection:
        """The records whose labels have these values: `{"split1": "train"}`."""
        return cls(
            tuple(
                Condition(label, (values,) if isinstance(values, str) else tuple(values), False)
                for label, values in wanted.items()
            )
        )

    def __str__(self) -> str:
        """As `parse` reads it."""
        return ";".join(map(str, self.conditions))

    def fingerprint_of(self, records: RecordDataset) -> str:
        """Returns the fingerprint of the data set, followed by the selection where there is one."""
        return f"{records.fingerprint} {self}" if self.conditions else records.fingerprint

    def positions(self, records: RecordDataset) -> np.ndarray:
        """Returns int64, the ascending positions of the selected records; reads no record.

        Raises:
            SelectionError: if `records` lacks a label or a class, or nothing is selected.
        """
        chosen = np.ones(len(records), bool)
        for condition in self.conditions:
            numbers = _numbers(condition, records)
            known = records.labels[condition.label]
            inside = np.isin(known, numbers)
            chosen &= (known != UNKNOWN_LABEL) & ~inside if condition.negated else inside
        positions = np.flatnonzero(chosen)
        if not len(positions):
            raise SelectionError(f"none of the {len(records)} records of {records} has {self}")
        return positions


def _numbers(condition: Condition, records: RecordDataset) -> list[int]:
    if condition.label not in records.labels:
        several = ", of which a record may have several" * (condition.label in records.multilabel)
        raise SelectionError(
            f"cannot select {condition}: {records} has the labels "
            f"{', '.join(sorted(records.labels)) or 'none'}, not {condition.label!r}{several}"
        )
    names = records.class_names[condition.label]
    for value in condition.values:
        if value not in names:
            shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise SelectionError(
                f"cannot select {condition}: label {condition.label!r} of {records} has no class "
                f"{value!r}, it has {shown}"
            )
    return [names.index(value) for value in condition.values]
