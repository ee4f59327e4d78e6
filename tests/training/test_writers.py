"""Writers of metrics that users add."""

from __future__ import annotations

import contextlib
import json
import sys
import types

import pytest
from etils import epath

from avcl_jax.errors import UserError
from avcl_jax.processes import Stopped
from avcl_jax.training import loop
from avcl_jax.training.writers import Writers, find_writers
from tests import documented
from tests.training.small import small_config


class Run(contextlib.AbstractContextManager):
    """A stand-in for a run of wandb."""

    def __init__(self, **settings):
        self.settings, self.rows, self.ended = settings, {}, []

    def log(self, values, step):
        if values["loss"] > 90:
            raise ConnectionError("no\nnetwork")
        self.rows[step] = values

    def __exit__(self, kind, error, trace):
        self.ended.append(kind)


@pytest.fixture
def runs(monkeypatch) -> list[Run]:
    """Runs that the documented example opens."""
    opened: list[Run] = []
    wandb = types.ModuleType("wandb")
    wandb.init = lambda **settings: opened.append(Run(**settings)) or opened[-1]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    module = types.ModuleType("my_writers")
    page = "docs/reliability.md"
    (example,) = (b for b in documented.blocks() if (b.page, b.language) == (page, "python"))
    exec(example.text, module.__dict__)
    monkeypatch.setitem(sys.modules, "my_writers", module)
    return opened


WANDB = "my_writers:weights_and_biases"


def test_a_writer_has_what_was_logged_and_learns_how_the_run_ended(tmp_path, runs):
    config, found = small_config(tmp_path), find_writers([WANDB])
    with Writers(found, config, epath.Path(tmp_path)) as writers:
        writers.write(1, {"loss": 2.0})
    for end in (KeyboardInterrupt, Stopped):
        with pytest.raises(end), Writers(found, config, epath.Path(tmp_path)):
            raise end
    first, *_ = runs
    assert first.rows == {1: {"loss": 2.0}}
    assert first.settings["config"]["bank"]["size"] == 32
    assert [run.ended for run in runs] == [[None], [KeyboardInterrupt], [None]]


def test_a_writer_that_fails_is_closed_and_left_out(tmp_path, runs, capsys):
    config = small_config(tmp_path)
    with Writers(find_writers([WANDB]), config, epath.Path(tmp_path)) as writers:
        for step, loss in enumerate((1.0, 100.0, 2.0)):
            writers.write(step, {"loss": loss})
    (run,) = runs
    assert list(run.rows) == [0]
    assert run.ended == [ConnectionError]
    line = f"writer {WANDB} failed and gets no more metrics: ConnectionError: no network\n"
    assert capsys.readouterr().out == line


def test_a_writer_may_fail_at_either_end(tmp_path, runs, monkeypatch, capsys):
    def fail(*_: object) -> None:
        raise OSError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["wandb"], "init", lambda **settings: fail())
        with Writers(find_writers([WANDB]), small_config(tmp_path), epath.Path(tmp_path)) as none:
            none.write(1, {"loss": 2.0})
    monkeypatch.setattr(Run, "__exit__", fail)
    with Writers(find_writers([WANDB]), small_config(tmp_path), epath.Path(tmp_path)) as writers:
        writers.write(1, {"loss": 2.0})
    line = f"writer {WANDB} failed and gets no more metrics: OSError: gone\n"
    assert capsys.readouterr().out == 2 * line


@pytest.mark.parametrize("name", ["my_writers:w", "my_writers", "no_such:writer", ":writer"])
def test_a_writer_that_is_not_there_is_refused(name, runs):
    with pytest.raises(UserError, match=f"^execution.writers '{name}': .*; give MODULE:FUNCTION"):
        find_writers([name])


@pytest.mark.slow
def test_a_run_hands_its_metrics_to_writers(records, tmp_path, runs):
    overrides = {"steps": 2, "execution.writers": (WANDB,)}
    loop.pretrain(small_config(records, **overrides), tmp_path)
    rows = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    expected = {row.pop("step"): {k: v for k, v in row.items() if k != "split"} for row in rows}
    assert len(runs[0].rows) == 2
    assert runs[0].rows == expected
