"""The shell of the report: script and small pieces of HTML. Nothing external."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

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


def in_percent(value: float, digits: int = 0) -> str:
    """Returns a fraction in % without the sign; only 1 itself is written as 100."""
    written = f"{100 * value:.{digits}f}"
    return in_percent(value, digits + 1) if value < 1 and float(written) == 100 else written


def percent(value: float | None, digits: int = 0) -> str:
    """Returns a fraction written in per cent, or a dash where there is none."""
    return "–" if value is None else f"{in_percent(value, digits)}\u00a0%"


def page(*, title: str, body: str) -> str:
    """Returns a whole HTML document that needs nothing from outside."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head>"
        f"<body><main>{body}</main><script>{SCRIPT}</script></body></html>\n"
    )


def section(title: str, caption: str, *content: str) -> str:
    """Returns a titled section; `caption` says in a sentence what is to be seen (HTML)."""
    return (
        f'<section><h2>{text(title)}</h2><p class="caption">{caption}</p>'
        f"{''.join(content)}</section>"
    )


def tiles(entries: Sequence[tuple[str, str]]) -> str:
    """Returns a row of figures: (figure, what it is)."""
    cells = "".join(
        f'<div class="tile"><b>{text(figure)}</b><span>{text(what)}</span></div>'
        for figure, what in entries
    )
    return f'<div class="tiles">{cells}</div>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table of escaped cells."""
    head = "".join(f"<th>{text(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def matrix(title: str, confusion: Sequence[Sequence[int]], classes: Sequence[str]) -> str:
    """Returns a confusion matrix; a cell is the share of its true class (row) in per cent."""
    head = "<tr><th></th>" + "".join(f"<th>{text(name)}</th>" for name in classes) + "</tr>"
    rows = []
    for name, counts in zip(classes, confusion, strict=True):
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


def definitions(entries: Mapping[str, object]) -> str:
    """Returns a two-column table of names and values."""
    rows = "".join(
        f'<tr><td>{text(name)}</td><td style="text-align: left">{text(value)}</td></tr>'
        for name, value in entries.items()
    )
    return f'<div class="scroll"><table>{rows}</table></div>'
