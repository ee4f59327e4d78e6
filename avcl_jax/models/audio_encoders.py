"""Audio encoders: residual networks over log-mel spectrograms.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, on one input channel, as
GDT (Patrick et al. 2020) and CrissCross (Sarkar and Etemad 2023) use them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from avcl_jax.models.layers import BatchNorm, Conv2D


class AudioBlock(nn.Module):
    """Residual basic block of two 3x3 convolutions."""

    features: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None) -> Array:
        """Maps [batch, frames, mels, channels] to [.., features]."""
        strides = (self.stride, self.stride)
        y = Conv2D(self.features, (3, 3), strides, dtype=self.dtype, name="conv1")(x)
        y = nn.relu(BatchNorm(dtype=self.dtype, name="norm1")(y, train=train, mask=mask))
        y = Conv2D(self.features, (3, 3), (1, 1), dtype=self.dtype, name="conv2")(y)
        y = BatchNorm(dtype=self.dtype, zero_scale=True, name="norm2")(y, train=train, mask=mask)
        if x.shape[-1] != self.features or self.stride != 1:
            x = Conv2D(self.features, (1, 1), strides, dtype=self.dtype, name="shortcut")(x)
            x = BatchNorm(dtype=self.dtype, name="shortcut_norm")(x, train=train, mask=mask)
        return nn.relu(x + y)


class AudioResNet(nn.Module):
    """ResNet over a log-mel spectrogram of one channel.

    ResNet-18 is `widths=(64, 128, 256, 512)`, `depths=(2, 2, 2, 2)`, stem "resnet"; the 9-layer
    network of GDT has depths (1, 1, 1, 1).

    Attributes:
        widths: output channels of each stage; all but the first halve frames and mels.
        depths: residual blocks in each stage.
        stem: "resnet" (7x7 stride 2, 3x3 max-pool stride 2) or "patch" (non-overlapping patches
            through one dense layer; many times cheaper on a CPU).
        patch: (frames, mels) of a patch of stem "patch".
        dtype: compute dtype; parameters and statistics are float32.
    """

    widths: Sequence[int]
    depths: Sequence[int]
    stem: Literal["resnet", "patch"]
    patch: tuple[int, int] = (2, 2)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        spectrogram: Float[Array, "batch frames mels"],
        *,
        train: bool,
        mask: Bool[Array, " batch"] | None = None,
    ) -> dict[str, Array]:
        """Encodes spectrograms.

        Args:
            spectrogram: log-mel, about zero mean and unit scale.
            train: normalise by the statistics of the batch and update the running ones.
            mask: rows whose sound is present; the others do not enter the statistics.

        Returns:
            `features` float32 [batch, widths[-1]], the mean over frames and mels, and `map`
            [batch, frames', mels', widths[-1]] before it.

        Raises:
            ValueError: if the patch does not divide the spectrogram, or depths and widths differ.
        """
        if len(self.widths) != len(self.depths):
            raise ValueError(
                f"widths {tuple(self.widths)} and depths {tuple(self.depths)} must be equally long"
            )
        x = spectrogram[..., None].astype(self.dtype)
        width = self.widths[0]
        if self.stem == "patch":
            batch, frames, mels, _ = x.shape
            rows, columns = self.patch
            if frames % rows or mels % columns:
                raise ValueError(
                    f"patch {tuple(self.patch)} must divide the spectrogram's {frames}x{mels}"
                )
            x = x.reshape(batch, frames // rows, rows, mels // columns, columns)
            x = x.transpose(0, 1, 3, 2, 4)
            x = x.reshape(batch, frames // rows, mels // columns, rows * columns)
            x = nn.Dense(width, use_bias=False, dtype=self.dtype, name="stem_patch")(x)
        elif self.stem == "resnet":
            x = Conv2D(width, (7, 7), (2, 2), dtype=self.dtype, name="stem_conv")(x)
        else:
            raise ValueError(f"unknown stem {self.stem!r}: use 'resnet' or 'patch'")
        x = nn.relu(BatchNorm(dtype=self.dtype, name="stem_norm")(x, train=train, mask=mask))
        if self.stem == "resnet":
            x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        for stage, (width, depth) in enumerate(zip(self.widths, self.depths, strict=True)):
            for block in range(depth):
                x = AudioBlock(
                    width,
                    2 if stage > 0 and block == 0 else 1,
                    self.dtype,
                    name=f"stage{stage + 1}_block{block + 1}",
                )(x, train=train, mask=mask)
        return {"features": x.astype(jnp.float32).mean(axis=(1, 2)), "map": x}
