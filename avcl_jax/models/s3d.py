"""S3D and S3D-G: Inception networks with separated space and time.

Xie et al., "Rethinking Spatiotemporal Feature Learning: Speed-Accuracy Trade-offs in Video
Classification", ECCV 2018. Layers as in torchvision's `s3d`; the gating of S3D-G follows section
5.1 of the paper.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from avcl_jax.errors import UserError
from avcl_jax.models.layers import Conv, Lowering, NormEncoder, VideoEncoder, encoded

# Channels of the branches 1x1x1; 1x1x1 then 3x3x3; 1x1x1 then 3x3x3; max-pool then 1x1x1.
MIXED: dict[str, tuple[int, ...]] = {
    "mixed_3b": (64, 96, 128, 16, 32, 32),
    "mixed_3c": (128, 128, 192, 32, 96, 64),
    "mixed_4b": (192, 96, 208, 16, 48, 64),
    "mixed_4c": (160, 112, 224, 24, 64, 64),
    "mixed_4d": (128, 128, 256, 24, 64, 64),
    "mixed_4e": (112, 144, 288, 32, 64, 64),
    "mixed_4f": (256, 160, 320, 32, 128, 128),
    "mixed_5b": (256, 160, 320, 32, 128, 128),
    "mixed_5c": (384, 192, 384, 48, 128, 128),
}


class ConvNorm(nn.Module):
    """Convolution, batch normalisation, ReLU.

    Attributes:
        features: output channels.
        kernel_size: (time, height, width).
        strides: (time, height, width).
        conv: makes a `Conv`.
        norm: makes a `BatchNorm`.
    """

    features: int
    kernel_size: tuple[int, int, int]
    strides: tuple[int, int, int]
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None) -> Array:
        """Maps [batch, time, height, width, channels] to [.., features]."""
        x = self.conv(self.features, self.kernel_size, self.strides, name="conv")(x)
        return nn.relu(self.norm(name="norm")(x, train=train, mask=mask))


class SeparableConv(nn.Module):
    """A (1, k, k) and a (k, 1, 1) convolution, each with its normalisation and ReLU.

    Attributes:
        features: output channels of both.
        size: k.
        stride: stride in time and space.
        conv: makes a `Conv`.
        norm: makes a `BatchNorm`.
    """

    features: int
    size: int
    stride: int
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None) -> Array:
        """Maps [batch, time, height, width, channels] to [.., features]."""
        n, s, makers = self.size, self.stride, (self.conv, self.norm)
        spatial = ConvNorm(self.features, (1, n, n), (1, s, s), *makers, name="spatial")
        temporal = ConvNorm(self.features, (n, 1, 1), (s, 1, 1), *makers, name="temporal")
        return temporal(spatial(x, train=train, mask=mask), train=train, mask=mask)


class SelfGating(nn.Module):
    """Scales channels by a sigmoid of a linear map of their means (S3D-G).

    Attributes:
        dtype: compute dtype.
    """

    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [batch, time, height, width, channels] to the same shape."""
        mean = x.astype(jnp.float32).mean(axis=(1, 2, 3), keepdims=True)
        return x * nn.sigmoid(nn.Dense(x.shape[-1], dtype=self.dtype, name="fc")(mean))


class MixedBlock(nn.Module):
    """Inception block of four branches, their channels joined.

    Attributes:
        channels: see `MIXED`.
        gating: gate every branch.
        conv: makes a `Conv`.
        norm: makes a `BatchNorm`.
        dtype: compute dtype.
    """

    channels: tuple[int, ...]
    gating: bool
    conv: Any
    norm: Any
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None) -> Array:
        """Maps [batch, time, height, width, channels] to the same grid."""

        def pointwise(x: Array, features: int, name: str) -> Array:
            layer = ConvNorm(features, (1, 1, 1), (1, 1, 1), self.conv, self.norm, name=name)
            return layer(x, train=train, mask=mask)

        def separable(x: Array, features: int, name: str) -> Array:
            layer = SeparableConv(features, 3, 1, self.conv, self.norm, name=name)
            return layer(x, train=train, mask=mask)

        b0, b1_reduced, b1, b2_reduced, b2, b3 = self.channels
        pooled = nn.max_pool(x, (3, 3, 3), (1, 1, 1), padding=((1, 1),) * 3)
        branches = [
            pointwise(x, b0, "branch0"),
            separable(pointwise(x, b1_reduced, "branch1_reduce"), b1, "branch1"),
            separable(pointwise(x, b2_reduced, "branch2_reduce"), b2, "branch2"),
            pointwise(pooled, b3, "branch3"),
        ]
        if self.gating:
            branches = [
                SelfGating(self.dtype, name=f"gating{n}")(branch)
                for n, branch in enumerate(branches)
            ]
        return jnp.concatenate(branches, axis=-1)


class S3D(VideoEncoder, NormEncoder, kw_only=True):
    """S3D, and with gating S3D-G, over video clips.

    Attributes:
        width: multiplies the published channels, 1 for the published network.
        gating: the feature gating of S3D-G.
        lowering: see `Conv`.
    """

    width: float
    gating: bool
    norm_momentum: float = 0.999
    norm_epsilon: float = 1e-3
    lowering: Lowering = "auto"

    @nn.compact
    def __call__(
        self,
        video: Float[Array, "batch time height width 3"],
        *,
        train: bool,
        mask: Bool[Array, " batch"] | None = None,
    ) -> dict[str, Array]:
        """Encodes clips, see `encoders.EncoderContract`.

        torchvision's classifier averages windows of 2 frames instead of all, which is the same for
        clips of up to 16 frames.

        Raises:
            UserError: if the clip is smaller than 8 frames of 32x32, which the strides need.
        """
        if video.shape[1] < 8 or min(video.shape[2:4]) < 32:
            raise UserError(
                f"S3D needs clips of at least 8 frames of 32x32, got {video.shape[1]} of "
                f"{video.shape[2]}x{video.shape[3]}"
            )
        makers = functools.partial(Conv, lowering=self.lowering, dtype=self.dtype), self.norm
        run = functools.partial(self.run, train=train, mask=mask)

        def wide(channels: int) -> int:
            return max(1, round(self.width * channels))

        x = self.prepare(video, subtract_time_mean=self.subtract_time_mean)
        x = run(SeparableConv(wide(64), 7, 2, *makers, name="conv_1a"), x)
        x = _pool_space(x)
        x = run(ConvNorm(wide(64), (1, 1, 1), (1, 1, 1), *makers, name="conv_2b"), x)
        x = run(SeparableConv(wide(192), 3, 1, *makers, name="conv_2c"), x)
        if self.gating:
            x = SelfGating(self.dtype, name="gating_2c")(x)
        x = _pool_space(x)
        for name, channels in MIXED.items():
            if name == "mixed_4b":
                x = nn.max_pool(x, (3, 3, 3), (2, 2, 2), padding=((1, 1),) * 3)
            elif name == "mixed_5b":
                x = nn.max_pool(x, (2, 2, 2), (2, 2, 2))
            channels = tuple(wide(n) for n in channels)
            x = run(MixedBlock(channels, self.gating, *makers, self.dtype, name=name), x)
        return encoded(x)


def _pool_space(x: Array) -> Array:
    return nn.max_pool(x, (1, 3, 3), (1, 2, 2), padding=((0, 0), (1, 1), (1, 1)))
