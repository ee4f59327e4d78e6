"""Export of the encoders of a pretrained run.

    python -m avcl_jax.main --config=configs/export.py --workdir=RUN

Everything is read from RUN/config.json. Writes RUN/export/video and RUN/export/audio, which
`avcl_jax.export.load_encoder` reads.
"""

from __future__ import annotations

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The task; no setting decides what is exported."""
    c = ml_collections.ConfigDict()
    c.task = "export"
    c.name = "demo"  # the run under runs/ that is exported where no --workdir is given
    c.compilation_cache = "~/.cache/avcl_jax/xla"
    c.lock()
    return c
