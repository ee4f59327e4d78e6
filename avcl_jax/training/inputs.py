"""Inputs of the model from batches of the data pipeline, on the device."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from avcl_jax.data.augment import (
    PhotometricSpec,
    SpectralSpec,
    photometric,
    spectral,
    standardize,
    to_unit_range,
)
from avcl_jax.data.render_spec import RenderSpec
from avcl_jax.data.spectrogram import LogMelSpec, log_mel
from avcl_jax.training.sharding import rows_sharding


def log_mel_of_rows(windows: Array, spec: LogMelSpec, mesh: Mesh | None) -> Array:
    """`log_mel`, on each device of its own rows: XLA splits no FFT, and would gather all rows."""
    local = functools.partial(log_mel, spec=spec, xp=jnp)
    if mesh is not None:
        rows = rows_sharding(mesh).spec
        local = jax.shard_map(local, mesh=mesh, in_specs=rows, out_specs=rows)
    return local(windows)


def prepare_inputs(
    batch: Mapping[str, Array],
    spec: RenderSpec,
    *,
    pixel_mean: float,
    pixel_std: float,
    augmentation: tuple[PhotometricSpec, SpectralSpec] | None,
    key: Array | None,
    mesh: Mesh | None = None,
) -> dict[str, Array]:
    """Computes spectrograms where they are the device's task, augments, standardises frames.

    Args:
        batch: batch of `data.pipeline`.
        pixel_mean: mean of pixels in [0, 1].
        pixel_std: standard deviation of pixels in [0, 1].
        augmentation: settings for frames and for spectrograms; None for evaluation.
        key: JAX random key of the augmentation; may be None without it.
        mesh: devices over which the batch is split; None for one.

    Returns:
        `video` float32 [videos, 2, num_frames, size, size, 3], `spectrogram` float32
        [videos, 2, frames, mels], and `has_video` and `has_audio` as in the batch.
    """
    if spec.spectrogram_on_device:
        spectrogram = log_mel_of_rows(batch["audio_windows"], spec.log_mel, mesh)
    else:
        spectrogram = batch["spectrogram"]
    if augmentation is not None:
        assert key is not None, "augmentation needs a key"
        video_key, audio_key = jax.random.split(key)
        spectrogram = spectral(audio_key, spectrogram, augmentation[1])

    def frames(video: Array) -> Array:
        video = to_unit_range(video)
        if augmentation is not None:
            video = photometric(video_key, video, augmentation[0])
        return standardize(video, pixel_mean, pixel_std)

    def frames_once(video: Array) -> Array:
        # XLA's CPU compiler would repeat this computation in each operation that reads it, and
        # drops `optimization_barrier`. It does not fuse across a condition.
        return jax.lax.cond(
            batch["has_video"].any(),
            frames,
            lambda video: jnp.zeros(video.shape, jnp.float32),
            video,
        )

    return {
        "video": jax.lax.platform_dependent(batch["video"], cpu=frames_once, default=frames),
        "spectrogram": spectrogram,
        "has_video": batch["has_video"],
        "has_audio": batch["has_audio"],
    }
