"""Runs `avcl_jax.main` on a mesh along which the processes alternate, as on slices of TPUs.

`jax.make_mesh` orders the devices of v5e:4x4, by process: 0 0 1 1 1 1 0 2 3 3 3 3 2 2 2 0.
"""

from __future__ import annotations

import sys
from typing import Any
from unittest import mock

import jax
from absl import app

from avcl_jax import main

_make_mesh = jax.make_mesh


def make_mesh(*args: Any, devices: Any = None, **options: Any) -> jax.sharding.Mesh:
    """Makes a mesh whose processes are 0 1 1 0, for two processes of as many devices."""
    devices = jax.devices() if devices is None else devices
    quarter = len(devices) // 4
    order = [*devices[:quarter], *devices[2 * quarter :], *devices[quarter : 2 * quarter]]
    return _make_mesh(*args, devices=order, **options)


if __name__ == "__main__":
    with mock.patch.object(jax, "make_mesh", make_mesh):
        app.run(main.main, ["main", *sys.argv[1:]], flags_parser=main.parse_flags)
