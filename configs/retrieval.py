"""Video retrieval: test videos find training videos of their class.

    python -m avcl_jax.main --config=configs/retrieval.py --config.encoder=runs/demo
    python -m avcl_jax.main --config=configs/retrieval.py:ucf101 --config.encoder=gs://bucket/k400 \
        --config.data.official_split=1 --workdir=runs/ucf101_retrieval

Needs a video encoder (a run, its export or imported weights) and the data set: docs/data/ucf101.md,
hmdb51.md, kinetics.md. docs/protocols.md defines the protocol.
"""

from __future__ import annotations

import ml_collections

from configs import protocols
from configs.presets import choose


def get_config(preset: str = "demo") -> ml_collections.ConfigDict:
    """The config of a preset: demo, ucf101, hmdb51 or kinetics400."""
    return choose(preset, demo, ucf101, hmdb51, kinetics400)


def _base(name: str) -> ml_collections.ConfigDict:
    c = protocols.base("video_retrieval", f"{name}_retrieval")
    c.data.directory = f"data/{name}"
    c.data.label = "class"
    c.data.threads = 16
    c.data.official_split = 1  # put for {split} in the selections
    c.data.query_split = "all"
    c.data.query_select = "split{split}=test"
    c.data.gallery_split = "all"
    c.data.gallery_select = "split{split}=train"
    c.features = protocols.features(
        speeds=(1,), clips=10, clip_pooling="mean", record_pooling="mean", chunk=16
    )
    c.evaluation = ml_collections.ConfigDict()
    c.evaluation.recall_at = (1, 5, 10, 20, 50)
    c.baselines = ml_collections.ConfigDict()
    c.baselines.random = False  # an encoder of the same shape that was never trained
    return c


def demo() -> ml_collections.ConfigDict:
    """Motions of the demo: the 200 test videos find training videos of their motion.

    Verified: run whole on the demo's encoder (docs/protocols.md).
    """
    c = _base("demo")
    protocols.demo_data(c)
    c.data.threads = 2
    c.data.label = "motion"
    c.data.query_split = "test"
    c.data.query_select = ""
    c.data.gallery_split = "train"
    c.data.gallery_select = ""
    c.features.speeds = (1, 2, 4)
    c.features.clips = 4
    c.baselines.random = True
    return c


def ucf101() -> ml_collections.ConfigDict:
    """UCF101: 3,783 test videos of split 1 query 9,537 training videos.

    Verified here: the code, on small data with labels like these (tests/evaluation); not run, the
    videos are not here.
    """
    return _base("ucf101")


def hmdb51() -> ml_collections.ConfigDict:
    """HMDB51: 1,530 test clips of split 1 query 3,570 training clips. Verified: as ucf101."""
    return _base("hmdb51")


def kinetics400() -> ml_collections.ConfigDict:
    """Kinetics-400: 20,000 validation clips query 246,000 training clips.

    Hosts share the videos (`--distributed`), each computing features on its own devices; ranking
    runs on process 0 in 170 MB beside the features (0.5 GB at 512 channels). Not run at this size.
    """
    c = _base("kinetics400")
    c.data.query_split = "val"
    c.data.query_select = ""
    c.data.gallery_split = "train"
    c.data.gallery_select = ""
    return c
