"""Charts of the report as inline SVG, and the section with those of training.

Black text takes the colour of the page's text by its style sheet; everything else is drawn in
mid-tones, so that one drawing is legible on a light and on a dark background. The `name` of a chart
must be unique on its page.
"""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from avcl_jax.objectives.temporal import TASKS
from avcl_jax.page import as_text, section, text

# Curves: label -> (steps [n], values [n]).
Series = Mapping[str, tuple[np.ndarray, np.ndarray]]
# Title, positions float [n, 2], labels int [n] (-1 unknown) and names of the classes.
Map = tuple[str, np.ndarray, np.ndarray, Sequence[str]]

# Mid-tones that keep a contrast of 3 : 1 to both backgrounds of the page.
SERIES_COLOURS = (
    "#3a86d4",
    "#d97a1a",
    "#2f9e6b",
    "#c2559b",
    "#7e6bd6",
    "#a8703a",
    "#2aa0b4",
    "#87909c",
)
_GREY = "#74808d"  # 4 : 1 to both
_MOST_POINTS = 400  # of a curve: a long run logs thousands of values
_GREY_PARTS = ("axes.edgecolor", "axes.labelcolor", "grid.color", "xtick.color", "ytick.color")
_STYLE: dict[Any, Any] = dict.fromkeys(_GREY_PARTS, _GREY) | {
    "svg.fonttype": "none",
    "font.size": 9.0,
    "text.color": "black",
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.linewidth": 0.5,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}


def _subplots(
    lines: int, columns: int, width: float, height: float, **shared: Any
) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(lines, columns, squeeze=False, **shared).ravel())


def _svg(figure: Figure, name: str, description: str) -> str:
    stream = io.StringIO()
    # The salt keeps ids of markers apart between charts of one page, and equal between two runs.
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    svg = stream.getvalue()
    # Groups have the same names in all charts.
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg[svg.index("<svg") :])
    return f'<figure role="img" aria-label="{text(description)}">{svg}</figure>'


@matplotlib.rc_context(_STYLE)
def line_chart(
    series: Series,
    *,
    name: str,
    ylabel: str,
    percent: bool = False,
    from_zero: bool = False,
    dashed: Series | None = None,
    last_step: float | None = None,
    marker: tuple[float, str] | None = None,
) -> str:
    """Returns an SVG of curves over the training step.

    Args:
        dashed: further curves, in the colour of the curve of the same label.
        last_step: end of the axis of steps, which then begins at 0.
        marker: step of a vertical line, and its label.
    """
    figure, (axes,) = _subplots(1, 1, 4.3, 2.9)
    colours = dict(zip(series, SERIES_COLOURS * 9, strict=False))

    def draw(key: str, steps: np.ndarray, values: np.ndarray, **style: Any) -> None:
        """Draws the mean over the last fortieth of the curve, over fewer at its beginning."""
        groups = np.array_split(np.arange(len(steps)), min(len(steps), _MOST_POINTS))
        steps = steps[[group[-1] for group in groups]]
        values = np.array([values[group].mean() for group in groups])
        width = max(1, len(values) // 40)
        smooth = np.convolve(values, np.ones(width))[: len(values)]
        smooth /= np.minimum(np.arange(1, len(values) + 1), width)
        colour = colours.get(key, _GREY)
        if len(values) > 40 and "linestyle" not in style:
            axes.plot(steps, values, color=colour, alpha=0.22, linewidth=0.8)
        axes.plot(steps, smooth, color=colour, **style)

    for label, curve in series.items():
        dot = "o" if len(curve[0]) == 1 else ""
        draw(label, *curve, label=label, linewidth=1.7, marker=dot, markersize=3)
    for label, curve in (dashed or {}).items():
        named = "" if label in colours else label
        draw(label, *curve, label=named, linewidth=1.4, linestyle=(0, (3, 2)))
    axes.margins(x=0.01)
    if last_step is not None:
        axes.set_xlim(0, max(last_step, 1))
    if from_zero:
        axes.set_ylim(0, max(1.05 * axes.dataLim.y1, 1e-6))
    if marker is not None:
        axes.axvline(marker[0], color=_GREY, linewidth=1.0, linestyle=(0, (1, 2)))
        top = axes.get_xaxis_transform()
        axes.text(marker[0], 1.02, marker[1], ha="center", color=_GREY, transform=top)
    axes.set_xlabel("training step")
    axes.set_ylabel(ylabel)
    if percent:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    if any(axes.get_legend_handles_labels()[1]):
        figure.legend(loc="outside lower left", ncols=3, handlelength=1.2, fontsize=8)
    return _svg(figure, name, f"{ylabel} over training step")


@matplotlib.rc_context(_STYLE)
def bar_chart(
    groups: Mapping[str, Mapping[str, float]],
    *,
    name: str,
    colours: Mapping[str, str],
    chances: Mapping[str, float] | None = None,
) -> str:
    """Returns an SVG of grouped bars of fractions, every bar with its value in %.

    Args:
        groups: group -> series -> value in [0, 1].
        colours: colour of each series, in the order of the legend.
        chances: group -> chance level, a dashed line across it.
    """
    figure, (axes,) = _subplots(1, 1, 9.0, 3.2)
    dash: dict[str, Any] = {"color": _GREY, "linewidth": 1.2, "linestyle": (0, (4, 3))}
    left, ticks = 0.0, []
    for group, bars in groups.items():
        places = left + np.arange(len(bars))
        drawn = axes.bar(places, list(bars.values()), 0.86, color=[colours[key] for key in bars])
        values = [as_text(value, digits=0).removesuffix(" %") for value in bars.values()]
        axes.bar_label(drawn, values, padding=1)
        if chances:
            axes.hlines(chances[group], places[0] - 0.55, places[-1] + 0.55, **dash)
        ticks.append(float(places.mean()))
        left = places[-1] + 2.0
    axes.set_xticks(ticks, list(groups))
    axes.tick_params(axis="x", length=0, labelcolor="black")
    axes.set_ylim(0, 1.09)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    present = {series for bars in groups.values() for series in bars}
    entries: list[Any] = [Patch(color=c, label=s) for s, c in colours.items() if s in present]
    entries += axes.plot([], [], label="chance", **dash) if chances else []
    figure.legend(handles=entries, loc="outside upper left", ncols=5, handlelength=1.2)
    return _svg(figure, name, "bars: " + ", ".join(groups))


@matplotlib.rc_context(_STYLE | {"axes.grid.axis": "x"})
def interval_chart(
    panels: Mapping[str, Mapping[str, tuple[float, float, float, Sequence[float]]]], *, name: str
) -> str:
    """Returns an SVG of changes with their intervals: one panel per metric, one row per change.

    Args:
        panels: panel -> row -> change, its bounds (infinite ones are not drawn), and the changes
            that it is the mean of; fractions, drawn in points.
    """
    rows = list(dict.fromkeys(row for by_row in panels.values() for row in by_row))
    lines = -(-len(panels) // 3)
    figure, grid = _subplots(lines, 3, 11.5, lines * (0.7 + 0.2 * len(rows)), sharey=True)
    for axes, (title, by_row) in zip(grid, panels.items(), strict=False):
        axes.axvline(0, color=_GREY, linewidth=1.0)
        for row, (change, low, high, single) in by_row.items():
            place = rows.index(row)
            colour = SERIES_COLOURS[0 if low > 0 or high < 0 else 7]
            if np.isfinite(high - low):
                axes.hlines(place, 100 * low, 100 * high, color=colour, linewidth=2.2)
            axes.scatter(100 * np.array(single), [place] * len(single), s=9, color=colour)
            axes.scatter(100 * change, place, s=40, marker="|", color=_GREY, zorder=4)
        axes.set_title(title)
        axes.set_yticks(range(len(rows)), rows)
        axes.tick_params(axis="y", length=0, labelcolor="black")
        axes.set_ylim(len(rows) - 0.5, -0.5)
        # Wide intervals of few seeds would squeeze everything else into a line.
        reach = max(1.0, *(100 * np.abs(single).max() for *_, single in by_row.values()))
        axes.set_xlim(-1.6 * reach, 1.6 * reach)
    for axes in grid[len(panels) :]:
        axes.remove()
    return _svg(figure, name, "changes: " + ", ".join(panels))


@matplotlib.rc_context(_STYLE | {"axes.grid": False, "axes.spines.left": False})
def scatter(panels: Sequence[Map], *, name: str) -> str:
    """Returns an SVG of 2-D maps side by side, points coloured by class."""
    figure, grid = _subplots(1, len(panels), 4.7 * len(panels), 4.4)
    for axes, (title, positions, labels, classes) in zip(grid, panels, strict=True):
        shown = dict(zip(classes, SERIES_COLOURS * len(classes), strict=False))
        if (labels < 0).any():
            shown["unknown"] = "#b3bac2"
        for number, (label, colour) in enumerate(shown.items()):
            rows = labels == number if number < len(classes) else labels < 0
            axes.scatter(
                positions[rows, 0], positions[rows, 1], s=22, color=colour, alpha=0.85, label=label
            )
        axes.set_title(title)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines["bottom"].set_visible(False)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=3, handletextpad=0.1)
    return _svg(figure, name, "maps: " + ", ".join(panel[0] for panel in panels))


# Curves in the order of a legend: terms of the loss, temporal tasks, modalities.
_TERMS = {"vv": "video–video", "aa": "audio–audio", "va": "video→audio", "av": "audio→video"}
_CURVES = _TERMS | {name: task.title for name, task in TASKS.items()}
_CURVES |= {"video": "video", "audio": "audio"}

# Charts in their order: pattern of a chart's key -> title, label of the axis, and key of the dashed
# curves in it.
_CHARTS = {
    r"term/loss": ("Contrastive loss", "loss", ""),
    r"task/loss": ("Loss of the temporal tasks", "loss", ""),
    r"term/accuracy": ("Partner ranked first in the batch", "fraction of anchors", ""),
    r"task/accuracy": ("Temporal tasks on training views", "accuracy", ""),
    r"health/embedding_std": ("Spread of the embeddings (0: collapse)", "standard deviation", ""),
    r"term/(negative|positive)_similarity": (
        r"Similarity of \1s (dashed: in the bank)",
        "cosine",
        r"term/bank_\1_similarity",
    ),
    r"term/bank_(negative|positive)_share/(\w+)": (
        r"Bank \1s with the anchor's \2",
        "fraction",
        r"bank/base_rate/\2",
    ),
    r"bank/same_source_similarity/newer": (
        "Rows of the anchor's video (dashed: older half)",
        "cosine",
        "bank/same_source_similarity/older",
    ),
    r"learning_rate": ("Learning rate", "", ""),
}


def training_charts(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, bool, dict[str, Any]]]:
    """Groups metrics into charts, with one curve per term, task or modality.

    Other metrics than those of `_CHARTS` follow in the order of their names, marked as further
    ones, except metrics whose names have no group, such as speed and memory.

    Returns:
        Title, whether it is a further one, and arguments of `line_chart`.
    """
    points: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for name, value in row.items():
            key, curve = _place(name)
            if isinstance(value, int | float) and ("/" in key or key == "learning_rate"):
                points[key][curve].append((float(row["step"]), float(value)))
    series: dict[str, dict[str, Any]] = {}
    for key, curves in points.items():
        # Both directions between video and audio have one loss.
        titles = _CURVES | ({"va": "video–audio"} if key == "term/loss" else {})
        titles[""] = "by chance" if key.startswith("bank/base_rate/") else ""
        series[key] = {title: np.array(curves[c]).T for c, title in titles.items() if c in curves}
    described = {key: _describe(key) for key in sorted(series)}
    dashed = {other for *_, other in described.values()}
    return [
        (
            title,
            rank == len(_CHARTS),
            {
                "series": series[key],
                "ylabel": ylabel,
                "percent": "share" in key or key.endswith(("accuracy", "fill")),
                "from_zero": "similarity" not in key and not key.endswith("loss"),
                "dashed": series.get(other, {}),
            },
        )
        for key, (rank, title, ylabel, other) in sorted(described.items(), key=lambda d: d[1][0])
        if key not in dashed
    ]


def training_section(rows: Sequence[Mapping[str, Any]], bank_start: int | None) -> str:
    """Returns the section of the report with all charts of metrics.jsonl; "" without any metric.

    Args:
        bank_start: step from which training used the feature bank; None if it never did.
    """
    charts = training_charts(rows)
    if not charts:
        return ""
    caption = (
        "Pale: as logged; strong: mean over a fortieth of the run. A spread of the embeddings that "
        "falls while the similarity of negatives rises is a collapse."
    )
    last, marker = max(row["step"] for row in rows), None
    if bank_start is not None and bank_start <= last:
        marker = (bank_start, f"bank from step {bank_start}")
        caption += (
            f" From step {bank_start} on (dotted) anchors had positives and negatives of the "
            "feature bank. Its positives are informative where more of them than the base rate "
            "(dashed) share a label with their anchor."
        )
    html = {False: "", True: ""}
    for number, (title, further, chart) in enumerate(charts):
        svg = line_chart(**chart, name=f"curve{number}", last_step=last, marker=marker)
        html[further] += f"<div><h3>{text(title)}</h3>{svg}</div>"
    first, more = (f'<div class="charts">{part}</div>' if part else "" for part in html.values())
    details = f"<details><summary>More metrics</summary>{more}</details>" if more else ""
    return section("Training", caption, first, details)


def _place(name: str) -> tuple[str, str]:
    """Returns the key of the chart that a metric belongs to, and its curve there."""
    group, _, rest = name.partition("/")
    if group in _TERMS:
        return f"term/{rest}", group
    if group in TASKS:
        return f"task/{rest}", group
    of_modality = re.fullmatch(r"(\w+)/(video|audio)_(.+)", name)
    return (f"{of_modality[1]}/{of_modality[3]}", of_modality[2]) if of_modality else (name, "")


def _describe(key: str) -> tuple[int, str, str, str]:
    """Returns the rank of a chart, its title, its axis, and the key of its dashed curves."""
    for rank, (pattern, texts) in enumerate(_CHARTS.items()):
        if match := re.fullmatch(pattern, key):
            title, ylabel, dashed = (match.expand(part) for part in texts)
            return rank, title, ylabel, dashed
    words = key.partition("/")[2].replace("/", ": ").replace("_", " ")
    return len(_CHARTS), words[:1].upper() + words[1:], "", ""
