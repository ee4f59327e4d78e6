"""Which views have a modality."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool


def per_view(mask: Bool[Array, "videos *views"]) -> Bool[Array, "videos 2"]:
    """Returns a mask of videos, or of both views of each video, as one of views."""
    return mask if mask.ndim == 2 else jnp.broadcast_to(mask[:, None], (*mask.shape, 2))
