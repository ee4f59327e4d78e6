"""Sections of the fingerprinting report: tables and bars by family, and examples to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import scipy.signal

from avcl_jax.data.media import DecodedMedia
from avcl_jax.evaluation.charts import SERIES_COLOURS, bar_chart
from avcl_jax.evaluation.exhibits import frame_uri, spectrogram_uri
from avcl_jax.evaluation.page import as_text, section, table, text
from avcl_jax.fingerprint.benchmark.clips import Query, SourceClip
from avcl_jax.fingerprint.benchmark.families import FAMILIES, STRENGTHS
from avcl_jax.fingerprint.benchmark.searchers import Answer

_STILL_SIDE = 160
_WINDOW = 512
_ROW = 6  # examples beside each other
_IN_CHART = 4  # families in a chart: with more, the figures over the bars overlap


class Examples:
    """The first query of each family at medium strength, drawn while it is in memory."""

    def __init__(self, references: Sequence[SourceClip]):
        """Takes the references, of which the answers are shown."""
        self._references = {clip.name: clip for clip in references}
        self.cells: dict[str, str] = {}

    def take(self, query: Query, answers: Mapping[str, Sequence[Answer]]) -> None:
        """Draws a query, its source and our answer, if it is the first of its kind."""
        if not query.findable or query.strength != "medium" or query.family in self.cells:
            return
        media, source = query.transformed.media, query.clip.load()
        middle = self._shown_moment(query)
        times = query.transformed.picture_time
        if not media.has_video or not times.pieces:
            times = query.transformed.sound_time
        original = float(times.source_seconds(np.array([middle]))[0])
        best = next(iter(answers["fused"]), None)
        found = best is not None and best.source == query.clip.name
        verdict = "no answer" if best is None else f"{best.source} ({best.score:.1f})"
        self.cells[query.family] = (
            f'<div class="video {"hit" if found else "query"}">'
            f'<span class="tag"><b>{text(query.family)}</b> {text(query.clip.name)}</span>'
            '<div class="stills" style="grid-template-columns: 1fr 1fr">'
            f"{_still(media, middle)}{_still(source, original)}</div>"
            f"{_sound(media)}{_sound(source)}"
            f'<span class="tag">{"found" if found else "missed"}: {text(verdict)}</span></div>'
        )

    @staticmethod
    def _shown_moment(query: Query) -> float:
        """The middle of what the query shows of its source."""
        times = query.transformed.picture_time
        piece = (times.pieces or query.transformed.sound_time.pieces)[0]
        return (piece.begin_seconds + piece.end_seconds) / 2


def _still(media: DecodedMedia, seconds: float) -> str:
    if not media.has_video:
        return ""
    place = max(0, int(np.searchsorted(media.frame_seconds, seconds + 1e-6, side="right")) - 1)
    frame = media.frames[place]
    factor = _STILL_SIDE / max(frame.shape[:2])
    way = cv2.INTER_AREA if factor < 1 else cv2.INTER_NEAREST
    shown = cv2.resize(frame, None, fx=factor, fy=factor, interpolation=way)
    return f'<img src="{frame_uri(shown)}" alt="a frame">'


def _sound(media: DecodedMedia) -> str:
    if len(media.waveform) < _WINDOW:
        return '<div class="tag">no sound</div>'
    _, _, power = scipy.signal.spectrogram(
        media.waveform / 32768, media.sample_rate_hz, nperseg=_WINDOW, noverlap=0
    )
    levels = np.log(power[::4].T + 1e-12)
    uri = spectrogram_uri(levels, low=-25.0, high=-8.0)
    return f'<div class="stage"><img src="{uri}" alt="its sound"></div>'


def sections(
    tables: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]],
    examples: Examples,
    details: Mapping[str, Any],
) -> list[str]:
    """Returns the report's sections.

    Args:
        tables: method to strength to family to figures, of `fingerprint_outcomes.table_of`.
        examples: drawn while the queries were asked.
        details: of the results.
    """
    methods = list(tables)
    medium = {method: tables[method]["medium"] for method in methods}
    present = [name for name in FAMILIES if name in medium[methods[0]]]
    colours = dict(zip(methods, SERIES_COLOURS, strict=False))
    charts = [
        bar_chart(
            {
                name.replace("_", " "): {m: medium[m][name]["r1"] for m in methods}
                for name in present[begin : begin + _IN_CHART]
            },
            name=f"families-{begin}",
            colours=colours,
            references={},
            reference_label="",
        )
        for begin in range(0, len(present), _IN_CHART)
    ]
    skipped = "".join(
        f'<p class="note">{text(name)} was not measured: {text(reason)}</p>'
        for name, reason in details["skipped_baselines"].items()
    )
    return [
        section(
            "R@1 by family, medium strength",
            "Queries changed in the picture leave the sound as it is, and the other way round: "
            "whoever looks at one modality alone finds all of the one and none of the other.",
            *charts,
            _recalls(medium, ["all", *present], methods),
            skipped,
        ),
        section(
            "Strengths",
            "R@1 fused. A family without a strength is measured once.",
            _strengths(tables["fused"], ["all", *present]),
        ),
        section(
            "Precision, offsets and thresholds of ours, fused",
            "µAP and recall at 90 % precision with as many distractors as queries; offset is right "
            "within the tolerance.",
            _precisions(medium["fused"], ["all", *present]),
        ),
        section(
            "Examples",
            "One query of each family beside its source at that time; below, the sound of both. "
            "Green: the best fused answer is right.",
            _grid([examples.cells[name] for name in present if name in examples.cells]),
        ),
    ]


def _grid(cells: Sequence[str]) -> str:
    rows = [cells[n : n + _ROW] for n in range(0, len(cells), _ROW)]
    return "".join(f'<div class="row">{"".join(row)}</div>' for row in rows)


def _recalls(
    medium: Mapping[str, Mapping[str, Mapping[str, Any]]],
    rows: Sequence[str],
    methods: Sequence[str],
) -> str:
    return table(
        ["R@1 (95 %)", "queries", *methods],
        [
            [
                _name(name),
                str(medium[methods[0]][name]["queries"]),
                *(_with_interval(medium[method][name], "r1") for method in methods),
            ]
            for name in rows
        ],
    )


def _strengths(fused: Mapping[str, Mapping[str, Mapping[str, Any]]], rows: Sequence[str]) -> str:
    return table(
        ["R@1", *STRENGTHS],
        [
            [_name(name), *(as_text(fused[s].get(name, {}).get("r1"), digits=0) for s in STRENGTHS)]
            for name in rows
        ],
    )


def _precisions(fused: Mapping[str, Mapping[str, Any]], rows: Sequence[str]) -> str:
    columns = {
        "R@5": "r5",
        "µAP": "map",
        "µAP normalised": "map_normalised",
        "recall at 90 % precision": "recall_at_p90",
        "the same normalised": "recall_at_p90_normalised",
        "offset": "offset",
    }
    at_threshold = {
        "recall at threshold (95 %)": "recall_at_threshold",
        "false matches (95 %)": "false_match_rate",
    }
    return table(
        ["", *columns, *at_threshold],
        [
            [
                _name(name),
                *(as_text(fused[name].get(c), digits=0) for c in columns.values()),
                *(_with_interval(fused[name], c, digits=1) for c in at_threshold.values()),
            ]
            for name in rows
        ],
    )


def _with_interval(figures: Mapping[str, Any], name: str, digits: int = 0) -> str:
    value, low, high = (
        as_text(figures[key], digits=digits) for key in (name, f"{name}_low", f"{name}_high")
    )
    return f"{value} ({low.removesuffix(' %')}–{high.removesuffix(' %')})"


def _name(family: str) -> str:
    return "mean over families" if family == "all" else family.replace("_", " ")
