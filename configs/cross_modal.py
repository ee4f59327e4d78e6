"""Audio-video retrieval, both ways, by the embeddings of a run.

    python -m avcl_jax.main --config=configs/cross_modal.py --config.encoder=runs/demo
    python -m avcl_jax.main --config=configs/cross_modal.py:records --config.encoder=runs/mine \
        --config.data.directory=data/mine --workdir=runs/mine_cross_modal
    python -m avcl_jax.main --config=configs/cross_modal.py:vggsound \
        --config.encoder=gs://bucket/vggsound --workdir=runs/vggsound_cross_modal

Needs the workdir of an audio-visual run, because an export leaves out the projection heads, and the
data set: docs/data/vggsound.md, audioset.md, kinetics.md. docs/protocols.md defines the protocol.
"""

from __future__ import annotations

import ml_collections

from avcl_jax.errors import UserError
from configs import protocols

_SPLITS = {"vggsound": "test", "audioset": "eval", "kinetics400": "val", "kinetics600": "val"}


def get_config(preset: str = "demo") -> ml_collections.ConfigDict:
    """The config of a preset: demo, records, vggsound, audioset, kinetics400 or kinetics600.

    With `records`, set data.directory to any data set. The demo was run whole (docs/protocols.md);
    the presets of data sets share its code and were not run, because the data are not here. All
    records of a split are the gallery, as no official subset exists.
    """
    small = ("demo", "records")
    if preset not in small and preset not in _SPLITS:
        known = ", ".join([*small, *_SPLITS])
        raise UserError(f"unknown preset {preset!r}: use one of {known}")
    c = protocols.base("audio_video_retrieval", f"{preset}_cross_modal")
    c.data.select = ""  # as avcl_jax/data/selection.py reads it; empty for all records
    c.features = ml_collections.ConfigDict()
    c.evaluation = ml_collections.ConfigDict()
    c.evaluation.recall_at = (1, 5, 10)
    c.features.part_records = 1024
    if preset == "demo":
        protocols.demo_data(c)
    if preset in small:
        c.data.split = "test"
        c.features.speeds = (1, 2, 4)  # of those that the run trained
        c.features.views_per_speed = 4
        c.features.chunk = 16
    else:
        c.data.directory = f"data/{preset}"
        c.data.split = _SPLITS[preset]
        c.data.threads = 16
        c.features.speeds = (1, 2)
        c.features.views_per_speed = 5
        c.features.chunk = 8
    c.lock()
    return c
