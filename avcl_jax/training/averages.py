"""Averages of metrics, which a step returns and a log period merges."""

from __future__ import annotations

import jax.numpy as jnp
from clu import metrics as clu_metrics
from jaxtyping import Array

Metrics = dict[str, clu_metrics.Average]


def average(value: Array, count: Array | float = 1.0) -> clu_metrics.Average:
    """A mean with weight `count` for merging with those of other steps."""
    count = jnp.asarray(count, jnp.float32)
    value = jnp.where(count > 0, value.astype(jnp.float32), 0.0)
    return clu_metrics.Average(total=value * count, count=count)


def merge_metrics(first: Metrics, second: Metrics) -> Metrics:
    """Merges the averages of two steps or periods."""
    return {name: first[name].merge(second[name]) for name in second}
