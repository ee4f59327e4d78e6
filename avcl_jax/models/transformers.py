"""Transformer encoders for clips and for spectrograms.

Video: Arnab et al., "ViViT: A Video Vision Transformer", ICCV 2021; tubelets, learned positions,
attention over all tokens (its model 1) or factorised into space and time (model 3, and, time before
space, the divided attention of Bertasius et al., TimeSformer, ICML 2021). Audio: Gong et al., "AST:
Audio Spectrogram Transformer", Interspeech 2021, with patches that do not overlap, as in Huang et
al., "Masked Autoencoders that Listen", NeurIPS 2022.

Both average their tokens instead of reading a class token, so pooled and unpooled features are
related as those of the convolutional encoders are. No normalisation looks across rows: a missing
row needs no mask.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from avcl_jax.errors import UserError
from avcl_jax.models.layers import (
    Remat,
    check_patch,
    patches,
    pool_features,
    prepare_video,
    run_block,
)

Attention = Literal["joint", "factorised"]

_POSITIONS = nn.initializers.normal(0.02)
_EPSILON = 1e-6  # of layer normalisation, as in ViT's published code


class SelfAttention(nn.Module):
    """Pre-normalised multi-head self-attention over the last axis but one, with its residual.

    Attributes:
        heads: number of heads.
        dtype: compute dtype; the softmax is float32.
    """

    heads: int
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch tokens channels"]
    ) -> Float[Array, "*batch tokens channels"]:
        """Mixes tokens."""
        y = nn.LayerNorm(epsilon=_EPSILON, dtype=self.dtype, name="norm")(x)
        y = nn.MultiHeadDotProductAttention(
            num_heads=self.heads,
            dtype=self.dtype,
            kernel_init=nn.initializers.xavier_uniform(),
            force_fp32_for_softmax=True,
            deterministic=True,
            name="attention",
        )(y)
        return x + y


class FeedForward(nn.Module):
    """Pre-normalised two-layer perceptron of four times the width, with its residual.

    Attributes:
        dtype: compute dtype.
    """

    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*batch channels"]) -> Float[Array, "*batch channels"]:
        """Maps every token on its own."""
        channels = x.shape[-1]
        y = nn.LayerNorm(epsilon=_EPSILON, dtype=self.dtype, name="norm")(x)
        y = nn.gelu(nn.Dense(4 * channels, dtype=self.dtype, name="hidden")(y), approximate=False)
        return x + nn.Dense(channels, dtype=self.dtype, name="output")(y)


def _positions(module: nn.Module, grid: tuple[int, ...]) -> Array:
    """Learned positions of a module, interpolated linearly if they are of another grid.

    Args:
        module: owner of the parameter.
        grid: (cells along each axis, channels).

    Returns:
        float32 [1, *grid].
    """
    learned = (1, *grid)
    if module.has_variable("params", "positions"):
        learned = module.get_variable("params", "positions").shape
    positions = module.param("positions", _POSITIONS, learned, jnp.float32)
    # Without antialiasing, as PyTorch's `interpolate`, with which AST and VideoMAE do so.
    return jax.image.resize(positions, (1, *grid), "linear", antialias=False)


class VideoTransformer(nn.Module):
    """Transformer over tubelets of a clip.

    ViT-S has width 384, depth 12, 6 heads; ViT-B width 768, depth 12, 12 heads. Positions are
    learned for the clips that the encoder is initialised with, and interpolated for others.

    Attributes:
        width: channels of a token.
        depth: number of layers.
        heads: heads of each attention.
        tubelet: (time, height, width) of the pixels of a token.
        attention: "joint" over all tokens, or "factorised": first over the tokens of one moment,
            then over the moments of one place, in every layer.
        subtract_time_mean: see `prepare_video`.
        channel_mean: see `prepare_video`.
        channel_std: see `prepare_video`.
        remat: see `recomputed`.
        dtype: compute dtype; parameters are float32.
    """

    width: int
    depth: int
    heads: int
    tubelet: tuple[int, int, int]
    attention: Attention
    subtract_time_mean: bool
    channel_mean: tuple[float, ...] | None = None
    channel_std: tuple[float, ...] | None = None
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
            train: without effect: nothing here differs in training.
            mask: without effect: no row touches another.

        Returns:
            `features` float32 [batch, width], the mean over tokens, and `map` [batch, time',
            height', width', width], the normalised tokens before it.

        Raises:
            UserError: if the tubelet does not divide the clip, or `attention` is unknown.
        """
        if self.attention not in ("joint", "factorised"):
            raise UserError(f"unknown attention {self.attention!r}: use 'joint' or 'factorised'")
        check_patch(
            self.tubelet,
            video.shape[1:4],
            names=("tubelet", "clip"),
            settings=("num_frames", "image_size", "image_size"),
        )
        x = prepare_video(
            video,
            channel_mean=self.channel_mean,
            channel_std=self.channel_std,
            subtract_time_mean=self.subtract_time_mean,
        )
        x = patches(x.astype(self.dtype), self.tubelet)
        x = nn.Dense(self.width, dtype=self.dtype, name="embedding")(x)
        x = x + _positions(self, x.shape[1:]).astype(self.dtype)
        batch, moments, rows, columns, width = x.shape
        x = x.reshape(batch, moments, rows * columns, width)
        if self.attention == "joint":
            x = x.reshape(batch, 1, -1, width)
        run = functools.partial(run_block, remat=self.remat)
        for layer in range(1, self.depth + 1):
            if self.attention == "factorised":
                x = run(SelfAttention(self.heads, self.dtype, name=f"layer{layer}_space"), x=x)
                x = x.swapaxes(1, 2)
                x = run(SelfAttention(self.heads, self.dtype, name=f"layer{layer}_time"), x=x)
                x = x.swapaxes(1, 2)
            else:
                x = run(SelfAttention(self.heads, self.dtype, name=f"layer{layer}_attention"), x=x)
            x = run(FeedForward(self.dtype, name=f"layer{layer}_mlp"), x=x)
        x = nn.LayerNorm(epsilon=_EPSILON, dtype=self.dtype, name="norm")(x)
        x = x.reshape(batch, moments, rows, columns, width)
        return {"features": pool_features(x, "mean"), "map": x}


class AudioTransformer(nn.Module):
    """Transformer over patches of a spectrogram; positions as of `VideoTransformer`.

    Attributes:
        width: channels of a token.
        depth: number of layers.
        heads: heads of each attention.
        patch: (frames, mels) of a token.
        remat: see `recomputed`.
        dtype: compute dtype; parameters are float32.
    """

    width: int
    depth: int
    heads: int
    patch: tuple[int, int]
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
            train: without effect: nothing here differs in training.
            mask: without effect: no row touches another.

        Returns:
            `features` float32 [batch, width], the mean over tokens, and `map` [batch, frames',
            mels', width], the normalised tokens before it.

        Raises:
            UserError: if the patch does not divide the spectrogram.
        """
        check_patch(
            self.patch,
            spectrogram.shape[1:],
            names=("patch", "spectrogram"),
            settings=("spectrogram.frames", "spectrogram.mels"),
        )
        x = patches(spectrogram[..., None].astype(self.dtype), self.patch)
        x = nn.Dense(self.width, dtype=self.dtype, name="embedding")(x)
        x = x + _positions(self, x.shape[1:]).astype(self.dtype)
        batch, frames, mels, width = x.shape
        x = x.reshape(batch, frames * mels, width)
        run = functools.partial(run_block, remat=self.remat)
        for layer in range(1, self.depth + 1):
            x = run(SelfAttention(self.heads, self.dtype, name=f"layer{layer}_attention"), x=x)
            x = run(FeedForward(self.dtype, name=f"layer{layer}_mlp"), x=x)
        x = nn.LayerNorm(epsilon=_EPSILON, dtype=self.dtype, name="norm")(x)
        x = x.reshape(batch, frames, mels, width)
        return {"features": pool_features(x, "mean"), "map": x}
