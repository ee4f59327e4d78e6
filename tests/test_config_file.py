"""Mistakes in a config or its overrides are one line with the nearest names."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from absl import flags

from avcl_jax import config_file, main
from avcl_jax.errors import UserError
from tests.training import small

PRETRAIN = "--config=configs/pretrain.py"


@pytest.fixture(autouse=True)
def a_new_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(small.ROOT)
    # ml_collections loads every config into one module, which a process has once.
    monkeypatch.delitem(sys.modules, "config_config", raising=False)


def check(*arguments: str) -> None:
    assert main._CONFIG.name == "config"
    config_file.check_arguments(["main", *arguments], flags.FLAGS["config"].parser.parse)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [PRETRAIN, "--config.encoder=runs/demo"],
            "--config.encoder: configs/pretrain.py has no such setting; there are bank, crop",
        ),
        ([PRETRAIN, "--config.loss.temprature=1"], "did you mean loss.temperature"),
        (
            [PRETRAIN, "--config.temperature=1"],
            "did you mean bank.temperature or loss.temperature?",
        ),
        ([PRETRAIN, "--config.loss.weights.zz=1"], "there are aa, "),
        ([PRETRAIN, "--config.optimizer.lr=1"], "beta2, clip_norm, ema_decay, learning_rate, "),
        (
            [PRETRAIN, "--config.steps.more=1"],
            "--config.steps.more: configs/pretrain.py has no such",
        ),
        (["--config", "configs/pretrain.py", "--noconfig.crop.flop"], "did you mean crop.flip?"),
        ([f"{PRETRAIN}:kinetics4000"], "unknown preset 'kinetics4000': use one of demo, abstract"),
        (
            ["--config=configs/pretrian.py"],
            "no file configs/pretrian.py; did you mean configs/pretrain",
        ),
        (["--config=configs/export.py:demo"], "unknown preset 'demo': use one of run, torchvision"),
        (
            [PRETRAIN, "--config=configs/export.py"],
            "--config is given 2 times, configs/pretrain.py",
        ),
        (
            [PRETRAIN, "--config.model.video=s3d"],
            "model.video is a section of inception, lowering, name, resnet, subtract_time_mean, "
            "transformer: override one of these, as --config.model.video.inception=VALUE",
        ),
        ([PRETRAIN, "--config.crop.flip=maybe"], "--config.crop.flip=maybe must be true or false"),
        (["--config=README.md"], "--config=README.md: a config is a Python file, see those in "),
        (["--config=configs/common.py"], "has no get_config, so it is not a config"),
    ],
)
def test_a_mistake_is_one_line_with_the_nearest_names(arguments, message) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        check(*arguments)
    assert "\n" not in str(caught.value)


def test_a_config_of_the_package_is_found_from_any_folder_unless_one_is_there(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check(f"{PRETRAIN}:kinetics400")
    check("--config", "configs/pretrain.py")
    ours = f"{small.ROOT}/avcl_jax/configs/pretrain.py:demo"
    assert config_file.with_files(["main", f"{PRETRAIN}:demo"]) == ["main", f"--config={ours}"]
    separate = ["main", "--config", "configs/pretrain.py:demo", "--workdir=configs/pretrain.py"]
    assert config_file.with_files(separate) == ["main", "--config", ours, separate[-1]]
    # The same text as another flag's value is not a config.
    twice = [*separate[:3], "--workdir", "configs/pretrain.py:demo"]
    assert config_file.with_files(twice) == ["main", "--config", ours, *twice[-2:]]
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "pretrain.py").write_text("")
    assert config_file.with_files(["main", f"{PRETRAIN}:demo"]) == ["main", f"{PRETRAIN}:demo"]


def test_what_is_right_passes() -> None:
    check()
    check(PRETRAIN, "--config.steps=3", "--config.loss.weights.vv=0", "--noconfig.crop.flip")
    check(PRETRAIN, "--config.model.video.resnet.depths=(0, 1, 2)")
    check(PRETRAIN, "--config.crop.flip=False", "--config.crop.quarter_turns")
    check(PRETRAIN, "--config.model.video={'name': 's3d'}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--config.encoder=runs/demo"],
            "error: --config.encoder: configs/pretrain.py has no",
        ),
        (
            ["--config.model.video.resnet.widths=(1, 2)", "--config.model.video.name=s3d"],
            "model.video.resnet.widths is a setting of model.video.name=resnet, and "
            "model.video.name=s3d ignores it",
        ),
        (["--config.model.audio.convnet.pool=max"], "model.audio.name=resnet ignores it"),
        (
            ["--config.model.video.lowering=direct", "--config.model.video.name=vivit_s"],
            "model.video.lowering: model.video.name=vivit_s has no such setting",
        ),
    ],
)
def test_an_override_that_does_not_exist_or_that_the_encoder_ignores_is_refused(
    arguments, message, monkeypatch, capsys
) -> None:
    with pytest.raises(SystemExit):
        small.run_here(monkeypatch, PRETRAIN, *arguments)
    line = capsys.readouterr().err.strip()
    assert message in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("value", "error"),
    [("undefined", NameError), ("().undefined", AttributeError), ("1 + 'undefined'", TypeError)],
)
@pytest.mark.parametrize("preset", ["", ":demo"])
def test_a_bug_in_a_config_file_keeps_its_own_error(tmp_path, value, error, preset) -> None:
    file = tmp_path / "mine.py"
    file.write_text(f"def get_config(preset=''):\n    return {value}\n")
    with pytest.raises(error, match="undefined"):
        check(f"--config={file}{preset}")


def test_a_config_is_printed_and_nothing_else_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [PRETRAIN, "--config.views.speeds=(1, 3)", "--config.data.directory=somewhere"]
    small.run_here(monkeypatch, *arguments, "--print_config", f"--workdir={tmp_path / 'run'}")
    printed = capsys.readouterr().out.splitlines()
    assert "views.speeds = (1, 3)" in printed
    assert "data.directory = 'somewhere'" in printed
    assert "loss.weights.vv = 0.5" in printed
    assert not (tmp_path / "run").exists()
