"""A directory of TensorFlow Datasets with video or audio features, read without TensorFlow."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Collection, Sequence
from typing import Any

from etils import epath

from avcl_jax.data.media_error import MediaError
from avcl_jax.data.record_files import ARRAY_RECORD
from avcl_jax.paths import absolute_path, is_remote
from data_prep.collections import example_files
from data_prep.collections.example_files import Classes, examples
from data_prep.collections.tfds_features import Directory, Feature, Split, read_directory
from data_prep.example_layout import CLASSES, FILE, NUMBERS, TEXT, ExamplePlace, TfdsLayout
from data_prep.manifest import Entry, Manifest, Missing, PrepareError, check_manifest
from data_prep.sources import tfds_example

_NONE = "none"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the directory and which of its features are what."""
    add = parser.add_argument
    add(
        "input",
        type=absolute_path,
        help="directory that holds features.json and dataset_info.json; may be gs://, s3://",
    )
    add("--split", action="append", help="only this split; may be repeated (all)")
    add("--video-feature", help=f"feature with the frames, or {_NONE} (the only one there is)")
    add("--audio-feature", help=f"feature with the sound, or {_NONE} (the only one there is)")
    add(
        "--label",
        action="append",
        help=f"feature with the class, or {_NONE}; may be repeated (all ClassLabel features)",
    )
    example_files.add_arguments(parser)


def read(args: argparse.Namespace) -> Manifest:
    """Lists the examples of a directory, reading all of it for ids and labels.

    Raises:
      PrepareError: If the directory is none of TFDS, or does not say enough.
    """
    example_files.check_arguments(args)
    directory = read_directory(args.input)
    if directory.file_format == ARRAY_RECORD and is_remote(args.input):
        raise PrepareError(f"{args.input}: copy ArrayRecord files to a local disk first")
    layout = _layout(args, directory)
    splits = _splits(args.split, directory, args.input)
    labels = _labels(args.label, directory)
    id_feature = _named(directory, args.id_feature, "--id-feature", _is_name)
    source_feature = _named(directory, args.source_feature, "--source-feature", _is_name)
    classes = {feature.name: Classes(feature.name, feature.class_names) for feature in labels}
    found: list[Entry] = []
    missing: list[Missing] = []
    for split in splits:
        for path, length in split.shards:
            count = 0
            for place, payload in examples(path, directory.file_format) if path.exists() else ():
                name = f"{path.name}#{count}"
                features = None if payload is None else _parsed(payload)
                try:
                    record_id = _name(features, id_feature) or name
                    source_id = _name(features, source_feature) or record_id
                    for feature in labels:
                        classes[feature.name].add(*_classes_of(features, feature))
                except MediaError as error:
                    raise PrepareError(f"{path}, example {count}: {error.message}") from error
                example = ExamplePlace(directory.file_format, place, layout)
                where = os.fspath(path)
                found.append(Entry(where, split.name, record_id, source_id, 0.0, None, {}, example))
                count += 1
            if count > length:
                raise PrepareError(
                    f"{path} holds {count} examples where dataset_info.json says {length}: these "
                    "do not belong together, copy the data set again"
                )
            missing += [
                Missing(f"{path.name}#{number}", split.name, path.name)
                for number in range(count, length)
            ]
    for feature in labels:  # also where by chance no clip has two
        classes[feature.name].several |= len(feature.stored.shape) == 1
    return check_manifest(example_files.manifest(found, missing, classes))


def _parsed(payload: bytes | memoryview) -> Any:
    """Returns the features of an example; None where preparation will reject it."""
    try:
        return tfds_example.parse(payload)
    except MediaError:
        return None


def _name(features: Any, feature: Feature | None) -> str | None:
    """Returns what a feature names; None if there is none."""
    if features is None or feature is None:
        return None
    return tfds_example.read_name(features, feature.stored)


def _is_name(feature: Feature) -> bool:
    stored = feature.stored
    is_integer = stored.kind == NUMBERS and stored.dtype.startswith(("int", "uint"))
    return stored.kind == TEXT or (is_integer and not stored.shape)


def _list(features: Collection[Feature]) -> str:
    return ", ".join(f"{feature.name} ({feature.kind})" for feature in features) or "none"


def _named(
    directory: Directory, name: str | None, option: str, fits: Callable[[Feature], bool]
) -> Feature | None:
    """Returns the feature that an option names; None if it names none."""
    if name is None:
        return None
    feature = directory.features.get(name)
    if feature is None or not fits(feature):
        candidates = [other for other in directory.features.values() if fits(other)]
        what = "there is no such feature" if feature is None else f"is a {feature.kind}"
        raise PrepareError(f"{option}={name}: {what}; candidates: {_list(candidates)}")
    return feature


def _chosen(
    directory: Directory,
    name: str | None,
    option: str,
    fits: Callable[[Feature], bool],
    typical: str,
) -> Feature | None:
    """Returns the feature that an option names, or the only one that it can be."""
    if name == _NONE:
        return None
    if name is not None:
        return _named(directory, name, option, fits)
    candidates = [feature for feature in directory.features.values() if fits(feature)]
    # What is called Video or Audio is meant to be that.
    candidates = [f for f in candidates if f.kind == typical] or candidates
    if len(candidates) > 1:
        raise PrepareError(
            f"several features can be it: {_list(candidates)}: choose by {option}=NAME, or "
            f"{option}={_NONE}"
        )
    return candidates[0] if candidates else None


def _layout(args: argparse.Namespace, directory: Directory) -> TfdsLayout:
    video = _chosen(
        directory, args.video_feature, "--video-feature", lambda f: f.may_be_video, "Video"
    )
    audio = _chosen(
        directory, args.audio_feature, "--audio-feature", lambda f: f.may_be_audio, "Audio"
    )
    if video is None and audio is None:
        raise PrepareError(
            f"{args.input} has no video and no audio among its features: "
            f"{_list(directory.features.values())}"
        )
    if video is not None and args.fps is None:
        raise PrepareError(
            f"TFDS does not keep the frame rate of {video.name!r}: say --fps, as the data set's "
            "documentation does"
        )
    rate = args.sample_rate_of_source or (audio.sample_rate_hz if audio else None)
    if audio is not None and not rate and audio.stored.kind != FILE:
        raise PrepareError(
            f"feature {audio.name!r} does not state its sample rate: say --sample-rate-of-source"
        )
    return TfdsLayout(
        video=video.stored if video else None,
        audio=audio.stored if audio else None,
        fps=args.fps,
        sample_rate_hz=rate,
        full_scale=args.full_scale,
    )


def _splits(names: Sequence[str] | None, directory: Directory, path: epath.Path) -> Sequence[Split]:
    known = {split.name: split for split in directory.splits}
    for name in names or ():
        if name not in known:
            raise PrepareError(f"{path} has no split {name!r}, it has {', '.join(sorted(known))}")
    return [known[name] for name in dict.fromkeys(names)] if names else directory.splits


def _may_be_label(feature: Feature) -> bool:
    stored = feature.stored
    return stored.kind in (CLASSES, TEXT) or (
        stored.dtype.startswith(("int", "uint")) and stored.shape in ((), (-1,))
    )


def _labels(names: Sequence[str] | None, directory: Directory) -> list[Feature]:
    if names is None:
        return [f for f in directory.features.values() if f.stored.kind == CLASSES]
    chosen = []
    for name in names:
        feature = None
        if name != _NONE:
            feature = _named(directory, name, "--label", _may_be_label)
        if feature:
            chosen.append(feature)
    return chosen


def _classes_of(features: Any, feature: Feature) -> tuple[Sequence[int], Sequence[str]]:
    """Returns the class numbers and names that an example has; unknown ones are left out."""
    if features is None:
        return (), ()
    if feature.stored.kind == TEXT:
        return (), [tfds_example.read_name(features, feature.stored)]
    numbers = tfds_example.read_numbers(features, feature.stored).reshape(-1).tolist()
    return [number for number in numbers if number >= 0], ()
