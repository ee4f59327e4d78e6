"""Evaluation of a pretrained run, from config to results.json and report.html."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from avcl_jax import experiment
from avcl_jax.data.augment import standardize, to_unit_range
from avcl_jax.data.usable_records import UsableRecords
from avcl_jax.data.views import FORWARD
from avcl_jax.encoder_source import heads_digest, random_like, variables_digest
from avcl_jax.evaluation.cross_modal import cross_modal_scores
from avcl_jax.evaluation.embed import (
    MODALITY_INPUTS,
    encode_all,
    feature_function,
    logit_function,
    random_views,
    render_all,
)
from avcl_jax.evaluation.evaluated_run import EvaluatedRun, open_run, probe_name
from avcl_jax.evaluation.fixed_views import fixed_views
from avcl_jax.evaluation.metrics import gap_closed
from avcl_jax.evaluation.null_control import NullControl, null_control, render_null_views
from avcl_jax.evaluation.parts import in_parts, key_of
from avcl_jax.evaluation.probe import ProbeResult, linear_probe, trivial_statistics
from avcl_jax.evaluation.protocol import Measured, Protocol
from avcl_jax.evaluation.protocol_run import ProtocolRun
from avcl_jax.evaluation.run_outcomes import run_outcomes
from avcl_jax.evaluation.summary import write_summary
from avcl_jax.evaluation.supervised import Fit, FitSpec, Prepare, fit_classifier
from avcl_jax.evaluation.temporal_tasks import score_tasks, task_logits
from avcl_jax.evaluation.written import Stages
from avcl_jax.paths import absolute_path
from avcl_jax.training.checkpoint import read_progress

PROTOCOL = Protocol(
    name="pretraining_run",
    version=4,
    title="What a run has learned",
    definition=(),  # `summary` says it with the numbers of the run
)
_TRIVIAL = ("mean_colour", "position_histogram", "mean_loudness", "mean_log_mel")


def evaluate(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> dict[str, Any]:
    """Evaluates the newest checkpoint of `workdir` and writes results.json and report.html there.

    Processes share the encoding of records; process 0 does the rest.

    Args:
        config: as `configs/evaluate.py` returns it.
        workdir: working directory of the run, local or gs://.

    Returns:
        The contents of results.json; empty in processes other than the first.

    Raises:
        ExportError: if `workdir` does not contain a pretraining run.
        UserError: if settings do not fit the run or its records, as `open_run`.
        ProtocolError: if test records were pretrained on, or the directory has results of another
            protocol.
    """
    workdir = absolute_path(workdir)
    stages = Stages()
    run = open_run(config, workdir)
    section = run.config.evaluation
    protocol_run = ProtocolRun(
        PROTOCOL,
        run.config,
        workdir,
        run.source,
        run.data,
        heads_digest(run.variables),
        in_training=True,
    )
    if (done := protocol_run.finished()) is not None:
        return done

    with stages("temporal tasks"):
        logits = _temporal(run, protocol_run)
    random = {m: e.params for m, e in random_like(run.source, run.config.seed).encoders.items()}
    networks = {"random": _with_encoders(run.variables, random), "pretrained": run.variables}
    fits: dict[str, Fit] = {}
    if section.supervised.enabled and run.train is not None:
        with stages("supervised encoders"):
            fits = _supervised(run, run.train)
        networks |= _supervised_networks(run, fits)
    with stages("features"):
        compute = feature_function(
            experiment.audio_visual_model(run.config),
            networks,
            run.spec,
            pixel_mean=run.config.pixels.mean,
            pixel_std=run.config.pixels.std,
        )
        key = key_of(protocol_run.fingerprint, variables_digest(networks))
        encode = functools.partial(_encode, run, compute, protocol_run.features / key)
        train_features = {} if run.train is None else encode("train", run.train)
        test_features = encode("test", run.test)
    if jax.process_index():
        return {}
    with stages("probes"):
        probes, trivial = _probes(run, train_features, test_features)
    with stages("retrieval"):
        ranked = cross_modal_scores(test_features, "pretrained", tuple(section.recall_at))
    with stages("temporal scores"):
        scores = score_tasks(logits, run.config.seed)
    null: NullControl | None = None
    if run.null is not None:
        with stages("null controls"):
            null = _null(run, *run.null)

    temporal = {name: score.as_results() for name, score in scores.items()}
    null_summary: dict[str, Any] = {
        "skipped": "it needs records of noise, named by --config.evaluation.null.train_split"
    }
    if null is not None:
        for task, score in null.scores.items():
            temporal[task]["null_accuracy"] = score.accuracy
        null_summary = {"views": null.views, "train_loss": null.train_loss}
    results = {
        "probe": {name: _probe_results(by_network) for name, by_network in probes.items()},
        "trivial": trivial,
        "retrieval": {direction: found.as_results() for direction, found in ranked.items()},
        "temporal": temporal,
        "null_control": null_summary,
        "supervised": {
            name: {"stopped": f.stopped, "epochs": len(f.losses), "train_loss": f.losses[-1]}
            for name, f in fits.items()
        },
        "step": run.step,
        "train_seconds": round(read_progress(workdir, run.step).train_seconds, 1),
    }
    costs = {name: {n: probe.cost for n, probe in by.items()} for name, by in probes.items()}
    outcomes, metrics = run_outcomes(
        run.test, test_features, probes, ranked, scores, recall_at=tuple(section.recall_at)
    )
    return write_summary(
        protocol_run,
        Measured(outcomes, metrics, details={"probe_costs": costs}, sections=()),
        results,
        stages=stages,
        spec=run.spec,
        test=run.test,
        train_features=train_features,
        features=test_features,
        confusions={name: by["pretrained"].confusion for name, by in probes.items()},
    )


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


def _supervised(run: EvaluatedRun, train: UsableRecords) -> dict[str, Fit]:
    """Returns a supervised classifier for each probe, by the probe's name."""
    config = run.config
    fits = {}
    for label, modality in config.evaluation.probes:
        section = config.evaluation.supervised[modality]
        render = functools.partial(
            random_views,
            train,
            spec=run.spec,
            speeds=run.speeds,
            directions=(FORWARD,),
            views=section.views,
            seed=config.seed,
            modalities=(modality,),
        )
        arrays = render_all(render, len(train), threads=config.evaluation.threads)
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


def _network_of_probes(run: EvaluatedRun) -> dict[str, str]:
    """Returns the name of the supervised network of each probe.

    The n-th network has the encoders of the n-th probe of each modality, so that probes of
    different modalities share a forward pass.
    """
    names, counts = {}, collections.Counter[str]()
    for label, modality in run.config.evaluation.probes:
        names[probe_name(label, modality)] = f"supervised{counts[modality]}"
        counts[modality] += 1
    return names


def _supervised_networks(run: EvaluatedRun, fits: Mapping[str, Fit]) -> dict[str, Any]:
    """Returns variables of the joint model with supervised encoders, by the network's name."""
    encoders: dict[str, dict[str, Any]] = collections.defaultdict(dict)
    names = _network_of_probes(run)
    for label, modality in run.config.evaluation.probes:
        probe = probe_name(label, modality)
        encoders[names[probe]][modality] = fits[probe].encoder_variables
    # Every process trained the same networks, but rounding may differ between them.
    encoders = multihost_utils.broadcast_one_to_all(jax.device_get(dict(encoders)))
    return {name: _with_encoders(run.variables, trained) for name, trained in encoders.items()}


def _encode(
    run: EvaluatedRun,
    compute: Callable[[Mapping[str, np.ndarray]], Mapping[str, Any]],
    directory: epath.Path,
    role: str,
    records: UsableRecords,
) -> dict[str, np.ndarray]:
    """Returns features and labels, and for test records embeddings of the pretrained network."""
    section, spec = run.config.evaluation, run.spec

    def describe(arrays: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        log_mel = arrays["spectrogram"] * spec.log_mel.std + spec.log_mel.mean
        return trivial_statistics(arrays["video"], log_mel, cells=section.position_cells)

    def part(positions: Sequence[int]) -> Mapping[str, np.ndarray]:
        arrays = encode_all(
            lambda number: fixed_views(
                records,
                positions[number],
                spec,
                speeds=run.speeds,
                views_per_speed=section.views_per_speed,
                direction=FORWARD,
            ),
            len(positions),
            compute,
            chunk=section.chunk,
            threads=section.threads,
            describe_inputs=describe,
        )
        return {
            name: array
            for name, array in arrays.items()
            if not name.endswith("_embeddings")
            or (role == "test" and name.startswith("pretrained/"))
        }

    return in_parts(directory / role, len(records), part, rows=section.part_records)


def _probes(
    run: EvaluatedRun, train: Mapping[str, np.ndarray], test: Mapping[str, np.ndarray]
) -> tuple[dict[str, dict[str, ProbeResult]], dict[str, dict[str, float]]]:
    """Returns the probes of every network, and those of trivial statistics, by probe."""
    section = run.config.evaluation
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
                classes=len(run.test.records.class_names[label]),
                seed=run.config.seed,
                **section.probe,
            )

        name = probe_name(label, modality)
        networks = {"random": "random", "pretrained": "pretrained"}
        if section.supervised.enabled:
            networks["supervised"] = _network_of_probes(run)[name]
        probes[name] = {n: probe(f"{key}/{modality}_features") for n, key in networks.items()}
        trivial[name] = {statistic: probe(statistic).accuracy for statistic in _TRIVIAL}
    return probes, trivial


def _probe_results(by_network: Mapping[str, ProbeResult]) -> dict[str, float | None]:
    results: dict[str, float | None] = {name: probe.accuracy for name, probe in by_network.items()}
    if "supervised" in by_network:
        closed = gap_closed(
            *(by_network[name].accuracy for name in ("random", "pretrained", "supervised"))
        )
        results["gap_closed"] = closed if np.isfinite(closed) else None
    return results | {"chance": by_network["pretrained"].chance}


def _temporal(run: EvaluatedRun, protocol_run: ProtocolRun) -> dict[str, np.ndarray]:
    """Returns logits and labels of the temporal tasks on pairs of views of the test records."""
    config, section = run.config, run.config.evaluation
    compute = logit_function(
        experiment.audio_visual_model(config),
        run.variables,
        run.spec,
        pixel_mean=config.pixels.mean,
        pixel_std=config.pixels.std,
    )

    def part(positions: Sequence[int]) -> Mapping[str, np.ndarray]:
        return task_logits(
            compute,
            run.test,
            run.spec,
            positions,
            pairs=section.pairs_per_video,
            seed=config.seed,
            chunk=section.chunk,
            threads=section.threads,
        )

    directory = protocol_run.features / key_of(protocol_run.fingerprint) / "temporal"
    return in_parts(directory, len(run.test), part, rows=section.part_records)


def _null(run: EvaluatedRun, train: UsableRecords, test: UsableRecords) -> NullControl:
    config, section = run.config, run.config.evaluation.null
    combinations = 2 * len(config.views.speeds)  # of direction and speed
    rendered = [
        render_null_views(
            records,
            run.spec,
            views=views * combinations,
            seed=config.seed + number,
            threads=config.evaluation.threads,
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
