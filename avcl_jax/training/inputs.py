"""Batches of the data pipeline to inputs of the model, on the device."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array

from avcl_jax.data.augment import (
    PhotometricSpec,
    SpectralSpec,
    photometric,
    spectral,
    standardize,
    to_unit_range,
)
from avcl_jax.data.rendering import RenderSpec
from avcl_jax.data.spectrogram import log_mel


def prepare_inputs(
    batch: Mapping[str, Array],
    spec: RenderSpec,
    *,
    pixel_mean: float,
    pixel_std: float,
    augmentation: tuple[PhotometricSpec, SpectralSpec] | None,
    key: Array | None,
) -> dict[str, Array]:
    """A batch of the pipeline to inputs of the model, on the device.

    Args:
        batch: as `data.pipeline` delivers it.
        spec: rendering.
        pixel_mean: subtracted from pixels in [0, 1].
        pixel_std: pixels are divided by it.
        augmentation: of pictures and of spectrograms; None for evaluation.
        key: JAX random key of the augmentation.

    Returns:
        `video`, `spectrogram`, `has_video`, `has_audio`.
    """
    if spec.spectrogram_on_device:
        spectrogram = log_mel(batch["audio_windows"], spec.log_mel, jnp)
    else:
        spectrogram = batch["spectrogram"]
    if augmentation is not None:
        assert key is not None, "augmentation needs a key"
        video_key, audio_key = jax.random.split(key)
        spectrogram = spectral(audio_key, spectrogram, augmentation[1])

    def pictures(video: Array) -> Array:
        video = to_unit_range(video)
        if augmentation is not None:
            video = photometric(video_key, video, augmentation[0])
        return standardize(video, pixel_mean, pixel_std)

    def pictures_once(video: Array) -> Array:
        # XLA's CPU compiler would compute all this once more inside of each operation that reads
        # it, and drops `optimization_barrier`. It does not look into a condition.
        return jax.lax.cond(
            batch["has_video"].any(),
            pictures,
            lambda video: jnp.zeros(video.shape, jnp.float32),
            video,
        )

    return {
        "video": jax.lax.platform_dependent(batch["video"], cpu=pictures_once, default=pictures),
        "spectrogram": spectrogram,
        "has_video": batch["has_video"],
        "has_audio": batch["has_audio"],
    }
