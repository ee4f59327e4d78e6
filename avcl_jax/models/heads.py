"""Heads on top of the encoders: projections to embeddings and temporal classifiers."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from avcl_jax.models.layers import BatchNorm


class MultilayerPerceptron(nn.Module):
    """Dense, batch normalisation, ReLU, Dense.

    Without the normalisation, embeddings collapsed in trials with a feature bank (whose gradients
    were not yet balanced, see `objectives.contrastive`).

    Attributes:
        hidden: width of the hidden layer.
        features: width of the output.
        dtype: compute dtype.
    """

    hidden: int
    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch channels"],
        *,
        train: bool,
        mask: Bool[Array, " batch"] | None,
    ) -> Float[Array, "batch features"]:
        """Maps features to float32 outputs."""
        x = nn.Dense(self.hidden, use_bias=False, dtype=self.dtype, name="hidden")(x)
        x = nn.relu(BatchNorm(dtype=self.dtype, name="norm")(x, train=train, mask=mask))
        return nn.Dense(self.features, dtype=self.dtype, name="output")(x).astype(jnp.float32)


def normalize(x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
    """Scales each row to unit L2 norm; a zero row stays zero and has a finite gradient."""
    return x * (1.0 / jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12))


class ProjectionHead(nn.Module):
    """Projects features to embeddings on the unit sphere.

    Attributes:
        hidden: width of the hidden layer.
        features: dimension of the embedding.
        dtype: compute dtype.
    """

    hidden: int
    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch channels"],
        *,
        train: bool,
        mask: Bool[Array, " batch"] | None,
    ) -> Float[Array, "batch features"]:
        """Returns float32 embeddings of unit norm."""
        mlp = MultilayerPerceptron(self.hidden, self.features, self.dtype, name="mlp")
        return normalize(mlp(x, train=train, mask=mask))


class TemporalHead(nn.Module):
    """Classifies one feature, or an ordered pair of features.

    Attributes:
        hidden: width of the hidden layer.
        classes: number of classes.
        dtype: compute dtype.
    """

    hidden: int
    classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        *features: Float[Array, "batch _"],
        train: bool,
        mask: Bool[Array, " batch"] | None,
    ) -> Float[Array, "batch classes"]:
        """Returns float32 logits."""
        mlp = MultilayerPerceptron(self.hidden, self.classes, self.dtype, name="mlp")
        return mlp(jnp.concatenate(features, axis=-1), train=train, mask=mask)
