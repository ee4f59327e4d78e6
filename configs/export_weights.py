"""Weights of an exported encoder under the names of PyTorch code.

    python -m avcl_jax.main --config=configs/export_weights.py \\
        --config.encoder=runs/kinetics400/export/video --workdir=runs/kinetics400

Writes WORKDIR/torchvision.safetensors, for `load_state_dict` of the network of the same name.
"""

from __future__ import annotations

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """What to export, and in whose names."""
    c = ml_collections.ConfigDict()
    c.task = "export_weights"
    c.name = "weights"
    c.encoder = "runs/kinetics400/export/video"  # written by configs/export.py
    c.code_base = "torchvision"  # or "avid", "gdt"
    c.compilation_cache = ""  # nothing is compiled
    c.lock()
    return c
