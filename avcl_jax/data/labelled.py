"""Clips of labelled records, for training and testing classifiers.

Unlike a view of pretraining (`views`), a clip may be longer than its record and may show a frame
twice: see `selection.ModalityRecords`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from avcl_jax.data.images import CropSpec, crops_along, random_crop
from avcl_jax.data.pipeline import Draw
from avcl_jax.data.record_format import Record
from avcl_jax.data.records import RecordDataset
from avcl_jax.data.rendering import render_video
from avcl_jax.data.selection import Modality, ModalityRecords, Selection
from avcl_jax.data.spectrogram import LogMelSpec, gather_windows
from avcl_jax.data.views import FORWARD, Clip, ViewSpec, clip_times
from avcl_jax.data.workers import empty_batch


@dataclasses.dataclass(frozen=True)
class VideoClipSpec:
    """Video clips: timing, of one speed, and spatial crop."""

    views: ViewSpec
    crop: CropSpec
    dtype = "uint8"
    modality: Modality = dataclasses.field(default="video", init=False)
    sample_rate_hz: None = dataclasses.field(default=None, init=False)

    @property
    def video_shape(self) -> tuple[int, int, int, int]:
        """Shape of a clip: [time, height, width, 3]."""
        return self.views.num_frames, self.crop.image_size, self.crop.image_size, 3

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a clip."""
        return self.video_shape

    def random(
        self, record: Record, start_seconds: float, rng: np.random.Generator, out: np.ndarray
    ) -> None:
        """Renders into uint8 [time, size, size, 3], cropped and mirrored alike in all frames."""
        crop = random_crop(rng, record.height, record.width, self.crop)
        render_video(record, Clip(start_seconds, 0, FORWARD), crop, self, out)

    def fixed(self, record: Record, start_seconds: float, crops: int) -> list[np.ndarray]:
        """Returns `crops` clips uint8 [time, size, size, 3] of one time."""
        clip = Clip(start_seconds, 0, FORWARD)
        return [
            render_video(record, clip, crop, self)
            for crop in crops_along(record.height, record.width, crops)
        ]


@dataclasses.dataclass(frozen=True)
class AudioClipSpec:
    """Audio clips: windows of samples, whose log-mel is computed on the device."""

    log_mel: LogMelSpec
    dtype = "int16"
    modality: Modality = dataclasses.field(default="audio", init=False)

    @property
    def views(self) -> ViewSpec:
        """Timing of a clip."""
        return ViewSpec(self.log_mel.frames, self.log_mel.clip_seconds, (1,), "shared")

    @property
    def sample_rate_hz(self) -> int:
        """Required rate of audio."""
        return self.log_mel.sample_rate_hz

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a clip: [frames, window]."""
        return self.log_mel.frames, self.log_mel.window

    def random(
        self, record: Record, start_seconds: float, rng: np.random.Generator, out: np.ndarray
    ) -> None:
        """Renders into int16 [frames, window]; nothing but the time is drawn."""
        (out[...],) = self.fixed(record, start_seconds, 1)

    def fixed(self, record: Record, start_seconds: float, crops: int) -> list[np.ndarray]:
        """Returns one clip int16 [frames, window]; audio has no crops."""
        clip, start = Clip(start_seconds, 0, FORWARD), record.audio_start_seconds
        return [
            gather_windows(
                record.waveform, clip, self.log_mel, self.views, audio_start_seconds=start
            )
        ]


ClipSpec = VideoClipSpec | AudioClipSpec


class LabelledRecords(ModalityRecords, grain.sources.RandomAccessDataSource):
    """Selected records that have a class (`classes` int64 [n]) and the modality."""

    def __init__(
        self,
        records: RecordDataset,
        selection: Selection,
        label: str,
        spec: ClipSpec,
        leave_out: bool,
    ):
        """Looks at labels and timelines, which reads no record; arguments as for `ModalityRecords`.

        Raises:
            SelectionError: if the selection does not fit the data set, the label is missing, or
                records lack class or modality and `leave_out` is False.
        """
        super().__init__(
            records,
            selection,
            spec.modality,
            sample_rate_hz=spec.sample_rate_hz,
            labels=[label],
            leave_out=leave_out,
        )
        self._arguments = (records, selection, label, spec, leave_out)
        self.classes, self.class_names = self.classes_of(label), records.class_names[label]

    def __getitem__(self, position: int) -> Record:
        """Reads one record."""
        return self.records[int(self.indices[position])]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles what it is made from: workers would receive a million numbers through a pipe."""
        return LabelledRecords, self._arguments


@dataclasses.dataclass(frozen=True)
class RenderRandomClips:
    """Renders one clip per drawn record, at a random time, straight into the batch.

    If `shared`, clips are a `SharedArray`, to be received by another process.
    """

    source: LabelledRecords
    spec: ClipSpec
    shared: bool

    def __call__(self, draws: Sequence[Draw]) -> dict[str, Any]:
        """Returns `clips` [rows, ...], `label` and `record_index` int32 [rows].

        Raises:
            RecordError: if one cannot be read, with its name and shard.
        """
        shape = (len(draws), *self.spec.shape)
        sent, clips = empty_batch(shape, self.spec.dtype, shared=self.shared)
        span = self.spec.views.clip_seconds
        for draw, out in zip(draws, clips, strict=True):
            first, last = clip_times(*self.source.interval(draw.position), span, 2)
            start = float(draw.rng.uniform(first, last))
            record, index = self.source[draw.position], int(self.source.indices[draw.position])
            with self.source.records.naming_shard(index):
                self.spec.random(record, start, draw.rng, out)
        positions = [draw.position for draw in draws]
        return {
            "clips": sent,
            "label": self.source.classes[positions].astype(np.int32),
            "record_index": self.source.indices[positions].astype(np.int32),
        }


def fixed_clips(
    source: LabelledRecords, position: int, spec: ClipSpec, *, clips: int, crops: int
) -> np.ndarray:
    """Renders clips of the record at `position`, at equal distances from first to last start.

    Args:
        clips: number of times.
        crops: number of crops at each time; one is centred, more lie along the longer side.

    Returns:
        [clips * crops, ...].

    Raises:
        RecordError: if the record cannot be read, with its name and shard.
    """
    starts = clip_times(*source.interval(position), spec.views.clip_seconds, clips)
    record = source[position]
    with source.records.naming_shard(int(source.indices[position])):
        return np.stack([clip for start in starts for clip in spec.fixed(record, start, crops)])
