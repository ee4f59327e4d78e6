"""A directory of TensorFlow Datasets with video or audio features, read without TensorFlow."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Sequence
from typing import Any

from avcl_jax.data_prep.collections import example_files
from avcl_jax.data_prep.collections.example_files import NONE, ExampleClasses, Listing
from avcl_jax.data_prep.collections.tfds_features import (
    CLASSES,
    FILE,
    TEXT,
    Directory,
    Feature,
    TfdsLayout,
    read_directory,
    read_name,
    read_numbers,
)
from avcl_jax.data_prep.manifest import Manifest, Missing, PrepareError
from avcl_jax.paths import absolute_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the directory and its features of video, audio and labels."""
    add = parser.add_argument
    label = f"feature with the class, or {NONE}; may be repeated (all ClassLabel features)"
    add("input", type=absolute_path, help="directory with features.json, may be gs://, s3://")
    add("--split", action="append", help="only this split; may be repeated (all)")
    add("--video-feature", help=f"feature with the frames, or {NONE} (the only one there is)")
    add("--audio-feature", help=f"feature with the audio, or {NONE} (the only one there is)")
    add("--label", action="append", help=label)
    example_files.add_arguments(parser)


def read(args: argparse.Namespace) -> Manifest:
    """Lists the examples of a directory, reading all of it for ids and labels.

    Raises PrepareError if it is not a directory of TFDS, or does not state enough.
    """
    directory = read_directory(args.input)
    layout = _layout(args, directory)
    splits = args.split or directory.splits
    for name in splits:
        if name not in directory.splits:
            known = ", ".join(sorted(directory.splits))
            raise PrepareError(f"{args.input} has no split {name!r}, it has {known}")
    labels = _labels(args.label, directory)
    id_feature = _named(directory, args.id_feature, "--id-feature", Feature.may_be_name)
    source_feature = _named(directory, args.source_feature, "--source-feature", Feature.may_be_name)
    listing = Listing(layout, {feature.name: feature.class_names for feature in labels})

    def describe(features: Any) -> tuple[str, str]:
        for feature in labels:
            listing.classes[feature.name].append(_classes_of(features, feature))
        record_id, source_id = (
            "" if features is None or feature is None else read_name(features, feature.stored)
            for feature in (id_feature, source_feature)
        )
        return record_id, source_id

    for split in dict.fromkeys(splits):
        for path, length in directory.splits[split]:
            found = 0
            if path.exists():
                found = listing.add_file(path, path.name, split, directory.file_format, describe)
            if found > length:
                raise PrepareError(
                    f"{path} holds {found} examples where dataset_info.json says {length}: these "
                    "do not belong together, copy the data set again"
                )
            for number in range(found, length):
                listing.missing.append(Missing(f"{path.name}#{number}", split, path.name))
    # Also where by chance no clip has two.
    return listing.manifest({f.name for f in labels if len(f.stored.shape) == 1})


def _list(features: Collection[Feature]) -> str:
    return ", ".join(f"{feature.name} ({feature.kind})" for feature in features) or "none"


def _named(
    directory: Directory,
    name: str | None,
    option: str,
    fits: Callable[[Feature], bool],
    typical: str = "",
) -> Feature | None:
    """Returns the feature `name` that an option names, if it fits.

    Without the option, returns the only feature that fits, those of the kind `typical` first.
    """
    candidates = [feature for feature in directory.features.values() if fits(feature)]
    if name is not None and name != NONE:
        feature = directory.features.get(name)
        if feature not in candidates:
            what = f"is a {feature.kind}" if feature else "there is no such feature"
            raise PrepareError(f"{option}={name}: {what}; candidates: {_list(candidates)}")
        return feature
    if name == NONE or not typical:
        return None
    candidates = [f for f in candidates if f.kind == typical] or candidates
    if len(candidates) > 1:
        raise PrepareError(
            f"several features can be it: {_list(candidates)}: choose by {option}=NAME, or "
            f"{option}={NONE}"
        )
    return candidates[0] if candidates else None


def _layout(args: argparse.Namespace, directory: Directory) -> TfdsLayout:
    video = _named(directory, args.video_feature, "--video-feature", Feature.may_be_video, "Video")
    audio = _named(directory, args.audio_feature, "--audio-feature", Feature.may_be_audio, "Audio")
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
    frames, samples = (feature.stored if feature else None for feature in (video, audio))
    return TfdsLayout(frames, samples, args.fps, rate, args.full_scale)


def _labels(names: Sequence[str] | None, directory: Directory) -> list[Feature]:
    if names is None:
        return [f for f in directory.features.values() if f.stored.kind == CLASSES]
    labels = [_named(directory, name, "--label", Feature.may_be_label) for name in names]
    return [feature for feature in labels if feature is not None]


def _classes_of(features: Any, feature: Feature) -> ExampleClasses:
    """Returns the class numbers and names of an example; unknown ones are left out."""
    if features is None:
        return (), ()
    if feature.stored.kind == TEXT:
        return (), [read_name(features, feature.stored)]
    numbers = read_numbers(features, feature.stored).reshape(-1).tolist()
    return [number for number in numbers if number >= 0], ()
