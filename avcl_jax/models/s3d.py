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
from avcl_jax.models.layers import (
    BatchNorm,
    Conv3D,
    Lowering,
    Remat,
    pool_features,
    prepare_video,
    run_block,
)

# Channels of the branches 1x1x1; 1x1x1 then 3x3x3; 1x1x1 then 3x3x3; max-pool then 1x1x1.
MIXED: dict[str, tuple[int, int, int, int, int, int]] = {
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
        lowering: see `Conv3D`.
        norm: makes a `BatchNorm`.
        dtype: compute dtype.
    """

    features: int
    kernel_size: tuple[int, int, int]
    strides: tuple[int, int, int]
    lowering: Lowering
    norm: Any
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None) -> Array:
        """Maps [batch, time, height, width, channels] to [.., features]."""
        x = Conv3D(
            self.features, self.kernel_size, self.strides, self.lowering, self.dtype, name="conv"
        )(x)
        return nn.relu(self.norm(name="norm")(x, train=train, mask=mask))


class SeparableConv(nn.Module):
    """A (1, k, k) and a (k, 1, 1) convolution, each with its normalisation and ReLU.

    Attributes:
        features: output channels of both.
        size: k.
        stride: stride in time and space.
        shared: what `ConvNorm` takes besides: lowering, norm, dtype.
    """

    features: int
    size: int
    stride: int
    shared: Any

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None) -> Array:
        """Maps [batch, time, height, width, channels] to [.., features]."""
        n, s = self.size, self.stride
        spatial = ConvNorm(self.features, (1, n, n), (1, s, s), *self.shared, name="spatial")
        temporal = ConvNorm(self.features, (n, 1, 1), (s, 1, 1), *self.shared, name="temporal")
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
        shared: what `ConvNorm` takes besides: lowering, norm, dtype.
    """

    channels: tuple[int, int, int, int, int, int]
    gating: bool
    shared: Any

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None) -> Array:
        """Maps [batch, time, height, width, channels] to the same grid."""

        def pointwise(x: Array, features: int, name: str) -> Array:
            layer = ConvNorm(features, (1, 1, 1), (1, 1, 1), *self.shared, name=name)
            return layer(x, train=train, mask=mask)

        def separable(x: Array, features: int, name: str) -> Array:
            return SeparableConv(features, 3, 1, self.shared, name=name)(x, train=train, mask=mask)

        b0, b1_reduced, b1, b2_reduced, b2, b3 = self.channels
        pooled = nn.max_pool(x, (3, 3, 3), (1, 1, 1), padding=((1, 1),) * 3)
        branches = [
            pointwise(x, b0, "branch0"),
            separable(pointwise(x, b1_reduced, "branch1_reduce"), b1, "branch1"),
            separable(pointwise(x, b2_reduced, "branch2_reduce"), b2, "branch2"),
            pointwise(pooled, b3, "branch3"),
        ]
        if self.gating:
            dtype = self.shared[-1]
            branches = [
                SelfGating(dtype, name=f"gating{n}")(branch) for n, branch in enumerate(branches)
            ]
        return jnp.concatenate(branches, axis=-1)


class S3D(nn.Module):
    """S3D, and with gating S3D-G, over video clips.

    Attributes:
        width: multiplies the published channels, 1 for the published network.
        gating: the feature gating of S3D-G.
        subtract_time_mean: see `prepare_video`.
        norm_momentum: weight of the old running statistics (PyTorch's momentum is 1 minus it).
        norm_epsilon: added to the variance.
        freeze_norm: see `BatchNorm.frozen`.
        channel_mean: see `prepare_video`.
        channel_std: see `prepare_video`.
        lowering: see `Conv3D`.
        remat: see `recomputed`.
        dtype: compute dtype; parameters and statistics are float32.
    """

    width: float
    gating: bool
    subtract_time_mean: bool
    norm_momentum: float = 0.999
    norm_epsilon: float = 1e-3
    freeze_norm: bool = False
    channel_mean: tuple[float, ...] | None = None
    channel_std: tuple[float, ...] | None = None
    lowering: Lowering = "auto"
    remat: Remat = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        video: Float[Array, "batch time height width 3"],
        *,
        train: bool,
        mask: Bool[Array, " batch"] | None = None,
    ) -> dict[str, Array]:
        """Encodes clips; arguments and results as of `VideoResNet`.

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
        norm = functools.partial(
            BatchNorm,
            momentum=self.norm_momentum,
            epsilon=self.norm_epsilon,
            frozen=self.freeze_norm,
            dtype=self.dtype,
        )
        shared = (self.lowering, norm, self.dtype)

        def wide(channels: int) -> int:
            return max(1, round(self.width * channels))

        x = prepare_video(
            video,
            channel_mean=self.channel_mean,
            channel_std=self.channel_std,
            subtract_time_mean=self.subtract_time_mean,
        ).astype(self.dtype)
        run = functools.partial(run_block, remat=self.remat, train=train, mask=mask)
        x = run(SeparableConv(wide(64), 7, 2, shared, name="conv_1a"), x=x)
        x = _pool_space(x)
        x = run(ConvNorm(wide(64), (1, 1, 1), (1, 1, 1), *shared, name="conv_2b"), x=x)
        x = run(SeparableConv(wide(192), 3, 1, shared, name="conv_2c"), x=x)
        if self.gating:
            x = SelfGating(self.dtype, name="gating_2c")(x)
        x = _pool_space(x)
        for name, channels in MIXED.items():
            if name == "mixed_4b":
                x = nn.max_pool(x, (3, 3, 3), (2, 2, 2), padding=((1, 1),) * 3)
            elif name == "mixed_5b":
                x = nn.max_pool(x, (2, 2, 2), (2, 2, 2))
            b0, b1_reduced, b1, b2_reduced, b2, b3 = (wide(n) for n in channels)
            channels = (b0, b1_reduced, b1, b2_reduced, b2, b3)
            x = run(MixedBlock(channels, self.gating, shared, name=name), x=x)
        return {"features": pool_features(x, "mean"), "map": x}


def _pool_space(x: Array) -> Array:
    return nn.max_pool(x, (1, 3, 3), (1, 2, 2), padding=((0, 0), (1, 1), (1, 1)))
