"""Charts of the report: drawn at their values, and those of training with the step of the bank."""

from __future__ import annotations

import re

import numpy as np
import pytest

from avcl_jax.configs import pretrain
from avcl_jax.evaluation.charts import (
    bar_chart,
    interval_chart,
    line_chart,
    scatter,
    training_charts,
    training_section,
)
from avcl_jax.page import STYLE
from avcl_jax.training.program import bank_start


def _rows(steps: int = 8) -> list[dict]:
    """Lines of a run whose bank is used from step 40, one every 10 steps."""
    rows = []
    for number in range(1, steps + 1):
        row = {"step": 10 * number, "split": "train", "learning_rate": 0.001 * number}
        for term, loss in (("vv", 4.0), ("va", 3.0), ("aa", 2.0)):
            row[f"{term}/loss"] = loss - 0.1 * number
        row |= {"speed_video/loss": 1.4, "speed_video/accuracy": 0.3, "order_va/accuracy": 0.4}
        row |= {"av/accuracy": 0.2, "va/accuracy": 0.1, "steps_per_second": 5.0, "loss": 9.0}
        row |= {"health/audio_embedding_std": 0.9, "health/video_mean_norm": 0.25}
        row |= {f"{term}/negative_similarity": 0.05 for term in ("va", "av")}
        if number > 4:
            row |= {"va/bank_negative_similarity": 0.5, "va/bank_age_rows": 128.0}
            row |= {"va/bank_positive_share/speed": 0.4, "bank/base_rate/speed": 0.25}
            row |= {"va/bank_negative_share/motion": 0.3}
            row |= {f"bank/audio_same_source_similarity/{age}": 0.8 for age in ("newer", "older")}
        rows.append(row)
    rows[2]["aa/loss"] = "nan"
    return rows


def test_each_metric_has_one_chart_and_absent_ones_none():
    charts = {title: (further, chart) for title, further, chart in training_charts(_rows())}
    assert {title: list(chart["series"]) for title, (_, chart) in charts.items()} == {
        "Contrastive loss": ["video–video", "audio–audio", "video–audio"],
        "Loss of the temporal tasks": ["speed, video"],
        "Partner ranked first in the batch": ["video→audio", "audio→video"],
        "Temporal tasks on training views": ["speed, video", "order, video-audio"],
        "Spread of the embeddings (0: collapse)": ["audio"],
        "Similarity of negatives (dashed: in the bank)": ["video→audio", "audio→video"],
        "Bank positives with the anchor's speed": ["video→audio"],
        "Bank negatives with the anchor's motion": ["video→audio"],
        "Rows of the anchor's video (dashed: older half)": ["audio"],
        "Learning rate": [""],
        "Mean norm": ["video"],
        "Bank age rows": ["video→audio"],
    }
    steps, values = charts["Contrastive loss"][1]["series"]["audio–audio"]
    np.testing.assert_array_equal(steps, [10, 20, 40, 50, 60, 70, 80])
    np.testing.assert_allclose(values, [1.9, 1.8, 1.6, 1.5, 1.4, 1.3, 1.2])
    assert [t for t, (further, _) in charts.items() if further] == ["Mean norm", "Bank age rows"]
    assert [t.split()[0] for t, (_, chart) in charts.items() if not chart["from_zero"]] == [
        *("Contrastive", "Loss", "Similarity", "Rows")
    ]
    base = charts["Bank positives with the anchor's speed"][1]["dashed"]["by chance"]
    np.testing.assert_array_equal(base, [[50, 60, 70, 80], [0.25] * 4])
    negatives = charts["Similarity of negatives (dashed: in the bank)"][1]
    np.testing.assert_array_equal(negatives["dashed"]["video→audio"], [[50, 60, 70, 80], [0.5] * 4])
    assert training_charts([]) == []
    assert training_section([], None) == ""


def _drawn(svg: str) -> dict[str, np.ndarray]:
    """Reads curves back from an SVG by its ticks: stroke and dashes -> (step, value)."""
    ticks: dict[str, list[tuple[float, float]]] = {"middle": [], "end": []}
    for x, y, anchor, label in re.findall(
        r'<use [^>]*x="([\d.]+)" y="([\d.]+)"[^<]*/>\s*</g>\s*</g>\s*<g>\s*'
        r"<text [^>]*text-anchor: (middle|end)[^>]*>([\d.]+)",
        svg,
    ):
        ticks[anchor].append((float(x if anchor == "middle" else y), float(label)))
    (a, b), (c, d) = (np.polyfit(*np.array(ticks[anchor]).T, 1) for anchor in ("middle", "end"))
    found = {}
    for path, style in re.findall(r'<path d="([^"]*)" clip-path[^>]*style="([^"]*)"', svg):
        stroke = re.search(r"stroke: ([^;\"]+)", style)[1]
        points = np.array(re.findall(r"[ML] ([\d.]+) ([\d.]+)", path), float)
        if "stroke-opacity: 0.3" not in style:  # a line of the grid
            dashes = re.search(r"stroke-dasharray: ([\d.,]+)", style)
            kind = "" if dashes is None else " dotted" if dashes[1] == "1,2" else " dashed"
            key = stroke + kind
            found[key] = np.column_stack([a * points[:, 0] + b, c * points[:, 1] + d])
    return found


def test_curves_are_drawn_at_their_values_with_the_step_of_the_bank():
    steps = np.arange(10.0, 90, 10)
    losses, others = 2 + np.cos(steps), 1 + np.sin(steps)
    svg = line_chart(
        {"a": (steps, losses), "b": (steps, others)},
        name="chart",
        ylabel="loss",
        dashed={"b": (steps[5:], others[5:] / 2), "by chance": (steps, steps / 50)},
        last_step=100,
        marker=(40, "bank from step 40"),
    )
    drawn = _drawn(svg)
    np.testing.assert_allclose(drawn.pop("#74808d dotted")[:, 0], 40, atol=0.01)
    assert len(drawn) == 4
    for stroke, expected in (
        ("#3a86d4", (steps, losses)),
        ("#d97a1a", (steps, others)),
        ("#d97a1a dashed", (steps[5:], others[5:] / 2)),
        ("#74808d dashed", (steps, steps / 50)),
    ):
        np.testing.assert_allclose(drawn[stroke], np.transpose(expected), atol=0.01)
    for label, count in (("bank from step 40", 1), ("a", 1), ("b", 1), ("by chance", 1)):
        assert svg.count(f">{label}</text>") == count


def test_a_long_run_is_drawn_with_few_points_and_a_single_line_with_a_dot():
    steps = np.arange(1.0, 5001)
    values = np.random.default_rng(0).uniform(1, 2, 5000)
    svg = line_chart({"a": (steps, values)}, name="long", ylabel="loss", from_zero=True)
    assert svg.count("\nL ") < 1000
    ticks = [float(label) for label in re.findall(r"text-anchor: end[^>]*>([\d.]+)<", svg)]
    assert min(ticks) == 0 < max(ticks) < 2
    (curve,) = _drawn(svg).values()
    np.testing.assert_allclose(curve[-1], [5000, values[-125:].mean()], rtol=0.02)
    one = line_chart({"a": (steps[:1], values[:1])}, name="one", ylabel="loss")
    assert len(re.findall("<use [^>]*fill: #3a86d4", one)) == 2  # and in the legend


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        ({}, 900),  # of a demo, full after 4 steps
        ({"bank.warmup_steps": 0}, 4),
        ({"bank.warmup_steps": 0, "global_batch_size": 4, "bank.size": 512}, 64),
        ({"bank.size": 0}, None),
        ({f"loss.weights.{term}": 0.0 for term in ("vv", "va", "aa")}, None),
        ({"modalities": "audio", "loss.weights.aa": 0.0}, None),
    ],
)
def test_the_bank_is_used_after_warm_up_and_when_full(changes, start):
    config = pretrain.get_config("demo")
    config.update_from_flattened_dict({"bank.warmup_steps": 900, "bank.size": 256} | changes)
    assert bank_start(config) == start


@pytest.mark.parametrize(("start", "marked"), [(80, True), (90, False), (None, False)])
def test_the_section_marks_the_bank_in_every_chart_of_a_run_that_reaches_it(start, marked):
    html = training_section(_rows(), start)
    assert (
        html.count(f">bank from step {start}</text>") == marked * html.count("<svg") == marked * 12
    )
    assert ("of the feature bank" in html) == marked
    before, _, after = html.partition("<summary>More metrics</summary>")
    assert ("Bank age rows" in before, "Bank age rows" in after) == (False, True)


def test_charts_fit_a_phone():
    assert not re.search(r"minmax\((3[4-9]\d|[4-9]\d\d)px", STYLE)


def test_bars_maps_and_intervals_are_drawn_with_all_that_they_are_given():
    bars = bar_chart(
        {"motion": {"ours": 0.5, "theirs": 0.25}, "material": {"ours": 0.125}},
        name="bars",
        colours={"ours": "#112233", "theirs": "#445566", "none": "#778899"},
        chances={"motion": 0.2, "material": 0.5},
    )
    assert (bars.count("fill: #112233"), bars.count("fill: #445566")) == (3, 2)
    for label in ("50", "25", "12", "motion", "material", "ours", "theirs", "chance"):
        assert f">{label}</text>" in bars
    assert "none</text>" not in bars
    labels = np.array([0, 1, 1, -1])
    points = scatter([("Map", np.eye(4, 2), labels, ("a", "b"))], name="map")
    for label in ("Map", "a", "b", "unknown"):
        assert f">{label}</text>" in points
    assert points.count("<use") == 4 + 3
    rows = {"no x": (0.1, 0.05, 0.15, [0.08, 0.12]), "no y": (0.0, -np.inf, np.inf, [0.0])}
    titles = [f"R@{k}" for k in (1, 5, 10, 20)]
    intervals = interval_chart(dict.fromkeys(titles, rows), name="effects")
    for label in (*rows, *titles):
        assert f">{label}</text>" in intervals


def test_charts_are_the_same_from_run_to_run():
    series = {"a": (np.arange(100), np.sin(np.arange(100) / 9))}
    first = line_chart(series, name="chart", ylabel="loss")
    assert first == line_chart(series, name="chart", ylabel="loss")
    assert first != line_chart(series, name="other", ylabel="loss")
