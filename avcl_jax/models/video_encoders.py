"""Video encoders: the R(2+1)D and R3D family of residual networks.

Tran et al., "A Closer Look at Spatiotemporal Convolutions for Action Recognition", CVPR 2018.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from avcl_jax.models.layers import BatchNorm, Conv3D, Lowering

Factorisation = Literal["r2plus1d", "r2plus1d_plain", "r3d"]
Stem = Literal["r2plus1d", "r3d", "patch4"]


def middle_channels(channels_in: int, channels_out: int) -> int:
    """Channels between the spatial and the temporal half of a factorised 3x3x3 convolution.

    Chosen so that both halves together have as many parameters as the 3-D convolution (Tran et
    al. 2018, section 3.5): 27 i o / (9 i + 3 o), rounded down.
    """
    return (27 * channels_in * channels_out) // (9 * channels_in + 3 * channels_out)


class SpatioTemporalConv(nn.Module):
    """One 3x3x3 convolution, factorised into (1, 3, 3) and (3, 1, 1) or whole.

    Attributes:
        features: output channels.
        stride: stride in space.
        time_stride: stride in time.
        factorisation: "r2plus1d" (VMZ's and torchvision's number of middle channels),
            "r2plus1d_plain" (middle channels = output channels), or "r3d" (no factorisation).
        middle: middle channels of "r2plus1d"; torchvision computes them once per block.
        lowering: see `Conv3D`.
        dtype: compute dtype.
    """

    features: int
    stride: int
    time_stride: int
    factorisation: Factorisation
    middle: int
    lowering: Lowering
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None) -> Array:
        """Convolves [batch, time, height, width, channels]."""
        shared = {"lowering": self.lowering, "dtype": self.dtype}
        if self.factorisation == "r3d":
            strides = (self.time_stride, self.stride, self.stride)
            return Conv3D(self.features, (3, 3, 3), strides, name="conv", **shared)(x)
        middle = self.middle if self.factorisation == "r2plus1d" else self.features
        x = Conv3D(middle, (1, 3, 3), (1, self.stride, self.stride), name="spatial", **shared)(x)
        x = BatchNorm(dtype=self.dtype, name="middle_norm")(x, train=train, mask=mask)
        x = nn.relu(x)
        return Conv3D(
            self.features, (3, 1, 1), (self.time_stride, 1, 1), name="temporal", **shared
        )(x)


class VideoBlock(nn.Module):
    """Residual basic block of two spatio-temporal convolutions."""

    features: int
    stride: int
    time_stride: int
    factorisation: Factorisation
    lowering: Lowering
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None) -> Array:
        """Maps [batch, time, height, width, channels] to [.., features]."""
        middle = middle_channels(x.shape[-1], self.features)
        shared: dict[str, Any] = {
            "factorisation": self.factorisation,
            "middle": middle,
            "lowering": self.lowering,
            "dtype": self.dtype,
        }
        y = SpatioTemporalConv(
            self.features, self.stride, self.time_stride, name="conv1", **shared
        )(x, train=train, mask=mask)
        y = nn.relu(BatchNorm(dtype=self.dtype, name="norm1")(y, train=train, mask=mask))
        y = SpatioTemporalConv(self.features, 1, 1, name="conv2", **shared)(
            y, train=train, mask=mask
        )
        y = BatchNorm(dtype=self.dtype, zero_scale=True, name="norm2")(y, train=train, mask=mask)
        if x.shape[-1] != self.features or self.stride != 1 or self.time_stride != 1:
            strides = (self.time_stride, self.stride, self.stride)
            x = Conv3D(
                self.features,
                (1, 1, 1),
                strides,
                lowering=self.lowering,
                dtype=self.dtype,
                name="shortcut",
            )(x)
            x = BatchNorm(dtype=self.dtype, name="shortcut_norm")(x, train=train, mask=mask)
        return nn.relu(x + y)


class VideoResNet(nn.Module):
    """R(2+1)D / R3D residual network over video clips.

    The published R(2+1)D-18 is `widths=(64, 128, 256, 512)`, `depths=(2, 2, 2, 2)`, stem
    "r2plus1d", factorisation "r2plus1d": 31.30 M parameters. Fewer, narrower stages and the
    stem "patch4" give networks for a laptop.

    Attributes:
        widths: output channels of each stage; all but the first halve time and space.
        depths: residual blocks in each stage.
        factorisation: see `SpatioTemporalConv`.
        stem: "r2plus1d" (1x7x7 stride 2, then 3x1x1), "r3d" (3x7x7 stride 2), or "patch4" (each
            4x4 patch of each frame through one dense layer; many times cheaper on a CPU).
        subtract_time_mean: subtract the clip's mean picture, so that what moves is what is seen.
        lowering: see `Conv3D`.
        dtype: compute dtype; parameters and statistics are float32.
    """

    widths: Sequence[int]
    depths: Sequence[int]
    factorisation: Factorisation
    stem: Stem
    subtract_time_mean: bool
    lowering: Lowering = "auto"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        video: Float[Array, "batch time height width 3"],
        *,
        train: bool,
        mask: Bool[Array, " batch"] | None = None,
    ) -> dict[str, Array]:
        """Encodes clips.

        Args:
            video: pixels, about zero mean and unit scale.
            train: normalise by the statistics of the batch and update the running ones.
            mask: rows whose picture is present; the others do not enter the statistics.

        Returns:
            `features` float32 [batch, widths[-1]], the mean over time and space, and `map`
            [batch, time', height', width', widths[-1]] before it.

        Raises:
            ValueError: if the clip is smaller than a patch, or depths and widths differ in length.
        """
        if len(self.widths) != len(self.depths):
            raise ValueError(
                f"widths {tuple(self.widths)} and depths {tuple(self.depths)} must be equally long"
            )
        x = video
        if self.subtract_time_mean:
            x = x - x.mean(axis=1, keepdims=True)
        x = self._stem(x.astype(self.dtype), train, mask)
        for stage, (width, depth) in enumerate(zip(self.widths, self.depths, strict=True)):
            for block in range(depth):
                stride = 2 if stage > 0 and block == 0 else 1
                x = VideoBlock(
                    width,
                    stride,
                    stride,
                    self.factorisation,
                    self.lowering,
                    self.dtype,
                    name=f"stage{stage + 1}_block{block + 1}",
                )(x, train=train, mask=mask)
        return {"features": x.astype(jnp.float32).mean(axis=(1, 2, 3)), "map": x}

    def _stem(self, x: Array, train: bool, mask: Array | None) -> Array:
        shared: dict[str, Any] = {"lowering": self.lowering, "dtype": self.dtype}
        width = self.widths[0]
        if self.stem == "patch4":
            batch, time, height, columns, channels = x.shape
            if height % 4 or columns % 4:
                raise ValueError(
                    f"stem 'patch4' needs a height and width divisible by 4, got {height}x{columns}"
                )
            x = x.reshape(batch, time, height // 4, 4, columns // 4, 4, channels)
            x = x.transpose(0, 1, 2, 4, 3, 5, 6)
            x = x.reshape(batch, time, height // 4, columns // 4, 16 * channels)
            x = nn.Dense(width, use_bias=False, dtype=self.dtype, name="stem_patch")(x)
        elif self.stem == "r2plus1d":
            x = Conv3D(45, (1, 7, 7), (1, 2, 2), name="stem_spatial", **shared)(x)
            x = BatchNorm(dtype=self.dtype, name="stem_middle_norm")(x, train=train, mask=mask)
            x = Conv3D(width, (3, 1, 1), (1, 1, 1), name="stem_temporal", **shared)(nn.relu(x))
        elif self.stem == "r3d":
            x = Conv3D(width, (3, 7, 7), (1, 2, 2), name="stem_conv", **shared)(x)
        else:
            raise ValueError(f"unknown stem {self.stem!r}: use 'r2plus1d', 'r3d' or 'patch4'")
        return nn.relu(BatchNorm(dtype=self.dtype, name="stem_norm")(x, train=train, mask=mask))
