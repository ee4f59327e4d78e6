"""Views of a batch of videos, as the contrastive objective and the feature bank read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Modality = Literal["video", "audio"]
MODALITIES: tuple[Modality, ...] = ("video", "audio")
Term = tuple[Modality, Modality]  # of the anchor, of its positives and negatives


class Views(NamedTuple):
    """Two views of each video of a global batch, or of one device's part of it."""

    embeddings: Mapping[Modality, Float[Array, "videos 2 dim"]]
    present: Mapping[Modality, Bool[Array, "videos 2"]]
    playback: Mapping[Modality, Int[Array, "videos 2"]]  # number of speed and direction
    label: Int[Array, "videos labels"]  # −1 unknown; for health metrics only
    source_id: Int[Array, " videos"]  # equal for records cut from one file
    record_index: Int[Array, " videos"]  # number of the video, whatever the number of devices


def per_view(mask: Bool[Array, "videos *views"]) -> Bool[Array, "videos 2"]:
    """Returns a mask of views, given one of videos (for both of their views) or of views."""
    return mask if mask.ndim == 2 else jnp.broadcast_to(mask[:, None], (*mask.shape, 2))
