"""Charts of the report, as strings that go into the page.

Charts are SVG whose inks are CSS variables of the page, so that one drawing is legible on a light
and on a dark background.
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
from matplotlib.layout_engine import ConstrainedLayoutEngine

from avcl_jax.evaluation.page import as_text

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
_MOST_POINTS = 400  # of a curve
# Colours that no chart uses, replaced by CSS variables after drawing.
_INK, _MUTED, _GRID = "#010203", "#040506", "#070809"
_VARIABLES = {_INK: "var(--ink)", _MUTED: "var(--muted)", _GRID: "var(--line)"}
_RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "text.color": _INK,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _GRID,
    "axes.titlecolor": _INK,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "legend.frameon": False,
    "legend.labelcolor": _INK,
}


def _svg(figure: Figure, name: str, description: str) -> str:
    stream = io.StringIO()
    # The salt keeps element ids apart between charts of one page, and equal between two runs.
    with matplotlib.rc_context({**_RC, "svg.hashsalt": name}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--font)", text)
    used = set(re.findall(r"#([\w.-]+)", text))
    text = re.sub(r' id="([^"]*)"', lambda id: id.group(0) if id.group(1) in used else "", text)
    return re.sub(
        r'<svg [^>]*viewBox="([^"]+)"[^>]*>',
        rf'<svg viewBox="\1" role="img" aria-label="{description}" '
        'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">',
        text,
        count=1,
    )


def _axes(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(1, count)).ravel())


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
    """Returns an SVG of curves over the training step, each labelled at its end.

    Args:
        series: curves by label.
        name: unique name of the chart on the page.
        ylabel: title of the axis.
        percent: label the axis in %.
        from_zero: begin the axis at zero.
        dashed: curves by label, in the colour of the curve of the same label; others are labelled.
        last_step: end of the axis of steps, which then begins at 0.
        marker: step of a vertical line, and its label.
    """
    with matplotlib.rc_context(_RC):
        figure, (axes,) = _axes(1, 4.3, 2.6)
        ends = []
        dashed = dashed or {}
        colours = {label: SERIES_COLOURS[n % len(SERIES_COLOURS)] for n, label in enumerate(series)}
        for label, (steps, values) in ((k, _thinned(*curve)) for k, curve in series.items()):
            smooth = _rolling_mean(values, max(1, len(values) // 40))
            if len(values) > 40:
                axes.plot(steps, values, color=colours[label], alpha=0.22, linewidth=0.8)
            dot = "o" if len(values) == 1 else ""
            axes.plot(steps, smooth, color=colours[label], linewidth=1.7, marker=dot, markersize=3)
            if len(values):
                ends.append((label, float(smooth[-1]), colours[label]))
        for label, (steps, values) in ((k, _thinned(*curve)) for k, curve in dashed.items()):
            smooth = _rolling_mean(values, max(1, len(values) // 40))
            colour = colours.get(label, _MUTED)
            axes.plot(steps, smooth, color=colour, linewidth=1.4, linestyle=(0, (3, 2)))
            if label not in series:
                ends.append((label, float(smooth[-1]), colour))
        axes.margins(x=0.01)
        if last_step is not None:
            axes.set_xlim(0, max(last_step, 1))
        if from_zero:
            axes.set_ylim(0, max(1.05 * axes.dataLim.y1, 1e-6))
        _label_ends(axes, ends)
        if marker is not None:
            step, label = marker
            axes.axvline(step, color=_MUTED, linewidth=1.0, linestyle=(0, (1, 2)))
            axes.annotate(
                label,
                xy=(step, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                va="bottom",
                color=_MUTED,
                annotation_clip=False,
            )
        axes.set_xlabel("training step")
        axes.set_ylabel(ylabel)
        if percent:
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
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


def _label_ends(axes: Axes, ends: list[tuple[str, float, str]]) -> None:
    """Writes each label beside the end of its line, pushed apart where they would overlap."""
    low, high = axes.get_ylim()
    gap = 0.08 * (high - low)
    ends = sorted(ends, key=lambda end: end[1])
    positions: list[float] = []
    for _, value, _ in ends:
        positions.append(max(value, positions[-1] + gap) if positions else value)
    ceiling = high
    for index in reversed(range(len(positions))):
        positions[index] = min(positions[index], ceiling)
        ceiling = positions[index] - gap
    for (label, _, colour), position in zip(ends, positions, strict=True):
        axes.annotate(
            label,
            xy=(1.0, position),
            xycoords=("axes fraction", "data"),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            annotation_clip=False,
        )
    axes.set_ylim(low, high)


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
        groups: group to (series to value in [0, 1]).
        name: unique name of the chart on the page.
        colours: series to its colour, in the order of the legend.
        references: group to a dashed line across it, for instance chance.
        reference_label: what those lines are.
    """
    labels = [label for label in colours if any(label in bars for bars in groups.values())]
    with matplotlib.rc_context(_RC):
        figure, (axes,) = _axes(1, 9.0, 3.2)
        left, ticks = 0.0, []
        for group, bars in groups.items():
            centres = left + np.arange(len(bars))
            for centre, (label, value) in zip(centres, bars.items(), strict=True):
                axes.bar(centre, value, width=0.86, color=colours[label])
                shown = as_text(value, digits=0).removesuffix(" %")
                axes.text(centre, value + 0.015, shown, ha="center", va="bottom")
            if group in references:
                axes.hlines(
                    references[group],
                    centres[0] - 0.55,
                    centres[-1] + 0.55,
                    color=_INK,
                    linewidth=1.1,
                    linestyle=(0, (4, 3)),
                )
            ticks.append((float(centres.mean()), group))
            left = centres[-1] + 2.0
        for label in labels:
            axes.bar(0, 0, color=colours[label], label=label)
        axes.plot([], [], color=_INK, linewidth=1.1, linestyle=(0, (4, 3)), label=reference_label)
        axes.set_xticks([centre for centre, _ in ticks], [group for _, group in ticks])
        axes.tick_params(axis="x", length=0, labelcolor=_INK)
        axes.set_ylim(0, 1.09)
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        figure.legend(loc="outside upper left", ncols=len(labels) + 1, handlelength=1.2)
        return _svg(figure, name, "bars: " + ", ".join(groups))


def forest(
    panels: Mapping[str, Mapping[str, tuple[float, float, float]]],
    *,
    name: str,
    dots: Mapping[str, Mapping[str, Sequence[float]]],
) -> str:
    """Returns an SVG of changes with their intervals: a panel a figure, a row a change.

    Args:
        panels: panel to (row to (change, low, high)) as fractions, drawn in points; infinite
            bounds draw no interval.
        name: unique name of the chart on the page.
        dots: panel to (row to the single changes that it is the mean of).
    """
    rows = list(dict.fromkeys(row for by_row in panels.values() for row in by_row))
    columns = 3
    lines = -(-len(panels) // columns)
    with matplotlib.rc_context({**_RC, "axes.grid.axis": "x"}):
        figure = Figure(
            figsize=(11.5, lines * (0.7 + 0.2 * len(rows))),
            layout=ConstrainedLayoutEngine(h_pad=0.12),
        )
        grid = figure.subplots(lines, columns, sharey=True, squeeze=False).ravel()
        for axes, (title, by_row) in zip(grid, panels.items(), strict=False):
            axes.axvline(0, color=_INK, linewidth=1.0)
            for row, (change, low, high) in by_row.items():
                place = rows.index(row)
                clear = low > 0 or high < 0
                colour = SERIES_COLOURS[0] if clear else SERIES_COLOURS[7]
                if np.isfinite([low, high]).all():
                    axes.hlines(place, 100 * low, 100 * high, color=colour, linewidth=2.2)
                seeds = 100 * np.asarray(dots[title][row])
                axes.scatter(seeds, np.full(len(seeds), place), s=9, color=colour, zorder=3)
                axes.scatter(100 * change, place, s=30, marker="|", color=_INK, zorder=4)
            axes.set_title(title)
            axes.set_yticks(range(len(rows)), rows)
            axes.tick_params(axis="y", length=0, labelcolor=_INK)
            axes.set_ylim(len(rows) - 0.5, -0.5)
            # Wide intervals of few seeds would squeeze everything else into a line.
            shown = [abs(v) for by in (dots[title],) for values in by.values() for v in values]
            reach = 100 * max([*shown, 0.01]) * 1.6
            axes.set_xlim(-reach, reach)
        for axes in grid[len(panels) :]:
            axes.remove()
        return _svg(figure, name, "changes: " + ", ".join(panels))


def scatter(panels: Sequence[Map], *, name: str) -> str:
    """Returns an SVG of 2-D maps side by side, points coloured by class.

    Args:
        panels: maps, from left to right.
        name: unique name of the chart on the page.
    """
    with matplotlib.rc_context({**_RC, "axes.grid": False, "axes.spines.left": False}):
        figure, all_axes = _axes(len(panels), 4.7 * len(panels), 4.4)
        for axes, (title, positions, labels, classes) in zip(all_axes, panels, strict=True):
            for index, label in enumerate(classes):
                chosen = positions[labels == index]
                colour = SERIES_COLOURS[index % len(SERIES_COLOURS)]
                axes.scatter(
                    chosen[:, 0], chosen[:, 1], s=22, color=colour, alpha=0.85, label=label
                )
            unknown = positions[labels < 0]
            if len(unknown):
                axes.scatter(unknown[:, 0], unknown[:, 1], s=22, color=_GRID, label="unknown")
            axes.set_title(title)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines["bottom"].set_visible(False)
            axes.legend(
                loc="upper center",
                bbox_to_anchor=(0.5, 0.0),
                ncols=min(3, len(classes)),
                handletextpad=0.1,
                columnspacing=1.0,
            )
        return _svg(figure, name, "maps: " + ", ".join(panel[0] for panel in panels))
