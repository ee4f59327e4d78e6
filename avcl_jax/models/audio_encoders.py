"""Audio encoders: convolutional networks over log-mel spectrograms.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, on one input channel, as
GDT (Patrick et al. 2020) and CrissCross (Sarkar and Etemad 2023) use them, and the plain network of
AVID (Morgado et al. 2021). Published sizes by name are in `avcl_jax.models.encoders`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
from jaxtyping import Array, Bool, Float

from avcl_jax.errors import UserError
from avcl_jax.models.layers import (
    Conv,
    NormEncoder,
    Pool,
    check_stages,
    encoded,
    patches,
    recomputed,
)


class AudioBlock(nn.Module):
    """Residual basic block of two 3x3 convolutions.

    Attributes:
        features: output channels.
        stride: over frames and mels.
        norm: makes a `BatchNorm`.
        dtype: compute dtype.
    """

    features: int
    stride: int
    norm: Any
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None) -> Array:
        """Maps [batch, frames, mels, channels] to [.., features]."""
        strides = (self.stride, self.stride)
        y = Conv(self.features, (3, 3), strides, dtype=self.dtype, name="conv1")(x)
        y = nn.relu(self.norm(name="norm1")(y, train=train, mask=mask))
        y = Conv(self.features, (3, 3), (1, 1), dtype=self.dtype, name="conv2")(y)
        y = self.norm(zero_scale=True, name="norm2")(y, train=train, mask=mask)
        if x.shape[-1] != self.features or self.stride != 1:
            x = Conv(self.features, (1, 1), strides, dtype=self.dtype, name="shortcut")(x)
            x = self.norm(name="shortcut_norm")(x, train=train, mask=mask)
        return nn.relu(x + y)


class AudioResNet(NormEncoder):
    """ResNet over a log-mel spectrogram of one channel.

    ResNet-18 is `widths=(64, 128, 256, 512)`, `depths=(2, 2, 2, 2)`, stem "resnet"; the 9-layer
    network of GDT has depths (1, 1, 1, 1).

    Attributes:
        widths: output channels of each stage; all but the first halve frames and mels.
        depths: residual blocks in each stage.
        stem: "resnet" (7x7 stride 2, 3x3 max-pool stride 2) or "patch" (non-overlapping patches
            through one dense layer; many times cheaper on a CPU).
        patch: (frames, mels) of a patch of stem "patch".
    """

    widths: Sequence[int]
    depths: Sequence[int]
    stem: Literal["resnet", "patch"]
    patch: tuple[int, int] = (2, 2)

    @nn.compact
    def __call__(
        self,
        spectrogram: Float[Array, "batch frames mels"],
        *,
        train: bool,
        mask: Bool[Array, " batch"] | None = None,
    ) -> dict[str, Array]:
        """Encodes spectrograms, see `encoders.EncoderContract`.

        Raises:
            UserError: if the patch does not divide the spectrogram, or depths and widths differ.
        """
        check_stages(self.widths, self.depths)
        x = spectrogram[..., None].astype(self.dtype)
        width = self.widths[0]
        if self.stem == "patch":
            x = patches(
                x,
                self.patch,
                names=("patch", "spectrogram"),
                settings=("spectrogram.frames", "spectrogram.mels"),
            )
            x = nn.Dense(width, use_bias=False, dtype=self.dtype, name="stem_patch")(x)
        elif self.stem == "resnet":
            x = Conv(width, (7, 7), (2, 2), dtype=self.dtype, name="stem_conv")(x)
        else:
            raise UserError(f"unknown stem {self.stem!r}: use 'resnet' or 'patch'")
        x = nn.relu(self.norm(name="stem_norm")(x, train=train, mask=mask))
        if self.stem == "resnet":
            x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        for stage, (width, depth) in enumerate(zip(self.widths, self.depths, strict=True)):
            for block in range(depth):
                stride = 2 if stage > 0 and block == 0 else 1
                name = f"stage{stage + 1}_block{block + 1}"
                layer = AudioBlock(width, stride, self.norm, self.dtype, name=name)
                x = self.run(layer, x, train=train, mask=mask)
        return encoded(x)


class AudioConvNet(NormEncoder):
    """Plain convolutional network over a spectrogram, without shortcuts, as AVID's `Conv2D`.

    AVID's, of depth 10 by its own count, has `widths=(64, 128, 256, 512)`. After a 7x7 stem of
    stride 2 every block is two 3x3 convolutions; all blocks but the last halve frames and mels.

    Attributes:
        widths: channels of the stem and the blocks; the first is that of the stem and first block.
        pool: "mean" or "max" over frames and mels.
    """

    widths: Sequence[int]
    pool: Pool

    @nn.compact
    def __call__(
        self,
        spectrogram: Float[Array, "batch frames mels"],
        *,
        train: bool,
        mask: Bool[Array, " batch"] | None = None,
    ) -> dict[str, Array]:
        """Encodes spectrograms, see `encoders.EncoderContract`."""

        def layer(x: Array, width: int, size: int, stride: int, name: str) -> Array:
            kernel, strides = (size, size), (stride, stride)

            def run(own: Any, x: Array) -> Array:
                x = Conv(width, kernel, strides, dtype=self.dtype, name=f"{name}_conv")(x)
                return nn.relu(own.norm(name=f"{name}_norm")(x, train=train, mask=mask))

            return recomputed(run, self.remat)(self, x)

        x = layer(spectrogram[..., None].astype(self.dtype), self.widths[0], 7, 2, "stem")
        for block, width in enumerate(self.widths, start=1):
            stride = 1 if block == len(self.widths) else 2
            x = layer(x, width, 3, stride, f"block{block}_1")
            x = layer(x, width, 3, 1, f"block{block}_2")
        return encoded(x, self.pool)
