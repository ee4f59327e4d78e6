"""Video retrieval: test videos find training videos of their class.

    python -m avcl_jax.main --config=configs/retrieval.py --config.encoder=runs/demo
    python -m avcl_jax.main --config=configs/retrieval.py:ucf101 --config.encoder=runs/k400 \\
        --config.data.official_split=1 --workdir=runs/ucf101_retrieval

Needs a video encoder (a run, its export or imported weights). Test records are the queries,
training records the gallery: 3,783 and 9,537 of UCF101's split 1, 1,530 and 3,570 of HMDB51's,
20,000 and 246,000 of Kinetics-400. docs/protocols.md defines the protocol. Ranking runs on process
0, for Kinetics-400 in 170 MB beside the features (0.5 GB at 512 channels).
"""

from ml_collections import ConfigDict

from avcl_jax.configs import datasets
from avcl_jax.configs.common import protocol


def get_config(preset: str = "demo") -> ConfigDict:
    """Returns video retrieval on a data set of configs/datasets.py."""
    small = preset in ("demo", "records")
    c = protocol("avcl_jax.evaluation.retrieval:video_retrieval", f"{preset}_retrieval")
    c.data = datasets.labelled(preset)
    c.data.official_split = 1  # the number of an entry of the selections
    c.features = dict(speeds=(1, 2, 4) if small else (1,), clips=4 if small else 10)
    c.features.update(clip_pooling="mean", record_pooling="mean")
    c.evaluation = dict(recall_at=(1, 5, 10, 20, 50))
    c.baselines = dict(random=small)  # an encoder of the same shape that was never trained
    c.execution.threads = 2 if small else 16
    return c.lock()
