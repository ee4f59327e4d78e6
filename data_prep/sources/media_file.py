"""Clips of media files, which PyAV decodes."""

from __future__ import annotations

import math
from collections.abc import Iterator

from avcl_jax.data import media
from avcl_jax.data.media import Sound
from data_prep.sources.footage import JpegFrame, earlier_end, encode

# Containers that state their duration. In the others FFmpeg guesses it from the bit rate.
_STATED_DURATION = ("mov", "matroska", "avi", "wav", "flac", "asf", "flv", "ogg")


class MediaFootage:
    """A part of a media file; see `Footage`."""

    def __init__(self, source: str | bytes, start_seconds: float, end_seconds: float | None):
        """Reads the header of a file, given by its path or its content.

        Raises:
          MediaError: If it is no recording.
        """
        self._source = source
        self._start, self._end = start_seconds, end_seconds
        info = media.probe(source)
        self.stated_seconds = info.duration_seconds
        self.promised = info.format.startswith(_STATED_DURATION)

    def frames(
        self, *, short_side: int, max_fps: float | None, quality: int
    ) -> Iterator[JpegFrame]:
        """Yields its frames."""
        for frame in media.decode_frames(
            self._source,
            short_side=short_side,
            max_fps=max_fps,
            start_seconds=self._start,
            end_seconds=self._end,
        ):
            height, width = frame.image.shape[:2]
            data = encode(frame.image, quality)
            yield JpegFrame(frame.seconds, frame.duration_seconds, height, width, data)

    def sound(self, *, sample_rate_hz: int, until_seconds: float = math.inf) -> Sound | None:
        """Returns its sound."""
        return media.decode_audio(
            self._source,
            sample_rate_hz=sample_rate_hz,
            start_seconds=self._start,
            end_seconds=earlier_end(self._end, until_seconds),
        )
