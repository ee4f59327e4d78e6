"""Clips at fixed times of selected records, as an encoder takes them.

Every selected record counts, however short it is: see `data.modality_records`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from avcl_jax.data.crop import CropSpec, center_crop
from avcl_jax.data.labelled import VideoClipSpec
from avcl_jax.data.modality_records import ModalityRecords, evenly_spaced, has_audio, intervals
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


class RecordClips(ModalityRecords):
    """Random access to the clips of each selected record.

    Attributes:
        clips_per_record: of each, always.
    """

    def __init__(
        self,
        records: RecordDataset,
        selection: Selection,
        preprocessing: VideoPreprocessing | AudioPreprocessing,
        times: ClipTimes,
        *,
        labels: Sequence[str] = (),
        leave_out: bool,
    ):
        """Looks at timelines, which reads no record.

        Args:
            records: data set.
            selection: which of its records.
            preprocessing: of the encoder.
            times: which clips.
            labels: of one class a record, that must be known.
            leave_out: leave out records without this modality or a label, instead of an error.

        Raises:
            LackingError: if records lack the modality or a label, or have sound at another rate.
            SelectionError: if the selection does not fit the data set.
        """
        self._preprocessing, self._times = preprocessing, times
        self._video = isinstance(preprocessing, VideoPreprocessing)
        if isinstance(preprocessing, VideoPreprocessing):
            views = ViewSpec(
                preprocessing.num_frames, preprocessing.clip_seconds, times.speeds, "shared"
            )
            crop = CropSpec(preprocessing.image_size, min_area=1.0, flip=False, quarter_turns=False)
            self._spec = VideoClipSpec(views, crop)
            rate_hz = None
        else:
            mel = preprocessing.log_mel
            views = ViewSpec(mel.frames, mel.clip_seconds, times.speeds, "shared")
            rate_hz = mel.sample_rate_hz
        self._views = views
        self.clips_per_record = len(times.speeds) * times.clips
        super().__init__(
            records,
            selection,
            "video" if self._video else "audio",
            sample_rate_hz=rate_hz,
            labels=labels,
            leave_out=leave_out,
        )
        self._share()

    def _share(self) -> None:
        """Moves clips into the interval that video and audio share, if a clip fits into it.

        Both modalities are thus encoded at the same times, as in `UsableRecords`.
        """
        times = {name: values[self.indices] for name, values in self.records.timelines.items()}
        starts, ends = zip(*intervals(times).values(), strict=True)
        start, end = np.maximum(*starts), np.minimum(*ends)
        both = (times["num_frames"] > 1) & has_audio(times)
        fits = both & (end - start >= self._views.clip_seconds * min(self._views.speeds) - 1e-6)
        self._start = np.where(fits, start, self._start)
        self._end = np.where(fits, end, self._end)

    @property
    def identity(self) -> list[Any]:
        """What decides the clips, in JSON: `fingerprint` does not say which were left out."""
        kept = hashlib.sha256(self.indices.tobytes()).hexdigest()
        return [dataclasses.asdict(self._preprocessing), dataclasses.asdict(self._times), kept]

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
            return self._render(record, self._clips(position))
        except RecordError as error:
            raise RecordError(f"{self.records.shard_of(index)}, {error}") from error

    def _clips(self, position: int) -> list[Clip]:
        clips = []
        for number in range(len(self._times.speeds)):
            speed = self._fitting(number, self.seconds(position))
            span = self._views.clip_seconds * self._views.speeds[speed]
            starts = evenly_spaced(*self.starts(position, span), self._times.clips)
            clips += [Clip(start, speed, FORWARD) for start in starts]
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
        windows = [
            gather_windows(
                record.waveform,
                clip,
                mel,
                self._views,
                audio_start_seconds=record.audio_start_seconds,
            )
            for clip in clips
        ]
        return np.asarray(log_mel(np.stack(windows), mel))
