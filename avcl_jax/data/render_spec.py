"""Settings of rendering, and the shapes of what it makes.

The train step is built from these, so this module needs no library of images or records: the step
compiles and runs where none is installed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from avcl_jax.data.spectrogram import LogMelSpec
from avcl_jax.data.views import MASKS, ViewSpec
from avcl_jax.data.workers import Shapes
from avcl_jax.errors import UserError

Modalities = Literal["audio_visual", "video", "audio"]


@dataclasses.dataclass(frozen=True)
class CropSpec:
    """Spatial view of a clip, `image_size` high and wide.

    Attributes:
        min_area: smallest fraction of the largest square that a random crop keeps.
        flip: mirror half of the random crops.
        quarter_turns: also turn them by 0, 90, 180 or 270 degrees; for media without an upright.
    """

    image_size: int
    min_area: float
    flip: bool
    quarter_turns: bool

    def __post_init__(self) -> None:
        """Refuses an area that no crop can have."""
        if not 0 < self.min_area <= 1:
            raise UserError(f"min_area {self.min_area} must be above 0 and at most 1")


@dataclasses.dataclass(frozen=True)
class RenderSpec:
    """Everything that turns an interval of a record into arrays.

    Attributes:
        spectrogram_on_device: deliver `audio_windows` and leave the log-mel to the jitted step.
        modalities: "audio_visual", or train on "video" or "audio" alone.
    """

    views: ViewSpec
    log_mel: LogMelSpec
    crop: CropSpec
    spectrogram_on_device: bool
    modalities: Modalities

    @property
    def video_shape(self) -> tuple[int, int, int, int]:
        """Shape of the video of a view: [time, height, width, 3]."""
        return self.views.num_frames, self.crop.image_size, self.crop.image_size, 3

    def audio_array(self) -> tuple[str, tuple[int, int], type]:
        """Returns name, shape and dtype of the audio of a view, on the host."""
        mel = self.log_mel
        if self.spectrogram_on_device:
            return "audio_windows", (mel.frames, mel.window), np.int16
        return "spectrogram", (mel.frames, mel.mels), np.float32

    def batch_shapes(self, rows: int, labels: Sequence[str] = ()) -> Shapes:
        """Returns name -> (shape, numpy dtype) of a training batch of `rows` videos.

        `labels` are names of labels of one class per record.
        """
        audio, audio_shape, audio_dtype = self.audio_array()
        flags = ("has_video", "video_moves", "unreadable", *MASKS)
        numbers = ("order", "source_id", "record_index", *(f"label_{name}" for name in labels))
        playback = [
            f"{kind}_{task}" for kind in ("video", "audio") for task in ("speed", "direction")
        ]
        return {
            "video": ((rows, 2, *self.video_shape), np.uint8),
            audio: ((rows, 2, *audio_shape), audio_dtype),
            "has_audio": ((rows, 2), np.bool_),
            **{name: ((rows,), np.bool_) for name in flags},
            **{name: ((rows,), np.int32) for name in numbers},
            **{name: ((rows, 2), np.int32) for name in playback},
        }
