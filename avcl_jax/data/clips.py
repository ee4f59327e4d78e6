"""Clips of selected records, of one modality, at fixed or random times.

No short record may be left out of a benchmark. So unlike a view of pretraining (`views`), a clip
may be longer than its record, starts with it, and may show a frame twice: the last frame stays,
silence follows the audio.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from avcl_jax.data.images import crops_along, random_crop
from avcl_jax.data.record_format import UNKNOWN_LABEL, Record
from avcl_jax.data.records import RecordDataset, RecordReader
from avcl_jax.data.render_spec import CropSpec
from avcl_jax.data.rendering import Renderer, render_video
from avcl_jax.data.selection import (
    Modality,
    SelectedRecords,
    Selection,
    SelectionError,
    has_audio,
    intervals,
    single_classes,
)
from avcl_jax.data.spectrogram import LogMelSpec, gather_windows
from avcl_jax.data.views import FORWARD, Clip, Timeline, ViewSpec, clip_times, fixed_clips
from avcl_jax.data.workers import Shapes


@dataclasses.dataclass(frozen=True)
class VideoClipSpec:
    """Video clips: timing and spatial crop."""

    views: ViewSpec
    crop: CropSpec
    modality: ClassVar[Modality] = "video"
    dtype: ClassVar[str] = "uint8"
    sample_rate_hz: ClassVar[None] = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a clip: [time, height, width, 3]."""
        return self.views.num_frames, self.crop.image_size, self.crop.image_size, 3

    def random(self, record: Record, clip: Clip, rng: np.random.Generator, out: np.ndarray) -> None:
        """Renders into uint8 [time, size, size, 3], cropped and mirrored alike in all frames."""
        crop = random_crop(rng, record.height, record.width, self.crop)
        render_video(record, clip, crop, self.views, out)

    def fixed(self, record: Record, clip: Clip, crops: int) -> list[np.ndarray]:
        """Returns `crops` clips uint8 [time, size, size, 3] of one time."""
        places = crops_along(record.height, record.width, crops)
        outs = np.empty((crops, *self.shape), np.uint8)
        return [
            render_video(record, clip, crop, self.views, out)
            for crop, out in zip(places, outs, strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class AudioClipSpec:
    """Audio clips: windows of samples, for the spectrogram `log_mel`."""

    log_mel: LogMelSpec
    speeds: tuple[int, ...] = (1,)
    modality: ClassVar[Modality] = "audio"
    dtype: ClassVar[str] = "int16"

    @property
    def views(self) -> ViewSpec:
        """Timing of a clip."""
        return ViewSpec(self.log_mel.frames, self.log_mel.clip_seconds, self.speeds, "shared")

    @property
    def sample_rate_hz(self) -> int:
        """Required rate of audio."""
        return self.log_mel.sample_rate_hz

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a clip: [frames, window]."""
        return self.log_mel.frames, self.log_mel.window

    def random(self, record: Record, clip: Clip, rng: np.random.Generator, out: np.ndarray) -> None:
        """Renders into int16 [frames, window]; nothing but the time is drawn."""
        (out[...],) = self.fixed(record, clip, 1)

    def fixed(self, record: Record, clip: Clip, crops: int) -> list[np.ndarray]:
        """Returns one clip int16 [frames, window]; audio has no crops."""
        start = record.audio_start_seconds
        windows = gather_windows(
            record.waveform, clip, self.log_mel, self.views, audio_start_seconds=start
        )
        return [windows]


ClipSpec = VideoClipSpec | AudioClipSpec


class ClipRecords(SelectedRecords):
    """Selected records of a data set that have a modality and the labels needed, and their clips.

    Attributes:
        left_out: number of selected records that lack the modality or a label.
    """

    def __init__(
        self,
        records: RecordDataset,
        selection: Selection,
        spec: ClipSpec,
        labels: Sequence[str] = (),
        leave_out: bool = False,
        shared_interval: bool = False,
    ):
        """Looks at labels and timelines, which reads no record.

        Args:
            labels: labels of one class per record that must be known.
            leave_out: leave out records that lack the modality or a label, instead of an error.
            shared_interval: place clips in the interval that video and audio share if one fits
                into it, so that both modalities are seen at the same times, as in `UsableRecords`.

        Raises:
            SelectionError: if the selection does not fit the data set, a label is missing or has
                one class, records lack something, or have audio at another rate.
        """
        super().__init__(records, selection)
        self.spec = spec
        times = self.timelines()
        if spec.modality == "video":
            required = {"video": times["num_frames"] > 0}
        else:
            required = {"audio, or only silence": has_audio(times)}
        for label in labels:
            if len(names := single_classes(records, label)) < 2:
                raise SelectionError(
                    f"label {label!r} of {records} has only the class {names[0]!r}, two are "
                    "needed: choose another label"
                )
            known = records.labels[label][self.indices] != UNKNOWN_LABEL
            required[f"known {label!r}"] = known
        for name, mask in required.items():
            if not mask.any() or not (mask.all() or leave_out):
                first = records.record_ids[int(self.indices[~mask][0])]
                advice = ": set leave_out=True to skip them" * bool(mask.any())
                raise SelectionError(
                    f"{int((~mask).sum())} of the {len(mask)} records of {self} "
                    f"have no {name}, first {first!r}{advice}"
                )
        mask = np.logical_and.reduce(list(required.values()))
        if not mask.any():
            known = ", ".join(labels)
            raise SelectionError(f"no record of {self} has {spec.modality} and known {known}")
        self.indices, self.left_out = self.indices[mask], int((~mask).sum())
        if spec.sample_rate_hz:
            self.check_rate(self.timelines()["sample_rate_hz"], spec.sample_rate_hz)
        self._start, self._end = intervals(records.timelines)[spec.modality]
        if shared_interval:
            self._share_interval()

    def _share_interval(self) -> None:
        views, times = self.spec.views, self.records.timelines
        starts, ends = zip(*intervals(times).values(), strict=True)
        start, end = np.maximum(*starts), np.minimum(*ends)
        both = (times["num_frames"] > 1) & has_audio(times)
        fits = both & (end - start >= views.clip_seconds * min(views.speeds) - 1e-6)
        self._start = np.where(fits, start, self._start)
        self._end = np.where(fits, end, self._end)

    def classes_of(self, label: str) -> np.ndarray:
        """Returns the class of each record, int64 [n]."""
        return self.records.labels[label][self.indices].astype(np.int64)

    def interval(self, position: int) -> tuple[float, float]:
        """Returns start and end of the modality in a record, seconds."""
        index = self.indices[position]
        return float(self._start[index]), float(self._end[index])

    def joined(self, others: Sequence[ClipRecords]) -> ClipRecords:
        """Returns the records of these and of others of the same data set, each once."""
        together = copy.copy(self)
        together.indices = np.unique(np.concatenate([some.indices for some in (self, *others)]))
        return together

    def __getitem__(self, position: int) -> Record:
        """Reads one record."""
        return self.records[int(self.indices[position])]

    def fixed(self, position: int, *, clips: int, crops: int = 1) -> np.ndarray:
        """Renders clips of a record at equal distances from first to last start, at every speed.

        Args:
            clips: number of times at each speed.
            crops: number of crops at each time; one is centred, more lie along the longer side.

        Returns:
            [speeds * clips * crops, ...], all of one speed after those of another.

        Raises:
            RecordError: if the record cannot be read, with its name and shard.
        """
        views, place = self.spec.views, self.records.place_of(int(self.indices[position]))
        timeline = Timeline(*self.interval(position), frame_gap_seconds=0.0)
        times = fixed_clips(timeline, views, range(len(views.speeds)), clips)
        with self.records.reader.open(place) as record:
            return np.stack([c for time in times for c in self.spec.fixed(record, time, crops)])


@dataclasses.dataclass(frozen=True)
class RandomClips:
    """Batches of one clip per drawn record, at a random time, with its class of a label.

    A batch contains `clips` [rows, ...], `label` and `record_index` int32 [rows]. A record that
    cannot be read is a RecordError with its name and shard.
    """

    source: ClipRecords
    label: str

    def __len__(self) -> int:
        return len(self.source)

    def shapes(self, rows: int) -> Shapes:
        """Returns shape and dtype of each array of a batch."""
        spec, number = self.source.spec, ((rows,), "int32")
        clips = (rows, *spec.shape), spec.dtype
        return {"clips": clips, "label": number, "record_index": number}

    def requests(self, positions: np.ndarray) -> Any:
        """Returns what `render` needs of these records: places, intervals, numbers."""
        source, records, indices = self.source, self.source.records, self.source.indices[positions]
        numbers = {"label": records.labels[self.label][indices], "record_index": indices}
        places = [records.place_of(index) for index in indices.tolist()]
        return places, [source.interval(position) for position in positions.tolist()], numbers

    @property
    def render(self) -> Renderer:
        """Function that writes rows of a batch, for worker processes."""
        return functools.partial(_render_clips, self.source.records.reader, self.source.spec)


def _render_clips(
    reader: RecordReader,
    spec: ClipSpec,
    requests: Any,
    rngs: Sequence[np.random.Generator],
    out: Mapping[str, np.ndarray],
) -> None:
    places, spans, numbers = requests
    for name, values in numbers.items():
        out[name][...] = values
    for place, (start, end), rng, clip in zip(places, spans, rngs, out["clips"], strict=True):
        first, last = clip_times(start, end, spec.views.clip_seconds, 2)
        time = Clip(float(rng.uniform(first, last)), 0, FORWARD)
        with reader.open(place) as record:
            spec.random(record, time, rng, clip)
