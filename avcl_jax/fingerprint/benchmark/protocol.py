"""Fingerprinting protocol: is the source of a transformed clip found?

Ours is measured fused and by each modality alone, beside methods that people would use otherwise,
on the same queries.
"""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
import threadpoolctl
from etils import epath

from avcl_jax.data.records import RecordDataset
from avcl_jax.errors import UserError
from avcl_jax.evaluation.driver import Context, run_protocol
from avcl_jax.evaluation.protocol import (
    Measured,
    Metric,
    Outcomes,
    Protocol,
)
from avcl_jax.evaluation.splits import check_not_trained_on
from avcl_jax.export.runs import EncoderSource, open_encoders
from avcl_jax.fingerprint.benchmark import families
from avcl_jax.fingerprint.benchmark.baselines import BASELINES
from avcl_jax.fingerprint.benchmark.clips import (
    ClipSets,
    SourceClip,
    clips_of_records,
    make_queries,
    not_empty_clips,
    segments_of_files,
    sounds_of_files,
)
from avcl_jax.fingerprint.benchmark.outcomes import Asked, ask, error_ratio, table_of
from avcl_jax.fingerprint.benchmark.report import Examples, sections
from avcl_jax.fingerprint.benchmark.searchers import IndexSearcher, Searcher
from avcl_jax.fingerprint.settings import FingerprintSettings
from avcl_jax.paths import local_path

# Of what is made of the answers, beside `families.VERSION`: raised when a figure would change.
# 1: R@5 and µAP take ties at their cut in the worst order too.
_FIGURES_VERSION = 1

PROTOCOL = Protocol(
    name="fingerprinting",
    version=families.VERSION + _FIGURES_VERSION,
    title="Fingerprinting: the source of a transformed clip",
    definition=(
        "References are clean clips. Every family of transformations asks for some of them, chosen "
        "at random, each beside a distractor: a clip that is not indexed, transformed alike.",
        "Strengths and seeds are fixed in avcl_jax/fingerprint/benchmark/families.py. A clip that "
        "lacks what a family changes is not asked for in that family.",
        "R@k: share of the queries whose source is scored above all but k − 1 other answers; "
        "answers of equal score count as if the wrong ones came first. A method that cannot "
        "answer, for instance by sound about a clip without sound, has not found the source.",
        "µAP and recall at 90 % precision: over the five best answers to every query and every "
        "distractor in one list; worst order within equal scores, at the cut after five too.",
        "Normalised: minus the mean score of the query's three best answers from an index of clips "
        "that are in no other role.",
        "Offset: share of the queries whose best answer names the source and, within the "
        "tolerance, a time at which some moment of the query really lies.",
        "The mean over families counts every family once; truncated queries are apart. Medium "
        "strength unless another is named.",
        "The better single modality, and the better baseline, are chosen once for all families.",
        "Intervals resample videos. Where all queries came out alike no resample differs, and "
        "bounds are the exact ones of Clopper and Pearson for so many videos.",
    ),
)
_OURS = ("fused", "video", "audio")


def fingerprinting(
    config: ml_collections.ConfigDict, workdir: epath.PathLike
) -> dict[str, Any] | None:
    """Runs the protocol by `configs/fingerprint.py`; returns as `run_protocol`.

    Raises:
        UserError: if there are not enough clips, the encoders were pretrained on some, or a
            baseline is unknown.
    """
    settings = FingerprintSettings(**config.index.to_dict())
    if unknown := [name for name in config.families if name not in families.FAMILIES]:
        raise UserError(
            f"families has {', '.join(unknown)}, not among {', '.join(families.FAMILIES)}: correct "
            "the name, or set families=() for all"
        )
    if unknown := [name for name in config.baselines if name not in BASELINES]:
        raise UserError(
            f"baselines has {', '.join(unknown)}, not among {', '.join(BASELINES)}: correct it"
        )
    source = open_encoders(config.encoder)
    for modality in ("video", "audio"):
        source.require(modality)
    clips, data, unused = clip_sets(config.data, source)
    clips.check()
    # One more than count: whether an answer that does not count ties with the last that does.
    asked_for = config.answers + 1
    baselines, skipped = load_baselines(config.baselines, answers=asked_for)
    # Results without a baseline are not those with it: the ones that run are part of the config.
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.baselines = tuple(name for name in config.baselines if name not in skipped)
    return run_protocol(
        PROTOCOL,
        config,
        workdir,
        (),
        compute=lambda _: (settings, clips, baselines, unused, skipped),
        measure=_measure,
        encoder=source,
        data=data,
    )


def _measure(
    context: Context,
    prepared: tuple[FingerprintSettings, ClipSets, list[Searcher], dict[str, str], dict[str, str]],
) -> Measured:
    config, (settings, clips, baselines, unused, skipped) = context.config, prepared
    asked_for = config.answers + 1
    # Small products, many a second: threads that wait for each other cost more than they give.
    with (
        tempfile.TemporaryDirectory() as directory,
        threadpoolctl.threadpool_limits(config.execution.threads),
    ):
        ours = IndexSearcher(
            Path(directory),
            config.encoder,
            settings,
            answers=asked_for,
        )
        searchers: list[Searcher] = [ours, *baselines]
        for searcher in searchers:
            with context.stages(f"indexing for {', '.join(searcher.methods)}"):
                searcher.index(
                    not_empty_clips([*clips.references, *clips.fillers], unused),
                    not_empty_clips(clips.background, unused),
                )
        references = [clip for clip in clips.references if clip.name not in unused]
        clips = dataclasses.replace(clips, references=references)
        examples = Examples(clips.references)
        with context.stages("queries"):
            asked = ask(
                make_queries(
                    clips,
                    config.queries.to_dict(),
                    config.families or tuple(families.FAMILIES),
                    seed=config.seed,
                ),
                searchers,
                answers=config.answers,
                tolerance_seconds=config.tolerance_seconds,
                each=examples.take,
            )
    tables = {
        method: table_of(asked, method, resamples=config.bootstrap.resamples, seed=config.seed)
        for method in asked.answers
    }
    details = {
        "tables": tables,
        "fused_error_ratio": error_ratio(asked),
        "clips": {
            role: len(getattr(clips, role))
            for role in ("references", "fillers", "distractors", "others", "background")
        },
        "reference_videos": len({clip.video for clip in clips.references}),
        "unused": unused,
        "skipped_baselines": skipped,
        "transformations_version": families.VERSION,
    }
    return Measured(
        outcomes=outcomes(asked),
        metrics=metrics(asked),
        details=details,
        sections=sections(tables, examples, details),
    )


def clip_sets(
    data: ml_collections.ConfigDict, source: EncoderSource
) -> tuple[ClipSets, dict[str, str], dict[str, str]]:
    """Returns clips by role, fingerprints of the data, and files that give no clip.

    Args:
        data: section of the config; with `files` these are cut into the references, and the
            prepared records (and `sounds`) are what must not be found.
        source: the encoders, which must not know the records.

    Raises:
        UserError: if they were pretrained on some.
        UserError: if there are not enough clips.
    """
    records = RecordDataset(data.directory, data.split)
    roles: dict[str, list[SourceClip]] = {}
    first = 0
    for role in ("references", "distractors", "others", "background"):
        roles[role] = clips_of_records(records, data[role], first)
        first += data[role]
    check_not_trained_on(
        source, records, np.arange(first), allow=data.allow_trained_on, what="clips"
    )
    fingerprints = {"records": records.fingerprint}
    recorded = roles.pop("references")
    if not data.files:
        return ClipSets(recorded, [], **roles), fingerprints, {}
    paths = sorted(p for p in local_path(data.files).iterdir() if p.is_file())
    if not paths:
        raise UserError(f"no files in {data.files}")
    sound_paths = sorted(p for p in local_path(data.sounds).iterdir() if p.is_file())
    fingerprints |= {"files": _digest(paths), "sounds": _digest(sound_paths)}
    sounds = sounds_of_files(sound_paths, data.sound_sets, sample_rate_hz=data.sample_rate_hz)
    # Decodes all files, and so comes last.
    segments, unused = segments_of_files(
        paths,
        segment_seconds=data.segment_seconds,
        short_side=data.short_side,
        max_fps=data.max_fps,
        sample_rate_hz=data.sample_rate_hz,
    )
    fillers = [*recorded, *sounds["fillers"]]
    for role in ("distractors", "background"):
        roles[role] += sounds[role]
    return ClipSets(segments, fillers, **roles), fingerprints, unused


def _digest(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def load_baselines(names: Sequence[str], *, answers: int) -> tuple[list[Searcher], dict[str, str]]:
    """Returns the baselines that can run here, and why the others cannot.

    Args:
        names: keys of `BASELINES`.
        answers: largest number of answers to a query.
    """
    found: list[Searcher] = []
    skipped: dict[str, str] = {}
    for name in names:
        try:
            found.append(BASELINES[name](answers=answers))
        except ImportError as error:
            skipped[name] = f"{error}: pip install -r benchmarks/requirements.txt"
            print(f"{name} is left out: {skipped[name]}", flush=True)
    return found, skipped


def outcomes(asked: Asked) -> Outcomes:
    """Returns what is kept of every query."""
    values: dict[str, np.ndarray] = {
        "family": asked.family,
        "strength": asked.strength,
        "findable": asked.findable,
        "medium": asked.chosen(strength="medium"),
        "medium_findable": asked.chosen(strength="medium") & asked.findable,
        "medium_distractor": asked.chosen(strength="medium") & ~asked.findable,
    }
    for method, answered in asked.answers.items():
        values |= {
            f"r1_{method}": answered.hits(1),
            f"r5_{method}": answered.hits(5),
            f"scores_{method}": answered.scores,
            f"normalised_{method}": answered.normalised,
            f"correct_{method}": answered.correct,
            f"accepted_{method}": answered.accepted.astype(float),
            f"found_{method}": answered.accepted * answered.hits(1),
        }
    return Outcomes(asked.units, asked.videos.tolist(), values)


def metrics(asked: Asked) -> Mapping[str, Metric]:
    """Returns the headline figures: means over families at medium strength."""
    found: dict[str, Metric] = {}
    for method, answered in asked.answers.items():
        ours = method in _OURS
        label = f"{method}, {'ours' if ours else 'baseline'}"

        def mean(values: str) -> dict[str, Any]:
            inputs = (values, "family")
            return {"kind": "class_mean", "inputs": inputs, "chosen": "medium_findable"}

        found[f"{method}_r1"] = Metric(**mean(f"r1_{method}"), what=f"R@1 {label}", headline=True)
        found[f"{method}_r5"] = Metric(**mean(f"r5_{method}"), what=f"R@5 {label}")
        for name, what in (("scores", ""), ("normalised", ", normalised scores")):
            inputs = (f"{name}_{method}", f"correct_{method}", "findable")
            for key, kind, title in (
                ("map", "micro_average_precision", "µAP"),
                ("recall_at_p90", "recall_at_precision_90", "recall at 90 % precision"),
            ):
                found[f"{method}_{key}_{name}"] = Metric(
                    kind, inputs, f"{title} {label}{what}", chosen="medium"
                )
        if answered.has_threshold:
            found[f"{method}_recall_at_threshold"] = Metric(
                **mean(f"found_{method}"), what=f"recall at the default threshold {label}"
            )
            found[f"{method}_false_match_rate"] = Metric(
                kind="mean",
                inputs=(f"accepted_{method}",),
                what=f"distractors with a match at the default threshold {label}",
                chosen="medium_distractor",
            )
    return found
