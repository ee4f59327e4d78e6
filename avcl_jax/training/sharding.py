"""The mesh, and where each array of the state and of a batch lives on it.

Everything is written for the global batch under one `jax.jit`: rows of a batch
are split over all data axes, parameters are replicated or split by the FSDP rule, rows of the
feature bank are split over all data axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from avcl_jax.errors import UserError

# Splitting small arrays costs more in latency than it saves in memory.
_MIN_FSDP_ELEMENTS = 2**16


def create_mesh(fsdp: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over devices with axis `data`, and `fsdp` where it is larger than 1.

    Axes are of type Auto: `jax.make_mesh` defaults to Explicit, under which the gather of the bank
    raises.

    Args:
        fsdp: devices over which parameters are split.
        devices: all that there are by default; others to compile for machines elsewhere.

    Raises:
        UserError: if `fsdp` does not divide the number of devices.
    """
    count = jax.device_count() if devices is None else len(devices)
    if fsdp < 1 or count % fsdp:
        raise UserError(
            f"execution.fsdp {fsdp} does not divide the {count} devices: use a divisor of {count}"
        )
    names = ("data", "fsdp") if fsdp > 1 else ("data",)
    shape = (count // fsdp, fsdp)[: len(names)]
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names), devices=devices)


def data_axes(mesh: Mesh) -> tuple[str, ...]:
    """Names of the axes over which rows are split: all of them."""
    return tuple(mesh.axis_names)


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Leading dimension split over all data axes."""
    return NamedSharding(mesh, PartitionSpec(data_axes(mesh)))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch(global_batch_size: int, mesh: Mesh, micro_batches: int) -> None:
    """Refuses a global batch that does not divide over the devices and its micro-batches.

    Raises:
        UserError: if it does not.
    """
    if micro_batches < 1:
        raise UserError(f"micro_batches {micro_batches} must be at least 1, which is the whole")
    parts = mesh.size * micro_batches
    if global_batch_size % parts:
        lower = max(global_batch_size // parts, 1) * parts
        where = f"{mesh.size} devices"
        if micro_batches > 1:
            where += f" times {micro_batches} micro_batches"
        raise UserError(
            f"global_batch_size {global_batch_size} is not divisible by the {where}: "
            f"use a multiple of {parts}, such as {lower}"
        )


def fsdp_spec(shape: tuple[int, ...], axis_size: int) -> PartitionSpec:
    """Splits the largest dimension that `axis_size` divides; small arrays stay whole."""
    if int(np.prod(shape)) < _MIN_FSDP_ELEMENTS:
        return PartitionSpec()
    for dimension in np.argsort(shape)[::-1]:
        if shape[dimension] % axis_size == 0:
            names: list[str | None] = [None] * len(shape)
            names[dimension] = "fsdp"
            return PartitionSpec(*names)
    return PartitionSpec()


def parameter_shardings(mesh: Mesh, tree: Any) -> Any:
    """Shardings of parameters, optimizer moments or averages: FSDP where the mesh has that axis."""
    if "fsdp" not in mesh.axis_names:
        return jax.tree.map(lambda _: replicated(mesh), tree)
    size = mesh.shape["fsdp"]
    return jax.tree.map(lambda leaf: NamedSharding(mesh, fsdp_spec(leaf.shape, size)), tree)
