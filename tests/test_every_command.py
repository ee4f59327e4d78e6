"""Every task's command, as a user runs it on the demo's data: each in a process of its own.

What the figures mean is tested elsewhere; here, that each command of `configs/` comes to its end,
leaves its results, and does not measure again what is there.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from avcl_jax.experiment import function_of
from avcl_jax.page import text
from tests.training import small

FEW_VIDEOS = ("--train=24", "--test=12", "--null=4", "--workers=2")
RUN = "runs/demo"
COPY = "runs/copy"  # of the run: both presets of evaluate.py write into the run's workdir
HELD = "already holds these results"


@dataclasses.dataclass(frozen=True)
class Command:
    """A command of the demo, made small."""

    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    again: str = HELD  # printed when it is run a second time
    workdir: str = ""  # below the test's directory; a run's own, or one for each command
    of_a_run: bool = False  # its config is that of a pretraining run
    encoder: bool = True  # it evaluates the run


def of_a_run(again: str, workdir: str = RUN, **overrides: Any) -> Command:
    few = {name.replace("__", "."): value for name, value in overrides.items()}
    few |= {"steps": 4, "execution.checkpoint_every": 2}
    return Command(few, again, workdir, of_a_run=True, encoder=False)


# One clip per video, one epoch, one cost: enough to go through all of the code.
_ONE_EPOCH = {"global_batch_size": 8, "epochs": 1.0, "optimizer.warmup_epochs": 0.0}
_ONE_EPOCH |= {"test.clips": 2}
_EVALUATED = {
    "evaluation.clips": 2,
    "evaluation.probe.folds": 2,
    "evaluation.probe.costs": (0.1,),
    "evaluation.pairs_per_video": 4,
}
_SHORT_FITS = {
    f"evaluation.{network}.{name}": value
    for network in ("supervised.video", "supervised.audio", "null")
    for name, value in (("fit.epochs", 2), ("fit.decay_epochs", 1), ("fit.batch_size", 8))
} | dict.fromkeys(
    (
        *("evaluation.supervised.video.views", "evaluation.supervised.audio.views"),
        *("evaluation.null.train_views", "evaluation.null.test_views"),
    ),
    1,
)
# By file under configs/, with its preset.
COMMANDS = {
    "pretrain.py": of_a_run("is already trained to step 4"),
    "export.py": Command(workdir=RUN, again="", encoder=False),  # takes seconds, writes the same
    "evaluate.py": Command({"evaluation.clips": 2}, workdir=COPY, encoder=False),
    "evaluate.py:demo": Command(_EVALUATED | _SHORT_FITS, workdir=RUN, encoder=False),
    "retrieval.py": Command({"features.clips": 1}),
    "cross_modal.py": Command({"features.clips": 2}),
    "temporal.py": Command({"evaluation.pairs_per_video": 4}),
    "finetune.py": Command(_ONE_EPOCH),
    "finetune.py:demo_audio": Command(_ONE_EPOCH),
    "linear_probe.py": Command({"features.clips": 1}),
    "linear_probe.py:demo_audio": Command({"features.clips": 1}),
    "fingerprint.py": Command(
        {"data.references": 5, "data.distractors": 3, "data.others": 2, "data.background": 2}
        | {"queries.weak": 1, "queries.medium": 2, "queries.strong": 1}
        | {"families": ("flip", "audio_noise")}
    ),
    "ablation.py": of_a_run(
        "no_va, seed 0 is measured",
        "",
        **_EVALUATED,
        ablation__seeds=(0,),
        ablation__variants=(("full", ()), ("no_va", (("loss.weights.va", 0.0),))),
    ),
}
PROTOCOLS = [name for name, command in COMMANDS.items() if command.encoder]
# They translate weights that PyTorch code trained: see tests/test_import_weights.py.
NOT_OF_THE_DEMO = {"import_weights.py"}


@dataclasses.dataclass
class Demo:
    """Commands in a directory of their own, each run when it is first asked for."""

    directory: Path
    said: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def records(self) -> Path:
        return self.directory / "foley" / "records"

    def workdir(self, name: str) -> Path:
        return self.directory / (COMMANDS[name].workdir or f"runs/{name.replace(':', '_')}")

    def run(self, name: str, *, encoder: Path | None = None, workdir: Path | None = None) -> str:
        """Runs a command of `COMMANDS` and returns what it printed."""
        command = COMMANDS[name]
        if name != "pretrain.py":
            self.ran("pretrain.py")
        overrides = dict(command.overrides)
        if command.of_a_run:
            overrides = small.OVERRIDES | overrides
        if command.encoder:
            overrides["encoder"] = encoder or self.directory / RUN
        if command.encoder or command.of_a_run:
            overrides["data.directory"] = self.records
        if command.workdir == COPY and name not in self.said:
            shutil.copytree(self.ran("pretrain.py"), self.directory / COPY)
        overrides["execution.compilation_cache"] = small.compilation_cache()
        return small.run(
            [
                f"--config=configs/{name}",
                f"--workdir={workdir or self.workdir(name)}",
                *(f"--config.{setting}={value}" for setting, value in overrides.items()),
            ]
        )

    def ran(self, name: str) -> Path:
        """Returns the workdir of a command, which has been run."""
        if name not in self.said:
            self.said[name] = self.run(name)
        return self.workdir(name)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Demo:
    made = Demo(tmp_path_factory.mktemp("demo"))
    out = made.directory / "foley"
    small.run(["demo", f"--out={out}", *FEW_VIDEOS], module="avcl_jax.data_prep")
    return made


def files(directory: Path) -> dict[Path, int]:
    """When each of the results under a directory was written."""
    names = ("results.json", "report.html", "outcomes.npz")
    return {path: path.stat().st_mtime_ns for name in names for path in directory.rglob(name)}


def config_of(name: str) -> Any:
    file, _, preset = name.partition(":")
    module = importlib.import_module(f"avcl_jax.configs.{file.removesuffix('.py')}")
    return module.get_config(*([preset] if preset else []))


def test_every_config_and_every_task_has_a_command_here():
    configs = {
        path.name
        for path in (small.ROOT / "avcl_jax/configs").glob("*.py")
        if hasattr(importlib.import_module(f"avcl_jax.configs.{path.stem}"), "get_config")
    }
    assert configs == {name.partition(":")[0] for name in COMMANDS} | NOT_OF_THE_DEMO
    for name in (*COMMANDS, *NOT_OF_THE_DEMO):
        assert callable(function_of("task", config_of(name).task))


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_comes_to_its_end_and_is_not_repeated(demo, name):
    workdir = demo.ran(name)
    before = files(workdir)
    said = demo.run(name)
    assert COMMANDS[name].again in said
    runs = [path for path in before if name != "ablation.py" or "seed0" in path.parts]
    assert [before[path] for path in runs] == [files(workdir)[path] for path in runs]


@pytest.mark.slow
@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_leaves_figures_with_intervals_and_a_report(demo, name):
    workdir = demo.ran(name)
    results = json.loads((workdir / "results.json").read_text())
    assert results["protocol"]
    assert results["protocol_version"] >= 1
    assert results["encoder"]["step"] == 4
    assert results["versions"]["jax"]
    assert results["config"]["task"] == config_of(name).task
    report = (workdir / "report.html").read_text()
    assert results["metrics"]
    for figure in results["metrics"].values():
        assert figure["low"] <= figure["value"] <= figure["high"]
        assert text(figure["what"]) in report


@pytest.mark.slow
def test_the_demos_evaluation_leaves_its_figures_and_report(demo):
    workdir = demo.ran("evaluate.py:demo")
    results = json.loads((workdir / "results.json").read_text())
    assert results["step"] == 4
    assert results["protocol"] == "pretraining_run"
    # The share of a gap that is closed has no value where there is no gap, as after four steps.
    bounded = [figure for figure in results["metrics"].values() if figure["value"] is not None]
    assert bounded
    assert all(figure["low"] <= figure["value"] <= figure["high"] for figure in bounded)
    assert {"probe", "retrieval", "temporal", "null_control", "supervised"} <= results.keys()
    assert "<h1>" in (workdir / "report.html").read_text()


@pytest.mark.slow
def test_the_sweep_leaves_a_table_of_its_variants(demo):
    workdir = demo.ran("ablation.py")
    results = json.loads((workdir / "results.json").read_text())
    assert results["protocol"] == "ablation"
    for effects in results["effects"].values():
        assert set(effects) == {"full", "no_va"}
        assert effects["full"]["difference"] == 0
    assert "no va" in (workdir / "report.html").read_text()
    assert "no va" in (workdir / "ablation.md").read_text()


@pytest.mark.slow
def test_exported_encoders_get_the_figures_of_their_run(demo):
    exported, of_run = demo.ran("export.py") / "export", demo.ran("retrieval.py")
    workdir = demo.directory / "runs" / "exported"
    demo.run("retrieval.py", encoder=exported, workdir=workdir)
    found = [json.loads((path / "results.json").read_text()) for path in (of_run, workdir)]
    assert found[1]["encoder"]["path"] == str(exported)
    assert found[0]["metrics"] == found[1]["metrics"]


@pytest.mark.slow
def test_two_runs_of_a_protocol_are_compared(demo):
    exported = demo.directory / "runs" / "exported_probe"
    demo.run("linear_probe.py", encoder=demo.ran("export.py") / "export", workdir=exported)
    runs = [str(demo.ran("linear_probe.py")), str(exported)]
    said = small.run(runs, module="avcl_jax.evaluation.compare")
    results = json.loads((Path(runs[0]) / "results.json").read_text())
    for run in runs:
        assert run in said
    for figure in results["metrics"].values():
        assert figure["what"] in said


@pytest.mark.slow
def test_an_index_of_the_demo_is_made_asked_changed_and_verified(demo):
    index = f"--index={demo.directory / 'films.index'}"
    media = demo.directory / "foley" / "media"
    first, second, added = (str(media / "test" / f"test_{n:05d}.mp4") for n in range(3))

    def fingerprint(*arguments: str) -> str:
        return small.run([*arguments, index], module="avcl_jax.fingerprint")

    encoder = f"--encoder={demo.ran('pretrain.py')}"
    assert "contains 2 sources" in fingerprint("index", first, second, encoder)
    assert "added 1, replaced 0, already there 2" in fingerprint("add", first, second, added)
    answer = json.loads(fingerprint("query", added, "--json"))
    assert answer["matches"][0]["source"] == added
    assert answer["matches"][0]["offset_seconds"] == pytest.approx(0.0, abs=0.2)
    assert "removed 1" in fingerprint("remove", added)
    answer = json.loads(fingerprint("query", added, "--json"))
    assert added not in [match["source"] for match in answer["matches"]]
    assert fingerprint("verify").startswith("intact: ")
