"""Export of the encoders of a pretrained run.

    python -m avcl_jax.main --config=configs/export.py --workdir=runs/demo

The presets are those of configs/pretrain.py. Writes WORKDIR/export/video and WORKDIR/export/audio,
which `avcl_jax.export.load_encoder` reads.
"""

from __future__ import annotations

import ml_collections

from configs import pretrain


def get_config(preset: str = "demo") -> ml_collections.ConfigDict:
    """The pretraining config of `preset` with task "export"."""
    c = pretrain.get_config(preset)
    c.task = "export"
    return c
