"""Residual networks over video: R(2+1)D, R3D, mixed convolutions, and AVID's variant.

Tran et al., "A Closer Look at Spatiotemporal Convolutions for Action Recognition", CVPR 2018.
Published sizes by name are in `avcl_jax.models.encoders`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
from jaxtyping import Array, Bool, Float

from avcl_jax.errors import UserError
from avcl_jax.models.layers import (
    Conv,
    Lowering,
    NormEncoder,
    Pool,
    VideoEncoder,
    check_stages,
    encoded,
    patches,
    recomputed,
)

# Of one convolution; a network may mix them (`VideoResNet.factorisation`).
ConvKind = Literal["r2plus1d", "r2plus1d_plain", "r3d", "spatial"]
Factorisation = Literal["r2plus1d", "r2plus1d_plain", "r3d", "mc3"]
Stem = Literal["r2plus1d", "r3d", "r3d_pool", "patch4"]
Block = Literal["basic", "bottleneck", "norm_after_sum"]

BOTTLENECK_EXPANSION = 4
# Of the factorised stem; published, not computed from anything (Tran et al. 2018).
STEM_MIDDLE_CHANNELS = 45


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
        conv: makes a `Conv`.
        norm: makes a `BatchNorm`.
        packs: those of the input and of the output, see `convolve_packed`.
    """

    features: int
    stride: int
    time_stride: int
    kind: ConvKind
    middle: int
    conv: Any
    norm: Any
    packs: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None) -> Array:
        """Convolves [batch, time, height, width, channels]."""
        strides = (self.time_stride, self.stride, self.stride)
        if self.kind in ("r3d", "spatial"):
            kernel = (3 if self.kind == "r3d" else 1, 3, 3)
            return self.conv(self.features, kernel, strides, packs=self.packs, name="conv")(x)
        middle = self.middle if self.kind == "r2plus1d" else self.features
        out = self.packs[1]
        x = self.conv(middle, (1, 3, 3), (1, *strides[1:]), packs=self.packs, name="spatial")(x)
        x = nn.relu(self.norm(pack=out, name="middle_norm")(x, train=train, mask=mask))
        return self.conv(
            self.features, (3, 1, 1), (strides[0], 1, 1), packs=(out, out), name="temporal"
        )(x)


class ResidualBlock(nn.Module):
    """Residual block of two or three convolutions.

    Attributes:
        form: "basic": two spatio-temporal convolutions and a shortcut, each normalised, then added.
            "bottleneck": 1x1x1, spatio-temporal, 1x1x1 to four times the features, as torchvision's
            `Bottleneck`. "norm_after_sum": two convolutions whose sum with a bare shortcut is
            normalised, as in the published code of AVID-CMA (Morgado et al., "Audio-Visual Instance
            Discrimination with Cross-Modal Agreement", CVPR 2021).
        features: channels of the spatio-temporal convolutions.
        stride: stride in space.
        time_stride: stride in time.
        kind: see `SpatioTemporalConv`.
        conv: makes a `Conv`.
        norm: makes a `BatchNorm`.
        packs: those of the input and of the output, see `convolve_packed`.
    """

    form: Block
    features: int
    stride: int
    time_stride: int
    kind: ConvKind
    conv: Any
    norm: Any
    packs: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None) -> Array:
        """Maps [batch, time, height, width, channels] to [.., features]."""
        # torchvision takes the channels of the block's input, not those of the convolution's.
        channels = x.shape[-1] // self.packs[0]
        inside = (self.packs[1], self.packs[1])
        middle = middle_channels(channels, self.features)
        bottleneck = self.form == "bottleneck"
        strides = (self.time_stride, self.stride, self.stride)

        def conv(x: Array, name: str, *, strided: bool) -> Array:
            stride, time_stride = (self.stride, self.time_stride) if strided else (1, 1)
            layer = SpatioTemporalConv(
                self.features,
                stride,
                time_stride,
                self.kind,
                middle,
                self.conv,
                self.norm,
                self.packs if strided else inside,
                name=name,
            )
            return layer(x, train=train, mask=mask)

        def pointwise(x: Array, features: int, name: str, strides: tuple[int, ...]) -> Array:
            packs = self.packs if name == "shortcut" else inside
            return self.conv(features, (1, 1, 1), strides, packs=packs, name=name)(x)

        def norm(x: Array, name: str, **options: Any) -> Array:
            layer = self.norm(pack=self.packs[1], name=name, **options)
            return layer(x, train=train, mask=mask)

        features = self.features
        if bottleneck:
            features *= BOTTLENECK_EXPANSION
            y = nn.relu(norm(pointwise(x, self.features, "conv1", (1, 1, 1)), "norm1"))
            y = nn.relu(norm(conv(y, "conv2", strided=True), "norm2"))
            y = pointwise(y, features, "conv3", (1, 1, 1))
        else:
            y = nn.relu(norm(conv(x, "conv1", strided=True), "norm1"))
            y = conv(y, "conv2", strided=False)
        normalised = self.form != "norm_after_sum"
        if normalised:
            y = norm(y, "norm3" if bottleneck else "norm2", zero_scale=True)
        if channels != features or strides != (1, 1, 1):
            x = pointwise(x, features, "shortcut", strides)
            if normalised:
                x = norm(x, "shortcut_norm")
        return nn.relu(x + y if normalised else norm(x + y, "norm2"))


class VideoResNet(VideoEncoder, NormEncoder):
    """R(2+1)D / R3D / MC3 residual network over video clips.

    The published R(2+1)D-18 is `widths=(64, 128, 256, 512)`, `depths=(2, 2, 2, 2)`, stem
    "r2plus1d", factorisation "r2plus1d": 31,300,125 parameters. Fewer, narrower stages and the
    stem "patch4" give networks for a laptop.

    Attributes:
        widths: channels of each stage; all but the first halve time and space.
        depths: residual blocks in each stage.
        factorisation: form of the convolutions, see `SpatioTemporalConv`; "mc3" is "r3d" in the
            first stage and "spatial" in the others, which do not change the number of frames.
        stem: "r2plus1d" (1x7x7 stride 2, then 3x1x1), "r3d" (3x7x7 stride 2), "r3d_pool" (the same
            and a 1x3x3 max-pool of stride 2), or "patch4" (each 4x4 patch of each frame through one
            dense layer; many times cheaper on a CPU).
        block: see `ResidualBlock.form`.
        pool: "mean" or "max" over time and space.
        lowering: see `Conv`.
        matrix_unit: channels that fill a matrix unit, `convolution.matrix_unit`. Stages with at
            most half as many have neighbouring pixels side by side as channels, for which the same
            parameters give the same results.
    """

    widths: Sequence[int]
    depths: Sequence[int]
    factorisation: Factorisation
    stem: Stem
    block: Block = "basic"
    pool: Pool = "mean"
    lowering: Lowering = "auto"
    matrix_unit: int = 1

    @nn.compact
    def __call__(
        self,
        video: Float[Array, "batch time height width 3"],
        *,
        train: bool,
        mask: Bool[Array, " batch"] | None = None,
    ) -> dict[str, Array]:
        """Encodes clips, see `encoders.EncoderContract`.

        Channels are the last width, four times that with bottlenecks.

        Raises:
            UserError: if patches do not fill the clip, or depths and widths differ in length.
        """
        check_stages(self.widths, self.depths)
        if self.block not in ("basic", "bottleneck", "norm_after_sum"):
            raise UserError(
                f"unknown block {self.block!r}: use one of basic, bottleneck, norm_after_sum"
            )
        # A stem of patches subtracts the mean frame itself, from fewer values.
        early = self.subtract_time_mean and self.stem != "patch4"
        x = self.prepare(video, subtract_time_mean=early)
        conv = functools.partial(Conv, lowering=self.lowering, dtype=self.dtype)
        packs = self._packs(video.shape[-2])
        stem = recomputed(lambda own, x: own._stem(x, conv, packs[0], train, mask), self.remat)
        x = stem(self, x)
        for stage, (width, depth) in enumerate(zip(self.widths, self.depths, strict=True)):
            kind: ConvKind
            if self.factorisation == "mc3":
                kind = "r3d" if stage == 0 else "spatial"
            else:
                kind = self.factorisation
            for block in range(depth):
                stride = 2 if stage > 0 and block == 0 else 1
                layer = ResidualBlock(
                    self.block,
                    width,
                    stride,
                    1 if kind == "spatial" else stride,
                    kind,
                    conv,
                    self.norm,
                    (packs[max(0, stage - (block == 0))], packs[stage]),
                    name=f"stage{stage + 1}_block{block + 1}",
                )
                x = self.run(layer, x, train=train, mask=mask)
        return encoded(x, self.pool)

    def _packs(self, columns: int) -> list[int]:
        """Number of neighbouring pixels that each stage has side by side as channels.

        As many as fill a matrix unit, at most twice as many as the next stage, so that a stride of
        two is one of whole packs; one in the last stage, and where rows cannot be divided.
        """
        packs = [1] * len(self.widths)
        if self.stem != "r2plus1d" or self.block == "bottleneck":
            return packs
        for stage in reversed(range(len(packs) - 1)):
            pack = 2 * packs[stage + 1]
            if pack * self.widths[stage] <= self.matrix_unit and columns % (pack << stage + 1) == 0:
                packs[stage] = pack
        return packs

    def _stem(self, x: Array, conv: Any, pack: int, train: bool, mask: Array | None) -> Array:
        width = self.widths[0]
        if self.stem == "patch4":
            x = patches(
                x,
                (1, 4, 4),
                names=("stem 'patch4'", "clip"),
                settings=("num_frames", "image_size", "image_size"),
            )
            x = nn.Dense(width, use_bias=False, dtype=self.dtype, name="stem_patch")(x)
            if self.subtract_time_mean:
                # Equals the mean of the pixels, as the layer is linear and sees single frames.
                # On pixels, XLA would compute the augmentation once more for the mean.
                x = x - x.mean(axis=1, keepdims=True)
        elif self.stem == "r2plus1d":
            x = conv(
                STEM_MIDDLE_CHANNELS, (1, 7, 7), (1, 2, 2), packs=(1, pack), name="stem_spatial"
            )(x)
            x = nn.relu(self.norm(pack=pack, name="stem_middle_norm")(x, train=train, mask=mask))
            x = conv(width, (3, 1, 1), (1, 1, 1), packs=(pack, pack), name="stem_temporal")(x)
        elif self.stem in ("r3d", "r3d_pool"):
            x = conv(width, (3, 7, 7), (1, 2, 2), name="stem_conv")(x)
        else:
            raise UserError(
                f"unknown stem {self.stem!r}: use 'r2plus1d', 'r3d', 'r3d_pool' or 'patch4'"
            )
        x = nn.relu(self.norm(pack=pack, name="stem_norm")(x, train=train, mask=mask))
        if self.stem == "r3d_pool":
            x = nn.max_pool(x, (1, 3, 3), (1, 2, 2), padding=((0, 0), (1, 1), (1, 1)))
        return x
