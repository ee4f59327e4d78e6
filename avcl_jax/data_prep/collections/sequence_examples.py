"""Record files of tf.train.SequenceExample, as MediaSequence and DMVR write them.

Users of MMV and Scenic have them: `image/encoded`, `WAVEFORM/feature/floats`, `clip/label/index`
and so on, in TFRecord or ArrayRecord files.

The key names are those of mediapipe/util/sequence/media_sequence.py, dmvr/modalities.py and
dmvr/examples/generate_from_file.py. Times are microseconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from google.protobuf.message import DecodeError

from avcl_jax.data.media import MediaError
from avcl_jax.data.record_files import ARRAY_RECORD, TFRECORD
from avcl_jax.data.record_format import message_class, to_text
from avcl_jax.data_prep.collections import example_files
from avcl_jax.data_prep.collections.example_files import NONE, ExampleClasses, Listing
from avcl_jax.data_prep.footage import Example, Samples
from avcl_jax.data_prep.manifest import Manifest, Missing, PrepareError
from avcl_jax.paths import absolute_path, local_path

_ENCODED_MEDIA = "clip/encoded_media_bytes"
_MICROSECONDS = 1e-6
_AUDIO = "WAVEFORM/feature/floats"
_INDEX = "clip/label/index"
_TEXTS = ("clip/label/string", "clip/label/text")  # MediaSequence, DMVR
_SOURCES = ("clip/media_id", "clip/data_path", "video/filename")
_ARRAY_RECORD = re.compile(r"array_?record", re.IGNORECASE)
_SHARD = re.compile(r"tf_?record|array_?record|-\d{5}-of-\d{5}", re.IGNORECASE)


class _Sequence(NamedTuple):
    """Features of a tf.train.SequenceExample by name."""

    context: Mapping[str, list[Any]]  # values
    lists: Mapping[str, Sequence[Any]]  # steps, at least one

    @property
    def names(self) -> set[str]:
        """Names of the feature lists, and of the encoded media file."""
        return {*self.lists, *([_ENCODED_MEDIA] if self.context.get(_ENCODED_MEDIA) else [])}


@dataclasses.dataclass(frozen=True)
class SequenceLayout:
    """Feature lists to read from a tf.train.SequenceExample."""

    image_key: str | None  # times and rate are read from the features next to it
    audio_key: str | None  # as are times, rate and channels
    fps: float | None  # where the example has no times
    sample_rate_hz: int | None  # where the example states none
    full_scale: float | None  # value of the loudest sample; None for 1

    def parse(self, payload: bytes | memoryview) -> _Sequence:
        """Returns the features of a serialized tf.train.SequenceExample; may raise MediaError."""
        try:
            example = message_class("SequenceExample").FromString(bytes(payload))
        except DecodeError as error:
            raise MediaError("bad_example", f"not a tf.train.SequenceExample: {error}") from error
        context, lists = example.context.feature, example.feature_lists.feature_list
        return _Sequence(
            {key: _values(feature) for key, feature in context.items()},
            {key: steps.feature for key, steps in lists.items() if steps.feature},
        )

    def read(self, payload: bytes | memoryview) -> Example | bytes:
        """Returns the content of a serialized tf.train.SequenceExample; may raise MediaError.

        Time zero is the first frame; audio without times of its own starts with it.
        """
        example = self.parse(payload)
        media = example.context.get(_ENCODED_MEDIA)
        if media and not {self.image_key, self.audio_key} & example.lists.keys():
            return media[0]
        images, times, interval = _images(example, self)
        zero = times[0] if len(times) else None
        audio = _audio(example, self, zero)
        if zero is None and audio is None:
            wanted = [key for key in (self.image_key, self.audio_key) if key]
            raise MediaError(
                "empty",
                f"the example has no {' or '.join(wanted) or 'feature list that is used'}; it has "
                f"{', '.join(sorted(example.names)) or 'no feature lists'}",
            )
        if zero is None:
            zero = audio.packets[0][0] if audio else 0.0
        if audio is not None:
            packets = [(start - zero, data) for start, data in audio.packets]
            audio = dataclasses.replace(audio, packets=packets)
        return Example(images, times - zero, interval, audio)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the files, and properties that their examples do not state."""
    add = parser.add_argument
    paths = "record file, folder of them, or pattern with *"
    formats = "names with array_record in them are ArrayRecord files, all others TFRecord"
    add("input", nargs="+", metavar="[SPLIT=]PATH", help=f"{paths}; {formats}")
    add("--split", default="train", help="split of paths that name none")
    add("--video-feature", default="image/encoded", help=f"feature list with frames, or {NONE}")
    add("--audio-feature", default=_AUDIO, help=f"feature list with the audio, or {NONE}")
    add("--label", default="class", help=f"name for {_INDEX} and its texts, or {NONE}")
    add("--classes", type=local_path, help="file with the name of one class per line")
    example_files.add_arguments(parser)


def read(args: argparse.Namespace) -> Manifest:
    """Lists the examples of all files, reading all of them for labels and ids.

    Raises PrepareError if there are none, or they do not state enough.
    """
    keys = (args.video_feature, args.audio_feature)
    video, audio = (None if key == NONE else key for key in keys)
    layout = SequenceLayout(video, audio, args.fps, args.sample_rate_of_source, args.full_scale)
    names = args.classes.read_text(encoding="utf-8").splitlines() if args.classes else None
    class_names = {} if args.label == NONE else {args.label: names}
    files = [file for text in args.input for file in _files(text, args.split)]
    # Shards of two splits may have one name.
    names_of = [path.name for _, path in files]
    listing, lists = Listing(layout, class_names), set()

    def describe(example: _Sequence | None) -> tuple[str, str]:
        for classes in listing.classes.values():
            classes.append(_labels(example) if example is not None else ((), ()))
        if example is None:
            return "", ""
        if needs := _needs(example, layout):
            raise MediaError(
                "bad_example",
                f"states neither times nor rates: say {' and '.join(needs)} (DMVR's "
                "generate_from_file.py writes 10 frames and 48000 samples per second, and states "
                "neither in its files)",
            )
        lists.update(example.names)
        source = args.source_feature or next((k for k in _SOURCES if example.context.get(k)), None)
        id_and_source = {"--id-feature": args.id_feature, "--source-feature": source}
        record_id, source_id = (_name(example, *option) for option in id_and_source.items())
        return record_id, source_id

    for split, path in files:
        short = path.name if names_of.count(path.name) == 1 else os.fspath(path)
        if path.exists():
            file_format = ARRAY_RECORD if _ARRAY_RECORD.search(path.name) else TFRECORD
            listing.add_file(path, short, split, file_format, describe)
        else:
            listing.missing.append(Missing(short, split, os.fspath(path)))
    _check_features(layout, lists)
    return listing.manifest()


def _check_features(layout: SequenceLayout, features: set[str]) -> None:
    """Refuses feature lists that no example has: records would silently lack frames or audio.

    If no example can be parsed nothing is refused here: each is rejected on its own. The default
    audio list may be absent, as most videos have none; other absent lists are usually misnamed.
    """
    if not features or _ENCODED_MEDIA in features:
        return
    keys = {"--video-feature": layout.image_key, "--audio-feature": layout.audio_key}
    for option, key in keys.items():
        usual = key == _AUDIO and layout.image_key is not None
        if key is not None and key not in features and not usual:
            raise PrepareError(
                f"no example has the feature list {key}; there are {', '.join(sorted(features))}: "
                f"set {option} to one of them, or to {NONE} to prepare without it"
            )


def _files(text: str, split: str) -> Iterator[tuple[str, epath.Path]]:
    """Yields split and path of the files that one argument names."""
    named = re.fullmatch(r"([A-Za-z0-9_]+)=(.+)", text)
    if named and not absolute_path(text).exists():
        split, text = named[1], named[2]
    path = absolute_path(text)
    if path.is_dir():
        inside = sorted(p for p in path.iterdir() if _SHARD.search(p.name) and not p.is_dir())
    elif "*" in path.name:
        inside = sorted(path.parent.glob(path.name))
    else:
        inside = [path]
    if not inside:
        raise PrepareError(
            f"no record files at {text}: it looks for names with tfrecord, array_record or "
            "-00000-of-00010 in them"
        )
    for file in inside:
        yield split, file


def _name(example: _Sequence, option: str, key: str | None) -> str:
    """Returns a context feature as a name; "" without a key."""
    if key is None:
        return ""
    found = example.context.get(key)
    if not found:
        there = ", ".join(sorted(example.context)) or "none"
        raise MediaError(
            "bad_example", f"{option}={key}: there is no such context feature, there are {there}"
        )
    return to_text(found[0]) if isinstance(found[0], bytes) else str(found[0])


def _labels(example: _Sequence) -> ExampleClasses:
    numbers = example.context.get(_INDEX, [])
    texts = next((found for key in _TEXTS if (found := example.context.get(key))), [])
    if not all(isinstance(number, int) for number in numbers):
        raise MediaError("bad_example", f"{_INDEX} is not of integers")
    if not all(isinstance(text, bytes) for text in texts):
        raise MediaError("bad_example", "the texts of the labels are not text")
    return [number for number in numbers if number >= 0], [to_text(text) for text in texts]


def _beside(key: str, name: str) -> str:
    """Returns the key of a feature next to another: `image/timestamp` for `image/encoded`."""
    return f"{key.rpartition('/')[0]}/{name}"


def _values(feature: Any) -> list[Any]:
    kind = feature.WhichOneof("kind")
    return list(getattr(feature, kind).value) if kind else []


def _needs(example: _Sequence, layout: SequenceLayout) -> list[str]:
    """Returns the options that must be given because the example does not state them."""
    missing = []
    image, audio = layout.image_key or "", layout.audio_key or ""
    if image in example.lists and not layout.fps:
        rate = example.context.get(_beside(image, "frame_rate"))
        missing += [] if rate or example.lists.get(_beside(image, "timestamp")) else ["--fps"]
    if audio in example.lists and not layout.sample_rate_hz:
        known = example.context.get(_beside(audio, "sample_rate"))
        missing += [] if known else ["--sample-rate-of-source"]
    return missing


def _number(example: _Sequence, key: str) -> float:
    """Returns a context feature that is a positive number; 0 if there is none."""
    found = example.context.get(key)
    if not found:
        return 0.0
    if isinstance(found[0], bytes) or not np.isfinite(found[0]) or found[0] <= 0:
        raise MediaError("bad_example", f"{key} is {found[0]!r}")
    return float(found[0])


def _single(example: _Sequence, key: str, kind: type) -> list[Any]:
    """Returns the only value of each step of a feature list."""
    found = [_values(step) for step in example.lists.get(key, ())]
    if any(len(values) != 1 or not isinstance(values[0], kind) for values in found):
        raise MediaError("bad_example", f"a step of {key} does not have one value of its type")
    return [values[0] for values in found]


def _images(example: _Sequence, layout: SequenceLayout) -> tuple[list[bytes], np.ndarray, float]:
    """Returns encoded images, their times in seconds, and the interval if that is known."""
    key = layout.image_key or ""
    images = _single(example, key, bytes)
    if not images:
        return [], np.empty(0), 0.0
    stamps = _single(example, _beside(key, "timestamp"), int)
    if stamps:
        return images, np.array(stamps, np.float64) * _MICROSECONDS, 0.0
    fps = _number(example, _beside(key, "frame_rate")) or layout.fps
    if not fps:
        raise MediaError("bad_timestamps", "the frames have neither times nor a rate: set --fps")
    return images, np.arange(len(images)) / fps, 1 / fps


def _audio(example: _Sequence, layout: SequenceLayout, zero: float | None) -> Samples | None:
    key = layout.audio_key or ""
    if key not in example.lists:
        return None
    rate = _number(example, _beside(key, "sample_rate")) or layout.sample_rate_hz
    if not rate or rate != round(rate):
        raise MediaError("bad_example", f"the audio's rate is {rate}: set --sample-rate-of-source")
    channels = round(_number(example, _beside(key, "num_channels")) or 1)
    stamps = [time * _MICROSECONDS for time in _single(example, _beside(key, "timestamp"), int)]
    data = [np.array(step.float_list.value, np.float32) for step in example.lists[key]]
    if any(len(values) % channels for values in data):
        raise MediaError("bad_example", f"{key} is not a multiple of {channels} channels")
    data = [values.reshape(-1, channels) for values in data]
    if not stamps:
        data, stamps = [np.concatenate(data)], [zero or 0.0]
    if len(stamps) != len(data):
        raise MediaError("bad_timestamps", f"{len(data)} packets of audio, {len(stamps)} times")
    packets = [(start, values) for start, values in zip(stamps, data, strict=True) if len(values)]
    return Samples(packets, round(rate), layout.full_scale) if packets else None
