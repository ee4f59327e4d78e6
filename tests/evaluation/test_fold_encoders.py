"""An encoder for each fold: each is used where it was held out, and none that heard its test."""

from __future__ import annotations

import dataclasses
import json
from typing import ClassVar

import numpy as np
import pytest

from avcl_jax.encoder_source import EncoderSource, open_encoders, random_like
from avcl_jax.evaluation import fold_encoders
from avcl_jax.evaluation.fold_classification import FoldResult
from avcl_jax.evaluation.fold_encoders import (
    FoldEncoders,
    by_test_fold,
    check_unheard,
    fold_names,
    open_fold_encoders,
)
from avcl_jax.evaluation.protocol import ProtocolError
from avcl_jax.training.checkpoint import Checkpoints, Progress
from tests.evaluation.labelled import write_encoders

NAMES = ["1", "2", "3"]


def _source(name: str, trained_on: str | None = None) -> EncoderSource:
    return EncoderSource(f"runs/{name}", {}, name, 7, trained_on)


def test_results_of_a_fold_are_those_of_its_own_encoder_which_classifies_no_other() -> None:
    encoders = FoldEncoders({name: _source(f"f{name}") for name in NAMES}, _source("all"))
    folds = np.array([1, 0, 2, 1, 0])  # classes of the label, in its own order
    asked = []

    def classify(values: np.ndarray, tested: np.ndarray) -> FoldResult:
        mark = int(values[0])
        asked.append((mark, tested.tolist()))
        mine = np.isin(folds, tested)
        return FoldResult(
            np.where(mine, mark / 10, np.nan),
            np.where(mine, mark, -1),
            [10.0 * mark + fold for fold in tested],
            [0.0] * len(tested),
        )

    features = {f"f{name}": np.full(5, int(name)) for name in NAMES}
    found = by_test_fold(classify, features, encoders, folds, NAMES)
    assert found.predicted.tolist() == [2, 1, 3, 2, 1]
    assert found.correct.tolist() == [0.2, 0.1, 0.3, 0.2, 0.1]
    assert found.costs == [10.0, 21.0, 32.0]
    assert asked == [(1, [0]), (2, [1]), (3, [2])]
    asked.clear()
    one = _source("one")
    single = FoldEncoders(dict.fromkeys(NAMES, one), one)
    by_test_fold(classify, {"one": np.full(5, 7)}, single, folds, NAMES)
    assert asked == [(7, [0, 1, 2])]


def test_paths_with_a_place_for_the_fold_open_one_encoder_each(monkeypatch) -> None:
    opened = []

    def open_one(path: str) -> EncoderSource:
        opened.append(path)
        return dataclasses.replace(_source(path), path=path)

    monkeypatch.setattr(fold_encoders, "open_encoders", open_one)
    several = open_fold_encoders("runs/fold{fold}/x", NAMES)
    assert opened == ["runs/fold1/x", "runs/fold2/x", "runs/fold3/x"]
    assert several.by_fold["2"].path == "runs/fold2/x"
    assert several.named.path == "runs/fold{fold}/x"
    assert len(several.distinct) == 3
    other = open_fold_encoders("runs/{fold}", NAMES)
    assert other.named.fingerprint != several.named.fingerprint
    one = open_fold_encoders("runs/one", NAMES)
    assert one.named is one.by_fold["1"] is one.by_fold["3"]
    assert len(one.distinct) == 1


def test_selections_name_their_folds() -> None:
    assert fold_names("runs/{fold}", ["fold=3", "fold=1"]) == ["3", "1"]
    assert fold_names("runs/{fold}", ["split2=test", "split10=test"]) == ["2", "10"]
    assert fold_names("runs/one", ["", "fold!=3"]) == ["", "fold!=3"]


def test_random_encoders_are_one_for_all_folds() -> None:
    trained = FoldEncoders({name: _source(name, "esc-all-6-aa") for name in NAMES}, _source("all"))
    drawn = trained.random_like(0)
    assert list(drawn.by_fold) == NAMES
    assert list(drawn.distinct.values()) == [drawn.named]
    assert (drawn.named.path, drawn.named.trained_on) == ("random like runs/all", None)


def test_encoders_that_differ_in_more_than_weights_are_refused(tmp_path) -> None:
    for number, seed in enumerate((3, 4), 1):
        write_encoders(tmp_path / f"fold{number}", seed=seed)
    several = open_fold_encoders(str(tmp_path / "fold{fold}"), ["1", "2"])
    assert len(several.distinct) == 2
    path = tmp_path / "fold2" / "audio" / "config.json"
    config = json.loads(path.read_text())
    config["preprocessing"]["log_mel"]["min_hz"] = 61.5
    path.write_text(json.dumps(config))
    with pytest.raises(
        ProtocolError, match=r"fold1 and .*fold2 are .*\.min_hz: 60\.0 -> 61\.5:"
    ) as error:
        open_fold_encoders(str(tmp_path / "fold{fold}"), ["1", "2"])
    assert "\n" not in str(error.value)


class _Records:
    """What a selection looks at."""

    fingerprint = "esc-all-6-aa"
    labels: ClassVar = {"fold": np.array([0, 0, 1, 1, 2, 2])}
    class_names: ClassVar = {"fold": NAMES}
    multilabel = frozenset()

    def __len__(self) -> int:
        return 6


@pytest.mark.parametrize(
    ("trained_on", "heard"),
    [
        ("esc-all-6-aa", {"1": 2, "2": 2, "3": 2}),
        ("esc-all-6-aa fold!=2", {"1": 2, "3": 2}),
        ("esc-all-6-aa fold=1|3", {"1": 2, "3": 2}),
        ("other-all-6-bb", {}),
        (None, {}),
    ],
)
def test_an_encoder_that_heard_its_test_fold_is_refused(
    trained_on: str | None, heard: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    records = _Records()
    folds = records.labels["fold"]
    for name in NAMES:
        encoders = FoldEncoders({name: _source("run", trained_on)}, _source("run"))
        said = f"on {heard.get(name)} of the 2 recordings of fold {name}"
        if name in heard:
            with pytest.raises(ProtocolError, match=said):
                check_unheard(encoders, records, folds, NAMES, allow=False)
        else:
            check_unheard(encoders, records, folds, NAMES, allow=False)
        check_unheard(encoders, records, folds, NAMES, allow=True)
        assert (said in capsys.readouterr().out) == (name in heard)


def test_a_run_says_what_it_was_trained_on_and_a_random_encoder_nothing(
    small_run, tmp_path
) -> None:
    _, workdir, state = small_run
    assert open_encoders(workdir).trained_on.startswith("small-train-")
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(state, Progress(3, 1.0, "esc-all-6-aa fold!=2", 1))
    checkpoints.close()
    (tmp_path / "config.json").write_text((workdir / "config.json").read_text())
    source = open_encoders(tmp_path)
    assert (source.trained_on, source.step) == ("esc-all-6-aa fold!=2", 3)
    assert random_like(source, 0).trained_on is None
