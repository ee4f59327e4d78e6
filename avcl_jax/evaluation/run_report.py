"""Report of a pretraining run: what it learned, with examples, maps and curves of its training."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from avcl_jax.evaluation import charts
from avcl_jax.evaluation.bank_exhibits import bank_searches
from avcl_jax.evaluation.evaluated_run import EvaluationRecords
from avcl_jax.evaluation.exhibits import (
    Exhibits,
    Search,
    class_plane,
    cross_modal_searches,
    embedding_map,
    neighbour_searches,
    search_blocks,
)
from avcl_jax.evaluation.page import as_text, matrices, section, table, text
from avcl_jax.evaluation.retrieval import DIRECTIONS
from avcl_jax.evaluation.training_curves import Curves, training_curves
from avcl_jax.evaluation.views import PretrainedRun
from avcl_jax.objectives.temporal import TASKS
from avcl_jax.training.checkpoint import read_progress
from avcl_jax.training.loop import bank_start
from avcl_jax.training.metric_writer import peak_memory_gb

BLUE, GREEN, GREY = (charts.SERIES_COLOURS[index] for index in (0, 2, 7))
# The null controls must not tell speed or direction further than this from chance.
NULL_TOLERANCE = 0.05
_FEWEST_SHOWN = 4  # records; fewer make neither a map nor neighbours


@dataclass(frozen=True)
class RunContent:
    """Content of the sections of a run's report.

    Attributes:
        view: metrics under the keys of a run's results.json.
        curves: charts of training, in order.
        bank_start: step from which training used the feature bank; None if it never did.
        searches: retrieval examples by direction, "audio_to_video" and "video_to_audio".
        neighbours: nearest neighbours within one modality, by title.
        bank: positives and negatives from the feature bank by title; {} without a bank.
        maps: see `charts.scatter`; by t-SNE of the pretrained features.
        planes: see `charts.scatter`; random beside pretrained encoder, for each probe, in the
            plane that separates the classes of the training videos.
        probe_confusions: probe → (confusion of the pretrained encoder, class names).
        task_classes: temporal task → names of its classes.
    """

    view: Mapping[str, Any]
    curves: Sequence[Curves]
    bank_start: int | None
    searches: Mapping[str, Sequence[Search]]
    neighbours: Mapping[str, Sequence[Search]]
    bank: Mapping[str, Sequence[Search]]
    maps: Sequence[charts.Map]
    planes: Sequence[Sequence[charts.Map]]
    probe_confusions: Mapping[str, tuple[np.ndarray, Sequence[str]]]
    task_classes: Mapping[str, Sequence[str]]

    @property
    def spectrogram_range(self) -> tuple[float, float]:
        """Values of a spectrogram that are drawn darkest and brightest."""
        groups = (self.searches, self.neighbours, self.bank)
        queries = [s.query for group in groups for found in group.values() for s in found]
        audible = [query.spectrogram.ravel() for query in queries if len(query.spectrogram)]
        low, high = np.percentile(np.concatenate(audible), (2, 99.8)) if audible else (0.0, 1.0)
        return float(low), float(high)


def run_report(
    run: PretrainedRun,
    records: EvaluationRecords,
    workdir: epath.Path,
    view: Mapping[str, Any],
    *,
    train: Mapping[str, np.ndarray],
    test: Mapping[str, np.ndarray],
    confusions: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """Returns the texts and sections of the report, arguments of `Measured`.

    Args:
        run: evaluated run.
        records: its test records.
        view: metrics under the keys of results.json.
        train: outputs of `view_features` for the training records.
        test: the same for the test records.
        confusions: confusion of the pretrained encoder's probes.
    """
    config, names = run.config, records.test.records.class_names
    content = RunContent(
        view=view,
        curves=training_curves(_logged(workdir)),
        bank_start=bank_start(config),
        bank=bank_searches(config, workdir, run.spec, step=run.step),
        probe_confusions={
            name: (confusion, names[name.rsplit("_from_", 1)[0]])
            for name, confusion in confusions.items()
        },
        task_classes={task: TASKS[task].classes(config.views.speeds) for task in TASKS},
        **_examples(run, records, train, test),
    )
    return {
        "title": f"What was learned from {config.name}",
        "lead": lead(view, config.modalities),
        "tiles": _headline(view),
        "sections": run_sections(content),
        "definition": _definition(config, view),
        "about": {
            "steps": f"{run.step} of {config.steps}",
            "batch": f"{config.global_batch_size} videos × 2 views",
            "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, "
            f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        },
    }


def seconds_of_run(run: PretrainedRun, workdir: epath.Path, seconds: float) -> dict[str, Any]:
    """Returns times and memory of preparation, training and evaluation, for results.json.

    Args:
        run: evaluated run.
        seconds: duration of the evaluation.
    """
    preparation = _preparation_seconds(run.config.data.directory)
    training = round(read_progress(workdir, run.step).train_seconds, 1)
    logged = [row["peak_memory_gb"] for row in _logged(workdir) if "peak_memory_gb" in row]
    return {
        "preparation_seconds": preparation,
        "train_seconds": training,
        "evaluation_seconds": round(seconds, 1),
        "total_seconds": round((preparation or 0.0) + training + seconds, 1),
        "peak_memory_gb": round(max([peak_memory_gb(), *logged]), 3),  # of the training too
    }


def _examples(
    run: PretrainedRun,
    records: EvaluationRecords,
    train: Mapping[str, np.ndarray],
    test: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """Returns searches, neighbours and maps."""
    config, settings = run.config, run.config.evaluation.report
    exhibits = Exhibits(
        records.test,
        run.spec,
        speed=len(config.views.speeds) // 2,  # neither an instant nor all of a video
        stills=settings.stills,
    )
    rng = np.random.default_rng(config.seed)

    def choose(count: int) -> list[int]:
        return np.sort(rng.choice(count, min(settings.queries, count), replace=False)).tolist()

    searches: dict[str, list[Search]] = {}
    both = np.flatnonzero(test["has_video"] & test["has_audio"])
    if len(both) and config.modalities == "audio_visual":
        chosen = choose(len(both))
        embeddings = {m: test[f"pretrained/{m}_embeddings"][both] for m in ("video", "audio")}
        for direction, (query, found) in DIRECTIONS.items():
            searches[direction] = cross_modal_searches(
                exhibits,
                embeddings[query],
                embeddings[found],
                both,
                modalities=(query, found),
                chosen=chosen,
                results=settings.results,
            )
    neighbours: dict[str, Sequence[Search]] = {}
    maps: list[charts.Map] = []
    planes: list[list[charts.Map]] = []
    for label, modality in config.evaluation.probes:
        known = np.flatnonzero(test[f"has_{modality}"] & (test[f"label_{label}"] >= 0))
        if len(known) < _FEWEST_SHOWN:
            continue
        features = test[f"pretrained/{modality}_features"][known]
        labels = test[f"label_{label}"][known]
        title, of_title = neighbour_searches(
            exhibits,
            features,
            labels,
            known,
            modality=modality,
            label=label,
            chosen=choose(len(known)),
            results=settings.results,
        )
        neighbours[title] = of_title
        rows, positions = embedding_map(features, seed=config.seed)
        what = f"{modality.capitalize()}, coloured by {label}"
        names = records.test.records.class_names[label]
        maps.append((what, positions, labels[rows], names))
        trained = train[f"has_{modality}"] & (train[f"label_{label}"] >= 0)
        train_labels = train[f"label_{label}"][trained]
        if len(np.unique(train_labels)) < 3:  # two classes lie on a line
            continue
        planes.append(
            [
                (
                    f"{what}: {network} encoder",
                    class_plane(
                        train[f"{network}/{modality}_features"][trained],
                        train_labels,
                        test[f"{network}/{modality}_features"][known],
                    ),
                    labels,
                    names,
                )
                for network in ("random", "pretrained")
            ]
        )
    return {"searches": searches, "neighbours": neighbours, "maps": maps, "planes": planes}


def _definition(config: ml_collections.ConfigDict, view: Mapping[str, Any]) -> list[str]:
    e = config.evaluation
    speeds = " and ".join(f"{speed}×" for speed in e.speeds)
    sentences = [
        f"Features are the encoder's output before the projection, means over "
        f"{e.views_per_speed} uniformly spaced centre-crop views at each of the speeds {speeds}; "
        "embeddings are the projection's output for the same views, one after another.",
        f"Probes: features standardised by the training videos, multinomial logistic regression, "
        f"C among {tuple(e.probe.costs)} chosen by {e.probe.folds}-fold cross-validation of the "
        "training videos alone, one look at the test videos.",
        "Retrieval: all test videos with video and audio, by the cosine of embeddings, that "
        "is, the mean similarity of views of the same times; a tie counts against the correct one.",
        f"Temporal tasks: {e.pairs_per_video} pairs of views of each test video, drawn as in "
        "training, cropped in the centre; an equal number of each class is scored, so chance is "
        "exact.",
    ]
    for name, fit in view["supervised"].items():
        label, modality = name.rsplit("_from_", 1)
        own = e.supervised[modality]
        reason = {
            "target": f"the training loss was below {own.fit.loss_target}",
            "plateau": f"the training loss was on a plateau (mean over {own.fit.window} epochs not "
            f"{own.fit.improvement:.0%} below that of the {own.fit.window} before)",
            "max_epochs": "the bound on epochs was met",
        }[fit["stopped"]]
        sentences.append(
            f"Supervised {modality} encoder of {label}: same shape, trained from scratch with a "
            f"linear head on {own.views} random views of each training video for {fit['epochs']} "
            f"epochs. The learning rate was constant until {reason}, then fell to zero over "
            f"{own.fit.decay_epochs} epochs; final training loss {fit['train_loss']:.3f}. Probed "
            "like the others."
        )
    if "views" in view["null_control"]:
        sentences.append(
            f"Null controls: encoders of the same shape trained on speed and direction of "
            f"stationary noise ({e.null.train_views} rendered views of each video at each speed in "
            f"each direction), tested on {view['null_control']['views']} views of "
            "other noise."
        )
    return sentences


def _preparation_seconds(directory: epath.PathLike) -> float | None:
    """Returns the duration of the preparation of records; None where it is not recorded.

    `data_prep demo` records it beside media and records, `data_prep prepare` beside records alone.
    """
    directory = epath.Path(directory)
    demo, prepared = directory.parent / "seconds.json", directory / "preparation.json"
    if demo.exists():
        return round(sum(json.loads(demo.read_text()).values()), 1)
    return json.loads(prepared.read_text())["seconds"] if prepared.exists() else None


def _logged(workdir: epath.Path) -> list[dict[str, Any]]:
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_sections(content: RunContent) -> list[str]:
    """Returns the sections of the report as HTML; those without results are left out."""
    sections = [
        _probe_section(content.view),
        _temporal_section(content),
        _retrieval_section(content),
        _neighbour_section(content),
        _map_section(content),
        _confusion_section(content),
        _curve_section(content),
        _bank_section(content),
    ]
    return [html for html in sections if html]


def _probe_title(probe: str) -> str:
    """Returns LABEL_from_MODALITY in words."""
    label, modality = probe.rsplit("_from_", 1)
    return f"{label}, from {modality}"


def lead(view: Mapping[str, Any], modalities: str) -> str:
    """Returns the first paragraph: encoders of the run, and accuracies of their probes."""
    who = {
        "audio_visual": "Two encoders",
        "video": "A video encoder",
        "audio": "An audio encoder",
    }[modalities]
    sentences = [f"{who} learned from unlabelled videos."]
    for probe, scores in view.get("probe", {}).items():
        label, modality = probe.rsplit("_from_", 1)
        sentence = (
            f"A linear classifier reads <b>{text(label)}</b> from the pretrained {modality} "
            f"encoder on {as_text(scores['pretrained'], digits=0)} of the test videos, from a "
            f"random one on {as_text(scores['random'], digits=0)}"
        )
        if "supervised" in scores:
            share = as_text(scores["supervised"], digits=0)
            sentence += f", from one trained with labels on {share}"
        sentences.append(sentence + ".")
    return " ".join(sentences)


def _headline(view: Mapping[str, Any]) -> list[tuple[str, str]]:
    entries = []
    for probe, scores in view.get("probe", {}).items():
        if "gap_closed" in scores:
            what = f"of the gap from random to supervised closed: {_probe_title(probe)}"
            entries.append((as_text(scores["gap_closed"], digits=0), what))
    for direction, scores in view.get("retrieval", {}).items():
        factor = scores["r1"] / scores["chance"]
        entries.append((f"{factor:.1f} ×", f"chance, R@1 {_arrow(direction)}"))
    for task in ("speed_audio", "direction_video"):
        scores = view.get("temporal", {}).get(task)
        if scores:
            what = f"{TASKS[task].title} (chance {as_text(scores['chance'], digits=0)})"
            entries.append((as_text(scores["accuracy"], digits=0), what))
    return entries


def _arrow(direction: str) -> str:
    return direction.replace("_to_", " → ")


def _probe_section(view: Mapping[str, Any]) -> str:
    if not view.get("probe"):
        return ""
    groups, chances = {}, {}
    for probe, scores in view["probe"].items():
        trivial = view.get("trivial", {}).get(probe, {})
        bars = {"best trivial statistic": max(trivial.values())} if trivial else {}
        networks = ("random", "pretrained", "supervised")
        bars |= {name: scores[name] for name in networks if name in scores}
        groups[_probe_title(probe)] = bars
        chances[_probe_title(probe)] = scores["chance"]
    statistics = dict.fromkeys(name for probe in view.get("trivial", {}).values() for name in probe)
    trivial_rows = [
        [_probe_title(probe), *(as_text(values.get(name), digits=0) for name in statistics)]
        for probe, values in view.get("trivial", {}).items()
    ]
    chart = charts.bar_chart(
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
        "Linear probes",
        "Accuracy on frozen features. The further <b>pretrained</b> stands above "
        "<b>random</b> towards <b>supervised</b>, the more of the label was learned without any "
        "label.",
        *content,
    )


def _temporal_section(content: RunContent) -> str:
    view = content.view
    temporal = view.get("temporal", {})
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
                    f"known, a network reaches {as_text(null)} (chance "
                    f"{as_text(scores['chance'], digits=0)}). The rendering leaks the label.</p>"
                )
        label = TASKS[task].title.replace(", ", ",\n")
        groups[label] = bars
        chances[label] = scores["chance"]
    skipped = view.get("null_control", {}).get("skipped")
    if skipped:
        warnings.append(f'<p class="note">No null control: {text(skipped)}</p>')
    chart = charts.bar_chart(
        groups,
        name="temporal",
        colours={"held-out views": BLUE, "null control: stationary noise": GREY},
        references=chances,
        reference_label="chance",
    )
    return section(
        "Temporal tasks",
        f"Playback speed ({', '.join(content.task_classes['speed_video'])}), playback direction, "
        "and the order of two clips, judged on views of test videos. The null control is a network "
        "trained and tested on noise: it has to stay at chance, or the answer would be a trace of "
        "the rendering.",
        chart,
        *warnings,
    )


def _retrieval_section(content: RunContent) -> str:
    retrieval = content.view.get("retrieval", {})
    if not retrieval:
        return ""
    names = set.intersection(*(set(scores) for scores in retrieval.values()))
    ks = sorted(int(name[1:]) for name in names if name[0] == "r" and name[1:].isdigit())
    rows = []
    for direction, scores in retrieval.items():
        cells = [
            f"{as_text(scores[f'r{k}'])} ({scores[f'r{k}'] / scores[f'chance_r{k}']:.1f} ×)"
            for k in ks
        ]
        ranks = f"{scores['median_rank']:g} of {scores['gallery']}"
        rows.append([_arrow(direction), *cells, ranks])
    blocks = [table(["", *(f"R@{k} (× chance)" for k in ks), "median rank"], rows)]
    examples = {
        "Query {}, ranked by {}".format(*direction.split("_to_")): searches
        for direction, searches in content.searches.items()
    }
    blocks += search_blocks(examples, content.spectrogram_range)
    return section(
        "Finding the other half of a video",
        "The query is one half of a test video; the other halves of all test videos are ranked by "
        "similarity. Queries are drawn by the seed, not chosen. Input that the model was not given "
        "is dimmed, a green frame marks the same video, and a click plays a clip.",
        *blocks,
    )


def _neighbour_section(content: RunContent) -> str:
    if not content.neighbours:
        return ""
    return section(
        "Nearest neighbours",
        "The test videos that an encoder holds to be most alike, by its features before the "
        "projection, standardised.",
        *search_blocks(content.neighbours, content.spectrogram_range),
    )


def _map_section(content: RunContent) -> str:
    if not content.maps:
        return ""
    planes = [
        charts.scatter(plane, name=f"plane{number}") for number, plane in enumerate(content.planes)
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
        "Map of the test videos", caption, *planes, charts.scatter(content.maps, name="maps")
    )


def _confusion_section(content: RunContent) -> str:
    confusions = {
        f"{_probe_title(probe)} (probe, pretrained)": counts
        for probe, counts in content.probe_confusions.items()
    }
    confusions |= {
        TASKS[task].title: (np.array(scores["confusion"]), content.task_classes[task])
        for task, scores in content.view.get("temporal", {}).items()
    }
    if not confusions:
        return ""
    return section(
        "Confusion",
        "Rows are true classes, columns predicted ones, in % of the row: a strong diagonal is "
        "good, and a block beside it shows which classes are alike.",
        matrices(confusions),
    )


def _curve_section(content: RunContent) -> str:
    ends = [curve[0][-1] for curves in content.curves for curve in curves.series.values()]
    if not ends:
        return ""
    start = content.bank_start
    marker = None if start is None or start > max(ends) else (start, f"bank from step {start}")
    drawn: dict[bool, list[str]] = {False: [], True: []}
    for number, curves in enumerate(content.curves):
        chart = charts.line_chart(
            curves.series,
            name=f"curve{number}",
            ylabel=curves.ylabel,
            percent=curves.fractions,
            from_zero=curves.from_zero,
            dashed=curves.dashed,
            last_step=max(ends),
            marker=marker,
        )
        drawn[curves.further].append(f"<div><h3>{text(curves.title)}</h3>{chart}</div>")
    shown, further = (f'<div class="charts">{"".join(drawn[key])}</div>' for key in (False, True))
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
    return section("Training", caption, shown, details if drawn[True] else "")


def _bank_section(content: RunContent) -> str:
    if not content.bank:
        return ""
    return section(
        "Samples from the feature bank",
        "Random training videos, and rows that the bank of the last checkpoint returns for them: "
        "positives in green, negatives from the most to the least similar. Numbers are the cosines "
        "that rank the rows, before any correction for playback: of video, then of audio. The "
        "speed is that of the view whose embedding is in the bank; the frames are of the middle of "
        "the video, which may be another interval.",
        *search_blocks(content.bank, content.spectrogram_range),
    )
