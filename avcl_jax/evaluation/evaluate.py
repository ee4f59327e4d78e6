"""Evaluation of a pretraining run: probes, retrieval, temporal tasks and null controls.

python -m avcl_jax.main --config=configs/evaluate.py --workdir=RUN
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from avcl_jax import experiment
from avcl_jax.batched import cache_key, render_all
from avcl_jax.data.augment import standardize, to_unit_range
from avcl_jax.data.rendering import RenderSpec
from avcl_jax.data.selection import SelectedRecords, UsableRecords
from avcl_jax.data.views import FORWARD
from avcl_jax.encoder_source import random_like, variables_digest
from avcl_jax.evaluation.driver import Context, run_protocol
from avcl_jax.evaluation.evaluated_run import (
    EvaluationRecords,
    open_evaluated_run,
    probe_name,
)
from avcl_jax.evaluation.linear import ProbeResult, linear_probe
from avcl_jax.evaluation.protocol import Measured, Metric, Outcomes, Protocol, finite
from avcl_jax.evaluation.retrieval import RetrievalScores, cross_modal_scores, rank_outcomes
from avcl_jax.evaluation.run_report import run_report, seconds_of_run
from avcl_jax.evaluation.splits import Split, Trial
from avcl_jax.evaluation.statistics import gap_closed
from avcl_jax.evaluation.supervised import (
    Fit,
    FitSpec,
    NullControl,
    Prepare,
    fit_classifier,
    null_control,
    render_null_views,
)
from avcl_jax.evaluation.temporal import TaskScore, score_tasks, task_logits, task_outcomes
from avcl_jax.evaluation.views import (
    MODALITY_INPUTS,
    PretrainedRun,
    random_views,
    view_features,
    view_map,
)
from avcl_jax.paths import absolute_path

PROTOCOL = Protocol(
    name="pretraining_run",
    version=4,
    title="What a run has learned",
    definition=(),  # `run_report` has it with the numbers of the run
)
_TRIVIAL = ("mean_colour", "position_histogram", "mean_loudness", "mean_log_mel")
# Networks that are probed, in the order of the arguments of `gap_closed`.
_NETWORKS = ("random", "pretrained", "supervised")


@dataclasses.dataclass(frozen=True)
class _Computed:
    """Outputs of the networks of an evaluation.

    Attributes:
        logits: logits and labels of the temporal tasks on the test records; in process 0.
        train: features of the training records by network; in process 0, {} without probes.
        test: the same of the test records, with embeddings of the pretrained network.
        fits: supervised classifier of each probe.
    """

    logits: dict[str, np.ndarray]
    train: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    fits: dict[str, Fit]


def evaluate(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> dict[str, Any] | None:
    """Evaluates the newest checkpoint of the run in `workdir` by `configs/evaluate.py`.

    Returns as `run_protocol`; the results are written into `workdir`.

    Raises:
        ExportError: if `workdir` does not contain a pretraining run.
        UserError: if settings do not fit the run or its records, test records were pretrained on,
            or the directory has results of another protocol.
    """
    run, records = open_evaluated_run(config, absolute_path(workdir))
    return run_protocol(
        PROTOCOL,
        run.config,
        workdir,
        [
            Trial("run", run.source, records.test)
            if records.train is None
            else Split("run", run.source, records.test, records.train)
        ],
        compute=functools.partial(_compute, run, records),
        measure=functools.partial(_measure, run, records),
        heads=run.heads,
        in_training=True,
    )


def _compute(run: PretrainedRun, records: EvaluationRecords, context: Context) -> _Computed:
    section, seed = run.config.evaluation, run.config.seed
    with context.stages("temporal tasks"):
        logits = task_logits(
            run,
            records.test,
            context.directory / cache_key(context.fingerprint) / "temporal",
            pairs=section.pairs_per_video,
            seed=seed,
            chunk=section.chunk,
            threads=section.threads,
            part_records=section.part_records,
        )
    random = {m: e.params for m, e in random_like(run.source, seed).encoders.items()}
    networks = {"random": _with_encoders(run.variables, random), "pretrained": run.variables}
    fits: dict[str, Fit] = {}
    if section.supervised.enabled and records.train is not None:
        with context.stages("supervised encoders"):
            fits = _supervised(run, records, records.train)
        networks |= _supervised_networks(run, fits)
    with context.stages("features"):
        directory = context.directory / cache_key(context.fingerprint, variables_digest(networks))
        compute = view_map(run, networks, section.chunk, section.threads)
        log_mel = run.spec.log_mel

        def statistics(arrays: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
            decibels = arrays["spectrogram"] * log_mel.std + log_mel.mean
            return trivial_statistics(arrays["video"], decibels, cells=section.position_cells)

        def features(role: str, source: UsableRecords) -> dict[str, np.ndarray]:
            return view_features(
                compute,
                source,
                run.spec,
                speeds=records.speeds,
                views_per_speed=section.views_per_speed,
                directory=directory / role,
                part_records=section.part_records,
                describe_views=statistics,
                keep=lambda name: (
                    not name.endswith("_embeddings")
                    or (role == "test" and name.startswith("pretrained/"))
                ),
            )

        train = {} if records.train is None else features("train", records.train)
        return _Computed(logits, train, features("test", records.test), fits)


def _measure(
    run: PretrainedRun, records: EvaluationRecords, context: Context, computed: _Computed
) -> Measured:
    config, section, stages = run.config, run.config.evaluation, context.stages
    with stages("probes"):
        probes, trivial = _probes(run.config, records.test, computed.train, computed.test)
    with stages("retrieval"):
        ranked = cross_modal_scores(computed.test, "pretrained", tuple(section.recall_at))
    with stages("temporal scores"):
        scores = score_tasks(computed.logits, config.seed)
    null: NullControl | None = None
    if records.null is not None:
        with stages("null controls"):
            section = run.config.evaluation
            null = noise_control(
                run.config, section.null, run.spec, *records.null, threads=section.threads
            )
    view = _view(run, computed.fits, probes, trivial, ranked, scores, null)
    with stages("report"):
        report = run_report(
            run,
            records,
            context.workdir,
            view,
            train=computed.train,
            test=computed.test,
            confusions={name: by["pretrained"].confusion for name, by in probes.items()},
        )
    costs = {name: {n: probe.cost for n, probe in by.items()} for name, by in probes.items()}
    outcomes, metrics = run_outcomes(records.test, computed.test, probes, ranked, scores)
    return Measured(
        outcomes,
        metrics,
        details={"probe_costs": costs},
        view=view | seconds_of_run(run, context.workdir, stages.total),
        **report,
    )


def _view(
    run: PretrainedRun,
    fits: Mapping[str, Fit],
    probes: Mapping[str, Mapping[str, ProbeResult]],
    trivial: Mapping[str, Mapping[str, float]],
    ranked: Mapping[str, RetrievalScores],
    scores: Mapping[str, TaskScore],
    null: NullControl | None,
) -> dict[str, Any]:
    """Returns the metrics under the keys of a run's results.json: `probe`, `retrieval`, …"""
    temporal: dict[str, dict[str, Any]] = {
        task: {
            "accuracy": score.accuracy,
            "chance": score.chance,
            "confusion": score.confusion.tolist(),
        }
        for task, score in scores.items()
    }
    null_summary: dict[str, Any] = {
        "skipped": "it needs records of noise, named by --config.evaluation.null.train_split"
    }
    if null is not None:
        for task, score in null.scores.items():
            temporal[task]["null_accuracy"] = score.accuracy
        null_summary = {"views": null.views, "train_loss": null.train_loss}
    return {
        "probe": {name: _probe_view(by_network) for name, by_network in probes.items()},
        "trivial": trivial,
        "retrieval": {
            direction: {
                **{f"r{k}": found.recall(k) for k in found.chance},
                **{f"chance_r{k}": chance for k, chance in found.chance.items()},
                "median_rank": float(np.median(found.ranks)),
                "chance_median_rank": (found.gallery + 1) / 2,
                "chance": found.chance[1],
                "queries": len(found.ranks),
                "gallery": found.gallery,
            }
            for direction, found in ranked.items()
        },
        "temporal": temporal,
        "null_control": null_summary,
        "supervised": {
            name: {"stopped": f.stopped, "epochs": len(f.losses), "train_loss": f.losses[-1]}
            for name, f in fits.items()
        },
        "step": run.step,
    }


def _probe_view(by_network: Mapping[str, ProbeResult]) -> dict[str, float | None]:
    view: dict[str, float | None] = {name: probe.accuracy for name, probe in by_network.items()}
    if "supervised" in by_network:
        view["gap_closed"] = finite(gap_closed(*(by_network[n].accuracy for n in _NETWORKS)))
    return view | {"chance": by_network["pretrained"].chance}


def _with_encoders(variables: Mapping[str, Any], encoders: Mapping[str, Any]) -> dict[str, Any]:
    """Returns variables of the joint model with its encoders replaced by those in `encoders`."""
    replaced = {kind: dict(tree) for kind, tree in variables.items()}
    for modality, encoder in encoders.items():
        for kind, tree in encoder.items():
            replaced[kind][f"{modality}_encoder"] = tree
    return replaced


def _pixels(video: Any, *, mean: float, std: float) -> jax.Array:
    return standardize(to_unit_range(video), mean, std)


def _prepare(config: ml_collections.ConfigDict) -> dict[str, Prepare]:
    pixels = functools.partial(_pixels, mean=config.pixels.mean, std=config.pixels.std)
    return {"video": pixels, "audio": jnp.asarray}


def _encoders(config: ml_collections.ConfigDict) -> dict[str, Any]:
    encoders: dict[str, Any] = {}
    if config.modalities != "audio":
        encoders["video"] = experiment.video_encoder(config)
    if config.modalities != "video":
        encoders["audio"] = experiment.audio_encoder(config)
    return encoders


def _supervised(
    run: PretrainedRun, records: EvaluationRecords, train: UsableRecords
) -> dict[str, Fit]:
    """Returns a supervised classifier for each probe, by the probe's name."""
    config = run.config
    fits = {}
    for label, modality in config.evaluation.probes:
        section = config.evaluation.supervised[modality]
        render = functools.partial(
            random_views,
            train,
            spec=run.spec,
            speeds=records.speeds,
            directions=(FORWARD,),
            views=section.views,
            seed=config.seed,
            modalities=(modality,),
        )
        arrays = render_all(render, range(len(train)), threads=config.evaluation.threads)
        known = (arrays[f"label_{label}"] >= 0) & arrays[f"has_{modality}"]
        labels = arrays[f"label_{label}"][known]
        fits[probe_name(label, modality)] = fit_classifier(
            _encoders(config)[modality],
            arrays[MODALITY_INPUTS[modality]][known],
            {label: np.repeat(labels[:, None], section.views, axis=1)},
            classes={label: len(train.records.class_names[label])},
            prepare=_prepare(config)[modality],
            spec=FitSpec(**section.fit),
            seed=config.seed,
        )
    return fits


def _network_of_probes(config: ml_collections.ConfigDict) -> dict[str, str]:
    """Returns the name of the supervised network of each probe.

    The n-th network has the encoders of the n-th probe of each modality, so that probes of
    different modalities share a forward pass.
    """
    names, counts = {}, collections.Counter[str]()
    for label, modality in config.evaluation.probes:
        names[probe_name(label, modality)] = f"supervised{counts[modality]}"
        counts[modality] += 1
    return names


def _supervised_networks(run: PretrainedRun, fits: Mapping[str, Fit]) -> dict[str, Any]:
    """Returns variables of the joint model with supervised encoders, by the network's name."""
    encoders: dict[str, dict[str, Any]] = collections.defaultdict(dict)
    names = _network_of_probes(run.config)
    for label, modality in run.config.evaluation.probes:
        probe = probe_name(label, modality)
        encoders[names[probe]][modality] = fits[probe].encoder_variables
    # Every process trained the same networks, but rounding may differ between them.
    encoders = multihost_utils.broadcast_one_to_all(jax.device_get(dict(encoders)))
    return {name: _with_encoders(run.variables, trained) for name, trained in encoders.items()}


def _probes(
    config: ml_collections.ConfigDict,
    records: UsableRecords,
    train: Mapping[str, np.ndarray],
    test: Mapping[str, np.ndarray],
) -> tuple[dict[str, dict[str, ProbeResult]], dict[str, dict[str, float]]]:
    """Returns the probes of every network, and those of trivial statistics, by probe."""
    section = config.evaluation
    probes, trivial = {}, {}
    for label, modality in section.probes:

        def probe(name: str, modality: str = modality, label: str = label) -> ProbeResult:
            chosen = [split[f"has_{modality}"] for split in (train, test)]
            return linear_probe(
                train[name][chosen[0]],
                train[f"label_{label}"][chosen[0]],
                test[name][chosen[1]],
                test[f"label_{label}"][chosen[1]],
                train_sources=train["source_id"][chosen[0]],
                classes=len(records.records.class_names[label]),
                seed=config.seed,
                **section.probe,
            )

        name = probe_name(label, modality)
        networks = {"random": "random", "pretrained": "pretrained"}
        if section.supervised.enabled:
            networks["supervised"] = _network_of_probes(config)[name]
        probes[name] = {n: probe(f"{key}/{modality}_features") for n, key in networks.items()}
        trivial[name] = {statistic: probe(statistic).accuracy for statistic in _TRIVIAL}
    return probes, trivial


def noise_control(
    config: ml_collections.ConfigDict,
    section: ml_collections.ConfigDict,
    spec: RenderSpec,
    train: UsableRecords,
    test: UsableRecords,
    *,
    threads: int,
) -> NullControl:
    """Runs the null controls of a rendering on records of stationary noise.

    Args:
        config: config of a pretraining run.
        section: settings, `evaluation.null` of `configs/evaluate.py`.
        spec: rendering under test.
        train: records that the networks are trained on.
        test: records that they are tested on.
        threads: records rendered at a time.
    """
    combinations = 2 * len(config.views.speeds)  # of direction and speed
    rendered = [
        render_null_views(
            records,
            spec,
            views=views * combinations,
            seed=config.seed + number,
            threads=threads,
        )
        for number, (records, views) in enumerate(
            ((train, section.train_views), (test, section.test_views))
        )
    ]
    return null_control(
        *rendered,
        encoders=_encoders(config),
        prepare=_prepare(config),
        num_speeds=len(config.views.speeds),
        spec=FitSpec(**section.fit),
        seed=config.seed,
    )


def run_outcomes(
    test: SelectedRecords,
    features: Mapping[str, np.ndarray],
    probes: Mapping[str, Mapping[str, ProbeResult]],
    ranked: Mapping[str, RetrievalScores],
    temporal: Mapping[str, TaskScore],
) -> tuple[Outcomes, dict[str, Metric]]:
    """Returns outcomes by test record, and the metrics of probes, retrieval and temporal tasks.

    Args:
        test: test records.
        features: outputs of `view_features` for them.
        probes: probes by LABEL_from_MODALITY and network.
        ranked: ranks by direction.
        temporal: scores by task.
    """
    values: dict[str, np.ndarray] = {}
    metrics: dict[str, Metric] = {}
    for probe, by_network in probes.items():
        shown = features[f"has_{probe.rsplit('_from_', 1)[1]}"]
        for network, result in by_network.items():
            known = np.zeros(len(test), bool)
            known[shown] = result.known
            values[f"known_{probe}"] = known
            name = f"{probe}_{network}"
            values[f"correct_{name}"] = _of_all(result.correct, known)
            metrics[name] = Metric(
                "mean",
                (f"correct_{name}",),
                f"{probe.replace('_', ' ')}, {network} encoder",
                chance=result.chance,
                chosen=f"known_{probe}",
            )
        if all(network in by_network for network in _NETWORKS):
            metrics[f"{probe}_gap_closed"] = Metric(
                "gap_closed",
                [f"correct_{probe}_{network}" for network in _NETWORKS],
                f"{probe.replace('_', ' ')}, gap closed",
                headline=True,
                chosen=f"known_{probe}",
            )
    if ranked:
        both = features["has_video"] & features["has_audio"]
        values["has_both"] = both
        of_ranked, rank_metrics = rank_outcomes(ranked)
        values |= {name: _of_all(array, both) for name, array in of_ranked.items()}
        metrics |= {
            name: dataclasses.replace(metric, chosen="has_both")
            for name, metric in rank_metrics.items()
        }
    of_tasks, task_metrics = task_outcomes(temporal, len(test))
    outcomes = Outcomes(test.record_ids, test.sources, values | of_tasks)
    return outcomes, metrics | task_metrics


def _of_all(values: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Scatters the values of some records into zeros; the others are masked by `chosen`."""
    whole = np.zeros(len(where), values.dtype)
    whole[where] = values
    return whole


def trivial_statistics(
    video: np.ndarray, log_mel: np.ndarray, *, cells: int
) -> Mapping[str, np.ndarray]:
    """Describes views by statistics that know nothing of motion or of fine structure.

    Args:
        video: uint8 [V, T, H, W, 3], the views of one record.
        log_mel: float [V, F, M], natural logarithm of the mel power under each view.
        cells: frames are divided into cells × cells for the histogram of position.

    Returns:
        mean_colour [3]; position_histogram [cells²], the share of all change between frames that
        falls into each cell; mean_loudness [1], dB of the mel power; mean_log_mel [M]. All are
        averaged over the views.
    """
    colour = video.reshape(-1, 3).mean(axis=0) / 255.0
    change = np.abs(np.diff(video.astype(np.float32).mean(axis=-1), axis=1)).mean(axis=(0, 1))
    rows = np.array_split(np.arange(change.shape[0]), cells)
    columns = np.array_split(np.arange(change.shape[1]), cells)
    histogram = np.array([change[np.ix_(r, c)].sum() for r in rows for c in columns])
    power = np.exp(log_mel.astype(np.float64)).sum(axis=-1).mean(axis=-1)
    return {
        "mean_colour": colour,
        "position_histogram": histogram / max(float(histogram.sum()), 1e-6),
        "mean_loudness": 10.0 * np.log10(power).mean(keepdims=True),
        "mean_log_mel": log_mel.mean(axis=(0, 1)),
    }
