"""Charts of the report as inline SVG.

Black text takes the colour of the page's text by its style sheet; everything else is drawn in
mid-tones, so that one drawing is legible on a light and on a dark background.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from avcl_jax.evaluation.page import as_text, text

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
_MOST_POINTS = 400  # of a curve
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9.0,
    "text.color": "black",
    "axes.edgecolor": _GREY,
    "axes.labelcolor": _GREY,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.linewidth": 0.5,
    "grid.color": _GREY,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "xtick.color": _GREY,
    "ytick.color": _GREY,
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
        series: curves by label.
        name: unique name of the chart on the page.
        ylabel: title of the axis.
        percent: label the axis in %.
        from_zero: begin the axis at zero.
        dashed: curves by label, in the colour of the curve of the same label.
        last_step: end of the axis of steps, which then begins at 0.
        marker: step of a vertical line, and its label.
    """
    figure, (axes,) = _subplots(1, 1, 4.3, 2.9)
    colours = dict(zip(series, SERIES_COLOURS * 9, strict=False))
    for label, curve in series.items():
        steps, values = _thinned(*curve)
        smooth = _rolling_mean(values, max(1, len(values) // 40))
        if len(values) > 40:
            axes.plot(steps, values, color=colours[label], alpha=0.22, linewidth=0.8)
        dot = "o" if len(values) == 1 else ""
        style: dict[str, Any] = {"color": colours[label], "marker": dot, "markersize": 3}
        axes.plot(steps, smooth, label=label, linewidth=1.7, **style)
    for label, curve in (dashed or {}).items():
        steps, values = _thinned(*curve)
        smooth = _rolling_mean(values, max(1, len(values) // 40))
        style = {"color": colours.get(label, _GREY), "linestyle": (0, (3, 2))}
        axes.plot(steps, smooth, label="" if label in colours else label, linewidth=1.4, **style)
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


def _thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns means over at most `_MOST_POINTS` groups: a long run logs thousands of values."""
    starts = np.arange(0, len(values), max(1, -(-len(values) // _MOST_POINTS)))
    ends = np.append(starts[1:], len(values)) - 1
    counts = np.diff(np.append(starts, len(values)))
    return steps[ends], np.add.reduceat(values, starts) / counts if len(values) else values


def _rolling_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Returns the mean over the last `width` values, over fewer at the beginning."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    stop = np.arange(1, len(values) + 1)
    start = np.maximum(stop - width, 0)
    return (total[stop] - total[start]) / (stop - start)


@matplotlib.rc_context(_STYLE)
def bar_chart(
    groups: Mapping[str, Mapping[str, float]],
    *,
    name: str,
    colours: Mapping[str, str],
    references: Mapping[str, float],
    reference_label: str,
) -> str:
    """Returns an SVG of grouped bars of fractions, every bar with its value in %.

    Args:
        groups: group -> series -> value in [0, 1].
        name: unique name of the chart on the page.
        colours: colour of each series, in the order of the legend.
        references: group -> dashed line across it, for instance chance.
        reference_label: text of those lines in the legend.
    """
    figure, (axes,) = _subplots(1, 1, 9.0, 3.2)
    dash: dict[str, Any] = {"color": _GREY, "linewidth": 1.2, "linestyle": (0, (4, 3))}
    left, ticks = 0.0, []
    for group, bars in groups.items():
        places = left + np.arange(len(bars))
        drawn = axes.bar(places, list(bars.values()), 0.86, color=[colours[key] for key in bars])
        values = [as_text(value, digits=0).removesuffix(" %") for value in bars.values()]
        axes.bar_label(drawn, values, padding=1)
        if group in references:
            axes.hlines(references[group], places[0] - 0.55, places[-1] + 0.55, **dash)
        ticks.append(float(places.mean()))
        left = places[-1] + 2.0
    axes.set_xticks(ticks, list(groups))
    axes.tick_params(axis="x", length=0, labelcolor="black")
    axes.set_ylim(0, 1.09)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    present = {series for bars in groups.values() for series in bars}
    entries: list[Any] = [Patch(color=c, label=s) for s, c in colours.items() if s in present]
    entries += axes.plot([], [], label=reference_label, **dash) if references else []
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
        name: unique name of the chart on the page.
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
        reach = max(
            1.0, *(100 * abs(value) for _, _, _, single in by_row.values() for value in single)
        )
        axes.set_xlim(-1.6 * reach, 1.6 * reach)
    for axes in grid[len(panels) :]:
        axes.remove()
    return _svg(figure, name, "changes: " + ", ".join(panels))


@matplotlib.rc_context(_STYLE | {"axes.grid": False, "axes.spines.left": False})
def scatter(panels: Sequence[Map], *, name: str) -> str:
    """Returns an SVG of 2-D maps side by side, points coloured by class.

    Args:
        panels: maps, from left to right.
        name: unique name of the chart on the page.
    """
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
