"""Sections of the fingerprinting report: tables and bars by family, and examples to look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import scipy.signal

from avcl_jax.data.encode import frame_uri, spectrogram_uri
from avcl_jax.data.media import DecodedMedia
from avcl_jax.evaluation.charts import SERIES_COLOURS, bar_chart
from avcl_jax.fingerprint.benchmark.clips import Query
from avcl_jax.fingerprint.benchmark.families import FAMILIES
from avcl_jax.fingerprint.benchmark.outcomes import METRICS, WITH_INTERVALS, Tables
from avcl_jax.fingerprint.benchmark.searchers import Answer
from avcl_jax.page import as_text, section, table, text

_STILL_SIDE = 160
_WINDOW = 512
_ROW = 6  # examples per row
_IN_CHART = 4  # families in a chart: with more, the numbers over the bars overlap


def draw_example(query: Query, answers: Sequence[Answer]) -> str:
    """Returns a query, its source and our best answer as HTML, while they are in memory."""
    transformed, source = query.transformed, query.clip.load()
    # The middle of the first piece of the source.
    piece = (transformed.video_pieces or transformed.audio_pieces)[0]
    middle = (piece.begin_seconds + piece.end_seconds) / 2
    original = piece.source_seconds + piece.rate * (middle - piece.begin_seconds)
    best = next(iter(answers), None)
    hit = best is not None and best.source == query.clip.name
    verdict = "no answer" if best is None else f"{best.source} ({best.score:.1f})"
    return (
        f'<div class="video {"hit" if hit else "query"}">'
        f'<span class="tag"><b>{text(query.family)}</b> {text(query.clip.name)}</span>'
        '<div class="stills" style="grid-template-columns: 1fr 1fr">'
        f"{_still(transformed.media, middle)}{_still(source, original)}</div>"
        f"{_spectrogram(transformed.media)}{_spectrogram(source)}"
        f'<span class="tag">{"found" if hit else "missed"}: {text(verdict)}</span></div>'
    )


def _still(media: DecodedMedia, seconds: float) -> str:
    if not media.has_video:
        return ""
    frame = media.frames[media.shown_at(seconds)]
    factor = _STILL_SIDE / max(frame.shape[:2])
    way = cv2.INTER_AREA if factor < 1 else cv2.INTER_NEAREST
    still = cv2.resize(frame, None, fx=factor, fy=factor, interpolation=way)
    return f'<img src="{frame_uri(still)}" alt="a frame">'


def _spectrogram(media: DecodedMedia) -> str:
    if len(media.waveform) < _WINDOW:
        return '<div class="tag">no audio</div>'
    _, _, power = scipy.signal.spectrogram(
        media.waveform / 32768, media.sample_rate_hz, nperseg=_WINDOW, noverlap=0
    )
    uri = spectrogram_uri(np.log(power[::4].T + 1e-12), low=-25.0, high=-8.0)
    return f'<div class="stage"><img src="{uri}" alt="its audio"></div>'


def sections(
    tables: Tables, examples: Mapping[str, str], skipped_baselines: Mapping[str, str]
) -> list[str]:
    """Returns the report's sections; examples are HTML by family."""
    fused = tables["fused"]
    medium = {method: by_strength["medium"] for method, by_strength in tables.items()}
    present = [name for name in FAMILIES if name in fused["medium"]]
    titles = {"all": "mean over families"} | {name: name.replace("_", " ") for name in present}
    charts = [
        bar_chart(
            {
                titles[name]: {method: cells[name]["r1"] for method, cells in medium.items()}
                for name in present[begin : begin + _IN_CHART]
            },
            name=f"families-{begin}",
            colours=dict(zip(tables, SERIES_COLOURS, strict=False)),
        )
        for begin in range(0, len(present), _IN_CHART)
    ]
    notes = (
        f'<p class="note">{text(name)} was not measured: {text(reason)}</p>'
        for name, reason in skipped_baselines.items()
    )

    def by_family(header: Sequence[str], cells: Callable[[str], list[str]]) -> str:
        return table(header, [[title, *cells(name)] for name, title in titles.items()])

    shown = [examples[name] for name in present if name in examples]
    rows = [shown[n : n + _ROW] for n in range(0, len(shown), _ROW)]
    return [
        section(
            "R@1 by family, medium strength",
            "Queries whose video was changed have the audio of their source, and the other way "
            "round: a method of one modality finds all of the one and none of the other. A family "
            "without a strength is measured once.",
            *charts,
            by_family(
                ["R@1 (95 %)", "queries", *tables, "fused, weak", "fused, strong"],
                lambda name: [
                    str(fused["medium"][name]["queries"]),
                    *(_metric(cells[name], "r1", digits=0) for cells in medium.values()),
                    *(
                        as_text(fused[strength].get(name, {}).get("r1"), digits=0)
                        for strength in ("weak", "strong")
                    ),
                ],
            ),
            *notes,
        ),
        section(
            "All metrics of ours, fused, medium strength",
            "µAP and recall at 90 % precision with as many distractors as queries; offset is right "
            "within the tolerance.",
            by_family(
                ["", *(metric.what for metric in METRICS.values())],
                lambda name: [_metric(fused["medium"][name], key) for key in METRICS],
            ),
        ),
        section(
            "Examples",
            "One query of each family beside its source at that time; below, the audio of both. "
            "Green: the best fused answer is right.",
            "".join(f'<div class="row">{"".join(row)}</div>' for row in rows),
        ),
    ]


def _metric(cell: Mapping[str, Any], key: str, digits: int = 1) -> str:
    """Returns a metric as text, with its 95 % interval if it has one."""
    if key not in WITH_INTERVALS:
        return as_text(cell[key], digits=digits)
    value, low, high = (
        as_text(cell[name], digits=digits) for name in (key, f"{key}_low", f"{key}_high")
    )
    return f"{value} ({low.removesuffix(' %')}–{high.removesuffix(' %')})"
