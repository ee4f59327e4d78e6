"""Report of a pretraining run: what it learned, with examples, maps and curves of its training."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.manifold import TSNE
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from avcl_jax.batched import Arrays
from avcl_jax.data.selection import Modality, UsableRecords
from avcl_jax.evaluation import charts
from avcl_jax.evaluation.exhibits import Exhibits, bank_searches, bank_section, open_bank
from avcl_jax.evaluation.protocol import Measured
from avcl_jax.evaluation.retrieval import DIRECTIONS, nearest
from avcl_jax.evaluation.views import PretrainedRun
from avcl_jax.objectives.temporal import TASKS
from avcl_jax.page import as_text, matrices, section, table, text, times_chance
from avcl_jax.training.checkpoint import read_progress
from avcl_jax.training.metrics import peak_memory_gb
from avcl_jax.training.program import bank_start

BLUE, GREEN, GREY = (charts.SERIES_COLOURS[index] for index in (0, 2, 7))
# The null controls must not tell speed or direction further than this from chance.
NULL_TOLERANCE = 0.05
_FEWEST_SHOWN = 4  # records; fewer make neither a map nor neighbours
_MAP_POINTS = 2000  # t-SNE of more takes minutes and shows no more


def run_report(
    run: PretrainedRun,
    records: UsableRecords,
    workdir: epath.Path,
    view: Mapping[str, Any],
    features: Mapping[str, Arrays],
    probes: Mapping[str, Measured],
    ranks: Measured,
    tasks: Measured,
) -> dict[str, Any]:
    """Returns the texts and sections of the report, arguments of `Measured`.

    Args:
        records: test records.
        view: metrics under the keys of results.json.
        features: outputs of `PretrainedRun.features` by role of the records.
    """
    config = run.config
    examples = _Examples(run, records, features)
    sections = [
        probe_section(view, probes, records.records.class_names),
        temporal_section(view, config.views.speeds),
        *tasks.sections,
        retrieval_section(view["retrieval"], examples.retrieval(ranks.outcomes.values)),
        *examples.features(),
        charts.training_section(_logged(workdir), bank_start(config)),
    ]
    if (bank := open_bank(config, workdir, run.spec, step=run.step)) is not None:
        shown = Exhibits(bank[0], run.spec, stills=config.evaluation.report.stills)
        sections.append(bank_section(shown, bank_searches(config, *bank)))
    return {
        "title": f"What was learned from {config.name}",
        "lead": lead(view, config.modalities),
        "sections": [html for html in sections if html],
        "about": {
            "steps": f"{run.step} of {config.steps}",
            "batch": f"{config.global_batch_size} videos × 2 views",
            "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, "
            f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        },
    }


def seconds_of_run(run: PretrainedRun, workdir: epath.Path, seconds: float) -> dict[str, Any]:
    """Returns times and memory of preparation, training and evaluation, which took `seconds`."""
    records = epath.Path(run.config.data.directory)
    # `data_prep demo` writes the one, beside media and records; `data_prep prepare` the other.
    demo, prepared = records.parent / "seconds.json", records / "preparation.json"
    preparation = None
    if demo.exists():
        preparation = round(sum(json.loads(demo.read_text()).values()), 1)
    elif prepared.exists():
        preparation = json.loads(prepared.read_text())["seconds"]
    training = round(read_progress(workdir, run.step).train_seconds, 1)
    logged = [row["peak_memory_gb"] for row in _logged(workdir) if "peak_memory_gb" in row]
    return {
        "preparation_seconds": preparation,
        "train_seconds": training,
        "evaluation_seconds": round(seconds, 1),
        "total_seconds": round((preparation or 0.0) + training + seconds, 1),
        "peak_memory_gb": round(max([peak_memory_gb(), *logged]), 3),  # of the training too
    }


def _logged(workdir: epath.Path) -> list[dict[str, Any]]:
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class _Examples:
    """Examples and maps of the test records by the outputs of the networks."""

    def __init__(
        self, run: PretrainedRun, records: UsableRecords, features: Mapping[str, Arrays]
    ) -> None:
        self._config, self._settings = run.config, run.config.evaluation.report
        self._train, self._test = features.get("train", {}), features["test"]
        self._exhibits = Exhibits(records, run.spec, stills=self._settings.stills)
        self._class_names = records.records.class_names
        self._rng = np.random.default_rng(run.config.seed)

    def _draw(self, count: int) -> list[int]:
        """Draws the queries that are shown among `count` records."""
        queries = min(self._settings.queries, count)
        return np.sort(self._rng.choice(count, queries, replace=False)).tolist()

    def retrieval(self, ranks: Mapping[str, np.ndarray]) -> str:
        """Returns queries of both directions with their results."""
        if not ranks:
            return ""
        both = np.flatnonzero(self._test["has_video"] & self._test["has_audio"])
        rows, html = self._draw(len(both)), ""
        for direction, (query, target) in DIRECTIONS.items():
            queries, gallery = (
                self._test[f"pretrained/{m}_embeddings"][both] for m in (query, target)
            )
            results = nearest(queries[rows], gallery, k=self._settings.results)
            html += f"<h3>Query {query}, ranked by {target}</h3>"
            for row, items in zip(rows, results, strict=True):
                rank = ranks[f"rank_{direction}"][row]
                remark = f"The right {target} is number {rank} of {len(both)}."
                html += self._exhibits.search(both[row], both[items], (query, target), remark)
        return html

    def features(self) -> list[str]:
        """Returns the sections with neighbours and maps by the features of each probe."""
        neighbours: list[str] = []
        maps: list[charts.Map] = []
        planes: list[str] = []
        for label, modality in self._config.evaluation.probes:
            known, train_known = (
                np.flatnonzero(side[f"has_{modality}"] & (side[f"label_{label}"] >= 0))
                for side in (self._test, self._train)
            )
            if len(known) < _FEWEST_SHOWN:
                continue
            features = self._test[f"pretrained/{modality}_features"][known]
            labels, names = self._test[f"label_{label}"][known], self._class_names[label]
            neighbours.append(self._neighbours(features, labels, known, modality, label))
            rows, positions = embedding_map(features, seed=self._config.seed)
            title = f"{modality.capitalize()}, coloured by {label}"
            maps.append((title, positions, labels[rows], names))
            train_labels = self._train[f"label_{label}"][train_known]
            if len(np.unique(train_labels)) < 3:  # two classes lie on a line
                continue
            panels = []
            for network in ("random", "pretrained"):
                key = f"{network}/{modality}_features"
                train, test = self._train[key][train_known], self._test[key][known]
                plane = class_plane(train, train_labels, test)
                panels.append((f"{title}: {network} encoder", plane, labels, names))
            planes.append(charts.scatter(panels, name=f"plane{len(planes)}"))
        if not neighbours:
            return []
        caption = "Each point is one test video, its colour a label that pretraining never saw."
        if planes:
            caption += (
                " First as a linear classifier sees it: the plane in which the classes of the "
                "<i>training</i> videos lie farthest apart, for a random encoder and for the "
                "pretrained one. The clearer the islands on the right, the more was learned."
            )
            planes.append("<h3>Without any label: t-SNE of the pretrained features</h3>")
        return [
            section(
                "Nearest neighbours",
                "The test videos that an encoder holds to be most alike, by its features before "
                "the projection, standardised.",
                *neighbours,
            ),
            section("Map of the test videos", caption, *planes, charts.scatter(maps, name="maps")),
        ]

    def _neighbours(
        self,
        features: np.ndarray,
        labels: np.ndarray,
        positions: np.ndarray,
        modality: Modality,
        label: str,
    ) -> str:
        """Returns the nearest neighbours of some videos, and how often any share a label."""
        scaled, count = StandardScaler().fit_transform(features), self._settings.results
        # A video is its own nearest neighbour, but twins may tie with it.
        ranked = enumerate(nearest(scaled, scaled, k=count + 1))
        others = np.array([items[items != own][:count] for own, items in ranked])
        shares, counts = labels[others] == labels[:, None], np.bincount(labels)
        chance = float((counts * (counts - 1)).sum() / (len(labels) * (len(labels) - 1)))
        count = others.shape[1]
        html = (
            f"<h3>By {modality}: {as_text(float(shares.mean()), digits=0)} of the {count} nearest "
            f"neighbours share the {text(label)} (chance {as_text(chance, digits=0)})</h3>"
        )
        for row in self._draw(len(labels)):
            remark, given = f"{shares[row].sum()} of {count} share its {label}.", (modality,) * 2
            html += self._exhibits.search(positions[row], positions[others[row]], given, remark)
        return html


def embedding_map(features: np.ndarray, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Places features [n, C] on a plane by t-SNE: rows that are placed, and float [points, 2]."""
    rows = np.arange(len(features))
    if len(rows) > _MAP_POINTS:
        rows = np.random.default_rng(seed).choice(rows, _MAP_POINTS, replace=False)
    scaled = StandardScaler().fit_transform(features[rows])
    perplexity = min(30.0, max(2.0, (len(rows) - 1) / 3))
    # Its threads spin while they wait: on two cores 24 seconds instead of one.
    with threadpool_limits(1):
        tsne = TSNE(perplexity=perplexity, init="pca", random_state=seed)
        return rows, tsne.fit_transform(scaled)


def class_plane(train: np.ndarray, train_labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Places test features [m, C] on the plane that keeps the classes of training features apart.

    Linear discriminant analysis of training features [n, C], of at least three classes, with
    Ledoit–Wolf shrinkage; the test items have no part in choosing the plane. Returns float [m, 2].
    """
    plane = LinearDiscriminantAnalysis(solver="eigen", shrinkage="auto", n_components=2)
    with threadpool_limits(1):
        return make_pipeline(StandardScaler(), plane).fit(train, train_labels).transform(test)


def lead(view: Mapping[str, Any], modalities: str) -> str:
    """Returns the first paragraph: encoders of the run, and accuracies of their probes."""
    whom = {"audio_visual": "Two encoders", "video": "A video encoder", "audio": "An audio encoder"}
    sentences = [f"{whom[modalities]} learned from unlabelled videos."]
    for probe, scores in view["probe"].items():
        label, modality = probe.rsplit("_from_", 1)
        shares = {name: as_text(value, digits=0) for name, value in scores.items()}
        sentence = (
            f"A linear classifier reads <b>{text(label)}</b> from the pretrained {modality} "
            f"encoder on {shares['pretrained']} of the test videos, from a random one on "
            f"{shares['random']}"
        )
        if "supervised" in shares:
            sentence += f", from one trained with labels on {shares['supervised']}"
        sentences.append(sentence + ".")
    return " ".join(sentences)


def probe_section(
    view: Mapping[str, Any],
    probes: Mapping[str, Measured],
    class_names: Mapping[str, Sequence[str]],
) -> str:
    """Returns the section of the linear probes; "" without any."""
    best = "best trivial statistic"
    colours = {best: "#b3bac2", "random": GREY, "pretrained": BLUE, "supervised": GREEN}
    groups, chances, confusions, rows = {}, {}, {}, []
    for probe, scores in view["probe"].items():
        label, modality = probe.rsplit("_from_", 1)
        title, trivial = f"{label}, from {modality}", view["trivial"][probe]
        bars = {best: max(trivial.values())} | scores
        groups[title] = {name: bars[name] for name in colours if name in bars}
        chances[title] = scores["chance"]
        rows.append([title, *(as_text(value, digits=0) for value in trivial.values())])
        confusion = probes[probe].details["confusion"]
        confusions[f"{title}, pretrained"] = confusion, class_names[label]
    if not rows:
        return ""
    return section(
        "Linear probes",
        "Accuracy on frozen features. The further <b>pretrained</b> stands above "
        "<b>random</b> towards <b>supervised</b>, the more of the label was learned without any "
        "label.",
        charts.bar_chart(groups, name="probes", colours=colours, chances=chances),
        "<h3>The same probes on mere statistics of the views</h3>",
        table(["", *(name.replace("_", " ") for name in trivial)], rows),
        "<h3>Confusion: rows are true classes, columns predicted ones, in % of the row</h3>",
        matrices(confusions),
    )


def temporal_section(view: Mapping[str, Any], speeds: Sequence[int]) -> str:
    """Returns the section of the temporal tasks; "" without any."""
    colours = {"held-out views": BLUE, "null control: stationary noise": GREY}
    groups, chances, warnings = {}, {}, []
    for task, scores in view["temporal"].items():
        bars, chance = [scores["accuracy"]], scores["chance"]
        if (null := scores.get("null_accuracy")) is not None:
            bars.append(null)
            if abs(null - chance) > NULL_TOLERANCE:
                warnings.append(
                    f"{TASKS[task].title}: on noise, where nothing can be known, a network reaches "
                    f"{as_text(null)} (chance {as_text(chance, digits=0)}). The rendering leaks "
                    "the label."
                )
        title = TASKS[task].title.replace(", ", ",\n")
        groups[title], chances[title] = dict(zip(colours, bars, strict=False)), chance
    if not groups:
        return ""
    if skipped := view["null_control"].get("skipped"):
        warnings.append(f"No null control: {skipped}")
    return section(
        "Temporal tasks",
        f"Playback speed ({', '.join(TASKS['speed_video'].classes(speeds))}), playback direction, "
        "and the order of two clips, judged on views of test videos. The null control is a network "
        "trained and tested on noise: it has to stay at chance, or the answer would be a trace of "
        "the rendering.",
        charts.bar_chart(groups, name="temporal", colours=colours, chances=chances),
        *(f'<p class="note">{text(warning)}</p>' for warning in warnings),
    )


def retrieval_section(retrieval: Mapping[str, Mapping[str, float]], searches: str) -> str:
    """Returns the section of R@K and examples; "" without any metric."""
    if not retrieval:
        return ""
    names = set.intersection(*(set(scores) for scores in retrieval.values()))
    ks = sorted(int(name[1:]) for name in names if name[0] == "r" and name[1:].isdigit())
    rows = []
    for direction, scores in retrieval.items():
        cells = [(scores[f"r{k}"], scores[f"chance_r{k}"]) for k in ks]
        rows.append(
            [
                direction.replace("_to_", " → "),
                *(f"{as_text(value)} ({times_chance(value, chance)})" for value, chance in cells),
                f"{scores['median_rank']:g} of {scores['gallery']}",
            ]
        )
    return section(
        "Finding the other half of a video",
        "The query is one half of a test video; the other halves of all test videos are ranked by "
        "similarity. Queries are drawn by the seed, not chosen. Input that the model was not given "
        "is dimmed, a green frame marks the same video, and a click plays a clip.",
        table(["", *(f"R@{k} (× chance)" for k in ks), "median rank"], rows),
        searches,
    )
