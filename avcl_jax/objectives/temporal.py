"""Temporal self-supervision: speed, direction and order as masked classification.

Speed and direction are read from one feature per view and modality; order from two features, either
of one modality (vv, aa) or of both (va, the pairs (v1, a2) and (v2, a1)).
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from avcl_jax.objectives.views import per_view

TERMS = (
    "speed_video",
    "speed_audio",
    "direction_video",
    "direction_audio",
    "order_vv",
    "order_aa",
    "order_va",
)


def classification_loss(
    logits: Float[Array, "*batch classes"],
    labels: Int[Array, "*batch"],
    mask: Bool[Array, "*batch"],
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean cross-entropy, −log softmax(logits)[label], over the entries where the mask is set.

    Args:
        logits: [..., classes], any float dtype; computed in float32 (float64 if given).
        labels: int [...] in [0, classes); anything where the mask is not set.
        mask: bool [...].

    Returns:
        The scalar loss, 0 with zero gradient if the mask is empty, and metrics: `accuracy` over the
        counted entries (a tie for the first place is wrong unless the label's index is lowest) and
        `count`, how many entries count.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    # A masked entry comes from a modality that is missing: whatever it holds, even NaN, must
    # neither reach the loss nor its gradient.
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
    """Labels and masks of every temporal term, both [videos, 2] ([videos] for order_vv, order_aa).

    Args:
        batch: has_video, has_audio: bool [videos], or [videos, 2] of each view; video_moves,
            speed_mask, direction_mask, order_mask: bool [videos];
            video_speed, audio_speed, video_direction, audio_direction: int [videos, 2];
            order: int [videos], 0 before, 1 overlapping, 2 after, of view 1 relative to view 2.

    Returns:
        Term name → (labels, mask). A term counts where its task is defined for the video and every
        modality that it reads exists; a video in which nothing moves has no speed, direction or
        order. order_va contains (v1, a2), whose label is the order itself, and (v2, a1), whose
        label is the reverse: 2 − order.
    """
    has_video = per_view(batch["has_video"]) & per_view(batch["video_moves"])
    has_audio = per_view(batch["has_audio"])
    order = batch["order"]
    order_mask = batch["order_mask"]
    return {
        "speed_video": (batch["video_speed"], per_view(batch["speed_mask"]) & has_video),
        "speed_audio": (batch["audio_speed"], per_view(batch["speed_mask"]) & has_audio),
        "direction_video": (
            batch["video_direction"],
            per_view(batch["direction_mask"]) & has_video,
        ),
        "direction_audio": (
            batch["audio_direction"],
            per_view(batch["direction_mask"]) & has_audio,
        ),
        "order_vv": (order, order_mask & has_video.all(axis=1)),
        "order_aa": (order, order_mask & has_audio.all(axis=1)),
        "order_va": (
            jnp.stack([order, 2 - order], axis=1),
            per_view(order_mask) & has_video & has_audio[:, ::-1],
        ),
    }


def temporal_losses(
    outputs: Mapping[str, Array], batch: Mapping[str, Array]
) -> dict[str, tuple[Array, dict[str, Array]]]:
    """Loss and metrics of every temporal term for which there are logits.

    Args:
        outputs: What the model returns; read are the entries named in `TERMS`: logits
            [videos, 2, classes], or [videos, 3] for order_vv and order_aa. A term that is left out
            (a model of one modality) is not computed.
        batch: As `temporal_targets`.

    Returns:
        Term name → (scalar loss, {"accuracy", "count"}), in the order of `TERMS`.
    """
    targets = temporal_targets(batch)
    return {
        name: classification_loss(outputs[name], *targets[name])
        for name in TERMS
        if name in outputs
    }
