"""Recognition by a linear classifier on a frozen encoder, trained by the loop of fine-tuning.

    python -m avcl_jax.main --config=configs/linear_probe.py --workdir=runs/demo_linear
    python -m avcl_jax.main --config=configs/linear_probe.py:ucf101 --config.encoder=runs/k400 \\
        --workdir=runs/ucf101_linear

The presets, their data and hardware are those of configs/finetune.py, of which this changes what a
frozen encoder needs. The encoder's batch normalisation stays in evaluation mode and its weights do
not change by a bit. `--config.init=random` is the baseline that knows nothing.
"""

from __future__ import annotations

import ml_collections

from configs import finetune


def get_config(preset: str = "demo") -> ml_collections.ConfigDict:
    """The fine-tuning config of `preset` with the encoder frozen."""
    c = finetune.get_config(preset)
    with c.unlocked():
        c.freeze = ("encoder",)
        c.batch_norm = "frozen"
        c.head.dropout = 0.0
        # Features of unequal size otherwise need other learning rates; AVID-CMA's linear
        # evaluation has this too (use_bn, configs/benchmark/kinetics/r2plus1d/*-linear.yaml).
        c.head.normalise = True
        # A frozen encoder cannot adapt to changed colours and spectra, which no test clip has, and
        # its features of them are elsewhere; AVID-CMA's linear evaluation has none (color: zeros).
        for name in ("brightness", "contrast", "saturation", "hue", "gray_probability"):
            c.photometric[name] = 0.0
        c.spectral.equalizer = 0.0
        c.spectral.mask_mels = 0
        c.spectral.noise = 0.0
        c.label_smoothing = 0.0
        c.optimizer.name = "adamw"
        c.optimizer.schedule = "cosine"
        c.optimizer.warmup_epochs = 0.0
        c.optimizer.milestones = ()
        c.optimizer.factor = 1.0
        c.optimizer.head_factor = 1.0
        c.optimizer.head_epochs = 0.0
        c.optimizer.learning_rate = 5e-3 if preset.startswith("demo") else 1e-3
        c.optimizer.weight_decay = 1e-4
        if preset == "kinetics400":
            c.epochs = 12.0  # AVID-CMA, */32x224x224-linear.yaml
    return c
