"""Temporal tasks on held-out records: speed, direction and order, by the heads of a run.

    python -m avcl_jax.main --config=configs/temporal.py --config.encoder=runs/demo
    python -m avcl_jax.main --config=configs/temporal.py:records --config.encoder=runs/demo \
        --config.data.directory=DATA --config.data.split=all --workdir=runs/temporal

Needs the workdir of a run, because an export leaves out the heads, and any prepared data set whose
sound has the run's sample rate. docs/protocols.md defines the protocol.
"""

from __future__ import annotations

import ml_collections

from avcl_jax.errors import UserError
from configs import protocols


def get_config(preset: str = "demo") -> ml_collections.ConfigDict:
    """The config of a preset: demo, or records, for which directory and split must be given.

    Verified: the demo run whole on its own test videos, and on real videos (docs/protocols.md).
    """
    if preset not in ("demo", "records"):
        raise UserError(f"unknown preset {preset!r}: use one of demo, records")
    c = protocols.base("temporal_tasks", f"{preset}_temporal")
    c.data.select = ""  # as avcl_jax/data/selection.py reads it; empty for all records
    c.data.split = "test"
    c.evaluation = ml_collections.ConfigDict()
    c.evaluation.pairs_per_video = 10
    c.evaluation.chunk = 16
    c.evaluation.part_records = 1024
    if preset == "demo":
        protocols.demo_data(c)
    c.lock()
    return c
