"""Evaluation of a pretrained run: retrieval, temporal tasks, and where there are labels, probes.

    python -m avcl_jax.main --config=configs/evaluate.py --workdir=RUN
    python -m avcl_jax.main --config=configs/evaluate.py:demo --workdir=runs/demo
    python -m avcl_jax.main --config=configs/evaluate.py:vggsound --workdir=gs://bucket/vggsound

Model, views and records are read from RUN/config.json; this file has only settings of evaluation.
Writes RUN/results.json and RUN/report.html.
"""

from __future__ import annotations

import ml_collections

from configs import protocols
from configs.presets import choose


def get_config(preset: str = "run") -> ml_collections.ConfigDict:
    """The config of a preset: run (any), or that of a preset of configs/pretrain.py.

    The demo is run whole by `make demo`. The full-size presets name the splits that the commands in
    docs/data prepare; no run of that size has been evaluated with this code.
    """
    return choose(preset, run, demo, abstract, esc10, kinetics400, kinetics600, vggsound, audioset)


def run() -> ml_collections.ConfigDict:
    """Any run, for instance of your own videos: no label is needed.

    Records of the split `test` must be there, or another named by `evaluation.test_split`. With
    `--config.evaluation.probes="(('LABEL','video'),)"` labels are probed as well.
    """
    c = ml_collections.ConfigDict()
    c.task = "evaluate"
    c.name = "demo"  # the run under runs/ that is evaluated where no --workdir is given
    c.compilation_cache = "~/.cache/avcl_jax/xla"

    c.data = ml_collections.ConfigDict()
    c.data.directory = ""  # of the records; "" is where the run found them
    c.data.allow_trained_on = False  # test on records that were pretrained on

    c.bootstrap = ml_collections.ConfigDict()
    c.bootstrap.resamples = 1000

    c.evaluation = e = ml_collections.ConfigDict()
    e.train_split = "train"  # of the probes
    e.train_select = ""  # records by label, as avcl_jax/data/selection.py reads it
    e.test_split = "test"
    e.test_select = ""
    e.chunk = 16  # records encoded at a time, over all devices of a host
    e.threads = 2  # records rendered at a time
    e.part_records = 1024  # per file of RUN/features; an interrupted evaluation resumes from them

    # Features and embeddings: means over views of fixed times and speeds, cropped in the centre.
    e.speeds = ()  # of those that the run trained; () is all of them
    e.views_per_speed = 4
    e.recall_at = (1, 5, 10, 20, 50)

    e.probes = ()  # linear probes: (label, modality)
    e.probe = protocols.linear_probe()
    e.position_cells = 8  # histogram of position: cells x cells

    # Temporal tasks: pairs of views of each test record, drawn as in training, one playback for
    # both modalities.
    e.pairs_per_video = 10

    # The supervised encoders, an upper bound for each probe: the rule of convergence is in
    # evaluation/supervised.py. `views` are rendered of each training record, at the speeds above.
    e.supervised = ml_collections.ConfigDict()
    e.supervised.enabled = False
    e.supervised.video = ml_collections.ConfigDict()
    e.supervised.video.views = 8
    e.supervised.video.fit = _fit(4e-3, max_epochs=24, decay_epochs=6)
    e.supervised.audio = ml_collections.ConfigDict()
    e.supervised.audio.views = 24
    e.supervised.audio.fit = _fit(6e-3, max_epochs=40, decay_epochs=12)

    # Null controls: networks trained on speed and direction of stationary noise.
    e.null = ml_collections.ConfigDict()
    e.null.train_split = ""  # records of noise; "" leaves the controls out
    e.null.test_split = ""
    e.null.train_views = 3  # of each record at each speed in each direction
    e.null.test_views = 5
    e.null.fit = _fit(4e-3, max_epochs=3, decay_epochs=1)

    e.report = ml_collections.ConfigDict()
    e.report.queries = 3  # examples in each direction
    e.report.results = 5
    e.report.stills = 3
    return c


def demo() -> ml_collections.ConfigDict:
    """The demo: on 2 CPU cores at most 3.5 minutes, 2 of them the training of the bounds' networks.

    The supervised encoders and the null controls train networks of their own.
    """
    c = run()
    e = c.evaluation
    e.speeds = (1, 2, 4)
    e.probes = (("motion", "video"), ("material", "audio"))
    e.supervised.enabled = True
    e.null.train_split = "null_train"
    e.null.test_split = "null_test"
    return c


def abstract() -> ml_collections.ConfigDict:
    """As the demo, whose videos it has."""
    c = demo()
    c.name = "abstract"
    return c


def esc10() -> ml_collections.ConfigDict:
    """ESC-10, a run that was pretrained without fold 1; other folds by the two selections."""
    c = run()
    c.name = "esc10"
    e = c.evaluation
    e.train_split = e.test_split = "all"
    e.train_select = "fold!=1"
    e.test_select = "fold=1"
    e.probes = (("class", "audio"),)
    return c


def _full_size(name: str, test_split: str) -> ml_collections.ConfigDict:
    """Ten views, as the field does."""
    c = run()
    c.name = name
    e = c.evaluation
    e.test_split = test_split
    e.chunk = 8
    e.threads = 16
    e.speeds = (1, 2)
    e.views_per_speed = 5
    e.pairs_per_video = 2
    return c


def kinetics400() -> ml_collections.ConfigDict:
    """Kinetics-400, validation clips."""
    return _full_size("kinetics400", "val")


def kinetics600() -> ml_collections.ConfigDict:
    """Kinetics-600, validation clips."""
    return _full_size("kinetics600", "val")


def vggsound() -> ml_collections.ConfigDict:
    """VGG-Sound, test clips."""
    return _full_size("vggsound", "test")


def audioset() -> ml_collections.ConfigDict:
    """AudioSet, the evaluation segments."""
    return _full_size("audioset", "eval")


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
