"""Choice of records: by label, or because views fit on them.

`Selection` chooses by label: UCF101 and HMDB51 keep their three official splits as labels `split1`,
`split2` and `split3`, ESC-50 its folds as label `fold`, so `split1=train`, `fold!=3` or `fold=1|2`
is the training or test list of a benchmark in one prepared split. `UsableRecords` are the selected
records of pretraining, on which whole views must fit; those of benchmarks are `clips.ClipRecords`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from avcl_jax.data.record_format import SILENCE_PEAK, UNKNOWN_LABEL, Record
from avcl_jax.data.records import RecordDataset
from avcl_jax.data.render_spec import RenderSpec
from avcl_jax.data.views import Timeline, ViewSpec, views_fit
from avcl_jax.errors import UserError

Modality = Literal["video", "audio"]


class SelectionError(UserError):
    """A selection that cannot be read, or records that lack its labels or a modality."""


# Timelines are compared for this many records at a time: temporary arrays of millions are large.
_BLOCK = 1 << 16


class Condition(NamedTuple):
    """Demand on a label of one class per record: one of `values`, or if `negated` another class."""

    label: str
    values: tuple[str, ...]
    negated: bool

    def __str__(self) -> str:
        """Returns the text that `Selection.parse` reads."""
        return f"{self.label}{'!=' if self.negated else '='}{'|'.join(self.values)}"


@dataclasses.dataclass(frozen=True)
class Selection:
    """Records that meet all conditions; without a condition, all records.

    A record whose label is unknown meets no condition on that label, not even a negated one.
    """

    conditions: tuple[Condition, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Selection:
        """Reads `LABEL=VALUE`, `LABEL=VALUE|VALUE` or `LABEL!=VALUE`, several joined by `;`.

        Raises:
            SelectionError: if it is written otherwise.
        """
        conditions = []
        for part in text.split(";") if text.strip() else []:
            match = re.fullmatch(r"\s*([^=!\s]+)\s*(!?=)(.+)", part)
            values = [value.strip() for value in match.group(3).split("|")] if match else []
            if match is None or not all(values):
                raise SelectionError(
                    f"{part.strip()!r} selects nothing: write LABEL=VALUE, LABEL=VALUE|VALUE or "
                    "LABEL!=VALUE, several joined by ';'"
                )
            conditions.append(Condition(match.group(1), tuple(values), match.group(2) == "!="))
        return cls(tuple(conditions))

    def __str__(self) -> str:
        """Returns the text that `parse` reads."""
        return ";".join(map(str, self.conditions))

    def positions(self, records: RecordDataset) -> np.ndarray:
        """Returns int64, the ascending positions of the selected records; reads no record.

        Raises:
            SelectionError: if `records` lacks a label or a class, or nothing is selected.
        """
        mask = np.ones(len(records), bool)
        for condition in self.conditions:
            problem = f"cannot select {condition}: "
            names = single_classes(records, condition.label, problem)
            for value in condition.values:
                if value not in names:
                    raise SelectionError(
                        f"{problem}label {condition.label!r} of {records} has no class {value!r}, "
                        f"it has {', '.join(names[:8])}" + ", ..." * (len(names) > 8)
                    )
            classes = records.labels[condition.label]
            inside = np.isin(classes, [names.index(value) for value in condition.values])
            mask &= (classes != UNKNOWN_LABEL) & ~inside if condition.negated else inside
        if not mask.any():
            raise SelectionError(f"none of the {len(records)} records of {records} has {self}")
        return np.flatnonzero(mask)


def single_classes(records: RecordDataset, label: str, problem: str = "") -> list[str]:
    """Returns the class names of a label; raises SelectionError if it is not of one class."""
    if label not in records.labels:
        several = ", which allows several" * (label in records.multilabel)
        known, fix = "no label", "prepare the records from a table with labels"
        if records.labels:
            known, fix = f"the labels {', '.join(sorted(records.labels))}", "choose one of these"
        raise SelectionError(
            f"{problem}{records} has {known} of one class per record, not {label!r}{several}: {fix}"
        )
    return records.class_names[label]


def intervals(times: Mapping[str, np.ndarray]) -> dict[Modality, tuple[np.ndarray, np.ndarray]]:
    """Returns start and end of video and audio, seconds [records], by the fields of `TIMELINE`."""
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


class SelectedRecords:
    """Some records of a data set, without reading any.

    `indices` int64 [n] are their positions in it, ascending; `fingerprint` is that of the data set,
    followed by the selection where there is one.
    """

    def __init__(self, records: RecordDataset, selection: Selection):
        """Raises SelectionError if the selection does not fit the data set."""
        self.records, self.selection = records, selection
        self.indices = selection.positions(records)
        self.fingerprint = f"{records.fingerprint} {selection}".rstrip()

    def __len__(self) -> int:
        return len(self.indices)

    def __str__(self) -> str:
        return f"{self.records}" + f" with {self.selection}" * bool(self.selection.conditions)

    def __repr__(self) -> str:
        """Returns a constant description: grain puts it into its checkpoints."""
        return f"{type(self).__name__}({self.fingerprint}, {len(self)})"

    @property
    def record_ids(self) -> list[str]:
        """Names of the records."""
        return [self.records.record_ids[int(index)] for index in self.indices]

    @property
    def sources(self) -> list[str]:
        """Name of the source of each record."""
        return [str(number) for number in self.records.source_numbers[self.indices].tolist()]

    def timelines(self) -> dict[str, np.ndarray]:
        """Returns [n] of each field of `TIMELINE`."""
        return {name: values[self.indices] for name, values in self.records.timelines.items()}

    def check_rate(self, rates: np.ndarray, sample_rate_hz: int | None) -> None:
        """Raises SelectionError if audio has another rate than a spectrogram requires."""
        if (wrong := rates[rates != sample_rate_hz]).size:
            raise SelectionError(
                f"records of {self} have audio at {wrong[0]} Hz, the spectrogram is defined at "
                f"{sample_rate_hz} Hz: change its sample_rate_hz, or prepare again with "
                f"--sample-rate {sample_rate_hz}"
            )


class UsableRecords(SelectedRecords):
    """The records of a data set on which a view fits, and the usable part of each.

    Views are drawn where video and audio both exist. When that is too short for a view, the video
    alone is used, then the audio alone.

    Attributes:
        num_selected: number of selected records.
        num_empty: selected records without any modality of the run; silence is not audio.
        num_too_short: other selected records on which no view fits.
    """

    def __init__(
        self, records: RecordDataset, spec: RenderSpec, selection: Selection | None = None
    ):
        """Looks at the timelines of the selected records; reads no record.

        Raises:
            SelectionError: if the selection does not fit the data set, no view fits any record, or
                audio has another rate than the spectrogram.
        """
        super().__init__(records, selection or Selection())
        self._spec = spec
        self.num_selected = len(self.indices)
        self.num_empty, selected, usable = 0, self.indices, []
        for begin in range(0, len(selected), _BLOCK):
            times, video, audio = self._timelines(selected[begin : begin + _BLOCK])
            self.check_rate(times["sample_rate_hz"][audio], spec.log_mel.sample_rate_hz)
            parts = _usable_parts(times, video, audio, spec.views)
            usable.append(np.stack([parts["has_video"], parts["has_audio"]]))
            self.num_empty += int((~(video | audio)).sum())
        has = np.concatenate(usable, axis=1)
        self.indices = selected[has.any(axis=0)]
        self._has = dict(zip(("video", "audio"), has[:, has.any(axis=0)], strict=True))
        self.num_too_short = len(selected) - self.num_empty - len(self.indices)
        if not len(self.indices):
            longest = records.timelines["duration_seconds"][selected].max()
            raise SelectionError(self._why_none(longest))

    def _timelines(
        self, indices: np.ndarray
    ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        """Returns the fields of `TIMELINE` of records, and which have video and audio."""
        times = {name: values[indices] for name, values in self.records.timelines.items()}
        video = np.asarray(times["num_frames"] > 1) & (self._spec.modalities != "audio")
        return times, video, has_audio(times) & (self._spec.modalities != "video")

    def _why_none(self, longest_seconds: float) -> str:
        """Returns one line that says why no view fits any record, and what to change."""
        views = self._spec.views
        none = f"none of the {self.num_selected} records of {self}"
        if self.num_empty == self.num_selected:
            wanted = [n for n in ("video", "audio") if self._spec.modalities in (n, "audio_visual")]
            lacking = " or ".join(wanted) + " that is not silent" * ("audio" in wanted)
            return f"{none} has {lacking}: set modalities to what the records have"
        slowest = min(views.speeds)
        return (
            f"{none} is long enough for a view of {views.clip_seconds * slowest:g} s "
            f"(clip_seconds={views.clip_seconds:g} at speed {slowest}) with {views.num_frames} "
            f"frames, the longest lasts {longest_seconds:.2f} s; reduce clip_seconds, num_frames "
            "or the lowest of the speeds of views"
        )

    def num_without(self, modality: str) -> int:
        """Returns the number of used records without "video", or without audible "audio"."""
        return int((~self._has[modality]).sum())

    def lacking(self, modalities: Sequence[str]) -> np.ndarray:
        """Returns positions in the data set, int64, of records without a view of all modalities."""
        whole = np.logical_and.reduce([self._has[name] for name in modalities])
        return np.setdiff1d(self.selection.positions(self.records), self.indices[whole])

    def __getitem__(self, position: int) -> tuple[int, Record, Timeline]:
        """Reads one record; returns its position in the data set, the record, its usable part."""
        index = int(self.indices[position])
        return index, self.records[index], self.usable([position])[0]

    def usable(self, positions: Sequence[int] | np.ndarray) -> list[Timeline]:
        """Returns the usable part of each record at `positions`, without reading it."""
        found = self._timelines(self.indices[positions])
        columns = _usable_parts(*found, self._spec.views)
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        return [Timeline(**dict(zip(columns, row, strict=True))) for row in rows]


def _usable_parts(
    times: Mapping[str, np.ndarray], video: np.ndarray, audio: np.ndarray, views: ViewSpec
) -> dict[str, np.ndarray]:
    """Decides which part of each record can be used, given which have video and audio.

    Returns the fields of `Timeline`; neither video nor audio where no view fits.
    """
    # The mean, because one lost frame must not take a video out of tasks.
    shown = times["last_frame_seconds"] - times["first_frame_seconds"]
    gap = shown / np.maximum(times["num_frames"] - 1, 1)
    (video_start, video_end), (audio_start, audio_end) = intervals(times).values()
    both_start, both_end = np.maximum(video_start, audio_start), np.minimum(video_end, audio_end)

    def fits(start: np.ndarray, end: np.ndarray, frame_gap: np.ndarray) -> np.ndarray:
        return np.asarray(views_fit(end - start, frame_gap, views).any(axis=-1))

    use_both = video & audio & fits(both_start, both_end, gap)
    use_video = ~use_both & video & fits(video_start, video_end, gap)
    use_audio = ~use_both & ~use_video & audio & fits(audio_start, audio_end, 0.0 * gap)
    uses = [use_both, use_video, use_audio]
    return {
        "start_seconds": np.select(uses, [both_start, video_start, audio_start]),
        "end_seconds": np.select(uses, [both_end, video_end, audio_end]),
        "frame_gap_seconds": np.select(uses, [gap, gap, 0.0 * gap]),
        "has_video": use_both | use_video,
        "has_audio": use_both | use_audio,
    }
