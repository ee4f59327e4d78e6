"""Clips that an example of a record file holds: images with times, and samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from avcl_jax.data import media
from avcl_jax.data.media import RateLimit, Sound
from avcl_jax.data.media_error import MediaError
from data_prep.sources.footage import JpegFrame, StillEncoder, earlier_end
from data_prep.sources.samples import Samples, mono_sound


@dataclasses.dataclass(frozen=True)
class ExampleFootage:
    """A clip, or a part of one; see `Footage`.

    Attributes:
      images: Encoded files, or uint8 [images, height, width, 1 or 3]; perhaps none.
      image_seconds: float64 [images], when each appears.
      image_duration_seconds: How long the last one stays; 0 when nobody knows.
      audio: Samples, an encoded file, or None.
      start_seconds: Where the wanted part starts.
      end_seconds: Where it ends; None for all.
    """

    images: Sequence[bytes] | np.ndarray
    image_seconds: np.ndarray
    image_duration_seconds: float
    audio: Samples | bytes | None
    start_seconds: float
    end_seconds: float | None
    promised: bool = False

    @property
    def stated_seconds(self) -> float | None:
        """Where the last frame ends or the last sample has sounded."""
        ends = []
        if len(self.image_seconds):
            ends.append(float(self.image_seconds[-1]) + self.image_duration_seconds)
        if isinstance(self.audio, Samples) and self.audio.packets:
            ends.append(self.audio.end_seconds)
        return max(ends, default=None)

    def frames(
        self, *, short_side: int, max_fps: float | None, quality: int
    ) -> Iterator[JpegFrame]:
        """Yields its frames.

        Raises:
          MediaError: If an image cannot be decoded, or times run backwards.
        """
        if len(self.images) != len(self.image_seconds):
            raise MediaError(
                "bad_timestamps", f"{len(self.images)} frames with {len(self.image_seconds)} times"
            )
        if not np.all(np.diff(self.image_seconds) >= 0):
            raise MediaError("bad_timestamps", "the times of the frames run backwards")
        still = StillEncoder(short_side=short_side, quality=quality)
        limit = RateLimit(max_fps)
        before, size = -np.inf, None
        end = np.inf if self.end_seconds is None else self.end_seconds - 1e-6
        for number, seconds in enumerate(self.image_seconds.tolist()):
            if seconds >= end:
                return
            # A frame that is there twice is shown once.
            if seconds <= before or seconds < self.start_seconds - 1e-6:
                continue
            before = seconds
            if not limit.keeps(seconds):
                continue
            height, width, data = still(self.images[number])
            if size not in (None, (height, width)):
                raise MediaError(
                    "mixed_sizes", f"frame {number} has {width}x{height} pixels, others {size}"
                )
            size = (height, width)
            yield JpegFrame(seconds, self.image_duration_seconds, height, width, data)

    def sound(self, *, sample_rate_hz: int, until_seconds: float = np.inf) -> Sound | None:
        """Returns its sound.

        Raises:
          MediaError: If it cannot be decoded.
        """
        if self.audio is None:
            return None
        end_seconds = earlier_end(self.end_seconds, until_seconds)
        if isinstance(self.audio, bytes):
            return media.decode_audio(
                self.audio,
                sample_rate_hz=sample_rate_hz,
                start_seconds=self.start_seconds,
                end_seconds=end_seconds,
            )
        return mono_sound(
            self.audio,
            sample_rate_hz=sample_rate_hz,
            start_seconds=self.start_seconds,
            end_seconds=end_seconds,
        )
