"""Clips of labelled records, for training and testing classifiers.

Unlike a view of pretraining (`data.views`), a clip may be longer than its record and may show a
picture twice: see `data.modality_records`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from avcl_jax.data import shared_memory
from avcl_jax.data.crop import Crop, CropSpec, center_crop, random_crop
from avcl_jax.data.modality_records import Modality, ModalityRecords, evenly_spaced
from avcl_jax.data.pipeline import Draw
from avcl_jax.data.record_format import Record
from avcl_jax.data.records import RecordDataset
from avcl_jax.data.rendering import render_video
from avcl_jax.data.selection import Selection
from avcl_jax.data.spectrogram import LogMelSpec, gather_windows
from avcl_jax.data.tfrecord import RecordError
from avcl_jax.data.views import FORWARD, Clip, ViewSpec


@dataclasses.dataclass(frozen=True)
class VideoClipSpec:
    """Clips of pictures.

    Attributes:
        views: timing; one speed.
        crop: spatial crop.
    """

    views: ViewSpec
    crop: CropSpec

    @property
    def video_shape(self) -> tuple[int, int, int, int]:
        """Shape of a clip: [time, height, width, 3]."""
        return self.views.num_frames, self.crop.image_size, self.crop.image_size, 3

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a clip."""
        return self.video_shape

    dtype = "uint8"
    modality: Modality = dataclasses.field(default="video", init=False)
    sample_rate_hz: None = dataclasses.field(default=None, init=False)

    def random(
        self, record: Record, start_seconds: float, rng: np.random.Generator, out: np.ndarray
    ) -> None:
        """Renders into uint8 [time, size, size, 3], cropped and mirrored alike in all pictures."""
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
    """Clips of sound: windows of samples, whose log-mel is computed on the device.

    Attributes:
        log_mel: definition of the spectrogram.
    """

    log_mel: LogMelSpec

    @property
    def views(self) -> ViewSpec:
        """Timing of a clip."""
        return ViewSpec(self.log_mel.frames, self.log_mel.clip_seconds, (1,), "shared")

    @property
    def sample_rate_hz(self) -> int:
        """That the sound must have."""
        return self.log_mel.sample_rate_hz

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a clip: [frames, window]."""
        return self.log_mel.frames, self.log_mel.window

    dtype = "int16"
    modality: Modality = dataclasses.field(default="audio", init=False)

    def random(
        self, record: Record, start_seconds: float, rng: np.random.Generator, out: np.ndarray
    ) -> None:
        """Renders into int16 [frames, window]; nothing but the time is drawn."""
        (out[...],) = self.fixed(record, start_seconds, 1)

    def fixed(self, record: Record, start_seconds: float, crops: int) -> list[np.ndarray]:
        """Returns one clip int16 [frames, window]; sound has no crops."""
        return [
            gather_windows(
                record.waveform,
                Clip(start_seconds, 0, FORWARD),
                self.log_mel,
                self.views,
                audio_start_seconds=record.audio_start_seconds,
            )
        ]


ClipSpec = VideoClipSpec | AudioClipSpec


def crops_along(height: int, width: int, crops: int) -> list[Crop]:
    """The largest squares at equal distances along the longer side; one is in the middle."""
    if crops == 1:
        return [center_crop(height, width)]
    size = min(height, width)
    tops = np.linspace(0, height - size, crops).round().astype(int)
    lefts = np.linspace(0, width - size, crops).round().astype(int)
    return [Crop(int(t), int(left), size, False) for t, left in zip(tops, lefts, strict=True)]


class LabelledRecords(ModalityRecords, grain.sources.RandomAccessDataSource):
    """The selected records of a data set that have a class and the modality.

    Attributes:
        classes: int64 [n], the class of each.
        class_names: of the label.
    """

    def __init__(
        self,
        records: RecordDataset,
        selection: Selection,
        label: str,
        spec: ClipSpec,
        leave_out: bool,
    ):
        """Looks at labels and timelines, which reads no record.

        Args:
            records: data set.
            selection: which of its records.
            label: name of a label of one class a record.
            spec: clips; their modality must be there.
            leave_out: leave out records that lack the class or the modality, instead of an error.

        Raises:
            LackingError: if the label is missing, or records lack class or modality.
            SelectionError: if the selection does not fit the data set.
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

    def __repr__(self) -> str:
        """Constant description: grain puts it into its checkpoints."""
        return f"LabelledRecords({self.fingerprint}, {len(self)})"


@dataclasses.dataclass(frozen=True)
class RenderRandomClips:
    """Renders one clip of every drawn record, at a random time, straight into the batch.

    Attributes:
        source: records.
        spec: clips.
        shared: clips are a `SharedArray`, to be received by another process.
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
        sent, clips = shared_memory.empty_batch(shape, self.spec.dtype, shared=self.shared)
        for draw, out in zip(draws, clips, strict=True):
            first, last = self.source.starts(draw.position, self.spec.views.clip_seconds)
            start = float(draw.rng.uniform(first, last))
            record = self.source[draw.position]
            with _naming_shard(self.source, draw.position):
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
    """Renders clips at equal distances from the first possible start to the last.

    Args:
        source: records.
        position: which one.
        spec: clips.
        clips: number of times.
        crops: of each; 1 is the centre, more stand along the longer side.

    Returns:
        [clips * crops, ...].

    Raises:
        RecordError: if the record cannot be read, with its name and shard.
    """
    starts = evenly_spaced(*source.starts(position, spec.views.clip_seconds), clips)
    record = source[position]
    with _naming_shard(source, position):
        return np.stack([clip for start in starts for clip in spec.fixed(record, start, crops)])


@contextlib.contextmanager
def _naming_shard(source: LabelledRecords, position: int) -> Iterator[None]:
    """Adds the shard to what is said of a record that cannot be decoded."""
    try:
        yield
    except RecordError as error:
        shard = source.records.shard_of(int(source.indices[position]))
        raise RecordError(f"{shard}, {error}") from error
