"""Gradients of a batch that does not fit in memory, when its loss looks at all of it at once.

A contrastive loss compares every embedding with every other, so the gradients of parts of a batch
do not add up to that of the whole. Gao et al., "Scaling Deep Contrastive Learning Batch Size under
Memory Limited Setup", RepL4NLP 2021 (GradCache): the model runs on one micro-batch after the other
and keeps only its outputs; the loss and its gradient by these outputs are computed on the whole
batch; then the model runs again on each micro-batch, to carry its part of that gradient back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from avcl_jax.training.sharding import rows_sharding

# (parameters, inputs) -> (outputs that the loss sees, updated statistics of normalisation).
Forward = Callable[[Any, Any], tuple[Any, Any]]
# outputs of the whole batch -> (scalar, anything else).
Objective = Callable[[Any], tuple[Array, Any]]


def split_rows(rows: Any, parts: int, mesh: Mesh) -> Any:
    """Arrays [batch, ...] to micro-batches [parts, batch / parts, ...]; row r goes to r % parts.

    Every device keeps its rows, and which rows go together does not depend on how many devices
    there are.
    """
    sharded = NamedSharding(mesh, PartitionSpec(None, mesh.axis_names))

    def split(array: Array) -> Array:
        array = array.reshape(-1, parts, *array.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(array, sharded)

    return jax.tree.map(split, rows)


def join_rows(micro_batches: Any, mesh: Mesh) -> Any:
    """Undoes `split_rows`."""

    def join(array: Array) -> Array:
        array = array.swapaxes(0, 1).reshape(-1, *array.shape[2:])
        return jax.lax.with_sharding_constraint(array, rows_sharding(mesh))

    return jax.tree.map(join, micro_batches)


def gradients(
    forward: Forward, objective: Objective, params: Any, inputs: Any, *, parts: int, mesh: Mesh
) -> tuple[Any, Any, Any]:
    """Gradient of `objective(forward(params, inputs))` with the memory of one micro-batch.

    Equal to the gradient of the whole batch where no row's output depends on other rows. With batch
    normalisation in training it does, and the statistics are those of the micro-batch.

    Args:
        objective: the loss; called once, on the outputs of the whole batch in their order.
        inputs: arrays [batch, ...]; every device has as many rows of each micro-batch.
        parts: number of micro-batches; with 1 nothing is computed twice.

    Returns:
        Gradient by the parameters, the second value that `objective` returned, and the updated
        statistics that each micro-batch leads to from the same old ones, [parts, ...].
    """
    if parts == 1:

        def whole(params: Any) -> tuple[Array, Any]:
            outputs, statistics = forward(params, inputs)
            loss, rest = objective(outputs)
            return loss, (rest, statistics)

        gradient, (rest, statistics) = jax.grad(whole, has_aux=True)(params)
        return gradient, rest, jax.tree.map(lambda leaf: leaf[None], statistics)

    micro_batches = split_rows(inputs, parts, mesh)
    outputs, statistics = jax.lax.map(lambda part: forward(params, part), micro_batches)
    by_outputs, rest = jax.grad(objective, has_aux=True)(join_rows(outputs, mesh))

    def add(total: Any, part: tuple[Any, Any]) -> tuple[Any, None]:
        part_inputs, part_by_outputs = part
        # The statistics of this second run are those of the first.
        _, pull_back = jax.vjp(lambda params: forward(params, part_inputs)[0], params)
        (by_params,) = pull_back(part_by_outputs)
        return jax.tree.map(jnp.add, total, by_params), None

    zero = jax.tree.map(jnp.zeros_like, params)
    gradient, _ = jax.lax.scan(add, zero, (micro_batches, split_rows(by_outputs, parts, mesh)))
    return gradient, rest, statistics


def merge_statistics(
    old: Mapping[str, Any], updated: Mapping[str, Any], rows: Mapping[str, Array]
) -> dict[str, Any]:
    """One update of the running statistics from those that the micro-batches lead to.

    They are averaged by the number of rows that entered them, so that the running averages look as
    many steps back as without micro-batches. The variance lacks what the means of the micro-batches
    differ by. A module none of whose rows is present in the whole batch keeps its old statistics.

    Args:
        old: running statistics by module of the model, before the step.
        updated: the same after it, [parts, ...].
        rows: bool [parts, ...] by module, rows of each micro-batch that entered them.
    """
    merged = {}
    for name, values in updated.items():
        count = rows[name].reshape(len(rows[name]), -1).sum(axis=1).astype(jnp.float32)
        weight = count / jnp.maximum(count.sum(), 1.0)

        def average(new: Array, before: Array, weight: Array = weight) -> Array:
            weight = weight.reshape(-1, *(1,) * before.ndim)
            # Statistics of no row may be NaN, and times 0 still are.
            mean = jnp.where(weight > 0, weight * new, 0.0).sum(axis=0)
            return jnp.where(weight.any(), mean, before)

        merged[name] = jax.tree.map(average, values, old[name])
    return merged
