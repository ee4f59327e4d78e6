"""Files that protocols write, and the table that compares two of them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
import pytest
from etils import epath

from avcl_jax.errors import UserError
from avcl_jax.evaluation import compare
from avcl_jax.evaluation.driver import Context, run_protocol
from avcl_jax.evaluation.protocol import (
    Measured,
    Metric,
    Outcomes,
    Protocol,
    merge,
    point_values,
    read_outcomes,
)
from avcl_jax.evaluation.statistics import bootstrap
from avcl_jax.export.runs import EncoderSource
from avcl_jax.processes import Stopped

PROTOCOL = Protocol("toy", 1, "A toy & its <metrics>", ["Add them up."])
ENCODER = EncoderSource("runs/toy", {}, "12ab", 7, None)
METRICS = {
    "accuracy": Metric("mean", ["correct"], "accuracy", chance=0.5, headline=True),
    "median_rank": Metric("median", ["rank"], "median rank", unit="number"),
}


def _measured(correct: np.ndarray, order: np.ndarray | None = None) -> Measured:
    order = np.arange(len(correct)) if order is None else order
    return Measured(
        outcomes=Outcomes(
            [f"video {n}" for n in order],
            [f"source {n // 2}" for n in order],
            {"correct": correct[order], "rank": 1 + order},
        ),
        metrics=METRICS,
        details={"epochs": 3},
        sections=["<section>what the toy adds</section>"],
    )


def _run(workdir: Path, settings: dict[str, Any] | None = None, **fields: Any) -> Context:
    """A run with settings of its config and fields of its `Context`."""
    config = {"task": "toy", "seed": 0, "encoder": "there", "bootstrap": {"resamples": 200}}
    given = {"protocol": PROTOCOL, "encoder": ENCODER, "data": {"test": "toy-test-1"}} | fields
    config = ml_collections.ConfigDict(config | (settings or {}))
    return Context(config=config, workdir=epath.Path(workdir), **given)


def _write(workdir: Path, correct: np.ndarray, order: np.ndarray | None = None) -> dict:
    return _run(workdir).write(_measured(correct, order))


def test_results_hold_all_that_identifies_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    correct = np.tile([1.0, 1.0, 1.0, 0.0], 10)
    results = _write(tmp_path, correct)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    accuracy = results["metrics"]["accuracy"]
    assert accuracy["value"] == 0.75
    assert accuracy["low"] < 0.75 < accuracy["high"]
    assert results["metrics"]["median_rank"]["value"] == 20.5
    assert (results["units"], results["sources"]) == (40, 20)
    assert results["config"]["bootstrap"] == {"resamples": 200}
    assert results["versions"]["jax"]
    outcomes = read_outcomes(tmp_path / "outcomes.npz")
    np.testing.assert_array_equal(outcomes.values["correct"], correct)
    assert outcomes.units[3] == "video 3"
    report = (tmp_path / "report.html").read_text()
    for text in ("A toy &amp; its &lt;metrics&gt;", "75.0 %", "what the toy adds", "Add them"):
        assert text in report
    assert report.count('class="tile"') == 1  # of the one headline
    assert "75.0 % (95 %:" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.tmp"))


def test_finished_results_are_found_unless_something_that_counts_changed(tmp_path: Path) -> None:
    results = _write(tmp_path, np.ones(4))
    assert results["encoder"] == {
        "path": "runs/toy",
        "fingerprint": "12ab",
        "step": 7,
        "heads": None,
    }
    moved = dataclasses.replace(ENCODER, path="runs/moved")
    assert _run(tmp_path, {"execution": {"threads": 3}}, encoder=moved).finished() == results
    other = dataclasses.replace(ENCODER, fingerprint="b2")
    version = dataclasses.replace(PROTOCOL, version=2)
    for changed in (
        _run(tmp_path, {"seed": 1}),
        _run(tmp_path, data={"test": "toy-test-2"}),
        _run(tmp_path, protocol=version),
        _run(tmp_path, encoder=other),
        _run(tmp_path, heads="c3"),
    ):
        with pytest.raises(UserError, match="another encoder, other data, other settings or"):
            changed.finished()
    (tmp_path / "report.html").unlink()
    assert _run(tmp_path).finished() is None


def _run_protocol(workdir: Path, protocol: Protocol = PROTOCOL, **given: Any) -> Any:
    given = {"compute": lambda _: 7, "measure": lambda *_: _measured(np.ones(4))} | given
    config = _run(workdir).config
    data = {"test": "toy-test-1"}
    return run_protocol(protocol, config, workdir, (), encoder=ENCODER, data=data, **given)


def test_a_protocol_is_computed_then_measured_and_not_again(tmp_path: Path) -> None:
    directories, computed = [], []

    def measure(context: Context, value: int) -> Measured:
        directories.append(context.directory.name)
        computed.append(value)
        return _measured(np.ones(4))

    for name, protocol in (("a", PROTOCOL), ("b", dataclasses.replace(PROTOCOL, version=2))):
        results = _run_protocol(tmp_path / name, protocol, measure=measure)
        assert _run_protocol(tmp_path / name, protocol, measure=measure) == results
    assert computed == [7, 7]
    # Another version does not take the parts of this one.
    assert directories == ["toy-1", "toy-2"]


def test_other_processes_and_runs_that_a_signal_stopped_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(_: object) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        _run_protocol(tmp_path / "w", compute=stop, measure=None)
    monkeypatch.setattr("jax.process_index", lambda: 1)
    assert _run_protocol(tmp_path / "w", measure=None) == {}
    assert not (tmp_path / "w").exists()


def test_the_evaluation_of_a_run_replaces_an_older_one(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    run = _run(tmp_path, in_training=True)
    assert run.finished() is None
    results = run.write(dataclasses.replace(_measured(np.ones(4)), view={"step": 7}))
    assert results["step"] == 7
    assert run.finished() == results
    assert _run(tmp_path, {"seed": 1}, in_training=True).finished() is None


def test_a_directory_with_something_else_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="is the workdir of a training run"):
        _run(tmp_path / "run").finished()
    _write(tmp_path / "toy", np.ones(4))
    other = Protocol("other", 1, "Other", [])
    for in_training in (False, True):
        with pytest.raises(UserError, match="holds the results of toy: choose another"):
            _run(tmp_path / "toy", protocol=other, in_training=in_training).finished()
    (tmp_path / "toy" / "results.json").write_text('{"probe": {}}')
    with pytest.raises(UserError, match="holds the results of another program"):
        _run(tmp_path / "toy").finished()
    assert _run(tmp_path / "none").finished() is None
    assert not (tmp_path / "none").exists()
    # Protocols that train leave checkpoints of their own beside their results.
    results = _write(tmp_path / "tuned", np.ones(4))
    (tmp_path / "tuned" / "checkpoints").mkdir()
    assert _run(tmp_path / "tuned").finished() == results


def test_a_metric_is_about_the_units_that_are_chosen_for_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen, names = np.arange(40) < 10, [str(n) for n in range(40)]
    correct = np.where(chosen, np.arange(40) % 2, 0).astype(float)
    values = {"correct": correct, "known": chosen, "unknown": chosen & False}
    metrics = {
        mask: Metric("mean", ["correct"], mask, chance=float("nan"), chosen=mask)
        for mask in ("known", "unknown")
    }
    written = _run(tmp_path).write(Measured(Outcomes(names, names, values), metrics))["metrics"]
    alone = bootstrap("mean", [correct[:10]], np.arange(10), resamples=200, seed=0)
    keys = ("value", "low", "high")
    assert tuple(written["known"][key] for key in keys) == tuple(alone)
    # What is not defined is null, and a dash.
    assert [written["unknown"][key] for key in (*keys, "chance")] == [None] * 4
    assert "– (95 %: – to –)" in capsys.readouterr().out


def test_results_of_some_units_are_merged_and_stay_results_of_those() -> None:
    units, sources = list("abcde"), ["s", "s", "t", "t", "u"]
    correct = {"random": [0.0, 1.0, 0.0], "pretrained": [1.0, 1.0, 0.0], "supervised": [1.0] * 3}
    probe = Measured(
        Outcomes(list("dab"), ["t", "s", "s"], {k: np.array(v) for k, v in correct.items()}),
        {
            "pretrained": Metric("mean", ("pretrained",), "pretrained", chance=0.25),
            "gap": Metric("gap_closed", tuple(correct), "gap closed"),
        },
    )
    tasks = Measured(
        Outcomes(units, sources, {"right": np.array([1, 0, 2, 0, 1])}),
        {"right": Metric("median", ("right",), "right")},
    )
    none = Measured(Outcomes([], [], {}), {})
    outcomes, metrics = merge(units, sources, {"known": probe, "has_both": none, "": tasks})
    np.testing.assert_array_equal(outcomes.values["known"], [1, 1, 0, 1, 0])
    np.testing.assert_array_equal(outcomes.values["pretrained"], [1, 0, 0, 1, 0])
    assert (metrics["gap"].chosen, metrics["right"].chosen) == ("known", None)
    assert outcomes.values.keys() == {*correct, "known", "right"}
    values = point_values(Measured(outcomes, metrics))
    assert values == pytest.approx({"pretrained": 2 / 3, "gap": 0.5, "right": 1.0})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"details": {"spread": float("nan")}}, "not JSON compliant"),
        (
            {"outcomes": Outcomes(["a"], ["s"], {"rank": np.ones(1)})},
            r"accuracy needs the outcomes correct, which nothing",
        ),
        ({"outcomes": Outcomes(["a", "a"], ["s", "s"], {})}, "2 units have only 1 names"),
        ({"outcomes": Outcomes(["a", "b"], ["s"], {})}, r"are 2 units, but {'sources': 1}"),
        (
            {"outcomes": Outcomes(["a", "b"], ["s", "t"], {"correct": np.ones(3)})},
            r"are 2 units, but {'correct': 3}",
        ),
    ],
)
def test_results_that_contradict_themselves_leave_nothing_behind(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    if "units" in message:
        changes |= {"metrics": {}}
    with pytest.raises(ValueError, match=message):
        _run(tmp_path).write(dataclasses.replace(_measured(np.ones(4)), **changes))
    assert not list(tmp_path.iterdir())


def test_runs_are_compared_unit_by_unit_whatever_their_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    worse = (rng.random(200) < 0.5).astype(float)
    better = np.maximum(worse, rng.random(200) < 0.2)
    _write(tmp_path / "a", worse)
    _write(tmp_path / "b", better, rng.permutation(200))
    _write(tmp_path / "c", worse, rng.permutation(200))
    capsys.readouterr()
    paths = [str(tmp_path / name) for name in "abc"]
    assert compare.main([*paths, "--resamples", "300"]) == 0
    table = capsys.readouterr().out
    assert "300 resamples" in table
    assert f"{100 * (better.mean() - worse.mean()):+.1f}" in table
    assert compare.main(paths[:1] * 2) == 0
    assert "200 resamples" in capsys.readouterr().out  # as many as the first run used
    runs = [compare.read_run(path) for path in paths]
    pairs = compare.compare_runs(runs, resamples=300, seed=0, other_data=False)["accuracy"]
    assert pairs[0].p_value == pytest.approx(2 / 301)  # the smallest possible, times two runs
    assert pairs[0].difference.low > 0
    assert pairs[1].difference == (0, 0, 0)
    assert pairs[1].p_value == 1


def test_runs_that_cannot_be_compared_say_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = _write(tmp_path / "a", np.ones(4))
    _write(tmp_path / "b", np.ones(6))
    _write(tmp_path / "damaged", np.ones(4))
    (tmp_path / "damaged" / "outcomes.npz").write_bytes(b"damaged")
    (tmp_path / "empty").mkdir()
    unchosen = {k: v for k, v in results["metrics"]["accuracy"].items() if k != "chosen"}
    for name, changes in {
        "newer": {"protocol_version": 2},
        "older": {"metrics": {"accuracy": unchosen}},
    }.items():
        _write(tmp_path / name, np.ones(4))
        (tmp_path / name / "results.json").write_text(json.dumps(results | changes))
    _write(tmp_path / "sweep", np.ones(4))
    sweep = {key: value for key, value in results.items() if key != "metrics"}
    (tmp_path / "sweep" / "results.json").write_text(json.dumps(sweep))
    for runs, message in {
        ("a",): "compare needs at least two runs",
        ("a", "b"): "2 are in one only, for instance video 4",
        ("a", "empty"): "does not contain results.json: run a protocol with it",
        ("a", "damaged"): "outcomes.npz is damaged",
        ("a", "newer"): "toy version 1 and toy version 2 have no metric in common",
        ("a", "older"): "was written by another version of avcl-jax",
        ("a", "sweep"): "is not the result of a protocol",
    }.items():
        assert compare.main([str(tmp_path / run) for run in runs]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "other", [{"all": "toy-all-4-bb"}, {"all": "toy-all-4-aa", "gallery": "x"}]
)
def test_runs_over_other_data_are_compared_only_when_told_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], other: dict[str, str]
) -> None:
    for name, data in (("a", {"all": "toy-all-4-aa"}), ("b", other)):
        _run(tmp_path / name, data=data).write(_measured(np.ones(4)))
    runs = [str(tmp_path / name) for name in "ab"]
    role = "gallery" if len(other) > 1 else "all"
    capsys.readouterr()
    assert compare.main(runs) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{role} is {'none' if len(other) > 1 else 'toy-all-4-aa'} in one and " in line
    assert "--other-data" in line
    assert compare.main([*runs, "--other-data"]) == 0
    said = capsys.readouterr().out
    assert f"{runs[1]} is over other data than {runs[0]}: {role}" in said
    assert "difference to the first" in said
    assert compare.main([runs[0], runs[0]]) == 0
    assert "other data" not in capsys.readouterr().out
