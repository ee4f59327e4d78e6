"""Media files to upright frames and mono sound on one timeline (PyAV, that is FFmpeg).

All times are seconds on the *file's* timeline, whose zero is where a player starts showing it.
FFmpeg itself applies edit lists and drops the priming samples of the sound codecs, so frames and
samples arrive with the times at which they are presented; what is left to do here is to keep them.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import av
import av.logging
import numpy as np

from avcl_jax.data.avi_times import AviTimes
from avcl_jax.data.frame_images import FrameImages
from avcl_jax.data.media_error import REASONS, MediaError
from avcl_jax.data.sound_timeline import lay_out

__all__ = [
    "REASONS",
    "Frame",
    "MediaError",
    "MediaInfo",
    "RateLimit",
    "Sound",
    "decode_audio",
    "decode_frames",
    "probe",
]

_MAX_BACK_SECONDS = 0.5
_SEEK_MARGIN_SECONDS = 1.0  # sound decoders need some packets before the first good sample
# Twice 8K. A file of two megabytes can hold a picture that takes gigabytes to decode.
_MAX_PIXELS = {"max_pixels": str(1 << 26)}
_FPS_SLACK_SECONDS = 0.002  # time stamps in whole milliseconds make 30 fps vary


# A local file of any name, or the content of one.
Source = str | os.PathLike[str] | bytes


class MediaInfo(NamedTuple):
    """What a file's header says.

    Attributes:
      format: FFmpeg's name of the container.
      duration_seconds: Of the longest stream; None when the header does not say.
      video: Codec, stored width and height; None when there is no picture.
      audio: Codec, rate in Hz and channel layout; None when there is no sound.
    """

    format: str
    duration_seconds: float | None
    video: tuple[str, int, int] | None
    audio: tuple[str, int, str] | None


class Frame(NamedTuple):
    """One displayed frame.

    Attributes:
      seconds: When it appears.
      duration_seconds: How long the file says it stays; 0 when it does not say.
      image: uint8 [height, width, 3], RGB, upright, square pixels.
    """

    seconds: float
    duration_seconds: float
    image: np.ndarray


class Sound(NamedTuple):
    """Mono sound; silence where the file has none.

    Attributes:
      start_seconds: When the first sample sounds.
      waveform: int16 [samples].
      notes: Messages about its channels, by kind of note (see `mono`).
    """

    start_seconds: float
    waveform: np.ndarray
    notes: Mapping[str, str]


def _is_still(container: Any) -> bool:
    """Whether FFmpeg opened a picture or a text file as if it were a film."""
    name = container.format.name
    return name.endswith("_pipe") or name in ("image2", "tty", "ico", "ffmetadata")


# What only names other files: playing one that somebody sent would show them whatever it names.
_PLAYLISTS = frozenset(("hls", "dash", "concat", "sdp", "imf"))


def _stream(container: Any, kind: str) -> Any | None:
    """Returns the stream a player would take: the first default one, else the first."""
    hidden = av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails
    streams = [s for s in getattr(container.streams, kind) if not s.disposition & hidden]
    default = [s for s in streams if s.disposition & av.stream.Disposition.default]
    return (default or streams or [None])[0]


class RateLimit:
    """Chooses frames, by their times, so that they keep to a rate on average."""

    def __init__(self, max_fps: float | None):
        """Takes the rate in frames a second; None keeps all."""
        self._interval = 1 / max_fps if max_fps else 0.0
        self._due: float | None = None

    def keeps(self, seconds: float) -> bool:
        """Whether the frame that appears then, after those asked about before, stays."""
        due = seconds if self._due is None else self._due
        if seconds < due - _FPS_SLACK_SECONDS:
            return False
        # Counted from when a frame was due and not from when it came: 32 fps become 30, not 16.
        self._due = max(due, seconds - self._interval) + self._interval
        return True


def _can_be_read(source: Source) -> bool:
    """Whether the system can read the file to its end, so that its content is to blame."""
    if isinstance(source, bytes):
        return True
    try:
        with open(source, "rb") as file:
            while file.read(1 << 20):
                pass
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _open(path: Source) -> Iterator[tuple[Any, Sequence[Any]]]:
    """Opens a file, and turns what goes wrong inside the block into MediaError.

    Yields:
      The container, and the messages FFmpeg logs, which are the only sign of some damage: a
      demuxer that meets garbage looks for the next good byte, and says so only there.
    """
    if isinstance(path, bytes):
        name = f"a file of {len(path)} bytes"
        place: io.BytesIO | str = io.BytesIO(path)
    else:
        # "file:" so that neither a leading dash nor a colon in the name means anything.
        name = os.fspath(path)
        place = f"file:{name}"
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)  # else the second file cut short goes unnoticed
    try:
        with (
            av.logging.Capture() as log,
            av.open(place, metadata_errors="replace", options=_MAX_PIXELS) as container,
        ):
            if _is_still(container):
                raise MediaError("not_media", f"a {container.format.long_name}, not a recording")
            if not _PLAYLISTS.isdisjoint(container.format.name.split(",")):
                raise MediaError("not_media", "a list of other files, not a recording")
            yield container, log
    except FileNotFoundError as error:
        raise MediaError("not_found", f"{name} does not exist") from error
    except (av.error.InvalidDataError, av.error.DemuxerNotFoundError) as error:
        raise MediaError("not_media", "FFmpeg finds no container it knows") from error
    except av.error.DecoderNotFoundError as error:
        raise MediaError("unsupported_codec", error.strerror or str(error)) from error
    except OSError as error:  # FFmpeg's errors that are errors of the system are these too
        if error.errno == errno.EIO and _can_be_read(path):  # what Matroska calls a cut cluster
            raise MediaError("damaged", "the container cannot be read further") from error
        raise MediaError("unreadable", f"{type(error).__name__}: {error.strerror}") from error
    except MemoryError as error:
        raise MediaError("too_large", "more memory is needed than a worker may use") from error
    except av.error.EOFError as error:
        raise MediaError("truncated", "the file ends inside its header") from error
    except av.error.FFmpegError as error:
        raise MediaError("damaged", f"{type(error).__name__}: {error.strerror}") from error


def probe(path: Source) -> MediaInfo:
    """Reads a file's header.

    Args:
      path: Local file of any name, or a file's content.

    Raises:
      MediaError: If it cannot be opened, is no recording, or has neither picture nor sound.
    """
    with _open(path) as (container, _):
        video, audio = _stream(container, "video"), _stream(container, "audio")
        if video is None and audio is None:
            raise MediaError("empty", "the file has neither picture nor sound")
        for stream in (video, audio):
            if stream is not None and stream.codec_context is None:
                raise MediaError("unsupported_codec", f"no decoder for the {stream.type}")
        return MediaInfo(
            container.format.name,
            container.duration / 1e6 if container.duration else None,
            video and (video.codec_context.name, video.width, video.height),
            audio and (audio.codec_context.name, audio.rate, audio.layout.name),
        )


def _check_log(container: Any, log: Sequence[Any], where: str) -> None:
    """Raises MediaError if the demuxer logged an error.

    Decoders log errors for much that loses nothing; of theirs only one is looked at.
    """
    for _, source, text in log:
        if text.startswith("Picture size"):
            raise MediaError("too_large", f"after {where}: {text.strip()}")
        if source == container.format.name:
            cut = "prematurely" in text or "partial file" in text
            raise MediaError("truncated" if cut else "damaged", f"after {where}: {text.strip()}")


def _packet_time(packet: Any) -> float | None:
    return None if packet.pts is None else float(packet.pts * packet.time_base)


def _rewind(container: Any) -> None:
    """Seeks to the first packet of all streams."""
    # Not to the start time: in a transport stream the first key frame lies before its sound.
    container.seek(min(0, container.start_time or 0), backward=True)


def _decoded(
    container: Any, stream: Any, log: Sequence[Any], start_seconds: float
) -> Iterator[Any]:
    """Yields a stream's frames from `start_seconds` on; raises MediaError on any damage there."""
    zero = (container.start_time or 0) / 1e6
    # Times in AVI are counted from the start, so that it is read from there.
    avi = AviTimes(stream) if container.format.name == "avi" else None
    sought = False
    if start_seconds > 0 and avi is None:
        target = max(0.0, start_seconds - _SEEK_MARGIN_SECONDS) + zero
        # What cannot seek is read from the beginning.
        with contextlib.suppress(av.error.FFmpegError):
            container.seek(int(target * 1e6), backward=True)
            sought = True
    stream.codec_context.options = _MAX_PIXELS
    stream.codec_context.thread_count = 1  # one process per core decodes faster than threads do
    packets = container.demux(stream)
    where = "the start"
    yielded = again_until = -np.inf
    met = False  # pictures before the start

    def early(time: float | None) -> bool:
        """Whether it is before the start: there it may lack what came before the seek."""
        if time is None:
            return False
        return (start_seconds > 0 and time - zero < start_seconds - 1e-6) or time <= again_until

    while True:
        packet = None
        try:
            packet = next(packets, None)
            if packet is None:
                if stream.type == "audio" or not sought or np.isfinite(yielded):
                    return
                # No key frame followed the place sought: nothing at all was decoded.
                _rewind(container)
                packets, sought = container.demux(stream), False
                continue
            if packet.is_corrupt:
                _check_log(container, log, where)
                # FFmpeg calls a packet corrupt that the file does not hold all of, and in
                # transport streams also one of which the transmission lost a part.
                reason = "damaged" if container.format.name == "mpegts" else "truncated"
                raise MediaError(reason, f"a packet of {stream.type} is not whole after {where}")
            frames = packet.decode()
        except MemoryError:  # FFmpeg's is an FFmpegError too
            raise
        except av.error.FFmpegError as error:
            if packet is not None and early(_packet_time(packet)):
                continue
            _check_log(container, log, where)  # what the container says comes before
            raise MediaError(
                "damaged", f"{stream.type} cannot be decoded after {where}: {error.strerror}"
            ) from error
        _check_log(container, log, where)
        if avi is not None:
            avi.correct(packet, frames)
        for frame in frames:
            if stream.type == "video" and early(frame.time):
                met = True
                continue
            if stream.type == "video" and sought and (frame.is_corrupt or not met):
                # Not every key frame begins anew: pictures may be damaged, or left out, for seconds
                # after the place sought. From the beginning they are whole.
                _rewind(container)
                packets, sought, again_until = container.demux(stream), False, yielded
                break
            if frame.is_corrupt:
                raise MediaError("damaged", f"{stream.type} is damaged after {where}")
            if frame.time is not None:
                where = f"{frame.time - zero:.2f} s"
                yielded = frame.time
            yield frame


def decode_frames(
    path: Source,
    *,
    short_side: int | None,
    max_fps: float | None,
    start_seconds: float = 0.0,
    end_seconds: float | None = None,
) -> Iterator[Frame]:
    """Decodes the picture, upright and with square pixels, at its own times.

    Args:
      path: Local file, or a file's content.
      short_side: Height or width to scale down to, whichever is shorter; never scales up.
      max_fps: Frames are dropped, by their times, to this rate on average; None keeps all.
      start_seconds: First frame is the first that appears at this time or later.
      end_seconds: Frames that appear at this time or later are left out; None for all.

    Yields:
      Frames in the order of display, at strictly increasing times. None, without an error, when
      the file has no picture. An alpha channel is ignored.

    Raises:
      MediaError: If the file or the wanted part of its picture cannot be decoded completely.
    """
    with _open(path) as (container, log):
        stream = _stream(container, "video")
        if stream is None:
            return
        if stream.codec_context is None:
            raise MediaError("unsupported_codec", "no decoder for the picture")
        zero = (container.start_time or 0) / 1e6
        rate = float(stream.guessed_rate or stream.average_rate or 0)
        limit = RateLimit(max_fps)
        seen = -np.inf
        to_image = FrameImages(stream, short_side)
        for frame in _decoded(container, stream, log, start_seconds):
            if frame.time is not None:
                seconds = frame.time - zero
            elif np.isfinite(seen) and rate:
                seconds = seen + 1 / rate
            else:
                raise MediaError("bad_timestamps", "the picture has no time stamps")
            if seconds < seen - _MAX_BACK_SECONDS:
                raise MediaError("bad_timestamps", f"the picture leaps back at {seen:.2f} s")
            if end_seconds is not None and seconds >= end_seconds - 1e-6:
                return
            if seconds <= seen or seconds < start_seconds - 1e-6:
                continue  # a repeated frame, or one before the wanted part
            seen = seconds
            to_image.check_shape(frame, seconds)
            if not limit.keeps(seconds):
                continue
            duration = float(frame.duration * frame.time_base) if frame.duration else 0.0
            yield Frame(seconds, duration, to_image(frame))


def decode_audio(
    path: Source,
    *,
    sample_rate_hz: int,
    start_seconds: float = 0.0,
    end_seconds: float | None = None,
) -> Sound | None:
    """Decodes the sound to mono (see `mono`), so that a sample's index tells its time.

    Args:
      path: Local file, or a file's content.
      sample_rate_hz: Rate to resample to.
      start_seconds: Samples before are left out.
      end_seconds: Samples from here on are left out; None for all.

    Returns:
      The sound, with gaps filled by silence; None when the file has none in this interval.

    Raises:
      MediaError: If the file or the wanted part of its sound cannot be decoded completely.
    """
    with _open(path) as (container, log):
        stream = _stream(container, "audio")
        if stream is None:
            return None
        if stream.codec_context is None:
            raise MediaError("unsupported_codec", "no decoder for the sound")
        zero = (container.start_time or 0) / 1e6
        frames: list[Any] = []
        heard_seconds = 0.0
        for frame in _decoded(container, stream, log, start_seconds):
            if end_seconds is not None:
                if frame.time is not None and frame.time - zero >= end_seconds:
                    break
                # Where times stand still, the samples are counted: memory has an end.
                if heard_seconds > end_seconds + _SEEK_MARGIN_SECONDS:
                    break
            if frame.samples:
                frames.append(frame)
                heard_seconds += frame.samples / frame.sample_rate
        if not frames:
            return None
        first_seconds, waveform, notes = lay_out(frames, zero=zero, sample_rate_hz=sample_rate_hz)
    skip = max(0, int(np.ceil((start_seconds - first_seconds) * sample_rate_hz - 1e-6)))
    first_seconds += skip / sample_rate_hz
    waveform = waveform[skip:]
    if end_seconds is not None:
        waveform = waveform[: max(0, round((end_seconds - first_seconds) * sample_rate_hz))]
    return Sound(first_seconds, waveform, notes) if len(waveform) else None
