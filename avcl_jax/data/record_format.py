"""One prepared clip, and how it is written as a tf.train.Example without TensorFlow."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError

from avcl_jax.data.record_files import RecordError

# Version of the data set. Raise the first number when old readers would read nonsense.
FORMAT_VERSION = "1.0.0"
LABEL_PREFIX = "label_"
UNKNOWN_LABEL = -1
_MAX_PIXELS = 1 << 26  # of a frame, as for media files
# One class, or all classes of a label that allows several per record.
ClassNumbers = int | tuple[int, ...]


class Feature(NamedTuple):
    """Feature of a record: attribute of `Record`; kind, dtype and encoding in features.json."""

    attribute: str
    kind: str
    dtype: str | None = None
    encoding: str | None = None
    doc: str | None = None

    @property
    def is_array(self) -> bool:
        """True if a tensor has any number of values, not one."""
        return self.attribute in ("frame_seconds", "waveform")


# Waveform and times are stored as raw bytes: 160,000 varints per record would take longer to parse
# than its frames to decode, and tf.train.Example has no float64.
FEATURES: Mapping[str, Feature] = {
    "id": Feature("record_id", "Text", doc="Name of the record, unique in its data set"),
    "source": Feature("source_id", "Text", doc="Recording that the clip was cut from"),
    "video": Feature("frames", "Sequence", doc="Upright frames, none without video"),
    "frame_seconds": Feature("frame_seconds", "Tensor", "float64", "bytes"),
    "audio": Feature("waveform", "Tensor", "int16", "bytes"),
    "sample_rate_hz": Feature("sample_rate_hz", "Scalar", "int64", "none"),
    "audio_start_seconds": Feature("audio_start_seconds", "Tensor", "float64", "bytes"),
    "duration_seconds": Feature("duration_seconds", "Tensor", "float64", "bytes"),
    "height": Feature("height", "Scalar", "int64", "none"),
    "width": Feature("width", "Scalar", "int64", "none"),
    "is_still": Feature("is_still", "Scalar", "bool", "none", "Nothing moves in the video"),
}


def lacking(features: Collection[str]) -> list[str]:
    """Returns the features of a record that are not there; earlier releases had no `is_still`."""
    return [name for name in FEATURES if name not in features and name != "is_still"]


@dataclasses.dataclass(frozen=True)
class Record:
    """One prepared clip.

    Attributes:
        record_id: name of the record, unique within its data set.
        source_id: name of its source; records of one source are never each other's negatives.
        frames: JPEG files, upright, all of one size; empty without video.
        frame_seconds: float64 [frames], strictly increasing, when each frame appears. Time 0 is
            the clip's start, which is its first frame where it has video.
        waveform: int16 [samples], mono; empty without audio.
        sample_rate_hz: rate of `waveform`; 0 without audio.
        audio_start_seconds: time of `waveform[0]`, never negative.
        duration_seconds: end of the last frame or of the last sample, whichever is later.
        height: height of every frame; 0 without video.
        width: width of every frame; 0 without video.
        labels: class number by name of the label, without the prefix, -1 is unknown; a tuple of
            class numbers, perhaps none, for a label that allows several per record.
        is_still: nothing moves in the video; False in records of releases that did not look.
    """

    record_id: str
    source_id: str
    frames: Sequence[bytes] = ()
    frame_seconds: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0))
    waveform: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0, np.int16))
    sample_rate_hz: int = 0
    audio_start_seconds: float = 0.0
    duration_seconds: float = 0.0
    height: int = 0
    width: int = 0
    labels: Mapping[str, ClassNumbers] = dataclasses.field(default_factory=dict)
    is_still: bool = False

    @property
    def has_video(self) -> bool:
        """True if there is at least one frame."""
        return len(self.frames) > 0

    @property
    def has_audio(self) -> bool:
        """True if there is at least one sample."""
        return len(self.waveform) > 0


# Digital silence and dither peak at or below this, -60 dB of full scale: all silences are alike.
SILENCE_PEAK = 33


def peak(waveform: np.ndarray) -> int:
    """Returns the largest magnitude of int16 samples of any shape; 0 without samples."""
    # Not by np.abs, which leaves -32,768 negative.
    return max(int(waveform.max(initial=0)), -int(waveform.min(initial=0)))


def is_silent(waveform: np.ndarray) -> bool:
    """Returns whether int16 samples of any shape are silent."""
    return peak(waveform) <= SILENCE_PEAK


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
        return "neither video nor audio"
    if not 0 < record.duration_seconds < np.inf:
        return f"duration_seconds must be positive, got {record.duration_seconds}"
    if not (min(height, width) >= int(record.has_video) and height * width <= _MAX_PIXELS):
        return f"a frame cannot have {height}x{width} pixels"
    for label, value in record.labels.items():
        numbers, lowest = (value, 0) if isinstance(value, tuple) else ((value,), UNKNOWN_LABEL)
        if not all(lowest <= number < 1 << 31 for number in numbers):
            return f"label {label!r} has the class number {value}"
    return None


_IMPORTING = threading.Lock()


@functools.cache
def message_class(name: str) -> Any:
    """Returns the message class tf.train.Example or tf.train.SequenceExample, by its last name."""
    # TFDS's copies, which need no TensorFlow; imported where records are read, as it takes 0.3 s,
    # by one thread: its lazy imports can wait for each other for ever in two.
    with _IMPORTING:
        from tensorflow_datasets.proto import tf_example_generated_pb2

        return getattr(tf_example_generated_pb2, name)


@functools.cache
def _little_endian(dtype: str | None) -> np.dtype[Any]:
    return np.dtype(dtype).newbyteorder("<")


def serialize_record(record: Record) -> bytes:
    """Returns `record` as a serialized tf.train.Example, always the same bytes.

    Raises:
        ValueError: if the record contradicts itself.
    """
    if problem := _problem(record):
        raise ValueError(f"record {record.record_id!r}: {problem}")
    example = message_class("Example")()
    stored = example.features.feature
    for name, feature in FEATURES.items():
        value = getattr(record, feature.attribute)
        if feature.kind == "Text":
            stored[name].bytes_list.value.append(to_bytes(value))
        elif feature.kind == "Sequence":
            stored[name].bytes_list.value.extend(value)
        elif feature.kind == "Scalar":
            stored[name].int64_list.value.append(int(value))
        else:
            data = np.asarray(value, _little_endian(feature.dtype)).tobytes()
            stored[name].bytes_list.value.append(data)
    for label, numbers in record.labels.items():
        listed = numbers if isinstance(numbers, tuple) else (numbers,)
        stored[LABEL_PREFIX + label].int64_list.value.extend(listed)
    return example.SerializeToString(deterministic=True)


def _attribute(stored: Any, feature: Feature) -> Any:
    """Returns the attribute of a record from its tf.train.Feature."""
    if feature.kind == "Sequence":
        return stored.bytes_list.value  # Not a tuple of all frames, where a view needs a few.
    if feature.kind == "Scalar":
        number = stored.int64_list.value[0]
        return bool(number) if feature.dtype == "bool" else number
    data = stored.bytes_list.value[0]
    if feature.kind == "Text":
        return to_text(data)
    values = np.frombuffer(data, _little_endian(feature.dtype))
    return values if feature.is_array else float(values[0])


def parse_record(
    payload: bytes,
    class_names: Mapping[str, Sequence[str]],
    multilabel: Collection[str],
    *,
    where: str,
) -> Record:
    """Reads a serialized tf.train.Example that `serialize_record` wrote.

    The bytes do not tell which labels allow several classes per record: `multilabel` does. `where`
    names the record in error messages.

    Raises:
        RecordError: if it is something else, contradicts itself, or has other labels or classes
            than those of `class_names`.
    """
    try:
        stored = message_class("Example").FromString(payload).features.feature
        if missing := lacking(stored):
            raise ValueError(f"lacks the features {', '.join(missing)}")
        labels: dict[str, ClassNumbers] = {}
        for name in sorted(stored):
            if name.startswith(LABEL_PREFIX):
                label, numbers = name.removeprefix(LABEL_PREFIX), stored[name].int64_list.value
                labels[label] = tuple(numbers) if label in multilabel else numbers[0]
        fixed = {f.attribute: _attribute(stored[n], f) for n, f in FEATURES.items() if n in stored}
        record = Record(**fixed, labels=labels)
    # ValueError: bytes that are not a whole number of values.
    except (DecodeError, IndexError, ValueError) as error:
        raise RecordError(f"{where} is not a record of avcl_jax: {error}") from error
    if problem := _problem(record):
        raise RecordError(f"{where} contradicts itself: {problem}; prepare this data set again")
    for label, names in class_names.items():
        value = record.labels.get(label, len(names))
        if max(value if isinstance(value, tuple) else (value,), default=0) >= len(names):
            raise RecordError(
                f"{where} has none of the {len(names)} classes of label {label!r}: "
                "prepare this data set again"
            )
    return record
