"""Temporal tasks on held-out records: speed, direction and order, by the heads of a run.

python -m avcl_jax.main --config=configs/temporal.py --config.encoder=RUN
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from avcl_jax import experiment
from avcl_jax.data.rendering import RenderSpec
from avcl_jax.data.usable_records import UsableRecords
from avcl_jax.evaluation.cross_modal import LoadedRun, load_for
from avcl_jax.evaluation.embed import drawn_pairs, encode_all, logit_function
from avcl_jax.evaluation.page import matrix, section
from avcl_jax.evaluation.parts import in_parts, key_of
from avcl_jax.evaluation.protocol import (
    Measured,
    Metric,
    Outcomes,
    Protocol,
    ProtocolError,
)
from avcl_jax.evaluation.protocol_run import ProtocolRun
from avcl_jax.evaluation.temporal import TaskScore, score_task
from avcl_jax.evaluation.trained_on import check_not_trained_on
from avcl_jax.evaluation.written import Stages
from avcl_jax.objectives.temporal import TASKS, temporal_targets
from avcl_jax.paths import absolute_path

PROTOCOL = Protocol(
    name="temporal_tasks",
    version=4,
    title="Temporal tasks on held-out records",
    definition=(
        "Of each record evaluation.pairs_per_video pairs of views are drawn as in training "
        "(speeds, directions and order jointly balanced; the same for the same seed and record), "
        "sound and picture at one speed and in one direction however the run was trained, "
        "and cropped to the largest centred square, without augmentation.",
        "The heads of the run classify them: speed and direction of each view by its picture and "
        "by its sound, order of a pair by two pictures, two sounds, and picture and sound.",
        "A record on which not all speeds fit, or whose frame rate is under 0.45 of that of the "
        "clips or changes too much, is left out of the speed task; a pair of speeds that "
        "cannot be before, overlapping and after is left out of the order task; a video in which "
        "nothing moves is left out of all tasks that use video, a silent view out of all that use "
        "audio.",
        "Of each task an equal number of views of each class is scored, chosen by the seed, so "
        "that chance is one over the number of classes for whatever cannot tell them apart.",
    ),
)


def task_logits(
    compute: Callable[[Mapping[str, np.ndarray]], Mapping[str, Any]],
    source: UsableRecords,
    spec: RenderSpec,
    positions: Sequence[int],
    *,
    pairs: int,
    seed: int,
    chunk: int,
    threads: int,
) -> dict[str, np.ndarray]:
    """Returns logits and labels of views of the records at `positions`, [records, pairs, …] each.

    Args:
        compute: of `embed.logit_function`.
        source: usable records.
        spec: rendering, with the spectrogram made on the host.
        positions: in `source`.
        pairs: of views, of each record.
        seed: of the draw of views.
        chunk: records encoded at a time.
        threads: records rendered at a time.
    """
    return encode_all(
        lambda number: drawn_pairs(source, positions[number], spec, pairs=pairs, seed=seed),
        len(positions),
        compute,
        chunk=chunk,
        threads=threads,
    )


def score_tasks(arrays: Mapping[str, np.ndarray], seed: int) -> dict[str, TaskScore]:
    """Scores every task that is defined for a view; `seed` chooses the views that balance.

    Raises:
        UserError: if only some classes of a task ever occur.
    """
    names = [name for name in TASKS if name in arrays]
    rows = {name: value.reshape(-1, *value.shape[2:]) for name, value in arrays.items()}
    targets = temporal_targets({k: jnp.asarray(v) for k, v in rows.items() if k not in names})
    scores = {}
    for name in names:
        labels, mask = jax.device_get(targets[name])
        if not mask.any():
            continue  # for no record: there is no picture, no sound, or too little of it
        scores[name] = score_task(rows[name], labels, mask, seed=seed)
    return scores


def temporal_tasks(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> dict[str, Any]:
    """Runs the protocol and writes its results to `workdir`.

    Args:
        config: as `configs/temporal.py` returns it.
        workdir: of the results, local or gs://.

    Returns:
        The contents of results.json; empty in processes other than the first.

    Raises:
        ExportError: if `config.encoder` is no run.
        ProtocolError: if records lack a modality of the run, or no task is defined.
        UserError: if no view fits any record, or a class of a task never occurs.
    """
    workdir = absolute_path(workdir)
    stages = Stages()
    run = load_for(config)
    data = {"all": run.records.fingerprint}
    protocol_run = ProtocolRun(PROTOCOL, config, workdir, run.source, data, run.heads)
    if (done := protocol_run.finished()) is not None:
        return done
    check_not_trained_on(
        run.source,
        run.records.records,
        run.records.indices,
        allow=config.data.allow_trained_on,
        what="records",
    )
    compute = logit_function(
        experiment.audio_visual_model(run.config),
        run.variables,
        run.spec,
        pixel_mean=run.config.pixels.mean,
        pixel_std=run.config.pixels.std,
    )
    pairs = config.evaluation.pairs_per_video

    def part(positions: Sequence[int]) -> Mapping[str, np.ndarray]:
        return task_logits(
            compute,
            run.records,
            run.spec,
            positions,
            pairs=pairs,
            seed=config.seed,
            chunk=config.evaluation.chunk,
            threads=config.data.threads,
        )

    with stages("views"):
        key = key_of(run.source.fingerprint, run.heads, data, pairs, config.seed)
        arrays = in_parts(
            protocol_run.features / key,
            len(run.records),
            part,
            rows=config.evaluation.part_records,
        )
    if jax.process_index():
        return {}
    with stages("scores"):
        scores = score_tasks(arrays, config.seed)
    if not scores:
        raise ProtocolError(f"no temporal task is defined for a record of {run.records}")
    measured = _measured(scores, run)
    return protocol_run.write(measured, stages)


def task_outcomes(
    scores: Mapping[str, TaskScore], count: int
) -> tuple[dict[str, np.ndarray], dict[str, Metric]]:
    """Returns outcomes [records] of every task, and its metric.

    Args:
        scores: by task, as `score_tasks` returns them.
        count: number of records.
    """
    values: dict[str, np.ndarray] = {}
    metrics = {}
    for name, score in scores.items():
        # A record counts as often as its views were scored; records are resampled whole.
        values[f"correct_{name}"] = score.correct.reshape(count, -1).sum(axis=1)
        values[f"scored_{name}"] = score.scored.reshape(count, -1).sum(axis=1)
        metrics[name] = Metric(
            "ratio",
            (f"correct_{name}", f"scored_{name}"),
            TASKS[name].title,
            chance=score.chance,
            headline=True,
        )
    return values, metrics


def _measured(scores: Mapping[str, TaskScore], run: LoadedRun) -> Measured:
    records, trained = run.records, tuple(run.config.views.speeds)
    values, metrics = task_outcomes(scores, len(records))
    matrices = "".join(
        matrix(TASKS[name].title, score.confusion.tolist(), TASKS[name].classes(trained))
        for name, score in scores.items()
    )
    return Measured(
        Outcomes(records.record_ids, records.sources, values),
        metrics,
        details={
            "confusion": {name: score.confusion.tolist() for name, score in scores.items()},
            "views_scored": {name: int(score.scored.sum()) for name, score in scores.items()},
            "too_short": records.num_too_short,
            "incomplete": len(records.lacking(tuple(run.source.encoders))) - records.num_too_short,
        },
        sections=[
            section(
                "Confusion",
                "Rows are true classes, columns what was answered, in per cent of the row.",
                f'<div class="matrices">{matrices}</div>',
            )
        ],
    )
