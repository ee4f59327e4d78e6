"""Null controls: can a network tell speed or direction where nothing can be known?

Stationary noise, filmed or recorded, looks and sounds the same at every speed and in both
directions. A network that is trained and tested on rendered views of it and leaves chance has found
a trace of the rendering, and then the accuracies on real videos prove nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import numpy as np

from avcl_jax.data.rendering import RenderSpec
from avcl_jax.data.usable_records import UsableRecords
from avcl_jax.data.views import BACKWARD, FORWARD
from avcl_jax.errors import UserError
from avcl_jax.evaluation.embed import MODALITY_INPUTS, random_views, render_all
from avcl_jax.evaluation.supervised import FitSpec, Prepare, fit_classifier
from avcl_jax.evaluation.temporal import TaskScore, score_task


@dataclasses.dataclass(frozen=True)
class NullControl:
    """What networks made of noise.

    Attributes:
        scores: by task, `speed_video`, `direction_video`, `speed_audio`, `direction_audio`.
        train_loss: mean training loss of the last epoch, by modality.
        views: test views of each task.
    """

    scores: dict[str, TaskScore]
    train_loss: dict[str, float]
    views: int

    def standard_error(self, task: str) -> float:
        """Returns the standard error of the accuracy of one who knows nothing."""
        score = self.scores[task]
        return float(np.sqrt(score.chance * (1 - score.chance) / score.confusion.sum()))


def render_null_views(
    source: UsableRecords, spec: RenderSpec, *, views: int, seed: int, threads: int
) -> dict[str, np.ndarray]:
    """Renders views of every record at all speeds and directions, equally often.

    Args:
        source: records of stationary noise.
        spec: the rendering under test: the one that training uses.
        views: of each record.
        seed: of their times and crops.
        threads: records rendered at a time.

    Raises:
        UserError: if `views` is no multiple of the combinations of speed and direction.
    """
    speeds = range(len(spec.views.speeds))
    combinations = 2 * len(speeds)
    if views % combinations:
        raise UserError(
            f"{views} views of each record do not give the {combinations} combinations of speed "
            f"and direction equally often: use a multiple of {combinations}"
        )

    def render(position: int) -> dict[str, np.ndarray]:
        return random_views(
            source,
            position,
            spec,
            speeds=speeds,
            directions=(FORWARD, BACKWARD),
            views=views,
            seed=seed,
        )

    return render_all(render, len(source), threads=threads)


def null_control(
    train: Mapping[str, np.ndarray],
    test: Mapping[str, np.ndarray],
    *,
    encoders: Mapping[str, nn.Module],
    prepare: Mapping[str, Prepare],
    num_speeds: int,
    spec: FitSpec,
    seed: int,
) -> NullControl:
    """Trains one network a modality on speed and direction of noise and tests it on other noise.

    Args:
        train: as `render_null_views`.
        test: the same of other records.
        encoders: small unbound networks by modality, "video" and "audio".
        prepare: input transforms by modality.
        num_speeds: number of playback speeds.
        spec: how to train.
        seed: of parameters and order.

    Returns:
        Accuracies on the test views.
    """
    scores: dict[str, TaskScore] = {}
    losses: dict[str, float] = {}
    for modality, encoder in encoders.items():
        name = MODALITY_INPUTS[modality]
        present = train[f"has_{modality}"], test[f"has_{modality}"]
        tasks = {"direction": 2, "speed": num_speeds}
        fit = fit_classifier(
            encoder,
            _one_view_items(train[name][present[0]]),
            {t: train[f"{modality}_{t}"][present[0]].reshape(-1, 1) for t in tasks},
            classes=tasks,
            prepare=prepare[modality],
            spec=spec,
            seed=seed,
        )
        logits = fit.predict(
            _one_view_items(test[name][present[1]])[:, 0], batch_size=spec.batch_size
        )
        for task in tasks:
            labels = test[f"{modality}_{task}"][present[1]].reshape(-1)
            mask = np.ones(len(labels), dtype=bool)
            scores[f"{task}_{modality}"] = score_task(logits[task], labels, mask, seed=seed)
        losses[modality] = fit.losses[-1]
    views = min(int(score.confusion.sum()) for score in scores.values())
    return NullControl(scores, losses, views)


def _one_view_items(views: np.ndarray) -> np.ndarray:
    """Returns [records, views, …] as items of one view each, so that an epoch shows them all."""
    return views.reshape(-1, 1, *views.shape[2:])
