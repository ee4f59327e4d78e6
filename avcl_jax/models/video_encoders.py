"""Video encoders: the R(2+1)D, R3D and mixed-convolution family of residual networks.

Tran et al., "A Closer Look at Spatiotemporal Convolutions for Action Recognition", CVPR 2018.
Published sizes by name are in `avcl_jax.models.encoders`.
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
    Conv3D,
    Lowering,
    Pool,
    Remat,
    patches,
    pool_features,
    prepare_video,
    recomputed,
    run_block,
)
from avcl_jax.models.video_blocks import (
    BasicBlock,
    BottleneckBlock,
    ConvKind,
    NormAfterSumBlock,
)

Factorisation = Literal["r2plus1d", "r2plus1d_plain", "r3d", "mc3"]
Stem = Literal["r2plus1d", "r3d", "r3d_pool", "patch4"]
Block = Literal["basic", "bottleneck", "norm_after_sum"]

# Of the factorised stem; published, not computed from anything (Tran et al. 2018).
STEM_MIDDLE_CHANNELS = 45

_BLOCKS: dict[str, Any] = {
    "basic": BasicBlock,
    "bottleneck": BottleneckBlock,
    "norm_after_sum": NormAfterSumBlock,
}


class VideoResNet(nn.Module):
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
        subtract_time_mean: subtract the clip's mean frame, which leaves what moves.
        block: "basic", "bottleneck" (four times the channels come out), "norm_after_sum" (AVID).
        pool: "mean" or "max" over time and space.
        norm_momentum: weight of the old running statistics (PyTorch's momentum is 1 minus it).
        norm_epsilon: added to the variance.
        freeze_norm: see `BatchNorm.frozen`.
        channel_mean: see `prepare_video`.
        channel_std: see `prepare_video`.
        lowering: see `Conv3D`.
        remat: see `recomputed`.
        dtype: compute dtype; parameters and statistics are float32.
    """

    widths: Sequence[int]
    depths: Sequence[int]
    factorisation: Factorisation
    stem: Stem
    subtract_time_mean: bool
    block: Block = "basic"
    pool: Pool = "mean"
    norm_momentum: float = 0.9
    norm_epsilon: float = 1e-5
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
        """Encodes clips.

        Args:
            video: pixels, about zero mean and unit scale; in [0, 1] with `channel_mean`.
            train: normalise by the statistics of the batch and update the running ones.
            mask: rows with video; the others do not enter the statistics.

        Returns:
            `features` float32 [batch, channels], pooled over time and space, and `map`
            [batch, time', height', width', channels] before it; channels are the last width, four
            times that with bottlenecks.

        Raises:
            UserError: if the clip is smaller than a patch, or depths and widths differ in length.
        """
        if len(self.widths) != len(self.depths):
            raise UserError(
                f"widths {tuple(self.widths)} and depths {tuple(self.depths)} must be equally long"
            )
        if self.block not in _BLOCKS:
            raise UserError(f"unknown block {self.block!r}: use one of {', '.join(_BLOCKS)}")
        norm = functools.partial(
            BatchNorm,
            momentum=self.norm_momentum,
            epsilon=self.norm_epsilon,
            frozen=self.freeze_norm,
            dtype=self.dtype,
        )
        x = prepare_video(
            video,
            channel_mean=self.channel_mean,
            channel_std=self.channel_std,
            # A stem of patches does so itself, on fewer values.
            subtract_time_mean=self.subtract_time_mean and self.stem != "patch4",
        )
        stem = recomputed(lambda own, x: own._stem(x, norm, train, mask), self.remat)
        x = stem(self, x.astype(self.dtype))
        for stage, (width, depth) in enumerate(zip(self.widths, self.depths, strict=True)):
            kind: ConvKind
            if self.factorisation == "mc3":
                kind = "r3d" if stage == 0 else "spatial"
            else:
                kind = self.factorisation
            for block in range(depth):
                stride = 2 if stage > 0 and block == 0 else 1
                layer = _BLOCKS[self.block](
                    width,
                    stride,
                    1 if kind == "spatial" else stride,
                    kind,
                    self.lowering,
                    norm,
                    self.dtype,
                    name=f"stage{stage + 1}_block{block + 1}",
                )
                x = run_block(layer, self.remat, x, train=train, mask=mask)
        return {"features": pool_features(x, self.pool), "map": x}

    def _stem(self, x: Array, norm: Any, train: bool, mask: Array | None) -> Array:
        shared: dict[str, Any] = {"lowering": self.lowering, "dtype": self.dtype}
        width = self.widths[0]
        if self.stem == "patch4":
            height, columns = x.shape[2:4]
            if height % 4 or columns % 4:
                raise UserError(
                    f"stem 'patch4' needs a height and width divisible by 4, got {height}x{columns}"
                )
            x = patches(x, (1, 4, 4))
            x = nn.Dense(width, use_bias=False, dtype=self.dtype, name="stem_patch")(x)
            if self.subtract_time_mean:
                # Equals the mean of the pixels, as the layer is linear and sees single frames.
                # On pixels, XLA would compute the augmentation once more for the mean.
                x = x - x.mean(axis=1, keepdims=True)
        elif self.stem == "r2plus1d":
            middle = STEM_MIDDLE_CHANNELS
            x = Conv3D(middle, (1, 7, 7), (1, 2, 2), name="stem_spatial", **shared)(x)
            x = nn.relu(norm(name="stem_middle_norm")(x, train=train, mask=mask))
            x = Conv3D(width, (3, 1, 1), (1, 1, 1), name="stem_temporal", **shared)(x)
        elif self.stem in ("r3d", "r3d_pool"):
            x = Conv3D(width, (3, 7, 7), (1, 2, 2), name="stem_conv", **shared)(x)
        else:
            raise UserError(
                f"unknown stem {self.stem!r}: use 'r2plus1d', 'r3d', 'r3d_pool' or 'patch4'"
            )
        x = nn.relu(norm(name="stem_norm")(x, train=train, mask=mask))
        if self.stem == "r3d_pool":
            x = nn.max_pool(x, (1, 3, 3), (1, 2, 2), padding=((0, 0), (1, 1), (1, 1)))
        return x
