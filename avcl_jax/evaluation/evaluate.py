"""Evaluation of a pretraining run: probes, retrieval, temporal tasks and null controls.

python -m avcl_jax.main --config=configs/evaluate.py --workdir=RUN
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from sklearn.metrics import confusion_matrix

from avcl_jax.batched import Arrays, render_all
from avcl_jax.data.records import RecordDataset, RecordError
from avcl_jax.data.selection import Selection, UsableRecords, single_classes
from avcl_jax.data.views import FORWARD
from avcl_jax.errors import UserError
from avcl_jax.evaluation.classifier import Fit, fit_classifier
from avcl_jax.evaluation.driver import Context, run_protocol
from avcl_jax.evaluation.linear import check_sources, fit_probe, held_out_groups
from avcl_jax.evaluation.protocol import Measured, Metric, Outcomes, Protocol, merge, point_values
from avcl_jax.evaluation.retrieval import DIRECTIONS, check_recall_at, measure_cross_modal
from avcl_jax.evaluation.run_report import run_report, seconds_of_run
from avcl_jax.evaluation.splits import Split, Trial
from avcl_jax.evaluation.statistics import top_k_hits
from avcl_jax.evaluation.temporal import NullControl, measure_tasks, noise_control, task_logits
from avcl_jax.evaluation.views import (
    MODALITY_INPUTS,
    PretrainedRun,
    encode,
    fixed_views,
    host_render_spec,
    random_views,
    speed_indices,
)
from avcl_jax.export.runs import config_of_run, random_like, variables_digest
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

# Logits of the temporal tasks, features by role of the records, both empty in processes other than
# the first, and the supervised classifier of each probe.
_Computed = tuple[Arrays, dict[str, dict[str, np.ndarray]], dict[str, Fit]]


def evaluate(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> dict[str, Any]:
    """Evaluates the newest checkpoint of the run in `workdir` by `configs/evaluate.py`.

    Returns as `run_protocol`; the results are written into `workdir`.

    Raises:
        UserError: if `workdir` does not contain a pretraining run, settings do not fit it or its
            records, or test records were pretrained on.
    """
    workdir = absolute_path(workdir)
    # Settings are checked before the weights are read: gigabytes of a large run.
    merged, records = open_evaluation_records(config_of_run(workdir), config, workdir)
    run = dataclasses.replace(PretrainedRun.load(workdir), config=merged)
    trial: Trial[Any] = Trial("run", run.source, records["test"])
    if "train" in records:
        trial = Split("run", run.source, records["test"], records["train"])
    return run_protocol(
        PROTOCOL,
        merged,
        workdir,
        [trial],
        compute=functools.partial(_compute, run, records),
        measure=functools.partial(_measure, run, records),
        heads=run.heads,
        in_training=True,
    )


def open_evaluation_records(
    run: ml_collections.ConfigDict, config: ml_collections.ConfigDict, workdir: epath.Path
) -> tuple[ml_collections.ConfigDict, dict[str, UsableRecords]]:
    """Opens the records of an evaluation, and checks its settings; needs no trained weights.

    Args:
        run: config of the pretraining run.
        workdir: working directory of the run, which may not exist yet.

    Returns:
        The run's own config with the sections of `configs/evaluate.py`, and records by role:
        "test", with probes "train", with null controls "null.train" and "null.test".

    Raises:
        UserError: if settings contradict each other, the run or the records, or these are missing.
    """
    check_recall_at(config)
    merged = run.copy_and_resolve_references()
    with merged.unlocked():
        merged.task = config.task
        merged.evaluation = config.evaluation.copy_and_resolve_references()
        merged.bootstrap = config.bootstrap
        merged.execution.update(config.execution)
        merged.data.allow_trained_on = config.data.allow_trained_on
        merged.data.directory = config.data.directory or merged.data.directory
        merged.evaluation.speeds = tuple(config.evaluation.speeds) or tuple(run.views.speeds)
    section = merged.evaluation
    speed_indices(section.speeds, run.views.speeds, setting="evaluation.speeds")
    directory = absolute_path(merged.data.directory)
    if not directory.exists():
        raise UserError(
            f"there are no records at {directory}: set --config.data.directory to the records of "
            f"{workdir}"
        )
    sides = {"test": (section.test_split, section.test_select)}
    if len(section.probes):
        sides["train"] = section.train_split, section.train_select
    if section.null.train_split:
        sides |= {f"null.{role}": (section.null[f"{role}_split"], "") for role in ("train", "test")}
    records = {}
    for role, (split, select) in sides.items():
        try:
            dataset = RecordDataset(directory, split)
        except RecordError as error:
            raise RecordError(
                f"{error}: set --config.evaluation.{role}_split, or prepare more media into the "
                "data set with --split"
            ) from error
        records[role] = UsableRecords(dataset, host_render_spec(merged), Selection.parse(select))
    if "train" in records:
        _check_probes(merged, records["train"], records["test"])
    if "null.train" in records:
        noise = records["null.train"]
        views = len(noise) * section.null.train_views * 2 * len(merged.views.speeds)
        _check_fills_a_batch("null", section.null.fit, views, f"views of {noise!r}")
    return merged, records


def _check_probes(
    config: ml_collections.ConfigDict, train: UsableRecords, test: UsableRecords
) -> None:
    section = config.evaluation
    probes = [tuple(probe) for probe in section.probes]
    for label, modality in probes:
        asked, rows = f"evaluation.probes asks for {label!r} from {modality}", []
        if modality not in MODALITY_INPUTS:
            raise UserError(f"{asked}: modality must be 'video' or 'audio'")
        if probes.count((label, modality)) > 1:
            raise UserError(f"{asked} more than once")
        if config.modalities not in ("audio_visual", modality):
            raise UserError(f"{asked}, but the run trained {config.modalities} only")
        for side in (train, test):
            single_classes(side.records, label, f"{asked}, but ")
            usable = np.setdiff1d(side.indices, side.lacking((modality,)))
            rows.append(usable[side.records.labels[label][usable] >= 0])
        what = f"with {modality} and a known {label!r}"
        if not len(rows[1]):
            raise UserError(f"no record of {test} {what}: set --config.evaluation.probes")
        check_sources(train.records.source_numbers[rows[0]], section.probe.folds)
        if section.supervised.enabled:
            fit, items = section.supervised[modality].fit, f"records of {train} {what}"
            _check_fills_a_batch(f"supervised.{modality}", fit, len(rows[0]), items)


def _check_fills_a_batch(
    section: str, fit: ml_collections.ConfigDict, items: int, what: str
) -> None:
    if items < fit.batch_size:
        raise UserError(
            f"{items} {what} do not fill a batch of {fit.batch_size}: set "
            f"--config.evaluation.{section}.fit.batch_size"
        )


def _compute(
    run: PretrainedRun, records: Mapping[str, UsableRecords], context: Context
) -> _Computed:
    config, section = run.config, run.config.evaluation
    speeds = speed_indices(section.speeds, config.views.speeds, setting="evaluation.speeds")
    with context.stages("temporal tasks"):
        logits = task_logits(context, run, records["test"])
    random = {m: e.params for m, e in random_like(run.source, config.seed).encoders.items()}
    networks = {"random": _with_encoders(run.variables, random), "pretrained": run.variables}
    fits: dict[str, Fit] = {}
    if section.supervised.enabled and "train" in records:
        with context.stages("supervised encoders"):
            fits, bounds = _train_supervised(run, speeds, records["train"])
        networks |= bounds
    log_mel = run.spec.log_mel

    def features(role: str) -> dict[str, np.ndarray]:
        source = records[role]

        def render(position: int) -> dict[str, Any]:
            arrays = fixed_views(source, position, run.spec, speeds=speeds, clips=section.clips)
            decibels = arrays["spectrogram"] * log_mel.std + log_mel.mean
            cells = section.position_cells
            return arrays | trivial_statistics(arrays["video"], decibels, cells=cells)

        def keep(name: str) -> bool:
            of_test = role == "test" and name.startswith("pretrained/")
            return of_test or not name.endswith("_embeddings")

        key = [context.fingerprint, variables_digest(networks), role]
        return encode(
            context, run, run.features, render, source, key=key, networks=networks, keep=keep
        )

    with context.stages("features"):
        return logits, {role: features(role) for role in ("train", "test") if role in records}, fits


def _measure(
    run: PretrainedRun,
    records: Mapping[str, UsableRecords],
    context: Context,
    computed: _Computed,
) -> Measured:
    config, section, stages = run.config, run.config.evaluation, context.stages
    logits, features, fits = computed
    test, train = features["test"], features.get("train", {})
    with stages("probes"):
        probes = {
            probe_name(*probe): measure_probe(config, records["test"], train, test, *probe)
            for probe in section.probes
        }
    with stages("retrieval"):
        recall_at = tuple(section.recall_at)
        ranks = measure_cross_modal(records["test"], test, "pretrained", recall_at)
    with stages("temporal scores"):
        tasks = measure_tasks(run, records["test"], logits, config.seed)
    null: NullControl | None = None
    if "null.train" in records:
        with stages("null controls"):
            noise = records["null.train"], records["null.test"]
            null = noise_control(run, section.null, *noise, threads=config.execution.threads)
    parts = {f"known_{name}": probe for name, probe in probes.items()}
    parts |= {"has_both": ranks, "": tasks}
    outcomes, metrics = merge(records["test"].record_ids, records["test"].sources, parts)
    view = _view(run, Measured(outcomes, metrics), probes, ranks, tasks, fits, null)
    with stages("report"):
        directory = context.workdir
        report = run_report(run, records["test"], directory, view, features, probes, ranks, tasks)
    return Measured(
        outcomes,
        metrics,
        details={"probe_costs": {name: probe.details["costs"] for name, probe in probes.items()}},
        view=view | seconds_of_run(run, directory, context.total_seconds),
        **report,
    )


def _view(
    run: PretrainedRun,
    measured: Measured,
    probes: Mapping[str, Measured],
    ranks: Measured,
    tasks: Measured,
    fits: Mapping[str, Fit],
    null: NullControl | None,
) -> dict[str, Any]:
    """Returns the metrics under the keys of a run's results.json: `probe`, `retrieval`, …"""
    values = point_values(measured)
    chance = {name: metric.chance for name, metric in measured.metrics.items()}

    def of(group: str) -> dict[str, Any]:
        """Values of the metrics GROUP_KEY by their keys."""
        prefix = f"{group}_"
        return {n.removeprefix(prefix): v for n, v in values.items() if n.startswith(prefix)}

    temporal = {
        task: {"accuracy": values[task], "chance": chance[task], "confusion": confusion}
        for task, confusion in tasks.details["confusion"].items()
    }
    control: dict[str, Any] = {
        "skipped": "it needs records of noise, named by --config.evaluation.null.train_split"
    }
    if null is not None:
        control = {"views": null.views, "train_loss": null.train_loss}
        for task in null.scores.keys() & temporal.keys():  # some may be defined for no test view
            temporal[task]["null_accuracy"] = null.scores[task].accuracy
    return {
        "probe": {name: of(name) | {"chance": chance[f"{name}_pretrained"]} for name in probes},
        "trivial": {name: probe.details["trivial"] for name, probe in probes.items()},
        "retrieval": {
            direction: ranked
            | {f"chance_{key}": chance[f"{direction}_{key}"] for key in ranked}
            | dict.fromkeys(("queries", "gallery"), len(ranks.outcomes.units))
            | {"chance": chance[f"{direction}_r1"]}
            for direction in DIRECTIONS
            if (ranked := of(direction))
        },
        "temporal": temporal,
        "null_control": control,
        "supervised": {
            name: {"epochs": len(fit.losses), "train_loss": fit.losses[-1]}
            for name, fit in fits.items()
        },
        "step": run.step,
    }


def probe_name(label: str, modality: str) -> str:
    """Returns the name of a linear probe in results.json."""
    return f"{label}_from_{modality}"


def _with_encoders(variables: Mapping[str, Any], encoders: Mapping[str, Any]) -> dict[str, Any]:
    """Returns variables of the joint model with its encoders replaced by those in `encoders`."""
    replaced = {kind: dict(tree) for kind, tree in variables.items()}
    for modality, encoder in encoders.items():
        for kind, tree in encoder.items():
            replaced[kind][f"{modality}_encoder"] = tree
    return replaced


def _network_of(probes: Sequence[tuple[str, str]], label: str, modality: str) -> str:
    """Returns the name of the network with the supervised encoder of a probe.

    The n-th network has the encoders of the n-th probe of each modality, so that probes of
    different modalities share a forward pass.
    """
    return f"supervised{[each for each, of in probes if of == modality].index(label)}"


def _train_supervised(
    run: PretrainedRun, speeds: Sequence[int], train: UsableRecords
) -> tuple[dict[str, Fit], dict[str, Any]]:
    """Returns the supervised classifier of each probe, and networks with their encoders."""
    config, probes = run.config, run.config.evaluation.probes
    fits: dict[str, Fit] = {}
    networks: dict[str, dict[str, Any]] = {}
    for label, modality in probes:
        section, encoder = config.evaluation.supervised[modality], run.source.encoders[modality]
        render = functools.partial(
            random_views,
            train,
            spec=run.spec,
            speeds=speeds,
            directions=(FORWARD,),
            views=section.views,
            seed=config.seed,
            modalities=(modality,),
        )
        arrays = render_all(render, range(len(train)), threads=config.execution.threads)
        known = (arrays[f"label_{label}"] >= 0) & arrays[f"has_{modality}"]
        labels = np.repeat(arrays[f"label_{label}"][known, None], section.views, axis=1)
        fits[probe_name(label, modality)] = fit = fit_classifier(
            encoder,
            arrays[MODALITY_INPUTS[modality]][known],
            {label: labels},
            classes={label: len(train.records.class_names[label])},
            seed=config.seed,
            **section.fit,
        )
        # Every process trained the same network, but rounding may differ between them.
        variables = multihost_utils.broadcast_one_to_all(jax.device_get(fit.encoder_variables))
        name = _network_of(probes, label, modality)
        networks[name] = _with_encoders(networks.get(name, run.variables), {modality: variables})
    return fits, networks


def measure_probe(
    config: ml_collections.ConfigDict,
    records: UsableRecords,
    train: Arrays,
    test: Arrays,
    label: str,
    modality: str,
) -> Measured:
    """Probes every network, and trivial statistics, for a label.

    Args:
        config: config of the run with the sections of its evaluation.
        records: test records.
        train: features of the training records by `_compute`; `test` has those of the test records.
    """
    section, name = config.evaluation, probe_name(label, modality)
    title, classes = name.replace("_", " "), len(records.records.class_names[label])
    rows, test_rows = (
        np.flatnonzero(side[f"has_{modality}"] & (side[f"label_{label}"] >= 0))
        for side in (train, test)
    )
    targets, labels = train[f"label_{label}"][rows], test[f"label_{label}"][test_rows]
    settings = section.probe.to_dict()
    folds, sources = settings.pop("folds"), train["source_id"][rows]
    settings |= {"classes": classes, "classifier": "logistic"}
    groups = held_out_groups(targets, sources, folds=folds, seed=config.seed)

    def probe(features: str) -> tuple[float, np.ndarray]:
        """Returns C, and scores of the test records."""
        fit = fit_probe(train[features][rows], targets, groups, **settings)
        return fit.cost, fit.scores(test[features][test_rows])

    networks = {"random": "random", "pretrained": "pretrained"}
    if section.supervised.enabled:
        networks["supervised"] = _network_of(section.probes, label, modality)
    probes = {n: probe(f"{network}/{modality}_features") for n, network in networks.items()}
    # In the order of the arguments of `gap_closed`.
    inputs = {network: f"correct_{name}_{network}" for network in networks}
    metrics = {
        f"{name}_{n}": Metric("mean", (correct,), f"{title}, {n} encoder", chance=1 / classes)
        for n, correct in inputs.items()
    }
    if section.supervised.enabled:
        metrics[f"{name}_gap_closed"] = Metric(
            "gap_closed", tuple(inputs.values()), f"{title}, gap closed", headline=True
        )
    predicted = probes["pretrained"][1].argmax(axis=1)
    names, of_sources = records.record_ids, records.sources
    return Measured(
        Outcomes(
            [names[row] for row in test_rows],
            [of_sources[row] for row in test_rows],
            {inputs[n]: top_k_hits(scores, labels, 1) for n, (_, scores) in probes.items()},
        ),
        metrics,
        details={
            "confusion": confusion_matrix(labels, predicted, labels=range(classes)),
            "costs": {network: cost for network, (cost, _) in probes.items()},
            "trivial": {s: float(top_k_hits(probe(s)[1], labels, 1).mean()) for s in _TRIVIAL},
        },
    )


def trivial_statistics(
    video: np.ndarray, log_mel: np.ndarray, *, cells: int
) -> dict[str, np.ndarray]:
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
