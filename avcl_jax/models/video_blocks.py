"""Residual blocks of the video networks: R(2+1)D, R3D, mixed convolutions, and AVID's variant.

Tran et al., "A Closer Look at Spatiotemporal Convolutions for Action Recognition", CVPR 2018.
"""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
from jaxtyping import Array

from avcl_jax.models.layers import Conv3D, Lowering

# Of one convolution; a network may mix them (`VideoResNet.factorisation`).
ConvKind = Literal["r2plus1d", "r2plus1d_plain", "r3d", "spatial"]

BOTTLENECK_EXPANSION = 4


def middle_channels(channels_in: int, channels_out: int) -> int:
    """Channels between the spatial and the temporal half of a factorised 3x3x3 convolution.

    Chosen so that both halves together have as many parameters as the 3-D convolution (Tran et
    al. 2018, section 3.5): 27 i o / (9 i + 3 o), rounded down.
    """
    return (27 * channels_in * channels_out) // (9 * channels_in + 3 * channels_out)


class SpatioTemporalConv(nn.Module):
    """One 3x3x3 convolution, factorised into (1, 3, 3) and (3, 1, 1), whole, or without time.

    Attributes:
        features: output channels.
        stride: stride in space.
        time_stride: stride in time.
        kind: "r2plus1d" (VMZ's and torchvision's number of middle channels), "r2plus1d_plain"
            (middle channels = output channels), "r3d" (no factorisation), or "spatial" (1, 3, 3).
        middle: middle channels of "r2plus1d"; torchvision computes them once per block.
        lowering: see `Conv3D`.
        norm: makes a `BatchNorm`.
        dtype: compute dtype.
    """

    features: int
    stride: int
    time_stride: int
    kind: ConvKind
    middle: int
    lowering: Lowering
    norm: Any
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None) -> Array:
        """Convolves [batch, time, height, width, channels]."""
        shared: dict[str, Any] = {"lowering": self.lowering, "dtype": self.dtype}
        if self.kind in ("r3d", "spatial"):
            kernel = (3 if self.kind == "r3d" else 1, 3, 3)
            strides = (self.time_stride, self.stride, self.stride)
            return Conv3D(self.features, kernel, strides, name="conv", **shared)(x)
        middle = self.middle if self.kind == "r2plus1d" else self.features
        x = Conv3D(middle, (1, 3, 3), (1, self.stride, self.stride), name="spatial", **shared)(x)
        x = nn.relu(self.norm(name="middle_norm")(x, train=train, mask=mask))
        return Conv3D(
            self.features, (3, 1, 1), (self.time_stride, 1, 1), name="temporal", **shared
        )(x)


class _Block(nn.Module):
    """Settings and convolutions that the residual blocks share.

    Attributes:
        features: channels of the block's convolutions.
        stride: stride in space.
        time_stride: stride in time.
        kind: see `SpatioTemporalConv`.
        lowering: see `Conv3D`.
        norm: makes a `BatchNorm`.
        dtype: compute dtype.
    """

    features: int
    stride: int
    time_stride: int
    kind: ConvKind
    lowering: Lowering
    norm: Any
    dtype: Any

    def _conv(self, name: str, *, first: bool, middle: int) -> SpatioTemporalConv:
        """The block's 3x3x3 convolution called `name`; the first one strides."""
        return SpatioTemporalConv(
            self.features,
            self.stride if first else 1,
            self.time_stride if first else 1,
            self.kind,
            middle,
            self.lowering,
            self.norm,
            self.dtype,
            name=name,
        )

    def _pointwise(self, name: str, features: int, *, strided: bool = False) -> Conv3D:
        strides = (self.time_stride, self.stride, self.stride) if strided else (1, 1, 1)
        return Conv3D(features, (1, 1, 1), strides, self.lowering, self.dtype, name=name)

    def _shortcut_needed(self, x: Array, features: int) -> bool:
        return x.shape[-1] != features or self.stride != 1 or self.time_stride != 1


class BasicBlock(_Block):
    """Two spatio-temporal convolutions and a shortcut, each normalised, then added."""

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None) -> Array:
        """Maps [batch, time, height, width, channels] to [.., features]."""
        middle = middle_channels(x.shape[-1], self.features)
        y = self._conv("conv1", first=True, middle=middle)(x, train=train, mask=mask)
        y = nn.relu(self.norm(name="norm1")(y, train=train, mask=mask))
        y = self._conv("conv2", first=False, middle=middle)(y, train=train, mask=mask)
        y = self.norm(zero_scale=True, name="norm2")(y, train=train, mask=mask)
        if self._shortcut_needed(x, self.features):
            x = self._pointwise("shortcut", self.features, strided=True)(x)
            x = self.norm(name="shortcut_norm")(x, train=train, mask=mask)
        return nn.relu(x + y)


class BottleneckBlock(_Block):
    """1x1x1, spatio-temporal, 1x1x1 to four times the channels, as torchvision's `Bottleneck`."""

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None) -> Array:
        """Maps [batch, time, height, width, channels] to [.., 4 features]."""
        # torchvision takes the channels of the block's input, not those of the convolution's.
        middle = middle_channels(x.shape[-1], self.features)
        wide = BOTTLENECK_EXPANSION * self.features
        y = self._pointwise("conv1", self.features)(x)
        y = nn.relu(self.norm(name="norm1")(y, train=train, mask=mask))
        y = self._conv("conv2", first=True, middle=middle)(y, train=train, mask=mask)
        y = nn.relu(self.norm(name="norm2")(y, train=train, mask=mask))
        y = self._pointwise("conv3", wide)(y)
        y = self.norm(zero_scale=True, name="norm3")(y, train=train, mask=mask)
        if self._shortcut_needed(x, wide):
            x = self._pointwise("shortcut", wide, strided=True)(x)
            x = self.norm(name="shortcut_norm")(x, train=train, mask=mask)
        return nn.relu(x + y)


class NormAfterSumBlock(_Block):
    """Two convolutions whose sum with a bare shortcut is normalised, as in AVID-CMA.

    Morgado et al., "Audio-Visual Instance Discrimination with Cross-Modal Agreement", CVPR 2021,
    and its published code: the shortcut has no normalisation of its own.
    """

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None) -> Array:
        """Maps [batch, time, height, width, channels] to [.., features]."""
        middle = middle_channels(x.shape[-1], self.features)
        y = self._conv("conv1", first=True, middle=middle)(x, train=train, mask=mask)
        y = nn.relu(self.norm(name="norm1")(y, train=train, mask=mask))
        y = self._conv("conv2", first=False, middle=middle)(y, train=train, mask=mask)
        if self._shortcut_needed(x, self.features):
            x = self._pointwise("shortcut", self.features, strided=True)(x)
        return nn.relu(self.norm(name="norm2")(x + y, train=train, mask=mask))
