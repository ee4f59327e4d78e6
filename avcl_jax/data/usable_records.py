"""The records of a data set on which views fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from avcl_jax.data.modality_records import has_audio, intervals
from avcl_jax.data.record_format import Record
from avcl_jax.data.records import RecordDataset
from avcl_jax.data.rendering import RenderSpec, UsableRecord
from avcl_jax.data.selected_records import SelectedRecords
from avcl_jax.data.selection import Selection
from avcl_jax.data.views import Timeline, views_fit
from avcl_jax.errors import UserError


def _usable_parts(times: Mapping[str, np.ndarray], spec: RenderSpec) -> dict[str, np.ndarray]:
    """Decides what of each record can be used.

    Views are drawn where picture and sound both exist. When that is too short for a view, the
    picture alone is used, then the sound alone.

    Args:
        times: of all records, [records] of each field of `RecordTimeline`.
        spec: rendering.

    Returns:
        `start`, `end` and `gap` in seconds, `has_video`, `has_audio`; neither where no view fits.
    """
    # The mean, because one lost frame must not take a video out of tasks.
    shown = times["last_frame_seconds"] - times["first_frame_seconds"]
    gap = shown / np.maximum(times["num_frames"] - 1, 1)
    (video_start, video_end), (audio_start, audio_end) = intervals(times).values()
    both_start, both_end = np.maximum(video_start, audio_start), np.minimum(video_end, audio_end)
    video = np.asarray(times["num_frames"] > 1) & (spec.modalities != "audio")
    audio = has_audio(times) & (spec.modalities != "video")
    wrong = np.flatnonzero(audio & (times["sample_rate_hz"] != spec.log_mel.sample_rate_hz))
    if len(wrong):
        raise UserError(
            f"records have sound at {times['sample_rate_hz'][wrong[0]]} Hz, the spectrogram is "
            f"defined at {spec.log_mel.sample_rate_hz} Hz: set spectrogram.sample_rate_hz or "
            "prepare again with --sample-rate"
        )

    def fits(start: np.ndarray, end: np.ndarray, frame_gap: np.ndarray) -> np.ndarray:
        return np.asarray(views_fit(end - start, frame_gap, spec.views).any(axis=-1))

    use_both = video & audio & fits(both_start, both_end, gap)
    use_video = ~use_both & video & fits(video_start, video_end, gap)
    use_audio = ~use_both & ~use_video & audio & fits(audio_start, audio_end, 0.0 * gap)
    which = [use_both, use_video, use_audio]
    return {
        "start": np.select(which, [both_start, video_start, audio_start]),
        "end": np.select(which, [both_end, video_end, audio_end]),
        "gap": np.select(which, [gap, gap, 0.0 * gap]),
        "has_video": use_both | use_video,
        "has_audio": use_both | use_audio,
    }


class UsableRecords(SelectedRecords, grain.sources.RandomAccessDataSource):
    """The records of a data set on which a view fits, with what can be used of each.

    Attributes:
        records: the underlying data set.
        num_selected: how many of its records are selected.
        num_empty: selected records without any modality of the run; silence is not audio.
        num_too_short: other selected records on which no view fits.
        indices: int64 positions in it that are used.
        fingerprint: that of the data set, and the selection.
    """

    def __init__(
        self, records: RecordDataset, spec: RenderSpec, selection: Selection | None = None
    ):
        """Looks at every timeline of `records`, which reads no record.

        Args:
            records: data set.
            spec: rendering.
            selection: which of its records; None for all.

        Raises:
            UserError: if no view fits any record.
            SelectionError: if the selection does not fit the data set.
        """
        self.records = records
        self._spec = spec
        self.selection = Selection() if selection is None else selection
        positions = self.selection.positions(records)
        self.num_selected = len(positions)
        timelines = {name: values[positions] for name, values in records.timelines.items()}
        parts = _usable_parts(timelines, spec)
        usable = parts["has_video"] | parts["has_audio"]
        self.indices = positions[usable]
        self._parts = {name: values[usable] for name, values in parts.items()}
        self.fingerprint = self.selection.fingerprint_of(records)
        present = self._present(timelines)
        self.num_empty = int((~np.logical_or.reduce(list(present.values()))).sum())
        self.num_too_short = self.num_selected - len(self.indices) - self.num_empty
        if not len(self.indices):
            raise UserError(self._why_none(timelines))

    def _present(self, timelines: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns which records have each modality of the run, bool [records]."""
        present = {"video": timelines["num_frames"] > 1, "audio": has_audio(timelines)}
        return {n: p for n, p in present.items() if self._spec.modalities in (n, "audio_visual")}

    def _why_none(self, timelines: Mapping[str, np.ndarray]) -> str:
        """Returns one line that says why no view fits any record, and what to change."""
        views = self._spec.views
        none = f"none of the {self.num_selected} records of {self}"
        wanted = self._present(timelines)
        if self.num_empty == self.num_selected:
            lacking = " or ".join(wanted) + " that is not silent" * ("audio" in wanted)
            return f"{none} has {lacking}: set modalities to what the records have"
        slowest = min(views.speeds)
        return (
            f"{none} is long enough for a view of {views.clip_seconds * slowest:g} s "
            f"(views.clip_seconds={views.clip_seconds:g} at speed {slowest}) with "
            f"{views.num_frames} frames, the longest lasts "
            f"{timelines['duration_seconds'].max():.2f} s; reduce views.clip_seconds, "
            "views.num_frames or the lowest of views.speeds"
        )

    def num_without(self, modality: str) -> int:
        """Returns the number of used records without "video", or without audible "audio"."""
        return int((~self._parts[f"has_{modality}"]).sum())

    def lacking(self, modalities: Sequence[str]) -> np.ndarray:
        """Ascending positions in the data set of selected records without a view of all of these.

        Args:
            modalities: "video", "audio".
        """
        whole = np.logical_and.reduce([self._parts[f"has_{name}"] for name in modalities])
        return np.setdiff1d(self.selection.positions(self.records), self.indices[whole])

    def __getitem__(self, position: int) -> tuple[int, Record, UsableRecord]:
        """(index in the data set, record, what can be used of it)."""
        index = int(self.indices[position])
        return index, self.records[index], self.usable(position)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles what it is made from: workers would receive a million numbers through a pipe."""
        return UsableRecords, (self.records, self._spec, self.selection)

    def usable(self, position: int) -> UsableRecord:
        """What can be used of the record at `position`, without reading it."""
        start, end, gap, video, audio = (
            self._parts[name][position].item()
            for name in ("start", "end", "gap", "has_video", "has_audio")
        )
        return UsableRecord(Timeline(start, end, gap), video, audio)

    def __repr__(self) -> str:
        """Constant description: grain puts it into its checkpoints."""
        return f"UsableRecords({self.fingerprint}, {len(self)})"
