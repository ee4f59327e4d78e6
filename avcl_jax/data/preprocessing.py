"""Raw media of any length and rate to clips, by the functions of the training pipeline.

An exported encoder carries these (`avcl_jax.export`): frames or a waveform as a user has them
become the arrays that the encoder was trained on. JAX takes long to import, so the functions that
compute with it import it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import soxr

from avcl_jax.data.images import apply_crop, center_crop
from avcl_jax.data.spectrogram import INT16_SCALE, LogMelSpec, gather_windows, log_mel
from avcl_jax.data.views import FORWARD, Clip, ViewSpec, clip_times, frame_indices
from avcl_jax.errors import UserError

if TYPE_CHECKING:
    import jax


@dataclasses.dataclass(frozen=True)
class VideoPreprocessing:
    """Frames to square clips of `num_frames` that cover `clip_seconds` at speed 1.

    `mean` is subtracted from pixels in [0, 1], which are then divided by `std`.
    """

    modality: ClassVar[Literal["video"]] = "video"
    clip_dtype: ClassVar[str] = "uint8"

    num_frames: int
    clip_seconds: float
    image_size: int
    mean: float
    std: float

    @property
    def clip_shape(self) -> tuple[int, ...]:
        """Shape of one clip, [time, height, width, 3]."""
        return (self.num_frames, self.image_size, self.image_size, 3)

    def __call__(self, frames: np.ndarray, fps: float, *, speed: int = 1) -> np.ndarray:
        """Cuts frames, uint8 [T, H, W, 3], RGB, upright, into clips that together cover the video.

        Args:
            speed: seconds of video per second of clip; training saw the configured speeds.

        Returns:
            uint8 [clips, num_frames, image_size, image_size, 3]; the largest centred square.

        Raises:
            UserError: if frames have another shape or dtype, or a rate is not positive.
        """
        frames = np.asarray(frames)
        if frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
            raise UserError(f"expected frames [T, H, W, 3] (RGB), got shape {frames.shape}")
        if frames.dtype != np.uint8:
            raise UserError(f"expected frames of dtype uint8 in 0 … 255, got {frames.dtype}")
        _check_rates(fps, "fps", speed)
        starts = clip_times(0.0, len(frames) / fps, self.clip_seconds * speed)
        shown = self.frames_at(starts, np.arange(len(frames)) / fps, speed=speed)
        crop = center_crop(*frames.shape[1:3])
        return np.stack([apply_crop(frames[numbers], crop, self.image_size) for numbers in shown])

    def frames_at(
        self, starts: Sequence[float], frame_seconds: np.ndarray, *, speed: int = 1
    ) -> np.ndarray:
        """Returns the frames that clips show, int64 [clips, num_frames].

        Args:
            starts: times of the clips' first frames, seconds.
            frame_seconds: float64 [source frames], strictly increasing.
        """
        spec = ViewSpec(self.num_frames, self.clip_seconds, (speed,), "shared")
        clips = [frame_indices(Clip(start, 0, FORWARD), frame_seconds, spec) for start in starts]
        return np.stack(clips)

    def standardise(self, batch: Any) -> jax.Array:
        """Returns uint8 clips as the floats that the encoder was trained on."""
        import jax.numpy as jnp

        from avcl_jax.data.augment import standardize, to_unit_range

        return standardize(to_unit_range(jnp.asarray(batch)), self.mean, self.std)


@dataclasses.dataclass(frozen=True)
class AudioPreprocessing:
    """Waveforms to log-mel spectrograms, defined by `log_mel`."""

    modality: ClassVar[Literal["audio"]] = "audio"
    clip_dtype: ClassVar[str] = "float32"

    log_mel: LogMelSpec

    @property
    def clip_shape(self) -> tuple[int, ...]:
        """Shape of one clip, [frames, mels]."""
        return (self.log_mel.frames, self.log_mel.mels)

    @property
    def clip_seconds(self) -> float:
        """Length of one clip at speed 1."""
        return self.log_mel.clip_seconds

    def __call__(
        self, waveform: np.ndarray, sample_rate_hz: float, *, speed: int = 1
    ) -> np.ndarray:
        """Cuts a waveform into spectrograms, float32 [clips, frames, mels], that together cover it.

        Args:
            waveform: mono [samples], int16, or float in [−1, 1]. Silence follows a short one.
            sample_rate_hz: rate; another than the encoder's is resampled (soxr, high quality).
            speed: seconds of audio per second of clip; windows are skipped, pitch stays.

        Raises:
            UserError: if the waveform has another shape or dtype, or a rate is not positive.
        """
        waveform = np.asarray(waveform)
        if waveform.ndim != 1 or not waveform.size:
            raise UserError(
                f"expected a mono waveform [samples], got shape {waveform.shape}; "
                "mix the channels first (avcl_jax.data.media.decode_audio reads a file as mono)"
            )
        if waveform.dtype != np.int16 and not np.issubdtype(waveform.dtype, np.floating):
            raise UserError(f"expected int16 or float in [-1, 1], got dtype {waveform.dtype}")
        _check_rates(sample_rate_hz, "sample_rate_hz", speed)
        waveform = self.resample(waveform, sample_rate_hz)
        seconds = len(waveform) / self.log_mel.sample_rate_hz
        starts = clip_times(0.0, seconds, self.clip_seconds * speed)
        return self.spectrograms_at(starts, waveform, speed=speed)

    def resample(self, waveform: np.ndarray, sample_rate_hz: float) -> np.ndarray:
        """Returns a waveform at the encoder's rate; float32 if its own rate is another."""
        rate = self.log_mel.sample_rate_hz
        if sample_rate_hz == rate:
            return waveform
        scale = INT16_SCALE if waveform.dtype == np.int16 else np.float32(1)
        length = math.ceil(len(waveform) * (rate / sample_rate_hz))
        resampled = soxr.resample(waveform.astype(np.float32) * scale, sample_rate_hz, rate)
        # It may return one sample more or less than that.
        return np.pad(resampled, (0, max(length - len(resampled), 0)))[:length]

    def spectrograms_at(
        self,
        starts: Sequence[float],
        waveform: np.ndarray,
        *,
        speed: int = 1,
        audio_start_seconds: float = 0.0,
    ) -> np.ndarray:
        """Returns the spectrograms of clips, float32 [clips, frames, mels].

        Args:
            starts: times of the clips, seconds.
            waveform: [samples] at the encoder's rate; silence surrounds it.
            audio_start_seconds: time of its first sample.
        """
        spec = self.log_mel
        views = ViewSpec(spec.frames, spec.clip_seconds, (speed,), "shared")
        windows = [
            gather_windows(
                waveform,
                Clip(start, 0, FORWARD),
                spec,
                views,
                audio_start_seconds=audio_start_seconds,
            )
            for start in starts
        ]
        return log_mel(np.stack(windows), spec)

    def standardise(self, batch: Any) -> jax.Array:
        """Returns the spectrograms as they are: `log_mel` has standardised them."""
        import jax.numpy as jnp

        return jnp.asarray(batch, jnp.float32)


def _check_rates(rate: float, name: str, speed: int) -> None:
    if not rate > 0 or not math.isfinite(rate):
        raise UserError(f"{name} must be positive, got {rate}")
    if speed != int(speed) or speed < 1:
        raise UserError(f"speed must be a whole number of at least 1, got {speed}")
