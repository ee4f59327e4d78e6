"""Batch normalisation of a batch that lies on eight devices; run by `test_batch_norm`."""

from __future__ import annotations

import sys

import jax
import numpy as np

from avcl_jax.models.layers import BatchNorm
from avcl_jax.training import sharding


def batch() -> tuple[np.ndarray, np.ndarray]:
    """Rows whose mean differs from device to device, and which of them are present."""
    rng = np.random.default_rng(0)
    x = rng.normal(np.arange(16)[:, None, None], 1.0, (16, 5, 3))
    return x.astype(np.float32), np.arange(16) % 5 != 0


def main(path: str) -> None:
    """Writes what normalisation by the batch returns and what it leaves in its statistics."""
    mesh = sharding.create_mesh(1)
    assert mesh.size == 8
    x, mask = jax.device_put(batch(), sharding.rows_sharding(mesh))
    norm = BatchNorm()
    variables = norm.init(jax.random.key(0), x, train=False, mask=None)

    @jax.jit
    def normalise(x, mask):
        return norm.apply(variables, x, train=True, mask=mask, mutable=["batch_stats"])

    out, mutated = normalise(x, mask)
    assert len(out.sharding.device_set) == 8
    np.savez(path, out=out, **mutated["batch_stats"]["norm"])


if __name__ == "__main__":
    main(sys.argv[1])
