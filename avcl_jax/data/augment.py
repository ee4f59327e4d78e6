"""Photometric and spectral augmentation on the device, inside the jitted step.

Constant within a clip by default: a hue or an equaliser that changes from frame to frame would be a
clock. Varying the photometric one per frame is an option.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8


@dataclasses.dataclass(frozen=True)
class PhotometricSpec:
    """Strength of the photometric augmentation; zeros switch it off.

    Attributes:
        brightness: largest shift, in units of full scale.
        contrast: largest relative change of contrast.
        saturation: largest relative change of saturation.
        hue: largest rotation of the hue, in turns; 0.5 reaches every hue.
        gray_probability: fraction of clips turned grey.
        per_frame: draw for each frame instead of each clip.
    """

    brightness: float
    contrast: float
    saturation: float
    hue: float
    gray_probability: float
    per_frame: bool


def photometric(
    key: Array,
    video: Float[Array, "videos views time height width 3"],
    spec: PhotometricSpec,
) -> Float[Array, "videos views time height width 3"]:
    """Changes brightness, contrast, saturation and hue of clips at random, inside the jitted step.

    Takes pixels in [0, 1]. The result is not clipped: the encoder's input has no bounds to respect.
    """
    videos, views, time = video.shape[:3]
    shape = (videos, views, time if spec.per_frame else 1, 1, 1, 1)
    keys = jax.random.split(key, 5)
    saturation = 1 + spec.saturation * jax.random.uniform(keys[2], shape, minval=-1.0)
    saturation *= jax.random.uniform(keys[3], shape) >= spec.gray_probability
    contrast = 1 + spec.contrast * jax.random.uniform(keys[1], shape, minval=-1.0)
    brightness = spec.brightness * jax.random.uniform(keys[0], shape, minval=-1.0)
    turn = 2 * jnp.pi * spec.hue * jax.random.uniform(keys[4], shape, minval=-1.0)
    # By channels: XLA's CPU backend took 75 ms instead of 8 for a batch of the demo with a sum over
    # an axis of three.
    red, green, blue = video[..., 0:1], video[..., 1:2], video[..., 2:3]
    # Rotation about the axis of greys (Rodrigues): a common part, and one across the channels.
    mean = (red + green + blue) / 3
    along, across = jnp.cos(turn), jnp.sin(turn) / jnp.sqrt(3.0)
    red, green, blue = (
        mean + along * (colour - mean) + across * (after - before)
        for colour, before, after in (
            (red, green, blue),
            (green, blue, red),
            (blue, red, green),
        )
    )
    # Rec. 601 luma, as image libraries define grey.
    gray = 0.299 * red + 0.587 * green + 0.114 * blue
    gain = contrast * saturation
    video = jnp.concatenate([red, green, blue], axis=-1)
    return gain * video + (contrast - gain) * gray + (0.5 - 0.5 * contrast + brightness)


@dataclasses.dataclass(frozen=True)
class SpectralSpec:
    """Strength of the augmentation of spectrograms; zeros switch it off.

    Attributes:
        equalizer: largest gain of a random equaliser, in standard deviations of the log-mel.
        equalizer_knots: points between which its curve is straight; at least 2.
        mask_mels: most neighbouring bands that are silenced (SpecAugment, Park et al. 2019).
        noise: standard deviation of the noise added to every value.
    """

    equalizer: float
    equalizer_knots: int
    mask_mels: int
    noise: float


def spectral(
    key: Array,
    spectrogram: Float[Array, "videos views frames mels"],
    spec: SpectralSpec,
) -> Float[Array, "videos views frames mels"]:
    """Equalises, masks and adds noise to standardised log-mel at random, each view on its own.

    Room, microphone and background change audio alike in both views of a video, and tell it from
    other videos: without this, contrast between views learns little else. The mean gain is kept,
    because loudness tells temporal order.
    """
    videos, views, _, mels = spectrogram.shape
    keys = jax.random.split(key, 4)
    knots = jax.random.uniform(keys[0], (videos, views, spec.equalizer_knots), minval=-1.0)
    curve = jax.image.resize(knots, (videos, views, mels), "linear")
    curve = spec.equalizer * (curve - curve.mean(axis=-1, keepdims=True))
    width = jax.random.randint(keys[1], (videos, views, 1), 0, spec.mask_mels + 1)
    first = jax.random.uniform(keys[2], (videos, views, 1)) * (mels - width + 1)
    band = jnp.arange(mels).reshape(1, 1, -1)
    masked = (band >= jnp.floor(first)) & (band < jnp.floor(first) + width)
    quiet = spectrogram.min(axis=(2, 3), keepdims=True)
    noise = spec.noise * jax.random.normal(keys[3], spectrogram.shape)
    changed = spectrogram + curve[:, :, None, :] + noise
    return jnp.where(masked[:, :, None, :], quiet, changed)


def standardize(
    video: UInt8[Array, "*batch 3"] | Float[Array, "*batch 3"], mean: float, std: float
) -> Float[Array, "*batch 3"]:
    """Pixels in [0, 1] to about zero mean and unit scale, float32."""
    return (video.astype(jnp.float32) - mean) / std


def to_unit_range(video: UInt8[Array, "*batch 3"]) -> Float[Array, "*batch 3"]:
    """uint8 pixels to float32 in [0, 1]."""
    return video.astype(jnp.float32) / 255.0
