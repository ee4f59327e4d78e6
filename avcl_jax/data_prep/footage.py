"""Decoding of a clip from a media file or an example of a record file, to frames and mono audio."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import av
import cv2
import numpy as np
import simplejpeg
from av.video.reformatter import Interpolation, VideoReformatter
from etils import epath

from avcl_jax.data import media, record_files
from avcl_jax.data.media import MediaError, RateLimit, Sound
from avcl_jax.data.mono import channel_energies, choose_weights, lay_out
from avcl_jax.data.record_files import RecordError
from avcl_jax.data_prep.manifest import ExamplePlace

_JPEG, _PASSED_ON = b"\xff\xd8\xff", ("YCbCr", "RGB", "Gray")
# Containers that state their duration. In the others FFmpeg guesses it from the bit rate.
_STATED_DURATION = ("mov", "matroska", "avi", "wav", "flac", "asf", "flv", "ogg")
_INTEGER_SCALE = 32768.0  # of 16-bit samples, whatever type holds them
# Lossy codecs overshoot full scale by less than that.
_LOUDEST = 8.0
_SMALLEST = 1e-30
_PART_SAMPLES = 1 << 16  # FFmpeg counts the samples of a frame in 32 bits
_DMVR = (
    "32-bit integers read as floats, which DMVR's generate_from_file.py writes (it asks FFmpeg for "
    "s32le and reads float32): write these examples again from the media, with f32le"
)


class JpegFrame(NamedTuple):
    """One frame of a record."""

    seconds: float  # on the source's timeline
    duration_seconds: float  # 0 if it is not known
    height: int
    width: int
    data: bytes


@dataclasses.dataclass(frozen=True)
class Footage:
    """An interval of a clip in its source, on the source's own timeline.

    `frames` takes the settings of `ClipOptions`, and yields frames at strictly increasing times,
    none without video. It and `audio` raise MediaError where the source cannot be decoded.
    """

    start_seconds: float
    end_seconds: float | None  # None: the end of the source
    stated_seconds: float | None  # end that the source states
    promised: bool  # whether the source is damaged if it ends before
    frames: Callable[[int, float | None, int], Iterator[JpegFrame]]  # short side, fps, quality
    decode_audio: Callable[..., Sound | None]  # takes a sample rate, a start and an end

    def audio(self, sample_rate_hz: int, until_seconds: float = np.inf) -> Sound | None:
        """Returns mono audio of the interval or up to a time, None without."""
        end = min(until_seconds, np.inf if self.end_seconds is None else self.end_seconds)
        return self.decode_audio(
            sample_rate_hz=sample_rate_hz,
            start_seconds=self.start_seconds,
            end_seconds=None if end == np.inf else end,
        )


def open_media(source: str | bytes, start: float, end: float | None) -> Footage:
    """Returns an interval of a media file; raises MediaError if its header cannot be read."""

    def frames(short_side: int, max_fps: float | None, quality: int) -> Iterator[JpegFrame]:
        for frame in media.decode_frames(
            source, short_side=short_side, max_fps=max_fps, start_seconds=start, end_seconds=end
        ):
            height, width = frame.image.shape[:2]
            data = _encode(frame.image, quality)
            yield JpegFrame(frame.seconds, frame.duration_seconds, height, width, data)

    info = media.probe(source)
    promised = info.format.startswith(_STATED_DURATION)
    decode_audio = functools.partial(media.decode_audio, source)
    return Footage(start, end, info.duration_seconds, promised, frames, decode_audio)


def _encode(image: np.ndarray, quality: int) -> bytes:
    """Returns uint8 [height, width, 3] RGB as a JPEG file."""
    return simplejpeg.encode_jpeg(image, quality=quality, colorspace="RGB", colorsubsampling="420")


def encode_still(
    image: bytes | np.ndarray, short_side: int, quality: int, reformatter: VideoReformatter
) -> tuple[int, int, bytes]:
    """Converts a single image to a frame of a record: height, width and JPEG file.

    An image is an encoded file, or uint8 [height, width, 1 or 3]. JPEG files that are small enough
    are passed on unchanged, so that they lose nothing; others are decoded, scaled by the filter
    that videos are scaled with, and encoded. Making the reformatter, kept over all frames, takes
    twenty times as long as a 64x64 frame.

    Raises MediaError if it cannot be decoded.
    """
    if isinstance(image, np.ndarray):
        pixels, is_good = np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image, False
    else:
        pixels, is_good = _decode(image)
    height, width = pixels.shape[:2]
    scale = min(1.0, short_side / min(height, width))
    if scale == 1 and isinstance(image, bytes) and is_good:
        return height, width, image
    if scale < 1:
        pixels = reformatter.reformat(
            av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24"),
            width=max(1, round(width * scale)),
            height=max(1, round(height * scale)),
            format="rgb24",
            interpolation=Interpolation.AREA,
            threads=1,
        ).to_ndarray()
    return *pixels.shape[:2], _encode(np.ascontiguousarray(pixels), quality)


def _decode(data: bytes) -> tuple[np.ndarray, bool]:
    """Returns pixels, and whether training can read the file unchanged."""
    try:
        if data.startswith(_JPEG) and simplejpeg.decode_jpeg_header(data)[2] in _PASSED_ON:
            return simplejpeg.decode_jpeg(data, colorspace="RGB"), True
    except ValueError as error:
        raise MediaError("damaged", f"a frame is not a whole JPEG file: {error}") from error
    # OpenCV reads PNG, BMP, WebP, and JPEG for print.
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data else None
    if pixels is None:
        raise MediaError("damaged", f"a frame of {len(data)} bytes is not a whole image file")
    return pixels, False


@dataclasses.dataclass(frozen=True)
class Samples:
    """Audio as numbers."""

    packets: Sequence[tuple[float, np.ndarray]]  # start in seconds, samples [samples, channels]
    sample_rate_hz: int
    full_scale: float | None  # value of the loudest sample; None: 1 (floats), 32,768 (integers)

    @property
    def end_seconds(self) -> float:
        """End of the last sample."""
        return max(start + len(data) / self.sample_rate_hz for start, data in self.packets)


@dataclasses.dataclass(frozen=True)
class Example:
    """Video and audio of an example."""

    images: Sequence[bytes] | np.ndarray  # encoded files, or uint8 [images, height, width, 1 or 3]
    image_seconds: np.ndarray  # float64 [images]
    image_duration_seconds: float  # of the last image; 0 if it is not known
    audio: Samples | bytes | None  # samples, or an encoded file

    @property
    def end_seconds(self) -> float | None:
        """End of the last image or sample, as far as it is known."""
        ends = []
        if len(self.image_seconds):
            ends.append(float(self.image_seconds[-1]) + self.image_duration_seconds)
        if isinstance(self.audio, Samples) and self.audio.packets:
            ends.append(self.audio.end_seconds)
        return max(ends, default=None)


def open_example(path: str, place: ExamplePlace, start: float, end: float | None) -> Footage:
    """Returns an interval of the clip in an example, on the example's own timeline.

    Raises MediaError if the file cannot be read there, or the example does not fit its layout.
    """
    try:
        payload = record_files.read(
            epath.Path(path), place.file_format, place.place, where=f"the example at {path}"
        )
    except RecordError as error:
        truncated = "truncated" in str(error)
        raise MediaError("truncated" if truncated else "damaged", str(error)) from error
    except FileNotFoundError as error:
        raise MediaError("not_found", f"{path} does not exist") from error
    except OSError as error:
        raise MediaError("unreadable", f"{type(error).__name__}: {error.strerror}") from error
    content = place.layout.read(payload)
    if isinstance(content, bytes):
        return open_media(content, start, end)
    audio = content.audio
    decode: Any = media.decode_audio if isinstance(audio, bytes) else mix_to_mono
    return Footage(
        start,
        end,
        stated_seconds=content.end_seconds,
        promised=False,
        frames=functools.partial(_frames, content, start, end),
        decode_audio=lambda **interval: None if audio is None else decode(audio, **interval),
    )


def _frames(
    content: Example,
    start: float,
    end: float | None,
    short_side: int,
    max_fps: float | None,
    quality: int,
) -> Iterator[JpegFrame]:
    images, times = content.images, content.image_seconds
    if len(images) != len(times):
        raise MediaError("bad_timestamps", f"{len(images)} frames with {len(times)} times")
    if not np.all(np.diff(times) >= 0):
        raise MediaError("bad_timestamps", "the times of the frames run backwards")
    limit, reformatter = RateLimit(max_fps), VideoReformatter()
    before, size = -np.inf, None
    for number, seconds in enumerate(times.tolist()):
        if end is not None and seconds >= end - 1e-6:
            return
        # A frame that is there twice is shown once.
        if seconds <= before or seconds < start - 1e-6:
            continue
        before = seconds
        if not limit.keeps(seconds):
            continue
        height, width, data = encode_still(images[number], short_side, quality, reformatter)
        if size not in (None, (height, width)):
            raise MediaError(
                "mixed_sizes", f"frame {number} has {width}x{height} pixels, others {size}"
            )
        size = (height, width)
        yield JpegFrame(seconds, content.image_duration_seconds, height, width, data)


def mix_to_mono(samples: Samples, **interval: Any) -> Sound | None:
    """Mixes channels by their mean, or as `avcl_jax.data.mono` decides, and resamples.

    The interval is a sample rate, start and end, as of `lay_out`; 16-bit mono at that rate is not
    changed. Returns None if the interval has no audio.

    Raises MediaError if the numbers are not samples, or their times leap.
    """
    rate = samples.sample_rate_hz
    weights, notes = _weights(samples.packets, rate)
    frames = []
    for start, data in samples.packets:
        mixed = _mono(data, samples.full_scale, weights)
        for first in range(0, len(mixed), _PART_SAMPLES):
            part = mixed[first : first + _PART_SAMPLES]
            kind = "s16" if part.dtype == np.int16 else "flt"
            frame = av.AudioFrame.from_ndarray(part[None], format=kind, layout="mono")
            frame.sample_rate = rate
            frame.time_base = Fraction(1, rate)
            frame.pts = round(start * rate) + first
            frames.append(frame)
    audio = lay_out(frames, zero=0.0, **interval)
    return audio and audio._replace(notes=notes)


def _weights(
    packets: Sequence[tuple[float, np.ndarray]], sample_rate_hz: int
) -> tuple[np.ndarray, dict[str, str]]:
    """Returns the weights of the channels of all packets, and messages by kind of note."""
    count = max((data.shape[1] for _, data in packets), default=1)
    usual = np.full(count, 1 / count)
    if count == 1:
        return usual, {}
    parts = (data.T.astype(np.float64) for _, data in packets)
    energies = channel_energies(parts, sample_rate_hz)
    if not energies.size or not np.isfinite(energies).all():  # `_mono` raises the error
        return usual, {}
    return choose_weights(energies, usual, [str(number + 1) for number in range(count)])


def _mono(data: np.ndarray, full_scale: float | None, weights: np.ndarray) -> np.ndarray:
    """Returns int16 or float32 [samples]; raises MediaError if the numbers are not samples."""
    if not data.size:
        return np.empty(0, np.int16)
    is_float = data.dtype.kind == "f"
    scale = full_scale or (1.0 if is_float else _INTEGER_SCALE)
    if is_float:
        loudest = float(np.abs(data).max())
        if not np.isfinite(loudest):
            raise MediaError("bad_samples", f"samples that are not numbers, as of {_DMVR}")
        if 0 < loudest < _SMALLEST or loudest > _LOUDEST * 1e6:
            raise MediaError("bad_samples", f"samples up to {loudest:g}, as of {_DMVR}")
    else:
        loudest = float(max(int(data.max()), -int(data.min())))
    if loudest > scale * (_LOUDEST if is_float else 1):
        raise MediaError(
            "bad_samples",
            f"samples up to {loudest:g} where {scale:g} is full scale: say --full-scale",
        )
    if data.shape[1] == 1 and not is_float and scale == _INTEGER_SCALE:
        # 32,768 itself, which some converters write, does not fit.
        return np.minimum(data[:, 0], 32767).astype(np.int16)
    return (data @ weights / scale).astype(np.float32)
