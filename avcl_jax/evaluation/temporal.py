"""Temporal tasks on held-out records: speed, direction and order, by the heads of a run.

Null controls are networks trained on the same tasks of noise.

python -m avcl_jax.main --config=configs/temporal.py --config.encoder=RUN
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath
from sklearn.metrics import confusion_matrix

from avcl_jax.batched import render_all
from avcl_jax.data.selection import UsableRecords
from avcl_jax.data.views import BACKWARD, FORWARD
from avcl_jax.errors import UserError
from avcl_jax.evaluation.classifier import fit_classifier
from avcl_jax.evaluation.driver import Context, run_protocol
from avcl_jax.evaluation.protocol import Measured, Metric, Outcomes, Protocol
from avcl_jax.evaluation.splits import Trial
from avcl_jax.evaluation.views import (
    MODALITY_INPUTS,
    PretrainedRun,
    drawn_pairs,
    encode,
    open_run,
    random_views,
)
from avcl_jax.objectives.temporal import TASKS, temporal_targets
from avcl_jax.page import matrices, section

PROTOCOL = Protocol(
    name="temporal_tasks",
    version=4,
    title="Temporal tasks on held-out records",
    definition=(
        "Of each record evaluation.pairs_per_video pairs of views are drawn as in training "
        "(speeds, directions and order jointly balanced; the same for the same seed and record), "
        "audio and video at one speed and in one direction however the run was trained, "
        "and cropped to the largest centred square, without augmentation.",
        "The heads of the run classify them: speed and direction of each view by its video and by "
        "its audio, order of a pair by two videos, two audios, and video and audio.",
        "A record on which not all speeds fit, or whose frame rate is under 0.45 of that of the "
        "clips or changes too much, is left out of the speed task; a pair of speeds that "
        "cannot be before, overlapping and after is left out of the order task; a video in which "
        "nothing moves is left out of all tasks that use video, a silent view out of all that use "
        "audio.",
        "Of each task an equal number of views of each class is scored, chosen by the seed, so "
        "that chance is one over the number of classes for whatever cannot tell them apart.",
    ),
)
_ROWS = "Rows are true classes, columns predicted ones, in % of the row."


@dataclass(frozen=True)
class TaskScore:
    """Score of one temporal task on held-out views.

    Attributes:
        confusion: int [classes, classes], rows true, columns predicted; every row has the same sum.
        scored: bool [views], the views that were scored: an equal number of each class.
        correct: bool [views], those of them classified correctly.
    """

    confusion: np.ndarray
    scored: np.ndarray
    correct: np.ndarray

    @property
    def accuracy(self) -> float:
        """Fraction of views (or pairs of views) classified correctly."""
        return float(self.correct.sum() / self.scored.sum())


def score_task(logits: np.ndarray, labels: np.ndarray, mask: np.ndarray, *, seed: int) -> TaskScore:
    """Scores one classifier on an equal number of views of each class.

    Views are drawn at random, so their labels are balanced only on average; scoring as many of each
    class, chosen at random, makes chance exactly 1 / classes for whatever cannot tell them apart, a
    constant answer included.

    Args:
        logits: float [..., K].
        labels: int [...] in [0, K).
        mask: bool [...], where the task is defined.

    Raises:
        ValueError: if a logit under the mask is not finite.
        UserError: if a class never occurs under the mask.
    """
    classes = logits.shape[-1]
    if not np.isfinite(logits[mask]).all():
        raise ValueError("a logit of a masked-in view is not finite")
    labels, mask = labels.ravel(), mask.ravel()
    predicted = logits.reshape(-1, classes).argmax(axis=-1)
    members = [np.flatnonzero(mask & (labels == c)) for c in range(classes)]
    if not (fewest := min(counts := [len(member) for member in members])):
        raise UserError(f"cannot balance {classes} classes: the held-out views have {counts}")
    rng, scored = np.random.default_rng(seed), np.zeros(len(labels), bool)
    for member in members:
        scored[rng.choice(member, fewest, replace=False)] = True
    confusion = confusion_matrix(labels[scored], predicted[scored], labels=range(classes))
    return TaskScore(confusion, scored, scored & (predicted == labels))


def task_logits(
    context: Context, run: PretrainedRun, records: UsableRecords
) -> dict[str, np.ndarray]:
    """Returns logits and labels of pairs of views of records, [records, pairs, …] each.

    Their numbers and draws are `evaluation.pairs_per_video` and `seed` of the protocol's config.
    """
    pairs, seed = context.config.evaluation.pairs_per_video, context.config.seed

    def render(position: int) -> dict[str, Any]:
        return drawn_pairs(records, position, run.spec, pairs=pairs, seed=seed)

    arrays = encode(context, run, run.logits, render, records, key=(pairs, seed))
    return {name.removeprefix("run/"): array for name, array in arrays.items()}


def measure_tasks(
    run: PretrainedRun, records: UsableRecords, arrays: Mapping[str, np.ndarray], seed: int
) -> Measured:
    """Returns outcomes by record and the metric of every task that is defined for a view.

    Args:
        arrays: outputs of `task_logits` for the records.
        seed: seed of `score_task`.

    Raises:
        UserError: if only some classes of a task ever occur.
    """
    names, speeds = [name for name in TASKS if name in arrays], tuple(run.config.views.speeds)
    rows = {name: value.reshape(-1, *value.shape[2:]) for name, value in arrays.items()}
    targets = temporal_targets({k: jnp.asarray(v) for k, v in rows.items() if k not in names})
    values: dict[str, np.ndarray] = {}
    metrics: dict[str, Metric] = {}
    scores: dict[str, TaskScore] = {}
    for name in names:
        labels, mask = jax.device_get(targets[name])
        if not mask.any():
            continue  # for no record: video or audio is missing or too short
        scores[name] = score = score_task(rows[name], labels, mask, seed=seed)
        # A record counts as often as its views were scored; records are resampled whole.
        inputs = f"correct_{name}", f"scored_{name}"
        for key, views in zip(inputs, (score.correct, score.scored), strict=True):
            values[key] = views.reshape(len(records), -1).sum(axis=1)
        chance = 1 / len(score.confusion)  # exact, as every class is scored equally often
        metrics[name] = Metric("ratio", inputs, TASKS[name].title, chance=chance, headline=True)
    confusions = {
        TASKS[name].title: (score.confusion, TASKS[name].classes(speeds))
        for name, score in scores.items()
    }
    lacking = len(records.lacking(tuple(run.source.encoders)))
    return Measured(
        Outcomes(records.record_ids, records.sources, values),
        metrics,
        details={
            "confusion": {name: score.confusion.tolist() for name, score in scores.items()},
            "views_scored": {name: int(score.scored.sum()) for name, score in scores.items()},
            "too_short": records.num_too_short,
            "incomplete": lacking - records.num_too_short,
        },
        sections=[section("Confusion of the temporal tasks", _ROWS, matrices(confusions))]
        * bool(scores),
    )


def temporal_tasks(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> dict[str, Any]:
    """Runs the protocol by `configs/temporal.py`; returns as `run_protocol`.

    Raises:
        UserError: if run and records do not fit, no task is defined, or a class never occurs.
    """
    run, records = open_run(config)

    def compute(context: Context) -> dict[str, np.ndarray]:
        with context.stages("views"):
            return task_logits(context, run, records)

    def measure(context: Context, arrays: dict[str, np.ndarray]) -> Measured:
        with context.stages("scores"):
            measured = measure_tasks(run, records, arrays, config.seed)
        if not measured.metrics:
            raise UserError(f"no temporal task is defined for a record of {records}")
        return measured

    trials = [Trial("all", run.source, records)]
    return run_protocol(
        PROTOCOL, config, workdir, trials, compute=compute, measure=measure, heads=run.heads
    )


class NullControl(NamedTuple):
    """Scores of networks on noise, which is the same at every speed and in both directions.

    A network that leaves chance has found a trace of the rendering, and then the accuracies on real
    videos prove nothing.

    Attributes:
        scores: scores of the tasks of one view, by name: `speed_video`, `direction_audio`, ….
        train_loss: mean training loss of the last epoch, by modality.
        views: test views of each task.
    """

    scores: dict[str, TaskScore]
    train_loss: dict[str, float]
    views: int


def noise_control(
    run: PretrainedRun,
    settings: ml_collections.ConfigDict,
    train: UsableRecords,
    test: UsableRecords,
    *,
    threads: int,
) -> NullControl:
    """Trains one network per modality on the tasks of one view of noise; tests it on other noise.

    Each record of stationary noise is rendered as the run renders, at every speed in either
    direction, `train_views` or `test_views` times.

    Args:
        run: run whose rendering is tested; the networks have the shape of its encoders.
        settings: section `evaluation.null` of `configs/evaluate.py`.
    """
    seed, speeds = run.config.seed, range(len(run.spec.views.speeds))

    def render(records: UsableRecords, views: int, seed: int) -> dict[str, Any]:
        render = functools.partial(
            random_views,
            records,
            spec=run.spec,
            speeds=speeds,
            directions=(FORWARD, BACKWARD),
            views=2 * len(speeds) * views,
            seed=seed,
        )
        return render_all(render, range(len(records)), threads=threads)

    arrays = render(train, settings.train_views, seed), render(test, settings.test_views, seed + 1)
    scores: dict[str, TaskScore] = {}
    losses: dict[str, float] = {}
    for modality, encoder in run.source.encoders.items():
        tasks = {task.kind: task for task in TASKS.values() if task.reads == (modality,)}
        sides = []
        for side in arrays:
            known = side[f"has_{modality}"]
            labels = {k: np.asarray(task.labels(side))[known].ravel() for k, task in tasks.items()}
            views = side[MODALITY_INPUTS[modality]][known]
            sides.append((views.reshape(-1, *views.shape[2:]), labels))
        (views, labels), (test_views, test_labels) = sides
        fit = fit_classifier(
            encoder,
            views[:, None],  # items of one view each, so that an epoch shows them all
            {kind: numbers[:, None] for kind, numbers in labels.items()},
            classes={kind: len(task.classes(speeds)) for kind, task in tasks.items()},
            seed=seed,
            **settings.fit,
        )
        logits = fit.predict(test_views, batch_size=settings.fit.batch_size)
        for kind, task in tasks.items():
            mask = np.ones(len(test_views), dtype=bool)
            scores[task.name] = score_task(logits[kind], test_labels[kind], mask, seed=seed)
        losses[modality] = fit.losses[-1]
    scored = min(int(score.confusion.sum()) for score in scores.values())
    return NullControl(scores, losses, scored)
