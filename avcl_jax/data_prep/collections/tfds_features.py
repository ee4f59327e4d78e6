"""Features and splits of a TFDS directory, and its examples, read without TensorFlow.

`tfds.builder_from_directory` constructs the features, and `Video` and `Audio` need TensorFlow for
that; so features.json is read here, for the kinds of features that clips are made of.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from google.protobuf.message import DecodeError

from avcl_jax.data.media import MediaError
from avcl_jax.data.record_files import FILE_FORMATS
from avcl_jax.data.record_format import PARTS, message_class, to_text
from avcl_jax.data_prep.footage import Example, Samples
from avcl_jax.data_prep.manifest import PrepareError

# Kinds of features: encoded images, numbers, one encoded file, text, class numbers.
IMAGES, NUMBERS, FILE, TEXT, CLASSES = "images", "numbers", "file", "text", "classes"
_MOST_CHANNELS = 8
_FEWEST_SAMPLES = 1000  # shorter vectors of fixed length are embeddings
_SAMPLE_TYPES = ("int16", "int32", "int64", "float32")


@dataclasses.dataclass(frozen=True)
class Stored:
    """Encoding of one feature in a tf.train.Example."""

    key: str  # with slashes where features are nested
    kind: str  # IMAGES, NUMBERS, FILE, TEXT or CLASSES
    dtype: str = ""  # of numbers
    shape: tuple[int, ...] = ()  # of numbers and classes; -1 is unknown
    encoding: str = "none"  # or "bytes", "zlib"

    @property
    def is_integer(self) -> bool:
        """True if its numbers are integers."""
        return self.dtype.startswith(("int", "uint"))


@dataclasses.dataclass(frozen=True)
class Feature:
    """One feature of the examples."""

    name: str  # with slashes where features are nested
    kind: str  # its class in tfds.features; "Sequence(Image)" for a sequence of images
    stored: Stored
    sample_rate_hz: int | None = None  # that an Audio feature states
    class_names: tuple[str, ...] | None = None  # of a label

    def may_be_video(self) -> bool:
        """Returns whether it can be the frames of a clip."""
        shape = self.stored.shape
        return self.stored.kind == IMAGES or (
            self.stored.dtype == "uint8" and len(shape) == 4 and shape[3] in (1, 3)
        )

    def may_be_audio(self) -> bool:
        """Returns whether it can be the audio of a clip."""
        shape = self.stored.shape
        return self.kind == "Audio" or (
            self.stored.kind == NUMBERS
            and self.name != PARTS  # of records that this project wrote
            and self.stored.dtype in _SAMPLE_TYPES
            and len(shape) in (1, 2)
            and (shape[0] == -1 or shape[0] >= _FEWEST_SAMPLES)
            and (len(shape) == 1 or 1 <= shape[1] <= _MOST_CHANNELS)
        )

    def may_be_label(self) -> bool:
        """Returns whether it can be the class, or classes, of a clip."""
        return self.stored.kind in (CLASSES, TEXT) or (
            self.stored.is_integer and self.stored.shape in ((), (-1,))
        )

    def may_be_name(self) -> bool:
        """Returns whether it can be the name of a clip."""
        single = self.stored.kind == NUMBERS and not self.stored.shape
        return self.stored.kind == TEXT or (self.stored.is_integer and single)


@dataclasses.dataclass(frozen=True)
class Directory:
    """A directory written by TFDS."""

    file_format: str
    features: Mapping[str, Feature]  # those that clips can be made of
    splits: Mapping[str, Sequence[tuple[epath.Path, int]]]  # files, and their number of examples


def read_directory(path: epath.Path) -> Directory:
    """Reads features.json and dataset_info.json.

    Raises PrepareError if it is not such a directory, or of a format that is not supported.
    """
    info = _read_json(path / "dataset_info.json")
    features = _read_json(path / "features.json")
    try:
        file_format = info.get("fileFormat", "tfrecord")
        if file_format not in FILE_FORMATS:
            raise PrepareError(
                f"{path} holds {file_format} files, read are {' and '.join(FILE_FORMATS)}: write "
                "it again by tfds.dataset_builder.DatasetBuilder(file_format='array_record')"
            )
        found = {feature.name: feature for feature in _walk(features, "", 0, path)}
        splits = {
            split["name"]: _shards(split, info["name"], file_format, path)
            for split in info["splits"]
        }
    except PrepareError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise PrepareError(f"{path} is not a directory of TFDS: {error!r}") from error
    return Directory(file_format, found, splits)


def _read_json(path: epath.Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise PrepareError(
            f"{path.parent} is not a data set of TFDS ({path.name} is missing): give the directory "
            "of one version, such as ucf101/ucf101_1/2.0.0"
        ) from None
    except ValueError as error:
        raise PrepareError(f"{path} is damaged: {error}") from error


def _shards(
    split: Mapping[str, Any], name: str, file_format: str, path: epath.Path
) -> list[tuple[epath.Path, int]]:
    # TFDS takes seconds to import, and only this command needs it here.
    from tensorflow_datasets.core.naming import ShardedFileTemplate

    lengths = [int(length) for length in split.get("shardLengths", ())]
    template = split.get("filepathTemplate", "")
    files = ShardedFileTemplate(path, template, name, split["name"], file_format)
    return list(zip(files.sharded_filepaths(len(lengths)), lengths, strict=True))


def _walk(feature: Mapping[str, Any], name: str, depth: int, path: epath.Path) -> Iterator[Feature]:
    """Yields the features below one; `depth` counts the sequences around it."""
    kind = feature["pythonClassName"].rpartition(".")[2]
    if "featuresDict" in feature:
        for key, value in feature["featuresDict"]["features"].items():
            yield from _walk(value, f"{name}/{key}" if name else key, depth, path)
    elif "sequence" in feature:
        # Sequences in sequences are ragged; nothing of a clip is.
        if depth == 0:
            yield from _walk(feature["sequence"]["feature"], name, 1, path)
    elif "video" in feature and depth == 0:
        yield Feature(name, kind, Stored(name, IMAGES))
    elif "image" in feature and depth == 1:
        yield Feature(name, f"Sequence({kind})", Stored(name, IMAGES))
    elif "audio" in feature and depth == 0:
        content = feature["audio"]
        rate = int(content.get("sampleRate") or 0) or None
        stored = Stored(name, FILE) if content.get("lazyDecode") else _numbers(name, content, depth)
        yield Feature(name, kind, stored, sample_rate_hz=rate)
    elif "classLabel" in feature:
        stored = Stored(name, CLASSES, "int64", (-1,) if depth else ())
        yield Feature(name, kind, stored, class_names=_class_names(feature, name, path))
    elif "text" in feature and depth == 0:
        yield Feature(name, kind, Stored(name, TEXT))
    elif "tensor" in feature:
        content = feature["tensor"]
        stored = _numbers(name, content, depth)
        if stored.dtype in ("string", "object", "str"):
            if not stored.shape:
                yield Feature(name, kind, Stored(name, TEXT))
        elif not (depth and stored.encoding != "none"):
            yield Feature(name, f"{kind} {stored.dtype}{list(stored.shape)}", stored)


def _numbers(name: str, content: Mapping[str, Any], depth: int) -> Stored:
    sizes = content.get("shape", {}).get("dimensions", ())
    shape = ((-1,) if depth else ()) + tuple(int(size) for size in sizes)
    encoding = (content.get("encoding") or "none").lower()
    return Stored(name, NUMBERS, content["dtype"], shape, encoding)


def _class_names(feature: Mapping[str, Any], name: str, path: epath.Path) -> tuple[str, ...]:
    """Returns the names in the file next to features.json; numbers where there is none."""
    file = path / f"{name.replace('/', '-')}.labels.txt"
    if file.exists():
        return tuple(file.read_text().splitlines())
    return tuple(map(str, range(int(feature["classLabel"].get("numClasses", 0)))))


def _feature(features: Any, key: str) -> Any:
    if key not in features:
        there = ", ".join(sorted(features)) or "none"
        raise MediaError("bad_example", f"no feature {key!r}, there are {there}")
    return features[key]


def read_numbers(features: Any, stored: Stored) -> np.ndarray:
    """Returns a feature of numbers or classes; raises MediaError if it is absent or another."""
    key, shape = stored.key, list(stored.shape)
    if shape.count(-1) > 1:  # stored beside the values
        shape = read_numbers(features, Stored(f"{key}/shape", stored.kind, "int64", (-1,))).tolist()
        key = f"{key}/value"
    feature = _feature(features, key)
    dtype = np.dtype(stored.dtype)
    try:
        if stored.encoding == "none":
            values = feature.float_list.value if dtype.kind == "f" else feature.int64_list.value
            return np.array(values, dtype).reshape(shape)
        data = feature.bytes_list.value[0]
        if stored.encoding == "zlib":
            data = zlib.decompress(data)
        return np.frombuffer(data, dtype).reshape(shape)
    except (ValueError, IndexError, OverflowError, zlib.error) as error:
        raise MediaError("bad_example", f"feature {key!r}: {error}") from error


def _read_bytes(features: Any, stored: Stored) -> list[bytes]:
    return list(_feature(features, stored.key).bytes_list.value)


def read_name(features: Any, stored: Stored) -> str:
    """Returns a feature of text or a number as a name; raises MediaError if it is absent."""
    if stored.dtype:
        return str(read_numbers(features, stored).item())
    found = _read_bytes(features, stored)
    if not found:
        raise MediaError("bad_example", f"feature {stored.key!r} is empty")
    return to_text(found[0])


@dataclasses.dataclass(frozen=True)
class TfdsLayout:
    """Features to read from a tf.train.Example."""

    video: Stored | None
    audio: Stored | None
    fps: float | None
    sample_rate_hz: int | None
    full_scale: float | None  # value of the loudest sample; None: 1 (floats), 32,768 (integers)

    def parse(self, payload: bytes | memoryview) -> Any:
        """Returns the features of a serialized tf.train.Example by name; may raise MediaError."""
        try:
            return message_class("Example").FromString(bytes(payload)).features.feature
        except DecodeError as error:
            raise MediaError("bad_example", f"not a tf.train.Example: {error}") from error

    def read(self, payload: bytes | memoryview) -> Example:
        """Returns the content of a serialized tf.train.Example; may raise MediaError."""
        features = self.parse(payload)
        images: list[bytes] | np.ndarray = []
        if self.video is not None:
            is_encoded = self.video.kind == IMAGES
            images = (_read_bytes if is_encoded else read_numbers)(features, self.video)
        # Frames without a rate do not pass the command that lists them.
        interval = 1 / self.fps if self.fps else 0.0
        audio: Samples | bytes | None = None
        if self.audio is not None and self.audio.kind == FILE:
            audio = next(iter(_read_bytes(features, self.audio)), None) or None
        elif self.audio is not None and self.sample_rate_hz:
            data = read_numbers(features, self.audio)
            if len(data):
                packet = (0.0, data[:, None] if data.ndim == 1 else data)
                audio = Samples([packet], self.sample_rate_hz, self.full_scale)
        return Example(images, np.arange(len(images)) * interval, interval, audio)
