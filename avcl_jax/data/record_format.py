"""One prepared clip, and how it is written as a tf.train.Example without TensorFlow.

A view shows a tenth of the frames of a record. So that a reader can leave out the others, all that
is small, the *header*, is stored first, then audio and frames; the feature `parts` of the header
tells where each of them lies and its CRC, and the index has length and CRC of the header. Examples
in another order, or without `parts`, are all header.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError

from avcl_jax.data.record_files import ReadPart, RecordError, masked_crc

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
        return self.attribute in ("frame_seconds", "waveform", "parts")


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
PARTS = "parts"
STORED = {
    **FEATURES,
    PARTS: Feature(
        *(PARTS, "Tensor", "int64", "bytes"),
        "First byte behind the header, size and masked CRC-32C, of the audio and of each frame",
    ),
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
def _features_class() -> Any:
    return type(message_class("Example")().features)


@functools.cache
def _little_endian(dtype: str | None) -> np.dtype[Any]:
    return np.dtype(dtype).newbyteorder("<")


def serialize_parts(record: Record) -> tuple[bytes, bytes]:
    """Returns header and rest of `record` as a serialized tf.train.Example, always the same bytes.

    Raises:
        ValueError: if the record contradicts itself.
    """
    if problem := _problem(record):
        raise ValueError(f"record {record.record_id!r}: {problem}")
    header, video, audio = (_features_class()() for _ in range(3))
    for name, feature in FEATURES.items():
        value = getattr(record, feature.attribute)
        stored = {"video": video, "audio": audio}.get(name, header).feature[name]
        if feature.kind == "Text":
            stored.bytes_list.value.append(to_bytes(value))
        elif feature.kind == "Sequence":
            stored.bytes_list.value.extend(value)
        elif feature.kind == "Scalar":
            stored.int64_list.value.append(int(value))
        else:
            stored.bytes_list.value.append(_to_values(value, feature))
    for label, numbers in record.labels.items():
        listed = numbers if isinstance(numbers, tuple) else (numbers,)
        header.feature[LABEL_PREFIX + label].int64_list.value.extend(listed)
    samples, rest = _to_values(record.waveform, FEATURES["audio"]), audio.SerializeToString()
    parts = [(len(rest) - len(samples), len(samples), masked_crc(samples))]
    rest += video.SerializeToString()
    end = len(rest)
    for frame in reversed(record.frames):  # each after a tag and its size
        parts.insert(1, (end - len(frame), len(frame), masked_crc(frame)))
        end -= len(frame) + len(_varint(len(frame))) + 1
    header.feature[PARTS].bytes_list.value.append(_to_values(parts, STORED[PARTS]))
    features = header.SerializeToString(deterministic=True)
    return b"\x0a" + _varint(len(features) + len(rest)) + features, rest


def serialize_record(record: Record) -> bytes:
    """Returns `record` as one serialized tf.train.Example; raises ValueError as above."""
    return b"".join(serialize_parts(record))


def header_length(record: Record, payload: bytes) -> int:
    """Returns the bytes of the header of a payload, which `parse_record` made `record` of."""
    header, rest = serialize_parts(record)
    return len(header) if header + rest == payload else len(payload)


def _to_values(values: Any, feature: Feature) -> bytes:
    return np.asarray(values, _little_endian(feature.dtype)).tobytes()


def _varint(number: int) -> bytes:
    """Encodes a number as protocol buffers do: 7 bits per byte, the highest bit if more follow."""
    digits = []
    while number > 127:
        digits.append(number & 127 | 128)
        number >>= 7
    return bytes([*digits, number])


class Frames(Sequence[bytes]):
    """Frames of a record, each read and checked when it is used.

    A damaged one raises RecordError.
    """

    def __init__(self, parts: np.ndarray, read: ReadPart):
        """Takes rows of `parts` int64 [frames, 3], and what reads them."""
        self._parts, self._read = parts, read

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, index: Any) -> Any:
        """Reads one frame, or a list of those of a slice."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return self._read(*self._parts[index].tolist())


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
    rest: ReadPart | None = None,
) -> Record:
    """Reads a serialized tf.train.Example, or its header.

    The bytes do not tell which labels allow several classes per record: `multilabel` does. `where`
    names the record in error messages.

    Args:
        rest: if `payload` is a header, the function that reads parts of the whole; `frames` of the
            record use it.

    Raises:
        RecordError: if it is something else, contradicts itself, or has other labels or classes
            than those of `class_names`; if the audio is damaged.
    """
    try:
        # The Example has one field, whose length counts what may not be here.
        begin = next(n for n in range(1, len(payload)) if payload[n] < 128) + 1
        stored = _features_class().FromString(payload[begin:]).feature
        if missing := lacking({*stored, *(("video", "audio") if rest else ())}):
            raise ValueError(f"lacks the features {', '.join(missing)}")
        labels: dict[str, ClassNumbers] = {}
        for name in sorted(stored):
            if name.startswith(LABEL_PREFIX):
                label, numbers = name.removeprefix(LABEL_PREFIX), stored[name].int64_list.value
                labels[label] = tuple(numbers) if label in multilabel else numbers[0]
        fixed = {f.attribute: _attribute(stored[n], f) for n, f in FEATURES.items() if n in stored}
        if rest:
            parts = _attribute(stored[PARTS], STORED[PARTS]).reshape(-1, 3)
            parts = parts + np.array([len(payload), 0, 0], parts.dtype)
            samples = rest(*parts[0].tolist())
            dtype = _little_endian(FEATURES["audio"].dtype)
            fixed |= {"frames": Frames(parts[1:], rest), "waveform": np.frombuffer(samples, dtype)}
        record = Record(**fixed, labels=labels)
    except RecordError:
        raise
    # ValueError: bytes that are not a whole number of values.
    except (DecodeError, IndexError, StopIteration, ValueError) as error:
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
