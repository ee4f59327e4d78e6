"""What a TFDS directory says of itself, read without TensorFlow.

`tfds.builder_from_directory` constructs the features, and `Video` and `Audio` need TensorFlow for
that; so features.json is read here, for the kinds of features that clips are made of.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from avcl_jax.data.record_files import FILE_FORMATS
from data_prep.example_layout import CLASSES, FILE, IMAGES, NUMBERS, TEXT, Stored
from data_prep.manifest import PrepareError

_MOST_CHANNELS = 8
_FEWEST_SAMPLES = 1000  # shorter vectors of fixed length are embeddings
_SAMPLE_TYPES = ("int16", "int32", "int64", "float32")


@dataclasses.dataclass(frozen=True)
class Feature:
    """One feature of the examples.

    Attributes:
      name: With slashes where features are nested.
      kind: Name of its class in tfds.features; "Sequence(Image)" for a sequence of images.
      stored: How it is kept.
      sample_rate_hz: That an Audio feature states.
      class_names: Of a label; None for what is none.
    """

    name: str
    kind: str
    stored: Stored
    sample_rate_hz: int | None = None
    class_names: tuple[str, ...] | None = None

    @property
    def may_be_video(self) -> bool:
        """Whether it can hold the frames of a clip."""
        shape = self.stored.shape
        return self.stored.kind == IMAGES or (
            self.stored.dtype == "uint8" and len(shape) == 4 and shape[3] in (1, 3)
        )

    @property
    def may_be_audio(self) -> bool:
        """Whether it can hold the sound of a clip."""
        shape = self.stored.shape
        return self.kind == "Audio" or (
            self.stored.kind == NUMBERS
            and self.stored.dtype in _SAMPLE_TYPES
            and len(shape) in (1, 2)
            and (shape[0] == -1 or shape[0] >= _FEWEST_SAMPLES)
            and (len(shape) == 1 or 1 <= shape[1] <= _MOST_CHANNELS)
        )


@dataclasses.dataclass(frozen=True)
class Split:
    """One split.

    Attributes:
      name: As TFDS calls it.
      shards: Files, and how many examples each should hold.
    """

    name: str
    shards: tuple[tuple[epath.Path, int], ...]


@dataclasses.dataclass(frozen=True)
class Directory:
    """A directory that TFDS has written.

    Attributes:
      file_format: Of its shards.
      features: By name; those that no clip is made of are left out.
      splits: In the order of dataset_info.json.
    """

    file_format: str
    features: Mapping[str, Feature]
    splits: tuple[Split, ...]


def read_directory(path: epath.Path) -> Directory:
    """Reads features.json and dataset_info.json.

    Raises:
      PrepareError: If it is no such directory, or of a format that is not read here.
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
        splits = tuple(_split(split, info["name"], file_format, path) for split in info["splits"])
    except PrepareError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise PrepareError(f"{path} is no directory of TFDS: {error!r}") from error
    return Directory(file_format, found, splits)


def _read_json(path: epath.Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise PrepareError(
            f"{path.parent} is no data set of TFDS ({path.name} is missing): give the directory of "
            "one version, such as ucf101/ucf101_1/2.0.0"
        ) from None
    except ValueError as error:
        raise PrepareError(f"{path} is damaged: {error}") from error


def _split(split: Mapping[str, Any], name: str, file_format: str, path: epath.Path) -> Split:
    lengths = [int(length) for length in split.get("shardLengths", ())]
    template = split.get("filepathTemplate") or "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    shards = []
    for number, length in enumerate(lengths):
        file = template
        for key, value in (
            ("DATASET", name),
            ("SPLIT", split["name"]),
            ("FILEFORMAT", file_format),
            ("SHARD_X_OF_Y", f"{number:05d}-of-{len(lengths):05d}"),
            ("SHARD_INDEX", f"{number:05d}"),
            ("NUM_SHARDS", f"{len(lengths):05d}"),
        ):
            file = file.replace(f"{{{key}}}", value)
        shards.append((path / file, length))
    return Split(split["name"], tuple(shards))


def _shape(content: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(int(size) for size in content.get("shape", {}).get("dimensions", ()))


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
        shape = (-1,) if depth else ()
        stored = Stored(name, CLASSES, "int64", shape)
        yield Feature(name, kind, stored, class_names=_class_names(feature, name, path))
    elif "text" in feature and depth == 0:
        yield Feature(name, kind, Stored(name, TEXT))
    elif "tensor" in feature:
        content = feature["tensor"]
        if content.get("dtype") in ("string", "object", "str"):
            if not depth and not _shape(content):
                yield Feature(name, kind, Stored(name, TEXT))
        elif not (depth and _encoding(content) != "none"):
            stored = _numbers(name, content, depth)
            yield Feature(name, f"{kind} {stored.dtype}{list(stored.shape)}", stored)


def _encoding(content: Mapping[str, Any]) -> str:
    return (content.get("encoding") or "none").lower()


def _numbers(name: str, content: Mapping[str, Any], depth: int) -> Stored:
    shape = ((-1,) if depth else ()) + _shape(content)
    return Stored(name, NUMBERS, content["dtype"], shape, _encoding(content))


def _class_names(feature: Mapping[str, Any], name: str, path: epath.Path) -> tuple[str, ...]:
    """Returns the names that lie beside features.json; numbers where there are none."""
    file = path / f"{name.replace('/', '-')}.labels.txt"
    if file.exists():
        return tuple(file.read_text().splitlines())
    return tuple(map(str, range(int(feature["classLabel"].get("numClasses", 0)))))
