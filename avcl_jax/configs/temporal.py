"""Temporal tasks on held-out records: speed, direction and order, by the heads of a run.

    python -m avcl_jax.main --config=configs/temporal.py --config.encoder=runs/demo
    python -m avcl_jax.main --config=configs/temporal.py:records --config.encoder=runs/demo \\
        --config.data.directory=DATA --config.data.split=all --workdir=runs/temporal

Needs the workdir of a run, because an export leaves out the heads, and records whose audio has the
run's sample rate. docs/protocols.md has the definition, and results on real videos.
"""

from ml_collections import ConfigDict

from avcl_jax.configs import datasets
from avcl_jax.configs.common import protocol


def get_config(preset: str = "demo") -> ConfigDict:
    """Returns the temporal tasks on a data set of configs/datasets.py."""
    c = protocol("avcl_jax.evaluation.temporal:temporal_tasks", f"{preset}_temporal")
    c.encoder = "runs/demo"
    c.data = datasets.testing(preset)
    c.evaluation = dict(pairs_per_video=10)
    return c.lock()
