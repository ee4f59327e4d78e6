"""Evaluation of a pretrained run: probes, retrieval, temporal tasks, null controls, report.

    python -m avcl_jax.main --config=configs/evaluate.py --workdir=runs/demo
    python -m avcl_jax.main --config=configs/evaluate.py:vggsound --workdir=gs://bucket/vggsound

The presets are those of configs/pretrain.py, whose settings describe the run that is evaluated;
this file adds the section `evaluation`.
"""

from __future__ import annotations

import ml_collections

from configs import pretrain, protocols


def get_config(preset: str = "demo") -> ml_collections.ConfigDict:
    """The pretraining config of `preset` with task "evaluate" and a section `evaluation`."""
    c = pretrain.get_config(preset)
    c.unlock()
    c.task = "evaluate"
    c.evaluation = demo() if preset == "demo" else full_size()
    c.data.allow_trained_on = False  # test on records that were pretrained on
    c.bootstrap = ml_collections.ConfigDict()
    c.bootstrap.resamples = 1000
    c.lock()
    return c


def demo() -> ml_collections.ConfigDict:
    """Settings for the demo: on 2 CPU cores at most 3.5 minutes, 2 of them the networks' training.

    Of these the supervised encoders and the null controls train networks of their own.
    """
    e = ml_collections.ConfigDict()
    e.train_split = "train"
    e.test_split = "test"
    e.chunk = 16  # videos encoded at a time
    e.threads = 2  # videos rendered at a time

    # Features and embeddings: means over views of fixed times and speeds, cropped in the centre.
    e.speeds = (1, 2, 4)
    e.views_per_speed = 4
    e.recall_at = (1, 5, 10, 20, 50)

    e.probes = (("motion", "video"), ("material", "audio"))  # linear probes: (label, modality)
    e.probe = protocols.linear_probe()
    e.position_cells = 8  # histogram of position: cells x cells

    # Temporal tasks: pairs of views of each test video, drawn as in training, sound as the picture.
    e.pairs_per_video = 10

    # The supervised encoders: rule of convergence in evaluation/supervised.py. `views` are rendered
    # of each training video, at the speeds above.
    e.supervised = ml_collections.ConfigDict()
    e.supervised.enabled = True
    e.supervised.video = ml_collections.ConfigDict()
    e.supervised.video.views = 8
    e.supervised.video.fit = _fit(4e-3, max_epochs=24, decay_epochs=6)
    e.supervised.audio = ml_collections.ConfigDict()
    e.supervised.audio.views = 24
    e.supervised.audio.fit = _fit(6e-3, max_epochs=40, decay_epochs=12)

    e.null = ml_collections.ConfigDict()
    e.null.train_split = "null_train"  # records of stationary noise; "" leaves the controls out
    e.null.test_split = "null_test"
    e.null.train_views = 24  # of each record; multiples of the combinations of speed and direction
    e.null.test_views = 40
    e.null.fit = _fit(4e-3, max_epochs=3, decay_epochs=1)

    e.report = ml_collections.ConfigDict()
    e.report.queries = 3  # examples in each direction
    e.report.results = 5
    e.report.stills = 3
    e.report.speed = 4  # interval shown of each video: clip_seconds x speed
    return e


def _fit(learning_rate: float, max_epochs: int, decay_epochs: int) -> ml_collections.ConfigDict:
    """How a network is trained on labels, and when it is done: see evaluation/supervised.py."""
    f = ml_collections.ConfigDict()
    f.batch_size = 32
    f.learning_rate = learning_rate
    f.weight_decay = 0.05
    f.loss_target = 0.25
    f.window = 5
    f.improvement = 0.05
    f.max_epochs = max_epochs
    f.decay_epochs = decay_epochs
    return f


def full_size() -> ml_collections.ConfigDict:
    """Settings for the full-size presets: ten views, as the field does; no training from memory."""
    e = demo()
    e.chunk = 8
    e.threads = 16
    e.speeds = (1, 2)
    e.views_per_speed = 5
    e.probes = ()
    e.pairs_per_video = 2
    e.supervised.enabled = False
    e.null.train_split = ""
    e.null.test_split = ""
    return e
