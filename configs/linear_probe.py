"""Linear probe of a frozen encoder: a linear classifier of its features, video or audio.

    python -m avcl_jax.main --config=configs/linear_probe.py --config.encoder=runs/demo
    python -m avcl_jax.main --config=configs/linear_probe.py:demo_audio --config.encoder=runs/demo
    python -m avcl_jax.main --config=configs/linear_probe.py:ucf101 --config.encoder=runs/k400 \
        --workdir=runs/ucf101_linear
    python -m avcl_jax.main --config=configs/linear_probe.py:vggsound \
        --config.encoder=gs://bucket/vggsound --workdir=gs://bucket/vggsound_linear
    python -m avcl_jax.main --config=configs/linear_probe.py:esc10 --config.encoder=runs/esc10 \
        --workdir=runs/esc10_svm

`encoder` is the workdir of a pretraining run, an export, or imported weights. A random encoder of
the same shape is probed beside it. docs/protocols.md defines the protocol; it is the probe of
configs/evaluate.py, and gives the same accuracy for the same records.
"""

from __future__ import annotations

import ml_collections

from configs import protocols
from configs.presets import choose


def get_config(preset: str = "demo") -> ml_collections.ConfigDict:
    """The config of a preset: demo, demo_audio, or that of a benchmark."""
    return choose(
        preset, demo, demo_audio, ucf101, hmdb51, kinetics400, vggsound, audioset, esc10, esc50
    )


def _base(name: str, modality: str) -> ml_collections.ConfigDict:
    c = protocols.base("linear_probe", f"{name}_linear_probe")
    c.modality = modality
    c.data.directory = f"data/{name}"
    c.data.label = "class"  # of one class per record, or of several: then mAP
    c.data.train_split = "train"
    c.data.test_split = "test"
    # One entry per split of the benchmark: LABEL=VALUE, LABEL!=VALUE; "" is all.
    c.data.train_select = ("",)
    c.data.test_select = ("",)
    # Label whose classes are held out in turn to choose C; "" for random folds of sources.
    c.data.group_label = ""
    c.data.threads = 16
    # The views of configs/evaluate.py.
    c.features = protocols.features(
        speeds=(1, 2), clips=5, clip_pooling="mean", record_pooling="mean", chunk=32
    )
    c.probe = protocols.linear_probe()
    c.baselines = ml_collections.ConfigDict()
    c.baselines.random = True  # an encoder of the same shape that was never trained
    c.baselines.classical = False  # statistics of MFCC and of the log-mel spectrum of whole audio
    c.baselines.classical_costs = (0.1, 1.0, 10.0, 100.0)
    c.baselines.classical_linear_costs = (1e-3, 1e-2, 1e-1)
    return c


def demo() -> ml_collections.ConfigDict:
    """Motion of the demo's videos, test videos after training on the training videos.

    Verified: run whole on the demo's encoder (docs/protocols.md), 2 CPU cores.
    """
    c = _base("demo", "video")
    protocols.demo_data(c)
    c.data.label = "motion"
    c.data.threads = 2
    c.features.speeds = (1, 2, 4)
    c.features.clips = 4
    return c


def demo_audio() -> ml_collections.ConfigDict:
    """Material of the demo's sounds. Verified: as demo."""
    c = demo()
    c.name = "demo_audio_linear_probe"
    c.modality = "audio"
    c.data.label = "material"
    return c


def _three_splits(name: str) -> ml_collections.ConfigDict:
    c = _base(name, "video")
    c.data.train_split = c.data.test_split = "all"
    c.data.train_select = ("split1=train", "split2=train", "split3=train")
    c.data.test_select = ("split1=test", "split2=test", "split3=test")
    return c


def ucf101() -> ml_collections.ConfigDict:
    """UCF101, three official splits; prepare it as docs/data/ucf101.md says.

    Verified: the same code on made records of three splits; not run, the data are not here.
    """
    return _three_splits("ucf101")


def hmdb51() -> ml_collections.ConfigDict:
    """HMDB51, three official splits; prepare it as docs/data/hmdb51.md says.

    Verified: as ucf101.
    """
    return _three_splits("hmdb51")


def kinetics400() -> ml_collections.ConfigDict:
    """Kinetics-400, tested on val; prepare it as docs/data/kinetics.md says.

    Verified: the same code on small data; not run at this size.
    """
    c = _base("kinetics400", "video")
    c.data.test_split = "val"
    return c


def vggsound() -> ml_collections.ConfigDict:
    """VGG-Sound, 309 classes: 183,730 training and 15,446 test clips as published.

    Memory: the features of the trained and of the random encoder on the host and one of them twice
    over the devices, 0.4 GB each for 183,730 clips at 512 channels. Verified here: the code, on
    small data; not run at this size.
    """
    return _base("vggsound", "audio")


def audioset() -> ml_collections.ConfigDict:
    """AudioSet, 527 classes, several per clip: mAP, AUC and d′ on the evaluation list.

    For the 20,000 balanced training clips alone, prepare them apart and set
    `--config.data.train_split=balanced_train`. Verified and memory: as vggsound; 1.9 million
    training clips are 4 GB of features at 512 channels.
    """
    c = _base("audioset", "audio")
    c.data.test_split = "eval"
    c.bootstrap.resamples = 100  # each sorts the scores of 527 classes
    return c


def _folds(name: str) -> ml_collections.ConfigDict:
    """Official folds and a support vector machine, as is usual for ESC.

    One pretraining run for each fold: --config.encoder='runs/esc10/fold{fold}', each trained with
    data.select="fold!=...".
    """
    c = _base(name, "audio")
    c.data.train_split = c.data.test_split = "all"
    folds = "12345"
    c.data.train_select = tuple(f"fold!={fold}" for fold in folds)
    c.data.test_select = tuple(f"fold={fold}" for fold in folds)
    c.data.group_label = "fold"
    c.data.threads = 2
    c.features = protocols.features(
        speeds=(1,), clips=10, clip_pooling="mean_max", record_pooling="mean_max", chunk=16
    )
    c.probe.classifier = "svm"
    # Larger ones take most of the time and were never chosen: files are fewer than channels.
    c.probe.costs = (1e-4, 1e-3, 1e-2, 1e-1)
    c.baselines.classical = True
    return c


def esc10() -> ml_collections.ConfigDict:
    """ESC-10, five official folds; prepare it as docs/data/esc50.md says.

    Verified: run here on the real recordings (docs/protocols.md has the results).
    """
    return _folds("esc10")


def esc50() -> ml_collections.ConfigDict:
    """ESC-50, five official folds. Verified: the same code as ESC-10; not run."""
    return _folds("esc50")
