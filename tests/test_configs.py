"""Every preset builds, its state shapes evaluate, and its step lowers."""

from __future__ import annotations

import functools
import importlib
import re

import jax
import ml_collections
import numpy as np
import pytest
from etils import epath

from avcl_jax import experiment, main
from avcl_jax.configs import (
    cross_modal,
    datasets,
    evaluate,
    export,
    linear_probe,
    pretrain,
    retrieval,
    temporal,
)
from avcl_jax.data.spectrogram import mel_constants
from avcl_jax.data.views import MARGIN
from avcl_jax.errors import UserError
from avcl_jax.evaluation.driver import Context
from avcl_jax.evaluation.retrieval import VIDEO_RETRIEVAL
from avcl_jax.export.runs import EncoderSource
from avcl_jax.training import program
from tests.training import small

PRESETS = ("demo", "kinetics400", "kinetics400_vit", "kinetics600", "vggsound", "audioset")
_SLOW = ("kinetics400_vit", "kinetics600", "vggsound")


def batch_of(config):
    shapes = experiment.render_spec(config).batch_shapes(config.global_batch_size)
    return {name: jax.ShapeDtypeStruct(*value) for name, value in shapes.items()}


# Each lowers for ten seconds; two presets differ from kinetics400 by numbers only, one by encoders
# that tests/models covers.
@pytest.mark.parametrize(
    "preset",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in _SLOW)) for name in PRESETS],
)
def test_preset_builds_evaluates_shapes_and_lowers(preset):
    config = pretrain.get_config(preset)
    _, init, step = program.build(config)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(lambda key: init(key)[0], key)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params["video_encoder"]))
    if preset != "demo":
        assert parameters == (153_828_352 if preset == "kinetics400_vit" else 31_300_125)
        assert config.bank.size >= 65_536
        assert (config.views.num_frames, config.crop.image_size) == (16, 112)
    after, metrics = jax.eval_shape(step, state, batch_of(config), key)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )
    weights = config.loss.weights.to_dict()
    assert {f"{term}/loss" for term, weight in weights.items() if weight} <= metrics.keys()
    lowered = jax.jit(step, donate_argnums=0).lower(state, batch_of(config), key)
    products = "dot_general" if preset == "kinetics400_vit" else "convolution"
    assert products in lowered.as_text()


@pytest.mark.parametrize("preset", PRESETS[1:])
def test_full_size_settings_follow_from_each_other(preset):
    config = pretrain.get_config(preset)
    views, optimizer, batch = config.views, config.optimizer, config.global_batch_size
    spans = [
        (views.clip_seconds * a, views.clip_seconds * b) for a in views.speeds for b in views.speeds
    ]
    room = [sum(pair) + MARGIN * min(pair) for pair in spans]
    assert [pair for pair, needed in zip(spans, room, strict=True) if needed > 10.0] == [(6.0, 6.0)]
    # All bands are linearly independent.
    _, filters = mel_constants(experiment.render_spec(config).log_mel)
    assert np.linalg.matrix_rank(filters) == config.spectrogram.mels == 80
    assert optimizer.learning_rate == pytest.approx(5e-4 * (batch / 512) ** 0.5)
    assert config.bank.size == 64 * 2 * batch  # rows of 64 steps, two views a video
    assert config.bank.warmup_steps == config.steps // 2 > 4 * optimizer.warmup_steps


def test_the_abstract_preset_is_the_demo_without_audio_audio_contrast():
    demo, abstract = (
        experiment.to_json(pretrain.get_config(name)) for name in ("demo", "abstract")
    )
    changed = experiment.differences(demo, abstract)
    assert changed == ["loss.weights.aa: 0.5 -> 0.0", "name: 'demo' -> 'abstract'"]


@pytest.mark.parametrize("preset", ["run", "abstract", "small", "esc10", *PRESETS])
def test_what_evaluates_a_run_repeats_none_of_its_settings(preset):
    config = evaluate.get_config(preset).to_dict()
    own = {"allow_trained_on"}
    repeated = pretrain.get_config().to_dict().keys() & config.keys()
    assert repeated == {"task", "name", "data", "execution"}
    assert config["data"].keys() == {"directory", *own}
    assert config["name"] == ("demo" if preset == "run" else preset)
    assert set(export.get_config()) == {"task", "name", "license", "execution"}


@pytest.mark.parametrize("module", [retrieval, cross_modal, temporal, linear_probe])
def test_a_protocol_has_a_preset_for_every_data_set(module):
    for name, row in datasets.DATASETS.items():
        config = module.get_config(name)
        assert (config.data.directory, config.data.prepare) == (row.directory, row.prepare)
        with pytest.raises(KeyError, match="encodr"):
            config["encodr"] = "runs/other"
    with pytest.raises(ValueError, match="unknown preset 'imagenet': use one of demo, "):
        module.get_config("imagenet")


@pytest.mark.parametrize(
    ("module", "setting", "value"),
    [
        (pretrain, "seed", -1),
        (pretrain, "steps", 0),
        (pretrain, "optimizer.learning_rate", "nan"),
        (pretrain, "optimizer.learning_rate", -1.0),
        (pretrain, "photometric.gray_probability", 1.5),
        (temporal, "execution.part_records", 0),
        (linear_probe, "probe.costs", (0.0, 1.0)),
        (evaluate, "evaluation.probe.costs", ()),
        (linear_probe, "baselines.classical_costs", (-1.0,)),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_runs(
    module, setting, value, monkeypatch, capsys
):
    monkeypatch.setattr(main, "function_of", lambda setting, task: lambda *_: pytest.fail("it ran"))
    with pytest.raises(SystemExit):
        small.run_here(monkeypatch, f"--config={module.__file__}", f"--config.{setting}={value}")
    assert f"error: {setting} {value} must be " in capsys.readouterr().err


def test_the_smallest_valid_counts_are_accepted():
    known = {key for config in all_configs().values() for key in config_keys(config)}
    for key, least in experiment._LEAST.items():
        assert any(name == key or name.endswith(f".{key}") for name in known), key
        for value in (least, least - 1):
            settings = value
            for name in reversed(key.split(".")):
                settings = {name: settings}
            config = ml_collections.ConfigDict(settings)
            if value == least:
                experiment.check_numbers(config)
                continue
            with pytest.raises(UserError, match=f"{key} {value} must be at least {least}"):
                experiment.check_numbers(config)


def test_a_run_on_own_records_is_named_after_them(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(
        main,
        "function_of",
        lambda setting, task: lambda config, workdir: started.append((config, workdir)),
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "mine").mkdir(parents=True)
    arguments = f"--config={pretrain.__file__}:records", "--config.data.directory=data/mine"
    small.run_here(monkeypatch, *arguments)
    ((config, workdir),) = started
    assert config.name == "mine"
    assert workdir == epath.Path(tmp_path / "runs" / "mine")
    assert config.model == pretrain.get_config().model


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            "pretrain.py",
            r"/records: prepare them \(avcl-data demo --out data/foley\)",
        ),
        ("finetune.py:esc50", r"at .*/data/esc50: prepare them \(docs/data/esc50.md\), or set"),
        ("fingerprint.py", r"data/foley_fingerprint --train=0 --test=400 --null=0 --seed=2\)"),
        ("pretrain.py:records", "data.directory is empty: set --config.data.directory="),
        ("temporal.py --config.encoder=", "error: encoder is empty: set --config.encoder=PATH"),
    ],
)
def test_absent_records_are_one_line_with_the_command_that_makes_them(
    config, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    file, *overrides = config.split()
    with pytest.raises(SystemExit):
        small.run_here(monkeypatch, f"--config={small.ROOT}/avcl_jax/configs/{file}", *overrides)
    assert re.search(message, capsys.readouterr().err)


def test_settings_that_follow_others_follow_their_overrides():
    config = pretrain.get_config("kinetics400")
    config.update_from_flattened_dict({"steps": 1000, "global_batch_size": 128})
    assert (config.bank.warmup_steps, config.bank.size) == (500, 16_384)
    assert config.optimizer.learning_rate == pytest.approx(2.5e-4)
    config.update_from_flattened_dict({"bank.size": 512, "optimizer.learning_rate": 1.0})
    config.global_batch_size = 256
    assert (config.bank.size, config.optimizer.learning_rate) == (512, 1.0)


def test_a_misspelt_key_fails():
    config = pretrain.get_config()
    with pytest.raises(KeyError, match="temperature"):
        config.loss["temprature"] = 0.2
    with pytest.raises(ValueError, match="unknown preset 'kinetics': use one of demo"):
        pretrain.get_config("kinetics")


def test_json_of_a_config_comes_back_and_differences_name_keys():
    config = pretrain.get_config()
    text = experiment.to_json(config)
    assert experiment.to_json(experiment.from_json(text)) == text
    assert experiment.differences(text, text) == []
    with config.unlocked():
        config.loss.temperature = 0.5
        config.views.speeds = (1, 2)
    assert experiment.differences(text, experiment.to_json(config)) == [
        "loss.temperature: 0.1 -> 0.5",
        "views.speeds: [1, 2, 4, 8] -> [1, 2]",
    ]
    np.testing.assert_equal(experiment.render_spec(config).views.speeds, (1, 2))
    assert config.spectrogram.where == "host"
    assert not experiment.render_spec(config).spectrogram_on_device


def test_where_a_run_is_executed_is_no_decisive_difference():
    config = pretrain.get_config()
    text = experiment.to_json(config)
    config.execution.threads, config.name, config.data.directory = 7, "other", "elsewhere"
    assert len(experiment.differences(text, experiment.to_json(config))) == 3
    assert experiment.decisive_differences(text, experiment.to_json(config)) == []
    config.seed = 5
    changed = experiment.decisive_differences(text, experiment.to_json(config))
    assert changed == ["seed: 0 -> 5"]


@functools.cache
def all_configs():
    """Every config of every preset: {"finetune.py:demo": config}."""
    found = {}
    for path in sorted((small.ROOT / "avcl_jax/configs").glob("*.py")):
        module = importlib.import_module(f"avcl_jax.configs.{path.stem}")
        if not hasattr(module, "get_config"):
            continue
        with pytest.raises(ValueError, match="use one of") as caught:
            module.get_config("?")
        presets = str(caught.value).partition("use one of ")[2]
        for preset in presets.split(", "):
            found[f"{path.name}:{preset}"] = module.get_config(preset)
    return found


def config_keys(config):
    return experiment.flatten(config.to_dict())


def test_no_two_configs_have_the_same_default_workdir():
    named = {}
    for file, config in all_configs().items():
        # These two work on a run where it is; runs on one's own records are named after them.
        if not file.startswith(("evaluate.py", "export.py")) and config.name:
            assert config.name not in named, (file, named[config.name])
            named[config.name] = file
    assert {
        "demo": "pretrain.py:demo",
        "demo_finetune": "finetune.py:demo",
    }.items() <= named.items()


def test_settings_of_execution_are_in_one_section():
    """A setting such as `threads` has the same key in all configs."""
    configs = all_configs().values()
    assert {c.execution.compilation_cache for c in configs} == {"~/.cache/avcl_jax/xla"}
    names = {name for config in configs for name in config.execution}
    keys = {key for config in configs for key in config_keys(config)}
    elsewhere = {key for key in keys if key.rpartition(".")[2] in names} - {
        f"execution.{name}" for name in names
    }
    assert not elsewhere


def test_a_config_of_an_older_version_is_refused_in_one_line():
    old = '{"compilation_cache": ""}'
    for read in (experiment.from_json, lambda old: experiment.decisive_differences(old, "{}")):
        with pytest.raises(UserError, match="an older version of avcl_jax wrote this config"):
            read(old)


def test_results_are_those_of_a_run_with_other_threads_and_chunks(tmp_path):
    config = retrieval.get_config()

    def fingerprint(config):
        encoder = EncoderSource("runs/demo", {}, "12ab", 7, None)
        return Context(VIDEO_RETRIEVAL, config, tmp_path, encoder, {"test": "a"}).fingerprint

    before = fingerprint(config)
    config.encoder, config.name = "runs/moved", "other"
    config.execution.update({"threads": 5, "chunk": 3, "part_records": 7})
    assert fingerprint(config) == before
    config.features.clips += 1
    assert fingerprint(config) != before
