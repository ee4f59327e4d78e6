"""Encoders for official folds: one for all, or one for each test fold that never heard it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from avcl_jax.data.records import RecordDataset
from avcl_jax.encoder_source import EncoderSource, open_encoders
from avcl_jax.evaluation.fold_classification import FoldResult
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


def open_fold_encoders(path: str, folds: Sequence[str]) -> FoldEncoders:
    """Opens the encoder at `path`, or one for each fold where `path` has "{fold}" in it.

    Args:
        path: as `open_encoders` takes it, with `{fold}` for the name of the test fold.
        folds: names of the folds.

    Raises:
        ExportError: if one is missing.
    """
    if PLACE not in path:
        source = open_encoders(path)
        return FoldEncoders(dict.fromkeys(folds, source), source)
    by_fold = {fold: open_encoders(path.replace(PLACE, fold)) for fold in folds}
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
    classify: Callable[[np.ndarray], FoldResult],
    features: Mapping[str, np.ndarray],
    encoders: FoldEncoders,
    folds: np.ndarray,
    names: Sequence[str],
) -> FoldResult:
    """Takes from each encoder the result of the folds that it is tested on.

    Args:
        classify: from features [n, …] to the results of all folds.
        features: of each distinct encoder, by its fingerprint.
        encoders: of each fold.
        folds: int [n].
        names: of the classes that `folds` numbers.
    """
    results = {fingerprint: classify(values) for fingerprint, values in features.items()}
    numbers = np.unique(folds)  # the order of the costs
    chosen = [results[encoders.by_fold[names[int(number)]].fingerprint] for number in numbers]
    first = chosen[0]
    correct, predicted = np.empty_like(first.correct), np.empty_like(first.predicted)
    for number, result in zip(numbers, chosen, strict=True):
        tested = folds == number
        correct[tested], predicted[tested] = result.correct[tested], result.predicted[tested]
    return FoldResult(
        correct,
        predicted,
        [result.costs[place] for place, result in enumerate(chosen)],
        [result.inner_accuracy[place] for place, result in enumerate(chosen)],
    )
