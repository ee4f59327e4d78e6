"""What protocols write, and the table that compares two of them."""

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

PROTOCOL = Protocol("toy", 1, "A toy & its <figures>", ["Add them up."])
ENCODER = EncoderSource("runs/toy", {}, "12ab", 7, None)
METRICS = {
    "accuracy": Metric("mean", ["correct"], "accuracy", chance=0.5, headline=True),
    "median_rank": Metric("median", ["rank"], "median rank", unit="number"),
}


def _config(**settings: object) -> ml_collections.ConfigDict:
    base = {"task": "toy", "seed": 0, "encoder": "there", "bootstrap": {"resamples": 200}}
    return ml_collections.ConfigDict(base | settings)


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


def _run(
    workdir: Path, data: str = "toy-test-1", protocol: Protocol = PROTOCOL, **settings: object
) -> Context:
    return Context(protocol, _config(**settings), epath.Path(workdir), ENCODER, {"test": data})


def _write(workdir: Path, correct: np.ndarray, order: np.ndarray | None = None) -> dict:
    return _run(workdir).write(_measured(correct, order))


def test_results_hold_all_that_identifies_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    correct = np.tile([1.0, 1.0, 1.0, 0.0], 10)
    results = _write(tmp_path, correct)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    figure = results["metrics"]["accuracy"]
    assert figure["value"] == 0.75
    assert figure["low"] < 0.75 < figure["high"]
    assert results["metrics"]["median_rank"]["value"] == 20.5
    assert (results["units"], results["sources"]) == (40, 20)
    assert results["config"]["bootstrap"] == {"resamples": 200}
    assert results["versions"]["jax"]
    outcomes = read_outcomes(tmp_path / "outcomes.npz")
    np.testing.assert_array_equal(outcomes.values["correct"], correct)
    assert outcomes.units[3] == "video 3"
    report = (tmp_path / "report.html").read_text()
    for shown in ("A toy &amp; its &lt;figures&gt;", "75.0 %", "what the toy adds", "Add them"):
        assert shown in report
    assert report.count('class="tile"') == 1  # of the one headline
    assert "75.0 % (95 %:" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.tmp"))


def test_finished_results_are_found_unless_something_that_counts_changed(tmp_path: Path) -> None:
    results = _write(tmp_path, np.ones(4))
    assert _run(tmp_path).finished() == results
    assert _run(tmp_path, encoder="elsewhere", execution={"threads": 3}).finished() == results
    for changed in (
        _run(tmp_path, seed=1),
        _run(tmp_path, "toy-test-2"),
        _run(tmp_path, protocol=dataclasses.replace(PROTOCOL, version=2)),
    ):
        with pytest.raises(UserError, match="another encoder, other data, other settings or"):
            changed.finished()
    (tmp_path / "report.html").unlink()
    assert _run(tmp_path).finished() is None


def test_results_of_another_encoder_are_not_these(tmp_path: Path) -> None:
    def run(digest: str, path: str) -> Context:
        source = EncoderSource(path, {}, digest, step=1, trained_on=None)
        return dataclasses.replace(_run(tmp_path), encoder=source)

    results = run("a1", "runs/a").write(_measured(np.ones(4)))
    assert results["encoder"] == {"path": "runs/a", "fingerprint": "a1", "step": 1, "heads": None}
    assert run("a1", "runs/moved").finished() == results
    with pytest.raises(UserError, match="with another encoder"):
        run("b2", "runs/a").finished()


def _run_protocol(workdir: Path, protocol: Protocol = PROTOCOL, **given: Any) -> Any:
    given = {"compute": lambda _: 7, "measure": lambda *_: _measured(np.ones(4))} | given
    data = {"test": "toy-test-1"}
    config = _config()
    return run_protocol(protocol, config, workdir, (), encoder=ENCODER, data=data, **given)


def test_a_protocol_is_computed_then_measured_and_not_again(tmp_path: Path) -> None:
    directories, measured = [], []

    def compute(context: Context) -> int:
        directories.append(context.directory)
        return 7

    def measure(context: Context, computed: int) -> Measured:
        measured.append(computed)
        return _measured(np.ones(4))

    for name, protocol in (("a", PROTOCOL), ("b", dataclasses.replace(PROTOCOL, version=2))):
        functions = {"compute": compute, "measure": measure}
        results = _run_protocol(tmp_path / name, protocol, **functions)
        assert _run_protocol(tmp_path / name, protocol, **functions) == results
    assert measured == [7, 7]
    # Another version does not take the parts of this one.
    assert [path.name for path in directories] == ["toy-1", "toy-2"]


def test_other_processes_compute_but_neither_measure_nor_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jax.process_index", lambda: 1)
    assert _run_protocol(tmp_path / "w", measure=None) == {}
    assert not (tmp_path / "w").exists()


def test_a_signal_while_computing_leaves_no_results(tmp_path: Path) -> None:
    assert _run_protocol(tmp_path, compute=lambda _: None, measure=None) is None
    assert not (tmp_path / "results.json").exists()


def test_the_evaluation_of_a_run_replaces_an_older_one(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    run = dataclasses.replace(_run(tmp_path), in_training=True)
    assert run.finished() is None
    results = run.write(dataclasses.replace(_measured(np.ones(4)), view={"step": 7}))
    assert results["step"] == 7
    assert run.finished() == results
    assert dataclasses.replace(_run(tmp_path, seed=1), in_training=True).finished() is None


def test_a_directory_with_something_else_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="is the workdir of a training run"):
        _run(tmp_path / "run").finished()
    _write(tmp_path / "toy", np.ones(4))
    other = Protocol("other", 1, "Other", [])
    for in_training in (False, True):
        run = dataclasses.replace(_run(tmp_path / "toy", protocol=other), in_training=in_training)
        with pytest.raises(UserError, match="holds the results of toy: choose another"):
            run.finished()
    (tmp_path / "toy" / "results.json").write_text('{"probe": {}}')
    with pytest.raises(UserError, match="holds the results of another program"):
        _run(tmp_path / "toy").finished()
    assert _run(tmp_path / "none").finished() is None
    # Protocols that train leave checkpoints of their own beside their results.
    results = _write(tmp_path / "tuned", np.ones(4))
    (tmp_path / "tuned" / "checkpoints").mkdir()
    assert _run(tmp_path / "tuned").finished() == results


def test_a_metric_is_about_the_units_that_are_chosen_for_it(tmp_path: Path) -> None:
    chosen = np.arange(40) < 10
    correct = np.where(chosen, np.arange(40) % 2, 0).astype(float)
    measured = Measured(
        Outcomes(
            [str(n) for n in range(40)],
            [str(n) for n in range(40)],
            {"correct": correct, "known": chosen},
        ),
        {"accuracy": Metric("mean", ["correct"], "accuracy", chosen="known")},
    )
    figure = _run(tmp_path).write(measured)["metrics"]["accuracy"]
    assert figure["value"] == 0.5
    nothing = dataclasses.replace(
        measured.outcomes, values={"correct": correct, "known": chosen & False}
    )
    measured = dataclasses.replace(measured, outcomes=nothing)
    assert _run(tmp_path).write(measured)["metrics"]["accuracy"]["value"] is None
    alone = bootstrap("mean", [correct[:10]], np.arange(10), resamples=200, seed=0)
    assert (figure["low"], figure["high"]) == (alone.low, alone.high)


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


def test_a_figure_that_is_not_defined_is_null_and_shown_as_a_dash(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {name: np.zeros(4) for name in ("random", "pretrained", "supervised")}
    measured = Measured(
        Outcomes(list("abcd"), list("abcd"), values),
        {"gap": Metric("gap_closed", list(values), "gap closed")},
    )
    figure = _run(tmp_path).write(measured)["metrics"]["gap"]
    assert figure["value"] is figure["low"] is figure["high"] is None
    assert "– (95 %: – to –)" in capsys.readouterr().out


def test_a_chance_level_that_is_not_defined_is_null(tmp_path: Path) -> None:
    measured = _measured(np.ones(4))
    metrics = {"map": dataclasses.replace(METRICS["accuracy"], chance=float("nan"))}
    _run(tmp_path).write(dataclasses.replace(measured, metrics=metrics))
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["metrics"]["map"]["chance"] is None


def test_details_that_json_cannot_write_leave_nothing_behind(tmp_path: Path) -> None:
    measured = dataclasses.replace(_measured(np.ones(4)), details={"spread": float("nan")})
    with pytest.raises(ValueError, match="not JSON compliant"):
        _run(tmp_path).write(measured)
    assert not list(tmp_path.iterdir())


def test_a_metric_of_what_nothing_measured_is_refused_and_nothing_written(tmp_path: Path) -> None:
    measured = Measured(
        Outcomes(["a"], ["s"], {}), {"accuracy": Metric("mean", ["correct"], "accuracy")}
    )
    with pytest.raises(UserError, match=r"accuracy needs the outcomes correct, which"):
        _run(tmp_path).write(measured)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("outcomes", "message"),
    [
        (Outcomes(["a", "a"], ["s", "s"], {}), "2 units have only 1 names"),
        (Outcomes(["a", "b"], ["s"], {}), r"there are 2 units, but {'sources': 1}"),
        (
            Outcomes(["a", "b"], ["s", "t"], {"correct": np.ones(3)}),
            r"there are 2 units, but {'correct': 3}",
        ),
    ],
)
def test_outcomes_that_contradict_themselves_are_refused(
    tmp_path: Path, outcomes: Outcomes, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        _run(tmp_path).write(Measured(outcomes, {}))
    assert not list(tmp_path.iterdir())


def test_runs_are_compared_unit_by_unit_whatever_their_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
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
    # As many as the first run used, unless told otherwise.
    asked = []
    monkeypatch.setattr(
        compare, "compare_runs", lambda *_, resamples, **__: asked.append(resamples) or {}
    )
    assert compare.main(paths) == 0
    assert asked == [200]
    assert "200 resamples" in capsys.readouterr().out
    monkeypatch.undo()
    difference = 100 * (better.mean() - worse.mean())
    assert f"{difference:+.1f}" in table
    runs = [compare.read_run(path) for path in paths]
    pairs = compare.compare_runs(runs, resamples=300, seed=0, other_data=False)["accuracy"]
    assert pairs[0].p_value == pytest.approx(2 / 301)  # the smallest possible, times two runs
    assert pairs[0].difference.low > 0
    assert pairs[1].difference == (0, 0, 0)
    assert pairs[1].p_value == 1


def test_runs_that_cannot_be_compared_say_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(tmp_path / "a", np.ones(4))
    _write(tmp_path / "b", np.ones(6))
    (tmp_path / "empty").mkdir()
    for runs, message in [
        (["a"], "compare needs at least two runs"),
        (["a", "b"], "2 are in one only, for instance video 4"),
        (["a", "empty"], "does not contain results.json: run a protocol with it"),
    ]:
        assert compare.main([str(tmp_path / run) for run in runs]) == 1
        assert message in capsys.readouterr().err
    (tmp_path / "b" / "outcomes.npz").write_bytes(b"damaged")
    assert compare.main([str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert "outcomes.npz is damaged" in capsys.readouterr().err
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "results.json").write_text(json.dumps(results | {"protocol_version": 2}))
    (tmp_path / "c" / "outcomes.npz").write_bytes((tmp_path / "a" / "outcomes.npz").read_bytes())
    assert compare.main([str(tmp_path / "a"), str(tmp_path / "c")]) == 1
    assert "toy version 1 and toy version 2 have no metric in common" in capsys.readouterr().err
    del results["metrics"]["accuracy"]["chosen"]
    (tmp_path / "c" / "results.json").write_text(json.dumps(results))
    assert compare.main([str(tmp_path / "a"), str(tmp_path / "c")]) == 1
    assert "was written by another version of avcl-jax" in capsys.readouterr().err
    del results["metrics"]
    (tmp_path / "c" / "results.json").write_text(json.dumps(results))
    assert compare.main([str(tmp_path / "a"), str(tmp_path / "c")]) == 1
    assert "is not the result of a protocol" in capsys.readouterr().err


@pytest.mark.parametrize(
    "other", [{"all": "toy-all-4-bb"}, {"all": "toy-all-4-aa", "gallery": "x"}]
)
def test_runs_over_other_data_are_compared_only_when_told_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], other: dict[str, str]
) -> None:
    for name, data in (("a", {"all": "toy-all-4-aa"}), ("b", other)):
        _write(tmp_path / name, np.ones(4))
        path = tmp_path / name / "results.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"data": data}))
    runs = [str(tmp_path / name) for name in "ab"]
    role = "gallery" if len(other) > 1 else "all"
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
