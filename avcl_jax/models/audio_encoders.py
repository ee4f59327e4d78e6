"""Audio encoders: convolutional networks over log-mel spectrograms.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, on one input channel, as
GDT (Patrick et al. 2020) and CrissCross (Sarkar and Etemad 2023) use them, and the plain network of
AVID (Morgado et al. 2021). Published sizes by name are in `avcl_jax.models.encoders`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from avcl_jax.errors import UserError
from avcl_jax.models.layers import (
    BatchNorm,
    Conv2D,
    Pool,
    Remat,
    check_patch,
    patches,
    pool_features,
    recomputed,
    run_block,
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
        y = Conv2D(self.features, (3, 3), strides, dtype=self.dtype, name="conv1")(x)
        y = nn.relu(self.norm(name="norm1")(y, train=train, mask=mask))
        y = Conv2D(self.features, (3, 3), (1, 1), dtype=self.dtype, name="conv2")(y)
        y = self.norm(zero_scale=True, name="norm2")(y, train=train, mask=mask)
        if x.shape[-1] != self.features or self.stride != 1:
            x = Conv2D(self.features, (1, 1), strides, dtype=self.dtype, name="shortcut")(x)
            x = self.norm(name="shortcut_norm")(x, train=train, mask=mask)
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
        norm_momentum: weight of the old running statistics (PyTorch's momentum is 1 minus it).
        norm_epsilon: added to the variance.
        freeze_norm: see `BatchNorm.frozen`.
        remat: see `recomputed`.
        dtype: compute dtype; parameters and statistics are float32.
    """

    widths: Sequence[int]
    depths: Sequence[int]
    stem: Literal["resnet", "patch"]
    patch: tuple[int, int] = (2, 2)
    norm_momentum: float = 0.9
    norm_epsilon: float = 1e-5
    freeze_norm: bool = False
    remat: Remat = "none"
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
            mask: rows with audio; the others do not enter the statistics.

        Returns:
            `features` float32 [batch, widths[-1]], the mean over frames and mels, and `map`
            [batch, frames', mels', widths[-1]] before it.

        Raises:
            UserError: if the patch does not divide the spectrogram, or depths and widths differ.
        """
        if len(self.widths) != len(self.depths):
            raise UserError(
                f"widths {tuple(self.widths)} and depths {tuple(self.depths)} must be equally long"
            )
        norm = functools.partial(
            BatchNorm,
            momentum=self.norm_momentum,
            epsilon=self.norm_epsilon,
            frozen=self.freeze_norm,
            dtype=self.dtype,
        )
        x = spectrogram[..., None].astype(self.dtype)
        width = self.widths[0]
        if self.stem == "patch":
            check_patch(
                self.patch,
                x.shape[1:3],
                names=("patch", "spectrogram"),
                settings=("spectrogram.frames", "spectrogram.mels"),
            )
            x = patches(x, self.patch)
            x = nn.Dense(width, use_bias=False, dtype=self.dtype, name="stem_patch")(x)
        elif self.stem == "resnet":
            x = Conv2D(width, (7, 7), (2, 2), dtype=self.dtype, name="stem_conv")(x)
        else:
            raise UserError(f"unknown stem {self.stem!r}: use 'resnet' or 'patch'")
        x = nn.relu(norm(name="stem_norm")(x, train=train, mask=mask))
        if self.stem == "resnet":
            x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        for stage, (width, depth) in enumerate(zip(self.widths, self.depths, strict=True)):
            for block in range(depth):
                layer = AudioBlock(
                    width,
                    2 if stage > 0 and block == 0 else 1,
                    norm,
                    self.dtype,
                    name=f"stage{stage + 1}_block{block + 1}",
                )
                x = run_block(layer, self.remat, x, train=train, mask=mask)
        return {"features": pool_features(x, "mean"), "map": x}


class AudioConvNet(nn.Module):
    """Plain convolutional network over a spectrogram, without shortcuts, as AVID's `Conv2D`.

    AVID's, of depth 10 by its own count, has `widths=(64, 128, 256, 512)`. After a 7x7 stem of
    stride 2 every block is two 3x3 convolutions; all blocks but the last halve frames and mels.

    Attributes:
        widths: channels of the stem and the blocks; the first is that of the stem and first block.
        pool: "mean" or "max" over frames and mels.
        norm_momentum: weight of the old running statistics (PyTorch's momentum is 1 minus it).
        norm_epsilon: added to the variance.
        freeze_norm: see `BatchNorm.frozen`.
        remat: see `recomputed`.
        dtype: compute dtype; parameters and statistics are float32.
    """

    widths: Sequence[int]
    pool: Pool
    norm_momentum: float = 0.9
    norm_epsilon: float = 1e-5
    freeze_norm: bool = False
    remat: Remat = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        spectrogram: Float[Array, "batch frames mels"],
        *,
        train: bool,
        mask: Bool[Array, " batch"] | None = None,
    ) -> dict[str, Array]:
        """Encodes spectrograms; arguments and results as of `AudioResNet`."""
        norm = functools.partial(
            BatchNorm,
            momentum=self.norm_momentum,
            epsilon=self.norm_epsilon,
            frozen=self.freeze_norm,
            dtype=self.dtype,
        )

        def layer(x: Array, width: int, size: int, stride: int, name: str) -> Array:
            kernel, strides = (size, size), (stride, stride)

            def run(_: Any, x: Array) -> Array:
                x = Conv2D(width, kernel, strides, dtype=self.dtype, name=f"{name}_conv")(x)
                return nn.relu(norm(name=f"{name}_norm")(x, train=train, mask=mask))

            return recomputed(run, self.remat)(self, x)

        x = layer(spectrogram[..., None].astype(self.dtype), self.widths[0], 7, 2, "stem")
        for block, width in enumerate(self.widths, start=1):
            stride = 1 if block == len(self.widths) else 2
            x = layer(x, width, 3, stride, f"block{block}_1")
            x = layer(x, width, 3, 1, f"block{block}_2")
        return {"features": pool_features(x, self.pool), "map": x}
