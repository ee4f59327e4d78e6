"""Record files of tf.train.SequenceExample, as MediaSequence and DMVR write them.

That is what users of MMV and Scenic have: `image/encoded`, `WAVEFORM/feature/floats`,
`clip/label/index` and so on, in TFRecord or ArrayRecord files.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from avcl_jax.data.media_error import MediaError
from avcl_jax.data.record_files import ARRAY_RECORD
from avcl_jax.data.record_format import to_text
from avcl_jax.paths import absolute_path, is_remote, local_path
from data_prep.collections import example_files
from data_prep.collections.example_files import Classes, examples, format_of
from data_prep.example_layout import ExamplePlace, SequenceLayout
from data_prep.manifest import Entry, Manifest, Missing, PrepareError, check_manifest
from data_prep.sources import sequence_example
from data_prep.sources.sequence_example import context

_NONE = "none"
_SOUND = "WAVEFORM/feature/floats"
_INDEX = "clip/label/index"
_TEXTS = ("clip/label/string", "clip/label/text")  # MediaSequence, DMVR
_SOURCES = ("clip/media_id", "clip/data_path", "video/filename")
_SHARD = re.compile(r"tf_?record|array_?record|-\d{5}-of-\d{5}", re.IGNORECASE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the files and what their examples do not say."""
    add = parser.add_argument
    add(
        "input",
        nargs="+",
        metavar="[SPLIT=]PATH",
        help="record file, folder of them, or pattern with *; names with array_record in them are "
        "ArrayRecord files, all others TFRecord",
    )
    add("--split", default="train", help="for paths that name none")
    add("--video-feature", default="image/encoded", help=f"feature list with frames, or {_NONE}")
    add(
        "--audio-feature",
        default=_SOUND,
        help=f"feature list with the sound, or {_NONE}",
    )
    add("--label", default="class", help=f"name for {_INDEX} and its texts, or {_NONE}")
    add("--classes", type=local_path, help="file with the name of each class, one a line")
    example_files.add_arguments(parser)


def read(args: argparse.Namespace) -> Manifest:
    """Lists the examples of all files, reading all of them for labels and ids.

    Raises:
      PrepareError: If there are none, or they do not say enough.
    """
    example_files.check_arguments(args)
    layout = SequenceLayout(
        image_key=None if args.video_feature == _NONE else args.video_feature,
        audio_key=None if args.audio_feature == _NONE else args.audio_feature,
        fps=args.fps,
        sample_rate_hz=args.sample_rate_of_source,
        full_scale=args.full_scale,
    )
    names = args.classes.read_text(encoding="utf-8").splitlines() if args.classes else None
    classes = {} if args.label == _NONE else {args.label: Classes(args.label, names)}
    files = [found for text in args.input for found in _files(text, args.split)]
    # Shards of two splits may have one name.
    names_of = [path.name for _, path in files]
    found: list[Entry] = []
    missing: list[Missing] = []
    lists: set[str] = set()
    for split, path in files:
        short = path.name if names_of.count(path.name) == 1 else os.fspath(path)
        if not path.exists():
            missing.append(Missing(short, split, os.fspath(path)))
            continue
        file_format = format_of(path)
        if file_format == ARRAY_RECORD and is_remote(path):
            raise PrepareError(f"{path}: copy ArrayRecord files to a local disk first")
        for number, (place, payload) in enumerate(examples(path, file_format)):
            record_id = source_id = f"{short}#{number}"
            labels: tuple[Sequence[int], Sequence[str]] = ((), ())
            example = None if payload is None else _parsed(payload)
            if example is not None:
                try:
                    record_id = _text(example, args.id_feature, "--id-feature") or record_id
                    source_id = _source(example, args.source_feature) or record_id
                    labels = _labels(example)
                except MediaError as error:
                    raise PrepareError(f"{path}, example {number}: {error.message}") from error
                _check_says_enough(example, layout, f"{path}, example {number}")
                lists |= sequence_example.features(example)
            for label in classes.values():
                label.add(*labels)
            place_of = ExamplePlace(file_format, place, layout)
            where = os.fspath(path)
            found.append(Entry(where, split, record_id, source_id, 0.0, None, {}, place_of))
    _check_features(layout, lists)
    return check_manifest(example_files.manifest(found, missing, classes))


def _check_features(layout: SequenceLayout, features: set[str]) -> None:
    """Refuses feature lists that no example has: records would silently lack frames or audio.

    If no example can be parsed nothing is refused here: each is rejected on its own. The default
    audio list may be absent, as most videos have none; other absent lists are usually misnamed.
    """
    if not features or sequence_example.ENCODED_MEDIA in features:
        return
    for option, key in (
        ("--video-feature", layout.image_key),
        ("--audio-feature", layout.audio_key),
    ):
        usual = key == _SOUND and layout.image_key is not None
        if key is not None and key not in features and not usual:
            raise PrepareError(
                f"no example has the feature list {key}; there are {', '.join(sorted(features))}: "
                f"set {option} to one of them, or to {_NONE} to prepare without it"
            )


def _parsed(payload: bytes | memoryview) -> Any:
    """Returns an example; None where preparation will reject it."""
    try:
        return sequence_example.parse(payload)
    except MediaError:
        return None


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


def _text(example: Any, key: str | None, option: str) -> str | None:
    """Returns a context feature as a name; None without a key."""
    if key is None:
        return None
    found = context(example, key)
    if not found:
        raise MediaError(
            "bad_example",
            f"{option}={key}: there is no such context feature, there are "
            f"{', '.join(sorted(example.context.feature)) or 'none'}",
        )
    return to_text(found[0]) if isinstance(found[0], bytes) else str(found[0])


def _source(example: Any, key: str | None) -> str | None:
    """Returns what the clip was cut from, so far as the example says."""
    if key is not None:
        return _text(example, key, "--source-feature")
    known = next((key for key in _SOURCES if context(example, key)), None)
    return _text(example, known, "--source-feature")


def _labels(example: Any) -> tuple[Sequence[int], Sequence[str]]:
    numbers = context(example, _INDEX)
    texts = next((found for key in _TEXTS if (found := context(example, key))), [])
    if not all(isinstance(number, int) for number in numbers):
        raise MediaError("bad_example", f"{_INDEX} is not of integers")
    if not all(isinstance(text, bytes) for text in texts):
        raise MediaError("bad_example", "the texts of the labels are not text")
    return [number for number in numbers if number >= 0], [to_text(text) for text in texts]


def _check_says_enough(example: Any, layout: SequenceLayout, where: str) -> None:
    missing = sequence_example.needs(example, layout)
    if missing:
        raise PrepareError(
            f"{where} states neither times nor rates: say {' and '.join(missing)} (DMVR's "
            "generate_from_file.py writes 10 frames and 48000 samples a second, and says so "
            "nowhere in its files)"
        )
