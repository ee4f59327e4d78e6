"""What the configs that train encoders share: pretraining and fine-tuning. No task of its own."""

from __future__ import annotations

import ml_collections


def devices(c: ml_collections.ConfigDict) -> None:
    """Sets where it runs."""
    c.mesh = ml_collections.ConfigDict()
    c.mesh.fsdp = 1  # devices over which parameters are split
    # Compiled programs are kept here for the next start; "" keeps none. Only process 0 writes, so
    # hosts of a pod need a directory that all of them see: gs://bucket/xla. JAX's own variable
    # JAX_COMPILATION_CACHE_DIR goes first.
    c.compilation_cache = "~/.cache/avcl_jax/xla"


def demo_augmentation(c: ml_collections.ConfigDict) -> None:
    """Sets the sections `crop`, `photometric` and `spectral` to what suits the demo's clips."""
    c.crop = ml_collections.ConfigDict()
    c.crop.min_area = 0.75
    c.crop.flip = True
    c.crop.quarter_turns = True  # the demo's camera has no upright

    c.photometric = ml_collections.ConfigDict()
    c.photometric.brightness = 0.1
    c.photometric.contrast = 0.3
    c.photometric.saturation = 0.5
    c.photometric.hue = 0.5
    c.photometric.gray_probability = 0.2
    c.photometric.per_frame = False

    c.spectral = ml_collections.ConfigDict()
    c.spectral.equalizer = 0.7
    c.spectral.equalizer_knots = 5
    c.spectral.mask_mels = 6
    c.spectral.noise = 0.15
