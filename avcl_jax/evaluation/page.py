"""The shell of the report: script and small pieces of HTML. Nothing external."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from avcl_jax.evaluation.protocol import Measured, Protocol
from avcl_jax.style import STYLE

# A click plays the clip in place of its stills; another click brings the stills back.
SCRIPT = """
document.addEventListener("click", (event) => {
  const stage = event.target.closest(".stage[data-clip]");
  if (!stage) return;
  const playing = stage.querySelector("video");
  if (playing) { playing.remove(); for (const child of stage.children) child.hidden = false; return;
  } for (const child of stage.children) child.hidden = true;
  const video = document.createElement("video");
  video.src = stage.dataset.clip; video.autoplay = true; video.loop = true;
  video.playsInline = true; stage.append(video);
});
"""


def text(value: object) -> str:
    """Returns `value` escaped for HTML."""
    return html.escape(str(value), quote=True)


def as_text(
    value: float | None, unit: str = "share", *, digits: int = 1, signed: bool = False
) -> str:
    """Returns a metric as people read it: a share in %, a dash where it is not defined.

    Args:
        value: None or NaN if it is not defined.
        unit: "share" or "number".
        digits: decimals of a share; only 1 itself is written as 100 %.
        signed: a difference: with its sign, and shares in points.
    """
    if value is None or math.isnan(value):
        return "–"
    if unit != "share":
        return f"{value:{'+' if signed else ''}.3g}"
    if signed:
        return f"{round(100 * value, digits) + 0.0:+.{digits}f}"  # no minus before 0.0
    written = f"{100 * value:.{digits}f}"
    if value < 1 and float(written) == 100:
        return as_text(value, digits=digits + 1)
    return f"{written} %"


def page(*, title: str, body: str) -> str:
    """Returns a whole HTML document that needs nothing from outside."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head>"
        f"<body><main>{body}</main><script>{SCRIPT}</script></body></html>\n"
    )


def section(title: str, caption: str, *content: str) -> str:
    """Returns a titled section; `caption` is one or a few sentences of HTML."""
    return (
        f'<section><h2>{text(title)}</h2><p class="caption">{caption}</p>'
        f"{''.join(content)}</section>"
    )


def tiles(entries: Sequence[tuple[str, str]]) -> str:
    """Returns a row of large values, each with its description."""
    cells = "".join(
        f'<div class="tile"><b>{text(value)}</b><span>{text(what)}</span></div>'
        for value, what in entries
    )
    return f'<div class="tiles">{cells}</div>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table of escaped cells."""
    head = "".join(f"<th>{text(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def matrix(title: str, confusion: np.ndarray, classes: Sequence[str]) -> str:
    """Returns a confusion matrix; a cell is the fraction of its true class (row) in %."""
    head = "<tr><th></th>" + "".join(f"<th>{text(name)}</th>" for name in classes) + "</tr>"
    rows = []
    for name, counts in zip(classes, confusion.tolist(), strict=True):
        total = max(sum(counts), 1)
        cells = "".join(
            f'<td style="background: rgba(var(--heat), {0.05 + 0.75 * count / total:.3f})" '
            f'title="{count} of {total}">{100 * count / total:.0f}</td>'
            for count in counts
        )
        rows.append(f"<tr><th>{text(name)}</th>{cells}</tr>")
    return (
        f'<div class="scroll"><h3>{text(title)}</h3>'
        f'<table class="matrix">{head}{"".join(rows)}</table></div>'
    )


def matrices(confusions: Mapping[str, tuple[np.ndarray, Sequence[str]]]) -> str:
    """Returns confusion matrices side by side: title → (int [classes, classes], class names)."""
    shown = (matrix(title, counts, names) for title, (counts, names) in confusions.items())
    return f'<div class="matrices">{"".join(shown)}</div>'


def definitions(entries: Mapping[str, object]) -> str:
    """Returns a two-column table of names and values."""
    rows = "".join(
        f'<tr><td>{text(name)}</td><td style="text-align: left">{text(value)}</td></tr>'
        for name, value in entries.items()
    )
    return f'<div class="scroll"><table>{rows}</table></div>'


def metric_texts(metric: Mapping[str, Any]) -> list[str]:
    """Returns value, bounds and chance of a metric of results.json as text."""
    return [as_text(metric[key], metric["unit"]) for key in ("value", "low", "high", "chance")]


def protocol_page(protocol: Protocol, measured: Measured, results: Mapping[str, Any]) -> str:
    """Returns the report of any protocol.

    Args:
        protocol: definition.
        measured: sections, and texts of their own for some protocols.
        results: contents of results.json.
    """
    metrics = results["metrics"]
    headline = [
        (as_text(metrics[name]["value"], metric.unit), metric.what)
        for name, metric in measured.metrics.items()
        if metric.headline
    ]
    rows = [
        [metric["what"], value, f"{low} … {high}", chance]
        for metric in metrics.values()
        for value, low, high, chance in [metric_texts(metric)]
    ]
    about = {
        "protocol": f"{protocol.name}, version {protocol.version}",
        "encoder": results["encoder"]["path"],
        "encoder fingerprint": results["encoder"]["fingerprint"],
        **{f"data: {role}": value for role, value in results["data"].items()},
        "units": f"{results['units']} of {results['sources']} sources",
        "seed": results["seed"],
        "took": f"{results['seconds']} s",
        **measured.about,
    }
    steps = "".join(f"<li>{text(s)}</li>" for s in protocol.definition)
    title = measured.title or protocol.title

    def details(name: str, content: object) -> str:
        shown = text(json.dumps(content, indent=2))
        return f"<details><summary>{name}</summary><pre>{shown}</pre></details>"

    parts = [
        f"<h1>{text(title)}</h1>",
        f'<p class="lead">{measured.lead}</p>' if measured.lead else "",
        tiles(headline),
        *measured.sections,
        section(
            "Metrics",
            f"With 95 % intervals from {results['config']['bootstrap']['resamples']} bootstrap "
            "resamples of the sources: they cover other videos of this kind, not another training.",
            table(["", "value", "interval", "chance"], rows),
        ),
        section(
            "Run",
            "Everything needed to run it again.",
            definitions(about),
            f"<details open><summary>Protocol</summary><ul>{steps}</ul></details>",
            details("Configuration", results["config"]),
            details("Versions", results["versions"]),
            details("All results", {k: v for k, v in results.items() if k != "config"}),
        ),
    ]
    return page(title=title, body="".join(parts))
