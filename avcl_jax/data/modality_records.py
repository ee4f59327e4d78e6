"""The records of a data set that have pictures, or sound, and when these begin and end.

Benchmarks contain clips of half a second, and none of them may be left out: a clip that is longer
than its record starts with it, the last picture then stays, and silence follows the sound. This is
what `data.labelled` (fine-tuning) and `evaluation.features` (frozen features) are made of;
`data.usable_records` has the records of pretraining, on which whole views must fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np

from avcl_jax.data.record_format import UNKNOWN_LABEL
from avcl_jax.data.records import RecordDataset
from avcl_jax.data.selected_records import SelectedRecords
from avcl_jax.data.selection import Selection
from avcl_jax.data.silence import SILENCE_PEAK
from avcl_jax.errors import UserError

Modality = Literal["video", "audio"]


class LackingError(UserError):
    """Records lack what is asked of them."""


class ModalityRecords(SelectedRecords):
    """The selected records of a data set that have a modality, and the labels that are needed.

    Attributes:
        records: the underlying data set.
        indices: int64 [n], positions in it.
        left_out: selected records that lack the modality or a label.
        fingerprint: of the data set and the selection.
    """

    def __init__(
        self,
        records: RecordDataset,
        selection: Selection,
        modality: Modality,
        *,
        sample_rate_hz: int | None,
        labels: Sequence[str],
        leave_out: bool,
    ):
        """Looks at labels and timelines, which reads no record.

        Args:
            records: data set.
            selection: which of its records.
            modality: that must be there.
            sample_rate_hz: that sound must have; None for pictures.
            labels: of one class a record, that must be known.
            leave_out: leave out records that lack one of these, instead of an error.

        Raises:
            LackingError: if a label is missing or has one class, records lack something, or have
                sound at another rate.
            SelectionError: if the selection does not fit the data set.
        """
        self.records, self.selection = records, selection
        positions = selection.positions(records)
        kept = np.ones(len(positions), bool)
        for what, has in _asked(records, modality, labels):
            missing = ~has[positions]
            if missing.all() or (missing.any() and not leave_out):
                first = records.record_ids[int(positions[missing][0])]
                advice = ": set data.leave_out=True to go on without" * (not missing.all())
                raise LackingError(
                    f"{int(missing.sum())} of the {len(positions)} records of {self} "
                    f"have no {what}, first {first!r}{advice}"
                )
            kept &= ~missing
        if not kept.any():
            raise LackingError(f"no record of {self} has {modality} and known {', '.join(labels)}")
        self.indices = positions[kept]
        self.left_out = int((~kept).sum())
        self.fingerprint = selection.fingerprint_of(records)
        times = {name: values[self.indices] for name, values in records.timelines.items()}
        rate = times["sample_rate_hz"]
        if modality == "audio" and (wrong := rate[rate != sample_rate_hz]).size:
            raise LackingError(
                f"records of {self} have sound at {wrong[0]} Hz, the encoder takes "
                f"{sample_rate_hz} Hz: prepare again with --sample-rate {sample_rate_hz}"
            )
        self._start, self._end = intervals(times)[modality]

    def classes_of(self, label: str) -> np.ndarray:
        """Returns the class of each record, int64 [n]."""
        return self.records.labels[label][self.indices].astype(np.int64)

    def seconds(self, position: int) -> float:
        """Returns how long the modality lasts in a record."""
        return float(self._end[position] - self._start[position])

    def starts(self, position: int, clip_seconds: float) -> tuple[float, float]:
        """Returns first and last possible start of a clip, seconds; equal where it does not fit."""
        start, end = float(self._start[position]), float(self._end[position])
        return start, max(start, end - clip_seconds)


def intervals(times: Mapping[str, np.ndarray]) -> dict[Modality, tuple[np.ndarray, np.ndarray]]:
    """Returns start and end of the video and of the audio of records, in seconds.

    Args:
        times: [records] of each field of `RecordTimeline`.
    """
    # The last frame stays until the next would have come.
    until = times["last_frame_seconds"] + times["max_frame_gap_seconds"]
    start = times["audio_start_seconds"]
    return {
        "video": (times["first_frame_seconds"], np.minimum(until, times["duration_seconds"])),
        "audio": (start, start + times["num_samples"] / np.maximum(times["sample_rate_hz"], 1)),
    }


def has_audio(times: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns bool [records], which have audio that is not silent; `times` as for `intervals`."""
    return np.asarray(times["audio_peak"] > SILENCE_PEAK)


def evenly_spaced(first: float, last: float, count: int) -> list[float]:
    """Returns times at equal distances from the first to the last; a single one is in the middle.

    Args:
        first: seconds.
        last: seconds.
        count: at least 1.
    """
    return np.linspace(first, last, count).tolist() if count > 1 else [(first + last) / 2]


def _asked(
    records: RecordDataset, modality: Modality, labels: Sequence[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields what records must have, and which have it."""
    if modality == "video":
        yield "video", records.timelines["num_frames"] > 0
    else:
        yield "audio, or only silence", has_audio(records.timelines)
    for label in labels:
        _check_classes(records, label)
        yield f"known {label!r}", records.labels[label] != UNKNOWN_LABEL


def _check_classes(records: RecordDataset, label: str) -> None:
    if label not in records.labels:
        several = ", of which a record may have several" * (label in records.multilabel)
        raise LackingError(
            f"{records} has the labels {', '.join(sorted(records.labels)) or 'none'} of one class "
            f"per record, not {label!r}{several}: set data.label to one of these"
        )
    if len(names := records.class_names[label]) < 2:
        raise LackingError(
            f"label {label!r} of {records} has only the class {names[0]!r}, two are needed: set "
            "data.label to another label"
        )
