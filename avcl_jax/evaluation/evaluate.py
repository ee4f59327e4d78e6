"""Evaluation of a pretrained run, from config to results.json and report.html."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from avcl_jax import experiment
from avcl_jax.data.augment import standardize, to_unit_range
from avcl_jax.data.records import RecordDataset, RecordError
from avcl_jax.data.rendering import RenderSpec
from avcl_jax.data.usable_records import UsableRecords
from avcl_jax.data.views import FORWARD
from avcl_jax.encoder_source import heads_digest, random_like, source_of_run
from avcl_jax.errors import UserError
from avcl_jax.evaluation.cross_modal import cross_modal_scores
from avcl_jax.evaluation.embed import (
    MODALITY_INPUTS,
    check_pairs,
    encode_all,
    feature_function,
    logit_function,
    random_views,
    render_all,
)
from avcl_jax.evaluation.fixed_views import fixed_views
from avcl_jax.evaluation.linear_classifier import check_sources
from avcl_jax.evaluation.metrics import gap_closed
from avcl_jax.evaluation.null_control import NullControl, null_control, render_null_views
from avcl_jax.evaluation.probe import ProbeResult, linear_probe, trivial_statistics
from avcl_jax.evaluation.protocol import Measured, Protocol
from avcl_jax.evaluation.protocol_run import ProtocolRun
from avcl_jax.evaluation.run_outcomes import run_outcomes
from avcl_jax.evaluation.summary import write_summary
from avcl_jax.evaluation.supervised import Fit, FitSpec, Prepare, fit_classifier
from avcl_jax.evaluation.temporal import TaskScore
from avcl_jax.evaluation.temporal_tasks import score_tasks, task_logits
from avcl_jax.evaluation.trained_on import check_not_trained_on
from avcl_jax.evaluation.written import Stages
from avcl_jax.export import check_run
from avcl_jax.models.audio_visual import AudioVisualModel
from avcl_jax.paths import absolute_path
from avcl_jax.training.checkpoint import Checkpoints, load_variables

PROTOCOL = Protocol(
    name="pretraining_run",
    version=3,
    title="What a run has learned",
    definition=(),  # `summary` says it with the numbers of the run
)
_TRIVIAL = ("mean_colour", "position_histogram", "mean_loudness", "mean_log_mel")


def evaluate(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> dict[str, Any]:
    """Evaluates the newest checkpoint of `workdir` and writes results.json and report.html there.

    Args:
        config: as `configs/evaluate.py` returns it.
        workdir: of the run, local or gs://.

    Returns:
        The contents of results.json.

    Raises:
        UserError: if the run had other settings, the data set lacks a label that is probed, or the
            views of a video do not form pairs.
        ProtocolError: if test records were pretrained on, or the directory holds results of another
            protocol.
    """
    workdir = absolute_path(workdir)
    section = config.evaluation
    check_pairs(len(section.speeds) * section.views_per_speed)
    check_run(config, workdir)
    variables, step = load_variables(workdir)
    progress = Checkpoints(workdir, keep=config.keep_checkpoints).restore_progress(step)
    stages = Stages()
    # Made on the host, whatever training did: numpy and jax.numpy agree to 1e-4 by test.
    spec = dataclasses.replace(experiment.render_spec(config), spectrogram_on_device=False)
    model = experiment.audio_visual_model(config)
    train = UsableRecords(RecordDataset(config.data.directory, section.train_split), spec)
    test = UsableRecords(RecordDataset(config.data.directory, section.test_split), spec)
    _check_labels(config, train, test)
    source = source_of_run(workdir, config, variables, step)
    data = {"train": train.fingerprint, "test": test.fingerprint}
    protocol_run = ProtocolRun(
        PROTOCOL, config, workdir, source, data, heads_digest(variables), in_training=True
    )
    if (done := protocol_run.finished()) is not None:
        return done
    check_not_trained_on(
        source,
        test.records,
        test.indices,
        allow=config.data.allow_trained_on,
        what="test records",
    )

    random = {m: e.params for m, e in random_like(source, config.seed).encoders.items()}
    networks = {"random": _with_encoders(variables, random), "pretrained": variables}
    fits: dict[str, Fit] = {}
    if section.supervised.enabled and len(section.probes):
        with stages("supervised encoders"):
            fits = _supervised(config, train, spec)
        supervised = {modality: fit.encoder_variables for modality, fit in fits.items()}
        networks["supervised"] = _with_encoders(variables, supervised)
    with stages("features"):
        encode = functools.partial(_encode, config, model, networks, spec)
        train_features = encode(train) if len(section.probes) else {}
        test_features = encode(test)
    with stages("probes"):
        probes, trivial = _probes(
            config, train.records.class_names, train_features, test_features, networks
        )
    with stages("retrieval"):
        ranked = cross_modal_scores(test_features, "pretrained", tuple(section.recall_at))
    with stages("temporal tasks"):
        scores = _temporal(config, model, variables, test, spec)
    with stages("null controls"):
        null = _null(config, spec)

    temporal = {name: score.as_results() for name, score in scores.items()}
    if isinstance(null, NullControl):
        for task, score in null.scores.items():
            temporal[task]["null_accuracy"] = score.accuracy
        null_summary: dict[str, Any] = {"views": null.views, "train_loss": null.train_loss}
    else:
        null_summary = {"skipped": null}
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
        "step": step,
        "train_seconds": round(progress.train_seconds, 1),
    }
    costs = {name: {n: probe.cost for n, probe in by.items()} for name, by in probes.items()}
    outcomes, metrics = run_outcomes(
        test, test_features, probes, ranked, scores, recall_at=tuple(section.recall_at)
    )
    return write_summary(
        protocol_run,
        Measured(outcomes, metrics, details={"probe_costs": costs}, sections=()),
        results,
        stages=stages,
        spec=spec,
        test=test,
        train_features=train_features,
        features=test_features,
        confusions={name: by["pretrained"].confusion for name, by in probes.items()},
    )


def _check_labels(
    config: ml_collections.ConfigDict, train: UsableRecords, test: UsableRecords
) -> None:
    names = train.records.class_names
    for label, modality in config.evaluation.probes:
        if label not in names:
            raise UserError(
                f"{config.data.directory} has no label {label!r}, it has {sorted(names)}: "
                "set evaluation.probes"
            )
        if label in train.records.multilabel:
            raise UserError(
                f"evaluation.probes asks for {label!r}, of which a clip may have several: linear "
                "probes want one class a clip"
            )
        if config.modalities not in ("audio_visual", modality):
            raise UserError(
                f"evaluation.probes asks for {label} from {modality}, but the run trained "
                f"{config.modalities} only"
            )
        known = [
            records.indices[records.records.labels[label][records.indices] >= 0]
            for records in (train, test)
        ]
        if not len(known[1]):
            raise UserError(f"no record of {test!r} has a known {label!r}: set evaluation.probes")
        check_sources(train.records.source_numbers[known[0]], config.evaluation.probe.folds)


def _with_encoders(variables: Mapping[str, Any], encoders: Mapping[str, Any]) -> dict[str, Any]:
    """Returns variables of the joint model with the encoders given by modality in their place."""
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


def _speeds(config: ml_collections.ConfigDict) -> list[int]:
    """Returns indices of the playback speeds at which features are taken."""
    return [list(config.views.speeds).index(speed) for speed in config.evaluation.speeds]


def _supervised(
    config: ml_collections.ConfigDict, train: UsableRecords, spec: RenderSpec
) -> dict[str, Fit]:
    section = config.evaluation.supervised
    fits = {}
    for label, modality in config.evaluation.probes:
        fit_section = section[modality]
        render = functools.partial(
            random_views,
            train,
            spec=spec,
            speeds=_speeds(config),
            directions=(FORWARD,),
            views=fit_section.views,
            seed=config.seed,
            modalities=(modality,),
        )
        arrays = render_all(render, len(train), threads=config.evaluation.threads)
        known = (arrays[f"label_{label}"] >= 0) & arrays[f"has_{modality}"]
        labels = arrays[f"label_{label}"][known]
        fits[modality] = fit_classifier(
            _encoders(config)[modality],
            arrays[MODALITY_INPUTS[modality]][known],
            {label: np.repeat(labels[:, None], fit_section.views, axis=1)},
            classes={label: len(train.records.class_names[label])},
            prepare=_prepare(config)[modality],
            spec=FitSpec(**fit_section.fit),
            seed=config.seed,
        )
    return fits


def _encode(
    config: ml_collections.ConfigDict,
    model: AudioVisualModel,
    networks: Mapping[str, Any],
    spec: RenderSpec,
    source: UsableRecords,
) -> dict[str, np.ndarray]:
    section = config.evaluation

    def render(position: int) -> dict[str, Any]:
        return fixed_views(
            source,
            position,
            spec,
            speeds=_speeds(config),
            views_per_speed=section.views_per_speed,
            direction=FORWARD,
        )

    def describe(arrays: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        log_mel = arrays["spectrogram"] * spec.log_mel.std + spec.log_mel.mean
        return trivial_statistics(arrays["video"], log_mel, cells=section.position_cells)

    compute = feature_function(
        model, networks, spec, pixel_mean=config.pixels.mean, pixel_std=config.pixels.std
    )
    return encode_all(
        render,
        len(source),
        compute,
        chunk=section.chunk,
        threads=section.threads,
        describe_inputs=describe,
    )


def _probes(
    config: ml_collections.ConfigDict,
    class_names: Mapping[str, Sequence[str]],
    train: Mapping[str, np.ndarray],
    test: Mapping[str, np.ndarray],
    networks: Mapping[str, Any],
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
                classes=len(class_names[label]),
                seed=config.seed,
                **section.probe,
            )

        name = f"{label}_from_{modality}"
        probes[name] = {n: probe(f"{n}/{modality}_features") for n in networks}
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


def _temporal(
    config: ml_collections.ConfigDict,
    model: AudioVisualModel,
    variables: Any,
    test: UsableRecords,
    spec: RenderSpec,
) -> dict[str, TaskScore]:
    section = config.evaluation
    compute = logit_function(
        model, variables, spec, pixel_mean=config.pixels.mean, pixel_std=config.pixels.std
    )
    arrays = task_logits(
        compute,
        test,
        spec,
        range(len(test)),
        pairs=section.pairs_per_video,
        seed=config.seed,
        chunk=section.chunk,
        threads=section.threads,
    )
    return score_tasks(arrays, config.seed)


def _null(config: ml_collections.ConfigDict, spec: RenderSpec) -> NullControl | str:
    """Returns the null controls, or why there are none."""
    section = config.evaluation.null
    if not section.train_split:
        return "evaluation.null.train_split names no split"
    rendered = []
    for number, split in enumerate((section.train_split, section.test_split)):
        try:
            records = RecordDataset(config.data.directory, split)
        except RecordError as error:
            return str(error)
        rendered.append(
            render_null_views(
                UsableRecords(records, spec),
                spec,
                views=(section.train_views, section.test_views)[number],
                seed=config.seed + number,
                threads=config.evaluation.threads,
            )
        )
    return null_control(
        *rendered,
        encoders=_encoders(config),
        prepare=_prepare(config),
        num_speeds=len(config.views.speeds),
        spec=FitSpec(**section.fit),
        seed=config.seed,
    )
