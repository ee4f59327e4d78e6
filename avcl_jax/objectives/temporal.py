"""Temporal self-supervision: speed, direction and order as masked classification.

`TASKS` defines every task once: heads of the model, masks, terms of the loss, metrics and titles
follow from it. A new task is a `Task` there and a weight in the config, and a label in `data.views`
if it needs a new draw.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from avcl_jax.objectives.views import MODALITIES, Modality, per_view


@dataclasses.dataclass(frozen=True)
class Task:
    """Classification of one view, or of a pair of the two views of a video.

    Pairs within a modality are (view 1, view 2), one per video. Pairs across modalities are
    (v1, a2) and (v2, a1): the two intervals of one view coincide and have no order.

    Attributes:
        kind: "speed", "direction" or "order"; tasks of one kind are shown together.
        reads: modalities of the features; one for single views, two for pairs.
        classes: function from the trained speeds to the names of the classes.
        defined: name of the batch's mask, bool [videos], of videos for which the task is defined.
        labels: function from a batch to int labels, [videos, 2], or [videos] within a modality.
    """

    kind: str
    reads: tuple[Modality, ...]
    classes: Callable[[Sequence[int]], list[str]]
    defined: str
    labels: Callable[[Mapping[str, Array]], Array]

    @property
    def name(self) -> str:
        """Name of the task's logits, term and metrics: "speed_video", "order_va"."""
        initials = "".join(modality[0] for modality in self.reads)
        return f"{self.kind}_{initials if len(self.reads) == 2 else self.reads[0]}"

    @property
    def title(self) -> str:
        """Title for tables and charts."""
        return f"{self.kind}, {'-'.join(self.reads)}"

    @property
    def within(self) -> bool:
        """True if the task reads both views of one modality."""
        return len(self.reads) == 2 and self.reads[0] == self.reads[1]

    def inputs(self, by_modality: Mapping[Modality, Array]) -> tuple[Array, ...]:
        """Arrays [videos, 2, ...] of each modality, arranged so that item i of all is one example.

        Returns:
            One or two arrays [videos, 2, ...], or [videos, ...] within a modality.
        """
        first, *rest = (by_modality[modality] for modality in self.reads)
        if not rest:
            return (first,)
        if self.within:
            return first[:, 0], first[:, 1]
        return first, rest[0][:, ::-1]

    def present(self, by_modality: Mapping[Modality, Array]) -> Array:
        """Mask of examples all of whose inputs exist, from masks [videos, 2] of each modality."""
        first, *rest = self.inputs(by_modality)
        return first & rest[0] if rest else first


def _speed(m: Modality) -> Task:
    def classes(speeds: Sequence[int]) -> list[str]:
        return [f"{speed}×" for speed in speeds]

    return Task("speed", (m,), classes, "speed_mask", itemgetter(f"{m}_speed"))


def _direction(m: Modality) -> Task:
    labels = itemgetter(f"{m}_direction")
    return Task("direction", (m,), lambda _: ["forward", "backward"], "direction_mask", labels)


def _order(first: Modality, second: Modality) -> Task:
    def across(batch: Mapping[str, Array]) -> Array:
        """Labels of (v1, a2), the order itself, and of (v2, a1), the reverse."""
        return jnp.stack([batch["order"], 2 - batch["order"]], axis=1)

    labels = itemgetter("order") if first == second else across
    names = ["before", "overlapping", "after"]
    return Task("order", (first, second), lambda _: names, "order_mask", labels)


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        *map(_speed, MODALITIES),
        *map(_direction, MODALITIES),
        *(_order(m, m) for m in MODALITIES),
        _order("video", "audio"),
    )
}


def classification_loss(
    logits: Float[Array, "*batch classes"],
    labels: Int[Array, "*batch"],
    mask: Bool[Array, "*batch"],
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean cross-entropy, −log softmax(logits)[label], over the entries where the mask is set.

    Args:
        logits: any float dtype; computed in float32 (float64 if given).
        labels: numbers in [0, classes); anything where the mask is not set.
        mask: entries that count.

    Returns:
        The scalar loss, 0 with zero gradient if the mask is empty, and metrics: `accuracy` over the
        counted entries (a tie for the first place is wrong unless the label's index is lowest) and
        `count`, how many entries count.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    # A masked entry comes from a missing modality: its value, even NaN, must reach neither
    # the loss nor its gradient.
    logits = jnp.where(mask[..., None], logits, jnp.zeros((), logits.dtype))
    labels = jnp.where(mask, labels, jnp.zeros((), labels.dtype))
    log_probabilities = jax.nn.log_softmax(logits)
    entropy = -jnp.take_along_axis(log_probabilities, labels[..., None], axis=-1)[..., 0]
    weights = mask.astype(logits.dtype)
    count = jnp.maximum(weights.sum(), 1)
    correct = (logits.argmax(-1) == labels).astype(logits.dtype)
    metrics = {"accuracy": (correct * weights).sum() / count, "count": mask.sum()}
    return (entropy * weights).sum() / count, metrics


def temporal_targets(batch: Mapping[str, Array]) -> dict[str, tuple[Array, Array]]:
    """Labels and masks of every task, both [videos, 2], or [videos] within a modality.

    An example counts where its task is defined for the video and every modality that it reads
    exists; a video in which nothing moves has no speed, direction or order.

    Args:
        batch: has_video, has_audio: bool [videos], or [videos, 2] of each view; video_moves,
            speed_mask, direction_mask, order_mask: bool [videos];
            video_speed, audio_speed, video_direction, audio_direction: int [videos, 2];
            order: int [videos], 0 before, 1 overlapping, 2 after, of view 1 relative to view 2.
    """
    present: dict[Modality, Array] = {
        "video": per_view(batch["has_video"]) & per_view(batch["video_moves"]),
        "audio": per_view(batch["has_audio"]),
    }
    targets = {}
    for name, task in TASKS.items():
        mask = task.present(present)
        defined = batch[task.defined]
        targets[name] = (
            task.labels(batch),
            mask & (per_view(defined) if mask.ndim == 2 else defined),
        )
    return targets


def temporal_losses(
    outputs: Mapping[str, Array], batch: Mapping[str, Array]
) -> dict[str, tuple[Array, dict[str, Array]]]:
    """Loss and metrics (`classification_loss`) of every task for which there are logits.

    Args:
        outputs: Outputs of the model; read are the entries named in `TASKS`: logits
            [videos, 2, classes], or [videos, classes] within a modality.
        batch: Argument of `temporal_targets`.
    """
    targets = temporal_targets(batch)
    return {
        name: classification_loss(outputs[name], *targets[name])
        for name in TASKS
        if name in outputs
    }
