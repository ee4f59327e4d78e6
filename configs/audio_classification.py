"""Audio classification by frozen features: ESC-10 and ESC-50, VGG-Sound, AudioSet, and the demo.

    python -m avcl_jax.main --config=configs/audio_classification.py --config.encoder=runs/demo
    python -m avcl_jax.main --config=configs/audio_classification.py:esc10 \
        --config.encoder=runs/esc10 --workdir=runs/esc10_svm
    python -m avcl_jax.main --config=configs/audio_classification.py:vggsound \
        --config.encoder=gs://bucket/vggsound --workdir=gs://bucket/vggsound_probe

Needs an audio encoder (a run, its export or imported weights) and the data set, prepared at the
encoder's sample rate: docs/data/esc50.md, vggsound.md, audioset.md. docs/protocols.md defines the
protocols. The variant that trains the encoder too is configs/finetune.py.
"""

from __future__ import annotations

import ml_collections

from configs import protocols
from configs.presets import choose


def get_config(preset: str = "demo") -> ml_collections.ConfigDict:
    """The config of a preset: demo, esc10, esc50, vggsound or audioset."""
    return choose(preset, demo, esc10, esc50, vggsound, audioset)


def _base(name: str, method: str) -> ml_collections.ConfigDict:
    c = protocols.base("audio_classification", f"{name}_audio_classification")
    c.data.directory = f"data/{name}"
    c.data.label = "class"
    c.evaluation = ml_collections.ConfigDict()
    c.evaluation.method = method  # "folds", "linear_probe" or "multilabel_probe"
    c.baselines = ml_collections.ConfigDict()
    c.baselines.random = True  # an encoder of the same shape that was never trained
    return c


def _folds(name: str) -> ml_collections.ConfigDict:
    # One pretraining run for each fold: --config.encoder=runs/esc10/fold{fold}, each trained with
    # data.select="fold!=...".
    c = _base(name, "folds")
    c.data.split = "all"
    c.data.fold_label = "fold"
    c.features = protocols.features(
        speeds=(1,), clips=10, clip_pooling="mean_max", record_pooling="mean_max", chunk=16
    )
    # Larger ones take most of the time and were never chosen: files are fewer than channels.
    c.evaluation.costs = (1e-4, 1e-3, 1e-2, 1e-1)
    c.evaluation.classical_costs = (0.1, 1.0, 10.0, 100.0)
    c.evaluation.classical_linear_costs = (1e-3, 1e-2, 1e-1)
    c.baselines.classical = True  # statistics of MFCC and of the log-mel spectrum
    return c


def esc10() -> ml_collections.ConfigDict:
    """ESC-10, five official folds.

    Verified: run here on the real recordings (docs/protocols.md has the figures).
    """
    return _folds("esc10")


def esc50() -> ml_collections.ConfigDict:
    """ESC-50, five official folds.

    Verified: the same code as ESC-10; not run, the data are not here.
    """
    return _folds("esc50")


def _probe(name: str, method: str) -> ml_collections.ConfigDict:
    c = _base(name, method)
    c.data.train_split = "train"
    c.data.train_select = ""  # as avcl_jax/data/selection.py reads it; empty for all records
    c.data.test_split = "test"
    c.data.test_select = ""
    c.features = protocols.features(
        speeds=(1,), clips=10, clip_pooling="mean_max", record_pooling="mean_max", chunk=32
    )
    c.evaluation.costs = (1e-5, 1e-4, 1e-3, 1e-2)
    c.evaluation.held_out = 0.1  # of the training sources, to choose the cost by
    c.evaluation.iterations = 500
    c.evaluation.tolerance = 1e-5
    return c


def demo() -> ml_collections.ConfigDict:
    """Material of the demo's sounds, test videos after training on the training videos.

    Verified: run whole on the demo's encoder (docs/protocols.md), 2 CPU cores.
    """
    c = _probe("demo", "linear_probe")
    protocols.demo_data(c)
    c.data.label = "material"
    c.features.speeds = (1, 2, 4)
    c.features.clips = 4
    c.evaluation.costs = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    return c


def vggsound() -> ml_collections.ConfigDict:
    """VGG-Sound, 309 classes: 183,730 training and 15,446 test clips as published.

    Memory: 4 x channels numbers a clip, 1.5 GB for 183,730 clips at 512 channels, on the host and
    over the devices. Verified here: the code, on small data; not run at this size.
    """
    c = _probe("vggsound", "linear_probe")
    c.data.threads = 16
    return c


def audioset() -> ml_collections.ConfigDict:
    """AudioSet, 527 classes, several a clip: mAP, AUC and d′ on the evaluation list.

    For the 20,000 balanced training clips alone, prepare them apart and set
    `--config.data.train_split=balanced_train`. Verified and memory: as vggsound; 1.9 million
    training clips are 16 GB of features at 512 channels. Half of that, with "mean" for one of the
    two poolings, is another protocol: say which.
    """
    c = _probe("audioset", "multilabel_probe")
    c.data.test_split = "eval"
    c.data.threads = 16
    c.bootstrap.resamples = 100  # each sorts the scores of 527 classes
    return c
