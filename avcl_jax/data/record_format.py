"""One prepared clip, and how it is written as a tf.train.Example without TensorFlow."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from avcl_jax.data.example_proto import DecodeError, example_class
from avcl_jax.data.tfrecord import RecordError

# Written as the data set's version. Raise the first number when old readers would read nonsense.
FORMAT_VERSION = "1.0.0"
LABEL_PREFIX = "label_"
UNKNOWN_LABEL = -1
_MAX_PIXELS = 1 << 26  # of a frame, as for media files
# One class, or all classes of a label of which a clip may have several.
ClassNumbers = int | tuple[int, ...]

# Fixed features: what features.json must say of each, (pythonClassName's last part, dtype,
# encoding). Waveform and times are stored as raw bytes: 160,000 varints for each record would
# take longer to parse than its frames to decode, and tf.train.Example has no float64.
FEATURE_KINDS: Mapping[str, tuple[str, str | None, str | None]] = {
    "id": ("Text", None, None),
    "source": ("Text", None, None),
    "video": ("Sequence", None, None),
    "frame_seconds": ("Tensor", "float64", "bytes"),
    "audio": ("Tensor", "int16", "bytes"),
    "sample_rate_hz": ("Scalar", "int64", "none"),
    "audio_start_seconds": ("Tensor", "float64", "bytes"),
    "duration_seconds": ("Tensor", "float64", "bytes"),
    "height": ("Scalar", "int64", "none"),
    "width": ("Scalar", "int64", "none"),
}


@dataclasses.dataclass(frozen=True)
class Record:
    """One prepared clip.

    Attributes:
      record_id: Name of the record, unique within its data set.
      source_id: What it was cut from; records of one source are never each other's negatives.
      frames: JPEG files, upright, all of one size; empty when there is no picture.
      frame_seconds: float64 [frames], strictly increasing, when each frame appears. Time 0 is the
        clip's start, which is its first frame where it has a picture.
      waveform: int16 [samples], mono; empty when there is no sound.
      sample_rate_hz: Rate of `waveform`; 0 when there is no sound.
      audio_start_seconds: Time of `waveform[0]`, never negative.
      duration_seconds: When the last frame ends or the last sample sounds, whichever is later.
      height: Of every frame; 0 when there is no picture.
      width: Of every frame; 0 when there is no picture.
      labels: Class number by name of the label, without the prefix, -1 is unknown; a tuple of class
        numbers, perhaps none, for a label of which a clip may have several.
      is_still: Nothing moves in the video; False in records of releases that did not look.
    """

    record_id: str
    source_id: str
    frames: Sequence[bytes]
    frame_seconds: np.ndarray
    waveform: np.ndarray
    sample_rate_hz: int
    audio_start_seconds: float
    duration_seconds: float
    height: int
    width: int
    labels: Mapping[str, ClassNumbers]
    is_still: bool = False

    @property
    def has_video(self) -> bool:
        """Whether there is at least one frame."""
        return len(self.frames) > 0

    @property
    def has_audio(self) -> bool:
        """Whether there is at least one sample."""
        return len(self.waveform) > 0


class RecordTimeline(NamedTuple):
    """What the index knows of a record without reading it.

    Attributes:
      num_frames: 0 when there is no picture.
      first_frame_seconds: When the first frame appears; 0 when there is none.
      last_frame_seconds: When the last frame appears.
      max_frame_gap_seconds: Longest time between two frames; 0 with fewer than two.
      min_frame_gap_seconds: Shortest time between two frames; 0 with fewer than two.
      num_samples: 0 when there is no sound.
      audio_peak: Largest magnitude of a sample.
      sample_rate_hz: 0 when there is no sound.
      audio_start_seconds: Time of the first sample.
      duration_seconds: Of the whole record.
    """

    num_frames: int
    first_frame_seconds: float
    last_frame_seconds: float
    max_frame_gap_seconds: float
    min_frame_gap_seconds: float
    num_samples: int
    audio_peak: int
    sample_rate_hz: int
    audio_start_seconds: float
    duration_seconds: float

    @property
    def audio_end_seconds(self) -> float:
        """When the last sample has sounded; the start when there is none."""
        if not self.num_samples:
            return self.audio_start_seconds
        return self.audio_start_seconds + self.num_samples / self.sample_rate_hz


def to_bytes(text: str) -> bytes:
    """Encodes a name; file names need not be UTF-8."""
    return text.encode("utf-8", "surrogateescape")


def to_text(data: bytes) -> str:
    """Decodes what `to_bytes` encoded."""
    return data.decode("utf-8", "surrogateescape")


def _problem(record: Record) -> str | None:
    """Returns how a record contradicts itself; None if it does not."""
    seconds, waveform = record.frame_seconds, record.waveform
    height, width = record.height, record.width
    if len(record.frames) != len(seconds) or seconds.dtype != np.float64:
        return f"{len(record.frames)} frames but {seconds.dtype} {seconds.shape} frame_seconds"
    if not np.isfinite(seconds).all():
        return "frame_seconds must be finite"
    if len(seconds) and not (seconds[0] >= 0 and np.all(np.diff(seconds) > 0)):
        return "frame_seconds must start at 0 or later and strictly increase"
    if waveform.dtype != np.int16 or waveform.ndim != 1:
        return f"waveform must be int16 [samples], got {waveform.dtype} {waveform.shape}"
    if not int(record.has_audio) <= record.sample_rate_hz < 1 << 31:
        return f"sample_rate_hz must be positive, got {record.sample_rate_hz}"
    if not 0 <= record.audio_start_seconds < np.inf:
        return f"audio_start_seconds must be 0 or more, got {record.audio_start_seconds}"
    if not (record.has_video or record.has_audio):
        return "neither picture nor sound"
    if not 0 < record.duration_seconds < np.inf:
        return f"duration_seconds must be positive, got {record.duration_seconds}"
    if not (min(height, width) >= int(record.has_video) and height * width <= _MAX_PIXELS):
        return f"a picture cannot have {height}x{width} pixels"
    for label, value in record.labels.items():
        numbers, lowest = (value, 0) if isinstance(value, tuple) else ((value,), UNKNOWN_LABEL)
        if not all(lowest <= number < 1 << 31 for number in numbers):
            return f"label {label!r} has the class number {value}"
    return None


def serialize_record(record: Record) -> bytes:
    """Returns `record` as a serialized tf.train.Example, always the same bytes.

    Raises:
      ValueError: If the record contradicts itself.
    """
    if problem := _problem(record):
        raise ValueError(f"record {record.record_id!r}: {problem}")
    example = example_class()()
    feature = example.features.feature
    for name, data in (
        ("id", to_bytes(record.record_id)),
        ("source", to_bytes(record.source_id)),
        ("frame_seconds", record.frame_seconds.astype("<f8").tobytes()),
        ("audio", record.waveform.astype("<i2").tobytes()),
        ("audio_start_seconds", np.float64(record.audio_start_seconds).astype("<f8").tobytes()),
        ("duration_seconds", np.float64(record.duration_seconds).astype("<f8").tobytes()),
    ):
        feature[name].bytes_list.value.append(data)
    feature["video"].bytes_list.value.extend(record.frames)
    for name, number in (
        ("sample_rate_hz", record.sample_rate_hz),
        ("height", record.height),
        ("width", record.width),
        ("is_still", int(record.is_still)),
    ):
        feature[name].int64_list.value.append(number)
    for label, numbers in record.labels.items():
        listed = numbers if isinstance(numbers, tuple) else (numbers,)
        feature[LABEL_PREFIX + label].int64_list.value.extend(listed)
    return example.SerializeToString(deterministic=True)


def parse_record(payload: bytes | memoryview, *, where: str, multilabel: Collection[str]) -> Record:
    """Reads a serialized tf.train.Example that `serialize_record` wrote.

    Args:
      payload: The example.
      where: Its name for error messages.
      multilabel: Labels of which a clip may have several: the bytes do not tell.

    Raises:
      RecordError: If it is something else, or contradicts itself.
    """
    try:
        feature = example_class().FromString(bytes(payload)).features.feature
        missing = [name for name in FEATURE_KINDS if name not in feature]
        if missing:
            raise RecordError(
                f"{where} lacks the features {', '.join(missing)}: not a record of avcl_jax"
            )

        def data(name: str) -> bytes:
            return feature[name].bytes_list.value[0]

        def number(name: str) -> int:
            return feature[name].int64_list.value[0]

        record = Record(
            record_id=to_text(data("id")),
            source_id=to_text(data("source")),
            # Not a tuple: that would copy all frames, where a view needs a few.
            frames=feature["video"].bytes_list.value,
            frame_seconds=np.frombuffer(data("frame_seconds"), "<f8"),
            waveform=np.frombuffer(data("audio"), "<i2"),
            sample_rate_hz=number("sample_rate_hz"),
            audio_start_seconds=float(np.frombuffer(data("audio_start_seconds"), "<f8")[0]),
            duration_seconds=float(np.frombuffer(data("duration_seconds"), "<f8")[0]),
            height=number("height"),
            width=number("width"),
            is_still="is_still" in feature and bool(number("is_still")),
            labels={
                label: tuple(feature[name].int64_list.value)
                if label in multilabel
                else number(name)
                for name in sorted(feature)
                if name.startswith(LABEL_PREFIX)
                for label in [name.removeprefix(LABEL_PREFIX)]
            },
        )
    except RecordError:
        raise
    # ValueError: bytes that are no whole number of values.
    except (DecodeError, IndexError, ValueError) as error:
        raise RecordError(f"{where} is not a record of avcl_jax: {error}") from error
    if problem := _problem(record):
        raise RecordError(f"{where} contradicts itself: {problem}; prepare this data set again")
    return record


def check_labels(record: Record, class_names: Mapping[str, Sequence[str]], *, where: str) -> None:
    """Compares the labels of a record with those of its data set.

    Raises:
      RecordError: If a label is missing, or a class that it names.
    """
    for label, names in class_names.items():
        value = record.labels.get(label, len(names))
        if max(value if isinstance(value, tuple) else (value,), default=0) >= len(names):
            raise RecordError(
                f"{where} has none of the {len(names)} classes of label {label!r}: "
                "prepare this data set again"
            )
