"""Splits of a protocol: training and test records and the encoder of each, opened and checked.

A fold is a split: it trains on `fold!=1` and tests on `fold=1`, by an encoder of its own where the
path of the encoders has `{fold}` in it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import ml_collections
import numpy as np

from avcl_jax import experiment
from avcl_jax.data.clips import ClipRecords, ClipSpec
from avcl_jax.data.records import RecordDataset
from avcl_jax.data.selection import Condition, Modality, SelectedRecords, Selection
from avcl_jax.errors import UserError
from avcl_jax.evaluation.features import FeatureSpec, encoder_clips
from avcl_jax.export import Encoder
from avcl_jax.export.runs import EncoderSource, open_encoders

# Stands in `config.encoder` for the name of the test fold.
FOLD = "{fold}"

Records = TypeVar("Records", bound=SelectedRecords)


@dataclasses.dataclass(frozen=True)
class Trial(Generic[Records]):
    """Test records, and the encoder that is measured with them; it must not have met them."""

    name: str
    encoder: EncoderSource
    test: Records


@dataclasses.dataclass(frozen=True)
class Split(Trial[Records]):
    """Test records with training records."""

    train: Records


def split_encoders(path: str, tests: Mapping[Any, str], modality: str) -> dict[Any, EncoderSource]:
    """Opens the encoder of every split.

    Args:
        path: path of encoders, with `{fold}` for the name of the test fold where each split has an
            encoder of its own.
        tests: selection of the test records by name of the split.

    Raises:
        ExportError: if an encoder is missing or lacks the modality.
        UserError: if a selection is not of one fold, as `{fold}` needs, or encoders differ in more
            than weights: clips are rendered once for all.
    """
    paths = {
        name: path.replace(FOLD, _fold_of(test)) if FOLD in path else path
        for name, test in tests.items()
    }
    sources = {path: open_encoders(path) for path in dict.fromkeys(paths.values())}
    first, *others = sources.values()
    for other in others:
        shapes = (
            {
                m: {key: e.config[key] for key in ("encoder", "preprocessing")}
                for m, e in source.encoders.items()
            }
            for source in (first, other)
        )
        if different := experiment.differences(*map(json.dumps, shapes)):
            raise UserError(
                f"{first.path} and {other.path} are encoders of one protocol, but differ in "
                f"{'; '.join(different)}: pretrain them with the same settings"
            )
    for source in sources.values():
        source.require(modality)
    return {name: sources[path] for name, path in paths.items()}


def _fold_of(test: str) -> str:
    """Returns the name of the fold that a selection of test records is.

    A fold is a class of one label (`fold=3` is "3"), or each has a label of its own whose name
    ends with its number (`split1=test` is "1").
    """
    match Selection.parse(test).conditions:
        case [Condition(label=label, values=[value], negated=False)]:
            number = re.search(r"\d+$", label)
            return number.group() if number else value
    raise UserError(
        f"data.test_select {test!r} is not one fold, as {FOLD} in encoder needs: select it by one "
        "class of one label, as 'fold=3' or 'split1=test', or name one encoder for all"
    )


def open_splits(
    config: ml_collections.ConfigDict,
    modality: Modality,
    labels: Sequence[str],
    spec_of: Callable[[Encoder], ClipSpec],
    *,
    only: int | None = None,
    tags: str = "",
    shared_interval: bool = False,
    shared_sources: bool = False,
) -> list[Split[ClipRecords]]:
    """Opens the records and the encoder of the splits split1, split2, … of the section `data`.

    Reads no record.

    Args:
        labels: labels that must be known.
        spec_of: clips that an encoder is given.
        only: number of a split, to open no other.
        tags: label that may have several classes per record.
        shared_interval: argument of `ClipRecords`.
        shared_sources: accept training and test records of one source.

    Raises:
        ExportError: if an encoder is missing or lacks the modality.
        RecordError: if there is no such data set or split.
        SelectionError: if a selection does not fit the data set, or records lack something.
        UserError: if selections are not those of splits, or training and test records of one share
            a record or a source.
    """
    data = config.data
    if len(data.train_select) != len(data.test_select) or not data.train_select:
        raise UserError(
            f"data.train_select {data.train_select} and data.test_select {data.test_select} "
            "must name the same splits, one after the other"
        )
    numbers = range(1, len(data.test_select) + 1)
    if only is not None and only not in numbers:
        raise UserError(
            f"data.official_split {only} must be one of 1 to {len(numbers)}, the entries of "
            "data.test_select"
        )
    tests = {n: data.test_select[n - 1] for n in ([only] if only else numbers)}
    encoders = split_encoders(config.encoder, tests, modality)
    spec = spec_of(next(iter(encoders.values())).require(modality))
    dataset = functools.cache(functools.partial(RecordDataset, data.directory))

    @functools.cache
    def records(split: str, select: str) -> ClipRecords:
        known = [n for n in labels if n != tags or n not in dataset(split).multilabel]
        selection = Selection.parse(select)
        return ClipRecords(dataset(split), selection, spec, known, data.leave_out, shared_interval)

    splits = []
    for number, select in tests.items():
        train = records(data.train_split, data.train_select[number - 1])
        test = records(data.test_split, select)
        common, what = {*train.record_ids} & {*test.record_ids}, "records"
        alike = train.records.fingerprint == test.records.fingerprint  # numbers name sources there
        if not (common or shared_sources) and alike:
            common, what = {*train.sources} & {*test.sources}, "sources"
        if common:
            raise UserError(
                f"{len(common)} {what} are among both the training records ({train}) and the test "
                f"records ({test}), for instance {min(common)!r}: select them apart"
            )
        splits.append(Split(f"split{number}", encoders[number], test, train))
    return splits


def clip_splits(
    config: ml_collections.ConfigDict,
    modality: Modality,
    labels: Sequence[str],
    *,
    by_clip: bool = False,
    only: int | None = None,
    tags: str = "",
) -> tuple[list[Split[ClipRecords]], FeatureSpec]:
    """Opens the splits of a protocol on frozen features, with the clips of the section `features`.

    Takes the arguments of `open_splits`, and raises the same.

    Args:
        by_clip: accept features of single clips.
    """
    run = {name: config.execution[name] for name in ("chunk", "part_records", "threads")}
    spec = FeatureSpec(**config.features, **run)
    if spec.record_pooling == "clips" and not by_clip:
        raise UserError("features.record_pooling 'clips' is for probes: use 'mean' or 'mean_max'")
    clips = functools.partial(encoder_clips, spec=spec)
    splits = open_splits(
        config, modality, labels, clips, only=only, tags=tags, shared_interval=True
    )
    return splits, spec


def count_trained_on(trained_on: str, records: RecordDataset, positions: np.ndarray) -> int:
    """Returns how many test records, at int [n] positions in their data set, were pretrained on.

    Args:
        trained_on: fingerprint of the records of the pretraining, with their selection.
    """
    if not trained_on.startswith(records.fingerprint):
        return 0
    met = Selection.parse(trained_on.removeprefix(records.fingerprint)).positions(records)
    return len(np.intersect1d(met, positions))


def check_not_trained_on(
    source: EncoderSource, records: RecordDataset, positions: np.ndarray, *, allow: bool, what: str
) -> None:
    """Refuses an encoder that was pretrained on records that it is tested on, by a UserError.

    Only what a run says of its own data can be checked: an encoder of another data set or of
    another preparation of it, and imported weights, pass.

    Args:
        positions: int [n], test records in `records`, `what` in the message.
        allow: print it instead.
    """
    both = count_trained_on(source.trained_on or "", records, positions)
    if not both:
        return
    said = f"{source.path} was pretrained, without labels, on {both} of the {len(positions)} {what}"
    if not allow:
        raise UserError(
            f"{said}: pretrain without them (data.select), or set data.allow_trained_on=True"
        )
    print(f"{said}: its metrics are not those of an encoder that never met them", flush=True)
