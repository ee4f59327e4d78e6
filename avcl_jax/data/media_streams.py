"""Media files opened and one of their streams decoded completely, or a `MediaError` (PyAV, FFmpeg).

FFmpeg applies edit lists and drops the priming samples of audio codecs, so frames and samples
arrive with the times at which they are presented.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import io
import os
import stat
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import av
import av.logging
import numpy as np

from avcl_jax.errors import UserError

# Every reason for which a file is not decoded, and its meaning. The list is closed:
# docs/data/rejected.md explains each, and each has a test with a file.
REASONS = {
    "not_found": "no such file",
    "unreadable": "the file cannot be read (permission, or an error of the file system)",
    "not_media": "not a video or an audio recording, or its header is missing or damaged",
    "empty": "neither video nor audio in the file",
    "unsupported_codec": "no decoder for the codec",
    "damaged": "a part of the video or audio cannot be decoded",
    "truncated": "the file ends before its header says it should",
    "too_large": "a frame of more than 67 million pixels, or more memory than a worker may use",
    "bad_timestamps": "times of frames or samples are missing, run backwards or leap",
    "mixed_sizes": "the frame size or the pixel aspect ratio changes",
    "outside": "the requested interval lies outside the file",
}

SEEK_MARGIN_SECONDS = 1.0  # audio decoders need some packets before the first good sample
# Twice 8K. A file of two megabytes can contain a frame that takes gigabytes to decode.
_MAX_PIXELS = {"max_pixels": str(1 << 26)}
# Formats that only name other files: decoding one that somebody sent would show those files.
_PLAYLISTS = frozenset(("hls", "dash", "concat", "sdp", "imf"))
# Codecs that decode frames in another order than shown. In the others a packet may show nothing
# (VP8), and its time is the one that FFmpeg gives.
_REORDERING = frozenset({"h264", "hevc", "mpeg4", "mpeg1video", "mpeg2video", "vc1", "wmv3"})

# A local file of any name, or the content of one.
Source = str | os.PathLike[str] | bytes


class MediaError(UserError):
    """A file that cannot be decoded: `reason`, a key of `REASONS`, and a `message` with details."""

    def __init__(self, reason: str, message: str):
        super().__init__(reason, message)  # both as args: errors cross process borders
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


@contextlib.contextmanager
def open_media(source: Source) -> Iterator[tuple[Any, Sequence[Any]]]:
    """Opens a file, and turns what goes wrong inside the block into MediaError.

    Yields the container, and the messages that FFmpeg logs, which are the only sign of some damage:
    a demuxer that meets garbage looks for the next good byte, and logs it.
    """
    if isinstance(source, bytes):
        name = f"a file of {len(source)} bytes"
        place: io.BytesIO | str = io.BytesIO(source)
    else:
        # "file:" so that neither a leading dash nor a colon in the name means anything.
        name = os.fspath(source)
        place = f"file:{name}"
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)  # else the second truncated file goes unnoticed
    try:
        with (
            av.logging.Capture() as log,
            av.open(place, metadata_errors="replace", options=_MAX_PIXELS) as container,
        ):
            _check_format(container.format)
            yield container, log
    except FileNotFoundError as error:
        raise MediaError("not_found", f"{name} does not exist") from error
    except (av.error.InvalidDataError, av.error.DemuxerNotFoundError) as error:
        raise MediaError("not_media", "FFmpeg finds no container it knows") from error
    except av.error.DecoderNotFoundError as error:
        raise MediaError("unsupported_codec", error.strerror or str(error)) from error
    except OSError as error:  # FFmpeg's errors that are errors of the system are these too
        if error.errno == errno.EIO and _is_readable(source):  # a truncated cluster of Matroska
            raise MediaError("damaged", "the container cannot be read further") from error
        raise MediaError("unreadable", f"{type(error).__name__}: {error.strerror}") from error
    except MemoryError as error:
        raise MediaError("too_large", "more memory is needed than a worker may use") from error
    except av.error.EOFError as error:
        raise MediaError("truncated", "the file ends inside its header") from error
    except av.error.FFmpegError as error:
        raise MediaError("damaged", f"{type(error).__name__}: {error.strerror}") from error


def check_regular(path: str | os.PathLike[str]) -> None:
    """Refuses a pipe or a device, which may never begin, or never end.

    For commands that decode without a time limit; preparation has one.

    Raises:
        MediaError: if it is one.
    """
    with contextlib.suppress(OSError):
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise MediaError("not_media", "a pipe or a device, not a recording")


def _check_format(form: Any) -> None:
    """Refuses images and text, which FFmpeg opens as if they were videos, and playlists."""
    if form.name.endswith("_pipe") or form.name in ("image2", "tty", "ico", "ffmetadata"):
        raise MediaError("not_media", f"a {form.long_name}, not a recording")
    if not _PLAYLISTS.isdisjoint(form.name.split(",")):
        raise MediaError("not_media", "a list of other files, not a recording")


def _is_readable(source: Source) -> bool:
    """Tests whether the system can read the file to its end: then its content is to blame."""
    if isinstance(source, bytes):
        return True
    try:
        with open(source, "rb") as file:
            while file.read(1 << 20):
                pass
    except OSError:
        return False
    return True


def find_stream(container: Any, kind: str) -> Any | None:
    """Returns the "video" or "audio" stream that a player takes: the first default, else the first.

    None without one; raises MediaError if it has no decoder.
    """
    hidden = av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails
    streams = [s for s in getattr(container.streams, kind) if not s.disposition & hidden]
    default = [s for s in streams if s.disposition & av.stream.Disposition.default]
    stream = (default or streams or [None])[0]
    if stream is not None and stream.codec_context is None:
        raise MediaError("unsupported_codec", f"no decoder for the {kind}")
    return stream


def zero_seconds(container: Any) -> float:
    """Returns the presentation time at which a player starts showing the file."""
    return float((container.start_time or 0) / 1e6)


def stream_frames(
    container: Any, stream: Any, log: Sequence[Any], start_seconds: float
) -> Iterator[Any]:
    """Yields a stream's frames from `start_seconds` on.

    Raises:
        MediaError: if anything there is damaged.
    """
    zero = zero_seconds(container)
    # Times in AVI are counted from the start, so that it is read from there.
    avi = _AviTimes(stream) if container.format.name == "avi" else None
    sought = False
    if start_seconds > 0 and avi is None:
        target = max(0.0, start_seconds - SEEK_MARGIN_SECONDS) + zero
        # What cannot seek is read from the beginning.
        with contextlib.suppress(av.error.FFmpegError):
            container.seek(int(target * 1e6), backward=True)
            sought = True
    stream.codec_context.options = _MAX_PIXELS
    stream.codec_context.thread_count = 1  # one process per core decodes faster than threads do
    packets = container.demux(stream)
    where = "the start"
    yielded = again_until = -np.inf
    seen_early = False  # video frames before the start

    def early(time: float | None) -> bool:
        """Tests for a time before the start, where frames may lack those before the seek."""
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
                packets, sought = _from_start(container, stream), False
                continue
            if packet.is_corrupt:
                _check_log(container, log, where)
                # FFmpeg calls a packet corrupt that the file does not contain completely, and in
                # transport streams also one that lost a part in transmission.
                reason = "damaged" if container.format.name == "mpegts" else "truncated"
                raise MediaError(reason, f"a packet of {stream.type} is not whole after {where}")
            frames = packet.decode()
        except MemoryError:  # FFmpeg's is an FFmpegError too
            raise
        except av.error.FFmpegError as error:
            if (
                packet is not None
                and packet.pts is not None
                and early(float(packet.pts * packet.time_base))
            ):
                continue
            _check_log(container, log, where)  # errors of the container come first
            raise MediaError(
                "damaged", f"{stream.type} cannot be decoded after {where}: {error.strerror}"
            ) from error
        _check_log(container, log, where)
        if avi is not None:
            avi.correct(packet, frames)
        for frame in frames:
            if stream.type == "video" and early(frame.time):
                seen_early = True
                continue
            if stream.type == "video" and sought and (frame.is_corrupt or not seen_early):
                # Not every key frame starts afresh: frames may be damaged, or left out, for
                # seconds after the place sought. From the beginning they are whole.
                packets, sought, again_until = _from_start(container, stream), False, yielded
                break
            if frame.is_corrupt:
                raise MediaError("damaged", f"{stream.type} is damaged after {where}")
            if frame.time is not None:
                where = f"{frame.time - zero:.2f} s"
                yielded = frame.time
            yield frame


def _from_start(container: Any, stream: Any) -> Iterator[Any]:
    """Seeks to the first packet of all streams; returns the packets from there."""
    # Not to the start time: in a transport stream the first key frame lies before its audio.
    container.seek(min(0, container.start_time or 0), backward=True)
    return iter(container.demux(stream))


def _check_log(container: Any, log: Sequence[Any], where: str) -> None:
    """Raises MediaError if the demuxer logged an error.

    Decoders log errors for much that loses nothing; of theirs, only one counts.
    """
    for _, source, text in log:
        if text.startswith("Picture size"):
            raise MediaError("too_large", f"after {where}: {text.strip()}")
        if source == container.format.name:
            cut = "prematurely" in text or "partial file" in text
            raise MediaError("truncated" if cut else "damaged", f"after {where}: {text.strip()}")


class _AviTimes:
    """Times of the frames of an AVI stream, read from the start of the file.

    An AVI stream is a row of slots, one per tick of its clock. FFmpeg numbers packets by slot,
    which is the order of decoding, and its parser guesses from it when frames appear: one frame
    late for MPEG-4 with B-frames, wrong in every frame for H.264 with B-frames. For audio it counts
    bytes or packets, which goes wrong by a factor of ten for Vorbis. Players of AVI show the frames
    in order, one per slot, and play the audio without a break; so do we.
    """

    def __init__(self, stream: Any):
        """Takes the stream before its first packet is decoded."""
        self._stream = stream
        self._slots: list[int] = []
        self._shown = False
        self._audio_seconds: Fraction | None = None

    def correct(self, packet: Any, frames: list[Any]) -> None:
        """Overwrites the times of the frames that came out when `packet` went in."""
        if self._stream.type == "video":
            if self._stream.codec_context.name in _REORDERING:
                self._count_slots(packet, frames)
            return
        if self._audio_seconds is None:
            # The first packet may give no frame yet, but the audio begins with it.
            self._audio_seconds = (packet.pts or 0) * packet.time_base
        for frame in frames:
            frame.time_base = Fraction(1, frame.sample_rate)
            frame.pts = round(self._audio_seconds / frame.time_base)
            self._audio_seconds += frame.samples * frame.time_base

    def _count_slots(self, packet: Any, frames: list[Any]) -> None:
        # A packet that only repeats the frame before it (Xvid's N-VOP) shows none of its own.
        repeats = self._stream.codec_context.name == "mpeg4" and self._shown and not frames
        if packet.dts is not None and not repeats:
            heapq.heappush(self._slots, packet.dts)
        for frame in frames:
            frame.pts = heapq.heappop(self._slots) if self._slots else None
            frame.time_base = self._stream.time_base
            self._shown = True
