"""Encoders for official folds: one for all, or one for each test fold that never heard it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from avcl_jax import experiment
from avcl_jax.data.records import RecordDataset
from avcl_jax.data.selection import Condition, Selection
from avcl_jax.encoder_source import EncoderSource, open_encoders, random_like
from avcl_jax.errors import UserError
from avcl_jax.evaluation.fold_classification import FoldResult
from avcl_jax.evaluation.protocol import ProtocolError
from avcl_jax.evaluation.trained_on import check_not_trained_on

# Stands in `config.encoder` for the name of the test fold.
PLACE = "{fold}"


@dataclasses.dataclass(frozen=True)
class FoldEncoders:
    """Which encoder is used when a fold is the test fold.

    Attributes:
        by_fold: name of the fold -> encoders.
        named: what the results name: the one encoder, or all of them as one.
    """

    by_fold: Mapping[str, EncoderSource]
    named: EncoderSource

    @property
    def distinct(self) -> dict[str, EncoderSource]:
        """The different ones, by fingerprint."""
        return {source.fingerprint: source for source in self.by_fold.values()}

    def random_like(self, seed: int) -> FoldEncoders:
        """Returns encoders of the same shape with newly drawn weights, the same for all folds."""
        drawn = random_like(self.named, seed)
        return FoldEncoders(dict.fromkeys(self.by_fold, drawn), drawn)


def fold_names(path: str, test: Sequence[str]) -> list[str]:
    """Names of the folds that selections of test records speak of, one each.

    A fold is a class of one label (`fold=3` is "3"), or each has a label of its own whose name
    ends with its number (`split1=test` is "1").

    Args:
        path: of the encoders. Without `{fold}` any selection will do, and is its own name.
        test: selections, as `Selection.parse` reads them.

    Raises:
        ProtocolError: if there is a `{fold}`, and a selection is not of one fold.
    """
    return [_fold_name(Selection.parse(text)) if PLACE in path else text for text in test]


def split_selections(data: Any) -> list[tuple[str, str]]:
    """Returns the training and the test selection of every split.

    Args:
        data: section of a config with `train_select` and `test_select`.

    Raises:
        UserError: if there are not as many of one as of the other.
    """
    if len(data.train_select) != len(data.test_select) or not data.train_select:
        raise UserError(
            f"data.train_select {data.train_select} and data.test_select {data.test_select} "
            "must name the same splits, one after the other"
        )
    return list(zip(data.train_select, data.test_select, strict=True))


def _fold_name(test: Selection) -> str:
    match test.conditions:
        case [Condition(label=label, values=[value], negated=False)]:
            number = re.search(r"\d+$", label)
            return number.group() if number else value
    raise ProtocolError(
        f"data.test_select {str(test)!r} is not one fold, as {PLACE} in encoder needs: select "
        "it by one class of one label, as 'fold=3' or 'split1=test', or name one encoder for all"
    )


def open_fold_encoders(path: str, folds: Sequence[str]) -> FoldEncoders:
    """Opens the encoder at `path`, or one for each fold where `path` has "{fold}" in it.

    Args:
        path: as `open_encoders` takes it, with `{fold}` for the name of the test fold.
        folds: names of the folds.

    Raises:
        ExportError: if one is missing.
        ProtocolError: if they are not all of one architecture and preprocessing.
    """
    if PLACE not in path:
        source = open_encoders(path)
        return FoldEncoders(dict.fromkeys(folds, source), source)
    by_fold = {fold: open_encoders(path.replace(PLACE, fold)) for fold in folds}
    _check_alike(list(by_fold.values()))
    together = hashlib.sha256(
        " ".join(source.fingerprint for source in by_fold.values()).encode()
    ).hexdigest()
    steps = {source.step for source in by_fold.values()}
    named = dataclasses.replace(
        next(iter(by_fold.values())),
        path=path,
        fingerprint=together,
        step=steps.pop() if len(steps) == 1 else None,
        trained_on=None,
    )
    return FoldEncoders(by_fold, named)


def _check_alike(sources: Sequence[EncoderSource]) -> None:
    """Refuses encoders that differ in more than weights: clips are made once, for all of them."""
    first = sources[0]
    for other in sources[1:]:
        if different := experiment.differences(_shape(first), _shape(other)):
            raise ProtocolError(
                f"{first.path} and {other.path} are encoders of one protocol, but differ in "
                f"{'; '.join(different)}: pretrain them with the same settings"
            )


def _shape(source: EncoderSource) -> str:
    return json.dumps(
        {
            modality: {key: encoder.config[key] for key in ("encoder", "preprocessing")}
            for modality, encoder in source.encoders.items()
        }
    )


def check_unheard(
    encoders: FoldEncoders,
    records: RecordDataset,
    folds: np.ndarray,
    names: Sequence[str],
    *,
    allow: bool,
) -> None:
    """Refuses an encoder that was pretrained on recordings of the fold that it is tested on.

    Args:
        encoders: of each fold; `{fold}` in their path gives each test fold its own.
        records: that are classified.
        folds: int [records], class of the label that holds the fold.
        names: of these classes.
        allow: say it, and go on.

    Raises:
        ProtocolError: naming the fold and how many of its recordings were heard.
    """
    for fold, source in encoders.by_fold.items():
        check_not_trained_on(
            source,
            records,
            np.flatnonzero(folds == list(names).index(fold)),
            allow=allow,
            what=f"recordings of fold {fold}",
        )


def by_test_fold(
    classify: Callable[[np.ndarray, np.ndarray], FoldResult],
    features: Mapping[str, np.ndarray],
    encoders: FoldEncoders,
    folds: np.ndarray,
    names: Sequence[str],
) -> FoldResult:
    """Tests each fold with the features of its own encoder.

    Args:
        classify: maps features [n, …] and the numbers of the folds to test to their results.
        features: features of each distinct encoder, by its fingerprint.
        encoders: encoder of each fold.
        folds: int [n].
        names: class names that `folds` numbers.
    """
    numbers = np.unique(folds)
    used = np.array([encoders.by_fold[names[number]].fingerprint for number in numbers])
    correct, predicted = np.empty(len(folds)), np.empty(len(folds), np.int64)
    choices: dict[int, tuple[float, float]] = {}
    for fingerprint, values in features.items():
        tested = numbers[used == fingerprint]
        result = classify(values, tested)
        mine = np.isin(folds, tested)
        correct[mine], predicted[mine] = result.correct[mine], result.predicted[mine]
        choices |= dict(
            zip(tested.tolist(), zip(result.costs, result.inner_accuracy, strict=True), strict=True)
        )
    costs, inner_accuracy = zip(*(choices[number] for number in numbers.tolist()), strict=True)
    return FoldResult(correct, predicted, list(costs), list(inner_accuracy))
