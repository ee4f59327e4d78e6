"""One prepared clip, and how it is written as a tf.train.Example without TensorFlow."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

from avcl_jax.data.tfrecord import RecordError

# Written as the data set's version. Raise the first number when old readers would read nonsense.
FORMAT_VERSION = "1.0.0"
LABEL_PREFIX = "label_"
UNKNOWN_LABEL = -1
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
    sample_rate_hz: int
    audio_start_seconds: float
    duration_seconds: float

    @property
    def audio_end_seconds(self) -> float:
        """When the last sample has sounded; the start when there is none."""
        if not self.num_samples:
            return self.audio_start_seconds
        return self.audio_start_seconds + self.num_samples / self.sample_rate_hz


@functools.cache
def _example_class() -> Any:
    """Returns tf.train.Example, from a descriptor of our own.

    In a private pool, because TensorFlow and TFDS register the same names in the default one; and
    because importing TFDS takes a second in every worker.
    """
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(
        name="avcl_jax/example.proto", package="tensorflow", syntax="proto3"
    )

    def add(message: Any, name: str, number: int, kind: int, **options: Any) -> None:
        options.setdefault("label", field.LABEL_OPTIONAL)
        message.field.add(name=name, number=number, type=kind, **options)

    for name, kind in (
        ("BytesList", field.TYPE_BYTES),
        ("FloatList", field.TYPE_FLOAT),
        ("Int64List", field.TYPE_INT64),
    ):
        add(file.message_type.add(name=name), "value", 1, kind, label=field.LABEL_REPEATED)
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, name in enumerate(("BytesList", "FloatList", "Int64List"), start=1):
        add(
            feature,
            name.replace("List", "_list").lower(),
            number,
            field.TYPE_MESSAGE,
            type_name=f".tensorflow.{name}",
            oneof_index=0,
        )
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    add(entry, "key", 1, field.TYPE_STRING)
    add(entry, "value", 2, field.TYPE_MESSAGE, type_name=".tensorflow.Feature")
    add(
        features,
        "feature",
        1,
        field.TYPE_MESSAGE,
        type_name=".tensorflow.Features.FeatureEntry",
        label=field.LABEL_REPEATED,
    )
    example = file.message_type.add(name="Example")
    add(example, "features", 1, field.TYPE_MESSAGE, type_name=".tensorflow.Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.Example"))


def to_bytes(text: str) -> bytes:
    """Encodes a name; file names need not be UTF-8."""
    return text.encode("utf-8", "surrogateescape")


def to_text(data: bytes) -> str:
    """Decodes what `to_bytes` encoded."""
    return data.decode("utf-8", "surrogateescape")


def _check_record(record: Record) -> None:
    seconds, waveform = record.frame_seconds, record.waveform
    problem = None
    if len(record.frames) != len(seconds) or seconds.dtype != np.float64:
        problem = f"{len(record.frames)} frames but {seconds.dtype} {seconds.shape} frame_seconds"
    elif len(seconds) and not (seconds[0] >= 0 and np.all(np.diff(seconds) > 0)):
        problem = "frame_seconds must start at 0 or later and strictly increase"
    elif waveform.dtype != np.int16 or waveform.ndim != 1:
        problem = f"waveform must be int16 [samples], got {waveform.dtype} {waveform.shape}"
    elif record.has_audio and record.sample_rate_hz <= 0:
        problem = f"sample_rate_hz must be positive, got {record.sample_rate_hz}"
    elif not record.audio_start_seconds >= 0:
        problem = f"audio_start_seconds must be 0 or more, got {record.audio_start_seconds}"
    elif not (record.has_video or record.has_audio):
        problem = "neither picture nor sound"
    elif not np.isfinite(record.duration_seconds) or record.duration_seconds <= 0:
        problem = f"duration_seconds must be positive, got {record.duration_seconds}"
    if problem:
        raise ValueError(f"record {record.record_id!r}: {problem}")


def serialize_record(record: Record) -> bytes:
    """Returns `record` as a serialized tf.train.Example, always the same bytes.

    Raises:
      ValueError: If the record contradicts itself.
    """
    _check_record(record)
    example = _example_class()()
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
      RecordError: If it is something else.
    """
    try:
        feature = _example_class().FromString(bytes(payload)).features.feature
        missing = [name for name in FEATURE_KINDS if name not in feature]
        if missing:
            raise RecordError(f"{where} lacks the features {missing}: not a record of avcl_jax")

        def data(name: str) -> bytes:
            return feature[name].bytes_list.value[0]

        def number(name: str) -> int:
            return feature[name].int64_list.value[0]

        return Record(
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
            labels={
                label: tuple(feature[name].int64_list.value)
                if label in multilabel
                else number(name)
                for name in sorted(feature)
                if name.startswith(LABEL_PREFIX)
                for label in [name.removeprefix(LABEL_PREFIX)]
            },
        )
    except (message.DecodeError, IndexError) as error:
        raise RecordError(f"{where} is not a record of avcl_jax: {error}") from error
