"""The demo data are made by one command where a config asks for them and they are absent."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from absl.testing import flagsaver

from avcl_jax import demo_data, main
from avcl_jax.data.records import RecordDataset
from configs import fingerprint


def test_absent_data_are_made_with_the_options_and_present_ones_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []

    def run(command: list[str], *, check: bool) -> subprocess.CompletedProcess:
        commands.append(command)
        return subprocess.CompletedProcess(command, 3 if len(commands) > 1 else 0)

    monkeypatch.setattr(demo_data.subprocess, "run", run)
    records = tmp_path / "clips" / "records"
    demo_data.make_demo(records, ("--seed=1",))
    expected = [sys.executable, "-m", "data_prep", "demo", "--out", str(tmp_path / "clips")]
    assert commands == [[*expected, "--seed=1"]]
    with pytest.raises(ValueError, match="failed with exit code 3"):
        demo_data.make_demo(records)
    records.mkdir(parents=True)
    (records / "dataset_info.json").write_text('{"name": "foley"}')
    demo_data.make_demo(records)
    (records / "dataset_info.json").write_text('{"name": "clips"}')
    with pytest.raises(
        ValueError, match=r"records of 'clips', not the demo's.*pretrain.py:records"
    ):
        demo_data.check_demo(records)
    with pytest.raises(ValueError, match="mine does not exist"):
        demo_data.make_demo(tmp_path / "mine")
    assert len(commands) == 2


@pytest.mark.parametrize("name", ["cross_modal", "fingerprint", "linear_probe"])
def test_nothing_is_rendered_for_an_encoder_that_is_absent(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[object] = []
    monkeypatch.setattr(main, "make_demo", lambda *arguments: made.append(arguments))
    # ml_collections loads every config into one module, which a process has once.
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    command = [
        "main",
        f"--config={Path(fingerprint.__file__).with_name(name)}.py",
        f"--config.encoder={tmp_path / 'mistyped'}",
        f"--config.data.directory={tmp_path / 'foley' / 'records'}",
        "--config.compilation_cache=",
        f"--workdir={tmp_path / 'out'}",
    ]
    monkeypatch.setattr(sys, "argv", command)  # where ml_collections looks for overrides
    with flagsaver.flagsaver():
        main.parse_flags(command)
        with pytest.raises(SystemExit):
            main.main(["main"])
    assert f"there is no directory {tmp_path / 'mistyped'}" in capsys.readouterr().err
    assert not made


def test_clips_of_the_fingerprint_preset_are_none_of_the_demos(tmp_path: Path) -> None:
    data = fingerprint.get_config("foley").data
    few = [o.replace("--test=400", "--test=2") for o in data.demo_options]
    demo_data.make_demo(tmp_path / "other" / "records", (*few, "--workers=1"))
    demo_data.make_demo(
        tmp_path / "demo" / "records", ("--train=2", "--test=2", "--null=0", "--workers=1")
    )
    made = RecordDataset(tmp_path / "other" / "records", data.split)
    for split in ("train", "test"):
        demo = RecordDataset(tmp_path / "demo" / "records", split)
        assert demo.fingerprint != made.fingerprint
        sounds = {made[n].waveform.tobytes() for n in range(2)}
        assert not sounds & {demo[n].waveform.tobytes() for n in range(2)}
