"""Audio classification by frozen features and a support vector machine: ESC-10 and ESC-50.

    python -m avcl_jax.main --config=configs/audio_classification.py:esc10 \
        --config.encoder=runs/esc10 --workdir=runs/esc10_svm

Needs an audio encoder (a run, its export or imported weights) and the data set, prepared at the
encoder's sample rate: docs/data/esc50.md. docs/protocols.md defines the protocol. VGG-Sound and
AudioSet have fixed lists, and the linear probe of configs/linear_probe.py; the variant that trains
the encoder too is configs/finetune.py.
"""

from __future__ import annotations

import ml_collections

from configs import protocols
from configs.presets import choose


def get_config(preset: str = "esc10") -> ml_collections.ConfigDict:
    """The config of a preset: esc10 or esc50."""
    return choose(preset, esc10, esc50)


def _folds(name: str) -> ml_collections.ConfigDict:
    c = protocols.base("audio_classification", f"{name}_audio_classification")
    # One pretraining run for each fold: --config.encoder=runs/esc10/fold{fold}, each trained with
    # data.select="fold!=...".
    c.data.directory = f"data/{name}"
    c.data.split = "all"
    c.data.label = "class"
    c.data.fold_label = "fold"
    c.features = protocols.features(
        speeds=(1,), clips=10, clip_pooling="mean_max", record_pooling="mean_max", chunk=16
    )
    c.evaluation = ml_collections.ConfigDict()
    # Larger ones take most of the time and were never chosen: files are fewer than channels.
    c.evaluation.costs = (1e-4, 1e-3, 1e-2, 1e-1)
    c.evaluation.classical_costs = (0.1, 1.0, 10.0, 100.0)
    c.evaluation.classical_linear_costs = (1e-3, 1e-2, 1e-1)
    c.baselines = ml_collections.ConfigDict()
    c.baselines.random = True  # an encoder of the same shape that was never trained
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
