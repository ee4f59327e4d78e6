"""Where a clip lies in a file of serialized examples, and which of its features are what.

All of it is part of an `Entry`: with the file's content it decides the record.
"""

from __future__ import annotations

import dataclasses

# Encoded images, numbers, one encoded file, text, class numbers.
IMAGES, NUMBERS, FILE, TEXT, CLASSES = "images", "numbers", "file", "text", "classes"


@dataclasses.dataclass(frozen=True)
class Stored:
    """How TFDS keeps one feature in a tf.train.Example.

    Attributes:
      key: Name of the feature, with slashes where features are nested.
      kind: `IMAGES`, `NUMBERS`, `FILE`, `TEXT` or `CLASSES`.
      dtype: Of numbers.
      shape: Of numbers and classes; -1 is unknown.
      encoding: "none", "bytes" or "zlib".
    """

    key: str
    kind: str
    dtype: str = ""
    shape: tuple[int, ...] = ()
    encoding: str = "none"


@dataclasses.dataclass(frozen=True)
class TfdsLayout:
    """What to read from a tf.train.Example that TFDS wrote.

    Attributes:
      video: Feature that holds the frames; None for no picture.
      audio: Feature that holds the sound; None for no sound.
      fps: Frames a second.
      sample_rate_hz: Of the sound.
      full_scale: Value of the loudest sample; None for 1 (floats) or 32,768 (integers).
    """

    video: Stored | None
    audio: Stored | None
    fps: float | None
    sample_rate_hz: int | None
    full_scale: float | None


@dataclasses.dataclass(frozen=True)
class SequenceLayout:
    """What to read from a tf.train.SequenceExample of MediaSequence or DMVR.

    Attributes:
      image_key: Feature list of the frames; times and rate are looked for beside it.
      audio_key: Feature list of the sound; times, rate and channels are looked for beside it.
      fps: Frames a second where the example has no times.
      sample_rate_hz: Of the sound where the example does not say.
      full_scale: Value of the loudest sample; None for 1.
    """

    image_key: str | None
    audio_key: str | None
    fps: float | None
    sample_rate_hz: int | None
    full_scale: float | None


@dataclasses.dataclass(frozen=True)
class ExamplePlace:
    """One example of a record file.

    Attributes:
      file_format: "tfrecord" or "array_record".
      place: Byte offset in a TFRecord file, number in an ArrayRecord file.
      layout: Which of its features are what.
    """

    file_format: str
    place: int
    layout: TfdsLayout | SequenceLayout
