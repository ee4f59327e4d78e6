"""Masks of the views that have a modality."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool


def per_view(mask: Bool[Array, "videos *views"]) -> Bool[Array, "videos 2"]:
    """Returns a mask of views, given one of videos (for both of their views) or of views."""
    return mask if mask.ndim == 2 else jnp.broadcast_to(mask[:, None], (*mask.shape, 2))
