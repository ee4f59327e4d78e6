"""Charts of training for the report, from the lines of metrics.jsonl."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from avcl_jax.evaluation.charts import Series, line_chart
from avcl_jax.evaluation.page import section, text
from avcl_jax.objectives.temporal import TASKS

_TERMS = {
    "vv": "video–video",
    "aa": "audio–audio",
    "va": "video→audio",
    "av": "audio→video",
}
_TASKS = {name: task.title for name, task in TASKS.items()}
_MODALITIES = {"video": "video", "audio": "audio"}

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

    Args:
        rows: parsed lines, each with `step`.

    Returns:
        Title, whether it is a further one, and arguments of `line_chart`.
    """
    points: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for name, value in row.items():
            key, curve = _place(name)
            if isinstance(value, int | float) and ("/" in key or key == "learning_rate"):
                points[key][curve].append((float(row["step"]), float(value)))
    series: dict[str, Series] = {}
    for key, curves in points.items():
        # Both directions between video and audio have one loss.
        labels = _TERMS | {"va": "video–audio"} if key == "term/loss" else _TERMS
        order = [name for name in (*_TERMS, *_TASKS, *_MODALITIES, "") if name in curves]
        names = labels | _TASKS | _MODALITIES
        names[""] = "by chance" if key.startswith("bank/base_rate/") else ""
        series[key] = {names[c]: tuple(np.array(curves[c]).T) for c in order}
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
    """Returns the section of the report with all charts; "" without any metric.

    Args:
        rows: parsed lines of metrics.jsonl.
        bank_start: step from which training used the feature bank; None if it never did.
    """
    charts = training_charts(rows)
    if not charts:
        return ""
    last = max(row["step"] for row in rows)
    marker = None
    if bank_start is not None and bank_start <= last:
        marker = (bank_start, f"bank from step {bank_start}")
    html: dict[bool, str] = {False: "", True: ""}
    for number, (title, further, chart) in enumerate(charts):
        svg = line_chart(**chart, name=f"curve{number}", last_step=last, marker=marker)
        html[further] += f"<div><h3>{text(title)}</h3>{svg}</div>"
    caption = (
        "Pale: as logged; strong: mean over a fortieth of the run. A spread of the embeddings that "
        "falls while the similarity of negatives rises is a collapse."
    )
    if marker:
        caption += (
            f" From step {bank_start} on (dotted) anchors had positives and negatives of the "
            "feature bank. Its positives are informative where more of them than the base rate "
            "(dashed) share a label with their anchor."
        )
    charts_of = {key: f'<div class="charts">{part}</div>' for key, part in html.items() if part}
    more = "".join(charts_of[key] for key in charts_of if key)
    details = f"<details><summary>More metrics</summary>{more}</details>" if more else ""
    return section("Training", caption, charts_of.get(False, ""), details)


def _place(name: str) -> tuple[str, str]:
    """Returns the key of the chart that a metric belongs to, and its curve there."""
    group, _, rest = name.partition("/")
    if group in _TERMS:
        return f"term/{rest}", group
    if group in _TASKS:
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
