"""Clips at fixed times of selected records, as an encoder takes them.

Every selected record counts. A benchmark has clips of half a second; a clip that is longer than its
record starts with it, the last picture then stays and silence follows the sound.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from avcl_jax.data.crop import CropSpec, center_crop
from avcl_jax.data.labelled import VideoClipSpec
from avcl_jax.data.preprocessing import AudioPreprocessing, VideoPreprocessing
from avcl_jax.data.record_format import Record
from avcl_jax.data.records import RecordDataset
from avcl_jax.data.rendering import render_video
from avcl_jax.data.selection import Selection
from avcl_jax.data.spectrogram import gather_windows, log_mel
from avcl_jax.data.tfrecord import RecordError
from avcl_jax.data.views import FORWARD, Clip, ViewSpec
from avcl_jax.evaluation.protocol import ProtocolError


@dataclasses.dataclass(frozen=True)
class ClipTimes:
    """Which clips of a record.

    Attributes:
        speeds: of playback; one that is too fast for a record is replaced by the fastest of these
            that fits it, or by the slowest.
        clips: at each speed, uniformly spaced from the first possible start to the last; a single
            one is in the middle.
    """

    speeds: tuple[int, ...]
    clips: int

    def __post_init__(self) -> None:
        """Refuses speeds and numbers that make no clip."""
        if not self.speeds or self.clips < 1 or any(s < 1 or s != int(s) for s in self.speeds):
            raise ProtocolError(
                f"features.speeds {self.speeds} must be whole numbers of at least 1, and "
                f"features.clips {self.clips} at least 1"
            )


class RecordClips:
    """Random access to the clips of each selected record.

    Attributes:
        records: the underlying data set.
        indices: int64 positions in it.
        left_out: selected records without this modality.
        fingerprint: of the data set and the selection.
        clips_per_record: of each, always.
    """

    def __init__(
        self,
        records: RecordDataset,
        selection: Selection,
        preprocessing: VideoPreprocessing | AudioPreprocessing,
        times: ClipTimes,
        *,
        leave_out: bool,
    ):
        """Looks at timelines, which reads no record.

        Args:
            records: data set.
            selection: which of its records.
            preprocessing: of the encoder.
            times: which clips.
            leave_out: leave out records without this modality, instead of an error.

        Raises:
            ProtocolError: if records lack the modality, or have sound at another rate.
            SelectionError: if the selection does not fit the data set.
        """
        self.records = records
        self._preprocessing, self._times = preprocessing, times
        self._video = isinstance(preprocessing, VideoPreprocessing)
        modality = "video" if self._video else "audio"
        positions = selection.positions(records)
        shown = records.timelines["num_frames" if self._video else "num_samples"][positions] > 0
        if not shown.any() or not (shown.all() or leave_out):
            first = records.record_ids[int(positions[~shown][0])]
            advice = ": set data.leave_out=True to go on without" if shown.any() else ""
            raise ProtocolError(
                f"{int((~shown).sum())} of the {len(positions)} records {selection} of "
                f"{records!r} have no {modality}, first {first!r}{advice}"
            )
        self.indices = positions[shown]
        self.left_out = int((~shown).sum())
        self.clips_per_record = len(times.speeds) * times.clips
        selected = f" {selection}" if selection.conditions else ""
        self.fingerprint = records.fingerprint + selected
        if isinstance(preprocessing, VideoPreprocessing):
            views = ViewSpec(
                preprocessing.num_frames, preprocessing.clip_seconds, times.speeds, "shared"
            )
            crop = CropSpec(preprocessing.image_size, min_area=1.0, flip=False, quarter_turns=False)
            self._spec = VideoClipSpec(views, crop)
        else:
            mel = preprocessing.log_mel
            self._check_rate(mel.sample_rate_hz)
            views = ViewSpec(mel.frames, mel.clip_seconds, times.speeds, "shared")
        self._views = views

    def _check_rate(self, rate_hz: int) -> None:
        rates = self.records.timelines["sample_rate_hz"][self.indices]
        if (wrong := rates[rates != rate_hz]).size:
            raise ProtocolError(
                f"records of {self.records!r} have sound at {wrong[0]} Hz, the encoder takes "
                f"{rate_hz} Hz: prepare again with --sample-rate {rate_hz}"
            )

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

    @property
    def identity(self) -> list[Any]:
        """What decides the clips of a record, in JSON."""
        return [dataclasses.asdict(self._preprocessing), dataclasses.asdict(self._times)]

    def __getitem__(self, position: int) -> np.ndarray:
        """Renders the clips of one record, all of one speed after those of another.

        Returns:
            uint8 [clips, time, size, size, 3], or standardised float32 [clips, frames, mels].

        Raises:
            RecordError: if the record cannot be read, with its name and shard.
        """
        index = int(self.indices[position])
        record = self.records[index]
        try:
            return self._render(record, self._clips(index))
        except RecordError as error:
            raise RecordError(f"{self.records.shard_of(index)}, {error}") from error

    def _clips(self, index: int) -> list[Clip]:
        times = {name: values[index].item() for name, values in self.records.timelines.items()}
        if self._video:
            start = times["first_frame_seconds"]
            # The last frame stays until the next would have come.
            end = times["last_frame_seconds"] + times["max_frame_gap_seconds"]
            end = min(end, times["duration_seconds"])
        else:
            start = times["audio_start_seconds"]
            end = start + times["num_samples"] / times["sample_rate_hz"]
        clips = []
        for number in range(len(self._times.speeds)):
            speed = self._fitting(number, end - start)
            span = self._views.clip_seconds * self._views.speeds[speed]
            last = max(start, end - span)
            count = self._times.clips
            starts = np.linspace(start, last, count) if count > 1 else [(start + last) / 2]
            clips += [Clip(float(s), speed, FORWARD) for s in starts]
        return clips

    def _fitting(self, wanted: int, seconds: float) -> int:
        """Returns the index of the speed to use where the one at `wanted` is asked for."""
        speeds = self._views.speeds
        fitting = [n for n, s in enumerate(speeds) if s * self._views.clip_seconds <= seconds]
        if wanted in fitting or not fitting:
            return wanted if fitting else 0
        return max(fitting)

    def _render(self, record: Record, clips: list[Clip]) -> np.ndarray:
        if self._video:
            crop = center_crop(record.height, record.width)
            return np.stack([render_video(record, clip, crop, self._spec) for clip in clips])
        assert isinstance(self._preprocessing, AudioPreprocessing)
        mel = self._preprocessing.log_mel
        longest = mel.window * mel.frames * max(self._views.speeds)
        waveform = np.pad(record.waveform, (0, longest))  # silence, should a clip reach beyond
        windows = [
            gather_windows(
                waveform, clip, mel, self._views, audio_start_seconds=record.audio_start_seconds
            )
            for clip in clips
        ]
        return np.asarray(log_mel(np.stack(windows), mel))
