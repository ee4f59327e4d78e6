"""Encoders of splits: each is used where it was held out, and none that met its test records."""

from __future__ import annotations

import dataclasses
import json
import shutil
import types
from typing import ClassVar

import numpy as np
import pytest

from avcl_jax.configs import cross_modal, linear_probe, retrieval, temporal
from avcl_jax.configs import finetune as finetune_config
from avcl_jax.data.records import RecordDataset
from avcl_jax.errors import UserError
from avcl_jax.evaluation import driver, splits
from avcl_jax.evaluation.classification import run_linear_probe
from avcl_jax.evaluation.finetune import finetune
from avcl_jax.evaluation.retrieval import audio_video_retrieval, video_retrieval
from avcl_jax.evaluation.splits import Trial, check_not_trained_on, split_encoders
from avcl_jax.evaluation.temporal import temporal_tasks
from avcl_jax.export import ExportError
from avcl_jax.export.runs import EncoderSource, open_encoders, random_like
from avcl_jax.training.checkpoint import Checkpoints, Progress
from tests.evaluation.labelled import write_encoders

NAMES = ["1", "2", "3"]
ALIKE = types.SimpleNamespace(config={"encoder": {}, "preprocessing": {}})


def _source(name: str, trained_on: str | None = None) -> EncoderSource:
    return EncoderSource(f"runs/{name}", {}, name, 7, trained_on)


def test_paths_with_a_place_for_the_fold_open_one_encoder_each(monkeypatch) -> None:
    opened = []

    def open_one(path: str) -> EncoderSource:
        opened.append(path)
        return dataclasses.replace(_source(path), path=path, encoders={"audio": ALIKE})

    monkeypatch.setattr(splits, "open_encoders", open_one)
    tests = {"split1": "fold=3", "split2": "split10=test"}
    several = split_encoders("runs/fold{fold}/x", tests, "audio")
    assert [several[name].path for name in tests] == ["runs/fold3/x", "runs/fold10/x"]
    opened.clear()
    one = split_encoders("runs/one", {"split1": "", "split2": "fold!=3"}, "audio")
    assert opened == ["runs/one"]
    assert one["split1"] is one["split2"]
    with pytest.raises(ExportError, match="runs/one has no video encoder"):
        split_encoders("runs/one", {"split1": ""}, "video")


def test_encoders_of_several_splits_are_one_in_the_results() -> None:
    def encoders(*names: str) -> EncoderSource:
        return driver.combined("runs/{fold}", [Trial(n, _source(n, "x"), None) for n in names])

    assert encoders("a", "a") == _source("a", "x")
    several = encoders("a", "b")
    assert (several.path, several.step, several.trained_on) == ("runs/{fold}", 7, None)
    assert several.fingerprint not in ("a", "b", encoders("a", "c").fingerprint)


def test_encoders_that_differ_in_more_than_weights_are_refused(tmp_path) -> None:
    for number, seed in enumerate((3, 4), 1):
        write_encoders(tmp_path / f"fold{number}", seed=seed)
    path, tests = str(tmp_path / "fold{fold}"), {"a": "fold=1", "b": "fold=2"}
    several = split_encoders(path, tests, "audio")
    assert several["a"].fingerprint != several["b"].fingerprint
    file = tmp_path / "fold2" / "audio" / "config.json"
    config = json.loads(file.read_text())
    config["preprocessing"]["log_mel"]["min_hz"] = 61.5
    file.write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=r"fold1 and .*fold2 are .*\.min_hz: 60\.0 -> 61\.5:"
    ) as error:
        split_encoders(path, tests, "audio")
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
    for number, name in enumerate(NAMES):
        source = _source("run", trained_on)
        tested = np.flatnonzero(records.labels["fold"] == number)
        said = f"on {heard.get(name)} of the 2 records"

        def check(allow: bool, source=source, tested=tested) -> None:
            check_not_trained_on(source, records, tested, allow=allow, what="records")

        if name in heard:
            with pytest.raises(UserError, match=said):
                check(allow=False)
        else:
            check(allow=False)
        check(allow=True)
        assert (said in capsys.readouterr().out) == (name in heard)


def test_a_run_says_what_it_was_trained_on_and_a_random_encoder_nothing(
    small_run, tmp_path
) -> None:
    _, workdir, state = small_run
    assert open_encoders(workdir).trained_on.startswith("small-train-")
    with Checkpoints(tmp_path, keep=1) as manager:
        manager.save(state, Progress(3, 1.0, "esc-all-6-aa fold!=2", 1))
    (tmp_path / "config.json").write_text((workdir / "config.json").read_text())
    source = open_encoders(tmp_path)
    assert (source.trained_on, source.step) == ("esc-all-6-aa fold!=2", 3)
    assert random_like(source, 0).trained_on is None


PROTOCOLS = {
    "retrieval": (retrieval, video_retrieval),
    "cross_modal": (cross_modal, audio_video_retrieval),
    "temporal": (temporal, temporal_tasks),
    "linear_probe": (linear_probe, run_linear_probe),
    "finetune": (finetune_config, finetune),
}


@pytest.fixture(scope="module")
def run_on_test(small_run, small_records, tmp_path_factory):
    """A run that says that it was pretrained on the records of the test split."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    shutil.copytree(small_run[1], workdir)
    shutil.rmtree(workdir / "checkpoints")
    said = RecordDataset(small_records, "test").fingerprint
    with Checkpoints(workdir, keep=1) as manager:
        manager.save(small_run[2], Progress(0, 1.0, said, 1))
    return workdir


@pytest.mark.parametrize("name", sorted(PROTOCOLS))
def test_a_run_on_its_own_test_records_is_refused(name, run_on_test, small_records, tmp_path):
    configs, protocol = PROTOCOLS[name]
    c = configs.get_config("demo")
    with c.unlocked():
        c.encoder = str(run_on_test)
        c.data.update({"directory": str(small_records)})
        if name in ("retrieval", "linear_probe"):
            c.features.speeds = (1,)
        elif name == "cross_modal":
            c.features.update({"speeds": (1, 2), "clips": 1})
        elif name == "finetune":
            c.update({"clip": {"seconds": 0.0}, "global_batch_size": 4})
    with pytest.raises(UserError, match=r"was pretrained, without labels, on \d+ of the"):
        protocol(c, tmp_path / "out")
    assert not (tmp_path / "out" / "results.json").exists()
