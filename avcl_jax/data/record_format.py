"""One prepared clip, and how it is written as a tf.train.Example without TensorFlow."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from avcl_jax.data.example_proto import DecodeError, example_class
from avcl_jax.data.record_files import RecordError

# Version of the data set. Raise the first number when old readers would read nonsense.
FORMAT_VERSION = "1.0.0"
LABEL_PREFIX = "label_"
UNKNOWN_LABEL = -1
_MAX_PIXELS = 1 << 26  # of a frame, as for media files
# One class, or all classes of a label that allows several per record.
ClassNumbers = int | tuple[int, ...]

# Fixed features, each with its entry in features.json (last part of pythonClassName, dtype,
# encoding). Waveform and times are stored as raw bytes: 160,000 varints per record would take
# longer to parse than its frames to decode, and tf.train.Example has no float64.
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
        """True if there is at least one frame."""
        return len(self.frames) > 0

    @property
    def has_audio(self) -> bool:
        """True if there is at least one sample."""
        return len(self.waveform) > 0


# Lengths and times of a record in the index, with their dtypes: zeros for a missing modality, the
# longest and shortest time between two frames, the largest magnitude of a sample.
TIMELINE: Mapping[str, type] = {
    "num_frames": np.int32,
    "first_frame_seconds": np.float64,
    "last_frame_seconds": np.float64,
    "max_frame_gap_seconds": np.float64,
    "min_frame_gap_seconds": np.float64,
    "num_samples": np.int32,
    "audio_peak": np.int32,
    "sample_rate_hz": np.int32,
    "audio_start_seconds": np.float64,
    "duration_seconds": np.float64,
}
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


def serialize_record(record: Record) -> bytes:
    """Returns `record` as a serialized tf.train.Example, always the same bytes.

    Raises:
        ValueError: if the record contradicts itself.
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

    The bytes do not tell which labels allow several classes per record: `multilabel` does. `where`
    names the record in error messages.

    Raises:
        RecordError: if it is something else, or contradicts itself.
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
    # ValueError: bytes that are not a whole number of values.
    except (DecodeError, IndexError, ValueError) as error:
        raise RecordError(f"{where} is not a record of avcl_jax: {error}") from error
    if problem := _problem(record):
        raise RecordError(f"{where} contradicts itself: {problem}; prepare this data set again")
    return record


def check_labels(record: Record, class_names: Mapping[str, Sequence[str]], *, where: str) -> None:
    """Compares the labels of a record with those of its data set.

    Raises:
        RecordError: if a label is missing, or a class that it names.
    """
    for label, names in class_names.items():
        value = record.labels.get(label, len(names))
        if max(value if isinstance(value, tuple) else (value,), default=0) >= len(names):
            raise RecordError(
                f"{where} has none of the {len(names)} classes of label {label!r}: "
                "prepare this data set again"
            )
