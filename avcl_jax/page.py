"""Reports as one HTML file: style, script and small pieces of HTML. Nothing external."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

STYLE = Path(__file__).with_name("style.css").read_text()  # of the index's page too
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
    """Returns a metric as people read it: a share in %, a dash where it is None or NaN.

    Args:
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


def metric_texts(metric: Mapping[str, Any]) -> list[str]:
    """Returns value, bounds and chance of a metric of results.json as text."""
    return [as_text(metric[key], metric["unit"]) for key in ("value", "low", "high", "chance")]


def times_chance(value: float | None, chance: float | None) -> str:
    """Returns "3.1 ×"; "" where one of them is not defined, or chance is 0."""
    return f"{value / chance:.1f}\u00a0×" if chance and value is not None else ""


def page(*, title: str, body: str) -> str:
    """Returns a whole HTML document that needs nothing from outside."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>\n{STYLE}</style></head>"
        f"<body><main>{body}</main><script>{SCRIPT}</script></body></html>\n"
    )


def section(title: str, caption: str, *content: str) -> str:
    """Returns a titled section; `caption` is one or a few sentences of HTML."""
    return (
        f'<section><h2>{text(title)}</h2><p class="caption">{caption}</p>'
        f"{''.join(content)}</section>"
    )


def table(header: Sequence[str], rows: Iterable[Sequence[object]], kind: str = "") -> str:
    """Returns a table of escaped cells; `kind` is its class in the style sheet."""
    lines = [[f"<th>{text(cell)}</th>" for cell in header]] if header else []
    lines += [[f"<td>{text(cell)}</td>" for cell in row] for row in rows]
    body = "".join(f"<tr>{''.join(line)}</tr>" for line in lines)
    return f'<div class="scroll"><table class="{kind}">{body}</table></div>'


def definitions(entries: Mapping[str, object]) -> str:
    """Returns a two-column table of names and values."""
    return table((), entries.items(), "definitions")


def matrices(confusions: Mapping[str, tuple[np.ndarray, Sequence[str]]]) -> str:
    """Returns confusion matrices side by side; a cell is the fraction of its true class in %.

    Args:
        confusions: title → counts int [classes, classes], rows true; names of the classes.
    """
    shown = ""
    for title, (confusion, names) in confusions.items():
        rows = "".join(f"<th>{text(name)}</th>" for name in ("", *names))
        for name, counts in zip(names, confusion.tolist(), strict=True):
            total = max(sum(counts), 1)
            rows += f"</tr><tr><th>{text(name)}</th>" + "".join(
                f'<td style="background: rgba(var(--heat), {0.05 + 0.75 * count / total:.3f})" '
                f'title="{count} of {total}">{100 * count / total:.0f}</td>'
                for count in counts
            )
        shown += (
            f'<div class="scroll"><h3>{text(title)}</h3>'
            f'<table class="matrix"><tr>{rows}</tr></table></div>'
        )
    return f'<div class="matrices">{shown}</div>'
