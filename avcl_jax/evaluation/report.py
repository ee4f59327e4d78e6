"""The report: one self-contained HTML page from which a person sees what was learned."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from avcl_jax.evaluation import figures
from avcl_jax.evaluation.cards import search_blocks, search_row
from avcl_jax.evaluation.page import (
    definitions,
    matrix,
    page,
    percent,
    section,
    table,
    text,
    tiles,
)
from avcl_jax.evaluation.protocol_run import figures_section
from avcl_jax.evaluation.report_content import ReportContent
from avcl_jax.objectives.temporal import TASKS

BLUE, GREEN, GREY = (figures.SERIES_COLOURS[index] for index in (0, 2, 7))
# The null controls must not tell speed or direction further than this from chance.
NULL_TOLERANCE = 0.05


def render_report(content: ReportContent) -> str:
    """Returns the page as HTML.

    Sections whose results are absent (a modality without sound has no retrieval) are left out.
    """
    results = content.results
    parts = [
        f"<h1>{text(content.title)}</h1>",
        f'<p class="lead">{_lead(results)}</p>',
        tiles(_headline(results)),
        _probe_section(results),
        _temporal_section(content),
        _retrieval_section(content),
        _neighbour_section(content),
        _map_section(content),
    ]
    parts += [
        _confusion_section(content),
        figures_section(results),
        _curve_section(content),
        _bank_section(content),
        _run_section(content),
    ]
    return page(title=content.title, body="".join(parts))


def probe_name(probe: str) -> str:
    """Returns LABEL_from_MODALITY in words."""
    label, modality = probe.rsplit("_from_", 1)
    return f"{label}, from the {'picture' if modality == 'video' else 'sound'}"


def _lead(results: Mapping[str, Any]) -> str:
    who = {
        "audio_visual": "Two encoders",
        "video": "A video encoder",
        "audio": "An audio encoder",
    }[results["config"]["modalities"]]
    sentences = [f"{who} learned from unlabelled videos."]
    for probe, scores in results.get("probe", {}).items():
        label, modality = probe.rsplit("_from_", 1)
        sentence = (
            f"A linear classifier reads <b>{text(label)}</b> from the pretrained {modality} "
            f"encoder on {percent(scores['pretrained'])} of the test videos, from a random one on "
            f"{percent(scores['random'])}"
        )
        if "supervised" in scores:
            sentence += f", from one trained with labels on {percent(scores['supervised'])}"
        sentences.append(sentence + ".")
    return " ".join(sentences)


def _headline(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    entries = []
    for probe, scores in results.get("probe", {}).items():
        if "gap_closed" in scores:
            what = f"of the gap from random to supervised closed: {probe_name(probe)}"
            entries.append((percent(scores["gap_closed"]), what))
    for direction, scores in results.get("retrieval", {}).items():
        factor = scores["r1"] / scores["chance"]
        entries.append((f"{factor:.1f} ×", f"chance, R@1 {_direction_name(direction)}"))
    for task in ("speed_audio", "direction_video"):
        scores = results.get("temporal", {}).get(task)
        if scores:
            what = f"{TASKS[task].title} (chance {percent(scores['chance'])})"
            entries.append((percent(scores["accuracy"]), what))
    return entries


def _direction_name(direction: str) -> str:
    query, target = direction.split("_to_")
    names = {"audio": "sound", "video": "picture"}
    return f"{names[query]} → {names[target]}"


def _probe_section(results: Mapping[str, Any]) -> str:
    if not results.get("probe"):
        return ""
    groups, chances = {}, {}
    for probe, scores in results["probe"].items():
        trivial = results.get("trivial", {}).get(probe, {})
        bars = {"best trivial statistic": max(trivial.values())} if trivial else {}
        networks = ("random", "pretrained", "supervised")
        bars |= {name: scores[name] for name in networks if name in scores}
        groups[probe_name(probe)] = bars
        chances[probe_name(probe)] = scores["chance"]
    statistics = dict.fromkeys(
        name for probe in results.get("trivial", {}).values() for name in probe
    )
    trivial_rows = [
        [probe_name(probe), *(percent(values.get(name)) for name in statistics)]
        for probe, values in results.get("trivial", {}).items()
    ]
    chart = figures.bar_chart(
        groups,
        name="probes",
        colours={
            "best trivial statistic": "#b3bac2",
            "random": GREY,
            "pretrained": BLUE,
            "supervised": GREEN,
        },
        references=chances,
        reference_label="chance",
    )
    content = [chart]
    if trivial_rows:
        header = ["", *(name.replace("_", " ") for name in statistics)]
        content.append("<h3>The same probes on mere statistics of the views</h3>")
        content.append(table(header, trivial_rows))
    return section(
        "What the encoders know",
        "Linear probes on frozen features. The further <b>pretrained</b> stands above "
        "<b>random</b> towards <b>supervised</b>, the more of the label was learned without any "
        "label.",
        *content,
    )


def _temporal_section(content: ReportContent) -> str:
    results = content.results
    temporal = results.get("temporal", {})
    if not temporal:
        return ""
    groups, chances, warnings = {}, {}, []
    for task, scores in temporal.items():
        bars = {"held-out views": scores["accuracy"]}
        null = scores.get("null_accuracy")
        if null is not None:
            bars["null control: stationary noise"] = null
            if abs(null - scores["chance"]) > NULL_TOLERANCE:
                warnings.append(
                    f'<p class="note">{text(TASKS[task].title)}: on noise, where nothing can be '
                    f"known, a network reaches {percent(null, 1)} (chance "
                    f"{percent(scores['chance'])}). The rendering leaks the label.</p>"
                )
        label = TASKS[task].title.replace(", ", ",\n")
        groups[label] = bars
        chances[label] = scores["chance"]
    skipped = results.get("null_control", {}).get("skipped")
    if skipped:
        warnings.append(f'<p class="note">No null control: {text(skipped)}</p>')
    chart = figures.bar_chart(
        groups,
        name="temporal",
        colours={"held-out views": BLUE, "null control: stationary noise": GREY},
        references=chances,
        reference_label="chance",
    )
    return section(
        "What it knows of time",
        f"Playback speed ({', '.join(content.task_classes['speed_video'])}), playback direction, "
        "and the order of two clips, judged on views of test videos. The null control is a network "
        "trained and tested on noise: it has to stay at chance, or the answer would be a trace of "
        "the rendering.",
        chart,
        *warnings,
    )


def _retrieval_section(content: ReportContent) -> str:
    retrieval = content.results.get("retrieval", {})
    if not retrieval:
        return ""
    names = set.intersection(*(set(scores) for scores in retrieval.values()))
    ks = sorted(int(name[1:]) for name in names if name[0] == "r" and name[1:].isdigit())
    rows = []
    for direction, scores in retrieval.items():
        cells = [
            f"{percent(scores[f'r{k}'], 1)} ({scores[f'r{k}'] / scores[f'chance_r{k}']:.1f} ×)"
            for k in ks
        ]
        ranks = f"{scores['median_rank']:g} of {scores['gallery']}"
        rows.append([_direction_name(direction), *cells, ranks])
    blocks = [table(["", *(f"R@{k} (× chance)" for k in ks), "median rank"], rows)]
    for direction, searches in content.searches.items():
        query, target = direction.split("_to_")
        blocks.append(
            f"<h3>Asked with the {'sound' if query == 'audio' else 'picture'}, "
            f"ranked by the {'sound' if target == 'audio' else 'picture'}</h3>"
        )
        blocks += [search_row(search, content.spectrogram_range) for search in searches]
    return section(
        "Finding the other half of a video",
        "The query is one half of a test video; the other halves of all test videos are ranked by "
        "similarity. Queries are drawn by the seed, not chosen. What the model did not get to see "
        "is dimmed, a green frame marks the very same video, and a click plays a clip.",
        *blocks,
    )


def _neighbour_section(content: ReportContent) -> str:
    if not content.neighbours:
        return ""
    return section(
        "Nearest neighbours",
        "The test videos that an encoder holds to be most alike, by its features before the "
        "projection, standardised.",
        *search_blocks(content.neighbours, content.spectrogram_range),
    )


def _map_section(content: ReportContent) -> str:
    if not content.maps:
        return ""
    planes = [
        figures.scatter(plane, name=f"plane{number}") for number, plane in enumerate(content.planes)
    ]
    caption = "Each point is one test video, its colour a label that pretraining never saw."
    if planes:
        caption += (
            " First as a linear classifier sees it: the plane in which the classes of the "
            "<i>training</i> videos lie farthest apart, for a random encoder and for the "
            "pretrained one. The clearer the islands on the right, the more was learned."
        )
        planes.append("<h3>Without any label: t-SNE of the pretrained features</h3>")
    return section(
        "Map of the test videos", caption, *planes, figures.scatter(content.maps, name="maps")
    )


def _confusion_section(content: ReportContent) -> str:
    blocks = [
        matrix(f"{probe_name(probe)} (probe, pretrained)", confusion, classes)
        for probe, (confusion, classes) in content.probe_confusions.items()
    ]
    blocks += [
        matrix(TASKS[task].title, scores["confusion"], content.task_classes[task])
        for task, scores in content.results.get("temporal", {}).items()
    ]
    if not blocks:
        return ""
    return section(
        "What is taken for what",
        "Rows are the truth, columns the answer, in per cent of the row: a strong diagonal is "
        "good, and a block beside it shows which classes look or sound alike.",
        f'<div class="matrices">{"".join(blocks)}</div>',
    )


def _curve_section(content: ReportContent) -> str:
    ends = [curve[0][-1] for curves in content.curves for curve in curves.series.values()]
    if not ends:
        return ""
    start = content.bank_start
    marker = None if start is None or start > max(ends) else (start, f"bank from step {start}")
    charts: dict[bool, list[str]] = {False: [], True: []}
    for number, curves in enumerate(content.curves):
        chart = figures.line_chart(
            curves.series,
            name=f"curve{number}",
            ylabel=curves.ylabel,
            percent=curves.fractions,
            from_zero=curves.from_zero,
            dashed=curves.dashed,
            last_step=max(ends),
            marker=marker,
        )
        charts[curves.further].append(f"<div><h3>{text(curves.title)}</h3>{chart}</div>")
    shown, further = (f'<div class="charts">{"".join(charts[key])}</div>' for key in (False, True))
    caption = (
        "Pale: as logged; strong: mean over a fortieth of the run. A spread of the embeddings that "
        "falls while the similarity of negatives rises is a collapse."
    )
    if marker is not None:
        caption += (
            f" From step {start} on (dotted) anchors had positives and negatives of the feature "
            "bank. Its positives are informative where more of them than the base rate (dashed) "
            "share a label with their anchor."
        )
    details = f"<details><summary>More metrics</summary>{further}</details>"
    return section("How training went", caption, shown, details if charts[True] else "")


def _bank_section(content: ReportContent) -> str:
    if not content.bank:
        return ""
    return section(
        "Samples from the feature bank",
        "Random training videos, and rows that the bank of the last checkpoint returns for them: "
        "positives in green, negatives from the most to the least similar. Numbers are the cosines "
        "that rank the rows, before any correction for playback: of the pictures, then of the "
        "sounds. The speed is that of the view whose embedding is in the bank; the pictures are "
        "of the middle of the video, which may be another interval.",
        *search_blocks(content.bank, content.spectrogram_range),
    )


def _run_section(content: ReportContent) -> str:
    protocol = "".join(f"<li>{text(sentence)}</li>" for sentence in content.protocol)
    versions = json.dumps(content.results.get("versions", {}), indent=2)
    return section(
        "What was run",
        "Everything needed to run it again.",
        definitions(content.run),
        f"<details><summary>Protocol</summary><ul>{protocol}</ul></details>",
        f"<details><summary>Configuration</summary><pre>{text(content.config)}</pre></details>",
        f"<details><summary>Versions</summary><pre>{text(versions)}</pre></details>",
        "<details><summary>All results</summary>"
        f"<pre>{text(json.dumps(content.results, indent=1))}</pre></details>",
    )
