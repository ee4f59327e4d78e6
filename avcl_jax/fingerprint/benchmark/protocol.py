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
from avcl_jax.evaluation.protocol import Measured, Protocol
from avcl_jax.evaluation.splits import check_not_trained_on
from avcl_jax.export.encoder import MODALITIES
from avcl_jax.export.runs import EncoderSource, open_encoders
from avcl_jax.fingerprint.benchmark import families
from avcl_jax.fingerprint.benchmark.clips import (
    ClipSets,
    Query,
    by_role,
    clips_of_records,
    make_queries,
    not_empty_clips,
    recordings_of_files,
    segments_of_files,
)
from avcl_jax.fingerprint.benchmark.outcomes import ask, error_ratio, make_tables, metrics
from avcl_jax.fingerprint.benchmark.report import draw_example, sections
from avcl_jax.fingerprint.benchmark.searchers import (
    BASELINES,
    Answer,
    IndexSearcher,
    Searcher,
    load_baselines,
)
from avcl_jax.fingerprint.settings import FingerprintSettings
from avcl_jax.paths import local_path

PROTOCOL = Protocol(
    name="fingerprinting",
    version=families.VERSION,
    title="Fingerprinting: the source of a transformed clip",
    definition=(
        "References are clean clips. Every family of transformations draws some of them, each "
        "with a distractor: a clip that is not indexed, transformed alike.",
        "Strengths and seeds are fixed in avcl_jax/fingerprint/benchmark/families.py. A clip "
        "without a modality that a family changes is not used in that family.",
        "R@k: fraction of the queries whose source is scored above all but k − 1 other answers; "
        "answers of equal score count as if the wrong ones came first. A method that cannot "
        "answer, for instance by audio about a clip without audio, has not found the source.",
        "µAP and recall at 90 % precision: over the five best answers to every query and every "
        "distractor in one list; worst order within equal scores, at the cut after five too.",
        "Normalised: minus the mean score of the query's three best answers from an index of clips "
        "that are in no other role.",
        "Offset: fraction of the queries whose best answer names the source and, within the "
        "tolerance, a time at which some moment of the query really lies.",
        "The mean over families counts every family once; truncated queries are apart. Medium "
        "strength unless another is named.",
        "The better single modality, and the better baseline, are chosen once for all families.",
        "Intervals resample videos. Where all queries came out alike no resample differs, and "
        "bounds are the exact ones of Clopper and Pearson for that number of videos.",
    ),
)


def fingerprinting(
    config: ml_collections.ConfigDict, workdir: epath.PathLike
) -> dict[str, Any] | None:
    """Runs the protocol by `configs/fingerprint.py`; returns as `run_protocol`.

    Raises:
        UserError: if there are not enough clips, the encoders were pretrained on some, a family or
            baseline is unknown, or truncation is the only family.
    """
    settings = FingerprintSettings(**config.index.to_dict())
    for key, known in (("families", families.FAMILIES), ("baselines", BASELINES)):
        if unknown := [name for name in config[key] if name not in known]:
            raise UserError(
                f"{key} has {', '.join(unknown)}, not among {', '.join(known)}: correct the name"
            )
    if tuple(config.families) == (families.TRUNCATION,):
        raise UserError(
            f"families has {families.TRUNCATION} alone, and metrics are over the others: add one"
        )
    source = open_encoders(config.encoder)
    for modality in MODALITIES:
        source.require(modality)
    clips, data, unused = clip_sets(config.data, source)
    # One more than count: whether an answer that does not count ties with the last that does.
    baselines, skipped = load_baselines(config.baselines, answers=config.answers + 1)
    # Results without a baseline are not those with it: the ones that run are part of the config.
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.baselines = tuple(name for name in config.baselines if name not in skipped)

    def measure(context: Context, _: object) -> Measured:
        # Small products, many per second: threads that wait for each other cost more.
        with (
            tempfile.TemporaryDirectory() as folder,
            threadpoolctl.threadpool_limits(config.execution.threads),
        ):
            ours = IndexSearcher(Path(folder), config.encoder, settings, config.answers + 1)
            return _measure(context, [ours, *baselines], clips, unused, skipped)

    return run_protocol(
        PROTOCOL,
        config,
        workdir,
        (),
        compute=lambda _: True,
        measure=measure,
        encoder=source,
        data=data,
    )


def _measure(
    context: Context,
    searchers: Sequence[Searcher],
    clips: ClipSets,
    unused: dict[str, str],
    skipped: Mapping[str, str],
) -> Measured:
    config = context.config
    for searcher in searchers:
        with context.stages(f"indexing for {', '.join(searcher.methods)}"):
            searcher.index(
                not_empty_clips([*clips.references, *clips.fillers], unused),
                not_empty_clips(clips.background, unused),
            )
    references = [clip for clip in clips.references if clip.name not in unused]
    clips = dataclasses.replace(clips, references=references)
    examples: dict[str, str] = {}

    def show(query: Query, answers: Mapping[str, Sequence[Answer]]) -> None:
        if query.findable and query.strength == "medium" and query.family not in examples:
            examples[query.family] = draw_example(query, answers["fused"])

    names = config.families or tuple(families.FAMILIES)
    with context.stages("queries"):
        outcomes = ask(
            make_queries(clips, config.queries.to_dict(), names, seed=config.seed),
            searchers,
            answers=config.answers,
            tolerance_seconds=config.tolerance_seconds,
            each=show,
        )
    tables = make_tables(outcomes, resamples=config.bootstrap.resamples, seed=config.seed)
    details = {
        "tables": tables,
        "fused_error_ratio": error_ratio(tables),
        "clips": {f.name: len(getattr(clips, f.name)) for f in dataclasses.fields(clips)},
        "reference_videos": len({clip.video for clip in references}),
        "unused": unused,
        "skipped_baselines": skipped,
    }
    shown = sections(tables, examples, skipped)
    return Measured(outcomes, metrics(outcomes), details, shown)


def clip_sets(
    data: ml_collections.ConfigDict, source: EncoderSource
) -> tuple[ClipSets, dict[str, str], dict[str, str]]:
    """Returns clips by role, fingerprints of the data, and files without a clip with the reasons.

    With `files` in the config these are cut into the references, and the records and `audio_files`
    are clips that must not be found.

    Raises:
        UserError: if the encoders were pretrained on some, or there are not enough clips.
    """
    records = RecordDataset(data.directory, data.split)
    counts = {role: data[role] for role in ("references", "distractors", "others", "background")}
    roles = by_role(clips_of_records(records), counts, f"records of {records.fingerprint}")
    rows = np.arange(sum(counts.values()))
    check_not_trained_on(source, records, rows, allow=data.allow_trained_on, what="clips")
    fingerprints = {"records": records.fingerprint}
    if not data.files:
        return ClipSets(fillers=[], **roles), fingerprints, {}
    paths, audio_paths = _files(data.files), _files(data.audio_files)
    fingerprints |= {"files": _digest(paths), "audio_files": _digest(audio_paths)}
    recordings = recordings_of_files(audio_paths, sample_rate_hz=data.sample_rate_hz)
    roles["fillers"] = roles.pop("references")
    for role, clips in by_role(recordings, data.audio_clips, "recordings").items():
        roles[role] += clips
    # Decodes all files, and so comes last.
    segments, unused = segments_of_files(
        paths,
        segment_seconds=data.segment_seconds,
        short_side=data.short_side,
        max_fps=data.max_fps,
        sample_rate_hz=data.sample_rate_hz,
    )
    return ClipSets(references=segments, **roles), fingerprints, unused


def _files(directory: str) -> list[Path]:
    paths = sorted(path for path in local_path(directory).iterdir() if path.is_file())
    if not paths:
        raise UserError(f"no files in {directory}")
    return paths


def _digest(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
