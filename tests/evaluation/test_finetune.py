"""Fine-tuning: what it learns, what it may not see, what it leaves behind."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from avcl_jax.data.records import RecordDataset, RecordReader
from avcl_jax.data.selection import SelectionError
from avcl_jax.errors import UserError
from avcl_jax.evaluation import finetune as finetune_module
from avcl_jax.evaluation.finetune import finetune
from avcl_jax.evaluation.protocol import read_outcomes
from avcl_jax.export import ExportError
from avcl_jax.export.runs import open_encoders
from avcl_jax.training.checkpoint import CheckpointError, load_variables
from avcl_jax.training.run_steps import NonFiniteError
from tests.evaluation.labelled import NAMES, OVERRIDES, toy_config, write_encoders, write_labelled
from tests.training.small import compilation_cache, run, run_processes

pytestmark = pytest.mark.usefixtures("compiled")  # most trainings compile one and the same step


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    return write_labelled(tmp_path_factory.mktemp("toy") / "records")


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> Path:
    return write_encoders(tmp_path_factory.mktemp("encoders") / "export")


@pytest.fixture(scope="module")
def tuned(records, encoders, tmp_path_factory):
    """(workdir, results, records read before the test) of a whole fine-tuning."""
    workdir = tmp_path_factory.mktemp("tuned") / "run"
    read, before = [], []
    ids = list(RecordDataset(records, "all").record_ids)
    open_place, predict = RecordReader.open, finetune_module.predict

    def opening(self, place, **options):
        read.append(ids.index(place.name))
        return open_place(self, place, **options)

    def predicting(*args, **options):
        before.extend(read)
        return predict(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecordReader, "open", opening)
        patch.setattr(finetune_module, "predict", predicting)
        results = finetune(toy_config(records, encoders), workdir)
    return workdir, results, before


def in_split(records: Path, name: str, label: str = "split1") -> set[int]:
    data = RecordDataset(records, "all")
    return set(np.flatnonzero(data.labels[label] == NAMES[label].index(name)).tolist())


def test_it_learns_classes_that_are_plain(tuned):
    workdir, results, _ = tuned
    assert results["metrics"]["top1"]["value"] >= 0.9
    assert results["metrics"]["top1"]["chance"] == pytest.approx(1 / 3)
    assert results["protocol"] == "action_recognition"
    assert json.loads((workdir / "results.json").read_text()) == results
    report = (workdir / "report.html").read_text()
    for word in ("Confusion", "red", "accuracy over training step", "last epoch"):
        assert word in report


def test_results_are_those_of_the_saved_softmax(tuned, records):
    workdir, results, _ = tuned
    outcomes = read_outcomes(workdir / "outcomes.npz")
    probabilities = outcomes.values["probabilities"]
    data = RecordDataset(records, "all")
    tested = sorted(in_split(records, "test"))
    truth = data.labels["class"][tested]
    np.testing.assert_array_equal(outcomes.values["label"], truth)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, rtol=1e-5)
    hits = probabilities.argmax(axis=1) == truth
    assert results["metrics"]["top1"]["value"] == pytest.approx(hits.mean())
    by_class = [hits[truth == kind].mean() for kind in range(3)]
    assert results["metrics"]["mean_class_accuracy"]["value"] == pytest.approx(np.mean(by_class))
    assert outcomes.units == [f"split1/{data.record_ids[i]}" for i in tested]
    assert np.asarray(results["details"]["confusion"]).sum() == len(tested)
    (split,) = results["details"]["splits"]
    both = {i // 2 for i in tested} & {i // 2 for i in in_split(records, "train")}
    assert (split["sources_in_both"], split["steps"]) == (len(both), 18)


def test_no_test_record_is_read_before_the_last_step(tuned, records):
    _, _, before = tuned
    assert set(before) == in_split(records, "train")


def state_of(workdir: Path) -> dict[str, np.ndarray]:
    variables, _ = load_variables(workdir.absolute())
    leaves = jax.tree_util.tree_flatten_with_path(variables)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def test_an_interrupted_training_goes_on_bitwise(tuned, records, encoders, tmp_path, capsys):
    whole, results, _ = tuned
    workdir = tmp_path / "interrupted"
    shutil.copytree(whole, workdir)
    steps = sorted(int(p.name) for p in (workdir / "split1" / "checkpoints").glob("[0-9]*"))
    assert steps == [9, 18]
    shutil.rmtree(workdir / "split1" / "checkpoints" / "18")  # as if killed before
    shutil.rmtree(workdir / "split1" / "predictions")
    (workdir / "results.json").unlink()
    again = finetune(toy_config(records, encoders), workdir)
    assert "steps 9 to 18" in capsys.readouterr().out
    assert again["metrics"] == results["metrics"]
    expected, found = state_of(whole / "split1"), state_of(workdir / "split1")
    assert expected.keys() == found.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def changed(workdir: Path, encoders: Path | str, split: str = "split1") -> dict[str, bool]:
    """Whether each parameter and statistic of the encoder differs from the one it began with."""
    before = dict(open_encoders(encoders).require("video").params)
    after, _ = load_variables((workdir / split).absolute())
    now = jax.tree.leaves({kind: after[kind]["encoder"] for kind in before})
    return {
        jax.tree_util.keystr(path): np.asarray(old).tobytes() != np.asarray(new).tobytes()
        for (path, old), new in zip(jax.tree.leaves_with_path(before), now, strict=True)
    }


def test_fine_tuning_changes_every_layer(tuned, encoders):
    assert [name for name, other in changed(tuned[0], encoders).items() if not other] == []


def test_frozen_layers_stay_bitwise_as_they_were(records, encoders, tmp_path):
    frozen = {"freeze": ("encoder/stem",), "batch_norm": "frozen", "epochs": 1.0}
    finetune(toy_config(records, encoders, **frozen), tmp_path / "some")
    for name, other in changed(tmp_path / "some", encoders).items():
        assert other == (name.startswith("['params']") and "['stem" not in name), name


@pytest.mark.slow
def test_a_transformer_is_fine_tuned_on_clips_longer_than_it_was_trained_on(records, tmp_path):
    transformer = {"width": 16, "depth": 1, "heads": 2, "attention": "joint"}
    small = {f"model.video.transformer.{name}": value for name, value in transformer.items()}
    encoders = write_encoders(
        tmp_path / "export", overrides={"model.video.name": "transformer", **small}
    )
    frames = 2 * open_encoders(encoders).require("video").preprocess.num_frames
    config = toy_config(records, encoders, **{"clip.num_frames": frames, "epochs": 2.0})
    results = finetune(config, tmp_path / "longer")
    assert results["metrics"]["top1"]["value"] >= 0.9
    variables, _ = load_variables((tmp_path / "longer" / "split1").absolute())
    positions = variables["params"]["encoder"]["positions"]
    assert positions.shape[1] == frames // 2 // 2
    assert np.ptp(positions) > 0


@pytest.mark.slow
def test_sound_is_fine_tuned_by_the_same_code(records, encoders, tmp_path):
    config = toy_config(
        records,
        encoders,
        preset="demo_audio",
        **{
            "clip.seconds": 0.75,
            "data.train_select": ("part=labelled;split1=train",),
            "data.test_select": ("part=labelled;split1=test",),
        },
    )
    results = finetune(config, tmp_path / "audio")
    assert results["protocol"] == "audio_recognition"
    assert results["metrics"]["top1"]["value"] >= 0.9


AUDIO = {"data.train_select": ("split2=unused",), "data.test_select": ("split1=test",)}


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"data.train_select": ("split3=train",)}, SelectionError, "not 'split3'"),
        ({"data.train_select": ("split1=trian",)}, SelectionError, "has no class 'trian'"),
        ({"data.label": "motion"}, SelectionError, "not 'motion': choose one of these"),
        (
            {"data.train_select": ("",), "data.test_select": ("split1=test",)},
            SelectionError,
            "3 of the 96 records of split 'all' of",
        ),
        (
            {"data.train_select": ("split1=test",)},
            ValueError,
            "are among both the training records",
        ),
        ({"data.test_select": ("split1=test", "split2=test")}, ValueError, "same splits"),
        ({"encoder": "/nonexistent"}, ExportError, "there is no directory /nonexistent"),
        ({"init": "imagenet"}, ValueError, "must be 'pretrained' or 'random'"),
        ({"modality": "both"}, ValueError, "must be 'video' or 'audio'"),
        ({"batch_norm": "off"}, ValueError, "must be 'train' or 'frozen'"),
        ({"freeze": ("encoder/stem",)}, UserError, "set batch_norm='frozen'"),
        (
            {"freeze": ("encoder",), "batch_norm": "frozen"},
            UserError,
            "leaves no layer of the encoder to train: use configs/linear_probe.py",
        ),
        (
            {"freeze": ("encoder/layer9",), "batch_norm": "frozen"},
            UserError,
            "must name layers of the encoder, some of encoder/",
        ),
        ({"optimizer.schedule": "step"}, ValueError, "must be 'cosine' or 'multistep'"),
        ({"global_batch_size": 64}, ValueError, "larger than the 48 usable records: set"),
        (
            AUDIO | {"data.label": "part"},
            SelectionError,
            "have no audio, or only silence, first 'clip 15'",
        ),
        (AUDIO | {"test.crops": 3}, ValueError, "audio has neither frames nor crops"),
        (AUDIO | {"clip.seconds": 0.77}, ValueError, "windows of"),
        # The second split has fewer records, so that both milestones are one step there.
        (
            {
                "data.train_select": ("split1=train", "split2=test"),
                "data.test_select": ("split1=test", "split2=train"),
                "optimizer.schedule": "multistep",
                "optimizer.warmup_epochs": 0.0,
                "optimizer.milestones": (1.0, 1.3),
            },
            ValueError,
            "milestones at steps (2, 2) must increase",
        ),
    ],
)
def test_mistakes_are_one_clear_error(records, encoders, tmp_path, overrides, error, message):
    preset = "demo_audio" if AUDIO.items() <= overrides.items() else "demo"
    config = toy_config(records, encoders, preset=preset, **overrides)
    with pytest.raises(error, match=re.escape(message)) as caught:
        finetune(config, tmp_path / "mistake")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "mistake").exists()


def test_a_directory_of_another_training_is_refused(tuned, records, encoders, tmp_path):
    config = toy_config(records, encoders, **{"label_smoothing": 0.3})
    with pytest.raises(UserError, match="results of this protocol with another encoder"):
        finetune(config, tuned[0])
    # The same before there are results.
    workdir = shutil.copytree(tuned[0], tmp_path / "unfinished")
    (workdir / "results.json").unlink()
    with pytest.raises(CheckpointError, match=r"label_smoothing: 0\.1 -> 0\.3"):
        finetune(config, workdir)
    other = toy_config(records, write_encoders(tmp_path / "other", seed=1))
    with pytest.raises(CheckpointError, match="encoder_fingerprint"):
        finetune(other, workdir)


def test_a_fine_tuned_run_is_no_encoder(tuned, records):
    config = toy_config(records, tuned[0] / "split1")
    with pytest.raises(ExportError, match=r"contains a run of task '.*:finetune'"):
        finetune(config, tuned[0].parent / "other")


@pytest.mark.slow
def test_every_split_is_trained_and_tested_on_its_own(records, encoders, tmp_path):
    config = toy_config(
        records,
        encoders,
        **{
            "data.train_select": ("split1=train", "split2=train"),
            "data.test_select": ("split1=test", "split2=test"),
        },
    )
    results = finetune(config, tmp_path / "both")
    described = results["details"]["splits"]
    assert [entry["test_records"] for entry in described] == [
        len(in_split(records, "test", name)) for name in ("split1", "split2")
    ]
    one, two = (state_of(tmp_path / "both" / name) for name in ("split1", "split2"))
    assert all((one[name] != two[name]).any() for name in one if "kernel" in name)
    mean = np.mean([entry["top1"] for entry in described])
    assert results["metrics"]["top1"]["value"] == pytest.approx(mean)
    assert mean >= 0.9


def command_line(records: Path, encoders: Path, workdir: Path, **overrides: object) -> list[str]:
    """Arguments of a short fine-tuning; `a__b=1` overrides `config.a.b`."""
    values = OVERRIDES | {
        "encoder": encoders,
        "data.directory": records,
        "epochs": 2.0,
        "execution.log_every": 1,
        "execution.compilation_cache": compilation_cache(),
    }
    values |= {name.replace("__", "."): value for name, value in overrides.items()}
    return [
        "--config=configs/finetune.py",
        f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in values.items()),
    ]


def assert_agree(left: Path, right: Path) -> None:
    """Same losses and predictions, to rounding."""
    losses, probabilities = [], []
    for workdir in (left, right):
        rows = (workdir / "split1" / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(row)["loss"] for row in rows])
        probabilities.append(read_outcomes(workdir / "outcomes.npz").values["probabilities"])
        assert (workdir / "results.json").exists()
    assert len(losses[0]) == 6
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    np.testing.assert_allclose(probabilities[1], probabilities[0], atol=2e-3)


@pytest.fixture(scope="module")
def one_device(records, encoders, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("devices") / "one"
    run(command_line(records, encoders, workdir))
    return workdir


@pytest.mark.slow
def test_eight_devices_and_a_worker_train_as_one_device_does(
    records, encoders, one_device, tmp_path
):
    run(command_line(records, encoders, tmp_path / "eight", execution__workers=1), devices=8)
    assert_agree(one_device, tmp_path / "eight")


@pytest.mark.slow
def test_two_processes_train_and_test_as_one_does(records, encoders, one_device, tmp_path):
    workdir = tmp_path / "two"
    run_processes(command_line(records, encoders, workdir), devices=4)
    assert_agree(one_device, workdir)


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_the_training(records, encoders, tmp_path):
    config = toy_config(
        records, encoders, **{"optimizer.learning_rate": 1e30, "optimizer.clip_norm": 0.0}
    )
    with pytest.raises(NonFiniteError, match="no checkpoint was written") as error:
        finetune(config, tmp_path / "diverged")
    assert not (tmp_path / "diverged" / "results.json").exists()
    assert str(error.value).endswith(". With other settings choose another --workdir")
    with pytest.raises(CheckpointError, match="choose another --workdir, or undo optimizer"):
        finetune(toy_config(records, encoders), tmp_path / "diverged")


SPLITS = {
    "data.train_select": ("split2=train", "split1=train"),
    "data.test_select": ("split2=test", "split1=test"),
    "epochs": 1.0,
}
FROZEN_STEM = {"freeze": ("encoder/stem",), "batch_norm": "frozen"}


@pytest.fixture(scope="module")
def fold_encoders(records, tmp_path_factory):
    """Where encoders of two folds are, each pretrained on all but the test records of its fold."""
    directory = tmp_path_factory.mktemp("fold_encoders")
    data = RecordDataset(records, "all").fingerprint
    for fold in (1, 2):
        write_encoders(directory / f"fold{fold}", seed=fold, data=f"{data} split{fold}!=test")
    return directory / "fold{fold}"


def test_every_split_begins_with_the_encoder_of_its_fold(records, fold_encoders, tmp_path):
    config = toy_config(records, fold_encoders, **FROZEN_STEM, **SPLITS)
    results = finetune(config, tmp_path)
    opened = {fold: open_encoders(str(fold_encoders).replace("{fold}", fold)) for fold in "12"}
    # The first split is fold 2.
    for split, fold in (("split1", "2"), ("split2", "1")):
        layers = changed(tmp_path, opened[fold].path, split)
        stem = {name: other for name, other in layers.items() if "['stem" in name}
        assert stem
        assert not any(stem.values())
    described = results["details"]["splits"]
    assert [entry["encoder"]["path"] for entry in described] == [opened[f].path for f in "21"]
    own = [entry["encoder"]["fingerprint"] for entry in described]
    assert own == [opened[fold].fingerprint for fold in "21"]
    assert results["encoder"]["path"] == str(fold_encoders)
    assert results["encoder"]["fingerprint"] not in own
    report = (tmp_path / "report.html").read_text()
    assert all(source.path in report for source in opened.values())
    assert json.loads((tmp_path / "results.json").read_text()) == results


def test_an_encoder_that_met_the_test_of_its_split_is_refused(records, fold_encoders, tmp_path):
    for fold, other in ((1, 2), (2, 1)):
        (tmp_path / f"other{fold}").symlink_to(fold_encoders.parent / f"fold{other}")
    config = toy_config(records, tmp_path / "other{fold}", **SPLITS)
    message = r"other2 was pretrained, without labels, on \d+ of the \d+ test records"
    with pytest.raises(UserError, match=message):
        finetune(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_random_encoder_is_the_same_for_all_splits(records, fold_encoders, tmp_path):
    config = toy_config(records, fold_encoders, init="random", **SPLITS)
    splits = finetune(config, tmp_path)["details"]["splits"]
    assert splits[0]["encoder"] == splits[1]["encoder"]
    assert splits[0]["encoder"]["path"] == f"random like {fold_encoders}"


@pytest.mark.parametrize("test", ["split1!=test", "split1=test|train", "split1=test;class=red", ""])
def test_a_selection_of_no_one_fold_names_no_encoder(records, fold_encoders, tmp_path, test):
    config = toy_config(records, fold_encoders, **{"data.test_select": (test,)})
    with pytest.raises(UserError, match=r"is not one fold, as {fold} in encoder needs") as error:
        finetune(config, tmp_path / "run")
    assert "\n" not in str(error.value)
