"""Projection of features to compact vectors: centred, whitened, reduced, of unit length.

Features of a trained encoder lie in a narrow cone and most of their variance is in a few directions
that tell the kind of clip. Copies differ from their neighbours in the others, so all directions
have equal weight, except those in which the references hardly vary: noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import threadpoolctl

# Added to each variance, as a fraction of the mean one: keeps directions of noise small.
_SHRINKAGE = 0.01


class Projection(NamedTuple):
    """A linear map fitted to reference features."""

    mean: np.ndarray  # float32 [D]
    matrix: np.ndarray  # float32 [D, d]
    fitted_to: int  # number of segments

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Projection:
        """Returns the projection whose fields are stored as arrays."""
        return cls(arrays["mean"], arrays["matrix"], int(arrays["fitted_to"]))

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Returns float32 [n, d] of unit length for features [n, D]."""
        vectors = (np.asarray(features, np.float32) - self.mean) @ self.matrix
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors / np.maximum(norms, 1e-12)


def fit_projection(features: np.ndarray, dimensions: int) -> Projection:
    """Fits centre, whitening and principal components.

    Args:
        features: [n, D], n may be small: 1, or 0 if no file has this modality yet.
        dimensions: components to keep, at most.
    """
    features = np.asarray(features, np.float64)
    mean = features.sum(axis=0) / max(len(features), 1)
    covariance = (features - mean).T @ (features - mean) / max(len(features), 1)
    # Few segments span few directions: the others get the mean variance instead of none.
    weight = len(features) / (len(features) + len(mean))
    average = float(np.trace(covariance)) / len(mean) or 1.0
    covariance = weight * covariance + (1 - weight) * average * np.eye(len(mean))
    # On a busy machine two threads, which wait for each other, take several times as long.
    with threadpoolctl.threadpool_limits(1):
        variances, directions = np.linalg.eigh(covariance)
    kept = np.argsort(variances)[::-1][:dimensions]
    scale = 1 / np.sqrt(np.maximum(variances[kept], 0) + _SHRINKAGE * average)
    return Projection(
        mean.astype(np.float32), (directions[:, kept] * scale).astype(np.float32), len(features)
    )
