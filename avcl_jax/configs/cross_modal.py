"""Audio-video retrieval, both ways, by the embeddings of a run.

    python -m avcl_jax.main --config=configs/cross_modal.py --config.encoder=runs/demo
    python -m avcl_jax.main --config=configs/cross_modal.py:vggsound \\
        --config.encoder=gs://bucket/vggsound --workdir=runs/vggsound_cross_modal

Needs the workdir of an audio-visual run, because an export leaves out the projection heads. All
records of a split are the gallery, as no official subset exists. Definition: docs/protocols.md.
"""

from ml_collections import ConfigDict

from avcl_jax.configs import datasets
from avcl_jax.configs.common import protocol


def get_config(preset: str = "demo") -> ConfigDict:
    """Returns audio-video retrieval on a data set of configs/datasets.py."""
    small = preset in ("demo", "records")
    c = protocol("avcl_jax.evaluation.retrieval:audio_video_retrieval", f"{preset}_cross_modal")
    c.encoder = "runs/demo"
    c.data = datasets.testing(preset)
    # Clips at each speed, of those that the run trained.
    c.features = dict(speeds=(1, 2, 4) if small else (1, 2), clips=4 if small else 5)
    c.evaluation = dict(recall_at=(1, 5, 10))
    c.execution.update(threads=2 if small else 16, chunk=16 if small else 8)
    return c.lock()
