"""What results.json and report.html say of an evaluated run, beside what every protocol writes."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from avcl_jax import experiment
from avcl_jax.data.rendering import RenderSpec
from avcl_jax.data.usable_records import UsableRecords
from avcl_jax.evaluation.bank_exhibits import bank_searches
from avcl_jax.evaluation.exhibits import (
    Exhibits,
    class_plane,
    cross_modal_searches,
    embedding_map,
    neighbour_searches,
)
from avcl_jax.evaluation.protocol import Measured
from avcl_jax.evaluation.protocol_run import ProtocolRun
from avcl_jax.evaluation.report import render_report
from avcl_jax.evaluation.report_content import Map, Modality, ReportContent, Search
from avcl_jax.evaluation.training_curves import training_curves
from avcl_jax.evaluation.written import Stages
from avcl_jax.objectives.temporal import TASKS
from avcl_jax.training.loop import bank_start
from avcl_jax.training.metric_writer import peak_memory_gb

_FEWEST_SHOWN = 4  # records; fewer make neither a map nor neighbours


def write_summary(
    protocol_run: ProtocolRun,
    measured: Measured,
    sections: Mapping[str, Any],
    *,
    stages: Stages,
    spec: RenderSpec,
    test: UsableRecords,
    train_features: Mapping[str, np.ndarray],
    features: Mapping[str, np.ndarray],
    confusions: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """Writes results.json, outcomes.npz and the report of a run, and returns results.json.

    Args:
        protocol_run: of the evaluation.
        measured: outcomes and metrics.
        sections: of results.json, beside what every protocol writes there; times are added.
        stages: times of the evaluation.
        spec: rendering, with the spectrogram made on the host.
        test: test records.
        train_features: of the training records, as `embed.encode_all` returns them.
        features: of the test records.
        confusions: of the pretrained encoder's probes.
    """
    config, workdir = protocol_run.config, protocol_run.workdir
    metrics = _read_metrics(workdir)
    with stages("report"):
        bank = bank_searches(config, workdir, spec, step=sections["step"])
        shown = _shown(config, spec, test, train_features, features, bank)
    seconds = _preparation_seconds(config.data.directory)
    total = (seconds or 0.0) + sections["train_seconds"] + stages.total
    logged = [r["peak_memory_gb"] for r in metrics if "peak_memory_gb" in r]
    times = {
        "preparation_seconds": seconds,
        "evaluation_seconds": round(stages.total, 1),
        "total_seconds": round(total, 1),
        "peak_memory_gb": round(max([peak_memory_gb(), *logged]), 3),  # of the training too
    }

    def report(results: Mapping[str, Any]) -> str:
        return render_report(
            ReportContent(
                title=f"What was learned from {config.name}",
                results=results,
                curves=training_curves(metrics),
                bank_start=bank_start(config),
                probe_confusions={
                    name: (confusion.tolist(), _class_names(test, name))
                    for name, confusion in confusions.items()
                },
                task_classes={task: TASKS[task].classes(config.views.speeds) for task in TASKS},
                protocol=_protocol(config, results),
                run=_run(config, workdir, results, test),
                config=experiment.to_json(config),
                **shown,
            )
        )

    return protocol_run.write(measured, stages, report=report, sections={**sections, **times})


def _shown(
    config: ml_collections.ConfigDict,
    spec: RenderSpec,
    test: UsableRecords,
    train_features: Mapping[str, np.ndarray],
    features: Mapping[str, np.ndarray],
    bank: Mapping[str, Sequence[Search]],
) -> dict[str, Any]:
    """Returns searches, neighbours and maps for the report."""
    section = config.evaluation.report
    exhibits = Exhibits(
        test,
        spec,
        speed=len(config.views.speeds) // 2,  # neither an instant nor all of a video
        stills=section.stills,
    )
    rng = np.random.default_rng(config.seed)
    searches: dict[str, list[Search]] = {}
    both = np.flatnonzero(features["has_video"] & features["has_audio"])
    if len(both) and config.modalities == "audio_visual":
        chosen = np.sort(rng.choice(len(both), min(section.queries, len(both)), replace=False))
        embeddings = {m: features[f"pretrained/{m}_embeddings"][both] for m in ("video", "audio")}
        directions: tuple[tuple[Modality, Modality], ...] = (("audio", "video"), ("video", "audio"))
        for query, found in directions:
            searches[f"{query}_to_{found}"] = cross_modal_searches(
                exhibits,
                embeddings[query],
                embeddings[found],
                both,
                query_modality=query,
                found_modality=found,
                chosen=chosen.tolist(),
                results=section.results,
            )
    neighbours: dict[str, Sequence[Search]] = {}
    maps: list[Map] = []
    planes: list[list[Map]] = []
    for label, modality in config.evaluation.probes:
        known = np.flatnonzero(features[f"has_{modality}"] & (features[f"label_{label}"] >= 0))
        if len(known) < _FEWEST_SHOWN:
            continue
        own = features[f"pretrained/{modality}_features"][known]
        labels = features[f"label_{label}"][known]
        chosen = np.sort(rng.choice(len(known), min(section.queries, len(known)), replace=False))
        title, found_by_feature = neighbour_searches(
            exhibits,
            own,
            labels,
            known,
            modality=modality,
            label=label,
            chosen=chosen.tolist(),
            results=section.results,
        )
        neighbours[title] = found_by_feature
        rows, positions = embedding_map(own, seed=config.seed)
        what = {"video": "Picture", "audio": "Sound"}[modality]
        names = test.records.class_names[label]
        maps.append((f"{what}, coloured by {label}", positions, labels[rows], names))
        own_train = train_features[f"has_{modality}"] & (train_features[f"label_{label}"] >= 0)
        train_labels = train_features[f"label_{label}"][own_train]
        if len(np.unique(train_labels)) < 3:  # Two classes lie on a line.
            continue
        planes.append(
            [
                (
                    f"{what}, coloured by {label}: {network} encoder",
                    class_plane(
                        train_features[f"{network}/{modality}_features"][own_train],
                        train_labels,
                        features[f"{network}/{modality}_features"][known],
                    ),
                    labels,
                    names,
                )
                for network in ("random", "pretrained")
            ]
        )
    groups = (searches, neighbours, bank)
    every = [s for group in groups for found in group.values() for s in found]
    heard = [s.query.spectrogram.ravel() for s in every if len(s.query.spectrogram)]
    low, high = np.percentile(np.concatenate(heard), (2, 99.8)) if heard else (0.0, 1.0)
    return {
        "searches": searches,
        "neighbours": neighbours,
        "bank": bank,
        "maps": maps,
        "planes": planes,
        "spectrogram_range": (float(low), float(high)),
    }


def _class_names(test: UsableRecords, probe: str) -> list[str]:
    return test.records.class_names[probe.rsplit("_from_", 1)[0]]


def _protocol(config: ml_collections.ConfigDict, results: Mapping[str, Any]) -> list[str]:
    e = config.evaluation
    speeds = " and ".join(f"{speed}×" for speed in e.speeds)
    sentences = [
        f"Features are the encoder's output before the projection, means over "
        f"{e.views_per_speed} uniformly spaced centre-crop views at each of the speeds {speeds}; "
        "embeddings are the projection's output for the same views, one after another.",
        f"Probes: features standardised by the training videos, multinomial logistic regression, "
        f"C among {tuple(e.probe.costs)} chosen by {e.probe.folds}-fold cross-validation of the "
        "training videos alone, one look at the test videos.",
        "Retrieval: all test videos with picture and sound, by the cosine of embeddings, that "
        "is, the mean similarity of views of the same times; a tie counts against the right one.",
        f"Temporal tasks: {e.pairs_per_video} pairs of views of each test video, drawn as in "
        "training, cropped in the centre; an equal number of each class is scored, so chance is "
        "exact.",
    ]
    for name, fit in results["supervised"].items():
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
    if "views" in results["null_control"]:
        sentences.append(
            f"Null controls: encoders of the same shape trained on speed and direction of "
            f"stationary noise ({e.null.train_views} rendered views of each video at each speed in "
            f"each direction), tested on {results['null_control']['views']} views of "
            "other noise."
        )
    return sentences


def _run(
    config: ml_collections.ConfigDict,
    workdir: epath.Path,
    results: Mapping[str, Any],
    test: UsableRecords,
) -> dict[str, object]:
    minutes = {
        name: f"{results[f'{name}_seconds'] / 60:.1f} minutes"
        for name in ("preparation", "train", "evaluation")
        if results[f"{name}_seconds"] is not None
    }
    return {
        "working directory": workdir,
        "configuration": config.name,
        "test records": test.fingerprint,
        "test videos": len(test),
        "seed": config.seed,
        "steps": f"{results['step']} of {config.steps}",
        "batch": f"{config.global_batch_size} videos × 2 views",
        "time": ", ".join(f"{name} {value}" for name, value in minutes.items()),
        "peak memory": f"{results['peak_memory_gb']:.2f} GB",
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, "
        f"{jax.device_count()} × {jax.devices()[0].device_kind}",
    }


def _preparation_seconds(directory: epath.PathLike) -> float | None:
    """Returns how long the records took to make; None where their maker did not say.

    `data_prep demo` notes the media and the records it made beside them, `data_prep prepare` the
    records alone.
    """
    directory = epath.Path(directory)
    demo, prepared = directory.parent / "seconds.json", directory / "preparation.json"
    if demo.exists():
        return round(sum(json.loads(demo.read_text()).values()), 1)
    return json.loads(prepared.read_text())["seconds"] if prepared.exists() else None


def _read_metrics(workdir: epath.Path) -> list[dict[str, Any]]:
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
