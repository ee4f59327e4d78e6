"""Sweeps: what variants change, effects by hand, and a whole small sweep that is stopped."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from avcl_jax import experiment
from avcl_jax.configs import ablation as ablation_config
from avcl_jax.errors import UserError
from avcl_jax.evaluation import ablation
from avcl_jax.evaluation.ablation import effect, effects, variant_config, variants_of
from avcl_jax.evaluation.evaluate import PROTOCOL, evaluate
from avcl_jax.processes import Stopped
from avcl_jax.training.loop import pretrain
from tests.evaluation.conftest import small_config, small_evaluation


@pytest.mark.parametrize("name", variants_of(ablation_config.get_config()))
def test_every_variant_changes_what_it_says_and_nothing_else(name: str) -> None:
    config = ablation_config.get_config()
    changes = dict(config.ablation.variants)[name]
    full = experiment.to_json(variant_config(config, "full", 1))
    changed = experiment.differences(full, experiment.to_json(variant_config(config, name, 1)))
    settings = [line.split(":")[0] for line in changed]
    assert sorted(settings) == sorted([key for key, _ in changes] + ["name"] * (name != "full"))


def test_variants_follow_overrides_and_those_that_change_nothing_are_left_out() -> None:
    config = ablation_config.get_config()
    given = variants_of(config)
    assert {"bank_space_same", "bank_space_cross", "audio_transform_independent"} <= set(given)
    assert not {"bank_space_agreement", "audio_transform_shared"} & set(given)
    config.views.audio_transform, config.bank.space = "independent", "same"
    other = variants_of(config)
    assert {"bank_space_agreement", "bank_space_cross", "audio_transform_shared"} <= set(other)
    assert not {"bank_space_same", "audio_transform_independent"} & set(other)
    assert len(other) == len(given) == 17
    assert variant_config(config, "audio_transform_shared", 0).bank.space == "same"


def test_a_setting_that_is_computed_from_another_follows_a_variant_of_that() -> None:
    config = ablation_config.get_config()
    config.ablation.variants = (("full", ()), ("short", (("steps", 100),)))
    given = experiment.with_absolute_paths(config)  # as a command does
    assert variant_config(given, "short", 0).bank.warmup_steps == 60
    assert variant_config(given, "full", 0).bank.warmup_steps == given.steps * 3 // 5
    given.bank.warmup_steps = 7
    assert variant_config(given, "short", 0).bank.warmup_steps == 7


def test_a_variant_of_a_setting_that_does_not_exist_is_refused() -> None:
    config = ablation_config.get_config()
    config.ablation.variants = (("full", ()), ("typo", (("loss.weight.vv", 0.0),)))
    with pytest.raises(ValueError, match="variant 'typo' cannot be built"):
        variant_config(config, "typo", 0)


def test_effects_are_paired_by_seed_with_students_interval() -> None:
    values, full = [0.5, 0.7, 0.55], [0.6, 0.75, 0.7]
    found = effect(values, full)
    differences = np.subtract(values, full)
    assert found.difference == pytest.approx(-0.1)
    expected = stats.ttest_rel(values, full).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    # By hand: mean ± t(0.975, 2) · s/√3.
    half = 4.302653 * differences.std(ddof=1) / np.sqrt(3)
    assert found.high - found.difference == pytest.approx(half, rel=1e-5)
    assert effect([0.5], [0.6])[3:] == (-np.inf, np.inf)
    assert effect([0.5, 0.75], [0.25, 0.5])[1:] == (0.625, 0.25, 0.25, 0.25)


def test_a_metric_that_a_variant_lacks_is_left_out_and_one_that_all_lack_refused() -> None:
    def run(weight: float, **results: dict) -> dict:
        return results | {"config": {"loss": {"weights": {"speed_video": weight}}}}

    speed, r5 = {"speed": {"accuracy": 0.2}}, {"audio_to_video": {"r5": 0.3}}
    results = {
        ("full", 0): run(1.0, temporal=speed, retrieval=r5),
        ("no_speed", 0): run(0.0, temporal=speed, retrieval=r5),
        ("half_speed", 0): run(0.5, temporal=speed, retrieval={}),
    }
    columns = [
        ("speed", "temporal.speed.accuracy", "speed_video"),
        ("R@5", "retrieval.audio_to_video.r5", ""),
    ]
    found = effects(results, columns, ["full", "no_speed", "half_speed"], [0])
    means = {
        column: {variant: e and e.mean for variant, e in of.items()} for column, of in found.items()
    }
    assert means == {
        "speed": {"full": 0.2, "no_speed": None, "half_speed": 0.2},  # the head was not trained
        "R@5": {"full": 0.3, "no_speed": 0.3, "half_speed": None},
    }
    assert ablation.as_table(found, ["full", "no_speed"]).endswith("| no speed | – | +0.0 |")
    for variant, column in (("half_speed", columns[1]), ("no_speed", columns[0])):
        alone = {("full", 0): results[variant, 0]}
        with pytest.raises(ValueError, match=rf"no {column[1]}, or are not trained for it"):
            effects(alone, [column], ["full"], [0])


def _small(records, *variants: str) -> object:
    """The sweep over these variants on the tiny data set of `small_records`."""
    c = ablation_config.get_config()
    c.unlock()
    c.update(small_config(records).to_dict())
    c.evaluation.update(small_evaluation().evaluation)
    c.task, c.execution.compilation_cache = "ablate", ""
    c.steps, c.optimizer.warmup_steps = 2, 0
    c.execution.log_every = c.execution.checkpoint_every = 1
    c.bank.update({"num_negatives": 4, "negative_candidates": 16})
    c.bank.warmup_steps = 0
    c.evaluation.supervised.enabled = False
    c.evaluation.null.train_split = ""
    c.ablation.seeds = (0, 1)
    c.ablation.variants = tuple(v for v in c.ablation.variants if v[0] in variants)
    c.lock()
    return c


def _variant(*changes: tuple[str, object]) -> dict[str, object]:
    """Overrides for a sweep over "full" and a variant "other"."""
    return {"ablation.variants": (("full", ()), ("other", changes))}


class _Runs:
    """Stands for training and evaluation; metrics are a function of variant and seed."""

    def __init__(self, stop_at: int) -> None:
        self.trained: list[str] = []
        self.data = {"train": "600 records", "test": "200 records"}
        self.stop_at = stop_at

    def pretrain(self, run, directory) -> None:
        if len(self.trained) == self.stop_at:
            raise Stopped
        assert run.task == experiment.PRETRAIN
        assert "evaluation" not in run
        self.trained.append(f"{directory.parent.name} {run.seed}")
        directory.mkdir(parents=True, exist_ok=True)

    def evaluate(self, run, directory) -> None:
        score = 0.5 + 0.1 * run.seed + (0.2 if run.loss.weights.vv else 0.0)
        results = {
            "protocol": PROTOCOL.name,
            "protocol_version": PROTOCOL.version,
            "probe": {"motion_from_video": {"pretrained": score}},
            "train_seconds": 1.0,
            "data": self.data,
            "config": json.loads(experiment.to_json(run)),
        }
        (directory / "results.json").write_text(json.dumps(results))


_MOTION = (("motion", "probe.motion_from_video.pretrained", ""),)


def test_a_sweep_that_is_stopped_goes_on_and_writes_one_table(small_records, tmp_path) -> None:
    config = _small(small_records, "full", "no_vv")
    config.ablation.metrics = _MOTION
    runs = _Runs(stop_at=3)

    def sweep() -> dict | None:
        return ablation.ablate(config, tmp_path, pretrain=runs.pretrain, evaluate=runs.evaluate)

    with pytest.raises(Stopped):
        sweep()
    assert runs.trained == ["full 0", "no_vv 0", "full 1"]  # whole comparisons first
    assert not (tmp_path / "results.json").exists()
    runs.stop_at = 4
    config.ablation.only = ("full",)
    assert sweep() is None  # the other variant is for another machine
    config.ablation.only = ()
    results = sweep()
    assert runs.trained[3:] == ["no_vv 1"]
    written = json.loads((tmp_path / "results.json").read_text())["effects"]
    assert (results["protocol"], results["protocol_version"]) == ("ablation", 2)
    found = results["effects"]["motion"]
    assert written["motion"]["no_vv"]["low"] == found["no_vv"]["low"]
    assert found["full"]["values"] == pytest.approx([0.7, 0.8])
    assert found["no_vv"]["difference"] == pytest.approx(-0.2)
    table = (tmp_path / "ablation.md").read_text().splitlines()
    assert table[2:] == ["| full | 75.0 (70.0 to 80.0) |", "| no vv | -20.0 ±\u00a00.0 |"]
    report = (tmp_path / "report.html").read_text()
    assert "loss.weights.vv = 0.0" in report
    assert report.count("<svg") == 1


def test_a_run_is_measured_again_where_settings_or_protocol_are_others(
    small_records, tmp_path
) -> None:
    config, runs = _small(small_records, "full", "no_vv"), _Runs(stop_at=9)
    config.ablation.metrics, config.ablation.seeds = _MOTION, (0,)

    def trained() -> list[str]:
        runs.trained = []
        ablation.ablate(config, tmp_path, pretrain=runs.pretrain, evaluate=runs.evaluate)
        return runs.trained

    assert trained() == ["full 0", "no_vv 0"]
    # Execution, and records of runs that are measured, decide no metric.
    config.data.directory = "elsewhere"
    config.execution.threads, config.execution.chunk = 16, 5
    assert trained() == []
    config.data.directory = str(small_records)
    path = tmp_path / "no_vv/seed0/results.json"
    old = json.loads(path.read_text()) | {"protocol_version": PROTOCOL.version - 1}
    path.write_text(json.dumps(old))
    assert trained() == ["no_vv 0"]
    config.steps += 1
    assert trained() == ["full 0", "no_vv 0"]
    (tmp_path / "results.json").unlink()
    runs.data = {"train": "601 records", "test": "200 records"}
    path.unlink()
    with pytest.raises(ValueError, match="no_vv seed 0 was measured on other data"):
        trained()
    assert not (tmp_path / "results.json").exists()


@pytest.mark.slow
def test_a_small_sweep_of_real_runs(small_records, tmp_path) -> None:
    config = _small(small_records, "full", "no_bank_negatives")
    results = ablation.ablate(config, tmp_path, pretrain=pretrain, evaluate=evaluate)
    found = results["effects"]["motion, video"]
    assert found["full"]["difference"] == 0
    assert min(found["no_bank_negatives"]["values"]) >= 0
    assert max(found["no_bank_negatives"]["values"]) <= 1
    for variant in ("full", "no_bank_negatives"):
        for seed in (0, 1):
            assert (tmp_path / variant / f"seed{seed}" / "report.html").exists()


def test_sweeps_that_make_no_sense_are_refused(tmp_path) -> None:
    config = ablation_config.get_config()
    config.ablation.only = ("no_everything",)
    with pytest.raises(ValueError, match=r"ablation.only names no_everything, there are"):
        ablation.ablate(config, tmp_path, pretrain=None, evaluate=None)
    config.ablation.variants = config.ablation.variants[1:]
    with pytest.raises(ValueError, match="must contain 'full'"):
        ablation.ablate(config, tmp_path, pretrain=None, evaluate=None)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"loss.weights.order_va": 0.0}, "'order_va', which variant 'full' does not train"),
        (
            {"ablation.metrics": (("motion", "probe.motion_from_video.random", "order"),)},
            "of the loss term 'order'",
        ),
        (
            {"evaluation.probes": (("motion", "video"),)},
            r"probe.material_from_audio.pretrained, which variant 'full' does not measure",
        ),
        ({"evaluation.recall_at": (1, 10)}, r"audio_to_video.r5, which variant 'full' does not"),
        ({"views.speeds": (1, 2), "evaluation.speeds": (4,)}, "evaluation.speeds 4 were not tr"),
        (_variant(("optimizer.name", "adam")), "'other' cannot be trained: unknown optimizer"),
        (_variant(("data.select", "motion=up")), "'other' cannot be trained: cannot select"),
        (_variant(("data.split", "val")), "'other' cannot be trained: .* 'val'"),
        (_variant(("global_batch_size", 64)), "'other' cannot be trained: .*24 usable records"),
        (
            _variant(("execution.log_every", 0)),
            "'other' cannot be built: execution.log_every 0 must be at least 1",
        ),
        (_variant(("evaluation.test_split", "val")), "'other' cannot be evaluated: .* 'val'"),
        (
            {"evaluation.probes": (("colour", "video"),)},
            "'full' cannot be evaluated: evaluation.probes asks for 'colour'",
        ),
        ({"evaluation.recall_at": (0, 5)}, r"evaluation.recall_at \(0, 5\) must be whole"),
        ({"evaluation.test_select": "motion"}, "'full' cannot be evaluated: 'motion' selects"),
        ({"evaluation.null.train_split": "noise"}, "evaluated: .* 'noise'"),
        (
            {"evaluation.test_split": "train"},
            "'full' would be pretrained, without labels, on 24 of its 24 test records",
        ),
    ],
)
def test_what_a_sweep_needs_at_its_end_is_checked_before_its_first_training(
    small_records, tmp_path, overrides, said
) -> None:
    config = _small(small_records, "full")
    config.update_from_flattened_dict(overrides)
    with pytest.raises(UserError, match=said):
        ablation.ablate(config, tmp_path, pretrain=None, evaluate=None)


@pytest.mark.parametrize("preset", ["demo", "records", "kinetics400"])
def test_metrics_of_a_preset_are_measured_by_its_evaluation_and_name_a_term_or_none(preset) -> None:
    config = ablation_config.get_config(preset)
    probes = {f"{label}_from_{modality}" for label, modality in config.evaluation.probes}
    paths = [path.split(".") for _, path, _ in config.ablation.metrics]
    assert {path[1] for path in paths if path[0] == "probe"} == probes
    assert ["retrieval", "audio_to_video", "r5"] in paths
    for path, (_, _, term) in zip(paths, config.ablation.metrics, strict=True):
        assert term in {"", *config.loss.weights}
        assert (term in path) == (path[0] == "temporal")
