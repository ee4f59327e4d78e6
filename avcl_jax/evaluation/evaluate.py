"""Evaluation of a pretraining run: probes, retrieval, temporal tasks and null controls.

python -m avcl_jax.main --config=configs/evaluate.py --workdir=RUN
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Mapping, Sequence
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
from avcl_jax.data.selection import UsableRecords
from avcl_jax.data.views import FORWARD
from avcl_jax.evaluation.driver import Context, run_protocol
from avcl_jax.evaluation.evaluated_run import EvaluationRecords, open_evaluated_run, probe_name
from avcl_jax.evaluation.linear import fit_probe, held_out_groups
from avcl_jax.evaluation.protocol import (
    Measured,
    Metric,
    Outcomes,
    Protocol,
    merge,
    point_values,
)
from avcl_jax.evaluation.retrieval import DIRECTIONS, measure_cross_modal
from avcl_jax.evaluation.run_report import run_report, seconds_of_run
from avcl_jax.evaluation.splits import Split, Trial
from avcl_jax.evaluation.statistics import confusion_matrix, top_k_hits
from avcl_jax.evaluation.supervised import (
    Fit,
    FitSpec,
    NullControl,
    fit_classifier,
    null_control,
    render_null_views,
)
from avcl_jax.evaluation.temporal import measure_tasks, task_logits
from avcl_jax.evaluation.views import (
    MODALITY_INPUTS,
    PretrainedRun,
    random_views,
    view_features,
    view_map,
)
from avcl_jax.export.runs import random_like, variables_digest
from avcl_jax.paths import absolute_path

PROTOCOL = Protocol(
    name="pretraining_run",
    version=5,
    title="What a run has learned",
    definition=(
        "Features are the encoder's output before the projection, means over "
        "evaluation.clips uniformly spaced centre-crop views at each of "
        "evaluation.speeds; embeddings are the projection's output for the same views, one after "
        "another.",
        "Probes: features standardised by the training videos, multinomial logistic regression, C "
        "chosen by cross-validation of the training videos alone, one look at the test videos.",
        "Supervised encoders: same shape, trained from scratch with a linear head on random views "
        "of the training videos by evaluation.supervised, and probed like the others. The number "
        "of epochs is fixed; in the last of them the learning rate falls to zero.",
        "Retrieval: all test videos with video and audio, by the cosine of embeddings, that is, "
        "the mean similarity of views of the same times; a tie counts against the correct one.",
        "Temporal tasks: evaluation.pairs_per_video pairs of views of each test video, drawn as in "
        "training, cropped in the centre; an equal number of each class is scored, so chance is "
        "exact.",
        "Null controls: encoders of the same shape trained on speed and direction of stationary "
        "noise, by evaluation.null, and tested on other noise.",
    ),
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
    section, execution, seed = run.config.evaluation, run.config.execution, run.config.seed
    with context.stages("temporal tasks"):
        logits = task_logits(
            run,
            records.test,
            context.directory / cache_key(context.fingerprint) / "temporal",
            pairs=section.pairs_per_video,
            seed=seed,
            chunk=execution.chunk,
            threads=execution.threads,
            part_records=execution.part_records,
        )
    random = {m: e.params for m, e in random_like(run.source, seed).encoders.items()}
    networks = {"random": _with_encoders(run.variables, random), "pretrained": run.variables}
    fits: dict[str, Fit] = {}
    if section.supervised.enabled and records.train is not None:
        with context.stages("supervised encoders"):
            fits = {
                probe_name(*probe): _supervised(run, records, records.train, *probe)
                for probe in section.probes
            }
        networks |= _supervised_networks(run, fits)
    with context.stages("features"):
        directory = context.directory / cache_key(context.fingerprint, variables_digest(networks))
        compute = view_map(run, networks, execution.chunk, execution.threads)
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
                views_per_speed=section.clips,
                directory=directory / role,
                part_records=execution.part_records,
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
    test, features = records.test, computed.test
    with stages("probes"):
        probes = {
            probe_name(*probe): measure_probe(config, test, computed.train, features, *probe)
            for probe in section.probes
        }
    with stages("retrieval"):
        ranks = measure_cross_modal(test, features, "pretrained", tuple(section.recall_at))
    with stages("temporal scores"):
        tasks = measure_tasks(run, test, computed.logits, config.seed)
    null: NullControl | None = None
    if records.null is not None:
        with stages("null controls"):
            null = noise_control(
                config, section.null, run.spec, *records.null, threads=config.execution.threads
            )
    by_mask = {f"known_{name}": probe for name, probe in probes.items()}
    outcomes, metrics = merge(
        test.record_ids, test.sources, {**by_mask, "has_both": ranks, "": tasks}
    )
    view = _view(run, Measured(outcomes, metrics), probes, tasks, computed.fits, null)
    with stages("report"):
        report = run_report(
            run,
            records,
            context.workdir,
            view,
            train=computed.train,
            test=features,
            probes=probes,
            tasks=tasks,
        )
    return Measured(
        outcomes,
        metrics,
        details={"probe_costs": {name: probe.details["costs"] for name, probe in probes.items()}},
        view=view | seconds_of_run(run, context.workdir, stages.total),
        **report,
    )


def _view(
    run: PretrainedRun,
    measured: Measured,
    probes: Mapping[str, Measured],
    tasks: Measured,
    fits: Mapping[str, Fit],
    null: NullControl | None,
) -> dict[str, Any]:
    """Returns the metrics under the keys of a run's results.json: `probe`, `retrieval`, …"""
    values, metrics = point_values(measured), measured.metrics
    kinds = (*_NETWORKS, "gap_closed")
    retrieval: dict[str, dict[str, Any]] = {}
    for name in metrics:
        direction, _, key = name.rpartition("_r")
        if direction in DIRECTIONS:
            retrieval.setdefault(direction, {})[f"r{key}"] = values[name]
            retrieval[direction][f"chance_r{key}"] = metrics[name].chance
    for direction, of_direction in retrieval.items():
        rank = f"{direction}_median_rank"
        of_direction |= {"median_rank": values[rank], "chance_median_rank": metrics[rank].chance}
        of_direction["chance"] = of_direction["chance_r1"]
        gallery = int(measured.outcomes.values["has_both"].sum())
        of_direction |= {"queries": gallery, "gallery": gallery}
    temporal = {
        task: {"accuracy": values[task], "chance": metrics[task].chance, "confusion": confusion}
        for task, confusion in tasks.details["confusion"].items()
    }
    null_summary: dict[str, Any] = {
        "skipped": "it needs records of noise, named by --config.evaluation.null.train_split"
    }
    if null is not None:
        for task, score in null.scores.items():
            temporal[task]["null_accuracy"] = score.accuracy
        null_summary = {"views": null.views, "train_loss": null.train_loss}
    return {
        "probe": {
            name: {k: values[f"{name}_{k}"] for k in kinds if f"{name}_{k}" in values}
            | {"chance": metrics[f"{name}_pretrained"].chance}
            for name in probes
        },
        "trivial": {name: probe.details["trivial"] for name, probe in probes.items()},
        "retrieval": retrieval,
        "temporal": temporal,
        "null_control": null_summary,
        "supervised": {
            name: {"epochs": len(fit.losses), "train_loss": fit.losses[-1]}
            for name, fit in fits.items()
        },
        "step": run.step,
    }


def _with_encoders(variables: Mapping[str, Any], encoders: Mapping[str, Any]) -> dict[str, Any]:
    """Returns variables of the joint model with its encoders replaced by those in `encoders`."""
    replaced = {kind: dict(tree) for kind, tree in variables.items()}
    for modality, encoder in encoders.items():
        for kind, tree in encoder.items():
            replaced[kind][f"{modality}_encoder"] = tree
    return replaced


def _prepare(config: ml_collections.ConfigDict) -> dict[str, Any]:
    mean, std = config.pixels.mean, config.pixels.std
    return {
        "video": lambda video: standardize(to_unit_range(video), mean, std),
        "audio": jnp.asarray,
    }


def _encoders(config: ml_collections.ConfigDict) -> dict[str, Any]:
    makers = {"video": experiment.video_encoder, "audio": experiment.audio_encoder}
    trained = ("video", "audio") if config.modalities == "audio_visual" else (config.modalities,)
    return {modality: makers[modality](config) for modality in trained}


def _supervised(
    run: PretrainedRun,
    records: EvaluationRecords,
    train: UsableRecords,
    label: str,
    modality: str,
) -> Fit:
    """Trains the supervised classifier of a probe."""
    config, section = run.config, run.config.evaluation.supervised[modality]
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
    arrays = render_all(render, range(len(train)), threads=config.execution.threads)
    known = (arrays[f"label_{label}"] >= 0) & arrays[f"has_{modality}"]
    labels = arrays[f"label_{label}"][known]
    return fit_classifier(
        _encoders(config)[modality],
        arrays[MODALITY_INPUTS[modality]][known],
        {label: np.repeat(labels[:, None], section.views, axis=1)},
        classes={label: len(train.records.class_names[label])},
        prepare=_prepare(config)[modality],
        spec=FitSpec(**section.fit),
        seed=config.seed,
    )


def _network_of(probes: Sequence[tuple[str, str]], label: str, modality: str) -> str:
    """Returns the name of the network with the supervised encoder of a probe.

    The n-th network has the encoders of the n-th probe of each modality, so that probes of
    different modalities share a forward pass.
    """
    return f"supervised{[each for each, of in probes if of == modality].index(label)}"


def _supervised_networks(run: PretrainedRun, fits: Mapping[str, Fit]) -> dict[str, Any]:
    """Returns variables of the joint model with supervised encoders, by the network's name."""
    probes = run.config.evaluation.probes
    encoders: dict[str, dict[str, Any]] = collections.defaultdict(dict)
    for label, modality in probes:
        fit = fits[probe_name(label, modality)]
        encoders[_network_of(probes, label, modality)][modality] = fit.encoder_variables
    # Every process trained the same networks, but rounding may differ between them.
    encoders = multihost_utils.broadcast_one_to_all(jax.device_get(dict(encoders)))
    return {name: _with_encoders(run.variables, trained) for name, trained in encoders.items()}


def measure_probe(
    config: ml_collections.ConfigDict,
    records: UsableRecords,
    train: Mapping[str, np.ndarray],
    test: Mapping[str, np.ndarray],
    label: str,
    modality: str,
) -> Measured:
    """Probes every network, and trivial statistics, for a label.

    Args:
        config: config of the run with the sections of its evaluation.
        records: test records.
        train: outputs of `view_features` for the training records.
        test: the same for the test records.
    """
    section, name = config.evaluation, probe_name(label, modality)
    title, classes = name.replace("_", " "), len(records.records.class_names[label])
    rows = [
        np.flatnonzero(side[f"has_{modality}"] & (side[f"label_{label}"] >= 0))
        for side in (train, test)
    ]
    targets, labels = (
        side[f"label_{label}"][r] for side, r in zip((train, test), rows, strict=True)
    )
    settings = section.probe.to_dict()
    folds = settings.pop("folds")
    groups = held_out_groups(targets, train["source_id"][rows[0]], folds=folds, seed=config.seed)

    def probe(features: str) -> tuple[float, np.ndarray]:
        """Returns C, and scores of the test records."""
        found = fit_probe(
            train[features][rows[0]],
            targets,
            groups,
            classes=classes,
            classifier="logistic",
            **settings,
        )
        return found.cost, found.scores(test[features][rows[1]])

    networks = {"random": "random", "pretrained": "pretrained"}
    if section.supervised.enabled:
        networks["supervised"] = _network_of(section.probes, label, modality)
    probes = {n: probe(f"{key}/{modality}_features") for n, key in networks.items()}
    metrics = {
        f"{name}_{network}": Metric(
            "mean",
            (f"correct_{name}_{network}",),
            f"{title}, {network} encoder",
            chance=1 / classes,
        )
        for network in probes
    }
    if section.supervised.enabled:
        inputs = [f"correct_{name}_{network}" for network in _NETWORKS]
        metrics[f"{name}_gap_closed"] = Metric(
            "gap_closed", inputs, f"{title}, gap closed", headline=True
        )
    predicted = probes["pretrained"][1].argmax(axis=1)
    return Measured(
        Outcomes(
            [records.record_ids[row] for row in rows[1]],
            [records.sources[row] for row in rows[1]],
            {
                f"correct_{name}_{n}": top_k_hits(scores, labels, 1)
                for n, (_, scores) in probes.items()
            },
        ),
        metrics,
        details={
            "confusion": confusion_matrix(labels, predicted, classes),
            "costs": {network: cost for network, (cost, _) in probes.items()},
            "trivial": {s: float(top_k_hits(probe(s)[1], labels, 1).mean()) for s in _TRIVIAL},
        },
    )


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
