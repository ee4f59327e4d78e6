"""Where each moment of a transformed clip lies in the clip it was made from."""

from __future__ import annotations

import dataclasses

import numpy as np
import soxr

from avcl_jax.data.media import DecodedMedia, no_frames

_INT16 = np.iinfo(np.int16)


@dataclasses.dataclass(frozen=True)
class Piece:
    """An interval of the transformed clip that shows the original at a constant rate.

    Attributes:
        begin_seconds: in the transformed clip.
        end_seconds: in the transformed clip.
        source_seconds: moment of the original that is shown at `begin_seconds`.
        rate: seconds of the original per second of the transformed clip.
    """

    begin_seconds: float
    end_seconds: float
    source_seconds: float
    rate: float = 1.0


@dataclasses.dataclass(frozen=True)
class TimeMap:
    """Moments of a transformed clip to moments of the original.

    Attributes:
        pieces: in order, without overlap; what lies between them is not of the original.
    """

    pieces: tuple[Piece, ...]

    @classmethod
    def identity(cls, duration_seconds: float) -> TimeMap:
        """The map of a clip whose times are those of the original."""
        return cls((Piece(0.0, duration_seconds, 0.0),))

    @classmethod
    def foreign(cls) -> TimeMap:
        """The map of what holds nothing of the original."""
        return cls(())

    def source_seconds(self, seconds: np.ndarray) -> np.ndarray:
        """Returns moments of the original; NaN where something else is shown.

        Args:
            seconds: float [n], moments of the transformed clip.
        """
        found = np.full(len(seconds), np.nan)
        for piece in self.pieces:
            inside = (seconds >= piece.begin_seconds) & (seconds < piece.end_seconds)
            since = seconds[inside] - piece.begin_seconds
            found[inside] = piece.source_seconds + piece.rate * since
        return found

    def has_offset(self, offset_seconds: float, tolerance_seconds: float) -> bool:
        """Whether some moment of the clip lies where an answer says.

        At another speed no single offset holds for the whole clip: every one of those that occur
        counts.

        Args:
            offset_seconds: time in the original minus time in the transformed clip.
            tolerance_seconds: by how much the answer may be wrong.
        """
        for piece in self.pieces:
            first = piece.source_seconds - piece.begin_seconds
            last = first + (piece.rate - 1.0) * (piece.end_seconds - piece.begin_seconds)
            low, high = min(first, last), max(first, last)
            if low - tolerance_seconds <= offset_seconds <= high + tolerance_seconds:
                return True
        return False


@dataclasses.dataclass(frozen=True)
class Transformed:
    """A transformed clip with its ground truth.

    Attributes:
        media: the clip.
        picture_time: where its pictures are in the original.
        sound_time: where its sound is in the original.
    """

    media: DecodedMedia
    picture_time: TimeMap
    sound_time: TimeMap


def unmoved(media: DecodedMedia) -> Transformed:
    """A transformed clip whose times are those of the original."""
    same = TimeMap.identity(media.duration_seconds)
    return Transformed(media, same, same)


def to_int16(waveform: np.ndarray) -> np.ndarray:
    """Returns samples rounded and clipped to int16.

    Args:
        waveform: float [samples], in units of int16.
    """
    return np.clip(np.rint(waveform), _INT16.min, _INT16.max).astype(np.int16)


def resampled(waveform: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    """Returns int16 samples at another rate."""
    if from_hz == to_hz:
        return waveform
    return soxr.resample(waveform, from_hz, to_hz)


def with_sound(media: DecodedMedia, waveform: np.ndarray) -> DecodedMedia:
    """Returns the clip with other samples, at the same rate and from the same moment on."""
    sounds_until = media.audio_start_seconds + len(waveform) / media.sample_rate_hz
    return dataclasses.replace(
        media, waveform=waveform, duration_seconds=max(pictures_end(media), sounds_until)
    )


def without_sound(media: DecodedMedia) -> DecodedMedia:
    """Returns the clip's pictures alone."""
    return dataclasses.replace(
        media, waveform=np.empty(0, np.int16), sample_rate_hz=0, audio_start_seconds=0.0
    )


def pictures_end(media: DecodedMedia) -> float:
    """When the last frame ends; 0 without a picture."""
    if not media.has_video:
        return 0.0
    gap = 1 / media.fps if media.fps else 0.0
    return float(media.frame_seconds[-1]) + gap


def excerpt(media: DecodedMedia, begin_seconds: float, end_seconds: float) -> DecodedMedia:
    """Returns the part of a clip between two moments, on a timeline that starts at the first.

    Sound before the clip's own begins, or after it ends, is silence.

    Args:
        media: the clip.
        begin_seconds: where the part begins.
        end_seconds: where it ends.
    """

    shown = (media.frame_seconds >= begin_seconds - 1e-6) & (
        media.frame_seconds < end_seconds - 1e-6
    )
    waveform = np.empty(0, np.int16)
    if media.has_audio:
        rate = media.sample_rate_hz
        waveform = np.zeros(round((end_seconds - begin_seconds) * rate), np.int16)
        skip = round((begin_seconds - media.audio_start_seconds) * rate)
        source = media.waveform[max(0, skip) :][: max(0, len(waveform) - max(0, -skip))]
        waveform[max(0, -skip) :][: len(source)] = source
    return DecodedMedia(
        frames=media.frames[shown] if media.has_video else no_frames(),
        frame_seconds=media.frame_seconds[shown] - begin_seconds,
        waveform=waveform,
        sample_rate_hz=media.sample_rate_hz,
        audio_start_seconds=0.0,
        duration_seconds=end_seconds - begin_seconds,
    )
